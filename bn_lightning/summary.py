"""What a run prints when it ends."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_summary(record: dict[str, Any], directory: str | Path) -> None:
    """Print a run's result and where its files are, as a short table."""
    table = Table(title=f"{record['config']['task_name']}: {record['status']}", show_header=False)
    rows = {}
    if data := record["data"]:
        sizes = " / ".join(f"{data[split]:,}" for split in ("train", "validation", "test"))
        rows["data"] = f"{data['source']}, {sizes}"
    if record.get("diverged_at"):
        rows["diverged"] = (
            f"the loss was not finite at step {record['diverged_at']:,}: scored as chance"
        )
    for name in ("val/accuracy", "test/accuracy", "test/accuracy_top5", "test/auroc", "test/loss"):
        if name in record["metrics"]:
            value = record["metrics"][name]
            rows[name] = "not a number" if value is None else f"{value:.4f}"
    rows["steps"] = f"{record['steps']:,}"
    if "seconds" in record:
        rows["time"] = f"{record['seconds']:.1f} s, {record['steps_per_second']:.0f} steps/s"
    rows["peak memory"] = f"{record['peak_memory_mib']:.0f} MiB"
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
    # Outside the table, which would break a long path over lines.
    print(directory)
