"""The three gradients: ours, torch at the same dtype, the reference in fp64."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from bn_lightning.kernels import backward, reference
from bn_lightning.kernels.schedule import Layout, Schedule, Tile, make_schedule

# A few units in the last place, for where torch's own error happens to be zero: of the largest
# value for dx, of the largest sum of absolute values for dweight and dbias, which are fp32 here
# whatever the dtype of x.
ABSOLUTE = {torch.float32: 5e-7, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

EPS = 1e-5
SHAPES = {
    "rows": (7, 3),
    "m_is_2": (2, 3),
    "l_is_1": (5, 3, 1),
    "one_channel": (6, 1, 5),
    "one_sample_in_space": (1, 3, 5),
    "65_channels": (3, 65, 2),
    "one_over_a_tile_of_rows": (129, 65),
    "one_over_a_tile_of_positions": (2, 3, 4097),
    "images": (3, 3, 5, 7),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
layouts = pytest.mark.parametrize("shape", [(11, 5), (5, 3, 9)], ids=["mc", "ncl"])


@pytest.fixture(autouse=True)
def nan_in_empty_tensors() -> Iterator[None]:
    """Fills what torch.empty returns with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclasses.dataclass
class Case:
    """Inputs of a backward, with the statistics its forward used."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    mean: Tensor
    var: Tensor
    training: bool

    @property
    def rstd(self) -> Tensor:
        return torch.rsqrt(self.var + EPS)


def _case(
    shape: tuple[int, ...], training: bool, device: str, dtype: torch.dtype = torch.float32
) -> Case:
    g = torch.Generator().manual_seed(4)
    C = shape[1]
    x = (torch.randn(shape, generator=g) * 2 + 3).to(device, dtype)
    dy = (torch.randn(shape, generator=g) + 0.5).to(device, dtype)
    weight, mean = (torch.randn(C, generator=g).to(device) for _ in range(2))
    var = (torch.rand(C, generator=g) + 0.5).to(device)
    if training:
        mean, var = reference.batch_statistics(x)
    return Case(x, dy, weight, mean, var, training)


def _gradients(case: Case, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    dweight, dbias = backward.affine_gradients(case.dy, case.x, case.mean, case.rstd, schedule)
    if case.training:
        dx = backward.training_input_gradient(
            case.dy, case.x, case.mean, case.rstd, case.weight, dweight, dbias, schedule
        )
    else:
        dx = backward.evaluation_input_gradient(case.dy, case.rstd, case.weight, schedule)
    return dx, dweight, dbias


def _torch_gradients(case: Case) -> tuple[Tensor, ...]:
    inputs = [t.detach().clone().requires_grad_() for t in (case.x, case.weight)]
    bias = torch.zeros_like(case.weight, requires_grad=True)
    y = F.batch_norm(
        inputs[0], case.mean.clone(), case.var.clone(), inputs[1], bias, case.training, 0.1, EPS
    )
    return torch.autograd.grad(y, (*inputs, bias), case.dy)


def _true_gradients(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    x = case.x.double()
    mean, var = case.mean.double(), case.var.double()
    if case.training:
        mean, var = reference.batch_statistics(x)
    return reference.batch_norm_backward(
        case.dy.double(), x, mean, torch.rsqrt(var + EPS), case.weight, training=case.training
    )


def _assert_three_way(case: Case, schedule: Schedule) -> None:
    ours, torchs, true = _gradients(case, schedule), _torch_gradients(case), _true_gradients(case)
    dims = [d for d in range(case.x.dim()) if d != 1]
    x_hat = reference.normalize(case.x.float(), case.mean, case.rstd, None, None)
    scales = (
        true[0].abs().max().clamp(min=1.0),
        (case.dy * x_hat).abs().sum(dims).max(),
        case.dy.float().abs().sum(dims).max(),
    )
    for a, b, t, scale in zip(ours, torchs, true, scales, strict=True):
        error, torch_error = ((v.double() - t).abs().max() / scale for v in (a, b))
        assert error <= 2 * torch_error + ABSOLUTE[a.dtype]


@dtypes
@modes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_gradients(shape: tuple[int, ...], training: bool, dtype: torch.dtype, device: str) -> None:
    case = _case(shape, training, device, dtype)
    _assert_three_way(case, make_schedule(shape, case.x.element_size()))


def _many_tiles(shape: tuple[int, ...], tiles_per_split: int) -> Schedule:
    """Returns a schedule with tiles of 2 x 4, so that a small tensor has many."""
    s = make_schedule(shape, 4)
    tiles = -(-s.N // 2) * (-(-s.L // 4) if s.layout is Layout.NCL else 1)
    tile = Tile(rows=2, columns=4, num_warps=1)
    return dataclasses.replace(
        s,
        reduction=tile,
        elementwise=tile,
        splits=-(-tiles // tiles_per_split),
        tiles_per_split=tiles_per_split,
    )


@modes
@layouts
@pytest.mark.parametrize("tiles_per_split", [1, 2, 100])
def test_gradients_over_many_tiles_and_splits(
    shape: tuple[int, ...], tiles_per_split: int, training: bool, device: str
) -> None:
    _assert_three_way(_case(shape, training, device), _many_tiles(shape, tiles_per_split))


@modes
@layouts
def test_two_runs_give_the_same_bits(shape: tuple[int, ...], training: bool, device: str) -> None:
    case = _case(shape, training, device)
    first, second = (_gradients(case, _many_tiles(shape, 2)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@modes
@layouts
def test_without_weight_its_gradient_is_that_of_ones(
    shape: tuple[int, ...], training: bool, device: str
) -> None:
    case = _case(shape, training, device)
    schedule = make_schedule(shape, 4)
    case.weight = torch.ones_like(case.weight)
    dx, dweight, dbias = _gradients(case, schedule)
    if training:
        plain = backward.training_input_gradient(
            case.dy, case.x, case.mean, case.rstd, None, dweight, dbias, schedule
        )
    else:
        plain = backward.evaluation_input_gradient(case.dy, case.rstd, None, schedule)
    assert torch.equal(plain, dx)
