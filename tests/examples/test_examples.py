"""Each example runs as its docstring says, and shows what it is meant to show."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from forked import Forked
from run_process import finish

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str, cwd: Path) -> str:
    """Return the output of `python examples/NAME.py ARGUMENTS`, which must exit with code 0."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_own_module_trains_faster_with_batch_norm(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    accuracies = []
    for arguments in ((), ("--without-batch-norm",)):
        process = Forked("own_module", ("--max-steps", "200", *arguments), tmp_path)
        output, _ = finish(process)
        accuracies.append(re.search(r"test accuracy ([\d.]+) after 200 steps", output)[1])
    with_it, without = map(float, accuracies)
    assert with_it > 0.8 and without < 0.5


@pytest.mark.slow
def test_swap_resnet_trains_fused_and_reverts(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    output = run("swap_resnet", cwd=tmp_path)
    # Of the processor, because other processes may take turns with this one.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 30
    assert re.search(r"^100 steps .*: about \d+ s", output)
    assert "5 of 5 ran fused" in output
    assert "after the run: torch.nn.modules.batchnorm.BatchNorm2d" in output


@pytest.mark.slow
def test_lightning_cli_takes_callback_and_plugin(tmp_path):
    pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse")
    output = run(
        "cli", "fit", "--config", str(EXAMPLES / "cli.yaml"), "--trainer.max_steps=4", cwd=tmp_path
    )
    assert "max_steps=4" in output


def test_sweeper_elsewhere_sweeps_and_continues(tmp_path):
    program = "sweeper_elsewhere/main"
    assert "20 of 20 trials" in run(program, "-m", cwd=tmp_path)
    results = (tmp_path / "sweeps" / "valley" / "optimization_results.yaml").read_text()
    best = float(re.search(r"best_value: (\S+)", results)[1])
    assert best < 1.0  # the start is at 120
    again = run(program, "-m", "hydra.sweeper.n_trials=22", cwd=tmp_path)
    assert "22 of 22 trials" in again
    assert len(list((tmp_path / "sweeps" / "valley").glob("[0-9]*"))) == 22
