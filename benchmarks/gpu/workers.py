"""Run cases in processes of their own, so that a case that hangs or crashes costs only itself.

A kernel that never ends cannot be stopped from within its process, and after an illegal access the
process cannot use the device any more. A worker prints one JSON object a line: {"begin": number}
before a case and {"rows": [...]} after it. All its other output is ignored.
"""

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO, Any, NamedTuple

# Seconds that a worker may take to import torch and to find the device.
START_SECONDS = 90.0


class Limits(NamedTuple):
    """When to stop.

    Attributes:
        case_seconds: for one case; a case that takes longer is stopped and counts as failed.
        deadline: of `time.monotonic`; what has not begun by then is left out.
    """

    case_seconds: float
    deadline: float

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


class Failure(NamedTuple):
    """A case without rows.

    Attributes:
        number: of the case.
        reason: one line.
    """

    number: int
    reason: str


def print_rows(begin: int, run: Callable[[], list[dict[str, Any]]]) -> None:
    """Run a case in a worker, and print what `run_in_workers` reads."""
    print(json.dumps({"begin": begin}), flush=True)
    print(json.dumps({"rows": run()}), flush=True)


def run_in_workers(
    command: Sequence[str],
    numbers: Sequence[int],
    count: int,
    limits: Limits,
    on_result: Callable[[list[dict[str, Any]] | Failure], None],
) -> int:
    """Run cases in several workers at a time.

    Args:
        command: of a worker; the numbers of its cases follow, as "3,7,11".
        numbers: of the cases.
        count: workers, each with every `count`-th case.
        limits: of the cases, and of all together.
        on_result: called in this thread with the rows of each case, or with its failure.

    Returns:
        The number of cases that were left out because time was over.
    """
    results: queue.Queue[list[dict[str, Any]] | Failure | int] = queue.Queue()

    def work(own: list[int]) -> None:
        left_out = len(own)
        try:
            left_out = _supervise(command, own, limits, results.put)
        finally:
            results.put(left_out)

    shares = [share for i in range(count) if (share := list(numbers[i::count]))]
    threads = [threading.Thread(target=work, args=(share,), daemon=True) for share in shares]
    for thread in threads:
        thread.start()
    left_out, running = 0, len(threads)
    while running:
        result = results.get()
        if isinstance(result, int):
            left_out, running = left_out + result, running - 1
        else:
            on_result(result)
    return left_out


def _supervise(
    command: Sequence[str],
    numbers: list[int],
    limits: Limits,
    on_result: Callable[[list[dict[str, Any]] | Failure], None],
) -> int:
    """Run cases one after another, in a new worker after each that fails; return those left out."""
    waiting = list(numbers)
    while waiting and limits.left > 0:
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
            with _started([*command, ",".join(map(str, waiting))], errors) as process:
                reason = _follow(process, waiting, limits, on_result)
            if waiting and reason is not None and limits.left > 0:
                on_result(Failure(waiting.pop(0), f"{reason}: {_error_line(errors)}".rstrip(": ")))
    return len(waiting)


def _follow(
    process: subprocess.Popen[str],
    waiting: list[int],
    limits: Limits,
    on_result: Callable[[list[dict[str, Any]] | Failure], None],
) -> str | None:
    """Pass on the rows of a worker until it ends, and take its cases off `waiting`.

    Returns:
        Why it ended before its last case; None if it did not, or if time is over.
    """
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    until = time.monotonic() + START_SECONDS
    while waiting:
        try:
            line = lines.get(timeout=max(0.0, min(until, limits.deadline) - time.monotonic()))
        except queue.Empty:
            return "the case took too long" if limits.left > 0 else None
        if line is None:
            return f"the worker ended with exit code {process.wait()}"
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            if isinstance(message, dict) and "begin" in message:
                until = time.monotonic() + limits.case_seconds
            elif isinstance(message, dict) and "rows" in message:
                waiting.pop(0)
                on_result(message["rows"])
    return None


def _read(stream: IO[str] | None, lines: "queue.Queue[str | None]") -> None:
    assert stream is not None
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


@contextlib.contextmanager
def _started(command: list[str], errors: IO[str]) -> Any:
    """Start a worker, and end it with all processes that it started."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _error_line(errors: IO[str]) -> str:
    """Return the last line that begins with an exception's name, or else the last line."""
    errors.seek(0)
    lines = [line.strip() for line in errors if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return [*lines[-1:], *named][-1] if lines else ""
