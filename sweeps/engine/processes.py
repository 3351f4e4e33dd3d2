"""Ending a process and all that it started."""

import contextlib
import os
import signal
import subprocess

# Seconds that a process is given to end before it is killed.
KILL_AFTER = 10.0


def end_session(process: "subprocess.Popen[bytes]") -> None:
    """End a process that leads a session, and all that it started."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=KILL_AFTER)
            return
