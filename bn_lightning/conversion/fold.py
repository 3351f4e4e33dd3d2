"""Folds the BatchNorms of a trained model into the convolutions and linear layers before them.

    bn(W x + b) = W' x + b',  W' = s W,  b' = s (b - running_mean) + bn.bias,
    s = bn.weight / sqrt(running_var + eps)

This holds in evaluation and uses torch.nn.utils.fusion. Folding changes the layer and its weights,
so it must be valid wherever the model uses them: one traceable forward calls both layers, once
each, with the BatchNorm directly after the layer, and all other forwards around them are traceable.
"""

import copy
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_weights

from bn_lightning.conversion.convert import revert_batchnorm
from bn_lightning.conversion.fusion import is_fused
from bn_lightning.conversion.fusion.fused_call import is_hooked
from bn_lightning.conversion.tracing import NotTraceable, forward_of, has_own_forward, trace_forward
from bn_lightning.kernels.activations import activate
from bn_lightning.modules.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from bn_lightning.modules.sync_batch_norm import (
    SyncBatchNorm,
    SyncBatchNorm1d,
    SyncBatchNorm2d,
    SyncBatchNorm3d,
)

logger = logging.getLogger(__name__)

_FOLDABLE_NORMS = {
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(BatchNorm1d, BatchNorm2d, BatchNorm3d),
    *(SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d),
}
_TRANSPOSED_CONVS = {nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d}
_FOLDABLE_LAYERS = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d} | _TRANSPOSED_CONVS


@dataclass(frozen=True)
class Folding:
    """What `fold_batchnorm` does to a model; names are those of modules in the model.

    Attributes:
        folded: name of each folded BatchNorm -> name of the layer it is folded into.
        skipped: name of each other BatchNorm -> reason.
    """

    folded: dict[str, str]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.folded)} BatchNorms folded, {len(self.skipped)} skipped"]
        lines += [f"  {name or 'root'}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """Return a copy of a model for inference, with BatchNorms folded into the layers before them.

    In the copy the layer has new weights and a bias. The BatchNorm is replaced by a module that
    computes nothing, or only the BatchNorm's activation. What is folded is logged at level INFO;
    `find_foldable` returns it without folding.

    Args:
        model: not modified. Converted and fused BatchNorms are reverted in the copy.

    Returns:
        A copy of the model in evaluation mode. BatchNorms that are not folded are torch's. Do not
        train the copy, because its folded BatchNorms no longer normalize.

    Raises:
        TypeError: If `model` is not a module.

    Warns:
        UserWarning: If nothing can be folded.
    """
    folded = copy.deepcopy(model)
    revert_batchnorm(folded)
    folded.eval()
    plan = find_foldable(folded)
    logger.info("%s", plan)
    if not plan.folded:
        warnings.warn(
            f"expected `model` to have BatchNorms to fold, got none: {plan}", stacklevel=2
        )
    new: dict[nn.Module, nn.Module] = {}
    for norm_name, layer_name in plan.folded.items():
        norm, layer = folded.get_submodule(norm_name), folded.get_submodule(layer_name)
        new[layer], new[norm] = _fold(layer, norm)
    # A module may have several names.
    for name, module in list(folded.named_modules(remove_duplicate=False)):
        if module in new:
            folded.set_submodule(name, new[module])
    return folded.eval()  # the new modules too


def find_foldable(model: nn.Module) -> Folding:
    """Find the BatchNorms of a model that can be folded, and the reasons why others cannot.

    Args:
        model: not modified.

    Returns:
        What `fold_batchnorm` would do.
    """
    names = {module: name for name, module in model.named_modules()}
    norms: list[_BatchNorm] = [module for module in names if isinstance(module, _BatchNorm)]
    calls: Counter[nn.Module] = Counter()
    layers: dict[nn.Module, nn.Module] = {}
    unknown: dict[nn.Module, str] = {}
    for caller, name in names.items():
        inner = [m for m in caller.modules() if m is not caller and _is_layer_or_norm(m)]
        if not inner or type(caller).forward is nn.Module.forward:
            continue
        try:
            for module, layer in _calls(caller):
                calls[module] += 1
                if layer is not None:
                    layers[module] = layer
        except NotTraceable as error:
            where = forward_of(caller, name)
            unknown |= dict.fromkeys(inner, f"{where}, around it, cannot be traced: {error}")
    folded: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for norm in norms:
        previous = layers.get(norm)
        reason = unknown.get(norm) or _reason_not_folded(norm, previous, calls)
        if previous is not None:
            reason = reason or unknown.get(previous)
        if previous is None or reason is not None:
            skipped[names[norm]] = reason or "nothing comes before it"
        else:
            folded[names[norm]] = names[previous]
    return Folding(folded, skipped)


class RowsOnly(nn.Module):
    """Checks the input of a BatchNorm1d that is folded into a Linear, which must be (N, C).

    For an input (N, C, L) they cannot be folded: Linear computes features in the last dimension,
    BatchNorm1d normalizes the second.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return `input`, or raise a ValueError if its shape is not (N, C)."""
        if input.dim() != 2:
            raise ValueError(
                "expected `input` to have the shape (N, C) where a BatchNorm1d is folded into a"
                f" Linear, got {tuple(input.shape)}; use the model before fold_batchnorm"
            )
        return input


class Activation(nn.Module):
    """Computes the activation of a folded BatchNorm.

    Args:
        name: activation of `bn_lightning.kernels.batch_norm`.
        negative_slope: slope of "leaky_relu".
    """

    def __init__(self, name: str, negative_slope: float) -> None:
        super().__init__()
        self.name = name
        self.negative_slope = negative_slope

    def forward(self, input: Tensor) -> Tensor:
        """Return the activation of `input`."""
        return activate(input, self.name, self.negative_slope)

    def extra_repr(self) -> str:
        """Return the name."""
        return self.name


def _calls(caller: nn.Module) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """Yield each module that a forward calls and the module whose output only this call reads.

    The second is None if there is no such module. Reading an attribute of a module counts as a
    call of it.
    """
    if has_own_forward(caller) and not is_fused(caller):
        raise NotTraceable("the instance has its own forward")
    if type(caller).forward is nn.Sequential.forward:
        modules = list(caller)  # type: ignore[call-overload]  # an nn.Sequential
        yield from zip(modules, [None, *modules[:-1]], strict=True)
        return
    (trace,) = trace_forward(caller, modes=(False,))
    for guard in trace.guards:
        yield guard.owner, None
    for node in trace.graph.nodes:
        if node.op == "get_attr":
            yield caller.get_submodule(node.target.rpartition(".")[0]), None
        elif node.op == "call_module":
            before = node.args[0] if len(node.args) == 1 and not node.kwargs else None
            layer = None
            if isinstance(before, fx.Node) and before.op == "call_module":
                layer = caller.get_submodule(str(before.target)) if len(before.users) == 1 else None
            yield caller.get_submodule(node.target), layer


def _is_layer_or_norm(module: nn.Module) -> bool:
    return type(module) in _FOLDABLE_LAYERS or isinstance(module, _BatchNorm)


def _reason_not_folded(norm: _BatchNorm, layer: Any, calls: Counter[nn.Module]) -> str | None:
    if type(layer) not in _FOLDABLE_LAYERS and not parametrize.is_parametrized(layer):
        return "no convolution or linear layer is directly before it and used by it only"
    if parametrize.is_parametrized(norm) or parametrize.is_parametrized(layer):
        return "it, or the layer before it, is parametrized"
    if type(norm) not in _FOLDABLE_NORMS:
        return f"{type(norm).__module__}.{type(norm).__qualname__} is not torch's"
    if calls[norm] > 1 or calls[layer] > 1:
        return "it, or the layer before it, is used more than once"
    if is_hooked(norm) or is_hooked(layer):
        return "it, or the layer before it, has hooks"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    if type(layer) in _TRANSPOSED_CONVS and layer.groups > 1:
        return "torch cannot fold into a transposed convolution with groups"
    outputs = layer.out_features if type(layer) is nn.Linear else layer.out_channels
    if outputs != norm.num_features:
        return f"the layer before it has {outputs} outputs, but it has {norm.num_features} channels"
    if type(layer) is nn.Linear and not isinstance(norm, nn.BatchNorm1d):
        return "its channels are not the features of the linear layer before it"
    return None


def _fold(layer: Any, norm: Any) -> tuple[nn.Module, nn.Module]:
    """Return the folded layer and the module that replaces the BatchNorm."""
    after: nn.Module = nn.Identity()
    if getattr(norm, "activation", "identity") != "identity":
        after = Activation(norm.activation, norm.negative_slope)
    if type(layer) is not nn.Linear:
        return fuse_conv_bn_eval(layer, norm, transpose=type(layer) in _TRANSPOSED_CONVS), after
    # Not fuse_linear_bn_eval, which needs a BatchNorm with weight and bias.
    ones = torch.ones_like(norm.running_mean)
    weight = ones if norm.weight is None else norm.weight
    bias = torch.zeros_like(ones) if norm.bias is None else norm.bias
    folded = copy.deepcopy(layer)
    folded.weight, folded.bias = fuse_linear_bn_weights(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, weight, bias
    )
    return folded, nn.Sequential(RowsOnly(), after)
