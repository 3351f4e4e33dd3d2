"""Ghost BatchNorm compared with a loop over the parts, and with BatchNorm in evaluation."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bn_lightning
from bn_lightning import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from bn_lightning.kernels import dispatch
from bn_lightning.kernels.activations import activate
from bn_lightning.modules import ghost_batch_norm

needs_triton = pytest.mark.skipif(not dispatch.TRITON_INSTALLED, reason="Triton is not installed")
backends = pytest.mark.parametrize(
    "backend", ["native", pytest.param("triton", marks=needs_triton)]
)
# Class, shape of the input, ghost_size.
CASES: dict[str, tuple[type[nn.Module], tuple[int, ...], int]] = {
    "1d_rows": (GhostBatchNorm1d, (12, 3), 4),
    "1d": (GhostBatchNorm1d, (8, 3, 5), 4),
    "2d": (GhostBatchNorm2d, (6, 3, 2, 3), 2),
    "3d": (GhostBatchNorm3d, (4, 3, 2, 1, 3), 2),
    "uneven": (GhostBatchNorm1d, (11, 3), 3),  # parts of 4, 4 and 3
    "uneven_2d": (GhostBatchNorm2d, (5, 3, 2, 3), 2),
    "one_part": (GhostBatchNorm1d, (7, 3), 4),
    "small_batch": (GhostBatchNorm1d, (3, 3), 4),
}
cases = pytest.mark.parametrize(("cls", "shape", "ghost_size"), CASES.values(), ids=CASES)
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "cumulative": {"momentum": None},
    "plain": {"affine": False},
    "no_running_statistics": {"track_running_stats": False},
    "add_leaky_relu": {"activation": "leaky_relu", "negative_slope": 0.3},
}
# fp32 on values of about 3; each term is rounded by 2^-24.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def make(cls: type[nn.Module], ghost_size: int, device: str, **options: Any) -> nn.Module:
    """A module with random weight, bias and statistics."""
    module = cls(3, ghost_size=ghost_size, device=device, **options)
    generator = torch.Generator().manual_seed(8)
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(3, generator=generator) + 0.5)
    return module


def sample(shape: tuple[int, ...], device: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 2 + 3).to(device)


def parts_of(samples: int, ghost_size: int) -> list[range]:
    """The indices of each part, as the docstring of GhostBatchNorm2d says."""
    count = max(samples // ghost_size, 1)
    size, larger = divmod(samples, count)
    split = larger * (size + 1)
    return [range(p, split, larger) for p in range(larger)] + [
        range(split + p, samples, count - larger) for p in range(count - larger)
    ]


def by_definition(module: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    """Normalize each part by a BatchNorm of its own, in the dtype of x; updates the statistics."""
    parts = parts_of(len(x), module.ghost_size)
    y, found = torch.empty_like(x), []
    for part in parts:
        mean, var = (torch.zeros(3, dtype=x.dtype, device=x.device) for _ in range(2))
        chosen = torch.tensor([*part], device=x.device)
        normalized = F.batch_norm(
            x[chosen], mean, var, module.weight, module.bias, True, 1.0, module.eps
        )
        y = y.index_copy(0, chosen, normalized)
        found.append((mean, var))
    if module.track_running_stats:
        module.num_batches_tracked += 1
        momentum = module.momentum or 1 / module.num_batches_tracked.item()
        for running, batch in zip(
            (module.running_mean, module.running_var), zip(*found, strict=True), strict=True
        ):
            running.copy_((1 - momentum) * running + momentum * torch.stack(batch).mean(0))
    y = y if residual is None else y + residual
    return activate(y, module.activation, module.negative_slope)


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5, 7, 8, 31, 60])
@pytest.mark.parametrize("ghost_size", [2, 3, 16])
def test_parts_of_the_definition(samples: int, ghost_size: int) -> None:
    """Each sample is in one part, and only a small batch has a part below `ghost_size`."""
    parts = parts_of(samples, ghost_size)
    assert sorted(index for part in parts for index in part) == [*range(samples)]
    sizes = [*map(len, parts)]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(ghost_size, samples)


# The interpreter takes a second for each of the others.
FAST = {("1d_rows", "defaults"), ("uneven_2d", "add_leaky_relu"), ("2d", "cumulative")}
COMBINATIONS = [
    pytest.param(
        *(case, option, backend),
        id=f"{case}-{option}-{backend}",
        marks=[needs_triton] * (backend == "triton")
        + [pytest.mark.slow] * (backend == "triton" and (case, option) not in FAST),
    )
    for case in CASES
    for option in OPTIONS
    for backend in ("native", "triton")
]


@pytest.mark.parametrize(("case", "option", "backend"), COMBINATIONS)
def test_training_is_the_definition(case: str, option: str, backend: str, device: str) -> None:
    cls, shape, ghost_size = CASES[case]
    options = OPTIONS[option]
    module = make(cls, ghost_size, device, backend=backend, **options)
    exact = copy.deepcopy(module).double()
    with_residual = "activation" in options
    for seed in range(2):
        x, residual, dy = (sample(shape, device, seed + k) for k in (0, 10, 20))
        results = []
        for layer, dtype in ((module, torch.float32), (exact, torch.float64)):
            inputs = [x.to(dtype).requires_grad_(), *layer.parameters()]
            added = residual.to(dtype).requires_grad_() if with_residual else None
            inputs += [] if added is None else [added]
            forward = layer if layer is module else lambda *a: by_definition(exact, *a)
            y = forward(inputs[0], added)
            results.append([y, *torch.autograd.grad(y, inputs, dy.to(dtype))])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected.float(), **TOLERANCE)
        for name, value in exact.state_dict().items():
            ours = module.state_dict()[name]
            torch.testing.assert_close(ours, value.to(ours.dtype), **TOLERANCE, msg=name)


@cases
def test_evaluation_and_frozen_statistics_are_batch_norms(
    cls: type[nn.Module], shape: tuple[int, ...], ghost_size: int, device: str
) -> None:
    module = make(cls, ghost_size, device)
    plain = getattr(bn_lightning, cls.__name__.removeprefix("Ghost"))(3, device=device)
    plain.load_state_dict(module.state_dict())
    x, before = sample(shape, device, 0), copy.deepcopy(module.state_dict())
    expected = plain.eval()(x)
    assert torch.equal(module.eval()(x), expected)
    assert torch.equal(module.train().freeze_stats()(x), expected)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    # Without statistics, evaluation uses those of the whole batch, as BatchNorm does.
    module, plain = (make_untracked(kind, device) for kind in (cls, type(plain)))
    assert torch.equal(module.eval()(x), plain.eval()(x))


def make_untracked(cls: type[nn.Module], device: str) -> nn.Module:
    sizes = {"ghost_size": 2} if cls.__name__.startswith("Ghost") else {}
    return cls(3, track_running_stats=False, device=device, **sizes)


def test_checkpoints_load_both_ways(device: str) -> None:
    module, theirs = make(GhostBatchNorm2d, 2, device), nn.BatchNorm2d(3, device=device)
    assert isinstance(module, nn.BatchNorm2d)
    theirs.load_state_dict(module.state_dict())
    module.load_state_dict(theirs.state_dict())
    again = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    x = sample((6, 3, 2, 3), device, 0)
    assert torch.equal(again(x), module(x))
    assert "ghost_size=2" in repr(again)


def test_a_contiguous_input_is_not_copied(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    seen = []
    batch_norm = ghost_batch_norm.batch_norm

    def watched(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((x.data_ptr(), tuple(x.shape)))
        return batch_norm(x, *args, **kwargs)

    monkeypatch.setattr(ghost_batch_norm, "batch_norm", watched)
    x = sample((6, 3, 2, 3), device, 0)
    make(GhostBatchNorm2d, 2, device)(x)
    assert seen == [(x.data_ptr(), (2, 9, 2, 3))]


@backends
@pytest.mark.parametrize("shape", [(6, 3, 2, 3), (5, 3, 2, 3)], ids=["even", "uneven"])
def test_channels_last(shape: tuple[int, ...], backend: str, device: str) -> None:
    """The same values, and the layout of the input."""
    module = make(GhostBatchNorm2d, 2, device, backend=backend)
    x, residual = (sample(shape, device, seed) for seed in (0, 1))
    expected = copy.deepcopy(module)(x, residual, activation="relu")
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, residual)]
    y = module(*last, activation="relu")
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.contiguous(), expected, **TOLERANCE)


@backends
@pytest.mark.parametrize("samples", [6, 5], ids=["even", "uneven"])
def test_second_derivative(samples: int, backend: str, device: str) -> None:
    module = make(GhostBatchNorm1d, 2, device, backend=backend, activation="silu")
    exact = copy.deepcopy(module).double()
    x, dy, ddx = (sample((samples, 3), device, seed) for seed in range(3))
    results = []
    for layer, dtype in ((module, torch.float32), (exact, torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        y = layer(leaf) if layer is module else by_definition(exact, leaf, None)
        (dx,) = torch.autograd.grad(y, leaf, dy.to(dtype), create_graph=True)
        results.append(torch.autograd.grad(dx, [leaf, layer.weight], ddx.to(dtype)))
    for ours, expected in zip(*results, strict=True):
        # Differences of terms of about 10.
        torch.testing.assert_close(ours, expected.float(), rtol=1e-4, atol=1e-4)


def test_gradients_in_double_precision() -> None:
    module = GhostBatchNorm1d(2, ghost_size=2, activation="tanh").double()
    x, residual = (sample((5, 2, 2), "cpu", seed).double().requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(module, (x, residual))
    assert torch.autograd.gradgradcheck(module, (x, residual))


@pytest.mark.parametrize(
    "backend", ["native", pytest.param("triton", marks=[needs_triton, pytest.mark.slow])]
)
@pytest.mark.parametrize(
    ("samples", "momentum"), [(6, 0.3), (5, None)], ids=["even", "uneven_cumulative"]
)
def test_compiles_without_a_graph_break(
    samples: int, momentum: float | None, backend: str, device: str
) -> None:
    module = make(GhostBatchNorm1d, 2, device, momentum=momentum, backend=backend)
    eager = copy.deepcopy(module)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x = sample((samples, 3), device, seed)
        assert torch.equal(compiled(x), eager(x))
    torch.testing.assert_close(module.state_dict(), eager.state_dict(), rtol=0, atol=0)


@backends
def test_checkpointing_updates_the_statistics_once(backend: str, device: str) -> None:
    module = make(GhostBatchNorm1d, 2, device, backend=backend)
    plain = copy.deepcopy(module)
    x = sample((6, 3), device, 0).requires_grad_()
    y = checkpoint(module, x, use_reentrant=False)
    (dx,) = torch.autograd.grad(y, x, sample((6, 3), device, 1))
    (expected,) = torch.autograd.grad(plain(x), x, sample((6, 3), device, 1))
    assert torch.equal(dx, expected)
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("ghost_size", [1, 0, -3], ids=str)
def test_a_part_of_one_sample_is_refused(ghost_size: int) -> None:
    with pytest.raises(ValueError, match=f"`ghost_size`.*got {ghost_size}"):
        GhostBatchNorm1d(3, ghost_size=ghost_size)


@backends
def test_errors_change_nothing(backend: str, device: str) -> None:
    module = make(GhostBatchNorm1d, 2, device, backend=backend)
    before = copy.deepcopy(module.state_dict())
    x = sample((5, 3), device, 0)
    with pytest.raises(ValueError, match="`residual`.*shape"):
        module(x, x[:4])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(x[:1])
    with pytest.raises(ValueError, match="`activation`"):
        module(x, activation="swish")
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


def test_gradients_are_those_of_accumulated_micro_batches(device: str) -> None:
    """One backward of a ghost batch is the mean of backwards of its parts, normalized alone."""
    torch.manual_seed(0)
    ghost = nn.Sequential(nn.Linear(3, 3), make(GhostBatchNorm1d, 4, device), nn.Tanh()).to(device)
    plain = nn.Sequential(copy.deepcopy(ghost[0]), nn.BatchNorm1d(3, device=device), nn.Tanh())
    plain[1].load_state_dict(ghost[1].state_dict())
    x, target = (sample((12, 3), device, seed) for seed in (0, 1))
    F.mse_loss(ghost(x), target).backward()
    for part in parts_of(12, 4):
        chosen = torch.tensor([*part], device=device)
        (F.mse_loss(plain(x[chosen]), target[chosen]) / 3).backward()
    for ours, theirs in zip(ghost.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, **TOLERANCE)


def test_an_empty_batch_is_batch_norms(device: str) -> None:
    assert make(GhostBatchNorm1d, 2, device)(torch.empty(0, 3, device=device)).shape == (0, 3)


def test_conversion_fuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(GhostBatchNorm1d(3, ghost_size=2), nn.ReLU())
    x = sample((6, 3), "cpu", 0)
    expected = copy.deepcopy(network)(x)
    seen = []
    batch_norm = ghost_batch_norm.batch_norm

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs["activation"])
        return batch_norm(*args, **kwargs)

    monkeypatch.setattr(ghost_batch_norm, "batch_norm", watched)
    bn_lightning.convert_batchnorm(network, fuse=True)
    torch.testing.assert_close(network(x), expected)
    assert seen == ["relu"]
    bn_lightning.revert_batchnorm(network)
    assert type(network[0]) is GhostBatchNorm1d


def test_it_can_be_folded(device: str) -> None:
    network = nn.Sequential(nn.Linear(3, 3), make(GhostBatchNorm1d, 2, device)).to(device).eval()
    folded = bn_lightning.fold_batchnorm(network)
    assert not any(isinstance(module, nn.BatchNorm1d) for module in folded.modules())
    x = sample((5, 3), device, 0)
    torch.testing.assert_close(folded(x), network(x), **TOLERANCE)


@pytest.mark.filterwarnings("error")
def test_synchronization_leaves_it_alone() -> None:
    network = nn.Sequential(GhostBatchNorm1d(3, ghost_size=2))
    bn_lightning.FusedSyncBatchNorm().apply(network)
    assert type(network[0]) is GhostBatchNorm1d
