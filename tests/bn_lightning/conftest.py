"""Fixtures of the tests that run the commands."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch


@dataclass
class Result:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def directory(self) -> Path:
        """The run's directory: the last line that a run prints."""
        return Path(self.out.strip().splitlines()[-1])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Layers of a few units are too small to share: threads would wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def command(monkeypatch, capsys, tmp_path) -> Callable[..., Result]:
    """Runs a command in this process, in an empty folder: `command(main, "data=digits")`."""
    from hydra.core.global_hydra import GlobalHydra

    monkeypatch.chdir(tmp_path)

    def run(main: Callable[[], None], *arguments: str) -> Result:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """The folder that holds the real MNIST, given by BN_LIGHTNING_DATA."""
    root = Path(os.environ.get("BN_LIGHTNING_DATA", "data")).absolute()
    if not (root / "mnist").is_dir():
        pytest.skip(f"needs the real MNIST in {root}/mnist; set BN_LIGHTNING_DATA to its folder")
    return root
