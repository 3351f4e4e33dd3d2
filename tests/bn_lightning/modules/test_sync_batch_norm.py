"""Synchronized BatchNorm on several gloo ranks, compared with one process and the whole batch.

Functions whose names start with `rank_` run on the ranks (see the fixture `ranks`).
"""

import copy
import functools
import os
import pickle
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bn_lightning import BatchNorm1d, BatchNorm2d, BatchNorm3d
from bn_lightning.kernels import dispatch
from bn_lightning.kernels.sync_autograd import sync_batch_norm
from bn_lightning.modules.sync_batch_norm import (
    SyncBatchNorm,
    SyncBatchNorm1d,
    SyncBatchNorm2d,
    SyncBatchNorm3d,
    _warn_uninitialized,
)

needs_triton = pytest.mark.skipif(not dispatch.TRITON_INSTALLED, reason="Triton is not installed")

SPLITS = {"7+3": 7, "10+0": 10, "even": 5}
splits = pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
# Relative to the largest value of each result, for sums of 200 values of size 3.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
# Name -> activation, whether there is a residual. Together they cover every source of act' in the
# backward: none, z without a residual, the mask, y, z with a residual.
FUSED = {
    "plain": ("identity", False),
    "add": ("identity", True),
    "relu": ("relu", False),
    "add_relu": ("relu", True),
    "add_leaky_relu": ("leaky_relu", True),
    "add_tanh": ("tanh", True),
    "add_silu": ("silu", True),
}

C = 3
NAMES = ("y", "dx", "dresidual", "dweight", "dbias", "running_mean", "running_var")


def _tensors(dtype: torch.dtype, shape: tuple[int, ...] = (10, C, 4, 5)) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    return {
        "x": (torch.randn(shape, generator=g) * 2 + 3).to(dtype),
        "residual": torch.randn(shape, generator=g).to(dtype),
        "dy": (torch.randn(shape, generator=g) + 0.5).to(dtype),
        "weight": torch.randn(shape[1], generator=g).to(dtype),
        "bias": torch.randn(shape[1], generator=g).to(dtype),
    }


def _module(cls: type[nn.Module], t: dict[str, Tensor], **kwargs: Any) -> nn.Module:
    module = cls(t["weight"].numel(), dtype=t["weight"].dtype, **kwargs)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(t[name])
    return module


def _step(module: nn.Module, t: dict[str, Tensor], part: slice, add: bool) -> dict[str, Tensor]:
    """Run forward and backward for a part of the batch, and return the tensors of `NAMES`."""
    x, residual, dy = (t[k][part].clone() for k in ("x", "residual", "dy"))
    inputs = [x.requires_grad_(), *([residual.requires_grad_()] if add else [])]
    y = module(*inputs)
    y.backward(dy)
    gradients = [x.grad, residual.grad, *(getattr(module, k).grad for k in ("weight", "bias"))]
    found = [y.detach(), *gradients, module.running_mean, module.running_var]
    return {k: v for k, v in zip(NAMES, found, strict=True) if v is not None}


def _part(split: int) -> slice:
    return slice(0, split) if dist.get_rank() == 0 else slice(split, None)


def _summed(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum the gradients of the parameters over the ranks."""
    for name in ("dweight", "dbias"):
        dist.all_reduce(found[name])
    return found


def _assert_equal(
    found: dict[str, Tensor], whole: dict[str, Tensor], part: slice, tolerance: float
) -> None:
    assert found.keys() == whole.keys()
    for name, expected in whole.items():
        atol = tolerance * max(1.0, expected.abs().max().item())
        expected = expected[part] if name in NAMES[:3] else expected
        torch.testing.assert_close(found[name], expected, rtol=0, atol=atol, msg=name.__add__)


def rank_step(
    split: int, dtype: torch.dtype, activation: str, add: bool, channels_last: bool, backend: str
) -> None:
    t, part = _tensors(dtype), _part(split)
    if channels_last:
        t |= {k: v.to(memory_format=torch.channels_last) for k, v in t.items() if v.dim() == 4}
    options = {"activation": activation}
    module = _module(SyncBatchNorm2d, t, **options, backend=backend)
    whole = _step(_module(BatchNorm2d, t, **options), t, slice(None), add)
    found = _summed(_step(module, t, part, add))
    _assert_equal(found, whole, part, TOLERANCE[dtype])
    if channels_last and part != slice(10, None):
        assert found["y"].is_contiguous(memory_format=torch.channels_last)
    # All ranks must get the same bits.
    for name in ("running_mean", "running_var"):
        both = [torch.empty_like(found[name]) for _ in range(2)]
        dist.all_gather(both, found[name])
        assert torch.equal(*both)


@splits
@dtypes
@pytest.mark.parametrize(("activation", "add"), FUSED.values(), ids=FUSED.keys())
def test_equals_one_process(ranks, split, dtype, activation, add):
    ranks(rank_step, split, dtype, activation, add, False, "native")


@splits
def test_channels_last(ranks, split):
    ranks(rank_step, split, torch.float64, "relu", True, True, "native")


@needs_triton
@splits
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("activation", "add"), [("relu", True), ("silu", False)])
def test_triton(ranks, split, activation, add, channels_last):
    if torch.cuda.is_available():
        pytest.skip("two ranks would share one GPU, on which NCCL does not run")
    ranks(rank_step, split, torch.float32, activation, add, channels_last, "triton")


def rank_modules() -> None:
    """Compare each class, on its shapes, with our module on one process."""
    for cls, plain, shape in (
        (SyncBatchNorm1d, BatchNorm1d, (10, C)),
        (SyncBatchNorm1d, BatchNorm1d, (10, C, 5)),
        (SyncBatchNorm3d, BatchNorm3d, (10, C, 2, 3, 2)),
        (SyncBatchNorm, BatchNorm1d, (10, C)),
        (SyncBatchNorm, BatchNorm3d, (10, C, 2, 3, 2)),
    ):
        t, part = _tensors(torch.float64, shape), _part(4)
        whole = _step(_module(plain, t), t, slice(None), False)
        _assert_equal(_summed(_step(_module(cls, t), t, part, False)), whole, part, 1e-12)
    with pytest.raises(ValueError, match="expected at least 2D input"):
        SyncBatchNorm(C)(torch.ones(C))
    assert not isinstance(SyncBatchNorm(C), nn.SyncBatchNorm)


def test_modules(ranks):
    ranks(rank_modules)


def rank_statistics() -> None:
    """Compare the running statistics and the results of three steps with torch's."""
    for options in (
        {"momentum": None},
        {"momentum": 0.9, "eps": 1e-2},
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
    ):
        t, part = _tensors(torch.float64), _part(6)
        ours, plain = (_module(cls, t, **options) for cls in (SyncBatchNorm2d, nn.BatchNorm2d))
        for _ in range(3):
            y = plain(t["x"])
            torch.testing.assert_close(ours(t["x"][part]), y[part], rtol=0, atol=1e-12)
            t["x"] = t["x"] * 1.3 + 0.1
        assert ours.state_dict().keys() == plain.state_dict().keys()
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=1e-12)
    t = _tensors(torch.float32)
    ours = _module(SyncBatchNorm2d, t).to(torch.bfloat16)
    ours(t["x"][_part(6)])
    expected = (0.9 + 0.1 * t["x"].double().var((0, 2, 3))).to(torch.bfloat16)
    assert torch.equal(ours.running_var, expected)


def test_statistics(ranks):
    ranks(rank_statistics)


def rank_mixed_dtypes() -> None:
    t, part = _tensors(torch.float32), _part(6)
    t = {k: v.half().float() for k, v in t.items()}
    whole = _step(_module(BatchNorm2d, t), t, slice(None), False)
    module = _module(SyncBatchNorm2d, t)
    dtype = (torch.float16, torch.float32)[dist.get_rank()]
    mine = t | {k: t[k].to(dtype) for k in ("x", "residual", "dy")}
    found = _summed(_step(module, mine, part, False))
    assert found["y"].dtype == found["dx"].dtype == dtype
    # Half an ulp of fp16 at the largest value, on the fp16 rank.
    tolerance = 5e-4 if dtype == torch.float16 else 1e-5
    found = {k: v.float() for k, v in found.items()}
    _assert_equal(found, whole, part, tolerance)


def test_mixed_dtypes(ranks):
    ranks(rank_mixed_dtypes)


class Collectives(TorchDispatchMode):
    """Count the collectives that any code calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if "c10d" in namespace and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))

    def taken(self) -> dict[str, int]:
        seen, self.seen = dict(self.seen), Counter()
        return seen


def rank_collectives() -> None:
    x = torch.randn(4 * dist.get_rank(), C, 5)
    layers = nn.Sequential(SyncBatchNorm1d(C, activation="relu"), SyncBatchNorm1d(C))
    with Collectives() as collectives:
        y = layers(x)
        # In the first forward the ranks also compare their channels.
        assert collectives.taken() == {"all_gather_into_tensor": 2, "allgather_": 2}
        for requires_grad in (True, False):
            y = layers(x.detach().requires_grad_(requires_grad))
            assert collectives.taken() == {"all_gather_into_tensor": 2}
            y.backward(torch.ones_like(y))
            assert collectives.taken() == {"all_reduce": 2}
        with torch.no_grad():
            layers(x)
            assert collectives.taken() == {"all_gather_into_tensor": 2}
        layers.eval()(x)
        SyncBatchNorm1d(C, track_running_stats=False).eval()(x)
        layers.train()[0].freeze_stats()
        layers[0](x)
        assert collectives.taken() == {}


def test_one_collective_forward_and_one_backward(ranks):
    ranks(rank_collectives)


def rank_without_gradient() -> None:
    """A rank whose x needs no gradient joins the backward of a rank whose x needs one."""
    t, part = _tensors(torch.float64), _part(5)
    whole = _step(_module(BatchNorm2d, t), t, slice(None), False)
    x = t["x"][part].clone().requires_grad_(dist.get_rank() == 0)
    _module(SyncBatchNorm2d, t)(x).backward(t["dy"][part])
    if dist.get_rank() == 0:
        torch.testing.assert_close(x.grad, whole["dx"][part], rtol=0, atol=1e-12)


def test_a_rank_without_gradient_joins(ranks):
    ranks(rank_without_gradient)


def _second(module: nn.Module, t: dict[str, Tensor], part: slice, add: bool) -> list[Tensor]:
    """Return the gradients of a penalty on the first gradients."""
    x, residual, dy = (t[k][part].clone().requires_grad_() for k in ("x", "residual", "dy"))
    inputs = [x, *([residual] if add else [])]
    y = module(*inputs)
    first = torch.autograd.grad(y, [*inputs, *module.parameters()], dy, create_graph=True)
    # The penalty is linear in the parameters' gradients, so the ranks' penalties sum to the whole.
    penalty = sum((v**3).sum() for v in first[: len(inputs)])
    penalty = penalty + sum((v * u).sum() for v, u in zip(first[-2:], (2.0, 3.0), strict=True))
    wanted = [*inputs, dy, module.weight]
    return list(torch.autograd.grad(penalty, wanted, materialize_grads=True))


def rank_double_backward(activation: str, add: bool) -> None:
    for split in SPLITS.values():
        t, part = _tensors(torch.float64), _part(split)
        whole = _second(_module(BatchNorm2d, t, activation=activation), t, slice(None), add)
        found = _second(_module(SyncBatchNorm2d, t, activation=activation), t, part, add)
        dist.all_reduce(found[-1])
        for a, b in zip(found, whole, strict=True):
            atol = 1e-12 * max(1.0, b.abs().max().item())
            torch.testing.assert_close(a, b if b.dim() == 1 else b[part], rtol=0, atol=atol)


@pytest.mark.parametrize(("activation", "add"), FUSED.values(), ids=FUSED.keys())
def test_double_backward(ranks, activation, add):
    ranks(rank_double_backward, activation, add)


def rank_constant_upstream() -> None:
    """With a constant dy, dresidual is constant too; the other gradients are not."""
    t, part = _tensors(torch.float64), _part(7)
    found = []
    for module, rows in (
        (_module(BatchNorm2d, t, activation="relu"), slice(None)),
        (_module(SyncBatchNorm2d, t, activation="relu"), part),
    ):
        x, residual = (t[k][rows].clone().requires_grad_() for k in ("x", "residual"))
        y = module(x, residual)
        dx, _ = torch.autograd.grad(y, [x, residual], t["dy"][rows], create_graph=True)
        found.append(torch.autograd.grad((dx**3).sum(), x)[0])
    torch.testing.assert_close(found[1], found[0][part], rtol=0, atol=1e-12)


def test_double_backward_of_a_constant_upstream(ranks):
    ranks(rank_constant_upstream)


def rank_saved() -> None:
    def saved(dtype: torch.dtype, activation: str, add: bool, backend: str) -> int:
        """Return the bytes saved, without x, y, the residual and per-channel tensors."""
        module = SyncBatchNorm2d(C, activation=activation, backend=backend)
        x, residual = (torch.randn(4, C, 16, 16, dtype=dtype, requires_grad=True) for _ in "xr")
        packed: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda v: packed.append(v) or v, lambda v: v):
            y = module(x, residual if add else None)
        known = {v.data_ptr() for v in (x, y, residual)}
        return sum(v.nbytes for v in packed if v.data_ptr() not in known and v.numel() > C)

    for backend in ("native", *(["triton"] if dispatch.TRITON_INSTALLED else [])):
        for activation, add in FUSED.values():
            saves_mask = add and activation in ("relu", "leaky_relu")
            expected = 4 * C * 16 * 16 // 8 if saves_mask else 0
            assert saved(torch.bfloat16, activation, add, backend) == expected


def test_saved_for_backward(ranks):
    if torch.cuda.is_available():
        pytest.skip("Triton runs on CPU tensors only where there is no GPU")
    ranks(rank_saved)


def rank_checkpoint() -> None:
    t, part = _tensors(torch.float64), _part(7)
    plain, again, other = (_module(SyncBatchNorm2d, t) for _ in range(3))
    x = t["x"][part]
    found = []
    for module, options in ((plain, None), (again, False), (other, True)):
        leaf = x.clone().requires_grad_()
        call: Callable[..., Tensor] = module
        if options is not None:
            call = functools.partial(checkpoint, module, use_reentrant=options)
        y = call(leaf)
        y.backward(t["dy"][part])
        found.append((y, leaf.grad, module.weight.grad, *module.state_dict().values()))
    for each in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], each, strict=True))


def test_activation_checkpointing_updates_statistics_once(ranks):
    ranks(rank_checkpoint)


def rank_compiled(backend: str) -> None:
    # Inductor imports modules that torch has deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = nn.Sequential(
        nn.Conv2d(3, 8, 3), SyncBatchNorm2d(8, activation="silu"), nn.Conv2d(8, 8, 1)
    )
    block.append(SyncBatchNorm2d(8, activation="relu"))
    plain = copy.deepcopy(block)
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    x = torch.randn(4 - dist.get_rank(), 3, 6, 7)
    for _ in range(2):
        ys = [module(x) for module in (compiled, plain)]
        dy = torch.randn_like(ys[0])
        for y in ys:
            y.backward(dy)
        torch.testing.assert_close(*ys)
    for a, b in zip(block.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(block.state_dict(), plain.state_dict())
    # A new process group means a new graph, and a rank may switch from compiled to eager code.
    pair = dist.new_group([1, 0])
    block[1].process_group = pair
    compiled(x)
    with Collectives() as collectives:
        block(x)
    assert collectives.taken() == {"all_gather_into_tensor": 2}
    assert block[1]._group_compared == pair.group_name != block[3]._group_compared
    dist.destroy_process_group(pair)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.soak)])
def test_compiled_in_one_graph(ranks, backend):
    ranks(rank_compiled, backend)


def rank_compiled_collectives() -> None:
    found = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        targets = [str(node.target) for node in graph.graph.nodes]
        names = [t.split(".")[1] for t in targets if t.startswith("_c10d_functional")]
        found.append({k: v for k, v in Counter(names).items() if k != "wait_tensor"})
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    layers = nn.Sequential(SyncBatchNorm1d(C, activation="tanh"), SyncBatchNorm1d(C))
    x = torch.randn(4, C, requires_grad=True)
    backend = aot_autograd(fw_compiler=count, bw_compiler=count)
    y = torch.compile(layers, backend=backend, fullgraph=True)(x)
    y.backward(torch.ones_like(y))
    assert found == [{"all_gather_into_tensor": 2}, {"all_reduce": 2}]


def test_one_collective_each_way_when_compiled(ranks):
    ranks(rank_compiled_collectives)


def rank_opcheck() -> None:
    warnings.simplefilter("ignore", DeprecationWarning)
    torch._dynamo.reset()
    t = _tensors(torch.float32)
    zeros, ones, count = torch.zeros(C), torch.ones(C), torch.tensor(400.0, dtype=torch.float64)
    tensors = [t[k].requires_grad_() for k in ("x", "residual", "weight", "bias")]
    for activation in ("identity", "relu", "silu"):
        options = (1e-5, activation, 0.01, False, dist.group.WORLD.group_name)
        arguments = (*tensors, zeros, ones, count, *options)
        opcheck(torch.ops.bn_lightning.sync_batch_norm_elemt, arguments)
    opcheck(torch.ops.bn_lightning.check_count, (torch.ones(2, 2 * C + 2),))


def test_opcheck(ranks):
    ranks(rank_opcheck)


def rank_call_arguments() -> None:
    """Pass an activation for one call, as a fused call site does."""
    t, part = _tensors(torch.float64), _part(4)
    module = _module(SyncBatchNorm2d, t)
    y = module(t["x"][part], t["residual"][part], activation="relu")
    expected = _module(BatchNorm2d, t)(t["x"], t["residual"], activation="relu")
    torch.testing.assert_close(y, expected[part], rtol=0, atol=1e-12)


def test_arguments_of_a_call(ranks):
    ranks(rank_call_arguments)


def rank_few_values() -> None:
    rank = dist.get_rank()
    module = SyncBatchNorm1d(C)
    # One value on each rank is two in all.
    module(torch.ones(1, C) * rank)
    torch.testing.assert_close(module.running_mean, torch.full((C,), 0.05))
    before = copy.deepcopy(module.state_dict())
    for compiled in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        with pytest.raises(ValueError, match="more than 1 value per channel .* on all ranks"):
            compiled(torch.ones(rank, C))
        torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    # No values at all are allowed, as in plain BatchNorm.
    y = module(torch.ones(0, C, requires_grad=True))
    y.backward(torch.ones_like(y))
    assert y.shape == (0, C) and torch.equal(module.running_var, before["running_var"])
    assert torch.equal(module.weight.grad, torch.zeros(C))


def test_few_values(ranks):
    ranks(rank_few_values)


def rank_different_channels() -> str:
    channels = 3 + dist.get_rank()
    with pytest.raises(ValueError) as error:
        SyncBatchNorm1d(channels)(torch.ones(4, channels))
    with pytest.raises(ValueError, match="3 channels in fp64 on rank 0, 3 channels in fp32"):
        SyncBatchNorm1d(3)(torch.ones(4, 3, dtype=(torch.float64, torch.float32)[channels - 3]))
    return str(error.value)


def test_ranks_with_different_channels(ranks):
    first, second = ranks(rank_different_channels)
    assert first == second
    assert "got 3 channels in fp32 on rank 0, 4 channels in fp32 on rank 1" in first


def rank_groups() -> None:
    rank = dist.get_rank()
    # torch requires every rank to create every group.
    groups = [dist.new_group([0]), dist.new_group([1]), dist.new_group([1, 0])]
    t = _tensors(torch.float64)
    x = t["x"][_part(6)]
    with pytest.raises(ValueError, match=f"`process_group` to contain this rank, {rank}"):
        SyncBatchNorm2d(C, dtype=torch.float64, process_group=groups[1 - rank])(x)
    # With a group of one rank it is a plain BatchNorm.
    plain = BatchNorm2d(C, dtype=torch.float64)(x)
    alone = SyncBatchNorm2d(C, dtype=torch.float64, process_group=groups[rank])
    assert torch.equal(alone(x), plain)
    whole = BatchNorm2d(C, dtype=torch.float64)(t["x"])[_part(6)]
    y = SyncBatchNorm2d(C, dtype=torch.float64, process_group=groups[2])(x)
    torch.testing.assert_close(y, whole, rtol=0, atol=1e-12)
    for group in groups:
        if dist.get_rank(group) >= 0:
            dist.destroy_process_group(group)


def test_process_groups(ranks):
    ranks(rank_groups)


def rank_three() -> None:
    """Train in a group of two of the three ranks, the third alone; then in one group of all."""
    rank = dist.get_rank()
    pair, single = dist.new_group([0, 2]), dist.new_group([1])
    t = _tensors(torch.float64)
    parts = [slice(0, 3), slice(3, 3), slice(3, 10)]
    part, group = (slice(None), single) if rank == 1 else (parts[rank], pair)
    whole = _step(_module(BatchNorm2d, t), t, slice(None), False)
    found = _step(_module(SyncBatchNorm2d, t, process_group=group), t, part, False)
    for name in ("dweight", "dbias"):
        dist.all_reduce(found[name], group=group)
    _assert_equal(found, whole, part, 1e-12)
    found = _summed(_step(_module(SyncBatchNorm2d, t), t, parts[rank], False))
    _assert_equal(found, whole, parts[rank], 1e-12)


@pytest.mark.slow
def test_three_ranks(three_ranks):
    three_ranks(rank_three)


def rank_dies(how: str) -> str:
    group = dist.new_group([0, 1], timeout=timedelta(seconds=3))
    module = SyncBatchNorm1d(C, process_group=group)
    x = torch.randn(4, C, requires_grad=True)
    y = module(x)
    if dist.get_rank() == 1:
        if how == "is_killed":
            os._exit(9)
        return "skipped the backward"
    with pytest.raises(RuntimeError) as error:
        y.backward(torch.ones_like(y))
    return str(error.value)


@pytest.mark.slow
def test_a_rank_that_skips_a_backward_times_the_others_out(ranks):
    # The process is alive, so the others notice only by the timeout.
    message, _ = ranks(rank_dies, "skips")
    assert "3000ms" in message


def test_a_rank_that_dies_stops_the_others(ranks):
    with pytest.raises(RuntimeError) as error:
        ranks(rank_dies, "is_killed")
    first, second = str(error.value).split("\n")
    assert "onnection" in first and second == "rank 1: died with 9"


@pytest.fixture
def warn_again():
    _warn_uninitialized.cache_clear()
    yield
    _warn_uninitialized.cache_clear()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_without_a_process_group_it_is_plain_and_warns_once(warn_again, compiled):
    t = _tensors(torch.float32)
    ours, plain = (_module(cls, t, activation="relu") for cls in (SyncBatchNorm2d, BatchNorm2d))
    call = torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled else ours
    with pytest.warns(UserWarning, match="works as a plain BatchNorm"):
        y = call(t["x"])
    assert torch.equal(y, plain(t["x"]))
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)
    call(t["x"])
    ours.eval()(t["x"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SyncBatchNorm1d(C)(torch.randn(4, C))


def test_state_dict_is_torchs_and_copies_keep_options():
    module = SyncBatchNorm2d(C, activation="relu")
    torchs = nn.SyncBatchNorm(C)
    torchs.load_state_dict(module.state_dict())
    module.load_state_dict(torchs.state_dict())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is SyncBatchNorm2d and twin.process_group is None
        assert twin.activation == "relu"
    assert isinstance(module, BatchNorm2d)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"weight": torch.ones(4)}, RuntimeError, "weight"),
        ({"eps": 0.0}, ValueError, "eps"),
        ({"activation": "swish"}, ValueError, "`activation`"),
        ({"residual": torch.ones(4, C)}, ValueError, "`residual`.*shape"),
        ({"backend": "cuda"}, ValueError, "`backend`"),
        ({"momentum": None}, ValueError, "`num_batches_tracked`"),
        ({"running_var": None}, ValueError, "running_var"),
        ({"x": torch.ones(4, C, dtype=torch.int64)}, NotImplementedError, "`x`"),
        ({"x": torch.ones(C)}, ValueError, r"`x`.*\(N, C\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_arguments_raise_before_any_communication(change, error, match):
    # No group has this name, so using it would raise another error.
    arguments = {
        "x": torch.ones(4, C, 5),
        "running_mean": torch.zeros(C),
        "running_var": torch.ones(C),
    }
    with pytest.raises(error, match=match):
        sync_batch_norm(**arguments | change, group_name="none")
