"""`python -m bn_lightning.train`: what it leaves, resumes, and says of bad input."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import own_network
import pytest
import run_process
import torch

from bn_lightning.runs.atomic_write import write_json
from bn_lightning.runs.metrics_csv import read_metrics
from bn_lightning.runs.record import read_run
from bn_lightning.train import main

pytestmark = [
    # Lightning 2.6 calls what torch 2.13 calls deprecated.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.usefixtures("empty_pictures"),
]

# 21 batches an epoch, so that 50 steps cross epochs; evaluations are not at their ends.
SHORT = (
    "+experiment=mnist_bn",
    "data=digits",
    "trainer.max_steps=50",
    "trainer.val_check_interval=15",
    "trainer.log_every_n_steps=5",
)
BARE = ("~callbacks.activation_percentiles", "extras.figures=false")


def test_a_run_leaves_what_the_design_says(command, pictures):
    result = command(main, *SHORT)
    assert result.code == 0, result.err
    run = result.directory
    # Lightning's own log, which other tests may have left, may come first.
    before, _, after = result.out.partition(f"mnist_bn: 50 steps, in {run}\n")
    assert "mnist_bn" not in before
    assert "mnist_bn, with BatchNorm, seed 1: completed" in " ".join(after.split())
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert files == {
        ".hydra/config.yaml",
        ".hydra/hydra.yaml",
        ".hydra/overrides.yaml",
        "run.json",
        "metrics.csv",
        "mnist_bn.log",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "figures/accuracy.png",
        "figures/accuracy.svg",
        "figures/loss.png",
        "figures/loss.svg",
        "figures/percentiles.png",
        "figures/percentiles.svg",
    }
    assert run.parent == Path("logs/mnist_bn/runs").absolute()
    record = read_run(run)
    assert record["status"] == "completed"
    assert record["steps"] == 50
    assert record["data"]["source"] == "digits"
    assert record["config"]["optimizer"]["lr"] == 1.0
    assert record["hardware"]["torch_threads"] == record["config"]["extras"]["num_threads"] == 1
    assert record["config"]["seed"] == record["seed"] == 1
    assert record["versions"]["torch"] == version("torch")
    assert 0 < record["seconds"] < 60
    assert record["steps_per_second"] == pytest.approx(50 / record["seconds"], rel=0.01)
    assert 100 < record["peak_memory_mib"] < 4000
    metrics = read_metrics(run)
    assert [step for step, _ in metrics["val/accuracy"]] == [15, 30, 45]
    assert [step for step, _ in metrics["test/accuracy"]] == [15, 30, 45, 50]
    assert [step for step, _ in metrics["train/loss"]] == list(range(5, 51, 5))
    assert record["metrics"]["test/accuracy"] == pytest.approx(metrics["test/accuracy"][-1][1])
    for line in ("completed", "test/accuracy", "steps", "digits"):
        assert line in result.out


def test_the_arms_start_from_the_same_weights_and_see_the_same_batches(command):
    first_losses = {}
    for norm in ("batch", "torch", "none"):
        one_step = ("trainer.max_steps=1", "trainer.log_every_n_steps=1", f"norm={norm}", *BARE)
        run = command(main, *SHORT, *one_step, "optimizer.lr=1.0e-30").directory
        weights = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        first_losses[norm] = {k: v for k, v in weights.items() if k.endswith("linear.weight")}
    assert first_losses["batch"].keys() == first_losses["none"].keys() != set()
    for name, weight in first_losses["batch"].items():
        assert torch.equal(weight, first_losses["none"][name])
        assert torch.equal(weight, first_losses["torch"][name])


@pytest.mark.slow
def test_norm_batch_is_norm_torch_step_by_step(command, mnist_root):
    """On the real MNIST, the losses of 200 steps agree to 1e-6."""
    losses = {}
    for norm in ("batch", "torch"):
        result = command(
            main,
            "+experiment=mnist_bn",
            f"data.root={mnist_root}",
            f"norm={norm}",
            "trainer.max_steps=200",
            "trainer.log_every_n_steps=1",
            *BARE,
        )
        losses[norm] = read_metrics(result.directory)["train/loss"]
    assert len(losses["batch"]) == 200
    for (step, ours), (_, torchs) in zip(losses["batch"], losses["torch"], strict=True):
        assert abs(ours - torchs) <= 1e-6, f"step {step}: {ours} against {torchs}"


@pytest.mark.parametrize(
    ("norm", "low", "high"),
    [
        pytest.param("batch", 0.86, 1.0, id="with"),
        pytest.param("none", 0.0, 0.45, id="without", marks=pytest.mark.slow),
    ],
)
def test_500_steps_on_mnist(command, mnist_root, norm, low, high):
    """Measured in plain PyTorch over four seeds: .901 ± .012 with, .272 ± .060 without."""
    result = command(
        main,
        "+experiment=mnist_bn",
        f"data.root={mnist_root}",
        f"norm={norm}",
        "trainer.max_steps=500",
        *BARE,
    )
    assert low <= read_run(result.directory)["metrics"]["test/accuracy"] <= high


def test_a_run_of_an_epoch_announces_it(command):
    result = command(main, *SHORT, *BARE, "trainer.max_steps=50000", "trainer.max_epochs=1")
    assert read_run(result.directory)["steps"] == 21
    assert "mnist_bn: 1 epoch or 50,000 steps, whichever comes first, in" in result.out


def test_a_run_of_epochs_alone_ends_with_the_last_and_resumes_with_more(command):
    epochs = (*SHORT, *BARE, "trainer.max_steps=-1", "trainer.max_epochs=1")
    result = command(main, *epochs)
    run = result.directory
    assert f"mnist_bn: 1 epoch, in {run}" in result.out
    assert (read_run(run)["status"], read_run(run)["steps"]) == ("completed", 21)
    again = command(main, *epochs, "ckpt_path=last")
    assert again.code == 1 and "raise trainer.max_epochs" in again.err
    more = command(main, *epochs, "trainer.max_epochs=2", f"ckpt_path={run}")
    assert more.directory == run and read_run(run)["steps"] == 42


EARLY = (*SHORT, *BARE, "trainer.max_steps=2000", "trainer.val_check_interval=5")
STOPS = ("+callbacks=early_stopping", "optimizer.lr=1.0e-30")


def test_a_run_that_is_stopped_early_says_where_and_why(command):
    result = command(main, *EARLY, *STOPS)
    assert result.code == 0, result.err
    assert "mnist_bn, with BatchNorm, seed 1: stopped early" in result.out
    assert "at step 20 of 2,000: val/accuracy did not improve" in result.out
    run = result.directory
    record = read_run(run)
    kept = ("status", "stopped_at", "planned_steps", "stop_reason")
    reason = "val/accuracy did not improve"
    assert [record[key] for key in kept] == ["stopped early", 20, 2000, reason]
    assert "test/accuracy" in record["metrics"]
    # The same command again would stop again after each validation.
    again = command(main, *EARLY, *STOPS, "ckpt_path=last")
    assert again.code == 1 and "leave out what stopped it" in again.err
    assert read_run(run) == record
    without = (*EARLY, STOPS[1], "trainer.max_steps=30", "ckpt_path=last")
    assert command(main, *without).code == 0
    record = read_run(run)
    assert (record["status"], record["steps"], "stopped_at" in record) == ("completed", 30, False)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("+trainer.max_time=00:00:00:00",), "trainer.max_time is over"),
        (
            ("+callbacks=early_stopping", "+callbacks.early_stopping.stopping_threshold=0.0"),
            "val/accuracy reached 0",
        ),
    ],
    ids=["time", "threshold"],
)
def test_other_reasons_to_stop_early(command, overrides, reason):
    result = command(main, *EARLY, *overrides)
    assert result.code == 0, result.err
    assert read_run(result.directory)["stop_reason"] == reason


def log_of(run: Path) -> str:
    """The log of a run, without the times at which its lines were written."""
    return re.sub(r"(?m)^\[[^]]*\]", "", (run / "mnist_bn.log").read_text())


def test_the_log_has_what_happened(command, monkeypatch):
    from bn_lightning.data import digits

    setup = digits.DigitsDataModule.setup

    def warns(self, stage):
        warnings.warn("old images", stacklevel=2)
        setup(self, stage)

    with monkeypatch.context() as patched, pytest.warns(UserWarning, match="old images"):
        patched.setattr(digits.DigitsDataModule, "setup", warns)
        run = command(main, *SHORT, *BARE, "trainer.max_steps=20").directory
    log = log_of(run)
    tests = f"test/accuracy {read_run(run)['metrics']['test/accuracy']:.4f}"
    for line in (
        "[INFO] seed 1, torch ",
        "[WARNING] UserWarning: old images",
        "[INFO] data: digits, 1,317 / 120 / 360",
        "[INFO] training starts at step 0 of 20, on cpu in 1 process",
        "[INFO] step 15: val/accuracy ",
        f"[INFO] completed at step 20, {tests}",
    ):
        assert line in log, log
    result = command(main, *SHORT, *BARE, "ckpt_path=last")
    assert result.code == 0, result.err
    added = log_of(run).removeprefix(log)
    assert "training starts at step 20 of 50" in added
    # The terminal does not repeat the lines.
    assert "training starts" not in result.out + result.err


def test_the_log_of_a_crash_has_the_traceback(command, monkeypatch):
    from bn_lightning.callbacks import ActivationPercentiles

    def crash(self, *_):
        raise RuntimeError("lost")

    monkeypatch.setattr(ActivationPercentiles, "on_train_batch_end", crash)
    result = command(main, *SHORT, "extras.figures=false")
    assert result.code == 1 and result.err.startswith("error: RuntimeError: lost")
    (run,) = Path("logs/mnist_bn/runs").iterdir()
    log = (run / "mnist_bn.log").read_text()
    assert "[ERROR] RuntimeError: lost" in log and "in crash" in log
    assert read_run(run)["status"] == "failed"


@pytest.mark.filterwarnings("ignore:.*[Pp]rofiler.*")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("simple", "run_training_batch"),
        pytest.param("advanced", "ncalls", marks=pytest.mark.slow),
        pytest.param("pytorch", "Self CPU", marks=pytest.mark.slow),
    ],
)
def test_a_profiler_prints_and_writes_what_it_measured(command, name, words):
    result = command(main, *SHORT, *BARE, f"trainer.profiler={name}")
    assert result.code == 0, result.err
    report = result.directory / "profiler/fit-report.txt"
    assert words in result.out and words in report.read_text()
    assert str(report) in result.out and len(result.out.splitlines()) < 400
    assert (result.directory / "profiler/test-report.txt").exists()


def test_a_sweep_tells_once_whose_weights_it_replaces(command):
    foreign = ("hydra.sweeper.n_trials=2", "model.network._target_=own_network.OwnNetwork")
    short = ("trainer.max_steps=2", "trainer.val_check_interval=2")
    result = command(main, *SWEEP, *foreign, "optimizer.lr=0.5,1.0", *short)
    assert result.code == 0, result.err
    assert result.out.count("init replaces the weights of 1 layers of own_network.") == 1


def test_best_resumes_from_the_best_checkpoint(command):
    run = command(main, *SHORT, *BARE).directory
    best = torch.load(run / "checkpoints/best.ckpt", weights_only=True)["global_step"]
    result = command(main, *SHORT, *BARE, "ckpt_path=best")
    assert result.code == 0, result.err
    assert result.directory == run and read_run(run)["resumed_at"] == [best]


def test_a_rerun_is_bitwise_equal(command):
    runs = [command(main, *SHORT, *BARE).directory for _ in range(2)]
    assert runs[0] != runs[1]
    assert read_metrics(runs[0]) == read_metrics(runs[1])
    other = command(main, *SHORT, *BARE, "seed=2").directory
    assert read_metrics(other) != read_metrics(runs[0])


def test_a_longer_run_goes_on_from_a_shorter_one(command):
    whole = command(main, *SHORT, *BARE).directory
    part = command(main, *SHORT, *BARE, "trainer.max_steps=37", "paths.log_dir=part").directory
    first_part = read_run(part)
    resumed = command(main, *SHORT, *BARE, "paths.log_dir=part", "ckpt_path=last")
    assert resumed.directory == part
    # The shorter run was tested at its own end, too.
    assert_same_end(whole, part, but_tests_at={37})
    record = read_run(part)
    assert record["resumed_at"] == [37]
    assert record["steps"] == 50
    checkpoint = torch.load(part / "checkpoints/last.ckpt", weights_only=True)
    assert first_part["seconds"] < checkpoint["seconds"] <= record["seconds"]
    assert (part / ".hydra/overrides.yaml").read_text().count("ckpt_path") == 0


@pytest.mark.parametrize("before", [1000.0, None], ids=["known", "unknown"])
def test_the_time_of_a_resumed_run_is_that_of_all_its_parts(command, before):
    run = command(main, *SHORT, *BARE, "trainer.max_steps=40").directory
    path = run / "checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    if before is None:  # as version 0.1.0 wrote it
        del checkpoint["seconds"]
    else:
        checkpoint["seconds"] = before
    torch.save(checkpoint, path)
    result = command(main, *SHORT, *BARE, f"ckpt_path={path}")
    record = read_run(run)
    if before is None:
        assert record["seconds"] is None and record["steps_per_second"] > 1
        assert "unknown before step 40" in result.out
    else:
        assert 1000 < record["seconds"] < 1060
        assert record["steps_per_second"] == pytest.approx(50 / record["seconds"], abs=0.06)


KEPT, REPLACED = "OwnNetwork keeps the weights", "init replaces the weights of 1 layers of"


@pytest.mark.parametrize(
    ("overrides", "is_kept", "told"),
    [
        ([], True, KEPT),
        (["init=none"], True, ""),
        (["~init"], True, ""),
        (["init=he"], False, REPLACED),
        (["+experiment=mnist_bn"], False, REPLACED),
    ],
    ids=["default", "none", "deleted", "chosen", "chosen_by_an_experiment"],
)
def test_weights_of_a_network_of_another_package(command, overrides, is_kept, told):
    result = command(
        main,
        *overrides,
        "data=digits",
        "model.network._target_=own_network.OwnNetwork",
        "optimizer.lr=1.0e-30",
        "trainer.max_steps=1",
        *BARE,
    )
    assert result.code == 0, result.err
    state = torch.load(result.directory / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert torch.all(state["network.1.weight"] == own_network.WEIGHT) == is_kept
    assert told in result.out


def test_networks_of_this_project_are_initialized_without_a_word(command):
    weights = {}
    for init in ("default", "xavier", "none"):
        options = ("data=digits", f"init={init}", "optimizer.lr=1.0e-30", "trainer.max_steps=1")
        result = command(main, *options, *BARE)
        assert result.code == 0, result.err
        assert "weights" not in result.out
        path = result.directory / "checkpoints/last.ckpt"
        state = torch.load(path, weights_only=True)["state_dict"]
        weights[init] = state["network.output.weight"]
    assert torch.equal(weights["default"], weights["xavier"])
    assert not torch.equal(weights["default"], weights["none"])


STOPPED = (*SHORT[:2], *BARE, "trainer.max_steps=800", "trainer.val_check_interval=110")


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory) -> Path:
    """The directory of the run that the stopped ones are to end like."""
    return run_process.run(tmp_path_factory.mktemp("unstopped"), *STOPPED)


# SIGKILL, which leaves no word, is in tests/faults/test_kill.py.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143)],
    ids=["SIGINT", "SIGTERM"],
)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, unstopped, command, signum, code):
    process = run_process.start(tmp_path, *STOPPED)
    wait_for(tmp_path, "logs/*/runs/*/checkpoints/last.ckpt")
    process.send_signal(signum)
    run_process.finish(process, code=code)
    (stopped,) = tmp_path.glob("logs/*/runs/*")
    assert read_run(stopped)["status"] == "interrupted"
    last_step = torch.load(stopped / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert 0 < last_step < 800
    resumed = command(main, *STOPPED, "ckpt_path=last")
    assert resumed.directory == stopped
    assert_same_end(unstopped, stopped)
    assert read_run(stopped)["resumed_at"] == [last_step]


def wait_for(folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + 60
    while not list(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern} within a minute"
        time.sleep(0.005)


def assert_same_end(
    whole: Path, resumed: Path, but_tests_at: frozenset | set = frozenset()
) -> None:
    states = [
        torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (whole, resumed)
    ]
    assert states[0]["global_step"] == states[1]["global_step"]
    for name, weight in states[0]["state_dict"].items():
        assert torch.equal(weight, states[1]["state_dict"][name]), name
    metrics = read_metrics(resumed)
    for name, points in metrics.items():
        if name.startswith("test/"):
            metrics[name] = [point for point in points if point[0] not in but_tests_at]
    assert read_metrics(whole) == metrics
    assert read_run(whole)["metrics"] == read_run(resumed)["metrics"]


def test_a_diverged_run_is_a_result_scored_as_chance(command):
    result = command(main, *SHORT, "optimizer.lr=1.0e38", "norm=none", "init.std=10")
    assert result.code == 0, result.err
    record = json.loads((result.directory / "run.json").read_text())
    assert record["status"] == "diverged"
    assert 0 < record["diverged_at"] <= 50
    assert record["metrics"]["test/accuracy"] == 0.1
    assert record["metrics"]["test/loss"] == pytest.approx(2.302585)
    assert "diverged" in result.out


def test_a_multirun_trains_each_arm_in_its_own_directory(command):
    result = command(main, "-m", *SHORT, *BARE, "norm=none,batch")
    assert result.code == 0, result.err
    runs = sorted(Path("logs/mnist_bn/multiruns").glob("*/*/run.json"))
    assert [run.parent.name for run in runs] == ["0", "1"]
    norms = [read_run(run.parent)["config"]["norm"] for run in runs]
    assert norms[0] is None
    assert norms[1]["_target_"].endswith("batch_norm")


def test_precision_and_callbacks_may_be_others(command):
    result = command(main, *SHORT, "trainer.precision=64-true")
    assert result.code == 0, result.err
    result = command(main, *SHORT, "callbacks=none")
    assert result.code == 0, result.err
    assert not list(result.directory.rglob("*.ckpt"))


SWEEP = ("-m", "hydra/sweeper=bn_optuna", "hydra/sweeper/sampler=grid", *SHORT, *BARE)


def test_a_sweep_keeps_what_a_run_returns(command):
    """A diverged run is a result, scored as chance on validation, too."""
    arm = ("norm=none", "optimizer.momentum=0.5")
    result = command(main, *SWEEP, *arm, "init.std=10", "optimizer.lr=0.1,1.0e38")
    assert result.code == 0, result.err
    sweep = Path("logs/mnist_bn/sweeps/sweep").absolute()
    assert result.directory == sweep
    assert "1 of them diverged" in result.out
    assert "completed" not in result.out  # the summary of a run
    trained, diverged = read_trials(sweep)
    assert trained["test/accuracy"] == read_run(sweep / "0")["metrics"]["test/accuracy"]
    assert (trained["diverged"], trained["diverged_at"]) == (False, None)
    assert trained["data"] == diverged["data"] == "digits"
    assert trained["commit"] == read_run(sweep / "0")["commit"]
    assert diverged["diverged"]
    assert 0 < diverged["diverged_at"] <= 50
    assert diverged["val/accuracy"] == diverged["test/accuracy"] == 0.1
    assert not (sweep / "0" / "figures").exists()


def read_trials(sweep):
    outcomes = [json.loads((sweep / str(i) / "outcome.json").read_text()) for i in range(2)]
    assert [outcome["state"] for outcome in outcomes] == ["COMPLETE"] * 2
    for outcome in outcomes:
        assert outcome["values"] == [outcome["attributes"]["val/accuracy"]]
    return [outcome["attributes"] for outcome in outcomes]


@pytest.mark.slow
def test_all_ranks_of_a_trial_share_its_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # of the ranks
    short = ("trainer=ddp_sim", "trainer.max_steps=2", "trainer.val_check_interval=1", "logger={}")
    spy = ("+callbacks.spy._target_=rank_spy.RankSpy", "+callbacks.spy.folder=${paths.output_dir}")
    run_process.run(tmp_path, *SWEEP, *short, *spy, "optimizer.lr=0.125,0.25")
    for number, rate in enumerate((0.125, 0.25)):
        trial = tmp_path / "logs/mnist_bn/sweeps/sweep" / str(number)
        rates = {path.name: float(path.read_text()) for path in trial.glob("rank*")}
        assert rates == {"rank0": rate, "rank1": rate}
        assert read_run(trial)["config"]["optimizer"]["lr"] == rate
        assert json.loads((trial / "outcome.json").read_text())["state"] == "COMPLETE"


def test_several_processes_inside_a_multirun_are_refused(command):
    result = command(main, "-m", *SHORT, *BARE, "trainer=ddp_sim", "seed=1,2")
    assert result.code == 1
    assert "to be one process in a job of a multirun, got 2" in result.err
    assert "hydra/sweeper=bn_optuna" in result.err


def test_the_data_of_a_sweep_do_not_pile_up(command, monkeypatch):
    from bn_lightning.data.tensor_data_module import TensorDataModule

    modules = []
    setup = TensorDataModule.setup

    def remembered(self, stage):
        modules.append(weakref.ref(self))
        setup(self, stage)

    monkeypatch.setattr(TensorDataModule, "setup", remembered)
    assert command(main, "-m", *SHORT, *BARE, "trainer.max_steps=2", "seed=1,2,3").code == 0
    assert len(modules) >= 3
    assert not [module for module in modules if module() is not None]


def test_the_fallback_to_digits_is_said_everywhere(command, tmp_path):
    arguments = [*SHORT, *BARE, "data=mnist", f"data.root={tmp_path}", "data.download=false"]
    with pytest.warns(UserWarning, match="digits"):
        result = command(main, *arguments)
    assert result.code == 0, result.err
    assert read_run(result.directory)["data"]["source"] == "digits"
    assert "digits" in result.out


def test_mnist_is_downloaded_before_it_is_read(command, mnist_root, tmp_path, monkeypatch):
    handler = functools.partial(QuietHandler, directory=mnist_root / "mnist")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        mirror = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr("bn_lightning.data.mnist.MNISTDataModule.mirrors", (mirror,))
        result = command(main, *SHORT, *BARE, "data=mnist", f"data.root={tmp_path}/new")
        server.shutdown()
    assert result.code == 0, result.err
    assert read_run(result.directory)["data"]["source"] == "mnist"
    assert len(list((tmp_path / "new/mnist").iterdir())) == 4


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


BAD = {
    "unknown experiment": (["+experiment=nope"], "experiment/nope"),
    "unknown option": (["norm=foo"], "batch ghost none sync torch"),
    "typo in an override": (["trainer.max_stps=5"], "did you mean `trainer.max_steps`?"),
    "no network and no fallback": (
        ["data=mnist", "data.root=empty", "data.download=false", "data.fallback=null"],
        "data.fallback=digits",
    ),
    "directory under a file": (["paths.log_dir=a_file/logs"], "a_file"),
    "network for other data": (
        ["model.network.in_features=100"],
        "`model.network` to take the data's inputs of shape (1, 28, 28), got",
    ),
    "no such checkpoint": (["ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
    "file that is no checkpoint": (["ckpt_path=a_file"], "a_file"),
    "nothing to resume": (["ckpt_path=last"], "checkpoints/last.ckpt"),
    "gpu without a gpu": (["trainer=gpu"], "use trainer=cpu"),
    "batch of one": (["data.batch_size=1"], "Expected more than 1 value per channel"),
    "batch of none": (["data.batch_size=0"], "`batch_size`"),
    "negative width": (["model.network.widths=[-5]"], "positive integers"),
    "width that is no number": (["model.network.widths=[wide]"], "positive integers"),
    "negative rate": (["optimizer.lr=-1"], "`optimizer.lr` to be a positive number, got -1"),
    "rate that is no number": (["optimizer.lr=fast"], "`optimizer.lr`"),
    "rate that is nan": (["optimizer.lr=nan"], "`optimizer.lr`"),
    "negative seed": (["seed=-1"], "`seed`"),
    "no option of a group": (
        ["init=null"],
        "`init` to be the name of an option, got null; use init=none",
    ),
    "triton without its interpreter": (["norm.backend=triton"], "TRITON_INTERPRET=1"),
    "unknown backend": (["norm.backend=cuda"], "backend"),
}


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_that_says_what_to_do(
    command, tmp_path, monkeypatch, arguments, words
):
    if "gpu" in arguments[0] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    if "triton" in arguments[0]:
        if torch.cuda.is_available():
            pytest.skip("the kernels run on this machine")
        # In this process the kernels may be interpreted ones already.
        monkeypatch.setattr("bn_lightning.kernels.dispatch.check_device", refuse_cpu)
    (tmp_path / "a_file").write_text("no checkpoint")
    result = command(main, *SHORT, *BARE, *arguments)
    assert result.code == 1
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


def test_nothing_to_resume_is_said_without_a_warning(command):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert command(main, *SHORT, *BARE, "ckpt_path=last").code == 1
    assert [str(warning.message) for warning in caught] == []


def test_refused_jobs_of_a_multirun_leave_nothing_and_the_others_stay(command, tmp_path):
    assert command(main, "-m", *SHORT, *BARE, "optimizer.lr=-1,-2").code == 1
    assert not list(tmp_path.iterdir())
    short = ("trainer.max_steps=1", "hydra.sweep.dir=kept")
    assert command(main, "-m", *SHORT, *BARE, *short, "optimizer.lr=-1,0.1").code == 1
    assert {path.name for path in Path("kept").iterdir()} == {"1", "multirun.yaml"}
    # In a directory that was there, what was there stays.
    Path("mine").mkdir()
    for place in ("mine", "."):
        refused = command(main, *SHORT, "optimizer.lr=-1", f"hydra.run.dir={place}")
        assert refused.code == 1
    assert {path.name for path in tmp_path.iterdir()} == {"kept", "mine"}
    assert not list(Path("mine").iterdir())


def test_a_sweep_that_never_validates_is_refused_before_its_first_trial(command, tmp_path):
    quick = ("-m", "+experiment=mnist_bn", "data=digits", "+sweep=quick")
    result = command(main, *quick, "trainer.max_steps=100")
    assert (result.code, result.out) == (1, "")
    assert result.err.count("\n") == 1
    assert "got 100; set trainer.val_check_interval=100 or less" in result.err
    assert not list(tmp_path.iterdir())


def test_a_sweep_without_m_is_refused(command, tmp_path):
    """Unless each of its keys has a value, as in the command that repeats a trial."""
    quick = (*SHORT, *BARE, "+sweep=quick")
    result = command(main, *quick, "norm=none")
    assert (result.code, result.out) == (1, "")
    assert "`+sweep=quick`" in result.err
    assert "without a value of init.std, optimizer.lr; add -m" in result.err
    assert not list(tmp_path.iterdir())
    assert command(main, *quick, "--cfg", "job").code == 0
    values = ("norm=none", "init.std=0.1", "optimizer.lr=1", "trainer.max_steps=1")
    assert read_run(command(main, *quick, *values).directory)["steps"] == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("seed=1", "--cfgg"), "got '--cfgg'; did you mean --cfg?"),
        (("--nosuch", "seed=1"), "got '--nosuch'; --hydra-help lists them"),
        (("seed=1", "--cfg", "nope"), "'nope' (choose from "),
        (("seed=1", "-m", "data=digits"), "got 'data=digits' after an option; move the options"),
    ],
    ids=["typo", "unknown", "value", "between"],
)
def test_an_option_that_is_none_is_refused_in_one_line(command, tmp_path, words, line):
    result = command(main, *words)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    assert line in result.err
    assert not list(tmp_path.iterdir())


def refuse_cpu(x: torch.Tensor) -> None:
    raise ValueError("on cpu; set TRITON_INTERPRET=1")


@pytest.mark.soak
def test_triton_on_cpu_tensors_is_refused_in_a_fresh_process(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("the kernels run on this machine")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bn_lightning.train", *SHORT, "norm.backend=triton"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "TRITON_INTERPRET=1" in done.stderr


def test_a_checkpoint_of_another_network_is_refused(command):
    run = command(main, *SHORT, *BARE, "model.network.widths=[20]").directory
    elsewhere = Path("elsewhere.ckpt")
    elsewhere.write_bytes((run / "checkpoints/last.ckpt").read_bytes())
    result = command(main, *SHORT, *BARE, "trainer.max_steps=60", f"ckpt_path={elsewhere}")
    assert result.code == 1
    assert "network.hidden.0.linear.weight is (20, 784) there and (100, 784) here" in result.err


def test_a_finished_run_is_left_as_it_is(command):
    run = command(main, *SHORT, *BARE).directory
    before = {path: path.read_bytes() for path in (run / "run.json", run / "metrics.csv")}
    result = command(main, *SHORT, *BARE, "ckpt_path=last")
    assert result.code == 1
    assert result.err.count("\n") == 1
    for words in (f"{run}, which completed its 50 steps", "raise trainer.max_steps above 50"):
        assert words in result.err
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("typed", "steps"),
    [([], 20), (["trainer.max_steps=40"], 40), (["trainer.max_epochs=3"], 60)],
    ids=["as_it_is", "steps", "epochs"],
)
def test_debug_ends_after_twenty_steps_unless_a_budget_is_typed(command, typed, steps):
    result = command(main, "+experiment=mnist_bn", "data=digits", "trainer=debug", *BARE, *typed)
    assert result.code == 0, result.err
    assert read_run(result.directory)["steps"] == steps
    assert not (result.directory / "checkpoints").exists()


def test_a_run_is_not_resumed_as_another(command):
    run = command(main, *SHORT, *BARE).directory
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    more = ("trainer.max_steps=60", "optimizer.lr=0.5", f"ckpt_path={run}/checkpoints/last.ckpt")
    result = command(main, *SHORT, *BARE, *more)
    assert result.code == 1
    assert "optimizer" in result.err
    after = {path: path.read_bytes() for path in before}
    changed = {path.name for path in before if before[path] != after[path]}
    assert changed <= {"mnist_bn.log"}


def test_a_copied_checkpoint_is_not_trained_by_another_optimizer(command):
    """Its state would replace what was typed."""
    run = command(main, *SHORT, *BARE).directory
    elsewhere = Path("elsewhere.ckpt")
    elsewhere.write_bytes((run / "checkpoints/last.ckpt").read_bytes())
    more = (*SHORT, *BARE, "trainer.max_steps=60", f"ckpt_path={elsewhere}")
    refused = command(main, *more, "optimizer.lr=0.5", "init.std=0.5")
    assert refused.code == 1
    assert f"{elsewhere} began with, got another init, optimizer" in refused.err
    result = command(main, *more)
    assert result.code == 0, result.err
    assert read_run(result.directory)["steps"] == 60


def test_a_strangers_run_is_not_evaluated_when_resumed(command):
    """What a schedule derives from the trainer is taken from `run.json`, as a plain value."""
    experiment = ("+experiment=placement", "trainer.val_check_interval=5", *BARE)
    run = command(main, *experiment, "trainer.max_steps=10").directory
    record = read_run(run)
    last = f"ckpt_path={run}/checkpoints/last.ckpt"
    made = "${oc.create:{_target_:os.mkdir,_args_:[made]}}"
    node = {"_target_": "os.mkdir", "_args_": ["made"]}
    for steps, derived, words in (
        ("\\" + made, made, "run.json to be a plain value"),
        (node, node, "got another model, scheduler"),
    ):
        record["config"]["trainer"]["max_steps"] = steps
        record["config"]["scheduler"]["T_max"] = derived
        record["config"]["model"]["scheduler"]["T_max"] = derived
        write_json(run / "run.json", record)
        result = command(main, *experiment, "trainer.max_steps=20", last)
        assert result.code == 1 and words in result.err, result.err
        assert not Path("made").exists()


def test_a_run_of_version_0_1_0_is_resumed_if_its_configuration_is_the_same(command):
    """Its loggers and its profiler have other names, and `trusted` was a key."""
    run = command(main, *SHORT, *BARE, "trainer.max_steps=40").directory
    record = read_run(run)
    record["versions"]["bn-lightning"] = "0.1.0"
    config = record["config"] | {"trusted": []}
    config["logger"]["csv"]["_target_"] = "bn_lightning.metrics_logger.MetricsCSVLogger"
    config["trainer"]["profiler"]["_target_"] = "bn_lightning.no_profiler.NoProfiler"
    write_json(run / "run.json", record | {"config": config})
    resume = (*SHORT, *BARE, f"ckpt_path={run}/checkpoints/last.ckpt")
    result = command(main, *resume)
    assert result.code == 0, result.err
    assert (read_run(run)["steps"], read_run(run)["resumed_at"]) == (50, [40])

    config["data"]["an_old_argument"] = 7
    write_json(run / "run.json", record | {"config": config})
    result = command(main, *resume, "trainer.max_steps=60")
    assert result.code == 1 and result.err.count("\n") == 1
    assert "got another data; resume it with bn_lightning 0.1.0, which wrote it" in result.err


def test_inputs_that_are_not_numbers_are_an_error_of_the_data(command, monkeypatch):
    from bn_lightning.data import digits

    load = digits.DigitsDataModule.load

    def spoiled(self):
        arrays = load(self)
        arrays.train_inputs[3, 0, 5, 5] = float("nan")
        return arrays

    monkeypatch.setattr(digits.DigitsDataModule, "load", spoiled)
    result = command(main, *SHORT, *BARE)
    assert result.code == 1
    assert len(result.err.strip().splitlines()) == 1
    assert "NaN" in result.err


@pytest.mark.slow
def test_two_ranks_on_a_cpu_train_as_one_with_the_double_batch(tmp_path, command):
    options = ("+experiment=mnist_bn", *BARE, "data=digits", "trainer.max_steps=20")
    # The ranks run the command again, so that it is one of its own.
    two = run_process.run(tmp_path, *options, "trainer=ddp_sim", "norm=sync", "data.batch_size=30")
    one = command(main, *options, "trainer=cpu", "norm=batch", "data.batch_size=60").directory
    losses = []
    for directory in (two, one):
        record = read_run(directory)
        assert record["status"] == "completed" and record["steps"] == 20
        losses.append(record["metrics"]["test/loss"])
    # 20 steps at learning rate 1 in fp32, summed in another order.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
