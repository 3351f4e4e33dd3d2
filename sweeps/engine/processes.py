"""The command line of this program, and the end of processes that were started with it."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

from bn_lightning.sweeps.engine.passwords import redacted

# Hydra's options that select the configuration; the others select what to do with it.
_CONFIG_OPTIONS = ("--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd")

# Seconds between SIGTERM and SIGKILL.
KILL_AFTER = 10.0

# The module and the arguments of a command that is called from Python.
_called: ContextVar[tuple[str, list[str]] | None] = ContextVar("called", default=None)


@contextlib.contextmanager
def called_as(module: str, arguments: Sequence[str]) -> Iterator[None]:
    """Call a command from Python inside the block: its processes are started as `python -m module`.

    Args:
        module: of the command.
        arguments: of the command, which replace those of this process.
    """
    token = _called.set((module, list(arguments)))
    try:
        yield
    finally:
        _called.reset(token)


def is_called() -> bool:
    """Return whether the command is called from Python, so that this process is another program."""
    return _called.get() is not None


def typed_arguments() -> list[str]:
    """Return the arguments of the command."""
    called = _called.get()
    return sys.argv[1:] if called is None else called[1]


def same_command() -> list[str]:
    """Return the interpreter, the program and all arguments of this process."""
    return [*_program(), *typed_arguments()]


def run_command(overrides: Sequence[str]) -> list[str]:
    """Return the command of a single run with the given overrides and the same configuration."""
    return [*_program(), *_config_options(typed_arguments()), *overrides]


def _config_options(words: Sequence[str]) -> list[str]:
    options: list[str] = []
    arguments = iter(words)
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name in _CONFIG_OPTIONS:
            options += [argument] if equals else [argument, next(arguments, "")]
    return options


def command_of_trial(command: str, overrides: Sequence[str]) -> str:
    """Return the command of a single run with the program and the configuration of a sweep.

    Args:
        command: of the sweep, as `shown_command` returned it.
        overrides: of the run.
    """
    words = shlex.split(command)
    length = 1
    if words[0].startswith("python"):
        length = 3 if words[1:2] == ["-m"] else 2
    return shlex.join([*words[:length], *_config_options(words[length:]), *overrides])


def shown_command(url: str) -> str:
    """Return the command of this process as typed, without the password of a storage.

    Args:
        url: of the storage.
    """
    return as_typed([redacted(word, url) for word in same_command()])


def as_typed(command: Sequence[str]) -> str:
    """Return a command as a user types it in a shell; a console script by its name alone."""
    if command[0] != sys.executable:
        return shlex.join(command)
    script = os.path.basename(command[1])
    is_of_environment = os.path.dirname(command[1]) == os.path.dirname(sys.executable)
    if is_of_environment or shutil.which(script) == command[1]:
        return shlex.join([script, *command[2:]])
    return shlex.join(["python", *command[1:]])


def end_session(process: "subprocess.Popen[bytes]") -> None:
    """End the leader of a session and all processes of the session."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=KILL_AFTER)
            return


def _program() -> list[str]:
    import __main__

    if (called := _called.get()) is not None:
        return [sys.executable, "-m", called[0]]
    spec = getattr(__main__, "__spec__", None)
    if spec is None:
        return [sys.executable, os.path.abspath(sys.argv[0])]
    return [sys.executable, "-m", spec.name.removesuffix(".__main__")]
