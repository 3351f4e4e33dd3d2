"""Labels of images or rows: `python -m bn_lightning.predict ckpt_path=PATH input=PATH`."""

import csv
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bn_lightning.cli.command import hydra_command, quiet_lightning
from bn_lightning.runs.atomic_write import write_atomically
from bn_lightning.runs.checkpoint import (
    check_data,
    class_names,
    load_checkpoint,
    trained_model,
    trusted_config,
)
from bn_lightning.runs.trust import OF_CONFIGURATIONS, check_trusted

_SHOWN = 10  # so few predictions are printed, too


def predict(config: DictConfig) -> Path:
    """Write `predictions.csv`, the classes that a checkpoint's network gives samples; return it.

    A line for each sample, in the order of the files' names or of the rows: `path` (as `input` was
    given) or `row` (from 1 for the first after the header), `label`, `probability` of the label,
    and `probability_NAME` of each class, in [0, 1]. The label is the most probable class, by its
    name where the checkpoint keeps names, else by its number.

    Samples are normalised and scaled as the checkpoint's own data are for its test.

    Args:
        config: composed from `conf/predict.yaml`.

    Raises:
        CheckpointError: the file is no checkpoint of `bn_lightning.train`.
        UntrustedError: its configuration would build what it may not.
        DataError: the input is not what the network was trained on, or cannot be read.
        ValueError: a value of the configuration cannot be used.
    """
    from hydra.utils import instantiate

    if config.corrupt not in ("error", "skip"):
        raise ValueError(f"`corrupt` expected error or skip, got {config.corrupt!r}")
    output = Path(config.output)
    if output.is_dir():
        raise ValueError(f"`output` expected the name of a file, got the folder {output}")
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    check_trusted(resolved, OF_CONFIGURATIONS, config.trusted, "the configuration")
    quiet_lightning()
    checkpoint = load_checkpoint(config.ckpt_path)
    run_config = trusted_config(checkpoint, config.trusted, config.ckpt_path)
    datamodule = instantiate(run_config["data"])
    check_data(checkpoint, datamodule)
    samples = _Samples(datamodule, Path(config.input), skip=config.corrupt == "skip")
    model = trained_model(checkpoint, run_config, config.ckpt_path)
    trainer = instantiate(
        resolved["trainer"], logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    probabilities = [
        row for batch in trainer.predict(model, dataloaders=samples) for row in batch.tolist()
    ]
    if not probabilities:
        raise samples.none_left()
    classes = class_names(checkpoint, datamodule, len(probabilities[0]))
    output.parent.mkdir(parents=True, exist_ok=True)
    table = to_csv(samples.column, samples.names(), classes, probabilities)
    write_atomically(output, table)
    _, *rows = csv.reader(io.StringIO(table))
    if len(rows) <= _SHOWN:
        for name, label, probability, *_ in rows:
            print(f"{name}: {label}, {float(probability):.3f}")
    print(samples.summary())
    print(output)
    return output


def to_csv(
    column: str,
    names: Iterable[Any],
    classes: Sequence[str],
    probabilities: Iterable[Sequence[float]],
) -> str:
    """The table that `predict` writes.

    Args:
        column: heading of the names, "path" or "row".
        names: of the samples.
        classes: of the outputs.
        probabilities: of each sample, one for each class.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([column, "label", "probability", *(f"probability_{c}" for c in classes)])
    for name, row in zip(names, probabilities, strict=True):
        label = max(range(len(row)), key=row.__getitem__)
        writer.writerow([name, classes[label], *(f"{p:.9g}" for p in (row[label], *row))])
    return buffer.getvalue()


class _Samples:
    """Batches of what `input` names, and which samples these were.

    Args:
        datamodule: of the checkpoint.
        source: the path.
        skip: leave out images that cannot be used, in place of raising.
    """

    def __init__(self, datamodule: Any, source: Path, skip: bool) -> None:
        from bn_lightning.data.prediction_images import find_images, image_batches
        from bn_lightning.data.tabular import TabularDataModule

        self.source, self.skip = source, skip
        self._indices: list[int] = []
        self._failures: list[str] = []
        self._batches: Iterable[Any]
        if isinstance(datamodule, TabularDataModule):
            self.column = "row"
            self._batches = _table_batches(datamodule, source)
        else:
            self.column = "path"
            self._files = find_images(source)
            self._batches = image_batches(datamodule, self._files, self._note)

    def __iter__(self) -> Iterator[Any]:
        for inputs, indices in self._batches:
            self._indices += indices.tolist()
            yield inputs, indices

    def names(self) -> list[Any]:
        """Of the samples that were handed out, in order."""
        if self.column == "row":
            return [index + 1 for index in self._indices]
        # A name need not be UTF-8, and the table is.
        return [
            os.fsencode(Path(self._files.path(index))).decode("utf-8", "backslashreplace")
            for index in self._indices
        ]

    def none_left(self) -> Exception:
        """What is wrong when no sample was handed out."""
        from bn_lightning.data.errors import DataError

        return DataError(
            f"`input` expected images that can be used, got none among the {len(self._failures)}"
            f" in {self.source}, the first of them: {self._failures[0]}"
        )

    def summary(self) -> str:
        """How many samples were handed out and left out."""
        skipped = f", {len(self._failures)} left out" if self._failures else ""
        kind = "rows" if self.column == "row" else "images"
        return f"{len(self._indices):,} {kind}{skipped}"

    def _note(self, failures: list[tuple[str, str]]) -> None:
        from lightning.pytorch.utilities.rank_zero import rank_zero_warn

        from bn_lightning.data.errors import CorruptImageWarning
        from bn_lightning.data.image_file import ImageFileError

        for _, message in failures:
            if not self.skip:
                raise ImageFileError(f"{message}; or set `corrupt=skip`")
            self._failures.append(message)
            rank_zero_warn(f"`corrupt=skip`: {message}", category=CorruptImageWarning)


def _table_batches(datamodule: Any, path: Path) -> list[Any]:
    import torch

    from bn_lightning.data.csv_table import parse_features
    from bn_lightning.data.errors import DataUnavailableError

    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise DataUnavailableError(
            f"`input` expected a CSV file with the columns {', '.join(datamodule.features)}, got"
            f" {path}: {what}; give its path"
        )
    inputs = datamodule.evaluated(parse_features(path.read_bytes(), datamodule.features, path))
    size = datamodule.eval_batch_size
    return list(zip(inputs.split(size), torch.arange(len(inputs)).split(size), strict=True))


main = hydra_command("predict")(predict)

if __name__ == "__main__":
    main()
