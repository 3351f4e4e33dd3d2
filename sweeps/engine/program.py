"""The command line of this program, to be run again by others: workers, single trials, the user."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence

from bn_lightning.sweeps.engine.passwords import redacted

# Hydra's options that choose the configuration; the others say what to do with it.
_WITH_VALUE = ("--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd")


def program() -> list[str]:
    """Interpreter and program, without arguments."""
    import __main__

    spec = getattr(__main__, "__spec__", None)
    if spec is None:
        return [sys.executable, os.path.abspath(sys.argv[0])]
    name = spec.name.removesuffix(".__main__")
    return [sys.executable, "-m", name]


def same_command() -> list[str]:
    """The whole command as it was typed."""
    return [*program(), *sys.argv[1:]]


def shown_command(url: str) -> str:
    """The whole command as one types it, without the password of a storage.

    Args:
        url: the storage's address.
    """
    return as_typed([redacted(word, url) for word in same_command()])


def run_command(overrides: Sequence[str]) -> list[str]:
    """The command of a single run with these overrides."""
    return [*program(), *_config_options(sys.argv[1:]), *overrides]


def as_typed(command: Sequence[str]) -> str:
    """A command as one types it in a shell."""
    if command[0] != sys.executable:
        return shlex.join(command)
    script = os.path.basename(command[1])
    if shutil.which(script) == command[1]:  # a console script in the PATH
        return shlex.join([script, *command[2:]])
    return shlex.join(["python", *command[1:]])


def _config_options(arguments: Sequence[str]) -> list[str]:
    kept, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument.partition("=")[0] in _WITH_VALUE:
            kept.append(argument)
            if "=" not in argument and rest:
                kept.append(rest.pop(0))
    return kept
