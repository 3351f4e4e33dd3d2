"""The options of `logger`: what metrics.csv has arrives in MLflow and W&B, too."""

import sys
from pathlib import Path

import pytest

from bn_lightning import train
from bn_lightning.cli.install_hint import install_command
from bn_lightning.runs.metrics_csv import read_metrics
from bn_lightning.runs.record import read_run

pytestmark = [
    # Lightning 2.6 calls what torch 2.13 calls deprecated, and MLflow what SQLAlchemy 2.1 does.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*noload.*"),
    pytest.mark.usefixtures("empty_pictures"),
]

SHORT = (
    "+experiment=placement",
    "+callbacks=batch_norm_monitor",
    "data.samples=400",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "callbacks.batch_norm_monitor.every_n_steps=2",
)
WATCHED = {
    "val/accuracy",
    "test/accuracy",
    "activation/p15",
    "activation/p50",
    "activation/p85_median",
    "batch_norm/network.hidden.0.norm/scale",
    "batch_norm/network.hidden.1.norm/mean_distance",
}


@pytest.mark.slow
def test_percentiles_and_batch_norm_statistics_arrive(command, monkeypatch):
    """Of two runs in one process, as two runs."""
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    result = command(train.main, "-m", *SHORT, "logger=[mlflow,wandb]", "seed=1,2")
    assert result.code == 0, result.err
    directories = sorted(Path("logs/placement/multiruns").glob("*/[01]"))
    assert len(directories) == 2

    client = MlflowClient(f"sqlite:///{Path('logs/mlflow.db').absolute()}")
    experiment = client.get_experiment_by_name("placement")
    runs = client.search_runs([experiment.experiment_id], order_by=["start_time"])
    assert [Path(run.data.tags["directory"]) for run in runs] == [d.absolute() for d in directories]
    for run, directory in zip(runs, directories, strict=True):
        assert run.info.status == "FINISHED"
        assert run.info.run_name == f"{directory.parent.name}/{directory.name}"
        metrics = read_metrics(directory)
        assert metrics.keys() >= WATCHED
        for name, points in metrics.items():
            history = client.get_metric_history(run.info.run_id, name)
            found = {metric.step: metric.value for metric in history}
            assert found.keys() == {step for step, _ in points}, name
            assert [found[step] for step, _ in points] == pytest.approx([v for _, v in points])
        assert run.data.params["optimizer/lr"] == "0.01"
        assert run.data.params["seed"] == str(read_run(directory)["seed"])

        # What `wandb sync` would send: records, with numbers as JSON.
        (path,) = (directory / "wandb").glob("offline-run-*/run-*.wandb")
        content = path.read_bytes()
        assert [name for name in metrics if name.encode() not in content] == []
        (_, accuracy) = metrics["test/accuracy"][-1]
        assert str(accuracy)[:6].encode() in content
        assert b"batch_norm_monitor" in content  # of the configuration


def test_a_package_that_is_absent(command, monkeypatch):
    """The line names the extra."""

    def absent(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'mlflow'")

    monkeypatch.setattr("lightning.pytorch.loggers.MLFlowLogger.__init__", absent)
    result = command(train.main, *SHORT, "logger=mlflow")
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert "`logger=mlflow`" in result.err
    assert install_command("mlflow") in result.err


@pytest.mark.parametrize("database", ["", "notes.txt", "a\0b"])
def test_what_is_no_database_is_said_at_once(tmp_path, monkeypatch, database):
    """MLflow itself would try again for minutes."""
    from bn_lightning.plugins.mlflow_logger import RunMLFlowLogger

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Path("notes.txt").write_text("no database\n" * 100)
    with pytest.raises(ValueError, match="`database` to be an SQLite file"):
        RunMLFlowLogger("a/b/c", database)
    assert Path("notes.txt").read_text() == "no database\n" * 100


def test_a_server_is_in_no_file(command, monkeypatch):
    """Its address may hold a password."""
    from bn_lightning.plugins.mlflow_logger import RunMLFlowLogger

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    logger = RunMLFlowLogger("a/b/c", "absent/mlflow.db")
    assert logger._tracking_uri == "http://user:secret@127.0.0.1:9"
    assert not Path("absent").exists()

    def stop(*_: object, **__: object) -> None:
        raise RuntimeError("enough")

    monkeypatch.setattr("lightning.Trainer.fit", stop)
    monkeypatch.setattr(RunMLFlowLogger, "log_hyperparams", stop)
    assert command(train.main, *SHORT, "logger=mlflow").code == 1
    files = [path for path in Path("logs").rglob("*") if path.is_file()]
    assert any(path.name == "run.json" for path in files)
    assert [path for path in files if b"secret" in path.read_bytes()] == []
    assert "mlflow" in sys.modules
