"""Errors in one line and exit codes: what the commands share."""

import gc
import json
import os
import signal
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import instantiate
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf

from bn_lightning.cli.command import (
    devices_per_job,
    quiet_lightning,
    run_with_exit_code,
    several_processes,
)
from bn_lightning.cli.error_line import format_error, print_error
from bn_lightning.data.errors import DataError
from bn_lightning.runs.interruption import Interrupted
from bn_lightning.sweeps.engine.processes import called_as


def error_of(function: Any, *arguments: Any) -> Exception:
    try:
        function(*arguments)
    except Exception as error:
        return error
    raise AssertionError("no error")


def composed(*overrides: str) -> Any:
    with initialize_config_module("bn_lightning.conf", version_base="1.3"):
        config = compose("train", list(overrides))
        return OmegaConf.to_container(config.optimizer, resolve=True)


def picked(content: dict[str, Any], key: str) -> Any:
    return OmegaConf.select(OmegaConf.create(content), key, throw_on_missing=True)


def opened(path: str) -> None:
    with open(path):
        pass


def target(name: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": name, **arguments}


LINES = {
    "value": (ValueError, ("`lr` expected more",), ["`lr` expected more"]),
    "several_lines": (ValueError, ("one\n   two\r\nthree ",), ["one two three"]),
    "data": (DataError, ("no MNIST here; download it",), ["no MNIST here; download it"]),
    "file": (
        opened,
        ("/proc/nowhere/a.ckpt",),
        ["/proc/nowhere/a.ckpt", "No such file or directory", "repair this place"],
    ),
    "folder": (os.listdir, ("/proc/nowhere",), ["/proc/nowhere", "No such file or directory"]),
    "no_file_name": (OSError, ("no space",), ["OSError", "no space", "HYDRA_FULL_ERROR=1"]),
    "sweeper": (
        HydraException,
        ("BasicSweeper does not support sweep type : INTERVAL_SWEEP",),
        ["INTERVAL_SWEEP; add hydra/sweeper=bn_optuna"],
    ),
    "launcher": (
        HydraException,
        ("In 'hydra/config': Could not find 'hydra/launcher/joblib'\nAvailable options: basic",),
        ["`hydra/launcher=joblib`", "pip install", "[cluster]"],
    ),
    "other": (
        RuntimeError,
        ("shapes differ",),
        ["RuntimeError: shapes differ", "HYDRA_FULL_ERROR"],
    ),
    "key": (KeyError, ("name",), ["KeyError: 'name'", "HYDRA_FULL_ERROR=1 shows where"]),
    "no_message": (RuntimeError, (), ["RuntimeError", "no message", "HYDRA_FULL_ERROR"]),
    "lightning": (MisconfigurationException, ("no such\nmetric",), ["no such metric"]),
    "experiment": (composed, ("+experiment=nope",), ["experiment/nope"]),
    "option": (composed, ("norm=foo",), ["foo", "batch", "none", "torch"]),
    "grammar": (composed, ("optimizer.lr=[1",), ["optimizer.lr=[1"]),
    "typo": (
        composed,
        ("trainer.max_stps=5",),
        ["`trainer.max_stps` is no key", "did you mean `trainer.max_steps`?"],
    ),
    "another_argument_of_the_trainer": (
        composed,
        ("trainer.accumulate_grad_batches=2",),
        ["`trainer.accumulate_grad_batches` is no key", "+trainer.accumulate_grad_batches="],
    ),
    "capital": (composed, ("optimizer.Lr=5",), ["did you mean `optimizer.lr`?"]),
    "a_key_of_a_group": (composed, ("lr=5",), ["`lr` is no key", "did you mean `optimizer.lr`?"]),
    "no_key": (composed, ("runs/best.ckpt",), ["'runs/best.ckpt': expected KEY=VALUE"]),
    "a_path": (composed, (__file__,), [f"expected KEY=VALUE, such as ckpt_path={__file__}"]),
    "quotes": (
        composed,
        ("ckpt_path=epoch=1.ckpt",),
        ["in a shell 'ckpt_path=\"epoch=1.ckpt\"'"],
    ),
    "typo_at_the_top": (composed, ("sed=5",), ["`sed` is no key", "did you mean `seed`?"]),
    "far_from_any_key": (
        composed,
        ("optimizer.zzzzz=5",),
        ["`optimizer.zzzzz`", "there are", "lr"],
    ),
    "no_such_reference": (composed, ("optimizer.lr=${nope}",), ["nope", "not found"]),
    "no_such_variable": (composed, ("optimizer.lr=${oc.env:NO_SUCH_NAME}",), ["NO_SUCH_NAME"]),
    "missing": (
        picked,
        ({"ckpt_path": "???"}, "ckpt_path"),
        ["`ckpt_path`", "add ckpt_path=VALUE"],
    ),
    "built_of_bad_values": (
        instantiate,
        (
            {
                "data": target(
                    "bn_lightning.data.DigitsDataModule",
                    batch_size=0,
                    eval_batch_size=1,
                    validation_fraction=0.1,
                    seed=1,
                )
            },
        ),
        ["`batch_size`", "0"],
    ),
    "built_of_bad_types": (
        instantiate,
        ({"a": {"b": target("torch.nn.Linear", in_features="x", out_features=1)}},),
        ["`a.b` cannot be built of these values: ", "str"],
    ),
    "name_that_a_terminal_obeys": (
        NotADirectoryError,
        (20, "Not a directory", "é\n\x1b[2J\u2028caf\udce9"),
        ["é\\n\\x1b[2J\\u2028caf\udce9: Not a directory; repair this place"],
    ),
    "no_such_target": (
        instantiate,
        (target("bn_lightning.Nothing"),),
        ["expected `_target_`", "got bn_lightning.Nothing", "correct it"],
    ),
    "text_of_version_0.1.0": (
        ValueError,
        ('the study has a._target_="bn_lightning.no_profiler.NoProfiler"',),
        ["0.1.0 wrote that name, which is bn_lightning.plugins.no_profiler.NoProfiler now"],
    ),
    "target_of_version_0.1.0": (
        instantiate,
        ({"csv": target("bn_lightning.metrics_logger.MetricsCSVLogger", save_dir=".")},),
        ["`csv._target_`", "0.1.0", "bn_lightning.plugins.metrics_logger.MetricsCSVLogger"],
    ),
}


class TestErrorLine:
    def test_a_sweep_of_a_key_that_only_an_experiment_has(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        error = error_of(composed, "init.std=1")
        assert "+experiment=" not in format_error(error)
        monkeypatch.setattr(sys, "argv", ["bn-train", "-m", "+sweep=quick"])
        assert "`init.std`" in format_error(error) and "add +experiment=" in format_error(error)

    @pytest.mark.parametrize(("function", "arguments", "words"), LINES.values(), ids=LINES.keys())
    def test_it_says_what_was_wrong(
        self, function: Any, arguments: tuple[Any, ...], words: list[str]
    ) -> None:
        raised = isinstance(function, type)
        error = function(*arguments) if raised else error_of(function, *arguments)
        line = format_error(error)
        assert line
        assert line == " ".join(line.split())
        for word in words:
            assert word in line
        for noise in ("full_key:", "object_type", "Config search path", "Traceback"):
            assert noise not in line

    def test_a_cause_that_is_the_users_own_stays(self) -> None:
        """Only what Hydra and OmegaConf wrap is unwrapped."""
        error = error_of(raise_from, ValueError("outer"), KeyError("inner"))
        assert format_error(error) == "outer"


def raise_from(error: Exception, cause: Exception) -> None:
    raise error from cause


class TestExitCodes:
    def test_the_end(self) -> None:
        run_with_exit_code(lambda: None)

    def test_an_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as end:
            run_with_exit_code(lambda: opened("/proc/nowhere/a"))
        assert end.value.code == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: /proc/nowhere/a")
        assert err.count("\n") == 1

    def test_with_full_error_it_comes_through(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(FileNotFoundError):
            run_with_exit_code(lambda: opened("/proc/nowhere/a"), full_error=True)
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize("full_error", [False, True])
    @pytest.mark.parametrize(
        ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
    )
    def test_a_signal(self, signum: int, code: int, full_error: bool) -> None:
        before = signal.getsignal(signum)
        with pytest.raises(SystemExit) as end:
            run_with_exit_code(lambda: signal.raise_signal(signum), full_error)
        assert end.value.code == code
        assert signal.getsignal(signum) == before

    def test_a_body_that_has_its_own_code(self) -> None:
        with pytest.raises(SystemExit) as end:
            run_with_exit_code(lambda: sys.exit(7))
        assert end.value.code == 7

    def test_print_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert print_error(ValueError("one\ntwo")) == 1
        assert capsys.readouterr().err == "error: one two\n"

    def test_an_interruption_is_no_error(self) -> None:
        """Code that mends errors must not swallow it."""
        assert not issubclass(Interrupted, Exception)


@pytest.mark.parametrize(
    ("devices", "strategy", "expected"),
    [
        (1, "auto", False),
        ([0], "auto", False),
        ("1", "auto", False),
        (2, "auto", True),
        (-1, "auto", True),
        ([0, 1], "auto", True),
        ("auto", "auto", True),
        (1, "ddp", True),
        (2, "ddp_spawn", True),
        (1, "fsdp", True),
    ],
)
def test_several_processes(devices: Any, strategy: str, expected: bool) -> None:
    config = OmegaConf.create({"devices": devices})
    assert several_processes(config.devices, strategy) is expected


COMMAND = """
import sys
from bn_lightning.cli.command import hydra_command

def task(config):
    "A task."
    if config.seed == 2:
        raise RuntimeError("seed two")
    print("seed", config.seed)

hydra_command(task, "train")()
"""


class TestHydraCommand:
    """In processes of their own, as Hydra keeps its state in the process."""

    def run(self, folder: Path, *overrides: str, **environment: str) -> Any:
        (folder / "task.py").write_text(COMMAND)
        return subprocess.run(
            [sys.executable, "task.py", *overrides],
            cwd=folder,
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
        )

    def test_it_runs_the_task(self, tmp_path: Path) -> None:
        done = self.run(tmp_path, "seed=3")
        assert (done.returncode, done.stdout, done.stderr) == (0, "seed 3\n", "")

    @pytest.mark.parametrize(
        ("override", "line"),
        [
            ("seed=2", "error: RuntimeError: seed two (HYDRA_FULL_ERROR=1 shows where)\n"),
            ("sed=2", "error: `sed` is no key of the configuration; did you mean `seed`?\n"),
        ],
        ids=["of_the_task", "of_the_configuration"],
    )
    def test_an_error_is_one_line(self, tmp_path: Path, override: str, line: str) -> None:
        done = self.run(tmp_path, override)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", line)

    def test_the_traceback_on_demand(self, tmp_path: Path) -> None:
        done = self.run(tmp_path, "seed=2", HYDRA_FULL_ERROR="1")
        assert done.returncode == 1
        assert "Traceback" in done.stderr
        assert "task.py" in done.stderr

    @pytest.mark.parametrize("mode", [[], ["-m"]], ids=["run", "sweep"])
    def test_a_typed_password_is_not_written(self, tmp_path: Path, mode: list[str]) -> None:
        setting = "hydra.sweeper.storage=postgresql://user:geheim@host/db"
        done = self.run(tmp_path, *mode, setting)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: expected `storage` to take its password from the env")
        assert "geheim" not in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["task.py"]

    def test_a_sweep_ends_with_the_error_of_its_job(self, tmp_path: Path) -> None:
        done = self.run(tmp_path, "-m", "seed=1,2")
        assert done.returncode == 1
        assert "seed 1" in done.stdout
        assert "seed two" in done.stderr.splitlines()[-1]

    def test_the_environment_is_as_before(self, tmp_path: Path) -> None:
        """HYDRA_FULL_ERROR is set for Hydra alone, not for what the task starts."""
        script = COMMAND.replace('print("seed", config.seed)', "pass") + (
            "import os, json; print(json.dumps(os.environ.get('HYDRA_FULL_ERROR')))"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
        )
        assert json.loads(done.stdout) is None


@pytest.mark.parametrize(
    ("accelerator", "devices", "expected"),
    [
        ("cpu", 1, 0),
        ("gpu", 2, 2),
        ("gpu", -1, None),
        ("auto", "auto", None),
        ("auto", 1, None),
        ("gpu", [2, 3], 0),
        ("mps", 1, 0),
    ],
)
def test_devices_per_job(accelerator: str, devices: Any, expected: int | None) -> None:
    config = OmegaConf.create({"devices": devices})
    assert devices_per_job(accelerator, config.devices) == expected


@pytest.mark.parametrize(
    ("is_job", "is_foreign", "expected"),
    [(True, False, 1), (True, True, 0), (False, False, 0)],
    ids=["command", "called_from_python", "function"],
)
def test_a_command_leaves_its_libraries_out_of_collections(
    is_job, is_foreign, expected, monkeypatch
):
    frozen: list[None] = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(None))
    monkeypatch.setattr(gc, "get_freeze_count", lambda: len(frozen))
    monkeypatch.setattr(HydraConfig, "initialized", lambda: is_job)
    with warnings.catch_warnings(), called_as("a", []) if is_foreign else nullcontext():
        quiet_lightning()
        quiet_lightning()
    assert len(frozen) == expected
