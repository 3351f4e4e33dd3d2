"""Folding: the copy computes what the model computes in evaluation, with fewer layers."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, BasicBlock
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from bn_lightning import BatchNorm2d, convert_batchnorm, fold_batchnorm
from bn_lightning.conversion.fold import FoldError, find_foldable
from bn_lightning.modules.sync_batch_norm import (
    SyncBatchNorm,
    SyncBatchNorm1d,
    SyncBatchNorm2d,
    SyncBatchNorm3d,
)

TOLERANCES = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
}
# BatchNorms without a convolution or linear layer directly before them.
NOT_FOLDED: dict[str, set[str]] = {
    "densenet": {
        "features.4.0",
        "features.6",
        *(f"features.{i}.layer{j}.norm1" for i in (3, 5) for j in (0, 1)),
    },
    "conv1d": {"norm"},
}


def trained(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Give BatchNorms random statistics and parameters."""
    g = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, _BatchNorm):
            for tensor in (*m.parameters(), *m.buffers()):
                if tensor.is_floating_point():
                    tensor.data.copy_(torch.rand(tensor.shape, generator=g) + 0.5)
    return model.to(dtype)


def sequential(*modules: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return trained(nn.Sequential(*modules)).eval()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = trained(ARCHITECTURES[name].build(), dtype)
    before = copy.deepcopy(model.state_dict())
    names = {n for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    folded = fold_batchnorm(model)
    left = {n for n, m in folded.named_modules() if isinstance(m, _BatchNorm)}
    assert left == NOT_FOLDED.get(name, set())
    assert set(find_foldable(model).folded) == names - left
    assert model.training and not any(m.training for m in folded.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    x = torch.randn(ARCHITECTURES[name].shape, dtype=dtype)
    y = model.eval()(x)
    # Relative to the largest output, which has the scale of the terms of a sum.
    scale = y.abs().max()
    torch.testing.assert_close(folded(x) / scale, y / scale, **TOLERANCES[dtype])


LAYERS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "own_sync": (nn.Conv2d(4, 6, 3), SyncBatchNorm(6), (2, 4, 5, 5)),
    "sync1d": (nn.Linear(4, 6), SyncBatchNorm1d(6), (7, 4)),
    "sync2d": (nn.Conv2d(4, 6, 3), SyncBatchNorm2d(6, activation="relu"), (2, 4, 5, 5)),
    "sync3d": (nn.Conv3d(4, 6, 2), SyncBatchNorm3d(6), (2, 4, 3, 3, 3)),
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 5)),
    "conv2d_groups": (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "conv2d_reflect": (
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(6),
        (2, 4, 5, 5),
    ),
    "conv3d": (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), (2, 2, 3, 3, 3)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 5)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transposed2d_groups": (
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.BatchNorm2d(6),
        (2, 4, 5, 5),
    ),
    "transposed3d": (nn.ConvTranspose3d(2, 3, 2), nn.BatchNorm3d(3), (2, 2, 3, 3, 3)),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), (3, 4)),
    "linear_plain": (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, affine=False), (3, 4)),
    "conv_plain": (nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6, affine=False), (2, 4, 5)),
    "no_bias": (nn.Linear(4, 6), nn.BatchNorm1d(6, bias=False), (3, 4)),
    "one_feature": (nn.Linear(4, 1), nn.BatchNorm1d(1), (3, 4)),
    "sync": (nn.Conv2d(4, 6, 1), nn.SyncBatchNorm(6), (2, 4, 3, 3)),
}


@pytest.mark.parametrize(("layer", "norm", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_layers(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    model = sequential(layer, norm, nn.ReLU())
    folded = fold_batchnorm(model)
    assert not any(isinstance(m, _BatchNorm) for m in folded.modules())
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)


def test_all_layers_with_examples() -> None:
    """As parts of one model, which is exported once."""

    class Parts(nn.ModuleList):
        def forward(self, *inputs: Tensor) -> list[Tensor]:
            return [part(x) for part, x in zip(self, inputs, strict=True)]

    model = Parts(sequential(layer, norm, nn.ReLU()) for layer, norm, _ in LAYERS.values()).eval()
    inputs = [torch.randn(shape, dtype=torch.float64) for *_, shape in LAYERS.values()]
    folded = fold_batchnorm(model, inputs)
    assert not any(isinstance(m, _BatchNorm) for m in folded.modules())
    torch.testing.assert_close(folded(*inputs), model(*inputs), rtol=1e-12, atol=1e-12)


def test_a_linear_layer_over_sequences_is_refused() -> None:
    # (N, L, C) with L = C: both run, but Linear and BatchNorm1d take different dimensions.
    model = sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    folded = fold_batchnorm(model)
    with pytest.raises(ValueError, match=r"`input`.*\(N, C\).*got \(2, 6, 6\)"):
        folded(torch.randn(2, 6, 4, dtype=torch.float64))


def test_the_activation_of_a_batch_norm_is_kept() -> None:
    model = sequential(
        nn.Conv2d(3, 3, 1), BatchNorm2d(3, activation="leaky_relu", negative_slope=0.3)
    )
    folded = fold_batchnorm(model)
    assert "leaky_relu" in repr(folded)
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_converted_and_fused_model_is_folded_as_it_was() -> None:
    torch.manual_seed(0)
    model = trained(ARCHITECTURES["resnet18"].build())
    plain = repr(fold_batchnorm(model))
    convert_batchnorm(model, fuse=True)
    folded = fold_batchnorm(model)
    assert repr(folded) == plain and "BatchNorm" not in plain
    assert convert_batchnorm(model, fuse=True).fusable  # still
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-10, atol=1e-10)


def test_the_class_forward_set_on_the_instance_is_folded() -> None:
    model = trained(BasicBlock(4, 4, 1, None)).eval()
    model.forward = model.forward
    assert not find_foldable(model).skipped


def test_all_names_of_a_module_are_replaced() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.first = self.second = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.conv(x))

    model = trained(Aliased()).eval()
    folded = fold_batchnorm(model)
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x))


IMAGES = torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution and a BatchNorm; its forward is given by each test."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)


def output_read_twice(self, x):
    y = self.conv(x)
    return self.bn(y) + y


def convolution_called_twice(self, x):
    return self.bn(self.conv(x)) + self.conv(x)


def batch_norm_called_twice(self, x):
    return self.bn(self.conv(x)) + self.bn(x)


def weight_is_read(self, x):
    return self.bn(self.conv(x)) * self.conv.weight.sum()


def bias_is_read(self, x):
    return self.bn(self.conv(x)) * self.bn.bias.sum()


def a_number_is_read(self, x):
    return self.bn(self.conv(x)) * self.bn.eps


def something_between(self, x):
    return self.bn(self.conv(x).relu())


def branches(self, x):
    return self.bn(self.conv(x)) if x.sum() > 0 else x


# Forward -> a part of the reason without and with example inputs.
FORWARDS = {
    output_read_twice: ("directly before it", "reads the output of the layer"),
    convolution_called_twice: ("used more than once", "used elsewhere"),
    batch_norm_called_twice: ("used more than once", "an input of the model comes before it"),
    weight_is_read: ("reads `weight`", "reads the weights of the layer"),
    bias_is_read: ("reads `bias`", "reads its weights"),
    something_between: ("directly before it", "relu comes before it"),
}


def check_not_folded(model: nn.Module, expected: str, *examples: Tensor) -> None:
    """Check that nothing is folded, the reason, and that the copy computes the same."""
    model = trained(model).eval()
    (reason,) = find_foldable(model, *examples).skipped.values()
    assert expected in reason
    with pytest.warns(UserWarning, match="`model`.*to fold, got none") as warned:
        folded = fold_batchnorm(model, *examples)
    assert reason in str(warned[0].message)
    torch.testing.assert_close(folded(IMAGES), model(IMAGES), rtol=0, atol=0)


@pytest.mark.parametrize("examples", [(), (IMAGES,)], ids=["forwards", "examples"])
@pytest.mark.parametrize(
    ("forward", "why"), FORWARDS.items(), ids=[forward.__name__ for forward in FORWARDS]
)
def test_forwards_that_prevent_folding(
    forward: Callable[..., Any], why: tuple[str, str], examples: tuple[Tensor, ...]
) -> None:
    model = type("Forward", (Net,), {"forward": forward})()
    check_not_folded(model, why[len(examples)], *examples)


@pytest.mark.parametrize("forward", [branches, a_number_is_read], ids=lambda f: f.__name__)
def test_forwards_that_need_inputs(forward: Callable[..., Any]) -> None:
    model = type("Forward", (Net,), {"forward": forward})()
    check_not_folded(model, "Forward.forward of the model itself")


def test_a_forward_that_reads_a_number_of_a_folded_batch_norm() -> None:
    model = trained(type("Forward", (Net,), {"forward": a_number_is_read})()).eval()
    with pytest.raises(FoldError, match="`model`.*by calling them, got AttributeError"):
        fold_batchnorm(model, IMAGES)


def test_a_pair_that_is_folded() -> None:
    def forward(self, x):
        return self.bn(self.conv(x)) + x

    model = trained(type("Forward", (Net,), {"forward": forward})()).eval()
    assert find_foldable(model).folded == {"bn": "conv"}


def test_a_layer_that_another_module_calls_too() -> None:
    class Tapped(Net):
        def __init__(self) -> None:
            super().__init__()
            self.tap = nn.Sequential(self.conv)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) + self.tap(x)

    check_not_folded(Tapped(), "used more than once")


class Own(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def with_hook(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda m, args, y: None)
    return module


PAIRS: dict[str, tuple[Callable[[], list[nn.Module]], str]] = {
    "no_statistics": (
        lambda: [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)],
        "no running statistics",
    ),
    "subclass": (lambda: [nn.Conv2d(3, 3, 1), Own(3)], "Own is not torch's"),
    "hook_on_batch_norm": (
        lambda: [nn.Conv2d(3, 3, 1), with_hook(nn.BatchNorm2d(3))],
        "has hooks",
    ),
    "parametrized_batch_norm": (
        lambda: [
            nn.Conv2d(3, 3, 1),
            parametrize.register_parametrization(nn.BatchNorm2d(3), "weight", nn.Tanh()),
        ],
        "is parametrized",
    ),
    "hook_on_layer": (
        lambda: [with_hook(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)],
        "no convolution or linear layer that may be changed",
    ),
    "parametrized": (
        lambda: [
            parametrize.register_parametrization(
                nn.Conv2d(3, 3, 1, dtype=torch.float64), "weight", nn.Tanh()
            ),
            nn.BatchNorm2d(3),
        ],
        "no convolution or linear layer that may be changed",
    ),
    "linear_rows_of_pixels": (lambda: [nn.Linear(2, 3), nn.BatchNorm2d(3)], "not the features"),
    "linear_other_size": (lambda: [nn.Linear(2, 5), nn.BatchNorm2d(3)], "has 5 outputs"),
    "nothing_before": (lambda: [nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)], "no convolution"),
}


@pytest.mark.parametrize(("make", "why"), PAIRS.values(), ids=PAIRS.keys())
def test_pairs(make: Callable[[], list[nn.Module]], why: str) -> None:
    check_not_folded(nn.Sequential(*make()), why)


def test_the_forward_around_a_pair_must_be_traceable() -> None:
    class Taps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.features[0](x)
            return self.features[1](y) if y.sum() > 0 else y

    check_not_folded(Taps(), "Taps.forward of the model itself")


def test_a_model_with_none() -> None:
    with pytest.warns(UserWarning, match="0 BatchNorms folded, 0 skipped"):
        assert isinstance(fold_batchnorm(nn.Linear(2, 2)), nn.Linear)


def test_no_module() -> None:
    with pytest.raises(TypeError, match="`model`.*Module, got int"):
        fold_batchnorm(3)  # type: ignore[arg-type]


def test_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    block = trained(BasicBlock(3, 3, 1, None))
    block.bn2.register_forward_hook(lambda m, args, y: None)
    with caplog.at_level(logging.INFO, logger="bn_lightning.conversion.fold"):
        fold_batchnorm(block)
    assert "1 BatchNorms folded, 1 skipped\n  bn2: " in caplog.text
