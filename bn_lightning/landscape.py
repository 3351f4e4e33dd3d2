"""Compute the loss along the gradient: `python -m bn_lightning.landscape ckpt_path=PATH`.

    relative loss(η) = loss(w - η g) / loss(w),    g = ∇loss(w)

Loss and gradient are those of one training batch, in training mode, so BatchNorm normalises with
the statistics of that batch. The step size from which the relative loss exceeds 1 bounds the
learning rates that the network tolerates.

Source: Bjorck et al. 2018, Understanding Batch Normalization, arXiv 1806.02375, section 3.2, figure
of the relative loss against the step size.
"""

import csv
import io
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F

from bn_lightning.cli.checkpoint_path import checkpoint_path
from bn_lightning.cli.command import hydra_command, quiet_lightning
from bn_lightning.modules.preserve_state import preserve_state
from bn_lightning.runs.atomic_write import write_atomically
from bn_lightning.runs.checkpoint import TrainedCheckpoint
from bn_lightning.sweeps.analysis.arms import Style, arm_of_config, style_of, title_of
from bn_lightning.sweeps.report.figure import Axis, Band, Figure, Line, Panel, Rule
from bn_lightning.sweeps.report.matplotlib_renderer import figures_folder, save

_MOST_POINTS = 10_000  # more than a figure shows; each costs a forward pass of each batch
_ABOVE = 1e9  # drawn for a relative loss that is not finite: far above the axes
COLUMNS = ("batch", "step_size", "loss", "relative_loss")


def landscape(config: DictConfig) -> Path:
    """Write `landscape.csv` and `figures/landscape.*` to `paths.output_dir`, and return it.

    Args:
        config: composed from `conf/landscape.yaml`.

    Raises:
        CheckpointError: the file is not a checkpoint of `bn_lightning.train`.
        UntrustedError: its configuration would build something that it may not build.
        ValueError: a number of the configuration cannot be used.
    """
    from bn_lightning.data.protocol import check_data_module
    from bn_lightning.models.protocol import check_model

    steps = step_sizes(config.smallest, config.largest, config.points)
    if type(config.batches) is not int or config.batches < 1:
        raise ValueError(
            f"expected `batches` to be an integer of at least 1, got {config.batches!r}"
        )
    quiet_lightning()
    checkpoint = TrainedCheckpoint.read(checkpoint_path(config), config.trusted)
    model = checkpoint.build_model()
    check_model(model, "network", "loss")
    datamodule = checkpoint.build_data(config.get("data"))
    check_data_module(datamodule)
    datamodule.prepare_data()
    datamodule.setup("fit")
    loader = datamodule.train_dataloader()
    losses_BE = [
        losses_along_gradient(model.network, x, target, steps, model.loss)
        for _, (x, target) in zip(range(config.batches), loader, strict=False)
    ]
    directory = Path(config.paths.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "landscape.csv", landscape_csv(steps, losses_BE))
    relative_BE = [[loss / losses[0] for loss in losses[1:]] for losses in losses_BE]
    arm = arm_of_config(checkpoint.config)
    step = checkpoint.content["global_step"]
    title = f"{title_of(checkpoint.config)}, step {step:,}"
    figure = landscape_figure(steps[1:], relative_BE, arm, title)
    save(figure, figures_folder(directory) / "landscape")
    print(describe(steps[1:], relative_BE))
    print(directory / "figures" / "landscape.png")
    print(directory)
    return directory


def landscape_figure(
    steps: Sequence[float], relative_BE: Sequence[Sequence[float]], arm: str, title: str
) -> Figure:
    """Describe the relative loss against the step size.

    The line is the median over batches. The band reaches from the lowest to the highest. Values
    that are not finite are above the axes.

    Args:
        steps: (E,) step sizes above 0.
        relative_BE: (B, E), the relative loss of each batch.
        arm: the arm whose color is used.
        title: what was measured.
    """
    values_BE = np.nan_to_num(np.asarray(relative_BE, dtype=float), nan=_ABOVE, posinf=_ABOVE)
    low, high = values_BE.min(axis=0), values_BE.max(axis=0)
    style = Style(style_of(arm).color)
    count = len(relative_BE)
    name = f"median of {count} batches" if count > 1 else "one batch"
    band = "lowest to highest batch" if count > 1 else ""
    bounds = float(min(low.min(), 0.5) * 0.9), float(min(max(high.max(), 2), 1e3))
    panel = Panel(
        "landscape",
        title,
        Axis("step size η along the gradient", "log"),
        Axis("loss(w − ηg) / loss(w)", "log", bounds),
        [
            Band(steps, low.tolist(), high.tolist(), style.color, band),
            Line(steps, np.median(values_BE, axis=0).tolist(), name, style),
            Rule(1),
        ],
    )
    return Figure([panel], (5, 3.5), legend="panels")


def describe(steps: Sequence[float], relative_BE: Sequence[Sequence[float]]) -> str:
    """Return where the median relative loss is least, and from where it exceeds 1, as a sentence.

    Args:
        steps: the step sizes, ascending.
        relative_BE: the relative loss of each batch at each step size. NaN counts as infinite.
    """
    medians = [
        statistics.median(math.inf if math.isnan(x) else x for x in at)
        for at in zip(*relative_BE, strict=True)
    ]
    least = min(range(len(steps)), key=medians.__getitem__)
    text = f"relative loss, median of batches: least {medians[least]:.3g} at {steps[least]:.3g}"
    above = [step for step, x in zip(steps[least:], medians[least:], strict=True) if x > 1]
    return text + (f", above 1 from {above[0]:.3g} on" if above else "")


def step_sizes(smallest: float, largest: float, points: int) -> list[float]:
    """Return 0, then `points` sizes from `smallest` to `largest` with equal ratios.

    Raises:
        ValueError: not 0 < smallest < largest, or not 2 <= points <= 10,000.
    """
    if not 0 < smallest < largest < float("inf"):
        raise ValueError(
            "expected `smallest` and `largest` to be 0 < smallest < largest, got"
            f" {smallest}, {largest}"
        )
    if type(points) is not int or not 2 <= points <= _MOST_POINTS:
        raise ValueError(
            f"expected `points` to be an integer from 2 to {_MOST_POINTS:,}, got {points!r}"
        )
    ratio = (largest / smallest) ** (1 / (points - 1))
    return [0.0, *(smallest * ratio**i for i in range(points))]


def losses_along_gradient(
    network: nn.Module,
    x: Float[Tensor, "N ..."],
    target: Tensor,
    steps: Sequence[float],
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> list[float]:
    """Return the loss of one batch at w - η g for each η, in training mode.

    The network does not change. Parameters that require no gradient stay at their values, and each
    step size sees the same random numbers, for dropout for instance.

    Args:
        network: maps inputs (N, ...) to logits (N, K).
        x: the inputs of the batch.
        target: (N,) int64, the classes.
        steps: the step sizes η.
        criterion: maps the network's outputs and `target` to the loss.

    Returns:
        A loss for each step size, in nats for the default criterion; infinite or NaN where the
        network overflows.
    """
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    start = [weight.detach().clone() for weight in weights]
    with preserve_state(network, parameters=True):
        network.train()
        with preserve_state(network):
            loss = criterion(network(x), target)
            gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
        losses = []
        for step in steps:
            # Each step size sees the same buffers and draws the same random numbers.
            with torch.no_grad(), preserve_state(network):
                for weight, at, gradient in zip(weights, start, gradients, strict=True):
                    weight.copy_(at - step * gradient)
                losses.append(criterion(network(x), target).item())
    return losses


def landscape_csv(steps: Sequence[float], losses_BE: Iterable[Sequence[float]]) -> str:
    """Return a CSV table of `COLUMNS`, with a row for each batch and step size."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for batch, losses in enumerate(losses_BE):
        for step, loss in zip(steps, losses, strict=True):
            writer.writerow([batch, f"{step:.9g}", f"{loss:.9g}", f"{loss / losses[0]:.9g}"])
    return buffer.getvalue()


main = hydra_command(landscape, "landscape")

if __name__ == "__main__":
    main()
