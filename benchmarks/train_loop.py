"""What Lightning, Hydra and the callbacks cost beside a plain PyTorch loop.

    BN_LIGHTNING_DATA=DIR python benchmarks/train_loop.py [--rounds 5] [--steps 5000]

Trains the paper's network on MNIST in turn by

- `plain`: a bare loop in this file, with torch's BatchNorm;
- `train`: `bn_lightning.train` with its checkpoints and divergence guard, without a progress bar;
- `train_logged`: the same with the percentile callback and the csv logger;

each on one thread, 60 examples a step, with loss and accuracy on validation and test sets every
1,000 steps. Prints the medians over rounds of milliseconds a step and of the ratios within a round
(on a machine that others use, only those mean something), and appends a row for each round to
results/train_loop.csv.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from rows import append_rows
from torch import nn
from torch.nn import functional as F

from bn_lightning.data import MNISTDataModule
from bn_lightning.runs.machine import git_commit, hardware, package_versions
from bn_lightning.train import train

RESULTS = Path(__file__).parent / "results" / "train_loop.csv"
EVALUATE_EVERY = 1000
BARE = ["~callbacks.activation_percentiles", "~callbacks.step_progress", "~logger.csv"]
LOGGED = ["~callbacks.step_progress"]


def plain(data: MNISTDataModule, steps: int) -> float:
    """Seconds a step of a bare loop."""
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in in (784, 100, 100):
        layers += [nn.Linear(fan_in, 100), nn.BatchNorm1d(100), nn.Sigmoid()]
    network = nn.Sequential(*layers, nn.Linear(100, 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    train_batches = data.train_dataloader()
    evaluations = data.val_dataloader()
    step = epoch = 0
    started = time.perf_counter()
    while step < steps:
        train_batches.set_epoch(epoch)
        epoch += 1
        for x, target in train_batches:
            optimizer.zero_grad()
            F.cross_entropy(network(x), target).backward()
            optimizer.step()
            step += 1
            if step % EVALUATE_EVERY == 0:
                network.eval()
                with torch.no_grad():
                    for batches in evaluations:
                        loss = correct = 0.0
                        for inputs, labels in batches:
                            logits = network(inputs)
                            loss += F.cross_entropy(logits, labels, reduction="sum").item()
                            correct += (logits.argmax(1) == labels).sum().item()
                network.train()
            if step == steps:
                break
    return (time.perf_counter() - started) / steps


def ours(overrides: list[str], steps: int) -> float:
    """Seconds a step of `bn_lightning.train`, as its run.json says."""
    with tempfile.TemporaryDirectory() as directory:
        config = compose(
            "train",
            [
                "+experiment=mnist_bn",
                f"trainer.max_steps={steps}",
                f"trainer.val_check_interval={EVALUATE_EVERY}",
                f"paths.output_dir={directory}",
                "data.fallback=null",
                "extras.figures=false",
                *overrides,
            ],
        )
        with contextlib.redirect_stdout(io.StringIO()):
            train(config)
        return json.loads(Path(directory, "run.json").read_text())["seconds"] / steps


def main() -> None:
    """Run the rounds, print the medians, append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with initialize_config_module("bn_lightning.conf", version_base="1.3"):
        config = compose("train", ["+experiment=mnist_bn"])
        data = MNISTDataModule(
            **{k: v for k, v in config.data.items() if k not in ("_target_", "fallback")},
            fallback=None,
        )
        data.setup("fit")
        for round_number in range(arguments.rounds):
            seconds = {
                "plain": plain(data, arguments.steps),
                "train": ours(BARE, arguments.steps),
                "train_logged": ours(LOGGED, arguments.steps),
            }
            rows.append(
                {
                    "round": round_number,
                    "steps": arguments.steps,
                    **{f"{name}_ms": round(1000 * value, 4) for name, value in seconds.items()},
                    "train/plain": round(seconds["train"] / seconds["plain"], 3),
                    "train_logged/train": round(seconds["train_logged"] / seconds["train"], 3),
                    "processor": hardware()["processor"],
                    "torch": package_versions()["torch"],
                    "lightning": package_versions()["lightning"],
                    "date": time.strftime("%Y-%m-%d"),
                    "commit": git_commit(),
                }
            )
            print({k: v for k, v in rows[-1].items() if "/" in k or k.endswith("_ms")}, flush=True)
    for name in ("plain_ms", "train_ms", "train_logged_ms", "train/plain", "train_logged/train"):
        print(f"{name:20} {statistics.median(row[name] for row in rows):.3f}")
    append_rows(RESULTS, rows)


if __name__ == "__main__":
    main()
