"""Tables of numbers with two classes, from a CSV file or generated."""

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from bn_lightning.data.batches import check_integer
from bn_lightning.data.csv_table import parse_csv, parse_features
from bn_lightning.data.errors import DataError, DataUnavailableError
from bn_lightning.data.protocol import OnFailures, PredictionInputs
from bn_lightning.data.tensor_data_module import Arrays, TensorDataModule, split_samples

LAWS = ("linear", "nonlinear")
_PLACEMENT = ("not placed", "placed")  # the classes of the generated table

_LAW_SEED = 0  # the same table in all runs


class TabularDataModule(TensorDataModule):
    """A table as (N, F) float32 and targets (N,) int64 in {0, 1}.

    With `path`, the rows of a CSV file: UTF-8, with a header line, separated by commas. Class 1 is
    the larger of the target's two values, compared as numbers if both are numbers, else as text;
    `info["positive"]` is that value. Without `path`, a generated table of two features:

        cgpa ~ N(7, 1.5²), clipped to [0, 10]         u = (cgpa - 7) / 1.5
        iq ~ N(100, 15²)                              v = (iq - 100) / 15
        linear      P(placed) = sigmoid((u + v) / (√2 noise))
        nonlinear   P(placed) = sigmoid((1 + v - u²) / noise)

    The nonlinear law rejects both ends of the grades, which no weighted sum of u and v can express.

    The test set is `test_fraction` of the rows, and validation `validation_fraction` of the others;
    both splits are the same in all runs. Features are not scaled by default, so that BatchNorm has
    to cope with an iq around 100. `standardize` scales each feature to mean 0 and standard
    deviation 1 (biased), measured on the rows outside the test set.

    Args:
        path: the CSV file; None generates a table.
        features: columns of the file, in order; cgpa and iq for a generated table.
        target: column of the file with the two classes.
        law: "linear" or "nonlinear", for a generated table.
        samples: rows of a generated table, at least 10.
        noise: of a generated table, greater than 0: the score at which the odds of a placement are
            e to 1.
        standardize: scale the features.
        test_fraction: share of the rows used for the test, in (0, 1); rounded to a whole number of
            rows.
        validation_fraction: share of the rows outside the test set used for validation, in (0, 1).

    The other arguments are those of `TensorDataModule`.

    Source: a tutorial's classifier of students' placement by (cgpa, iq); the laws are ours.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        *,
        features: Sequence[str],
        target: str,
        law: str,
        samples: int,
        noise: float,
        standardize: bool,
        test_fraction: float,
        batch_size: int,
        eval_batch_size: int,
        validation_fraction: float,
        seed: int,
        test_curve: bool = False,
    ) -> None:
        super().__init__(
            batch_size, eval_batch_size, validation_fraction, seed, test_curve=test_curve
        )
        check_integer("samples", samples, 10)
        if law not in LAWS:
            raise ValueError(f"expected `law` to be one of {', '.join(LAWS)}, got {law!r}")
        if not 0 < noise < math.inf:
            raise ValueError(f"expected `noise` to be a finite number greater than 0, got {noise}")
        if not 0 < test_fraction < 1:
            raise ValueError(f"expected `test_fraction` to be in (0, 1), got {test_fraction}")
        columns = [*features, target]
        if len(columns) < 2 or len(set(columns)) < len(columns):
            raise ValueError(
                "expected `features` and `target` to be at least two different columns, got"
                f" {', '.join(map(str, columns))}"
            )
        self.path = None if path is None else Path(path).expanduser().absolute()
        self.features, self.target = list(features), target
        self.law, self.samples, self.noise = law, samples, noise
        self.standardize, self.test_fraction = standardize, test_fraction
        self.input_shape = (len(self.features),)
        self._state: dict[str, Any] = {}

    @override
    def setup(self, stage: str) -> None:
        if self.is_loaded:
            return
        super().setup(stage)
        self._info["positive"] = self._state["classes"][1]
        for split, (_, targets) in self._splits.items():
            if len(targets.unique()) < 2:
                self._info = {}
                raise DataError(
                    f"{self.path or self.law}: expected rows of both classes in each split, got one"
                    f" class in all {len(targets)} rows of {split}; give more rows, or another"
                    " `test_fraction` or `validation_fraction`"
                )

    @override
    def load(self) -> Arrays:
        if self.path is None:
            inputs, targets = generate(self.law, self.samples, self.noise)
            classes = _PLACEMENT
            source, root = f"placement ({self.law} law)", "generated"
            sha256 = {"table": hashlib.sha256(inputs.tobytes() + targets.tobytes()).hexdigest()}
        else:
            payload = _read(self.path, "data.path")
            inputs, targets, classes = parse_csv(payload, self.features, self.target, self.path)
            source, root = self.path.name, str(self.path.parent)
            sha256 = {self.path.name: hashlib.sha256(payload).hexdigest()}
        train, test = split_samples(len(inputs), self.test_fraction, "test_fraction")
        self._state = {
            "classes": list(classes),
            "mean": inputs[train].mean(axis=0).tolist(),
            "deviation": inputs[train].std(axis=0).tolist(),
        }
        if self.standardize:
            inputs = self._standardized(inputs)
        return Arrays(
            train_inputs=inputs[train],
            train_targets=targets[train],
            test_inputs=inputs[test],
            test_targets=targets[test],
            classes=2,
            source=source,
            root=root,
            sha256=sha256,
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint stores: names of the classes, `mean` and `deviation`.

        These are statistics of each feature over the rows outside the test set; the standard
        deviation is biased.
        """
        return dict(self._state)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Use the statistics of a checkpoint, unless `setup` has read a table.

        Args:
            state_dict: from `state_dict`.
        """
        if not self.is_loaded:
            self._state = state_dict

    @override
    def evaluated(self, inputs: Float[np.ndarray, "N F"]) -> Float[Tensor, "N F"]:
        return super().evaluated(self._standardized(inputs) if self.standardize else inputs)

    @override
    def prediction_inputs(self, path: Path, on_failures: OnFailures) -> PredictionInputs:
        """Load the rows of a CSV file with the columns `features`; `on_failures` is not called.

        Raises:
            DataError: the file is absent or is not such a table.
        """
        inputs = self.evaluated(parse_features(_read(path, "input"), self.features, path))
        indices = torch.arange(len(inputs))
        size = self.eval_batch_size
        batches = list(zip(inputs.split(size), indices.split(size), strict=True))
        return PredictionInputs("row", "rows", range(1, len(inputs) + 1), batches)

    def sample_inputs(self, samples: int) -> Float[Tensor, "N F"]:
        """Return random normal rows with the mean and deviation of each feature.

        Raises:
            DataError: neither a table nor the state of a checkpoint has been read.
        """
        mean, deviation = self._statistics()
        noise = np.random.default_rng(0).standard_normal((samples, len(self.features)))
        return self.evaluated(mean + deviation * noise)

    def _standardized(self, inputs: Float[np.ndarray, "N F"]) -> Float[np.ndarray, "N F"]:
        mean, deviation = self._statistics()
        # A constant feature is not scaled.
        return (inputs - mean) / np.where(deviation, deviation, 1)

    def _statistics(self) -> tuple[Float[np.ndarray, "F"], Float[np.ndarray, "F"]]:
        if not self._state:
            raise DataError(
                "expected means and deviations of the features, got neither a table nor a"
                " checkpoint that has them; train again"
            )
        return np.array(self._state["mean"]), np.array(self._state["deviation"])


def generate(
    law: str, samples: int, noise: float
) -> tuple[Float[np.ndarray, "N 2"], Int[np.ndarray, "N"]]:
    """Generate the table described in `TabularDataModule`, the same in each call.

    Returns:
        Columns cgpa and iq, and for each row 1 if placed, else 0.
    """
    random = np.random.default_rng(_LAW_SEED)
    cgpa = random.normal(7, 1.5, samples).clip(0, 10)
    iq = random.normal(100, 15, samples)
    u, v = (cgpa - 7) / 1.5, (iq - 100) / 15
    score = (u + v) / math.sqrt(2) if law == "linear" else 1 + v - u**2
    # sigmoid(x) = (1 + tanh(x / 2)) / 2, which never overflows.
    placed = random.random(samples) < (1 + np.tanh(score / noise / 2)) / 2
    return np.stack([cgpa, iq], axis=1), placed.astype(np.int64)


def _read(path: Path, key: str) -> bytes:
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise DataUnavailableError(
            f"expected `{key}` to be a CSV file, got {path}: {what}; correct the path"
        )
    return path.read_bytes()
