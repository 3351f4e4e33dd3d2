"""The eager path: planned calls have the bits of the ops, and what needs the ops goes to them."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from bn_lightning.kernels import batch_norm, eager, launch_plan
from bn_lightning.kernels.arguments import BatchNormArguments
from bn_lightning.kernels.schedule import Regime, forced_regime
from bn_lightning.modules.batch_norm import BatchNorm2d

SHAPE = (4, 8, 2, 3)
AFFINE = ("weight", "bias")
Plans = list[launch_plan.LaunchPlan]
RUNNING = ("running_mean", "running_var")


@pytest.fixture(autouse=True)
def no_plans_and_nan_in_empty_tensors() -> Iterator[None]:
    eager._plans.clear()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    eager._plans.clear()


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> Plans:
    """The plans that were repeated, in order."""
    found: Plans = []
    launch = launch_plan.LaunchPlan.launch

    def spy(plan: launch_plan.LaunchPlan, addresses: tuple[int, ...]) -> None:
        found.append(plan)
        launch(plan, addresses)

    monkeypatch.setattr(launch_plan.LaunchPlan, "launch", spy)
    return found


def _plain(x: Tensor) -> Tensor:
    return x


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _misaligned(x: Tensor) -> Tensor:
    """Return a copy one element past an aligned address."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def _expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of call.

    Attributes:
        shape: of x.
        layout: prepares x and the residual.
        of_dy: prepares dy.
        missing: tensors that are None.
        frozen: tensors that need no gradient.
        repeats: plans that a second call of the kind repeats.
    """

    shape: tuple[int, ...] = SHAPE
    layout: Callable[[Tensor], Tensor] = _plain
    of_dy: Callable[[Tensor], Tensor] = _plain
    dtype: torch.dtype = torch.float32
    of_parameters: torch.dtype = torch.float32
    activation: str = "identity"
    missing: tuple[str, ...] = ("residual",)
    frozen: tuple[str, ...] = ()
    training: bool = True
    momentum: float | None = 0.1
    regime: Regime | None = None
    repeats: int = 2

    def tensors(self, device: str, seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        x, residual, dy = (
            torch.randn(self.shape, generator=g).to(device, self.dtype) for _ in range(3)
        )
        C = self.shape[1]
        weight, bias, mean = (torch.randn(C, generator=g).to(device) for _ in range(3))
        t = {
            "x": self.layout(x * 2 + 3),
            "residual": self.layout(residual),
            "dy": self.of_dy(self.layout(dy + 0.5)),
            "weight": weight.to(self.of_parameters),
            "bias": bias.to(self.of_parameters),
            "running_mean": mean,
            "running_var": (torch.rand(C, generator=g) + 0.5).to(device),
            "num_batches_tracked": torch.tensor(seed, device=device),
        }
        return {k: v for k, v in t.items() if k not in self.missing}

    def run(self, t: dict[str, Tensor], function: Callable[..., Tensor]) -> dict[str, Any]:
        """Return y, the gradients and the state, on the tensors themselves."""
        inputs = {k: t[k] for k in ("x", "residual", *AFFINE) if k in t and k not in self.frozen}
        for value in inputs.values():
            value.requires_grad_()
        given = {k: v for k, v in t.items() if k != "dy"}
        options = {"training": self.training, "momentum": self.momentum}
        forced = contextlib.nullcontext() if self.regime is None else forced_regime(self.regime)
        with forced:
            y = function(**given, **options, activation=self.activation)
            gradients = torch.autograd.grad(y, list(inputs.values()), t["dy"])
        found = {"y": y.detach(), **{f"d{k}": v for k, v in zip(inputs, gradients, strict=True)}}
        return found | {k: t[k] for k in (*RUNNING, "num_batches_tracked") if k in t}


def _ours(**arguments: Any) -> Tensor:
    return batch_norm(**arguments, backend="triton")


def _op(**arguments: Any) -> Tensor:
    fields = dict.fromkeys(BatchNormArguments._fields) | {"eps": 1e-5, "negative_slope": 0.01}
    fields |= {"activation": "identity"} | arguments
    if fields["running_mean"] is None:
        fields["momentum"] = 0.0
    if not fields["training"]:
        fields["num_batches_tracked"] = None
    return torch.ops.bn_lightning.batch_norm(*BatchNormArguments(**fields))


class _SeesDispatch(TorchDispatchMode):
    """Lets each operation pass; with it a call goes to the ops."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].stride() == value.stride(), name
        assert torch.equal(found[name], value), name


CASES = {
    "single_launch": Case(regime=Regime.SINGLE_LAUNCH),
    "two_pass": Case(regime=Regime.TWO_PASS, activation="relu", missing=()),
    "persistent": Case(regime=Regime.PERSISTENT, activation="silu", missing=()),
    "several_splits": Case((24, 3, 8, 8), regime=Regime.TWO_PASS, activation="tanh", missing=()),
    "persistent_splits": Case((24, 3, 8, 8), regime=Regime.PERSISTENT, activation="gelu"),
    "channels_last": Case(layout=_channels_last, activation="relu", missing=()),
    "rows_fp16": Case((9, 10), dtype=torch.float16, activation="hardswish"),
    "bf16": Case(dtype=torch.bfloat16, activation="relu", missing=()),
    "bf16_parameters": Case(dtype=torch.bfloat16, of_parameters=torch.bfloat16),
    "no_affine": Case(missing=("residual", "weight", "bias")),
    "no_bias": Case(missing=("residual", "bias"), activation="relu"),
    "no_running": Case(missing=("residual", *RUNNING, "num_batches_tracked"), momentum=None),
    "cumulative": Case(momentum=None, activation="sigmoid", missing=()),
    "evaluation": Case(training=False, activation="relu"),
    "evaluation_add": Case(training=False, activation="elu", missing=()),
    "frozen_affine": Case(frozen=AFFINE, activation="relu"),
    "only_bias": Case(frozen=("x", "weight")),
    "only_residual": Case(frozen=("x", *AFFINE), activation="relu", missing=()),
    "identity_residual": Case(missing=()),
    "odd_address": Case(layout=_misaligned, of_dy=torch.clone, activation="relu", missing=()),
    "odd_address_bf16": Case(layout=_misaligned, of_dy=torch.clone, dtype=torch.bfloat16),
    "odd_gradient": Case(of_dy=_misaligned, repeats=1),
    "expanded_gradient": Case(of_dy=_expanded, activation="relu"),
    "channels_last_gradient": Case(of_dy=_channels_last),
    "strided": Case(layout=lambda x: torch.stack([x, x], dim=-1)[..., 0], missing=(), repeats=0),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_planned_calls_have_the_bits_of_the_ops(case: Case, repeated: Plans, device: str) -> None:
    # The first call records the forward and the backward; the second repeats both.
    for seed in (1, 2):
        expected = case.run(case.tensors(device, seed), _op)
        _assert_equal(case.run(case.tensors(device, seed), _ours), expected)
    assert len(repeated) == case.repeats


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_calls_without_gradients_are_planned(training: bool, repeated: Plans, device: str) -> None:
    case = Case(activation="relu", training=training, missing=())
    for seed in (1, 2):
        found, expected = case.tensors(device, seed), case.tensors(device, seed)
        for t, function in ((found, _ours), (expected, _op)):
            dy = t.pop("dy")
            with torch.no_grad():
                t["y"] = function(**t, training=training, momentum=0.1, activation="relu")
            t["dy"] = dy
        _assert_equal(found, expected)
    assert len(repeated) == 1


def test_the_residual_may_be_x(repeated: Plans, device: str) -> None:
    case = Case(activation="relu", missing=())
    for seed in (1, 2):
        found, expected = (
            (lambda t: t | {"residual": t["x"]})(case.tensors(device, seed)) for _ in range(2)
        )
        results = []
        for t, function in ((found, _ours), (expected, _op)):
            x = t["x"].requires_grad_()
            y = function(x=x, residual=x, weight=t["weight"], training=True, activation="relu")
            results.append((y, *torch.autograd.grad(y, x, t["dy"])))
        assert all(map(torch.equal, *results))
    assert len(repeated) == 2
    _assert_equal(*(case.run(case.tensors(device, 3), f) for f in (_ours, _op)))


def test_tensors_that_overlap_are_never_planned(repeated: Plans, device: str) -> None:
    for seed in (1, 2, 3):
        t = Case().tensors(device, seed)
        y = _ours(x=t["x"], weight=t["weight"], bias=t["weight"], training=True)
        expected = _op(x=t["x"], weight=t["weight"], bias=t["weight"], training=True)
        assert torch.equal(y, expected)
    assert not repeated


def test_the_number_of_plans_is_bounded(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(eager, "MAX_PLANS", 3)
    for seed in range(8):
        # Another shape or another layout at every call.
        layout = _channels_last if seed % 2 else _plain
        case = Case((3 + seed // 2, 3, 2, 2), layout=layout, activation="relu")
        _assert_equal(*(case.run(case.tensors(device, seed), f) for f in (_ours, _op)))
        assert len(eager._plans) <= 3
    assert len(eager._plans) == 3


def test_a_module_that_moves_between_dtypes(repeated: Plans, device: str) -> None:
    module = BatchNorm2d(8, activation="relu", backend="triton", device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16):
        module.to(dtype)
        other = BatchNorm2d(8, activation="relu", backend="triton", device=device).to(dtype)
        other.load_state_dict(module.state_dict())
        x = Case().tensors(device, 1)["x"].to(dtype)
        y = module(x)
        with _SeesDispatch():
            assert torch.equal(y, other(x))
        assert y.dtype == dtype
        _assert_equal(module.state_dict(), other.state_dict())
    assert len(repeated) == 2


def test_a_module_that_moves_to_another_device(repeated: Plans, device: str) -> None:
    t = Case().tensors(device, 1)
    module = BatchNorm2d(8, backend="triton", device=device)
    expected = module(t["x"])
    module(t["x"])
    with pytest.raises(RuntimeError, match="on the same device, but `x` is on"):
        module.to("meta")(t["x"])
    module = BatchNorm2d(8, backend="triton", device=device)
    assert torch.equal(module(t["x"]), expected)
    assert len(repeated) == 2
