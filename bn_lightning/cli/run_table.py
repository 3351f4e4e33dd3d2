"""Print the result of a run as tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from bn_lightning.runs.metrics_csv import read_metrics
from bn_lightning.runs.record import data_sentence, result_names, stop_sentence
from bn_lightning.sweeps.analysis.arms import title_of

_OF_CLASSIFIERS = "val/accuracy", "test/accuracy", "test/accuracy_top5", "test/auroc", "test/loss"


def print_run_table(
    record: dict[str, Any], directory: str | Path, trained: Mapping[str, Any] | None = None
) -> None:
    """Print the result of a run, and below it the directory of its files.

    Args:
        record: of the run.
        directory: of the run.
        trained: the configuration that names task, arm and seed; None for that of the record.
    """
    title = f"{title_of(trained or record['config'])}: {record['status']}"
    console = Console()
    # As wide as the title if there is room, because Rich breaks a title at the table's width.
    table = Table(title=title, show_header=False, min_width=min(cell_len(title), console.width))
    rows = {}
    if data := data_sentence(record):
        rows["data"] = data
    if record.get("diverged_at"):
        # The loss was NaN, or above max_loss for too long. The record does not tell which.
        rows["diverged"] = f"at step {record['diverged_at']:,}: scored as chance"
    if record["status"] == "stopped early":
        rows["stopped early"] = stop_sentence(record).removeprefix("stopped early ")
    for name in dict.fromkeys((*_OF_CLASSIFIERS, *result_names(record))):
        if name in record["metrics"]:
            value = record["metrics"][name]
            # The loss is the mean cross-entropy in nats, which others call the log loss.
            is_log_loss = name == "test/loss" and "test/accuracy" in record["metrics"]
            label = f"{name} (log loss)" if is_log_loss else name
            rows[label] = "not a number" if value is None else f"{value:.4f}"
    interval = (record["config"].get("trainer") or {}).get("val_check_interval")
    was_trained = "seconds" in record
    is_validated = any(name.startswith("val/") for name in record["metrics"])
    is_short = isinstance(interval, int) and interval > record["steps"]
    if was_trained and not is_validated and is_short:
        rows["validation"] = f"none before trainer.val_check_interval={interval}"
    rows["steps"] = f"{record['steps']:,}"
    if was_trained:
        seconds, resumed_at = record["seconds"], record.get("resumed_at") or [0]
        known = f"unknown before step {resumed_at[-1]:,}" if seconds is None else f"{seconds:.1f} s"
        rows["time"] = f"{known}, {record['steps_per_second']:.0f} steps/s"
    rows["peak memory"] = f"{record['peak_memory_mib']:.0f} MiB"
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    # Outside the table, which would break a long path over lines.
    print(directory)


def print_validation_table(directory: str | Path) -> None:
    """Print loss and accuracy of each validation in a run's metrics.csv, if it has any."""
    metrics = read_metrics(directory)
    losses, accuracies = (dict(metrics.get(f"val/{name}", ())) for name in ("loss", "accuracy"))
    if not losses:
        return
    table = Table()
    for heading in ("step", "val/loss", "val/accuracy"):
        table.add_column(heading, justify="right")
    for step, loss in losses.items():
        accuracy = f"{accuracies[step]:.4f}" if step in accuracies else ""
        table.add_row(f"{step:,}", f"{loss:.4f}", accuracy)
    Console().print(table)
