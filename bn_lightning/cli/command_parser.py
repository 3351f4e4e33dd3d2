"""Parse the words of a command; what it does not take is an error in one line."""

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from typing_extensions import override


class CommandParser(argparse.ArgumentParser):
    """A parser that raises its errors, where argparse prints the usage and ends the process.

    Attributes:
        help_option: the option of the command that lists its options.
    """

    help_option = "--help"

    @override
    def error(self, message: str) -> NoReturn:
        """Raise what argparse says as a `ValueError`."""
        name, _, words = message.partition(": ")
        if name != "unrecognized arguments":
            raise ValueError(
                f"cannot read the command: {message}; {self.help_option} lists what it takes"
            )
        word = words.split()[0]
        if not word.startswith("-"):
            raise ValueError(
                f"expected all KEY=VALUE one after another, got {word!r} after an option; move the "
                "options, such as -m, before the first KEY=VALUE or after the last"
            )
        options = re.findall(r"--[a-z-]+", self.format_usage())
        near = difflib.get_close_matches(word.partition("=")[0], options, n=1)
        advice = f"did you mean {near[0]}?" if near else f"{self.help_option} lists them"
        raise ValueError(f"expected an option of this command, got {word!r}; {advice}")


def check_hydras_options(words: Sequence[str]) -> None:
    """Refuse the words of a command that Hydra would end the process for.

    Raises:
        ValueError: an option is unknown or lacks its value, or stands between overrides.
    """
    parser = CommandParser(parents=[get_args_parser()], add_help=False)
    parser.help_option = "--hydra-help"
    parser.parse_args(words)
