"""List the runs under a folder."""

from pathlib import Path

from bn_lightning.runs.directory import RUN_FILE
from bn_lightning.runs.record import read_run, result_names
from bn_lightning.sweeps.analysis.arms import arm_of_config, label_of
from bn_lightning.sweeps.analysis.compared_runs import typed_overrides
from bn_lightning.sweeps.engine.space import key_of

_HEAD = ("run", "arm", "seed", "status", "result", "overrides")
_IN_COLUMNS = ("norm", "seed")


def list_runs(folder: Path) -> str:
    """Return a table with a line for each run under a folder, at any depth, in order of its path.

    The result is the accuracy of the test, else of the last validation, else another metric.

    Raises:
        ValueError: there is no run.
    """
    found = sorted(path.parent for path in folder.rglob(RUN_FILE))
    if not found:
        what = "none" if folder.is_dir() else "no such folder"
        raise ValueError(
            f"expected `{folder}` to be a folder with runs at any depth, got {what}; name another"
        )
    return text_table(_HEAD, [_row(directory, folder) for directory in found])


def text_table(head: tuple[str, ...] | list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown, with its columns aligned except the last, which may be long."""
    lines = [list(head), ["-" * len(name) for name in head], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths[-1] = 0
    made = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in made)


def _row(directory: Path, folder: Path) -> list[str]:
    name = str(directory.relative_to(folder))
    try:
        record = read_run(directory)
    except ValueError:  # another program's run.json, or one of another version
        return [name, "", "", "unreadable", "", ""]
    metrics = record.get("metrics") or {}
    known = [name for name in result_names(record) if isinstance(metrics[name], int | float)]
    return [
        name,
        label_of(arm_of_config(record["config"])),
        str(record.get("seed", "")),
        str(record["status"]),
        f"{known[0].replace('/', ' ')} {metrics[known[0]]:.4f}" if known else "",
        " ".join(t for t in typed_overrides(directory) if key_of(t) not in _IN_COLUMNS),
    ]
