"""Whether a network with BatchNorm is robust to shifts of its input, as trained and adapted."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from bn_lightning.callbacks.adapt_batch_norm import adapt_batchnorm
from bn_lightning.callbacks.running_statistics import batch_norms
from bn_lightning.claims.design import Claim, Condition, Curves, MeasuredPoint, Setting
from bn_lightning.claims.measured_network import MeasuredNetwork
from bn_lightning.claims.registry import register_claim

_RATES = {"relu": 0.1, "sigmoid": 1.0}
_TESTED = 2500  # inputs of the test set
_ADAPTED = 64
_SIZES = (2, 8, 32, _ADAPTED, 512)
_MIX = 16  # inputs that the statistics of training count for, beside those adapted on
_ALONE = 500  # inputs of the test set that are each adapted on alone
_BRIGHTNESS = 0.3
_LEAST = 5.0  # points of accuracy, and of calibration error

STRENGTHS = {
    "noise": (0.1, 0.2, 0.3, 0.4, 0.5),
    "blur": (0.5, 1.0, 1.5, 2.0, 3.0),
    "brightness": (0.1, 0.2, _BRIGHTNESS, 0.4, 0.5),
    "contrast": (0.2, 0.4, 0.55, 0.7, 0.85),
    "rotation": (10.0, 20.0, 30.0, 45.0, 60.0),
    "inversion": (0.2, 0.4, 0.6, 0.8, 1.0),
}
"""Shift of the input -> its strengths, see `shifted`."""


def shifted(x: Tensor, shift: str, strength: float) -> Tensor:
    """Return images under a shift of their distribution, the same in each call.

    Args:
        x: (N, C, H, W) in [0, 1].
        shift: a key of `STRENGTHS`.
        strength: standard deviation of Gaussian noise, or of a Gaussian blur in pixels; what is
            added to each pixel; the share of contrast that is lost; degrees; the share of the
            negative that is mixed in.

    Returns:
        (N, C, H, W); noise and brightness are clipped to [0, 1].

    Source: Hendrycks & Dietterich 2019, arXiv 1903.12261, for the kinds; their strengths are of
    ImageNet.
    """
    match shift:
        case "noise":
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
            return (x + strength * noise.to(x.device)).clamp(0, 1)
        case "blur":
            return _blurred(x, strength)
        case "brightness":
            return (x + strength).clamp(0, 1)
        case "contrast":
            return (x - 0.5) * (1 - strength) + 0.5
        case "rotation":
            return _rotated(x, math.radians(strength))
        case "inversion":
            return x * (1 - strength) + (1 - x) * strength
    raise ValueError(f"expected `shift` to be one of {', '.join(STRENGTHS)}, got {shift!r}")


def _blurred(x: Tensor, sigma: float) -> Tensor:
    reach = math.ceil(3 * sigma)
    offsets = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, -1)
    for weight, padding in ((kernel, (0, reach)), (kernel.transpose(2, 3), (reach, 0))):
        x = F.conv2d(x, weight, padding=padding, groups=x.shape[1])
    return x


def _rotated(x: Tensor, angle: float) -> Tensor:
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = x.new_tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(x), -1, -1)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def _settings(budget: str) -> Mapping[str, Setting]:
    return {
        activation: Setting(
            (
                f"model.network.activation={activation}",
                f"optimizer.lr={rate}",
                "trainer.max_steps=3000",
            ),
            rate,
            activation,
        )
        for activation, rate in _RATES.items()
    }


@torch.no_grad()
def _measure(network: MeasuredNetwork) -> Mapping[str, float]:
    model = network.model().eval()
    x, target = _test_inputs(network)
    # In random order: a file may be sorted by class.
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    has_norm = bool(batch_norms(model.network))
    logits = model.network(x)
    found = {"clean": _points(logits, target), "clean, error": _calibration_error(logits, target)}
    means: dict[str, list[float]] = {}
    for shift, strengths in STRENGTHS.items():
        for strength in strengths:
            there, name = shifted(x, shift, strength), f"{shift} {strength:g}"
            logits_of = {"": model.network(there)}
            # Without BatchNorm there is nothing to adapt.
            logits_of[", adapted"] = logits_of[""]
            if has_norm:
                logits_of[", adapted"] = _adapted(model.network, there, order[:_ADAPTED])
            for ending, logits in logits_of.items():
                points, error = _points(logits, target), _calibration_error(logits, target)
                means.setdefault(f"shifted{ending}", []).append(points)
                means.setdefault(f"shifted{ending}, error", []).append(error)
                if has_norm or not ending:
                    found[f"{name}{ending}"] = points
                    if shift == "brightness":
                        found[f"{name}{ending}, error"] = error
    found |= {name: sum(values) / len(values) for name, values in means.items()}
    return found | (_by_size(model.network, x, target, order) if has_norm else {})


def _by_size(network: nn.Module, x: Tensor, target: Tensor, order: Tensor) -> dict[str, float]:
    """Return the accuracy at one brightness, adapted on 1 to 512 inputs that are chosen alike."""
    there, ordered = shifted(x, "brightness", _BRIGHTNESS), target[order]
    # The turn of each input among those of its class.
    turn = (ordered[:, None] == ordered).tril(-1).sum(1)
    chosen_by = {
        "random": order,
        "balanced": order[turn.argsort(stable=True)],
        "one class": order[ordered == ordered[0]],
    }
    found = {}
    for name, chosen in chosen_by.items():
        for size in _SIZES:
            if size <= len(chosen):
                logits = _adapted(network, there, chosen[:size])
                found[f"adapted on {size}, {name}"] = _points(logits, target)
    for size in _SIZES:
        logits = _adapted(network, there, order[:size], _MIX)
        found[f"adapted on {size}, mixed"] = _points(logits, target)
    # A single input has no variance, so that without a mix all outputs would be equal.
    alone = order[:_ALONE]
    with adapt_batchnorm(network, mix=_MIX):
        logits = torch.cat([network(there[i : i + 1]) for i in alone.tolist()])
    return found | {"adapted on 1, mixed": _points(logits, target[alone])}


def _adapted(network: nn.Module, x: Tensor, chosen: Tensor, mix: float = 0.0) -> Tensor:
    """Return the logits of all inputs with statistics adapted on the chosen ones."""
    with adapt_batchnorm(network, [x[chosen]], mix=mix):
        return network(x)


def _test_inputs(network: MeasuredNetwork) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*network.data().test_dataloader(), strict=True)
    x, target = torch.cat(inputs)[:_TESTED], torch.cat(targets)[:_TESTED]
    if x.dim() != 4:
        raise ValueError(
            f"expected `data` to have images for the claim input_shift, got inputs of shape "
            f"{tuple(x.shape[1:])}; take other data"
        )
    return x, target


def _points(logits: Tensor, target: Tensor) -> float:
    """Return the accuracy in percent."""
    return 100 * float((logits.argmax(1) == target).float().mean())


def _calibration_error(logits: Tensor, target: Tensor) -> float:
    """Return the expected calibration error in percent, with 15 bins."""
    error: Callable[..., Tensor] = multiclass_calibration_error
    return 100 * float(error(logits.softmax(1), target, logits.shape[1], n_bins=15))


def _numbers(points: Sequence[MeasuredPoint]) -> Mapping[str, float]:
    found: dict[str, float] = {}
    for point in points:
        measures, activation = point.measures, point.setting.panel
        brightness = f"brightness {_BRIGHTNESS:g}"
        found |= {f"{activation}, {name}": measures[name] for name in _MEANS}
        found |= {
            f"{activation}, brightness": measures[brightness],
            f"{activation}, lost adapted": measures["clean"]
            - measures.get(f"{brightness}, adapted", math.nan),
            f"{activation}, lost on one class": measures["clean"]
            - measures.get(f"adapted on {_ADAPTED}, one class", math.nan),
        }
    return found


_MEANS = ("shifted", "shifted, adapted", "shifted, error", "shifted, adapted, error")


def _conditions(activation: str) -> tuple[Condition, ...]:
    at = f"{activation}, brightness +{_BRIGHTNESS:g}"
    worse = {"relu": {"least": 10.0}, "sigmoid": {"most": 10.0}}[activation]
    better = "better" if activation == "relu" else "not better"
    as_adapted = f"statistics adapted on {_ADAPTED} inputs"
    return (
        *(
            Condition(
                f"{activation}, {what}{how}, mean of all shifts",
                f"{activation}, shifted{ending}{of}",
                *arms,
                least=_LEAST,
                unit=unit,
            )
            for what, of, arms, unit in (
                ("", "", ("batch", "none"), "points of accuracy more"),
                (
                    "calibration, ",
                    ", error",
                    ("none", "batch"),
                    "points of calibration error more without BatchNorm",
                ),
            )
            for how, ending in (("as trained", ""), (as_adapted, ", adapted"))
        ),
        Condition(
            f"{at}: without is {better}",
            f"{activation}, brightness",
            "none",
            "batch",
            unit="points of accuracy more without BatchNorm",
            is_control=True,
            statement=f"{at}: without BatchNorm is {better}",
            **worse,  # type: ignore[arg-type]  # a bound
        ),
        Condition(
            f"{at}: lost when adapted on {_ADAPTED}",
            f"{activation}, lost adapted",
            "batch",
            kind="value",
            most=2.0,
            unit="points",
            is_control=True,
        ),
        Condition(
            f"{at}: lost when adapted on {_ADAPTED} of one class",
            f"{activation}, lost on one class",
            "batch",
            kind="value",
            least=_LEAST,
            unit="points",
            is_control=True,
        ),
    )


def _over_brightness(ending: str) -> Mapping[str, Mapping[str, float]]:
    """Return curves over the brightness, of a measure whose names have this ending."""
    strengths = STRENGTHS["brightness"]
    adapted = {f"brightness {s:g}, adapted{ending}": s for s in strengths}
    return {
        "": {f"clean{ending}": 0.0} | {f"brightness {s:g}{ending}": s for s in strengths},
        f"adapted on {_ADAPTED}": adapted,
    }


register_claim(
    Claim(
        name="input_shift",
        sentence="BatchNorm makes a network robust to shifts of its input.",
        source="A tutorial; with adapted statistics Schneider et al. 2020, arXiv 2006.16971, and "
        "Nado et al. 2020, arXiv 2006.10963. Against: Galloway et al. 2019, arXiv 1905.02161",
        base=("init=none",),
        arms={"batch": ("norm=batch",), "none": ("norm=none",)},
        settings=_settings,
        measure=_measure,
        numbers=_numbers,
        conditions=tuple(c for activation in _RATES for c in _conditions(activation)),
        curves=(
            Curves(
                "clean",
                "test accuracy, %",
                "brightness added",
                x_scale="linear",
                along=_over_brightness(""),
            ),
            Curves(
                "clean, error",
                "expected calibration error, %",
                "brightness added",
                x_scale="linear",
                along=_over_brightness(", error"),
            ),
            Curves(
                "clean",
                f"test accuracy, %,\nat brightness +{_BRIGHTNESS:g}",
                "unlabelled inputs adapted on",
                along={
                    **{
                        f"{kind} inputs": {f"adapted on {s}, {kind}": float(s) for s in _SIZES}
                        for kind in ("random", "balanced")
                    },
                    "of one class": {f"adapted on {s}, one class": float(s) for s in _SIZES},
                    f"mixed with {_MIX} of training": {
                        f"adapted on {s}, mixed": float(s) for s in (1, *_SIZES)
                    },
                },
            ),
        ),
        not_varied="torch's own initialization, 3,000 steps, batches of 60, one learning rate an "
        f"activation (.1 with ReLUs, 1 with sigmoids); the first {_TESTED:,} test images; a "
        f"calibration error of 15 bins. Adapted on 1 input, each of {_ALONE} images is normalized "
        "by itself.",
        would_change="Shifts in training (augmentation); convolutions; shifts that a linear change "
        "of each unit cannot undo, such as rotation and inversion, which dominate the mean if more "
        "of them are in it.",
        least_steps=100,
    )
)
