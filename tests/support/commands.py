"""The fixture that runs a command in the tests' own process."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


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


@pytest.fixture
def command(monkeypatch, capsys, tmp_path) -> Callable[..., Result]:
    """Runs a command in this process, in an empty folder: `command(main, "data=digits")`."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    monkeypatch.chdir(tmp_path)
    # Hydra leaves the configuration of the last command behind, also for what no command calls.
    monkeypatch.setattr(HydraConfig.instance(), "cfg", HydraConfig.instance().cfg)

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
