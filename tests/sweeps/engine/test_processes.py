"""Commands that run the program again."""

import sys
from types import SimpleNamespace

import pytest

from bn_lightning.sweeps.engine.processes import (
    as_typed,
    command_of_trial,
    run_command,
    same_command,
    shown_command,
)


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Simulate the start of a module, or of a script for None, with arguments."""
    monkeypatch.chdir(tmp_path)

    def start(module, *arguments):
        spec = None if module is None else SimpleNamespace(name=module)
        monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])

    return start


def test_a_script(started, tmp_path):
    started(None, "-m", "x=1,2")
    assert same_command() == [sys.executable, str(tmp_path / "run.py"), "-m", "x=1,2"]


@pytest.mark.parametrize("name", ["package.train", "package.__main__"])
def test_a_module(started, name):
    started(name, "x=1,2", "--multirun")
    module = name.removesuffix(".__main__")
    assert same_command() == [sys.executable, "-m", module, "x=1,2", "--multirun"]
    assert run_command(["x=1"]) == [sys.executable, "-m", module, "x=1"]


def test_what_chooses_the_configuration_is_kept(started):
    started("train", "-m", "-cn", "other", "x=1,2", "--config-dir=conf", "-cp", "a b")
    assert run_command(["x=1"])[3:] == ["-cn", "other", "--config-dir=conf", "-cp", "a b", "x=1"]


def test_as_typed():
    command = [sys.executable, "-m", "train", "x=[1,2]", "y='a b'", "z=1e-05"]
    assert as_typed(command) == "python -m train 'x=[1,2]' 'y='\"'\"'a b'\"'\"'' z=1e-05"
    assert as_typed(["other", "x=1"]) == "other x=1"


def test_a_command_is_shown_without_the_storage_s_password(started):
    started("train", "-m", "x=1,2", "note=se'cret", "seconds=1")
    shown = shown_command("postgresql://me:se%27cret@host/db")
    assert shown == "python -m train -m x=1,2 'note=***' seconds=1"


def test_a_console_script_is_typed_by_its_name(monkeypatch, tmp_path):
    script = tmp_path / "bn-train"
    script.write_text("#!/usr/bin/env python")
    command = [sys.executable, str(script), "x=1"]
    assert as_typed(command) == f"python {script} x=1"
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert as_typed(command) == "bn-train x=1"
    monkeypatch.setenv("PATH", "")  # of an environment that is not active
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert as_typed([sys.executable, *command[1:]]) == "bn-train x=1"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("bn-train -m +sweep=quick", "bn-train lr=1"),
        (
            "python -m bn_lightning.train -m +sweep=a hydra.sweeper.n_jobs=2",
            "python -m bn_lightning.train lr=1",
        ),
        ("python main.py -m a=1,2 --config-dir conf", "python main.py --config-dir conf lr=1"),
        ("main.py --multirun --config-name=x 'a=interval(0,1)'", "main.py --config-name=x lr=1"),
    ],
    ids=["script", "module", "file", "name"],
)
def test_the_command_of_a_trial_has_the_program_and_configuration_of_its_sweep(
    command: str, expected: str
) -> None:
    assert command_of_trial(command, ["lr=1"]) == expected
