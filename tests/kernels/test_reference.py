"""The definition against torch's BatchNorm in fp64, its gradients against finite differences."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bn_lightning.kernels import activations, reference
from bn_lightning.kernels.arguments import Backward

# fp64 against fp64: two orders of the same few sums, values up to about 10.
TOLERANCE = {"rtol": 1e-10, "atol": 1e-11}

SHAPES = {
    "rows": (7, 3),
    "m_is_2": (2, 3),
    "sequence": (4, 3, 5),
    "one_channel": (5, 1, 2),
    "images": (2, 3, 4, 5),
    "volumes": (2, 3, 2, 3, 2),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
EPS = 1e-5


def _tensors(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    C = shape[1]

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=dtype)

    return {
        "x": normal(*shape) * 2 + 3,
        "weight": normal(C),
        "bias": normal(C),
        "running_mean": normal(C),
        "running_var": torch.rand(C, generator=g, dtype=dtype) + 0.5,
        "dy": normal(*shape) + 0.5,
    }


@modes
@shapes
def test_forward_and_running_statistics_are_torchs(shape: tuple[int, ...], training: bool) -> None:
    t = _tensors(shape)
    ours, theirs = (
        {k: v.clone() for k, v in t.items() if k.startswith("running")} for _ in range(2)
    )
    kwargs = {"training": training, "momentum": 0.3, "eps": EPS}
    y = reference.batch_norm(t["x"], t["weight"], t["bias"], **ours, **kwargs)
    expected = F.batch_norm(t["x"], weight=t["weight"], bias=t["bias"], **theirs, **kwargs)
    torch.testing.assert_close(y, expected, **TOLERANCE)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    assert training != torch.equal(ours["running_mean"], t["running_mean"])


@modes
@shapes
def test_backward_is_torchs(shape: tuple[int, ...], training: bool) -> None:
    t = _tensors(shape)
    x, weight, bias = (t[k].requires_grad_() for k in ("x", "weight", "bias"))
    y = F.batch_norm(x, t["running_mean"].clone(), t["running_var"].clone(), weight, bias, training)
    expected = torch.autograd.grad(y, (x, weight, bias), t["dy"])
    if training:
        mean, var = reference.batch_statistics(x)
    else:
        mean, var = t["running_mean"], t["running_var"]
    rstd = torch.rsqrt(var + EPS)
    ours = reference.batch_norm_backward(t["dy"], x, mean, rstd, weight, training=training)
    torch.testing.assert_close(ours, expected, **TOLERANCE)


@modes
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_forward_is_twice_differentiable(training: bool, affine: bool) -> None:
    t = _tensors((4, 2, 3))

    def forward(x: Tensor, *parameters: Tensor) -> Tensor:
        running = t["running_mean"].clone(), t["running_var"].clone()
        weight, bias = parameters or (None, None)
        return reference.batch_norm(x, weight, bias, *running, training=training, eps=EPS)

    names = ("x", "weight", "bias") if affine else ("x",)
    inputs = tuple(t[k].requires_grad_() for k in names)
    assert torch.autograd.gradcheck(forward, inputs)
    assert torch.autograd.gradgradcheck(forward, inputs)


ACTIVATION_CASES = {
    "identity": ("identity", False),
    "relu": ("relu", False),
    "relu6_residual": ("relu6", True),
    "silu_residual": ("silu", True),
    "tanh_residual": ("tanh", True),
}


@modes
@pytest.mark.parametrize(
    ("activation", "has_residual"), ACTIVATION_CASES.values(), ids=ACTIVATION_CASES.keys()
)
def test_fused_backward_is_autograds(activation: str, has_residual: bool, training: bool) -> None:
    t = _tensors((4, 2, 3))
    inputs = [t[k].requires_grad_() for k in ("x", "weight", "bias")]
    residual = torch.randn_like(t["x"]).requires_grad_() if has_residual else None
    running = t["running_mean"].clone(), t["running_var"].clone()
    z = reference.batch_norm(*inputs, *running, training=training, eps=EPS)
    z = z if residual is None else z + residual
    y = activations.activate(z, activation, 0.01)
    wanted = inputs if residual is None else [*inputs, residual]
    expected = torch.autograd.grad(y, wanted, t["dy"])
    saves = activations.ACTIVATIONS[activation].saves
    mean, rstd = _statistics(t, training)
    upper = activations.upper_branch(z, activation)
    call = Backward(
        t["dy"],
        t["x"],
        residual,
        y if saves is activations.Saves.OUTPUT and has_residual else None,
        reference.pack_mask(upper, channels_last=False) if "relu6" in activation else None,
        mean,
        rstd,
        t["weight"],
        t["bias"],
        channels_last=False,
        activation=activation,
        negative_slope=0.01,
    )
    ours = reference.fused_backward(call, training=training, eps=EPS)
    torch.testing.assert_close(ours[: len(wanted)], expected, **TOLERANCE)


def test_frozen_backward_needs_no_x() -> None:
    t = _tensors((4, 2, 3))
    mean, rstd = _statistics(t, training=False)
    call = Backward(
        t["dy"], t["x"], None, None, None, mean, rstd, t["weight"], None, False, "identity", 0.01
    )
    with_x, without_x = (
        reference.fused_backward(call._replace(x=x), training=False, eps=EPS)
        for x in (t["x"], None)
    )
    torch.testing.assert_close(without_x[0], with_x[0], **TOLERANCE)
    assert without_x[1] is None


def test_variance_survives_a_large_mean() -> None:
    # E[x^2] - E[x]^2 in fp32 has an error of about 1e10 * 2^-24 = 600 here.
    x = torch.randn(64, 3, 9, dtype=torch.float64) + 1e5
    x32 = x.float()
    _, var = reference.batch_statistics(x32)
    _, expected = reference.batch_statistics(x32.double())
    torch.testing.assert_close(var.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    x = _tensors((6, 3, 5), dtype=torch.float32)["x"].to(dtype)
    mean, var = reference.batch_statistics(x)
    assert mean.dtype == var.dtype == torch.float32
    y = reference.batch_norm(x, training=True)
    assert y.dtype == dtype
    torch.testing.assert_close(y, reference.batch_norm(x.float(), training=True).to(dtype))


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (0, 3)], ids=["row", "pixel", "empty"])
def test_too_few_values_raise_and_change_nothing(shape: tuple[int, ...]) -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        reference.batch_norm(torch.ones(shape), running_mean=mean, running_var=var, training=True)
    assert torch.equal(mean, torch.zeros(3)) and torch.equal(var, torch.ones(3))


def test_evaluation_without_running_statistics_raises() -> None:
    with pytest.raises(ValueError, match="`running_mean` and `running_var`"):
        reference.batch_norm(torch.ones(4, 3), training=False)


def test_an_output_that_says_nothing_of_the_derivative_raises() -> None:
    x, channels = torch.ones(4, 3), torch.ones(3)
    rest = (channels, channels, None, None, False, "silu", 0.01)
    with pytest.raises(ValueError, match="`y`.*silu.*pass `residual`"):
        reference.gradient_of_z(Backward(x, x, None, x, None, *rest))


def _statistics(t: dict[str, Tensor], training: bool) -> tuple[Tensor, Tensor]:
    if training:
        mean, var = reference.batch_statistics(t["x"])
    else:
        mean, var = t["running_mean"], t["running_var"]
    return mean, torch.rsqrt(var + EPS)
