"""Compare the Triton kernels with the definition in fp64, and their repeats with one another.

A case is a regime, a layout, a dtype and a fusion. Our error is at most torch's own at the same
dtype, or two units in the last place of the result's scale, which for y is its largest value and
for gradients that of the terms they are the difference of. Where the activation's argument is 0 up
to rounding dy is 0, because there rounding decides about the derivative of ReLU. Tensors that
torch.empty returns are filled with NaN. Repeats give the same bits.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bn_lightning.kernels import batch_norm
from bn_lightning.kernels.activations import ACTIVATIONS, activate
from bn_lightning.kernels.layout import as_layout
from bn_lightning.kernels.measurements import DTYPES, Fusion
from bn_lightning.kernels.schedule import Regime, forced_regime
from bn_lightning.kernels.sync_ops import batch_norm_stats

EPS = 1e-5
SLOPE = 0.01
# Below this share of its largest value the activation's argument counts as 0.
ROUNDING = 1e-5
FUSIONS = (("identity", False), ("relu", False), ("relu", True))


# The statuses of a check that ran to its end; that of another is why it did not.
ENDED = ("ok", "wrong", "not repeatable")


class Layout(NamedTuple):
    """The shape of x on a GPU and in the interpreter, and its order in memory."""

    shape: tuple[int, ...]
    small: tuple[int, ...]
    channels_last: bool


LAYOUTS = {
    "contiguous": Layout((32, 64, 28, 28), (3, 8, 4, 4), False),
    # Rows that begin at odd multiples of 2 bytes.
    "contiguous_odd": Layout((16, 97, 7, 7), (3, 5, 3, 3), False),
    "channels_last": Layout((32, 64, 28, 28), (3, 8, 4, 4), True),
    "channels_last_odd": Layout((8, 33, 9, 5), (3, 5, 3, 3), True),
    "rows": Layout((60, 100), (9, 16), False),
    # One more than a tile, and many splits.
    "rows_odd": Layout((10_241, 65), (9, 7), False),
    "volumes": Layout((2, 32, 8, 10, 12), (2, 16, 2, 1, 2), True),
    # 103 MB in bf16: every multiprocessor is busy for several waves.
    "large": Layout((256, 64, 56, 56), (3, 3, 40), False),
}


class Check(NamedTuple):
    """A case.

    Attributes:
        regime: forced.
        layout: a key of `LAYOUTS`.
        dtype: a key of `DTYPES`.
        fusion: what is computed.
        small: whether x has the shape for the interpreter.
        repeats: of a forward and backward.
    """

    regime: Regime
    layout: str
    dtype: str
    fusion: Fusion
    small: bool
    repeats: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of x."""
        layout = LAYOUTS[self.layout]
        return layout.small if self.small else layout.shape


def checks(small: bool) -> list[Check]:
    """List the cases: all regimes, layouts, dtypes and fusions, and every activation."""
    if small:
        some = product(Regime, ("contiguous", "channels_last_odd", "rows"))
        return [
            Check(regime, layout, "fp32", Fusion("relu", True, True), True, 2)
            for regime, layout in some
        ]
    return list(_on_a_gpu())


def _on_a_gpu() -> Iterator[Check]:
    # What is used most comes first, because time may run out.
    for fusion, dtype in product(FUSIONS, ("bf16", "fp32", "fp16")):
        for layout, regime in product(LAYOUTS, Regime):
            yield Check(regime, layout, dtype, Fusion(*fusion, True), False, 20)
    for activation, has_residual in product(ACTIVATIONS, (False, True)):
        if (activation, has_residual) not in FUSIONS:
            for regime in Regime:
                yield Check(
                    regime, "contiguous", "bf16", Fusion(activation, has_residual, True), False, 20
                )


def check(case: Check, device: str) -> list[dict[str, Any]]:
    """Run a case, and return its row.

    Its columns: the case; `status`, "ok", "wrong" or "not repeatable"; `worst`, the result whose
    error is the largest share of what is allowed; `share`, that share; `repeats`.
    """
    tensors = _tensors(case, device)
    torch.use_deterministic_algorithms(True)
    with forced_regime(case.regime):
        ours = _run(case, tensors, training=True, ours=True)
        equal = True
        for _ in range(case.repeats - 1):
            again = _run(case, tensors, training=True, ours=True)
            equal = equal and all(torch.equal(again[name], ours[name]) for name in ours)
        evaluated = _run(case, tensors, training=False, ours=True)
    torch.use_deterministic_algorithms(False)
    shares = _shares(case, tensors, ours, training=True)
    shares |= {
        f"{name} in evaluation": share
        for name, share in _shares(case, tensors, evaluated, training=False).items()
    }
    worst = max(shares, key=shares.__getitem__)
    status = "wrong" if not shares[worst] <= 1 else "ok" if equal else "not repeatable"
    return [_row(case, status, worst, f"{shares[worst]:.3g}")]


def failed_row(case: Check, reason: str) -> dict[str, Any]:
    """Return the row of a case that hung or crashed."""
    return _row(case, reason, "", "")


def _row(case: Check, status: str, worst: str, share: str) -> dict[str, Any]:
    return {
        "regime": case.regime.value,
        "layout": case.layout,
        "shape": "x".join(map(str, case.shape)),
        "dtype": case.dtype,
        "activation": case.fusion.activation,
        "residual": case.fusion.has_residual,
        "status": status,
        "worst": worst,
        "share": share,
        "repeats": case.repeats,
    }


def _tensors(case: Check, device: str) -> dict[str, Tensor]:
    layout, shape = LAYOUTS[case.layout], case.shape
    generator = torch.Generator(device).manual_seed(11)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    x, residual, dy = (
        as_layout(value.to(DTYPES[case.dtype]), layout.channels_last)
        for value in (draw(*shape) * 2 + 3, draw(*shape), draw(*shape) + 0.5)
    )
    C = shape[1]
    per_channel = {name: draw(C) for name in ("weight", "bias", "running_mean")}
    found = {"x": x, "residual": residual, "dy": dy} | per_channel | {"running_var": draw(C).exp()}
    t = {name: value.double() for name, value in found.items()}
    for state in ((None, None), (t["running_mean"], t["running_var"])):
        z = F.batch_norm(t["x"], *state, t["weight"], t["bias"], state[0] is None, eps=EPS)
        z = z + t["residual"] if case.fusion.has_residual else z
        dy.masked_fill_(z.abs() < ROUNDING * z.abs().max(), 0)
    return found


def _run(
    case: Check, tensors: dict[str, Tensor], *, training: bool, ours: bool
) -> dict[str, Tensor]:
    """Run a forward and a backward by the Triton kernels, or by torch in the tensors' dtype."""
    activation, has_residual, _ = case.fusion
    names = ["x", "weight", "bias", *(["residual"] if has_residual else [])]
    t = {name: value.clone() for name, value in tensors.items()}
    inputs = [t[name].requires_grad_() for name in names]
    running = t["running_mean"], t["running_var"]
    if ours:
        y = batch_norm(
            *inputs[:3],
            *running,
            training=training,
            eps=EPS,
            activation=activation,
            negative_slope=SLOPE,
            residual=t["residual"] if has_residual else None,
            backend="triton",
        )
    else:
        y = F.batch_norm(t["x"], *running, t["weight"], t["bias"], training, 0.1, EPS)
        y = activate(y + t["residual"] if has_residual else y, activation, SLOPE)
    gradients = torch.autograd.grad(y, inputs, t["dy"])
    found = {"y": y.detach(), "running_mean": running[0], "running_var": running[1]}
    # A stage of a synchronized BatchNorm; the others run the kernels of `two_pass`.
    found["statistics of a rank"] = batch_norm_stats(tensors["x"], triton=ours)
    return found | {f"d{name}": g for name, g in zip(names, gradients, strict=True)}


def _shares(
    case: Check, tensors: dict[str, Tensor], found: dict[str, Tensor], *, training: bool
) -> dict[str, float]:
    """Return for each result our error as a share of what is allowed; NaN becomes infinity."""
    theirs = _run(case, tensors, training=training, ours=False)
    exact = {name: value.double() for name, value in tensors.items()}
    true = _run(case, exact, training=training, ours=False)
    scales = _scales(exact, training)
    shares = {}
    for name, expected in true.items():
        scale = scales.get(name, expected).abs().max()
        error, their_error = (
            (value[name].double() - expected).abs().max() for value in (found, theirs)
        )
        # Sums of a 16-bit dy have its errors in them, whatever their own dtype.
        dtype = tensors["x"].dtype if name in ("dweight", "dbias") else found[name].dtype
        allowed = torch.maximum(their_error, 2 * torch.finfo(dtype).eps * scale)
        shares[name] = torch.nan_to_num(error / allowed, nan=torch.inf).item()
    return shares


def _scales(t: dict[str, Tensor], training: bool) -> dict[str, Tensor]:
    """Return the sizes of the terms whose differences and sums the gradients are, in fp64."""
    x = t["x"]
    dims = [d for d in range(x.dim()) if d != 1]
    state = (None, None) if training else (t["running_mean"], t["running_var"])
    x_hat = F.batch_norm(x, *state, training=training, eps=EPS)
    var = x.var(dims, correction=0) if training else t["running_var"]
    channels = (1, -1, *(1 for _ in dims[1:]))
    return {
        "dx": t["dy"] * (t["weight"] / var.sqrt()).reshape(channels),
        "dweight": (t["dy"] * x_hat).abs().sum(dims),
        "dbias": t["dy"].abs().sum(dims),
    }
