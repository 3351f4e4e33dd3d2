"""The eager path: planned calls have the bits of the ops, and what needs the ops goes to them."""

import contextlib
import dataclasses
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

import triton

from bn_lightning.kernels import batch_norm, eager, launch_plan, schedule, triton_launcher
from bn_lightning.kernels.arguments import BatchNormArguments
from bn_lightning.kernels.layout import as_layout
from bn_lightning.kernels.schedule import Regime, forced_regime
from bn_lightning.modules.batch_norm import BatchNorm2d

pytestmark = pytest.mark.usefixtures("nan_in_empty_tensors")

# L is a multiple of 8, so that a mask is possible in every regime.
SHAPE = (3, 3, 2, 4)
AFFINE = ("weight", "bias")
Plans = list[launch_plan.LaunchPlan]
RUNNING = ("running_mean", "running_var")


@pytest.fixture(autouse=True)
def no_plans_and_small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget all plans, and cut tiles to 128 elements."""
    for name, value in {"REDUCTION_BYTES": 512}.items():
        monkeypatch.setattr(schedule, name, value)
    schedule._make_schedule.cache_clear()
    eager._plans.clear()
    yield
    eager._plans.clear()
    schedule._make_schedule.cache_clear()


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> Plans:
    """The plans that were repeated, in order."""
    found: Plans = []
    launch = launch_plan.LaunchPlan.launch

    def spy(plan: launch_plan.LaunchPlan, addresses: Sequence[int]) -> list[Tensor]:
        found.append(plan)
        return launch(plan, addresses)

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
    "single_launch_silu": Case(regime=Regime.SINGLE_LAUNCH, activation="silu", missing=()),
    "several_splits": Case((9, 3, 4, 4), regime=Regime.TWO_PASS, activation="tanh", missing=()),
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
    # It is copied at every call.
    "odd_address_bf16": Case(
        layout=_misaligned, of_dy=torch.clone, dtype=torch.bfloat16, repeats=0
    ),
    "odd_gradient": Case(of_dy=_misaligned),
    "expanded_gradient": Case(of_dy=_expanded, activation="relu"),
    "channels_last_gradient": Case(of_dy=_channels_last),
    "strided": Case(layout=lambda x: torch.stack([x, x], dim=-1)[..., 0], missing=(), repeats=0),
}


# Of the fast tests; the others differ in one respect from one of them.
FAST = ("two_pass", "channels_last", "cumulative", "evaluation", "odd_address")
FAST += ("expanded_gradient", "strided", "bf16_parameters", "odd_address_bf16")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[] if name in FAST else pytest.mark.slow)
        for name, case in CASES.items()
    ],
)
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
    # Nobody reads mean and rstd of an evaluation.
    ((plan,),) = eager._plans.values()
    assert bool(plan.forward.scratch_bytes) is training


@pytest.mark.parametrize("layout", [_plain, _channels_last], ids=["contiguous", "channels_last"])
def test_pairs_of_bf16_begin_at_multiples_of_4_bytes(layout, device: str) -> None:
    x = layout(torch.randn(SHAPE, device=device).bfloat16())
    odd = _misaligned(x)
    assert odd.data_ptr() % 4
    dense = as_layout(odd, layout is _channels_last)
    assert dense.data_ptr() % 4 == 0
    assert torch.equal(dense, x) and dense.stride() == x.stride()
    assert as_layout(x, layout is _channels_last).data_ptr() == x.data_ptr()


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
    # The addresses of such a call do not tell which is which.
    assert not repeated
    _assert_equal(*(case.run(case.tensors(device, 3), f) for f in (_ours, _op)))


def test_tensors_that_overlap_are_never_planned(repeated: Plans, device: str) -> None:
    for seed in (1, 2, 3):
        t = Case().tensors(device, seed)
        y = _ours(x=t["x"], weight=t["weight"], bias=t["weight"], training=True)
        expected = _op(x=t["x"], weight=t["weight"], bias=t["weight"], training=True)
        assert torch.equal(y, expected)
    assert not repeated


def test_the_number_of_plans_is_bounded(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(eager, "MAX_SHAPES", 3)
    for seed in range(6):
        # Another shape or another layout at every call.
        layout = _channels_last if seed % 2 else _plain
        case = Case((3 + seed // 2, 2, 2, 2), layout=layout, activation="relu")
        _assert_equal(*(case.run(case.tensors(device, seed), f) for f in (_ours, _op)))
        assert len(eager._plans) <= 3
    assert len(eager._plans) == 3


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_repetition_is_the_planned_call(training: bool, repeated: Plans, device: str) -> None:
    def fields(x: Tensor, residual: Tensor | None = None) -> tuple[Any, ...]:
        state = (torch.full((3,), 0.5, device=device), None, *torch.ones(2, 3, device=device))
        return (x, residual, *state, None, training, 0.1, 1e-5, "relu", 0.01)

    x = torch.randn(SHAPE, device=device, requires_grad=training)
    wanted = _batch_norm_of(given := fields(x))
    repeat = eager.find_repetition(given, "triton")
    assert repeat is not None and eager.find_repetition(given, "auto") is None
    found = repeat(again := fields(x))
    assert len(repeated) == 1 and torch.equal(found, wanted)
    assert torch.equal(given[4], again[4]) and torch.equal(given[5], again[5])
    if training:
        dy = torch.randn_like(x)
        torch.testing.assert_close(
            *(torch.autograd.grad(y, x, dy)[0] for y in (found, wanted)), rtol=0, atol=0
        )
    assert repeat(fields(x[:, :, :1])) is None
    assert repeat(fields(x, residual=torch.ones_like(x))) is None
    with forced_regime(Regime.TWO_PASS):
        assert repeat(fields(x)) is None


def _batch_norm_of(fields: tuple[Any, ...]) -> Tensor:
    return batch_norm(**BatchNormArguments._make(fields)._asdict(), backend="triton")


def test_a_module_that_moves_between_dtypes(repeated: Plans, device: str) -> None:
    module = BatchNorm2d(3, activation="relu", backend="triton", device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16):
        module.to(dtype)
        other = BatchNorm2d(3, activation="relu", backend="triton", device=device).to(dtype)
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
    module = BatchNorm2d(3, backend="triton", device=device)
    expected = module(t["x"])
    module(t["x"])
    with pytest.raises(RuntimeError, match="on the same device, but `x` is on"):
        module.to("meta")(t["x"])
    module = BatchNorm2d(3, backend="triton", device=device)
    assert torch.equal(module(t["x"]), expected)
    assert len(repeated) == 2


def test_a_plan_runs_on_its_device(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The current device may be another one, and then is again afterwards."""
    t = Case().tensors(device, 1)
    _ours(x=t["x"], training=True)
    ((plan,),) = eager._plans.values()
    current = [plan.forward.index + 1]

    @contextlib.contextmanager
    def guard(index: int) -> Iterator[None]:
        before, current[0] = current[0], index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", guard)
    used, allocated_on = [], []
    empty_strided = plan.forward.empty_strided

    def allocate(*arguments: Any) -> Tensor:
        allocated_on.append(current[0])
        return empty_strided(*arguments)

    plan.forward = dataclasses.replace(
        plan.forward,
        current_device=lambda: current[0],
        stream=lambda index: used.append((index, current[0])) or 0,
        empty_strided=allocate,
    )
    assert torch.equal(_ours(x=t["x"], training=True), _op(x=t["x"], training=True))
    assert used == [(plan.forward.index, plan.forward.index)]
    assert set(allocated_on) == {plan.forward.index}
    assert current == [plan.forward.index + 1]


def test_without_torchs_private_allocators_nothing_is_repeated(
    monkeypatch: pytest.MonkeyPatch, repeated: Plans, device: str
) -> None:
    monkeypatch.setattr(launch_plan, "EMPTY_STRIDED", {})
    case = CASES["two_pass"]
    for seed in (1, 2):
        _assert_equal(*(case.run(case.tensors(device, seed), f) for f in (_ours, _op)))
    assert not repeated


def test_results_in_inference_mode_are_inference_tensors(repeated: Plans, device: str) -> None:
    x = Case().tensors(device, 1)["x"]
    with torch.inference_mode():
        expected = _ours(x=x, training=True)
        found = _ours(x=x, training=True)
    assert len(repeated) == 1
    assert found.is_inference() and torch.equal(found, expected)


def test_an_unknown_triton_launches_as_it_documents(
    monkeypatch: pytest.MonkeyPatch, repeated: Plans, device: str
) -> None:
    monkeypatch.setattr(triton_launcher, "bind_launch", lambda *launch: None)
    case = CASES["two_pass"]
    for seed in (1, 2, 3):
        _assert_equal(*(case.run(case.tensors(device, seed), f) for f in (_ours, _op)))
    assert not repeated


def test_triton_3_6_gets_one_argument_for_each_parameter() -> None:
    """Nested like them; what stands in the place of a constant is not read."""
    calls: list[Any] = []
    types = ("*fp32", "constexpr", ("*fp32", ("i32", "constexpr"), "constexpr"), "fp32")
    start = triton_launcher._spread(lambda *arguments: calls.append(arguments), types)
    start("grid", "stream", (16, 32, 3, 0.5))
    assert calls == [("grid", "stream", 16, None, (32, (3, None), None), 0.5)]


@pytest.mark.parametrize("version", ["3.5.9", "3.8.0", "4.0.0"])
def test_only_known_versions_of_the_launcher_are_bound(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CudaLauncher:
        global_scratch_size = profile_scratch_size = 0

    compiled = types.SimpleNamespace(run=CudaLauncher())
    assert triton_launcher._is_known(compiled)
    assert not triton_launcher._is_known(types.SimpleNamespace(run=object()))
    compiled.run.profile_scratch_size = 8
    assert not triton_launcher._is_known(compiled)
    compiled.run.profile_scratch_size = 0
    monkeypatch.setattr(triton, "__version__", version)
    assert not triton_launcher._is_known(compiled)


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("is_chain", [True, False], ids=["chain", "function"])
def test_with_launch_hooks_triton_itself_launches(
    is_chain: bool, name: str, monkeypatch: pytest.MonkeyPatch, repeated: Plans, device: str
) -> None:
    case = Case(activation="relu")
    case.run(case.tensors(device, 1), _ours)
    runtime = triton.knobs.runtime
    if is_chain:
        monkeypatch.setattr(getattr(runtime, name), "calls", [print])
    else:
        monkeypatch.setattr(runtime, name, print)
    _assert_equal(*(case.run(case.tensors(device, 2), f) for f in (_ours, _op)))
    assert not repeated
    monkeypatch.undo()


class _SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Subclass(Tensor):
    pass


def _in_forward_mode(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            return function(x)

    return run


def _in_mode(mode: Any) -> Callable[..., Callable[[Tensor], Tensor]]:
    def wrap(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with mode():
                return function(x)

        return run

    return wrap


OBSERVED: dict[str, Callable[..., Callable[[Tensor], Tensor]]] = {
    "dispatch_mode": _in_mode(_SeesDispatch),
    "function_mode": _in_mode(_SeesFunctions),
    "fake": _in_mode(lambda: FakeTensorMode(allow_non_fake_inputs=True)),
    "vjp": lambda function: lambda x: torch.func.vjp(function, x)[0],
    "vmap": lambda function: lambda x: torch.func.vmap(function)(x[None])[0],
    "forward_mode": _in_forward_mode,
    "subclass": lambda function: lambda x: function(x.as_subclass(_Subclass)),
    "negative": lambda function: lambda x: function(torch._neg_view(-x)),
    "compile": lambda function: torch.compile(function, backend="aot_eager", fullgraph=True),
    "make_fx": lambda function: lambda x: make_fx(function)(x)(x),
}


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(wrap, id=name, marks=pytest.mark.slow if name == "compile" else [])
        for name, wrap in OBSERVED.items()
    ],
)
@pytest.mark.parametrize(
    "with_grad", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "grad"]
)
def test_what_has_to_see_a_call_does(
    with_grad: bool, wrap: Any, repeated: Plans, device: str
) -> None:
    t = Case().tensors(device, 1)
    x = t["x"].requires_grad_(with_grad)

    def function(x: Tensor) -> Tensor:
        return batch_norm(x, t["weight"], training=True, activation="relu", backend="triton")

    expected = function(x)
    function(x)
    assert len(repeated) == 1
    y = wrap(function)(x)
    assert len(repeated) == 1
    if not isinstance(y, FakeTensor):
        # In a transform ATen computes.
        torch.testing.assert_close(y.as_subclass(Tensor), expected, rtol=1e-5, atol=1e-5)
    function(x)
    assert len(repeated) == 2


def test_a_mode_sees_a_backward(repeated: Plans, device: str) -> None:
    case = Case(activation="relu", missing=())
    for seed in (1, 2):
        expected = case.run(case.tensors(device, 1), _op)
        case.run(case.tensors(device, seed), _ours)
    assert len(repeated) == 2
    t = case.tensors(device, 1)
    inputs = [t[k].requires_grad_() for k in ("x", "residual", *AFFINE)]
    dy = t.pop("dy")
    y = _ours(**t, training=True, momentum=0.1, activation="relu")
    with _SeesDispatch():
        found = torch.autograd.grad(y, inputs, dy)
    assert len(repeated) == 3
    wanted = [expected[f"d{k}"] for k in ("x", "residual", *AFFINE)]
    assert all(map(torch.equal, found, wanted))


def test_a_backward_may_run_twice(repeated: Plans, device: str) -> None:
    case = Case(activation="silu")
    case.run(case.tensors(device, 1), _ours)
    t = case.tensors(device, 2)
    x, dy = t["x"].requires_grad_(), t["dy"]
    y = _ours(x=x, weight=t["weight"], training=True, activation="silu")
    first = torch.autograd.grad(y, x, dy, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x, dy)


@pytest.mark.parametrize(
    ("activation", "changed"),
    [("identity", "x"), ("relu", "weight"), ("silu", "bias"), ("tanh", "y"), ("silu", "residual")],
)
def test_a_saved_tensor_that_changes_in_place_is_detected(
    activation: str, changed: str, device: str
) -> None:
    case = Case(activation=activation, missing=())
    case.run(case.tensors(device, 1), _ours)
    for seed in (2, 3):
        t = case.tensors(device, seed)
        dy = t.pop("dy")
        inputs = {k: t[k].requires_grad_() for k in ("x", "residual", *AFFINE)}
        y = _ours(**t, training=True, momentum=0.1, activation=activation)
        with torch.no_grad():
            (y if changed == "y" else inputs[changed]).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y, list(inputs.values()), dy)


def test_the_running_statistics_count_as_changed_in_place(repeated: Plans, device: str) -> None:
    t = Case().tensors(device, 1)
    state = {k: t[k] for k in (*RUNNING, "num_batches_tracked")}
    for step in range(1, 4):
        _ours(x=t["x"], training=True, **state)
        assert all(v._version == step for v in state.values())
    assert len(repeated) == 2


def _keep(value: Tensor) -> Tensor:
    return value


HOOKS: dict[str, Callable[[], Any]] = {
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "clone": lambda: torch.autograd.graph.saved_tensors_hooks(torch.clone, _keep),
    "contiguous": lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda v: v.clone(memory_format=torch.contiguous_format), _keep
    ),
    "odd_address": lambda: torch.autograd.graph.saved_tensors_hooks(_misaligned, _keep),
}


@pytest.mark.parametrize("hooks", HOOKS.values(), ids=HOOKS.keys())
def test_hooks_of_saved_tensors(hooks: Callable[[], Any], device: str) -> None:
    case = Case(layout=_channels_last, activation="relu", missing=())
    for seed in (1, 2, 3):
        expected = case.run(case.tensors(device, seed), _op)
        with hooks() if seed != 2 else contextlib.nullcontext():
            _assert_equal(case.run(case.tensors(device, seed), _ours), expected)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_a_checkpoint_repeats_plans_and_updates_once(
    use_reentrant: bool, repeated: Plans, device: str
) -> None:
    module = BatchNorm2d(3, activation="relu", backend="triton", device=device)
    other = BatchNorm2d(3, activation="relu", backend="triton", device=device)
    for step in range(3):
        t = Case().tensors(device, step)
        results = []
        for run in (lambda x: checkpoint(module, x, use_reentrant=use_reentrant), other):
            x = t["x"].clone().requires_grad_()
            run(x).backward(t["dy"])
            results.append(x.grad)
        assert torch.equal(*results)
    _assert_equal(module.state_dict(), other.state_dict())
    assert repeated


@pytest.mark.slow
def test_threads_share_plans(repeated: Plans, device: str) -> None:
    case = Case(activation="silu")
    expected = [case.run(case.tensors(device, seed), _op) for seed in range(4)]
    case.run(case.tensors(device, 0), _ours)
    found: dict[int, Any] = {}
    # One launch at a time: the interpreter keeps the grid in a global.
    lock = threading.Lock()

    def run(seeds: range) -> None:
        for seed in seeds:
            with lock:
                found[seed] = case.run(case.tensors(device, seed), _ours)

    threads = [threading.Thread(target=run, args=(range(i, 4, 2),)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        _assert_equal(found[seed], expected[seed])
    assert len(repeated) == 8
