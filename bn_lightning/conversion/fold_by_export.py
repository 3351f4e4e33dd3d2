"""Finds what can be folded in the graph that torch.export makes of an evaluation.

The graph has every read of a parameter, whatever the Python of the forwards is. A BatchNorm can be
folded into the layer before it, or the layers after it, if

- nothing else reads the values between them, and only moves of values (views, transpositions,
  dropout in evaluation) are there;
- the layer's weight and bias are parameters of one module, and nothing else reads them;
- each call of the BatchNorm and of the layer belongs to such a pair;
- before a convolution: nothing is padded with zeros, which the BatchNorm would have shifted.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from bn_lightning.conversion.fold_arithmetic import (
    TRANSPOSED_CONVS,
    FoldedPair,
    normalize_in_evaluation,
)


@dataclass(frozen=True)
class _LayerCall:
    """A call of a convolution or linear layer.

    Attributes:
        node: its node.
        module: the module whose parameters it reads.
        input: node of the input.
        pads_zeros: whether the input is padded with zeros, or the convolution is transposed.
        spatial: number of dimensions after the channels; None for a linear layer.
    """

    node: fx.Node
    module: nn.Module
    input: fx.Node
    pads_zeros: bool
    spatial: int | None

    def channel_dim(self, value: Tensor) -> int:
        """Return the dimension of the channels of its input or output."""
        return value.dim() - 1 - (self.spatial or 0)


class NotExportable(Exception):
    """torch.export cannot make a graph of the model."""


def find_pairs_in_export(
    model: nn.Module,
    norms: set[nn.Module],
    layers: set[nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[list[FoldedPair], dict[nn.Module, str]]:
    """Find the pairs that can be folded.

    Args:
        model: in evaluation mode; is modified, so give a copy.
        norms: its BatchNorms that may be folded.
        layers: its modules that may get a new weight and bias; others are ignored.
        args: positional arguments of the evaluation.
        kwargs: keyword arguments of the evaluation.

    Returns:
        The pairs, and BatchNorm -> reason for the others.

    Raises:
        NotExportable: the model cannot be exported.
    """
    for norm in norms:
        norm.forward = functools.partial(normalize_in_evaluation, norm)
    for layer in layers:
        # A bias of zeros shows whether the forward would read one.
        if getattr(layer, "bias", layer) is None:
            weight: Any = layer.weight
            layer.bias = nn.Parameter(weight.new_zeros(getattr(layer, "out_channels", len(weight))))
    try:
        with torch.no_grad():  # then a region without gradients has no graph of its own
            program = torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:
        raise NotExportable(str(error)) from error
    graph = _Graph(model, program, norms, layers)
    pairs, skipped = [], {}
    for norm in norms:
        found = graph.pair_before(norm)
        pair = found if isinstance(found, FoldedPair) else graph.pair_after(norm)
        if pair is None:
            skipped[norm] = str(found)
        else:
            pairs.append(pair)
    return pairs, skipped


class _Graph:
    """An exported evaluation, and which modules its nodes call.

    Args:
        model: the exported model.
        program: what torch.export made of it.
        norms: the BatchNorms to find.
        layers: the layers to find.
    """

    def __init__(
        self,
        model: nn.Module,
        program: torch.export.ExportedProgram,
        norms: set[nn.Module],
        layers: set[nn.Module],
    ) -> None:
        owners: dict[int, set[nn.Module]] = defaultdict(set)
        for module in model.modules():
            for own in (*module._parameters.values(), *module._buffers.values()):
                if own is not None:
                    owners[id(own)].add(module)
        self.owners = owners
        self.layers = layers
        signature = program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.readers: dict[int, set[fx.Node]] = defaultdict(set)
        self.tensors: dict[fx.Node, Tensor] = {}
        for node in program.graph.nodes:
            if node.op == "placeholder" and node.name in names:
                tensor: Any = functools.reduce(getattr, names[node.name].split("."), model)
                self.tensors[node] = tensor
                self.readers[id(tensor)] |= set(node.users)
        self.norm_calls: dict[nn.Module, list[fx.Node]] = defaultdict(list)
        self.layer_calls: dict[fx.Node, _LayerCall] = {}
        self.calls_of_layer: dict[nn.Module, list[_LayerCall]] = defaultdict(list)
        for node in program.graph.nodes:
            if node.op != "call_function":
                continue
            if _name(node) == "aten::batch_norm":
                owner = self._owner(_argument(node, "running_mean"))
                if owner in norms:
                    self.norm_calls[owner].append(node)
            elif _name(node) in _LAYER_OPS and (call := self._layer_call(node)) is not None:
                self.layer_calls[node] = call
                self.calls_of_layer[call.module].append(call)

    def pair_before(self, norm: nn.Module) -> FoldedPair | str:
        """Return the layers before each call of a BatchNorm, or why it is not folded into them."""
        calls = self.norm_calls.get(norm, [])
        if not calls:
            return "the example inputs do not reach it"
        if self._has_other_readers(norm):
            return "something else reads its weights or statistics"
        layers: dict[nn.Module, None] = {}
        for call in calls:
            source, moves = _follow_back(_argument(call, "input"))
            layer = self.layer_calls.get(source)
            if layer is None:
                return f"{self._describe(source)} comes before it, no convolution or linear layer"
            if any(len(_readers(node)) > 1 for node in (source, *moves)):
                return "something else reads the output of the layer before it"
            if not _is_channel(layer.channel_dim(source.meta["val"]), source, moves, 1):
                return "its channels are not those of the layer before it"
            layers[layer.module] = None
        for module in layers:
            if any(self._norm_after(call) is not norm for call in self.calls_of_layer[module]):
                return "the layer before it is used elsewhere, too"
            reason = self._reason_not_owned(module)
            if reason is not None:
                return reason
        rows_only = any(
            layer.spatial is None and _argument(call, "input").meta["val"].dim() == 2
            for module in layers
            for layer in self.calls_of_layer[module]
            for call in calls
        )
        return FoldedPair(norm, tuple(layers), layers_first=True, rows_only=rows_only)

    def pair_after(self, norm: nn.Module) -> FoldedPair | None:
        """Return the layers after the call of a BatchNorm, None if it is not folded into them."""
        calls = self.norm_calls.get(norm, [])
        if len(calls) != 1 or self._has_other_readers(norm):
            return None
        layers = []
        for last, moves in _follow(calls[0], []):
            layer = self.layer_calls.get(last)
            source = moves[-1] if moves else calls[0]
            if layer is None or layer.input is not source or layer.pads_zeros:
                return None
            if len(self.calls_of_layer[layer.module]) > 1 or self._reason_not_owned(layer.module):
                return None
            dim = layer.channel_dim(source.meta["val"])
            if not _is_channel(1, calls[0], moves, dim):
                return None
            layers.append(layer.module)
        if not layers:
            return None
        rows_only = _argument(calls[0], "input").meta["val"].dim() == 2
        return FoldedPair(norm, tuple(layers), layers_first=False, rows_only=rows_only)

    def _layer_call(self, node: fx.Node) -> _LayerCall | None:
        weight, bias = _argument(node, "weight"), _argument(node, "bias")
        module = self._owner(weight)
        if module not in self.layers or self.tensors[weight] is not module._parameters.get(
            "weight"
        ):
            return None
        if bias is None or self.tensors.get(bias) is not module._parameters.get("bias"):
            return None
        # fold_pair goes by the class and its groups.
        is_transposed = "transpose" in _name(node)
        groups = _argument(node, "groups") or 1
        if is_transposed != isinstance(module, TRANSPOSED_CONVS):
            return None
        if groups != getattr(module, "groups", 1):
            return None
        spatial = None if _name(node) == "aten::linear" else self.tensors[weight].dim() - 2
        padding = _argument(node, "padding") or 0
        sizes = padding if isinstance(padding, list | tuple) else [padding]
        pads = is_transposed or any(size not in (0, "valid") for size in sizes)
        return _LayerCall(node, module, _argument(node, "input"), pads, spatial)

    def _owner(self, node: Any) -> nn.Module | None:
        """Return the only module that has the tensor of a placeholder."""
        owners = self.owners.get(id(self.tensors.get(node)), set())
        return next(iter(owners)) if len(owners) == 1 else None

    def _norm_after(self, call: _LayerCall) -> nn.Module | None:
        """Return the BatchNorm that alone reads the output of a layer."""
        readers = [reader for reader, _ in _follow(call.node, [])]
        if len(readers) != 1:
            return None
        return next((norm for norm, calls in self.norm_calls.items() if readers[0] in calls), None)

    def _reason_not_owned(self, module: nn.Module) -> str | None:
        own = {call.node for call in self.calls_of_layer[module]}
        tensors = (module._parameters["weight"], module._parameters["bias"])
        if any(self.readers[id(tensor)] - own for tensor in tensors):
            return "something else reads the weights of the layer before it"
        return None

    def _has_other_readers(self, norm: nn.Module) -> bool:
        tensors = (*norm._parameters.values(), *norm._buffers.values())
        return any(
            reader.op != "call_function" or _name(reader) != "aten::batch_norm"
            for tensor in tensors
            for reader in self.readers.get(id(tensor), ())
        )

    def _describe(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return "an input of the model"
        if node.op == "call_function" and _name(node) in _LAYER_OPS:
            return "a layer whose weights are computed, or shared, or used unlike torch's layers,"
        return _name(node).removeprefix("aten::") if node.op == "call_function" else node.name


_LAYER_OPS = {
    *(f"aten::conv{n}d" for n in (1, 2, 3)),
    *(f"aten::conv_transpose{n}d" for n in (1, 2, 3)),
    "aten::linear",
}
# They copy values, and compute none.
_MOVES = {
    *("aten::view", "aten::reshape", "aten::flatten", "aten::unflatten", "aten::_unsafe_view"),
    *("aten::permute", "aten::transpose", "aten::t", "aten::squeeze", "aten::unsqueeze"),
    *("aten::contiguous", "aten::clone", "aten::alias", "aten::detach", "aten::slice"),
    *("aten::dropout", "aten::feature_dropout"),
}
_SHAPED_AS = {"aten::reshape_as", "aten::view_as", "aten::expand_as"}  # read their `other`'s shape


def _name(node: fx.Node) -> str:
    target: Any = node.target
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else str(target)


def _argument(node: fx.Node, name: str) -> Any:
    """Return an argument by the name that the op's schema gives it, None if it is not given."""
    if name in node.kwargs:
        return node.kwargs[name]
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    position = names.index(name) if name in names else len(node.args)
    return node.args[position] if position < len(node.args) else None


def _is_move(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    name = _name(node)
    if name == "aten::pad":  # the other modes copy values
        return _argument(node, "mode") in ("reflect", "replicate", "circular")
    return name in _MOVES and not ("dropout" in name and _argument(node, "train"))


def _readers(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that read the values of a node, not only its shape."""
    return [
        user
        for user in node.users
        if not (_name(user) in _SHAPED_AS and _argument(user, "self") is not node)
    ]


def _follow_back(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """Return the node that computes a value, and the moves after it."""
    moves: list[fx.Node] = []
    while _is_move(node):
        moves.insert(0, node)
        node = node.all_input_nodes[0]
    return node, moves


def _follow(node: fx.Node, moves: list[fx.Node]) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Yield each node that computes with a value, and the moves before it."""
    for reader in _readers(node):
        if _is_move(reader):
            yield from _follow(reader, [*moves, reader])
        else:
            yield reader, moves


def _is_channel(dim: int, start: fx.Node, moves: list[fx.Node], end_dim: int) -> bool:
    """Return whether moves take the index along one dimension of a value to another dimension.

    The moves run on the values 0, 1, ..., C - 1 along `dim`, the same elsewhere.
    """
    value = start.meta["val"]
    channels = value.shape[dim]
    shape = [1] * value.dim()
    shape[dim] = channels
    index = torch.arange(channels, dtype=torch.float64)
    moved, before = index.view(shape).expand(value.shape), start
    for move in moves:
        target: Callable[..., Tensor] = move.target  # type: ignore[assignment]
        moved = target(*[moved if arg is before else arg for arg in move.args], **move.kwargs)
        before = move
    if moved.dim() <= end_dim or moved.shape[end_dim] != channels:
        return False
    shape = [1] * moved.dim()
    shape[end_dim] = channels
    return bool((moved == index.view(shape)).all())
