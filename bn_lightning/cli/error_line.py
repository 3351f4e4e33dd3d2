"""Turn an exception into one line that says what to do."""

import difflib
import inspect
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from bn_lightning.cli.install_hint import install_command
from bn_lightning.runs.moved_names import moved_hint
from bn_lightning.sweeps.engine.processes import typed_arguments

FULL_ERROR = "HYDRA_FULL_ERROR"
"""The environment variable that shows tracebacks when it is 1."""

# Launchers of the extra `cluster`.
_LAUNCHERS = ("joblib", "submitit_local", "submitit_slurm")

# File names may contain control characters and line breaks, of ASCII, Latin-1 and Unicode.
_ESCAPED = {code: ascii(chr(code))[1:-1] for code in (*range(32), *range(127, 160), 0x2028, 0x2029)}


class ExperimentError(RuntimeError):
    """What Python called failed. The message is the line that the command prints."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an error inside the block into an `ExperimentError`."""
    try:
        yield
    except ExperimentError:
        raise
    except Exception as error:
        raise ExperimentError(format_error(error)) from error


def print_error(error: Exception) -> int:
    """Print the error as one line on stderr and return the exit code 1."""
    print(f"error: {format_error(error)}", file=sys.stderr)
    return 1


def format_error(error: BaseException) -> str:
    """Return what went wrong and what to do, without line breaks and control characters.

    Errors that Hydra or OmegaConf wrap are unwrapped. An unknown key comes with the nearest known
    one.
    """
    message = _message(error)
    hint = moved_hint(message)
    return (message if hint in message else message + hint).translate(_ESCAPED)


def _message(error: BaseException) -> str:
    error, built = _unwrap(error)
    text = str(error).partition("Config search path")[0].partition("full_key:")[0]
    text = re.sub(r"\s+", " ", text).strip()
    match error:
        case OverrideParseException():
            return f"cannot read the override {error.override!r}: {_reading(error.override, text)}"
        case MissingMandatoryValue():
            return f"expected `{error.full_key}` to be given, got none; add {error.full_key}=VALUE"
        case ConfigKeyError() | ConfigAttributeError():
            hint = _nearest(error)
            if _is_sweep_without_experiment(typed_arguments()):
                hint = "; the sweep needs an experiment that has it: add +experiment=mnist_bn"
            elif _is_of_trainer(str(error.full_key)):
                hint = f"; Lightning's Trainer takes it: add +{error.full_key}=VALUE"
            return f"`{error.full_key}` is no key of the configuration{hint}"
        case InterpolationResolutionError():
            # The message of what a resolver raised follows OmegaConf's.
            return text.partition("raised while resolving interpolation: ")[2] or text
        case ImportError() if target := re.match(r"Error loading '(.+?)'", text):
            key = f"{built}._target_".removeprefix(".")
            return (
                f"expected `{key}` to be a name that can be found, got {target[1]}:"
                f" {error.__cause__}; correct it, or install its package"
            )
        case OSError(filename=str() | bytes() as name):
            return f"{os.fsdecode(name)}: {error.strerror}; repair this place or choose another"
        case OSError(strerror=str()):
            return f"{error.strerror} ({FULL_ERROR}=1 shows where); make room or repair this place"
        case TypeError() if built and text:
            return f"`{built}` cannot be built of these values: {text}"
    if text.startswith("Config group override must be a string"):
        keys = (typed[:-5] for typed in typed_arguments() if typed.endswith("=null"))
        group = next(keys, "GROUP").lstrip("+")
        return (
            f"expected `{group}` to be the name of an option, got null; use {group}=none if there "
            f"is such an option, or ~{group}"
        )
    if launcher := re.search(rf"'hydra/launcher/({'|'.join(_LAUNCHERS)})'", text):
        return (
            f"expected the package of `hydra/launcher={launcher[1]}` to be installed, got none; "
            f"{install_command('cluster')}"
        )
    if text.startswith("BasicSweeper does not support sweep type"):
        return f"{text}; add hydra/sweeper=bn_optuna, or give values one by one"
    is_own = type(error).__module__.startswith("bn_lightning.")
    if text and (is_own or isinstance(error, ValueError | HydraException | OmegaConfBaseException)):
        return text
    return f"{type(error).__name__}: {text or 'no message'} ({FULL_ERROR}=1 shows where)"


def _is_sweep_without_experiment(overrides: list[str]) -> bool:
    keys = {override.partition("=")[0].lstrip("+") for override in overrides}
    return "sweep" in keys and "experiment" not in keys


def _is_of_trainer(key: str) -> bool:
    """Return whether a key is an argument of Lightning's Trainer that conf/trainer leaves out."""
    if not key.startswith("trainer."):
        return False
    from lightning import Trainer

    return key.removeprefix("trainer.") in inspect.signature(Trainer.__init__).parameters


def _unwrap(error: BaseException) -> tuple[BaseException, str]:
    """Return what Hydra wrapped, and the key of the node that it was building."""
    built = ""
    while error.__cause__ is not None and (
        isinstance(error, InstantiationException)
        or (
            isinstance(error, HydraException)
            and isinstance(error.__cause__, OmegaConfBaseException)
        )
        # Raised by logging, when Hydra makes it open the log file.
        or str(error).startswith("Unable to configure")
    ):
        if isinstance(error, InstantiationException):
            built = str(error).partition("full_key: ")[2].strip()
        error = error.__cause__
    return error, built


def _reading(override: str | None, text: str) -> str:
    """Return why Hydra cannot read an override, and how to type it."""
    key, equals, value = (override or "").partition("=")
    if not equals:
        is_path = os.path.exists(key)
        return "expected KEY=VALUE" + f", such as ckpt_path={key}" * is_path
    if value[:1] in ("'", '"', "[", "{"):
        return text
    quoted = QuotedString(value, Quote.double).with_quotes()
    return (
        f"{text}; put a value with = , ( ) [ ] {{ }} or quotes into quotes, in a shell"
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
    return f"; there are {', '.join(names)}" if names else ""


def _places(node: Any, key: str, path: str = "") -> Iterator[str]:
    """Yield the full names of all keys of a configuration that end in `key`."""
    if isinstance(node, DictConfig):
        for name in map(str, node):
            if name == key:
                yield f"{path}{name}"
            if not OmegaConf.is_interpolation(node, name) and not OmegaConf.is_missing(node, name):
                yield from _places(node[name], key, f"{path}{name}.")
