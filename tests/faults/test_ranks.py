"""If one rank is killed, the others exit soon with one error line, and the run can resume."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from run_process import SMALL, check_same_end, check_whole, finish, run, start

ARGUMENTS = (*SMALL, "trainer=ddp_sim", "norm=sync", "data.batch_size=30", "trainer.max_steps=100")
ARGUMENTS += ("trainer.val_check_interval=10",)
LONGEST = 60  # seconds until all ranks have exited, on a busy machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks in /proc"),
]


def processes_of(session: int) -> list[int]:
    """Return the process ids of a session, without zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue  # the process has just exited
        if int(sid) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def last_time(folder: Path) -> float:
    found = list(folder.glob("logs/*/runs/*/checkpoints/last.ckpt"))
    return found[0].stat().st_mtime if found else 0.0


def test_a_rank_is_killed(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = run(tmp_path / "whole", *ARGUMENTS)
    folder, chance, goes_on = tmp_path / "killed", random.Random(8), ()
    for rank in (1, 0):
        before = last_time(folder)
        process = start(folder, *ARGUMENTS, *goes_on, start_new_session=True)
        while last_time(folder) == before:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (other,) = map(int, children)
        os.kill(other if rank else process.pid, signal.SIGKILL)
        killed = time.monotonic()
        while processes_of(process.pid):
            assert time.monotonic() < killed + LONGEST, f"rank {1 - rank} is still running"
            time.sleep(0.05)
        seconds = time.monotonic() - killed
        _, err = process.communicate()
        print(
            f"rank {rank} killed: all exited after {seconds:.1f} s, exit code {process.returncode}"
        )
        print(err)
        # Every five seconds Lightning looks for killed children, and kills the rest.
        is_first = rank == 1 and "Forcefully terminating" not in err
        assert process.returncode == (1 if is_first else -signal.SIGKILL), err
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        if is_first or rank == 0:
            assert len(lines) == 1 and "another rank" in lines[0], err
        (directory,) = folder.glob("logs/*/runs/*")
        check_whole(directory)
        goes_on = ("ckpt_path=last",)
    finish(start(folder, *ARGUMENTS, *goes_on))
    check_same_end(whole, directory)
