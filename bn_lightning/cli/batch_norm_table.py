"""Print what the BatchNorms of a network hold, as tables."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from torch import Tensor

_MOST_CHANNELS = 16  # layers with more channels are shown by quartiles

# Key in the state of a BatchNorm: heading, whether it is trained, initial value.
_COLUMNS = {
    "weight": ("scale", "yes", "1"),
    "bias": ("shift", "yes", "0"),
    "running_mean": ("running mean", "no", "0"),
    "running_var": ("running variance", "no", "1"),
}


def print_batch_norms(state: Mapping[str, "Tensor"], norm: Mapping[str, Any] | None = None) -> None:
    """Print a table for each BatchNorm: what it holds for each channel.

    A channel is a neuron of a dense layer, or a map of a convolution. For a layer with more than 16
    channels, the table shows the smallest and largest value and the quartiles.

    Args:
        state: a `state_dict`. A layer is a BatchNorm if it has `running_mean` and `running_var`. A
            BatchNorm without running statistics looks like other layers and is not shown.
        norm: `eps` and `momentum` of all layers, which no `state_dict` holds; None if unknown.
    """
    console = Console(markup=False, highlight=False)  # a layer may have any name
    suffix = ".running_var"
    names = [key.removesuffix(suffix) for key in state if key.endswith(suffix)]
    names = [name for name in names if f"{name}.running_mean" in state]
    if not names:
        console.print("no BatchNorm with running statistics")
        return
    for name in names:
        layer = {key: state[f"{name}.{key}"] for key in _COLUMNS if f"{name}.{key}" in state}
        batches = state.get(f"{name}.num_batches_tracked")
        # Outside the table, which would break a long name over lines.
        console.print(f"{name}: {_caption(layer, batches, norm or {})}", soft_wrap=True)
        console.print(_batch_norm_table(layer))
    console.print(
        "Scale and shift are trained by gradient. Running mean and variance (unbiased) are not: "
        "training moves them towards each batch's, evaluation normalises with them."
    )


def _caption(
    layer: Mapping[str, "Tensor"], batches: "Tensor | None", norm: Mapping[str, Any]
) -> str:
    channels = layer["running_var"].numel()
    numbers, trained = channels * len(layer), channels * (len(layer) - 2)
    texts = [f"{channels:,} channels", f"{numbers:,} numbers, {trained:,} of them trained"]
    texts += [] if batches is None else [f"{int(batches):,} batches seen"]
    texts += [f"{key} {norm.get(key, 'not in the checkpoint')}" for key in ("eps", "momentum")]
    return ", ".join(texts)


def _batch_norm_table(layer: Mapping[str, "Tensor"]) -> Table:
    table = Table()
    table.add_column("channel")
    for heading, _, _ in _COLUMNS.values():
        table.add_column(heading, justify="right")
    facts = [_COLUMNS[key][1:] if key in layer else ("none", "none") for key in _COLUMNS]
    table.add_row("trained", *[is_trained for is_trained, _ in facts])
    table.add_row("begins at", *[initial for _, initial in facts], end_section=True)
    channels = layer["running_var"].numel()
    if channels <= _MOST_CHANNELS:
        labels = [str(i) for i in range(channels)]
        values = {key: tensor.float() for key, tensor in layer.items()}
    else:
        labels = ["smallest", "25%", "median", "75%", "largest"]
        quarters = layer["running_var"].new_tensor([0, 0.25, 0.5, 0.75, 1]).float()
        values = {key: tensor.float().quantile(quarters) for key, tensor in layer.items()}
    for i, label in enumerate(labels):
        table.add_row(label, *[f"{values[k][i]:.4g}" if k in values else "" for k in _COLUMNS])
    return table
