"""BatchNorms of a trained model folded into the convolutions and linear layers before them.

    bn(W x + b) = W' x + b',  W' = s W,  b' = s (b - running_mean) + bn.bias,
    s = bn.weight / sqrt(running_var + eps)

in evaluation, by torch's own torch.nn.utils.fusion. The layers and their weights change, so a fold
must hold for the whole model: both layers are called once, by a forward that is known, one right
after the other. What every other forward around them does has to be known as well.
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

_NORMS = {
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(BatchNorm1d, BatchNorm2d, BatchNorm3d),
    *(SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d),
}
_TRANSPOSED = {nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d}
_LAYERS = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d} | _TRANSPOSED


@dataclass(frozen=True)
class Folding:
    """What `fold_batchnorm` does to a model; modules by their names in it.

    Attributes:
        folded: for each BatchNorm that is folded, the layer that takes it in.
        skipped: for each that is left alone, why.
    """

    folded: dict[str, str]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.folded)} BatchNorms folded, {len(self.skipped)} left alone"]
        return "\n".join(
            lines + [f"  {name or 'root'}: {why}" for name, why in self.skipped.items()]
        )


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """Makes a copy of a model for inference, with BatchNorms folded into the layers before them.

    In the copy the layer has new weights and a bias, and the BatchNorm is a module that computes
    nothing, or only the activation in which it ended. What is folded is logged at level INFO;
    `find_foldable` tells beforehand.

    Args:
        model: stays as it is; converted and fused ones are taken as what they were before.

    Returns:
        A copy of the model in evaluation mode, with torch's BatchNorms where some are left. It must
        not be trained: without its BatchNorms it is another model.

    Raises:
        TypeError: `model` is not a module.

    Warns:
        UserWarning: nothing could be folded.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected `model` to be a torch.nn.Module, got {type(model).__name__}")
    folded = copy.deepcopy(model)
    revert_batchnorm(folded)
    folded.eval()
    plan = find_foldable(folded)
    logger.info("%s", plan)
    if not plan.folded:
        warnings.warn(f"expected BatchNorms that can be folded, found none: {plan}", stacklevel=2)
    new: dict[nn.Module, nn.Module] = {}
    for norm_name, layer_name in plan.folded.items():
        norm, layer = folded.get_submodule(norm_name), folded.get_submodule(layer_name)
        new[layer], new[norm] = _fold(layer, norm)
    # By all their names, where they have several.
    for name, module in list(folded.named_modules(remove_duplicate=False)):
        if module in new:
            folded.set_submodule(name, new[module])
    return folded.eval()  # the new modules too


def find_foldable(model: nn.Module) -> Folding:
    """Finds the BatchNorms of a model that can be folded, and says why others cannot.

    Args:
        model: stays as it is.

    Returns:
        What `fold_batchnorm` does to it.
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
            for module, before in _calls(caller):
                calls[module] += 1
                if before is not None:
                    layers[module] = before
        except NotTraceable as why:
            # Whether it calls what is inside one by one is not known.
            where = forward_of(caller, name)
            unknown |= dict.fromkeys(inner, f"{where}, around it, is not known: {why}")
    folded: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for norm in norms:
        layer = layers.get(norm)
        reason = unknown.get(norm) or _why_not(norm, layer, calls)
        if layer is not None:
            reason = reason or unknown.get(layer)
        if layer is None or reason is not None:
            skipped[names[norm]] = reason or "nothing comes before it"
        else:
            folded[names[norm]] = names[layer]
    return Folding(folded, skipped)


class RowsOnly(nn.Module):
    """Stands for a BatchNorm1d folded into a Linear, which holds for rows (N, C) alone.

    In (N, L, C) a Linear makes features of the last dimension, and BatchNorm1d takes the second.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Returns `input`.

        Raises:
            ValueError: it is not (N, C).
        """
        if input.dim() != 2:
            raise ValueError(
                f"expected rows (N, C) where a BatchNorm1d was folded into a Linear, got shape "
                f"{tuple(input.shape)}; use the model as it was before fold_batchnorm"
            )
        return input


class Activation(nn.Module):
    """Computes the activation in which a folded BatchNorm ended.

    Args:
        name: as in `bn_lightning.kernels.batch_norm`.
        negative_slope: of "leaky_relu".
    """

    def __init__(self, name: str, negative_slope: float) -> None:
        super().__init__()
        self.name = name
        self.negative_slope = negative_slope

    def forward(self, input: Tensor) -> Tensor:
        """Returns the activation of `input`."""
        return activate(input, self.name, self.negative_slope)

    def extra_repr(self) -> str:
        """Returns the name."""
        return self.name


def _calls(caller: nn.Module) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """Yields what a forward calls, with the module whose output it alone reads, if there is one.

    What a forward reads from a module otherwise counts as another call.
    """
    if has_own_forward(caller) and not is_fused(caller):
        raise NotTraceable("the instance has a forward of its own")
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
    return type(module) in _LAYERS or isinstance(module, _BatchNorm)


def _why_not(norm: _BatchNorm, layer: Any, calls: Counter[nn.Module]) -> str | None:
    """Says why a BatchNorm cannot be folded into what comes before it."""
    if type(layer) not in _LAYERS and not parametrize.is_parametrized(layer):
        return "no convolution or linear layer comes right before it, for it alone"
    if parametrize.is_parametrized(norm) or parametrize.is_parametrized(layer):
        return "it, or the layer before it, is parametrised"
    if type(norm) not in _NORMS:
        return f"{type(norm).__module__}.{type(norm).__qualname__} is not torch's"
    if calls[norm] > 1 or calls[layer] > 1:
        return "it, or the layer before it, is used more than once"
    if is_hooked(norm) or is_hooked(layer):
        return "it, or the layer before it, has hooks"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    if type(layer) in _TRANSPOSED and layer.groups > 1:
        return "torch cannot fold into a transposed convolution with groups"
    outputs = layer.out_features if type(layer) is nn.Linear else layer.out_channels
    if outputs != norm.num_features:
        return f"the layer before it has {outputs} outputs, it takes {norm.num_features}"
    if type(layer) is nn.Linear and not isinstance(norm, nn.BatchNorm1d):
        return "the channels it takes are not the features of the linear layer before it"
    return None


def _fold(layer: Any, norm: Any) -> tuple[nn.Module, nn.Module]:
    """Makes the layer with both, and what stands for the BatchNorm."""
    after: nn.Module = nn.Identity()
    if getattr(norm, "activation", "identity") != "identity":
        after = Activation(norm.activation, norm.negative_slope)
    if type(layer) is not nn.Linear:
        return fuse_conv_bn_eval(layer, norm, transpose=type(layer) in _TRANSPOSED), after
    # torch's fuse_linear_bn_eval needs weight and bias in the BatchNorm.
    ones = torch.ones_like(norm.running_mean)
    weight = ones if norm.weight is None else norm.weight
    bias = torch.zeros_like(ones) if norm.bias is None else norm.bias
    folded = copy.deepcopy(layer)
    folded.weight, folded.bias = fuse_linear_bn_weights(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, weight, bias
    )
    return folded, nn.Sequential(RowsOnly(), after)
