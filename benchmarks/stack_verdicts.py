"""Whether a stack changes which trials of a sweep train, beside what rounding alone changes.

    BN_LIGHTNING_DATA=DIR python benchmarks/stack_verdicts.py [--folder FOLDER] [--jobs 2]

Runs a part of `+sweep=lr_init` three times, 33 cells for each arm and three seeds: one by one, as
stacks, and one by one with one weight moved by one unit in its last place. Prints how many verdicts
"reaches .90" differ from those of the first, and the tolerance of each with its interval. A row is
appended to results/stack_verdicts.csv. The command resumes what is in FOLDER.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from rows import append_rows, provenance

RESULTS = Path(__file__).parent / "results" / "stack_verdicts.csv"
SWEEPS = {
    "alone": ("hydra/launcher=basic",),
    "stack": (),
    "twin": ("hydra/launcher=basic", "+callbacks.one_ulp._target_=stack_verdicts.OneUlp"),
}
THRESHOLD = 0.9
KEYS = ("params/seed", "params/init.std", "params/optimizer.lr", "params/norm")


class OneUlp(Callback):
    """Moves a weight of the last layer by one unit in its last place before training.

    One of the first layer may belong to a pixel that is always 0.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move it."""
        with torch.no_grad():
            weight = [p for p in pl_module.parameters() if p.dim() > 1][-1].view(-1)[:1]
            weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))


def run(name: str, folder: Path, jobs: int) -> dict[tuple[str, ...], bool]:
    """Run or resume a sweep and its report; return the verdict of each trial."""
    command = [sys.executable, "-m", "bn_lightning.train", "-m"]
    command += ["+experiment=mnist_bn", "+sweep=lr_init", "data.fallback=null", "seed=1,2,3"]
    command += ["init.std=0.01,0.1,1", f"hydra.sweeper.n_jobs={jobs}", *SWEEPS[name]]
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([*command, f"hydra.sweep.dir={folder / name}"], check=True, env=environment)
    report = [sys.executable, "-m", "bn_lightning.report", str(folder / name)]
    subprocess.run(report, check=True, env=environment, stdout=subprocess.DEVNULL)
    with open(folder / name / "trials.csv", encoding="utf-8", newline="") as file:
        return {
            tuple(row[key] for key in KEYS): float(row["attributes/test/accuracy"]) >= THRESHOLD
            for row in csv.DictReader(file)
        }


def main() -> None:
    """Run the three sweeps, and compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("logs/stack_verdicts"))
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    verdicts = {name: run(name, arguments.folder, arguments.jobs) for name in SWEEPS}
    row: dict[str, object] = {"trials": len(verdicts["alone"])}
    for name, found in verdicts.items():
        if found.keys() != verdicts["alone"].keys():
            raise SystemExit(f"expected the trials of `alone` in {arguments.folder / name}")
        row[f"{name}_flips"] = sum(found[key] != verdicts["alone"][key] for key in found)
        summary = json.loads((arguments.folder / name / "summary.json").read_text(encoding="utf-8"))
        for arm, content in summary["arms"].items():
            for measure in ("share_trained", "mean_width"):
                numbers = content["measures"][measure]
                text = " ".join(f"{numbers[part]:.4f}" for part in ("value", "low", "high"))
                row[f"{name}_{arm}_{measure}"] = text
    for key, value in row.items():
        print(f"{key:32} {value}")
    append_rows(RESULTS, [row | provenance()])


if __name__ == "__main__":
    main()
