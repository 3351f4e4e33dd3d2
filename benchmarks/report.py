"""Measure the cost of a report: seconds, memory, size of its page, and the time to draw it.

    python benchmarks/report.py [--inits 8 41] [--rates 11 41]

Makes studies of inits x rates x 2 arms x 3 seeds with synthetic accuracies, reports each in a
separate process, and opens the page in headless Chromium. The columns of drawing are empty without
playwright or without Chromium in the PATH. Appends a row for each study to results/report.csv:

    wall_s, cpu_s    seconds of the command, including the start of Python
    peak_mib         largest resident set of the command, MiB
    page_mb          size of the page, 10^6 bytes
    drawn_ms         milliseconds from the start of loading until all figures are drawn
    drawn_cpu_ms     milliseconds of CPU time of the page's main thread in that time

On a shared machine only the CPU times are comparable.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import create_trial
from rows import append_rows

from bn_lightning.runs.machine import git_commit, hardware
from bn_lightning.sweeps.report.write_report import PAGE_FILE

RESULTS = Path(__file__).parent / "results" / "report.csv"


def make_study(directory: Path, n_inits: int, n_rates: int) -> int:
    """Write the journal of a synthetic sweep, and return its number of trials."""
    space: dict[str, list[Any]] = {
        "optimizer.lr": [float(f"{x:.4g}") for x in np.logspace(-3, 2, n_rates)],
        "init.std": [float(f"{x:.4g}") for x in np.logspace(-3, 1, n_inits)],
        "norm": ["none", "batch"],
        "seed": [1, 2, 3],
    }
    distributions = {name: CategoricalDistribution(values) for name, values in space.items()}
    generator = np.random.default_rng(0)
    trials = []
    for lr in space["optimizer.lr"]:
        for std in space["init.std"]:
            for norm in space["norm"]:
                for seed in space["seed"]:
                    accuracy = made_up_accuracy(lr, std, norm) + generator.normal(0, 0.01)
                    accuracy = float(np.clip(accuracy, 0.1, 1))
                    attributes = {
                        "test/accuracy": accuracy,
                        "test/loss": -math.log(accuracy),
                        "val/accuracy": accuracy,
                        "diverged": norm == "none" and lr * std > 100,
                        "directory": str(directory / str(len(trials))),
                        "seconds": 3.0,
                    }
                    params = {"optimizer.lr": lr, "init.std": std, "norm": norm, "seed": seed}
                    trials.append(
                        create_trial(
                            params=params,
                            distributions=distributions,
                            value=accuracy,
                            user_attrs=attributes,
                        )
                    )
    storage = JournalStorage(JournalFileBackend(str(directory / "journal.log")))
    study = optuna.create_study(storage=storage, study_name="made-up", direction="maximize")
    study.add_trials(trials)
    return len(trials)


def made_up_accuracy(lr: float, std: float, norm: str) -> float:
    """Return an accuracy that is high on a band of rates, a narrower one without normalization."""
    middle, half = (0.0, 1.6) if norm == "batch" else (-0.3, 0.9 - 0.3 * abs(math.log10(std) + 1))
    return 0.97 / (1 + math.exp(8 * (abs(math.log10(lr) - middle) - half)))


def measured_report(directory: Path) -> dict[str, float]:
    """Return seconds and memory of the command, and the size of its page."""
    command = [sys.executable, "-m", "bn_lightning.report", str(directory)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"expected the report to exit with 0, got {process.returncode}")
    return {
        "wall_s": round(time.perf_counter() - started, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mib": round(usage.ru_maxrss / 1024, 1),
        "page_mb": round((directory / PAGE_FILE).stat().st_size / 1e6, 2),
    }


def measured_drawing(page: Path) -> dict[str, float]:
    """Return the least milliseconds of three until the page is drawn; {} without a browser."""
    chromium = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return {}
    if chromium is None:
        return {}
    times = []
    with sync_playwright() as started:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = started.chromium.launch(executable_path=chromium, args=options)
        for _ in range(3):
            opened = browser.new_page(viewport={"width": 1280, "height": 900})
            devtools = opened.context.new_cdp_session(opened)
            devtools.send("Performance.enable", {"timeDomain": "threadTicks"})
            opened.goto(page.as_uri())
            opened.wait_for_function("document.documentElement.dataset.drawn", timeout=120_000)
            metrics = devtools.send("Performance.getMetrics")["metrics"]
            seconds = next(m["value"] for m in metrics if m["name"] == "TaskDuration")
            drawn = int(opened.evaluate("document.documentElement.dataset.drawn"))
            times.append({"drawn_ms": drawn, "drawn_cpu_ms": round(1000 * seconds)})
            opened.close()
        browser.close()
    return {name: min(found[name] for found in times) for name in times[0]}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inits", type=int, nargs="+", default=[8, 41])
    parser.add_argument("--rates", type=int, nargs="+", default=[11, 41])
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for n_inits, n_rates in zip(given.inits, given.rates, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder)
            row: dict[str, Any] = {"trials": make_study(directory, n_inits, n_rates)}
            row |= dict.fromkeys(["wall_s", "cpu_s", "peak_mib", "page_mb"], "")
            row |= dict.fromkeys(["drawn_ms", "drawn_cpu_ms"], "")
            row |= measured_report(directory) | measured_drawing(directory / PAGE_FILE)
        row |= {
            "load": round(os.getloadavg()[0], 1),
            "cores": os.cpu_count(),
            "processor": hardware()["processor"],
            "date": datetime.now(UTC).date().isoformat(),
            "commit": git_commit(),
        }
        print(row)
        append_rows(RESULTS, [row])


if __name__ == "__main__":
    main()
