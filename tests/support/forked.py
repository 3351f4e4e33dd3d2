"""A command in a process that is forked from one that has imported Lightning already.

`python -m bn_lightning.train` spends 4 s of a processor on imports. A server of `multiprocessing`
imports once, and each command is a fork of it: a process of its own, with its own folder,
environment, output and signals, that can be killed like any other.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["lightning.pytorch", "optuna"])


class Forked:
    """The part of `subprocess.Popen` that tests use, for `python -m MODULE ARGUMENTS`.

    Args:
        module: the module that is run as a program.
        arguments: its arguments.
        folder: its working directory.
    """

    def __init__(self, module: str, arguments: tuple[str, ...], folder: Path) -> None:
        self.args = ["python", "-m", module, *arguments]
        self._written = tempfile.TemporaryDirectory()
        process = _FORKS.Process(
            target=_run, args=(module, arguments, folder, dict(os.environ), self._written.name)
        )
        process.start()
        self._process, self.pid = process, process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        with self._written as folder:
            out, err = (Path(folder, name).read_bytes() for name in ("stdout", "stderr"))
        return os.fsdecode(out), os.fsdecode(err)

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(
    module: str, arguments: tuple[str, ...], folder: Path, environment: dict[str, str], written: str
) -> None:
    """Become the command, in the new process."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(os.path.join(written, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.argv[1:] = arguments
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
