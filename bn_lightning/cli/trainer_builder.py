"""Build the Trainer of a command, with a profiler that reports into its directory."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

_FOLDER, _FILE = "profiler", "report"
_MOST_LINES = 120  # of a report are printed; the simple profiler's has one for each hook


def build_trainer(config: DictConfig, directory: str | Path, **arguments: Any) -> Any:
    """Build a Trainer, whose `profiler` may be a name of Lightning's: simple, advanced or pytorch.

    Such a profiler writes `profiler/STAGE-report.txt`, and pytorch its traces for Chrome and
    Perfetto; `print_profile` prints the reports. Those of an earlier start of the run are removed.

    Args:
        config: the `trainer` of a configuration.
        directory: of the run.
        arguments: of the Trainer, in addition.

    Raises:
        ValueError: there is no profiler of this name.
    """
    from hydra.utils import instantiate
    from lightning.pytorch import profilers
    from lightning.pytorch.utilities import rank_zero_only

    name = config.get("profiler")
    if isinstance(name, str):
        kinds = {
            "simple": profilers.SimpleProfiler,
            "advanced": profilers.AdvancedProfiler,
            "pytorch": profilers.PyTorchProfiler,
        }
        if name not in kinds:
            raise ValueError(
                f"expected `trainer.profiler` to be {', '.join(kinds)} or null, got {name!r}; or"
                " give another's class as trainer.profiler._target_"
            )
        folder = Path(directory, _FOLDER)
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]  # set on the function
            for report in folder.glob("*"):
                report.unlink()
        arguments["profiler"] = kinds[name](dirpath=folder, filename=_FILE)
        config = OmegaConf.merge(config, {"profiler": None})  # type: ignore[assignment]
    return instantiate(config, **arguments)


def print_profile(directory: str | Path) -> None:
    """Print the reports of the profiler that `build_trainer` made, if it did, and their paths.

    Of several ranks, the first one's reports are printed; of a long report, such as the advanced
    profiler's, the first lines.
    """
    folder = Path(directory, _FOLDER)
    reports = [*folder.glob(f"*{_FILE}.txt"), *folder.glob(f"*{_FILE}-0.txt")]
    for report in sorted(reports):
        lines = report.read_text(encoding="utf-8").strip().splitlines()
        print("\n".join(lines[:_MOST_LINES]))
        print(f"{len(lines):,} lines: {report}" if len(lines) > _MOST_LINES else report)
