"""Label images or rows of a table: `python -m bn_lightning.predict ckpt_path=PATH input=PATH`."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from bn_lightning.cli.checkpoint_path import checkpoint_path
from bn_lightning.cli.command import hydra_command, quiet_lightning
from bn_lightning.cli.trainer_builder import build_trainer, print_profile
from bn_lightning.runs.atomic_write import write_atomically
from bn_lightning.runs.checkpoint import TrainedCheckpoint

_PRINTED = 10  # predictions are printed if there are no more than this


def predict(config: DictConfig) -> Path:
    """Write the table of `predictions_csv` for the samples in `input`, and return its path.

    Samples are normalised and scaled as the test samples of the checkpoint's own data.

    Args:
        config: composed from `conf/predict.yaml`.

    Raises:
        CheckpointError: the file is not a checkpoint of `bn_lightning.train`.
        UntrustedError: its configuration would build something that it may not build.
        DataError: the input cannot be read, or differs from what the network was trained on.
        ValueError: a value of the configuration cannot be used.
    """
    from bn_lightning.data.protocol import check_data_module

    if config.corrupt not in ("error", "skip"):
        raise ValueError(f"expected `corrupt` to be error or skip, got {config.corrupt!r}")
    output = Path(config.output)
    if output.is_dir():
        raise ValueError(f"expected `output` to be the name of a file, got the folder {output}")
    quiet_lightning()
    checkpoint = TrainedCheckpoint.read(checkpoint_path(config), config.trusted)
    datamodule = checkpoint.build_data()
    check_data_module(datamodule, "prediction_inputs")
    samples = _Samples(datamodule, Path(config.input), skip=config.corrupt == "skip")
    model = checkpoint.build_model()
    trainer = build_trainer(
        config.trainer,
        config.paths.output_dir,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    probabilities = [
        row for batch in trainer.predict(model, dataloaders=samples) for row in batch.tolist()
    ]
    if not probabilities:
        raise samples.none_left()
    classes = checkpoint.class_names(datamodule, len(probabilities[0]))
    output.parent.mkdir(parents=True, exist_ok=True)
    table = predictions_csv(samples.inputs.column, samples.names(), classes, probabilities)
    write_atomically(output, table)
    _, *rows = csv.reader(io.StringIO(table))
    if len(rows) <= _PRINTED:
        for name, label, probability, *_ in rows:
            print(f"{name}: {label}, {float(probability):.3f}")
    print_profile(config.paths.output_dir)
    print(samples.summary())
    print(output)
    return output


def predictions_csv(
    column: str,
    names: Iterable[Any],
    classes: Sequence[str],
    probabilities: Iterable[Sequence[float]],
) -> str:
    """Return a CSV table with a row for each sample, in the order of the samples.

    Columns: `column`; `label`, the name of the most probable class; `probability` of the label; and
    `probability_NAME` of each class. Probabilities are in [0, 1].

    Args:
        column: heading of the names, "path" or "row".
        names: of the samples.
        classes: names of the network's outputs.
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
    """Yields the batches of `input` and counts their samples.

    Args:
        datamodule: of the checkpoint, with `prediction_inputs`.
        path: of the file or folder.
        skip: skip images that cannot be used instead of raising.
    """

    def __init__(self, datamodule: Any, path: Path, skip: bool) -> None:
        self.path, self.skip = path, skip
        self.inputs = datamodule.prediction_inputs(path, self._count_failures)
        self._indices: list[int] = []
        self._failures: list[str] = []

    def __iter__(self) -> Iterator[Any]:
        for inputs, indices in self.inputs.batches:
            self._indices += indices.tolist()
            yield inputs, indices

    def names(self) -> list[Any]:
        """Return the names of the samples that were yielded, in order."""
        return [self.inputs.names[index] for index in self._indices]

    def none_left(self) -> Exception:
        """Return the error for an input of which no sample was yielded."""
        from bn_lightning.data.errors import DataError

        first = f", first {self._failures[0]}" if self._failures else ""
        return DataError(
            f"expected `input` to have usable {self.inputs.kind}, got {len(self._failures)}"
            f" unusable ones in {self.path}{first}"
        )

    def summary(self) -> str:
        """Return how many samples were yielded and skipped."""
        skipped = f", {len(self._failures)} skipped" if self._failures else ""
        return f"{len(self._indices):,} {self.inputs.kind}{skipped}"

    def _count_failures(self, failures: Sequence[Any]) -> None:
        from lightning.pytorch.utilities.rank_zero import rank_zero_warn

        from bn_lightning.data.errors import CorruptImageWarning
        from bn_lightning.data.image_file import ImageFileError

        for _, message in failures:
            if not self.skip:
                raise ImageFileError(f"{message}; or set `corrupt=skip`")
            self._failures.append(message)
            rank_zero_warn(f"`corrupt=skip`: {message}", category=CorruptImageWarning)


main = hydra_command(predict, "predict")

if __name__ == "__main__":
    main()
