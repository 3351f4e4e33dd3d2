"""The contract between a LightningModule and the commands.

`train` takes any `LightningModule` with the methods that Lightning calls in `fit` and `test`:
`training_step`, `configure_optimizers`, `test_step`. Batches are `(inputs, targets)`. These members
are optional:

- `network`: maps inputs to outputs. An `init` that was chosen initializes it. `export`, `landscape`
  and `experiments.Run.network` require it.
- `loss(outputs, targets)`: `landscape` requires it.
- `chance_metrics()`: the metrics of guessing, name -> number. A run that diverged gets them instead
  of what it logged.
- `predict_step`: `predict` writes what it returns: (N, K), the probabilities of the classes.

Callbacks and sweeps look at metrics by name. `validation_step` logs `val/accuracy`, or another name
that `callbacks.checkpoints.monitor`, `callbacks.optuna_pruning.monitor` and `hydra.sweeper.metric`
are set to; `test_step` logs `test/accuracy`, which reports compare.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn


class ModelError(TypeError):
    """A model that does not have what a command needs."""


@runtime_checkable
class NetworkModel(Protocol):
    """A LightningModule around one network."""

    network: nn.Module
    """Maps inputs (N, ...) to outputs (N, K)."""


@runtime_checkable
class LossModel(NetworkModel, Protocol):
    """A LightningModule whose loss depends on outputs and targets only."""

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the mean loss of a batch, a tensor of no dimensions."""


@runtime_checkable
class ChanceModel(Protocol):
    """A LightningModule that knows the metrics of guessing."""

    def chance_metrics(self) -> Mapping[str, float]:
        """Return metric -> its value for guesses."""


def check_model(model: object, *members: str) -> None:
    """Raise an error if `model` is no LightningModule or lacks what a command needs.

    Args:
        model: what the configuration's `model` builds.
        members: names of the members that the command needs.

    Raises:
        ModelError: names the class of `model` and the missing members.
    """
    kind = type(model).__qualname__
    if not isinstance(model, LightningModule):
        raise ModelError(
            f"expected `model` to be a LightningModule, got `{kind}`; derive `{kind}` from it"
        )
    missing = [
        name
        for name in members
        if not (
            is_overridden(name, model) if hasattr(LightningModule, name) else hasattr(model, name)
        )
    ]
    if missing:
        raise ModelError(
            f"expected `model` to have `{'`, `'.join(missing)}`, got `{kind}` without; add it as"
            " docs/your_own.md describes"
        )


def network_of(model: object) -> nn.Module:
    """Return the `network` of a model.

    Raises:
        ModelError: it has none.
    """
    check_model(model, "network")
    return model.network  # type: ignore[attr-defined]  # checked
