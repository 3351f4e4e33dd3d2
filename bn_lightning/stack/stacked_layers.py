"""Layers that compute all members of a stack at once, in the places of torch's layers.

Each class replaces the class of a module, whose parameters and buffers have a leading dimension K.
Suffixes of tensors: K members, N samples, I inputs, O outputs, C channels.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.models.mlp import MLP
from bn_lightning.modules.batch_norm import _BackendMixin
from bn_lightning.stack.context import InVmap, Placed, StackContext, folded, leading
from bn_lightning.stack.same_architecture import NotStackableError
from bn_lightning.stack.shared_linear import shared_linear


class StackedLayer(nn.Module):
    """Base of the layers of a stack; `stacked_class` combines each with the class it replaces."""

    context: StackContext

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer inside `torch.func.vmap`."""
        return InVmap.apply(self.context.index, x, self)

    def computed(self, x: Placed) -> Placed:
        """Compute the layer for all members, and note its input where it is watched."""
        self.context.note(self, x)
        return self.compute(x)

    def compute(self, x: Placed) -> Placed:
        """Compute the layer for all members."""
        raise NotImplementedError

    def take(self, members: list[int]) -> None:
        """Keep what is neither parameter nor buffer for the given members only."""

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if isinstance(value, Tensor) and self.context.is_mapped:
            kind = type(self).__name__.removeprefix("Stacked")
            raise NotStackableError(f"the network reads the `{name}` of a {kind} by itself")
        return value


class StackedLinear(StackedLayer, nn.Linear):
    """K linear layers: one GEMM where the members share the input, else a batched one.

    `weight` is (K, O, I), `bias` (K, O) or None.
    """

    def compute(self, x: Placed) -> Placed:
        self.context.calls[id(self)] += 1
        own = self._parameters
        value, weight, bias = _cast_by_autocast(x.value, own["weight"], own["bias"])
        if x.dim is None:
            shape = value.shape[:-1]
            y = _Linear.apply(value.flatten(0, -2), weight, bias, self)  # (N, K * O)
            return Placed(y.unflatten(1, weight.shape[:2]).unflatten(0, shape), len(shape))
        x_K = value.movedim(x.dim, 0)
        shape = x_K.shape[1:-1]
        y = _Linear.apply(x_K.flatten(1, -2), weight, bias, self)  # (K, N, O)
        return Placed(y.unflatten(1, shape), 0)


def _cast_by_autocast(*tensors: Tensor | None) -> list[Any]:
    """Return tensors in the dtype in which autocast multiplies matrices, if it is on."""
    first = next(tensor for tensor in tensors if tensor is not None)
    device = first.device.type
    if first.dtype is torch.float64 or not torch.is_autocast_enabled(device):
        return [*tensors]
    dtype = torch.get_autocast_dtype(device)
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


class _Linear(torch.autograd.Function):
    """y = x W^T + b for K members; the backward may apply the optimizer's step at once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_KOI: Tensor, bias_KO: Tensor | None, layer: StackedLinear
    ) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, weight_KOI, bias_KO)
        if x.dim() == 2:
            bias = None if bias_KO is None else bias_KO.flatten()
            return shared_linear(x, weight_KOI.flatten(0, 1), bias)
        weights = weight_KOI.transpose(1, 2)
        if bias_KO is None:
            return torch.bmm(x, weights)
        return torch.baddbmm(bias_KO.unsqueeze(1), x, weights)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        context: StackContext = ctx.layer.context
        update = context.update if context.calls[id(ctx.layer)] == 1 else None
        shares = x.dim() == 2
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight.flatten(0, 1) if shares else torch.bmm(dy, weight)
        if shares:
            dy = dy.unflatten(1, weight.shape[:2])
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        if update is not None:
            if needs_bias:
                update(bias, dy.sum(0 if shares else 1))
            if needs_weight:
                update(weight, dy, x)
            return dx, None, None, None
        if needs_weight:
            if shares:
                dy_MN = dy.flatten(1).t()
                # oneDNN's product has no gradient of its own.
                dw = dy_MN @ x if torch.is_grad_enabled() else shared_linear(dy_MN, x.t())
                dw = dw.view_as(weight)
            else:
                dw = torch.bmm(dy.transpose(1, 2), x)
        if needs_bias:
            db = dy.sum(0 if shares else 1)
        return dx, dw, db, None


class StackedBatchNorm(StackedLayer, _BatchNorm):
    """K BatchNorms of C channels as one of K * C channels."""

    def compute(self, x: Placed) -> Placed:
        x_folded = folded(x, self.context.size)
        own = {**self._parameters, **self._buffers}
        mean, var, count = own["running_mean"], own["running_var"], own["num_batches_tracked"]
        training = self.training and not getattr(self, "stats_frozen", False)
        if not training:
            training, count = mean is None and var is None, None
        elif not self.track_running_stats:
            mean = var = count = None
        if count is not None:
            count.add_(1)
        momentum = self.momentum
        if momentum is None:
            # All members have counted the same batches.
            momentum = 0.0 if count is None else 1.0 / count[0].item()
        state = [
            None if t is None else t.flatten() for t in (mean, var, own["weight"], own["bias"])
        ]
        y = self.normalize(x_folded, state, training, momentum)
        return Placed(y.unflatten(1, (self.context.size, -1)), 1)

    def normalize(
        self, x: Tensor, state: list[Tensor | None], training: bool, momentum: float
    ) -> Tensor:
        """Normalize (N, K * C, ...) by torch's function.

        Args:
            x: the input.
            state: running mean and variance, weight and bias, each (K * C,) or None.
            training: whether the batch's statistics normalize.
            momentum: weight of the batch in the running statistics.
        """
        mean, var, weight, bias = state
        return F.batch_norm(x, mean, var, weight, bias, training, momentum, self.eps)


class StackedOwnBatchNorm(StackedBatchNorm, _BackendMixin):  # type: ignore[misc]
    """The same for this project's BatchNorms, those of parts of a batch included."""

    def normalize(
        self, x: Tensor, state: list[Tensor | None], training: bool, momentum: float
    ) -> Tensor:
        """Normalize as `StackedBatchNorm.normalize` does, by the function of the module's class."""
        mean, var, weight, bias = state
        return self._batch_norm(
            x,
            weight,
            bias,
            mean,
            var,
            training=training,
            momentum=momentum,
            eps=self.eps,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=None,
            num_batches_tracked=None,
            backend=self.backend,
        )


class StackedDropout(StackedLayer, nn.Dropout):
    """Dropout with a probability and a random stream for each member."""

    probabilities: list[float]

    def compute(self, x: Placed) -> Placed:
        if not self.training or not any(self.probabilities):
            return x
        streams = self.context.streams
        if streams is None:
            raise RuntimeError("expected `streams` to be set before dropout in training, got None")
        x_K = leading(x, self.context.size)
        return Placed(x_K * streams.masks(x_K[0], self.probabilities), 0)

    def take(self, members: list[int]) -> None:
        self.probabilities = [self.probabilities[k] for k in members]


class StackedElementwise(StackedLayer):
    """A module that computes each element alone: an activation, or none."""

    def compute(self, x: Placed) -> Placed:
        replaced: Any = super(StackedLayer, self)  # past the class above: the activation's
        return Placed(replaced.forward(x.value), x.dim)


class StackedFlatten(StackedLayer, nn.Flatten):
    """Flattens dimensions of each member's tensor."""

    def compute(self, x: Placed) -> Placed:
        if x.dim is None:
            return Placed(super(StackedLayer, self).forward(x.value), None)
        x_K = x.value.movedim(x.dim, 0)
        first, last = (d + 1 if d >= 0 else d for d in (self.start_dim, self.end_dim))
        return Placed(x_K.flatten(first, last), 0)


_BY_TYPE: dict[type[nn.Module], type[StackedLayer]] = {
    nn.Linear: StackedLinear,
    nn.Dropout: StackedDropout,
    nn.BatchNorm1d: StackedBatchNorm,
    nn.BatchNorm2d: StackedBatchNorm,
    nn.BatchNorm3d: StackedBatchNorm,
    nn.ELU: StackedElementwise,
    nn.Flatten: StackedFlatten,
    nn.GELU: StackedElementwise,
    nn.Hardswish: StackedElementwise,
    nn.Identity: StackedElementwise,
    nn.LeakyReLU: StackedElementwise,
    nn.Mish: StackedElementwise,
    nn.ReLU: StackedElementwise,
    nn.ReLU6: StackedElementwise,
    nn.SELU: StackedElementwise,
    nn.SiLU: StackedElementwise,
    nn.Sigmoid: StackedElementwise,
    nn.Softplus: StackedElementwise,
    nn.Tanh: StackedElementwise,
}


class StackedSequential(StackedLayer, nn.Sequential):
    """Stacked layers in a row, called without leaving `InVmap` between them."""

    def compute(self, x: Placed) -> Placed:
        layers: Any = self
        for layer in layers:
            x = layer.computed(x)
        return x


def stack_layer(module: nn.Module, same: list[nn.Module], context: StackContext) -> bool:
    """Give a module the class that computes all members, and return whether there is one.

    Args:
        module: changed in place; its parameters and buffers are stacked, its children are done.
        same: the modules of the members in this place.
        context: of the stacked network.
    """
    kind = type(module)
    if isinstance(module, _BackendMixin) and kind.forward is _BackendMixin.forward:
        base: type[StackedLayer] | None = StackedOwnBatchNorm
    elif kind.forward in (nn.Sequential.forward, MLP.forward) and len(module._modules):
        is_known = all(isinstance(child, StackedLayer) for child in module.children())
        base = StackedSequential if is_known else None
    else:
        base = _BY_TYPE.get(kind)
    if base is None:
        return False
    module.__class__ = _stacked_class(base, kind)
    module.context = context  # type: ignore[assignment]
    if isinstance(module, StackedBatchNorm) and module.momentum is None:
        count = module.num_batches_tracked
        if count is not None and (count != count[0]).any():
            raise NotStackableError("the BatchNorms have counted different numbers of batches")
    if isinstance(module, StackedDropout):
        module.probabilities = [float(getattr(other, "p", 0.0)) for other in same]
    return True


def _stacked_class(base: type[StackedLayer], kind: type[nn.Module]) -> type[nn.Module]:
    if (base, kind) not in _CLASSES:
        bases = (base,) if issubclass(base, kind) else (base, kind)
        _CLASSES[base, kind] = type(f"Stacked{kind.__name__}", bases, {})
    return _CLASSES[base, kind]


_CLASSES: dict[tuple[type[StackedLayer], type[nn.Module]], type[nn.Module]] = {}
