"""Put runs side by side: `python -m bn_lightning.report RUN [RUN ...] [--output DIR]`."""

import argparse
import os
from pathlib import Path
from typing import Any

from bn_lightning.command import FULL_ERROR, run_reported
from bn_lightning.metrics_csv import read_metrics
from bn_lightning.run_record import read_run
from bn_lightning.sweeps.figures import comparison_figure, save


def report(runs: list[Path], output: Path) -> None:
    """Draw accuracy and activation percentiles of runs as one figure, `output/comparison.png|svg`.

    Args:
        runs: directories of runs of `bn_lightning.train`.
        output: the folder to write to; made if absent.

    Raises:
        ValueError: a directory is no such run's, or its run did not log both.
    """
    drawn: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for run in runs:
        config = read_run(run)["config"]
        metrics = read_metrics(run)
        missing = sorted({"test/accuracy", "activation/p50"} - metrics.keys())
        if "norm" not in config or missing:
            raise ValueError(
                f"{run} expected a run of bn_lightning.train and its metrics.csv, got one without "
                f"{', '.join(missing) or 'norm'}; run it with data.test_curve=true and "
                "callbacks.activation_percentiles"
            )
        label = label_of(config)
        again = sum(name.startswith(label) for name in drawn)
        drawn[f"{label} ({again + 1})" if again else label] = metrics
    save(comparison_figure(drawn), output / "comparison")
    print(output / "comparison.png")


def label_of(config: dict[str, Any]) -> str:
    """What a run is called in a figure: whether it normalises."""
    return "without BatchNorm" if config["norm"] is None else "with BatchNorm"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bn_lightning.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for the figure")
    arguments = parser.parse_args()
    full_error = os.environ.get(FULL_ERROR) == "1"
    run_reported(lambda: report(arguments.runs, arguments.output), full_error=full_error)


if __name__ == "__main__":
    main()
