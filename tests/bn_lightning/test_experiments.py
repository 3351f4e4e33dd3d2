"""Runs and sweeps from Python: what the commands do, without leaving anything of Hydra's behind."""

import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from bn_lightning import experiments, load_run, run_experiment, run_sweep, train
from bn_lightning.cli.error_line import ExperimentError
from bn_lightning.experiments import Run, Sweep
from bn_lightning.runs.interruption import raise_interrupted

pytestmark = pytest.mark.usefixtures("empty_pictures")

SMALL = (
    "+experiment=mnist_bn",
    "data=digits",
    "model.network.widths=[4]",
    "trainer.val_check_interval=5",
    "callbacks.activation_percentiles.points=4",
    "extras.figures=false",
)


def state_of_the_process() -> tuple[Any, ...]:
    """What a call must not change."""
    root = logging.getLogger()
    return (
        HydraConfig.initialized(),
        GlobalHydra.instance().is_initialized(),
        os.getcwd(),
        list(sys.argv),
        list(root.handlers),
        root.level,
        list(warnings.filters),
        torch.get_num_threads(),
        # Lightning and OpenMP have others of their own.
        {name: v for name, v in os.environ.items() if name.startswith(("BN_", "HYDRA_"))},
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    torch.set_num_threads(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        before = state_of_the_process()
        found = run_experiment([*SMALL, "trainer.max_steps=10"])
        assert state_of_the_process() == before
    return found


@pytest.fixture(scope="module")
def sweep(place: Path) -> Sweep:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        before = state_of_the_process()
        found = run_sweep(
            [
                *SMALL,
                "hydra/sweeper/sampler=grid",
                "hydra.sweeper.n_trials=null",
                "hydra.sweeper.study_name=small",
                "trainer.max_steps=5",
                "norm=none,batch",
                "optimizer.lr=0.1,1",
            ]
        )
        assert state_of_the_process() == before
    return found


class TestRun:
    def test_what_it_is(self, run: Run, place: Path) -> None:
        assert run.directory.parent == place / "logs" / "mnist_bn" / "runs"
        assert run.status == "completed"
        assert run.config["trainer"]["max_steps"] == 10
        assert run.record["command"] == ["bn-train", *SMALL, "trainer.max_steps=10"]
        assert 0 <= run.metrics["test/accuracy"] <= 1
        assert all(type(value) is float for value in run.metrics.values())

    def test_history(self, run: Run) -> None:
        steps, values = run.history["test/accuracy"]
        assert steps.tolist() == [5, 10] and steps.dtype == np.int64
        assert values[-1] == pytest.approx(run.metrics["test/accuracy"]) and values.dtype == float
        assert "val/loss" in run.history and len(run.history) == len(list(run.history)) > 5
        with pytest.raises(KeyError):
            run.history["no such metric"]

    def test_network_has_the_accuracy_of_the_record(self, run: Run) -> None:
        from bn_lightning.data import DigitsDataModule

        data = DigitsDataModule(60, 2500, 1 / 12, 1)
        data.setup("test")
        network = run.network()
        assert not network.training
        [(x, target)] = [batch[:2] for batch in data.test_dataloader()]
        accuracy = (network(x).argmax(1) == target).float().mean().item()
        assert accuracy == pytest.approx(run.metrics["test/accuracy"])
        assert type(run.network("best")) is type(network)

    def test_a_notebook_shows_its_figures(self, run: Run) -> None:
        figures = run.figures()
        assert isinstance(figures["accuracy"], matplotlib.figure.Figure)
        assert "percentiles" in figures
        assert figures["accuracy"]._repr_png_().startswith(b"\x89PNG")
        html = figures._repr_html_()
        assert html.count('src="data:image/png;base64,iVBOR') == len(figures)

    def test_the_files_are_those_of_the_command(
        self, run: Run, command: Any, tmp_path: Path
    ) -> None:
        result = command(train.main, *SMALL, "trainer.max_steps=10")

        def files(directory: Path) -> set[str]:
            paths = (path.relative_to(directory) for path in directory.rglob("*"))
            return {str(path) for path in paths}

        assert files(run.directory) == files(result.directory)
        assert run.metrics == load_run(result.directory).metrics
        for name in ("metrics.csv", ".hydra/overrides.yaml"):
            ours, its = ((place / name).read_text() for place in (run.directory, result.directory))
            assert ours == its

    def test_it_is_resumed_by_a_second_call(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "option" / "experiment").mkdir(parents=True)
        (tmp_path / "option" / "experiment" / "own.yaml").write_text(
            "# @package _global_\ndefaults: [mnist_bn]\ntask_name: own\n"
        )
        overrides = ["+experiment=own", *SMALL[1:]]
        first = run_experiment([*overrides, "trainer.max_steps=5"], config_dir="option")
        assert first.directory.parent == tmp_path / "logs" / "own" / "runs"
        second = run_experiment(
            [*overrides, "ckpt_path=last", "trainer.max_steps=10"], config_dir="option"
        )
        assert second.directory == first.directory
        assert second.history["val/loss"].steps.tolist() == [5, 10]
        # A run that was resumed ends with the bits of one that ran through.
        assert second.metrics == run.metrics


class TestSweep:
    def test_trials(self, sweep: Sweep, place: Path) -> None:
        assert sweep.directory == place / "logs" / "mnist_bn" / "sweeps" / "small"
        assert [trial.number for trial in sweep.trials] == list(range(4))
        assert {trial.state for trial in sweep.trials} == {"COMPLETE"}
        best = sweep.best
        assert best is not None
        assert best.values[0] == max(trial.values[0] for trial in sweep.trials)
        assert best.params.keys() == {"norm", "optimizer.lr"}
        run = sweep.run(best.number)
        assert run.directory == sweep.directory / str(best.number)
        assert run.metrics["val/accuracy"] == best.values[0]
        with pytest.raises(ExperimentError, match="`number`"):
            sweep.run(4)

    def test_map(self, sweep: Sweep) -> None:
        assert isinstance(sweep.figures()["accuracy"], matplotlib.figure.Figure)

    def test_report_is_of_the_sweep(
        self, sweep: Sweep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """The notebook's test writes one."""
        asked: list[Any] = []
        monkeypatch.setattr(experiments, "write_report", lambda *given: asked.append(given))
        sweep.report()
        sweep.report(tmp_path)
        assert [sources for sources, _ in asked] == [[str(sweep.directory)]] * 2
        assert [options.output for _, options in asked] == [None, tmp_path]

    def test_its_command_can_be_typed(self, sweep: Sweep) -> None:
        typed = sweep.table.about["command"]
        assert typed.startswith("python -m bn_lightning.train -m hydra/sweeper=bn_optuna +exp")

    def test_workers_run_the_same_call(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        from bn_lightning.sweeps.engine import workers

        started: list[list[str]] = []

        def start(command: list[str], **options: Any) -> Any:
            started.append(command)
            raise OSError("not started")

        monkeypatch.setattr(workers.subprocess, "Popen", start)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "conf").mkdir()
        with pytest.raises(ExperimentError, match="not started"):
            run_sweep([*SMALL, "seed=1,2", "hydra.sweeper.n_jobs=2"], config_dir="conf")
        options = ["--config-dir", str(tmp_path / "conf"), "-m", "hydra/sweeper=bn_optuna", *SMALL]
        assert started[0][:-2] == [sys.executable, "-m", "bn_lightning.train", *options]


ERRORS: dict[str, tuple[list[str], str]] = {
    "experiment": (["+experiment=nope"], "experiment/nope"),
    "key": ([*SMALL, "optimizer.rate=1"], "`optimizer.rate` is no key"),
    "value": ([*SMALL, "optimizer.lr=-1"], "`optimizer.lr` to be a positive number"),
    "password": (["hydra.sweeper.storage=postgresql://me:secret@host/db"], "`storage`"),
    "ranks": ([*SMALL, "trainer=ddp_sim"], "type bn-train .*trainer=ddp_sim"),
}


class TestErrors:
    @pytest.mark.parametrize(("overrides", "message"), ERRORS.values(), ids=ERRORS.keys())
    def test_they_are_the_lines_of_the_command(
        self,
        command: Any,
        overrides: list[str],
        message: str,
        request: pytest.FixtureRequest,
    ) -> None:
        with pytest.raises(ExperimentError, match=message) as caught:
            run_experiment(overrides)
        assert "\n" not in str(caught.value)
        if request.node.callspec.id != "ranks":  # which only Python refuses
            assert command(train.main, *overrides).err == f"error: {caught.value}\n"

    def test_a_directory_with_a_run(self, run: Run) -> None:
        before = (run.directory / "run.json").read_text()
        with pytest.raises(ExperimentError, match="`hydra.run.dir`"):
            run_experiment([*SMALL, f"hydra.run.dir={run.directory}"])
        assert (run.directory / "run.json").read_text() == before

    def test_a_sweep_without_what_it_needs(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ExperimentError, match=re.escape("+experiment=")):
            run_sweep(["+sweep=quick"])
        with pytest.raises(ExperimentError, match="nothing to sweep"):
            run_sweep([*SMALL])
        with pytest.raises(ExperimentError, match="without a value of init.std, .*call run_sweep"):
            run_experiment([*SMALL, "+sweep=quick"])

    def test_a_trial_fails_with_the_line_of_the_command(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.chdir(tmp_path)
        wrong = ["hydra.sweeper.max_retries=0", "seed=1,2", "data._target_=nope.Data"]
        wrong += ["hydra/sweeper/sampler=grid", "hydra.sweeper.n_trials=null"]
        with pytest.raises(ExperimentError, match="`data._target_`.*nope.Data"):
            run_sweep([*SMALL, *wrong])

    def test_a_text_is_no_list(self) -> None:
        with pytest.raises(TypeError, match="`overrides`"):
            run_experiment("+experiment=mnist_bn")

    @pytest.mark.parametrize(
        ("name", "words"),
        [("missing", "that does not exist; bn-report --list logs "), (".", "no run.json; bn-rep")],
    )
    def test_no_run(self, tmp_path: Path, name: str, words: str) -> None:
        with pytest.raises(ExperimentError) as error:
            load_run(tmp_path / name)
        for part in ("a run.json, metrics.csv and checkpoints, got", words):
            assert part in str(error.value)
        assert "Errno" not in str(error.value)

    def test_classes_of_other_packages_must_be_trusted(self, run: Run) -> None:
        import own_network

        target = f"{own_network.__name__}.OwnNetwork"
        typed = run_experiment(
            [
                *SMALL,
                f"hydra.run.dir={run.directory.parent}/own",
                "~callbacks.activation_percentiles",
                f"model.network._target_={target}",
                "init=none",
                "trainer.max_steps=5",
            ]
        )
        assert type(typed.network()) is own_network.OwnNetwork
        with pytest.raises(ExperimentError, match="trusted"):
            load_run(typed.directory).network()
        loaded = load_run(typed.directory, trusted=["own_network."])
        assert type(loaded.network()) is own_network.OwnNetwork

    def test_an_interruption(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        import signal

        monkeypatch.chdir(tmp_path)

        def interrupted(*_: Any) -> None:
            raise_interrupted(signal.SIGINT, None)

        monkeypatch.setattr(train, "_fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_experiment([*SMALL, f"hydra.run.dir={tmp_path}/run"])
        assert load_run(tmp_path / "run").status == "interrupted"
        assert not HydraConfig.initialized() and not GlobalHydra.instance().is_initialized()

    def test_without_pandas(self, run: Run, sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pandas", None)
        for table in (run.history, sweep):
            with pytest.raises(ExperimentError, match="pip install pandas"):
                table.to_pandas()


def test_pandas(run: Run, sweep: Sweep) -> None:
    pytest.importorskip("pandas", reason="pandas is no dependency")
    frame = run.history.to_pandas()
    assert frame.index.name == "step"
    assert frame["test/accuracy"].dropna().index.tolist() == [5, 10]
    trials = sweep.to_pandas()
    assert len(trials) == 4 and trials["value"].max() == sweep.best.values[0]
