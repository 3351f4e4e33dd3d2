"""Put runs side by side: `python -m bn_lightning.report RUN [RUN ...] [--output DIR]`."""

import argparse
from pathlib import Path

from bn_lightning.command import run_reported
from bn_lightning.metrics_csv import read_metrics
from bn_lightning.run_record import read_run
from bn_lightning.sweeps.figures import comparison_figure, save


def report(runs: list[Path], output: Path) -> None:
    """Draw accuracy and activation percentiles of runs as one figure, `output/comparison.png|svg`.

    Args:
        runs: directories of runs.
        output: the folder to write to; made if absent.

    Raises:
        ValueError: a directory is no run's, or a run logged neither accuracy nor percentiles.
    """
    drawn = {}
    for run in runs:
        label = label_of(read_run(run)["config"])
        while label in drawn:
            label += " (again)"
        drawn[label] = read_metrics(run)
        missing = {"test/accuracy", "activation/p50"} - drawn[label].keys()
        if missing:
            raise ValueError(
                f"{run} expected a metrics.csv with {', '.join(sorted(missing))}, got none; run it "
                "with data.test_curve=true and callbacks.activation_percentiles"
            )
    save(comparison_figure(drawn), output / "comparison")
    print(output / "comparison.png")


def label_of(config: dict) -> str:
    """What a run is called in a figure: whether it normalises."""
    return "without BatchNorm" if config["norm"] is None else "with BatchNorm"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bn_lightning.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for the figure")
    arguments = parser.parse_args()
    run_reported(lambda: report(arguments.runs, arguments.output))


if __name__ == "__main__":
    main()
