"""Optimizers of a stack: the arithmetic of torch's, with the numbers of each member.

A parameter is (K, ...). Each rule computes what the loop over single tensors in torch.optim
computes, in the same order. Where all members have the same number it stays a number, which is
faster than a tensor.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from bn_lightning.models.classifier import Classifier
from bn_lightning.stack.same_architecture import NotStackableError
from bn_lightning.stack.shared_linear import add_weight_gradient

Number = float | Tensor
"""The same number for all members, or one for each, in a shape that broadcasts."""


def member_optimizers(models: Sequence[Classifier]) -> tuple[list[Optimizer], list[Any]]:
    """Return the optimizer of each member, and its scheduler if there are any.

    Raises:
        NotStackableError: the schedulers follow a metric.
    """
    optimizers: list[Optimizer] = []
    schedulers: list[Any] = []
    for model in models:
        made = model.configure_optimizers()
        if isinstance(made, dict):
            schedulers.append(made["lr_scheduler"]["scheduler"])
            made = made["optimizer"]
        optimizers.append(made)
    if any(isinstance(scheduler, ReduceLROnPlateau) for scheduler in schedulers):
        raise NotStackableError("`scheduler` follows a metric")
    for optimizer in optimizers if schedulers else []:
        # Without gradients it changes nothing. torch warns if a scheduler comes first.
        optimizer.step()
    return optimizers, schedulers


class StackedOptimizer:
    """Steps of all members' optimizers at once.

    Args:
        parameters: of the stacked network, each (K, ...).
        members: a torch optimizer of each member. Their parameter groups hold the numbers, which
            schedulers may change: call `read_numbers` then. They are never stepped.
        clip_norm: largest norm of all gradients of a member together; None for no limit.

    Raises:
        NotStackableError: the optimizers are of a class or have an option that has no rule here, or
            differ in more than numbers, or take other parameters than the network's.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        members: Sequence[Optimizer],
        clip_norm: float | None = None,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.members = list(members)
        self.clip_norm = clip_norm
        self.state: dict[int, dict[str, Tensor]] = {}  # by place in `parameters`
        self._steps = [0] * len(self.parameters)  # with a gradient, of each
        first = self.members[0]
        if type(first) not in _RULES:
            known = ", ".join(kind.__name__ for kind in _RULES)
            raise NotStackableError(f"`optimizer` is {type(first).__name__}, not one of {known}")
        self._rule = _RULES[type(first)]
        self._flags = _flags(first)
        for member in self.members:
            if type(member) is not type(first) or _flags(member) != self._flags:
                raise NotStackableError("the optimizers differ in more than numbers")
        if refused := [name for name in _REFUSED if self._flags.get(name)]:
            raise NotStackableError(f"`optimizer.{refused[0]}` has no rule for a stack")
        shapes = [tuple(p.shape[1:]) for p in self.parameters]
        for k in range(len(self.members)):
            own = [tuple(p.shape) for p in self._own_parameters(k) if p.requires_grad]
            if own != shapes:
                raise NotStackableError("the optimizer does not take all parameters of the network")
        self.read_numbers()

    def read_numbers(self) -> None:
        """Read the members' numbers again, after a scheduler has changed them."""
        groups = [member.param_groups[0] for member in self.members]
        self._numbers: dict[str, float | Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, int], Tensor] = {}
        for name in self._flags["numbers"]:
            values = [float(_number(group, name)) for group in groups]
            same = all(value == values[0] for value in values)
            self._numbers[name] = values[0] if same else torch.tensor(values, dtype=torch.float64)

    @property
    def is_constant(self) -> bool:
        """Whether a step does what the one before did: no rule reads the number of steps."""
        return self._rule is _sgd

    @property
    def update(self) -> Any:
        """What applies a step within the backward; None if the rule needs whole gradients."""
        if self._rule is not _sgd or self._flags.get("maximize") or self.clip_norm is not None:
            return None
        is_plain = not _any(self._numbers["momentum"]) and not _any(self._numbers["weight_decay"])
        return self._descend if is_plain else None

    def step(self) -> None:
        """Apply a step to all parameters that have a gradient, and remove the gradients."""
        if self.clip_norm is not None:
            clip_members([p.grad for p in self.parameters if p.grad is not None], self.clip_norm)
        with torch.no_grad():
            for place, parameter in enumerate(self.parameters):
                gradient, parameter.grad = parameter.grad, None
                if gradient is None:
                    continue
                if self._flags.get("maximize"):
                    gradient = gradient.neg_()
                self._steps[place] += 1
                state = self.state.setdefault(place, {})
                self._rule(self, parameter, gradient, state, self._steps[place])

    def take(self, members: Sequence[int], parameters: Iterable[nn.Parameter]) -> None:
        """Keep the given members only.

        Args:
            members: to keep.
            parameters: of the stacked network, which has kept them already.
        """
        self.parameters = [p for p in parameters if p.requires_grad]
        self.members = [self.members[k] for k in members]
        for state in self.state.values():
            for name, value in state.items():
                chosen = torch.tensor(list(members), device=value.device)
                state[name] = value.index_select(0, chosen)
        self.read_numbers()

    def member_state(self, member: int) -> dict[str, Any]:
        """Return the `state_dict` that a member's own optimizer would have, of copies."""
        optimizer = self.members[member]
        group = optimizer.param_groups[0]
        places = [i for i, p in enumerate(self._own_parameters(member)) if p.requires_grad]
        state: dict[int, dict[str, Tensor]] = {}
        for place, tensors in self.state.items():
            if tensors and group.get("momentum") != 0:  # torch keeps no buffer for a momentum of 0
                own = {name: tensor[member].clone() for name, tensor in tensors.items()}
                steps = torch.tensor(float(self._steps[place]))
                state[places[place]] = own if self._rule is _sgd else {"step": steps} | own
        return optimizer.state_dict() | {"state": state}

    def load_members(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Take the members' states from `member_state`, in their order."""
        for optimizer, state in zip(self.members, states, strict=True):
            optimizer.load_state_dict({**state, "state": {}})
        self.state = {}
        places = [i for i, p in enumerate(self._own_parameters(0)) if p.requires_grad]
        for place, index in enumerate(places):
            own = [state["state"].get(index, {}) for state in states]
            names = {name for tensors in own for name in tensors} - {"step"}
            parameter = self.parameters[place]
            for name in sorted(names):
                # A member with a momentum of 0 has no buffer, and reads none.
                zero = torch.zeros_like(parameter[0])
                stacked = torch.stack([tensors.get(name, zero) for tensors in own])
                self.state.setdefault(place, {})[name] = stacked.to(parameter)
            steps = [int(tensors["step"]) for tensors in own if "step" in tensors]
            self._steps[place] = max(steps, default=0)
        self.read_numbers()

    def number(self, name: str, like: Tensor) -> Number:
        """Return a number of all members, to combine with a tensor (K, ...)."""
        value = self._numbers[name]
        if isinstance(value, float):
            return value
        key = name, like.dtype, like.dim()
        if key not in self._views:
            self._views[key] = _view(value, like)
        return self._views[key]

    def whole(self, name: str) -> Tensor:
        """Return a number of all members as (K,) in double precision, or () if it is the same."""
        return torch.as_tensor(self._numbers[name], dtype=torch.float64)

    def _own_parameters(self, member: int) -> list[Tensor]:
        return self.members[member].param_groups[0]["params"]

    def _descend(self, parameter: Tensor, dy: Tensor, x: Tensor | None = None) -> None:
        """Apply w -= lr * gradient.

        Args:
            parameter: w, (K, O, I) or (K, O).
            dy: the gradient of w; with `x` that of the output, (K, N, O), or (N, K, O) for a
                shared input.
            x: input, (K, N, I) or shared (N, I); the gradient is then the product of both.
        """
        with torch.no_grad():
            rate = self.number("lr", dy)
            if x is None:
                _add(parameter, dy, rate, -1.0)
                return
            alpha = -1.0
            if isinstance(rate, float):
                alpha = -rate
            elif x.dim() == 2:
                dy = dy * rate.transpose(0, 1)
            else:
                dy = dy * rate
            if x.dim() == 2:
                add_weight_gradient(parameter.flatten(0, 1), dy.flatten(1), x, alpha)
            else:
                parameter.baddbmm_(dy.transpose(1, 2), x, alpha=alpha)


def _sgd(
    o: StackedOptimizer, p: Tensor, gradient: Tensor, state: dict[str, Tensor], steps: int
) -> None:
    decay, momentum = o.number("weight_decay", p), o.number("momentum", p)
    if _any(decay):
        _add(gradient, p, decay)
    if _any(momentum):
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = gradient.clone()
        else:
            buffer = state["momentum_buffer"].mul_(momentum)
            _add(buffer, gradient, o.number("share", p))
        buffer = state["momentum_buffer"]
        gradient = _add(gradient, buffer, momentum) if o._flags["nesterov"] else buffer
    _add(p, gradient, o.number("lr", p), -1.0)


def _adam(
    o: StackedOptimizer, p: Tensor, gradient: Tensor, state: dict[str, Tensor], steps: int
) -> None:
    decay = o.number("weight_decay", p)
    if _any(decay):
        if o._flags["decoupled_weight_decay"]:
            p.mul_(_view(1 - o.whole("lr") * o.whole("weight_decay"), p))
        else:
            _add(gradient, p, decay)
    if not state:
        state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    beta1, beta2 = o.whole("beta1"), o.whole("beta2")
    state["exp_avg"].lerp_(gradient, _view(1 - beta1, p))
    squares = state["exp_avg_sq"].mul_(o.number("beta2", p))
    if isinstance(o.number("beta2", p), float):
        squares.addcmul_(gradient, gradient, value=1 - beta2.item())
    else:
        squares.add_(gradient.square().mul_(_view(1 - beta2, p)))
    correction1, correction2 = 1 - beta1**steps, 1 - beta2**steps
    size = o.whole("lr") / correction1
    denominator = squares.sqrt().div_(_view(correction2.sqrt(), p)).add_(o.number("eps", p))
    _add_quotient(p, state["exp_avg"], denominator, size)


def _adagrad(
    o: StackedOptimizer, p: Tensor, gradient: Tensor, state: dict[str, Tensor], steps: int
) -> None:
    decay = o.number("weight_decay", p)
    if _any(decay):
        _add(gradient, p, decay)
    if not state:
        start = o.number("initial_accumulator_value", p)
        state["sum"] = torch.zeros_like(p).add_(start)
    squares = state["sum"].addcmul_(gradient, gradient)
    rate = o.whole("lr") / (1 + (steps - 1) * o.whole("lr_decay"))
    _add_quotient(p, gradient, squares.sqrt().add_(o.number("eps", p)), rate)


_RULES: dict[type[Optimizer], Any] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.Adagrad: _adagrad,
}

_REFUSED = ("amsgrad", "capturable", "differentiable")
# How to compute does not change what is computed.
_IGNORED = ("foreach", "fused")


def _flags(optimizer: Optimizer) -> dict[str, Any]:
    """Return the options that all members must share, and the names of their numbers.

    Raises:
        NotStackableError: there are several groups of parameters.
    """
    if len(optimizer.param_groups) != 1:
        raise NotStackableError("`optimizer` has several groups of parameters")
    flags: dict[str, Any] = {}
    numbers: list[str] = []
    for name, value in optimizer.param_groups[0].items():
        if name in _IGNORED or name in ("params", "initial_lr"):
            continue
        if name == "betas":
            numbers += ["beta1", "beta2"]
        elif isinstance(value, Tensor):
            raise NotStackableError(f"`optimizer.{name}` is a tensor")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers.append(name)
        else:
            flags[name] = value
    if "dampening" in numbers:
        numbers.append("share")
    return {**flags, "numbers": numbers}


def _number(group: dict[str, Any], name: str) -> float:
    if name in ("beta1", "beta2"):
        return group["betas"][name == "beta2"]
    if name == "share":  # of a new gradient in the momentum; torch ignores it without momentum
        return 1.0 - group["dampening"] if group["momentum"] else 1.0
    return group[name]


def _view(values: Tensor, like: Tensor) -> Tensor:
    """Return (K,) or () numbers in the dtype and on the device of a tensor that they multiply."""
    shape = (-1,) + (1,) * (like.dim() - 1) if values.dim() else ()
    return values.to(like.device, like.dtype).reshape(shape)


def _any(value: Number) -> bool:
    return not isinstance(value, float) or value != 0


def _add(target: Tensor, value: Tensor, factor: Number, sign: float = 1.0) -> Tensor:
    """Add `sign * factor * value` in place."""
    if isinstance(factor, float):
        return target.add_(value, alpha=sign * factor)
    return target.addcmul_(value, factor, value=sign)


def _add_quotient(p: Tensor, numerator: Tensor, denominator: Tensor, size: Tensor) -> None:
    if size.dim() == 0:
        p.addcdiv_(numerator, denominator, value=-size.item())
    else:
        p.addcdiv_(numerator * _view(size, p), denominator, value=-1.0)


def clip_members(gradients: Sequence[Tensor], limit: float) -> None:
    """Scale gradients (K, ...) in place so that each member's norm is at most `limit`.

    As Lightning does for one network: with a limit of 0 or less nothing is clipped.
    """
    if limit <= 0:
        return
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
    factors = (limit / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *(1,) * (gradient.dim() - 1)))
