"""Folds the BatchNorms of a trained model into the layers before or after them.

Folding holds in evaluation only. It changes the weights of layers, so it must be valid wherever the
model uses them. What the model does is read from the graph of an evaluation of example inputs
(fold_by_export.py), and the folded model is compared with the model; without example inputs it is
read from the forwards (fold_by_forward.py), which finds less. fold_arithmetic.py has the formulas.
"""

import copy
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bn_lightning.conversion.adapters import find_adapter, is_batchnorm, reason_not_adapted
from bn_lightning.conversion.class_swap import has_instance_forward
from bn_lightning.conversion.convert import revert_batchnorm
from bn_lightning.conversion.fold_arithmetic import FoldedPair, fold_pair, follow_norm
from bn_lightning.conversion.fold_by_export import NotExportable, find_pairs_in_export
from bn_lightning.conversion.fold_by_forward import find_pairs_in_forwards
from bn_lightning.modules.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from bn_lightning.modules.ghost_batch_norm import (
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
)
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
    *(GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d),
    *(SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d),
}
# Without example inputs, exactly these: a subclass may call its weights differently.
_LAYERS = {
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}


class FoldError(ValueError):
    """The example inputs cannot be used, or the folded model computes something else."""


_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Folding:
    """What `fold_batchnorm` does to a model; names are those of modules in the model.

    Attributes:
        folded: name of each folded BatchNorm -> name of the layer it is folded into; of several
            layers the names with commas.
        skipped: name of each other BatchNorm -> reason.
        difference: largest difference of the folded model's outputs from the model's for the
            example inputs, relative to the largest output; None if they were not compared.
    """

    folded: dict[str, str]
    skipped: dict[str, str]
    difference: float | None = None

    def __str__(self) -> str:
        lines = [f"{len(self.folded)} BatchNorms folded, {len(self.skipped)} skipped"]
        if self.difference is not None:
            lines[0] += f"; outputs differ by {self.difference:.1e} of the largest"
        lines += [f"  {name or 'root'}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def fold_batchnorm(
    model: nn.Module, example_inputs: Any = None, *, tolerance: float | None = None
) -> nn.Module:
    """Return a copy of a model for inference, with BatchNorms folded into the layers beside them.

    In the copy the layers have new weights and biases. The BatchNorm is replaced by a module that
    computes nothing, or only the activation that the BatchNorm contains. What is folded is logged
    at level INFO; `find_foldable` returns it.

    With example inputs, a model is folded whatever its forwards are, if torch.export can export it.
    The copy holds for inputs that take the same way through the model. Its outputs for the examples
    are compared with the model's.

    Args:
        model: not modified. Converted and fused BatchNorms are reverted in the copy.
        example_inputs: a tensor, a tuple of the forward's positional arguments, or a dict of its
            keyword arguments, on the model's device; not modified. None to read the forwards only;
            then the copy holds for calls that leave their optional arguments at the defaults.
        tolerance: largest difference of an output, relative to the largest absolute value of that
            output, above 0; None for the square root of its dtype's eps: 1.5e-8 in fp64, 3.5e-4 in
            fp32, 0.031 in fp16, 0.088 in bf16.

    Returns:
        A copy of the model in evaluation mode. BatchNorms that are not folded are as before the
        conversion. Do not train the copy, because its folded BatchNorms no longer normalize.

    Raises:
        TypeError: If `model` is not a module, or `example_inputs` is none of these.
        FoldError: If the example inputs do not run, if two evaluations of them differ, or if the
            folded model's outputs differ by more than `tolerance`.

    Warns:
        UserWarning: If nothing can be folded.
    """
    folded, folding = fold_with_report(model, example_inputs, tolerance=tolerance)
    logger.info("%s", folding)
    if not folding.folded:
        warnings.warn(
            f"expected `model` to have BatchNorms to fold, got none: {folding}", stacklevel=2
        )
    return folded


def find_foldable(
    model: nn.Module, example_inputs: Any = None, *, tolerance: float | None = None
) -> Folding:
    """Return what `fold_batchnorm` does to a model, and why it leaves the other BatchNorms.

    The arguments and errors are those of `fold_batchnorm`.
    """
    return fold_with_report(model, example_inputs, tolerance=tolerance)[1]


def fold_with_report(
    model: nn.Module, example_inputs: Any = None, *, tolerance: float | None = None
) -> tuple[nn.Module, Folding]:
    """Return the folded copy of a model, and what was folded; neither logs nor warns.

    The arguments and errors are those of `fold_batchnorm`.
    """
    arguments = _to_arguments(example_inputs)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        return _fold(model, arguments, tolerance)


def _fold(
    model: nn.Module, arguments: _Arguments | None, tolerance: float | None
) -> tuple[nn.Module, Folding]:
    folded = copy.deepcopy(model)
    revert_batchnorm(folded)
    folded.eval()
    expected = None
    if arguments is not None:
        expected = _evaluate_twice(copy.deepcopy(folded), arguments, tolerance)
    pairs, skipped = _find(folded, arguments)
    _replace(folded, pairs)
    difference = None
    if expected is not None and pairs:
        difference = _check(folded, arguments, expected, tolerance)
    names = {pair.norm: ", ".join(pair.layers) for pair in pairs}
    return folded, Folding(names, skipped, difference)


def _to_arguments(example_inputs: Any) -> _Arguments | None:
    if example_inputs is None:
        return None
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise TypeError(
        "expected `example_inputs` to be a tensor, a tuple of positional arguments or a dict of"
        f" keyword arguments, got {type(example_inputs).__name__}; give what the forward takes"
    )


@dataclass(frozen=True)
class _NamedPair:
    """A `FoldedPair` by the names of the modules, which are the same in all copies of a model."""

    norm: str
    layers: tuple[str, ...]
    layers_first: bool
    rows_only: bool


def _find(
    evaluated: nn.Module, arguments: _Arguments | None
) -> tuple[list[_NamedPair], dict[str, str]]:
    """Return what can be folded, and name -> reason for the other BatchNorms."""
    pairs, cause = None, ""
    analysed = copy.deepcopy(evaluated)
    if arguments is not None:
        norms, reasons = _foldable_norms(analysed)
        try:
            pairs, others = find_pairs_in_export(analysed, norms, _changeable(analysed), *arguments)
        except NotExportable as error:
            cause = f" ({_first_line(error.__cause__)})"
            analysed = copy.deepcopy(evaluated)
    if pairs is None:
        norms, reasons = _foldable_norms(analysed)
        layers = {m for m in _changeable(analysed) if type(m) in _LAYERS}
        advice = "; give `example_inputs`" if arguments is None else ""
        pairs, others = find_pairs_in_forwards(analysed, norms, layers, advice)
        if arguments is not None:
            others = {
                module: f"torch.export cannot export the model, and {reason}{cause}"
                for module, reason in others.items()
            }
    names = {module: name for name, module in analysed.named_modules()}
    reasons |= others
    return [
        _NamedPair(
            names[pair.norm],
            tuple(names[layer] for layer in pair.layers),
            pair.layers_first,
            pair.rows_only,
        )
        for pair in pairs
    ], {name: reasons[module] for module, name in names.items() if module in reasons}


def _foldable_norms(model: nn.Module) -> tuple[set[nn.Module], dict[nn.Module, str]]:
    """Return the BatchNorms that may be folded, and BatchNorm -> reason for the others."""
    norms, reasons = set(), {}
    for module in model.modules():
        adapter = find_adapter(module)
        if adapter is None and not is_batchnorm(module):
            continue
        if parametrize.is_parametrized(module):
            reasons[module] = "it is parametrized"
        elif adapter is None and type(module) not in _NORMS:
            reasons[module] = reason_not_adapted(module)
        elif _is_hooked(module):
            reasons[module] = "it has hooks, or its instance its own forward"
        elif module.training:
            reasons[module] = "it is in training mode although the model is in evaluation mode"
        elif getattr(module, "running_mean", None) is None:
            reasons[module] = "it has no running statistics"
        else:
            norms.add(module)
    return norms, reasons


def _changeable(model: nn.Module) -> set[nn.Module]:
    """Return the modules without hooks whose weight and bias no other module has."""
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    owners = Counter(id(parameter) for m in modules for parameter in m._parameters.values())
    return {
        module
        for module in modules
        if module._parameters.get("weight") is not None
        and not _is_hooked(module)
        and all(p is None or owners[id(p)] == 1 for p in module._parameters.values())
    }


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or has_instance_forward(module)
    )


def _replace(folded: nn.Module, pairs: list[_NamedPair]) -> None:
    """Give the layers their new weights, and turn the BatchNorms into what follows them.

    The objects stay, because code may have them elsewhere, in a list for instance.
    """
    for pair in pairs:
        norm = folded.get_submodule(pair.norm)
        layers = tuple(folded.get_submodule(name) for name in pair.layers)
        fold_pair(FoldedPair(norm, layers, pair.layers_first))
        follower = follow_norm(norm, pair.rows_only).eval()
        norm.__dict__ = follower.__dict__
        norm.__class__ = type(follower)


@torch.no_grad()
def _evaluate(model: nn.Module, arguments: _Arguments) -> list[Tensor]:
    """Return the tensors of floats that a model returns."""
    args, kwargs = copy.deepcopy(arguments)  # the model may write to its inputs
    output = model(*args, **kwargs)
    return [tensor for tensor in _tensors_in(output) if tensor.is_floating_point()]


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)
    elif is_dataclass(value):
        yield from _tensors_in(vars(value))


def _evaluate_twice(
    evaluated: nn.Module, arguments: _Arguments, tolerance: float | None
) -> list[Tensor]:
    """Return the outputs for the examples, or raise a FoldError."""
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"expected `tolerance` to be above 0, got {tolerance}; give 1e-4, say")
    try:
        first, second = (_evaluate(evaluated, arguments) for _ in range(2))
    except Exception as error:
        raise FoldError(
            "expected `example_inputs` to run through `model` in evaluation, got"
            f" {_first_line(error)}; give what its forward takes, on its device"
        ) from error
    if not any(output.isfinite().any() for output in first):
        raise FoldError(
            "expected `model` to return tensors of floats, some of them finite, for"
            " `example_inputs`, got none; fold the part of it that does, or give other inputs"
        )
    difference, is_equal = _compare(second, first, tolerance)
    if not is_equal:
        raise FoldError(
            "expected `model` to have the same outputs in two evaluations of `example_inputs`, got"
            f" a difference of {difference:.1e} of the largest, so that no folding could be"
            " checked; turn off what draws random numbers in evaluation"
        )
    return first


def _check(
    folded: nn.Module, arguments: Any, expected: list[Tensor], tolerance: float | None
) -> float:
    """Return how much the folded model's outputs differ, or raise a FoldError."""
    try:
        found = _evaluate(copy.deepcopy(folded), arguments)
    except Exception as error:
        raise FoldError(
            "expected the forward of `model` to use its BatchNorms and layers by calling them, got"
            f" {_first_line(error)} after folding; fold the parts of it that do"
        ) from error
    difference, is_equal = _compare(found, expected, tolerance)
    if not is_equal:
        raise FoldError(
            "expected the folded model to have the outputs of `model` for `example_inputs`, got a"
            f" difference of {difference:.1e} of the largest; if a running variance near zero"
            " explains it, set `tolerance`"
        )
    return difference


def _compare(
    found: list[Tensor], expected: list[Tensor], tolerance: float | None
) -> tuple[float, bool]:
    """Return the largest relative difference, and whether each is within the tolerance."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        return float("inf"), False
    largest, is_equal = 0.0, True
    for x, y in zip(found, expected, strict=True):
        finite = y.isfinite()
        others_equal = torch.equal(x[~finite].nan_to_num(), y[~finite].nan_to_num())
        dtype, x, y = y.dtype, x[finite].double(), y[finite].double()
        scale = y.abs().max().item() if y.numel() else 0.0
        difference = (x - y).abs().max().item() / scale if scale else x.abs().sum().item()
        limit = torch.finfo(dtype).eps ** 0.5 if tolerance is None else tolerance
        is_equal &= others_equal and difference <= limit
        largest = max(largest, difference)
    return largest, is_equal


def _first_line(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
