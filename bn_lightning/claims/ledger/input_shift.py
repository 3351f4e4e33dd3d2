"""Whether a network with BatchNorm is robust to shifts of its input, as trained and adapted."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
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
_SIZES = (2, 8, _ADAPTED, 512)
_BRIGHTNESS = 0.3
_LEAST = 5.0  # points of accuracy

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

    def logits_of(x: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Return the logits, with statistics adapted on the chosen inputs."""
        if chosen is None:
            return model.network(x)
        with adapt_batchnorm(model.network, [x[chosen]]):
            return model.network(x)

    found = {"clean": _points(logits_of(x), target)}
    errors = []
    for shift, strengths in STRENGTHS.items():
        for strength in strengths:
            there = shifted(x, shift, strength)
            logits = logits_of(there)
            name = f"{shift} {strength:g}"
            found[name] = _points(logits, target)
            if has_norm:
                found[f"{name}, adapted"] = _points(logits_of(there, order[:_ADAPTED]), target)
            errors.append(_calibration_error(logits, target))
    found["calibration error, shifted"] = sum(errors) / len(errors)
    for ending in ("", ", adapted"):
        names = [f"{shift} {s:g}" for shift, all_s in STRENGTHS.items() for s in all_s]
        # Without BatchNorm there is nothing to adapt.
        values = [found.get(f"{name}{ending}", found[name]) for name in names]
        found[f"shifted{ending}"] = sum(values) / len(values)
    if not has_norm:
        return found
    there = shifted(x, "brightness", _BRIGHTNESS)
    for size in _SIZES:
        found[f"adapted on {size}"] = _points(logits_of(there, order[:size]), target)
    of_one_class = order[target[order] == target[order[0]]][:_ADAPTED]
    found["adapted on one class"] = _points(logits_of(there, of_one_class), target)
    return found


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
        found |= {
            f"{activation}, shifted": measures["shifted"],
            f"{activation}, shifted, adapted": measures["shifted, adapted"],
            f"{activation}, brightness": measures[brightness],
            f"{activation}, lost adapted": measures["clean"]
            - measures.get(f"{brightness}, adapted", math.nan),
            f"{activation}, lost on one class": measures["clean"]
            - measures.get("adapted on one class", math.nan),
            f"{activation}, calibration error": measures["calibration error, shifted"],
        }
    return found


def _conditions(activation: str) -> tuple[Condition, ...]:
    at = f"{activation}, brightness +{_BRIGHTNESS:g}"
    worse = {"relu": {"least": 10.0}, "sigmoid": {"most": 10.0}}[activation]
    return (
        Condition(
            f"{activation}, as trained, mean of all shifts",
            f"{activation}, shifted",
            "batch",
            "none",
            least=_LEAST,
            unit="points",
        ),
        Condition(
            f"{activation}, statistics adapted on {_ADAPTED} inputs, mean of all shifts",
            f"{activation}, shifted, adapted",
            "batch",
            "none",
            least=_LEAST,
            unit="points",
        ),
        Condition(
            f"{at}: without is {'better' if activation == 'relu' else 'not better'}",
            f"{activation}, brightness",
            "none",
            "batch",
            unit="points",
            is_control=True,
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
            f"{at}: lost when adapted on one class",
            f"{activation}, lost on one class",
            "batch",
            kind="value",
            least=_LEAST,
            unit="points",
            is_control=True,
        ),
    )


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
                along={
                    "": {
                        "clean": 0.0,
                        **{f"brightness {s:g}": s for s in STRENGTHS["brightness"]},
                    },
                    f"adapted on {_ADAPTED}": {
                        f"brightness {s:g}, adapted": s for s in STRENGTHS["brightness"]
                    },
                },
            ),
            Curves(
                "clean",
                f"accuracy at brightness +{_BRIGHTNESS:g}, %",
                "unlabelled inputs adapted on",
                along={"adapted": {f"adapted on {size}": float(size) for size in _SIZES}},
            ),
        ),
        not_varied="torch's own initialization, 3,000 steps, batches of 60, one learning rate an "
        f"activation (.1 with ReLUs, 1 with sigmoids); the first {_TESTED:,} test images.",
        would_change="Shifts in training (augmentation); convolutions; shifts that a linear change "
        "of each unit cannot undo, such as rotation and inversion, which dominate the mean if more "
        "of them are in it.",
        least_steps=100,
    )
)
