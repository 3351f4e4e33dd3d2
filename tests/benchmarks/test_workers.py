"""Cases in processes of their own: what hangs, crashes or is late costs only itself."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from gpu import workers
from gpu.workers import Failure, Limits, run_in_workers

# A worker that needs no torch. Case 3 ends the process, case 5 never ends.
WORKER = """
import json, os, sys, time
for number in map(int, sys.argv[1].split(",")):
    print("some output of a library", flush=True)
    print(json.dumps({"begin": number}), flush=True)
    if number == 3:
        print("out of luck", file=sys.stderr, flush=True)
        os._exit(7)
    if number == 5:
        time.sleep(600)
    print(json.dumps({"rows": [{"number": number}]}), flush=True)
"""


def _run(
    numbers: Sequence[int], count: int, limits: Limits, worker: str = WORKER
) -> tuple[set[int], dict[int, str], int]:
    """Return the numbers of the rows, the reasons of the failures, and the number left out."""
    rows: set[int] = set()
    failures: dict[int, str] = {}

    def on_result(result: list[dict[str, Any]] | Failure) -> None:
        if isinstance(result, Failure):
            failures[result.number] = result.reason
        else:
            rows.update(row["number"] for row in result)

    left_out = run_in_workers([sys.executable, "-c", worker], numbers, count, limits, on_result)
    return rows, failures, left_out


def test_a_crash_and_a_hang_cost_only_themselves() -> None:
    limits = Limits(case_seconds=2.0, deadline=time.monotonic() + 60)
    rows, failures, left_out = _run(range(8), 2, limits)
    assert rows == {0, 1, 2, 4, 6, 7} and left_out == 0
    assert failures.keys() == {3, 5}
    assert "exit code 7" in failures[3] and "out of luck" in failures[3]
    assert "too long" in failures[5]


def test_at_the_deadline_the_rest_is_left_out() -> None:
    begin = time.monotonic()
    rows, failures, left_out = _run([5, 6, 7], 1, Limits(60.0, begin + 1.0))
    assert time.monotonic() - begin < 30
    assert not rows and not failures and left_out == 3
    assert _run(range(3), 2, Limits(60.0, begin)) == (set(), {}, 3)


def test_a_worker_that_never_begins_fails_its_cases(monkeypatch: Any) -> None:
    monkeypatch.setattr(workers, "START_SECONDS", 0.5)
    limits = Limits(60.0, time.monotonic() + 60)
    rows, failures, left_out = _run([0, 1], 1, limits, "import time; time.sleep(600)")
    assert not rows and failures.keys() == {0, 1} and left_out == 0


def test_no_cases_need_no_worker() -> None:
    assert _run([], 4, Limits(1.0, time.monotonic() + 1)) == (set(), {}, 0)
