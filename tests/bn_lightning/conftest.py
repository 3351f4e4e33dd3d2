"""Fixtures of the tests that run the commands, that fuse, and that run on several ranks."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import command  # noqa: F401  a fixture


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Layers of a few units are too small to share: threads would wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fused_calls(monkeypatch) -> list[bool]:
    """For each call of one of our BatchNorms, whether something was fused into it."""
    from bn_lightning.modules import batch_norm as module

    seen: list[bool] = []
    whole = module.batch_norm

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(kwargs["residual"] is not None or kwargs["activation"] != "identity")
        return whole(*args, **kwargs)

    monkeypatch.setattr(module, "batch_norm", watched)
    return seen


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """The folder that holds the real MNIST, given by BN_LIGHTNING_DATA."""
    root = Path(os.environ.get("BN_LIGHTNING_DATA", "data")).absolute()
    if not (root / "mnist").is_dir():
        pytest.skip(f"needs the real MNIST in {root}/mnist; set BN_LIGHTNING_DATA to its folder")
    return root


class Ranks:
    """Processes of one gloo process group, which run functions of test modules.

    Args:
        world_size: how many.
        folder: an empty one, where they find one another.
    """

    def __init__(self, world_size: int, folder: Path) -> None:
        self.world_size, self.folder = world_size, folder
        self.processes: list[subprocess.Popen[bytes]] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Runs `function(*arguments)` on all ranks and returns what each returned.

        Raises:
            RuntimeError: with the tracebacks, if any of them raised or died.
        """
        if not self.processes:
            self._start()
        request = pickle.dumps((function.__code__.co_filename, function.__name__, arguments))
        for process in self.processes:
            process.stdin.write(request)
            process.stdin.flush()
        answers = [self._answer(process) for process in self.processes]
        if all(ok for ok, _ in answers):
            return [answer for _, answer in answers]
        # They may have stopped in different places: the next function gets new ones.
        self.end()
        raise RuntimeError(
            "\n".join(f"rank {r}: {answer}" for r, (_, answer) in enumerate(answers))
        )

    def end(self) -> None:
        """Ends the processes and waits for them."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.communicate()
        self.processes = []

    def _start(self) -> None:
        script = Path(__file__).parents[1] / "support" / "rank_process.py"
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        store = self.folder / f"store_{len(list(self.folder.iterdir()))}"
        for rank in range(self.world_size):
            arguments = [script, rank, self.world_size, store]
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, *map(str, arguments)],
                    env=env,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
            )

    @staticmethod
    def _answer(process: "subprocess.Popen[bytes]") -> tuple[bool, Any]:
        try:
            return pickle.load(process.stdout)
        except EOFError:
            return False, f"died with {process.wait()}"


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two ranks: `ranks(function, *arguments)`, for a function at the top of a test module."""
    both = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield both
    both.end()


@pytest.fixture
def three_ranks(tmp_path: Path) -> Iterator[Ranks]:
    """Three ranks, as `ranks`."""
    three = Ranks(3, tmp_path)
    yield three
    three.end()
