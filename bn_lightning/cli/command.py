"""What the commands share: composition by Hydra, errors in one line, exit codes."""

import difflib
import functools
import io
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.types import RunMode
from hydra_plugins.bn_optuna import register
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from bn_lightning.runs.directory import hydra_directory, run_directory
from bn_lightning.runs.interruption import Interrupted, handled_by, raise_interrupted
from bn_lightning.sweeps.engine.environment import in_trial
from bn_lightning.sweeps.engine.passwords import refuse_typed_password

FULL_ERROR = "HYDRA_FULL_ERROR"
_ONE_LINE = "BN_LIGHTNING_ONE_LINE"  # tells the ranks of a run that nobody asked for tracebacks

# Names of files may hold control characters and line breaks, of ASCII, Latin-1 and Unicode.
_SHOWN = {code: ascii(chr(code))[1:-1] for code in (*range(32), *range(127, 160), 0x2028, 0x2029)}


def hydra_command(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make a function of a composed configuration a command.

    The command exits with 0, with 1 after an error, which is one line on stderr that says what to
    do (the traceback behind `HYDRA_FULL_ERROR=1`), with 130 or 143 when SIGINT or SIGTERM ended it.
    In a multirun, errors are left to the sweeper.

    Args:
        config_name: the primary configuration in `bn_lightning.conf`.
    """
    register()
    for resolver in (run_directory, hydra_directory, several_processes):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True, use_cache=True)

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        failures: list[Exception] = []

        @functools.wraps(task)
        def run(config: DictConfig) -> Any:
            try:
                return task(config)
            except Exception as error:
                if in_sweep() or in_trial():
                    raise
                # Raised from here, Hydra would print a line of its own above the error's.
                failures.append(error)

        hydra_main = hydra.main("pkg://bn_lightning.conf", config_name, version_base="1.3")(run)

        def main() -> None:
            refuse_typed_password(sys.argv[1:])
            hydra_main()
            if failures:
                raise failures.pop()

        @functools.wraps(task)
        def command() -> None:
            full_error = os.environ.get(FULL_ERROR)
            is_wanted = full_error == "1" and _ONE_LINE not in os.environ
            # So that Hydra raises its errors instead of printing them over several lines.
            os.environ[FULL_ERROR] = "1"
            if not is_wanted:
                os.environ[_ONE_LINE] = "1"
            try:
                run_reported(main, full_error=is_wanted)
            finally:
                if full_error is None:
                    del os.environ[FULL_ERROR]
                os.environ.pop(_ONE_LINE, None)

        return command

    return decorate


def several_processes(devices: Any, strategy: str) -> bool:
    """Whether a run starts processes of its own, for `hydra.sweeper.isolate`.

    Args:
        devices: a number, a list of numbers, or as Lightning's Trainer takes them.
        strategy: of the Trainer.
    """
    if "ddp" in strategy or "fsdp" in strategy or "deepspeed" in strategy:
        return True
    return devices not in (1, "1") and not (OmegaConf.is_list(devices) and len(devices) == 1)


def run_reported(command: Callable[[], Any], full_error: bool = False) -> None:
    """Run a command's body; end the process with an exit code if it does not come to its end.

    Args:
        command: the body.
        full_error: let errors through with their traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        # A path may hold bytes that are no UTF-8: they are printed as they are.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="surrogateescape")
    try:
        with handled_by(raise_interrupted):
            command()
    except Interrupted as interrupted:
        sys.exit(interrupted.exit_code)
    except Exception as error:
        if full_error:
            raise
        sys.exit(report(error))


def quiet_lightning() -> None:
    """Silence what Lightning says of devices and tips, and a warning that is not its user's.

    The command's own summary says what matters. Warnings that a user can act on are left.
    """
    import lightning.pytorch  # noqa: F401  importing it sets the level of its log

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Lightning 2.6 calls what torch 2.13 calls deprecated.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    # A run's budget is in steps, across epochs, and so is its log.
    warnings.filterwarnings("ignore", message="The number of training batches")
    # A resumed run writes where it wrote before.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")


def in_sweep() -> bool:
    """Whether this is one job of a Hydra multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def report(error: Exception) -> int:
    """Print the error as one line on stderr and return the exit code 1."""
    print(f"error: {one_line(error)}", file=sys.stderr)
    return 1


def one_line(error: BaseException) -> str:
    """What went wrong and what to do, without line breaks or what a terminal would obey.

    Configuration errors name the key and the nearest one that exists; an error that Hydra or
    OmegaConf met while building an object is that object's own error.
    """
    return _message(error).translate(_SHOWN)


def _message(error: BaseException) -> str:
    built = ""
    while error.__cause__ is not None and (
        isinstance(error, InstantiationException)
        or (
            isinstance(error, HydraException)
            and isinstance(error.__cause__, OmegaConfBaseException)
        )
        # Of logging, when Hydra lets it open the file of the log.
        or str(error).startswith("Unable to configure")
    ):
        if isinstance(error, InstantiationException):
            built = str(error).partition("full_key: ")[2].strip()
        error = error.__cause__
    text = str(error).partition("Config search path")[0].partition("full_key:")[0]
    text = re.sub(r"\s+", " ", text).strip()
    if isinstance(error, OverrideParseException):
        return f"cannot read the override {error.override!r}: {_reading(error.override, text)}"
    if isinstance(error, MissingMandatoryValue):
        return f"`{error.full_key}` expected a value, got none; give {error.full_key}=VALUE"
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        return f"`{error.full_key}` is no key of the configuration{_nearest(error)}"
    if isinstance(error, InterpolationResolutionError):
        # What a resolver raised, without OmegaConf's words around it.
        return text.partition("raised while resolving interpolation: ")[2] or text
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; choose another place, or mend this one"
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.strerror} ({FULL_ERROR}=1 shows where); make room, or mend this place"
    if text.startswith("BasicSweeper does not support sweep type"):
        return f"{text}; add hydra/sweeper=bn_optuna, or give values one by one"
    is_own = type(error).__module__.startswith("bn_lightning.")
    if text and (is_own or isinstance(error, ValueError | HydraException | OmegaConfBaseException)):
        return text
    if isinstance(error, TypeError) and built and text:
        return f"`{built}` cannot be built of these values: {text}"
    return f"{type(error).__name__}: {text or 'no message'} ({FULL_ERROR}=1 shows where)"


def _reading(override: str | None, text: str) -> str:
    """Why Hydra cannot read an override, and how it is typed."""
    key, equals, value = (override or "").partition("=")
    if not equals:
        is_path = os.path.exists(key)
        return "expected KEY=VALUE" + f", such as ckpt_path={key}" * is_path
    if value[:1] in ("'", '"', "[", "{"):
        return text
    quoted = QuotedString(value, Quote.double).with_quotes()
    return (
        f"{text}; a value with = , ( ) [ ] {{ }} or quotes stands in quotes, in a shell"
        f" {shlex.quote(f'{key}={quoted}')}"
    )


def _nearest(error: OmegaConfBaseException) -> str:
    names = [str(key) for key in error.parent_node or () if not str(key).startswith("_")]
    by_lower_case = {name.lower(): name for name in names}
    near = difflib.get_close_matches(str(error.key).lower(), by_lower_case, n=1)
    path = str(error.full_key).rpartition(".")[0]
    if near:
        name = by_lower_case[near[0]]
        return f"; did you mean `{path}.{name}`?" if path else f"; did you mean `{name}`?"
    if not path and (places := list(_places(error.parent_node, str(error.key)))):
        return f"; did you mean `{min(places, key=len)}`?"
    return f"; there are {', '.join(names)}"


def _places(node: Any, key: str, path: str = "") -> Iterator[str]:
    """Where in a configuration a key of this name stands."""
    if isinstance(node, DictConfig):
        for name in map(str, node):
            if name == key:
                yield f"{path}{name}"
            if not OmegaConf.is_interpolation(node, name) and not OmegaConf.is_missing(node, name):
                yield from _places(node[name], key, f"{path}{name}.")
