"""What the BatchNorms of a network keep, as tables."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from torch import Tensor

_MOST_CHANNELS = 16  # of a layer with more, percentiles are printed

# Of a BatchNorm: key in its state -> what it is called, whether it is trained, where it begins.
_KEPT = {
    "weight": ("scale", "yes", "1"),
    "bias": ("shift", "yes", "0"),
    "running_mean": ("running mean", "no", "0"),
    "running_var": ("running variance", "no", "1"),
}


def print_batch_norms(state: Mapping[str, "Tensor"], norm: Mapping[str, Any] | None = None) -> None:
    """Print the four numbers that each BatchNorm keeps for a channel, a table for each layer.

    Channels are the neurons of a dense layer, the maps of a convolution. Of a layer with more than
    16 the smallest, the largest and the quartiles of each number stand for them.

    Args:
        state: a network's `state_dict`. A layer is a BatchNorm if it has `running_mean` and
            `running_var`; one that keeps no running statistics cannot be told from other layers.
        norm: with `eps` and `momentum` of all layers, which no `state_dict` holds; None if not
            known.
    """
    console = Console(markup=False, highlight=False)  # names of layers are a stranger's
    suffix = ".running_var"
    names = [key.removesuffix(suffix) for key in state if key.endswith(suffix)]
    names = [name for name in names if f"{name}.running_mean" in state]
    if not names:
        console.print("no BatchNorm with running statistics")
        return
    for name in names:
        layer = {key: state[f"{name}.{key}"] for key in _KEPT if f"{name}.{key}" in state}
        # Outside the table, which would break a long name over lines.
        console.print(f"{name}: {_caption(layer, state, name, norm)}", soft_wrap=True)
        console.print(_batch_norm_table(layer))
    console.print(
        "Scale and shift are trained by gradient. Running mean and variance (unbiased) are not: "
        "training moves them towards each batch's, evaluation normalises with them."
    )


def _caption(
    layer: Mapping[str, "Tensor"],
    state: Mapping[str, "Tensor"],
    name: str,
    norm: Mapping[str, Any] | None,
) -> str:
    channels = layer["running_var"].numel()
    numbers, trained = channels * len(layer), channels * (len(layer) - 2)
    texts = [f"{channels:,} channels", f"{numbers:,} numbers, {trained:,} of them trained"]
    batches = state.get(f"{name}.num_batches_tracked")
    texts += [] if batches is None else [f"{int(batches):,} batches seen"]
    for key in ("eps", "momentum"):
        value = norm[key] if norm and key in norm else "not in the checkpoint"
        texts.append(f"{key} {value}")
    return ", ".join(texts)


def _batch_norm_table(layer: Mapping[str, "Tensor"]) -> Table:
    table = Table()
    table.add_column("channel")
    for heading, _, _ in _KEPT.values():
        table.add_column(heading, justify="right")
    facts = [_KEPT[key][1:] if key in layer else ("none", "none") for key in _KEPT]
    table.add_row("trained", *[trained for trained, _ in facts])
    table.add_row("begins at", *[first for _, first in facts], end_section=True)
    channels = layer["running_var"].numel()
    if channels <= _MOST_CHANNELS:
        rows = [str(i) for i in range(channels)]
        columns = {key: values.float() for key, values in layer.items()}
    else:
        rows = ["smallest", "25%", "median", "75%", "largest"]
        quarters = layer["running_var"].new_tensor([0, 0.25, 0.5, 0.75, 1]).float()
        columns = {key: values.float().quantile(quarters) for key, values in layer.items()}
    for i, row in enumerate(rows):
        table.add_row(row, *[f"{columns[k][i]:.4g}" if k in columns else "" for k in _KEPT])
    return table
