"""What gradient accumulation costs BatchNorm in accuracy, and what ghost, sync and precise do.

    BN_LIGHTNING_DATA=DIR python benchmarks/accumulation.py [--seeds 5] [--steps 1000]

Trains the paper's network on MNIST, each optimizer step on the same 64 samples, in five ways:

- `batch`: one batch of 64;
- `accumulated`: four micro-batches of 16, each normalized by itself;
- `accumulated_precise`: the same, with statistics of 5,000 samples at the end (PreciseBatchNorm);
- `ghost`: one batch of 64, normalized in parts of 16 (`norm=ghost`);
- `sync`: four micro-batches of 16 on four processes, normalized together (`norm=sync`).

Prints the test accuracy of each, its mean and standard deviation over the seeds, and the mean
difference from `batch` of the same seed; appends a row for each run to results/accumulation.csv.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from rows import append_rows

from bn_lightning.runs.machine import git_commit, package_versions
from bn_lightning.train import train

RESULTS = Path(__file__).parent / "results" / "accumulation.csv"
MICRO = ["data.batch_size=16", "+trainer.accumulate_grad_batches=4"]
ARMS = {
    "batch": ["data.batch_size=64"],
    "accumulated": MICRO,
    "accumulated_precise": [
        *MICRO,
        "callbacks=[precise_batch_norm]",
        "callbacks.precise_batch_norm.when=end",
    ],
    "ghost": ["data.batch_size=64", "norm=ghost", "norm.ghost_size=16"],
    "sync": ["data.batch_size=16", "norm=sync", "trainer=ddp_sim", "trainer.devices=4"],
}


def run(arm: str, seed: int, steps: int, directory: str) -> dict[str, float]:
    """Return the metrics of one run, from its run.json."""
    batches = steps * 4 if MICRO[1] in ARMS[arm] else steps
    overrides = [
        "+experiment=mnist_bn",
        "callbacks=[]",
        *ARMS[arm],
        f"seed={seed}",
        f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={batches}",
        "data.fallback=null",
        "extras.figures=false",
    ]
    if arm == "sync":
        command = [sys.executable, "-m", "bn_lightning.train", *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [*command, f"hydra.run.dir={directory}"],
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
        )
    else:
        with initialize_config_module("bn_lightning.conf", version_base="1.3"):
            config = compose("train", [*overrides, f"paths.output_dir={directory}"])
        with contextlib.redirect_stdout(io.StringIO()):
            train(config)
    return json.loads(Path(directory, "run.json").read_text())["metrics"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    constant = {
        "steps": options.steps,
        "torch": package_versions()["torch"],
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
    }
    accuracies: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in range(1, options.seeds + 1):
        for arm, values in accuracies.items():
            with tempfile.TemporaryDirectory() as directory:
                metrics = run(arm, seed, options.steps, directory)
            values.append(metrics["test/accuracy"])
            measured = {key: round(metrics[f"test/{key}"], 5) for key in ("accuracy", "loss")}
            append_rows(RESULTS, [{"arm": arm, "seed": seed, **measured, **constant}])
            print(arm, seed, measured, flush=True)
    for arm, values in accuracies.items():
        differences = [x - y for x, y in zip(values, accuracies["batch"], strict=True)]
        print(
            f"{arm:20} {statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}, "
            f"{statistics.mean(differences):+.4f} from batch"
        )


if __name__ == "__main__":
    main()
