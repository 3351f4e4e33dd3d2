"""Converts, trains, folds and reverts one network, and counts what was and what could be done."""

import contextlib
import copy
import inspect
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from observer import Observer, is_batch_norm, tensors_in
from torch import Tensor, nn

from bn_lightning import (
    convert_batchnorm,
    fold_batchnorm,
    fusion_counts,
    kernels,
    revert_batchnorm,
)

STEPS = 3
# Of the largest value of a tensor. One rounding is 1.1e-16 in fp64 and 6.0e-8 in fp32, and three
# steps of training multiply it.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
GRADIENT_FLOOR = 1e-2  # of the largest gradient of the network: smaller ones count as this
LEARNING_RATE = 1e-2
STATE_FLOOR = LEARNING_RATE * GRADIENT_FLOOR  # a step moves all parameters together by 0.01 at most
FOLDING_TOLERANCE = 1e-10  # in fp64: folding rounds every weight once more


@dataclass
class Verdict:
    """What happened to one network.

    Attributes:
        batch_norms: how many it has.
        fusable: how many could be fused, as `Observer.fusable` says.
        foldable: how many could be folded, as `Observer.foldable` says.
        not_converted: names of modules that did not run on the kernels.
        not_fused: names of modules, with what follows.
        not_folded: names of modules.
        mismatches: what differs from the plain network, in a step or after the revert.
        other_readers: functions that cannot be fused, and how many BatchNorms they alone read.
        seconds: CPU time of the conversion.
    """

    batch_norms: int = 0
    fusable: int = 0
    foldable: int = 0
    not_converted: list[str] = field(default_factory=list)
    not_fused: list[str] = field(default_factory=list)
    not_folded: list[str] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    other_readers: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def __str__(self) -> str:
        counts = {
            "converted": (self.batch_norms, self.not_converted),
            "fused": (self.fusable, self.not_fused),
            "folded": (self.foldable, self.not_folded),
        }
        parts = [f"{what} {n - len(left)} of {n}" for what, (n, left) in counts.items()]
        return ", ".join([*parts, f"{self.seconds:.2f} s"])


def judge(network: nn.Module, inputs: tuple[Tensor, ...]) -> Verdict:
    """Trains a network for three steps with and without conversion, in fp64 and in fp32.

    Args:
        network: in fp32; it is not changed.
        inputs: its arguments, the floating-point ones in fp32.
    """
    verdict = Verdict()
    for dtype in (torch.float64, torch.float32):
        plain = copy.deepcopy(network).to(dtype).train()
        given = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
        _compare(plain, given, verdict)
    return verdict


def _compare(plain: nn.Module, inputs: tuple[Tensor, ...], verdict: Verdict) -> None:
    """Compares the steps in one dtype; what is counted is counted in fp64."""
    dtype = next(plain.parameters()).dtype
    converted = copy.deepcopy(plain)
    observer = _observed(copy.deepcopy(plain), inputs) if dtype == torch.float64 else None
    before, plain_before = _state(converted), _state(plain)
    begin = time.thread_time()
    conversion = convert_batchnorm(converted, fuse=True)
    verdict.seconds = max(verdict.seconds, time.thread_time() - begin)

    steps = zip(_train(plain, inputs), _train(converted, inputs), strict=True)
    fused = 0
    with _kernel_calls() as calls:
        for number, (expected, got) in enumerate(steps):
            found = _differences(got, expected, TOLERANCE[dtype])
            verdict.mismatches += [f"{dtype}, step {number}: {what}" for what in found[:3]]
            last_step = calls.copy()
            fused += sum(fuses for _, fuses in calls)
            calls.clear()
    reported = sum(count.fused for count in fusion_counts(converted).values())
    if reported != fused:
        verdict.mismatches.append(f"{dtype}: {reported} fused calls reported, {fused} made")
    if observer is not None:
        _count(observer, converted, set(conversion.converted), last_step, verdict)
        _fold(plain, converted, inputs, verdict)
    revert_batchnorm(converted)
    left = _changes(before, _state(converted)) - _changes(plain_before, _state(plain))
    verdict.mismatches += [f"{dtype}, after the revert: {what}" for what in sorted(left)[:3]]


def _observed(network: nn.Module, inputs: tuple[Tensor, ...]) -> Observer:
    _seed(0)
    with Observer(network) as observer:
        output = network(*inputs)
    observer.returned(output)
    return observer


@contextlib.contextmanager
def _kernel_calls() -> Iterator[list[tuple[int, bool]]]:
    """Notes for each call of the kernels the id of a tensor of the module, and whether it fuses."""
    original = kernels.batch_norm
    calls: list[tuple[int, bool]] = []

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        arguments = inspect.signature(original).bind(*args, **kwargs).arguments
        own = arguments.get("running_mean")
        own = arguments.get("weight") if own is None else own
        activation = arguments.get("activation", "identity")
        fuses = activation != "identity" or arguments.get("residual") is not None
        calls.append((id(own), fuses))
        return original(*args, **kwargs)

    ours = [module for name, module in sys.modules.items() if name.startswith("bn_lightning")]
    places = [m for m in ours if vars(m).get("batch_norm") is original]
    for module in places:
        module.batch_norm = noted  # type: ignore[attr-defined]
    try:
        yield calls
    finally:
        for module in places:
            module.batch_norm = original  # type: ignore[attr-defined]


def _count(
    observer: Observer,
    converted: nn.Module,
    reported: set[str],
    calls: list[tuple[int, bool]],
    verdict: Verdict,
) -> None:
    names = {}
    for name, module in converted.named_modules():
        if is_batch_norm(module):
            verdict.batch_norms += 1
            names[id(module.weight if module.running_mean is None else module.running_mean)] = name
            verdict.not_converted.append(name)
    seen = {names[own] for own, _ in calls if own in names}
    called = observer.called()
    verdict.not_converted = [
        name for name in verdict.not_converted if name not in (seen if name in called else reported)
    ]
    fused = Counter(names[own] for own, fuses in calls if fuses and own in names)
    sites = observer.fusable()
    verdict.fusable = len(sites)
    verdict.other_readers = observer.not_fusable()
    # Sites with one candidate first: of two BatchNorms that are added, either may be fused.
    for site in sorted(sites, key=lambda site: len(site.modules)):
        taken = next((name for name in site.modules if fused[name]), None)
        if taken is None:
            verdict.not_fused.append(f"{' or '.join(site.modules)}, then {site.function}")
        else:
            fused[taken] -= 1


def _fold(
    plain: nn.Module, converted: nn.Module, inputs: tuple[Tensor, ...], verdict: Verdict
) -> None:
    training = [(module, module.training) for m in (plain, converted) for module in m.modules()]
    converted.load_state_dict(plain.state_dict())
    plain.eval()
    converted.eval()
    with torch.no_grad():
        expected = _outputs(plain, inputs)
        found = _differences(_outputs(converted, inputs), expected, TOLERANCE[torch.float64])
        verdict.mismatches += [f"evaluation: {what}" for what in found[:3]]
        observer = _observed(copy.deepcopy(plain), inputs)
        foldable = observer.foldable()
        verdict.foldable = len(foldable)
        folded = fold_batchnorm(converted, inputs)
        left = _observed(folded, inputs).called()
        verdict.not_folded = sorted(foldable & left)
        found = _differences(_outputs(folded, inputs), expected, FOLDING_TOLERANCE)
        verdict.mismatches += [f"folded: {what}" for what in found[:3]]
    for module, flag in training:
        module.training = flag


def _seed(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def _outputs(network: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    _seed(0)
    return _named("output", list(tensors_in(network(*inputs))))


def _named(kind: str, tensors: list[Tensor]) -> dict[str, Any]:
    values = {f"{kind} {i}": tensor.detach().clone() for i, tensor in enumerate(tensors)}
    return values | {f"class of {kind} {i}": type(t).__name__ for i, t in enumerate(tensors)}


def _train(network: nn.Module, inputs: tuple[Tensor, ...]) -> Iterator[dict[str, Any]]:
    """Yields after each step the outputs, gradients, buffers and parameters by name."""
    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        _seed(step)
        given = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
        outputs = list(tensors_in(network(*given)))
        seen = _named("output", outputs)
        generator = torch.Generator().manual_seed(step)
        loss = torch.zeros(())
        for y in outputs:
            if y.requires_grad:
                upstream = torch.randn(y.shape, generator=generator, dtype=y.dtype)
                loss = loss + (y * upstream).sum()
        optimizer.zero_grad()
        loss.backward()
        seen |= _named("gradient of input", [x.grad for x in given if x.grad is not None])
        for name, parameter in network.named_parameters():
            if parameter.grad is not None:
                seen[f"gradient of {name}"] = parameter.grad.clone()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        for name, value in [*network.named_parameters(), *network.named_buffers()]:
            seen[name] = value.detach().clone()
        yield seen


def _differences(got: dict[str, Any], expected: dict[str, Any], tolerance: float) -> list[str]:
    """What differs by more than `tolerance` of the largest value of its tensor, worst first."""
    if got.keys() != expected.keys():
        return [f"only one has {sorted(got.keys() ^ expected.keys())}"]
    found: dict[str, float] = {}
    gradients = [value for name, value in expected.items() if name.startswith("gradient of")]
    # The gradient of a bias before a BatchNorm is zero but for rounding.
    least = GRADIENT_FLOOR * max((float(value.abs().max()) for value in gradients), default=0.0)
    for name, value in expected.items():
        if not isinstance(value, Tensor):
            if got[name] != value:
                found[f"{name} is {got[name]}, not {value}"] = float("inf")
        elif not torch.isfinite(value).all():
            found[f"{name} is not finite in the plain network"] = float("inf")
        elif (got[name].shape, got[name].dtype) != (value.shape, value.dtype):
            found[f"{name} has another shape or dtype"] = float("inf")
        elif not torch.equal(got[name], value):
            scale = float(value.abs().max())
            if not name.startswith("output"):
                scale = max(scale, least if name.startswith("gradient of") else STATE_FLOOR)
            error = float((got[name].double() - value.double()).abs().max()) / (scale or 1.0)
            if not error <= tolerance:
                found[f"{name} differs by {error:.1e}"] = error
    return sorted(found, key=found.__getitem__, reverse=True)


def _state(network: nn.Module) -> dict[str, Any]:
    """The class and the attributes of each module, containers as shallow copies."""
    state = {}
    for name, module in network.named_modules():
        state[f"class of {name or 'the network'}"] = type(module)
        for attribute, value in vars(module).items():
            copied = copy.copy(value) if isinstance(value, dict | list | set) else value
            state[f"{name}.{attribute}"] = copied
    return state


def _changes(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    both = before.keys() & after.keys()
    changed = {name for name in both if not _same(before[name], after[name])}
    return changed | (before.keys() ^ after.keys())


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other) or isinstance(one, Tensor | nn.Module):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
