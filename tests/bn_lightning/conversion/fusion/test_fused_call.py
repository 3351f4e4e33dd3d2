"""call_batch_norm: when it fuses, and that the result does not change."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bn_lightning import BatchNorm2d
from bn_lightning.conversion.fusion.fused_call import activation_of, call_batch_norm

ACTIVATION_CASES = {
    "relu": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(0.3, inplace=True),
    "elu": nn.ELU(),
    "silu": nn.SiLU(inplace=True),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "hardswish": nn.Hardswish(),
    "mish": nn.Mish(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
}


@pytest.fixture
def calls(monkeypatch) -> list[tuple[Any, ...]]:
    """Calls of the kernels' function: (has a residual, activation, slope)."""
    recorded: list[tuple[Any, ...]] = []
    from bn_lightning.modules import batch_norm as module

    original = module.batch_norm

    def recording(*args: Any, **kwargs: Any) -> Tensor:
        residual = kwargs["residual"] is not None
        recorded.append((residual, kwargs["activation"], kwargs["negative_slope"]))
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "batch_norm", recording)
    return recorded


def batch_norm() -> BatchNorm2d:
    torch.manual_seed(0)
    bn = BatchNorm2d(3, dtype=torch.float64)
    nn.init.normal_(bn.weight)
    nn.init.normal_(bn.bias)
    return bn


def x(seed: int = 0, *shape: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (4, 3, 2, 2), generator=g, dtype=torch.float64) + 1


PLAIN = (False, "identity", 0.01)


class TestActivations:
    @pytest.mark.parametrize(
        ("name", "module"), ACTIVATION_CASES.items(), ids=ACTIVATION_CASES.keys()
    )
    def test_each_is_one_call(self, name, module, calls) -> None:
        y = call_batch_norm(batch_norm(), x(), x(1), module)
        assert calls == [(True, name, 0.3 if name == "leaky_relu" else 0.01)]
        torch.testing.assert_close(y, module(batch_norm()(x()) + x(1)), rtol=0, atol=1e-14)

    @pytest.mark.parametrize(
        "module",
        [nn.PReLU(dtype=torch.float64), nn.Softplus(), nn.ELU(alpha=2.0), nn.Hardtanh()],
        ids=lambda module: type(module).__name__,
    )
    def test_an_activation_that_the_kernels_lack_is_called_separately(self, module, calls) -> None:
        assert activation_of(module) is None
        y = call_batch_norm(batch_norm(), x(), None, module)
        assert calls == [PLAIN]
        assert torch.equal(y, module(batch_norm()(x())))

    def test_a_subclass_of_an_activation_is_called_separately(self) -> None:
        class Shifted(nn.ReLU):
            def forward(self, input: Tensor) -> Tensor:
                return super().forward(input - 1)

        y = call_batch_norm(batch_norm(), x(), None, Shifted())
        assert torch.equal(y, (batch_norm()(x()) - 1).relu())

    def test_a_function_is_named(self, calls) -> None:
        y = call_batch_norm(batch_norm(), x(), x(1), ("leaky_relu", 0.2))
        assert calls == [(True, "leaky_relu", 0.2)]
        z = batch_norm()(x()) + x(1)
        torch.testing.assert_close(y, torch.nn.functional.leaky_relu(z, 0.2))

    def test_an_addition_alone(self, calls) -> None:
        y = call_batch_norm(batch_norm(), x(), x(1))
        assert calls == [(True, "identity", 0.01)]
        assert torch.equal(y, batch_norm()(x()) + x(1))


RESIDUALS = {
    "broadcast": x(1, 1, 3, 1, 1),
    "broadcasts_the_output": x(1, 2, 4, 3, 2, 2),
    "other_dtype": x(1).float(),
    "number": 3.0,
}


@pytest.mark.parametrize("residual", RESIDUALS.values(), ids=RESIDUALS.keys())
def test_other_residuals_are_added_as_before(residual, calls) -> None:
    y = call_batch_norm(batch_norm(), x(), residual, nn.ReLU())
    assert calls == [PLAIN]
    assert torch.equal(y, (batch_norm()(x()) + residual).relu())


def test_an_addition_in_place_keeps_shape_and_dtype() -> None:
    bn = batch_norm().float()
    y = call_batch_norm(bn, x().float(), x(1), nn.ReLU(), in_place=True)
    assert y.dtype == torch.float32
    with pytest.raises(RuntimeError, match="output with shape"):
        call_batch_norm(bn, x().float(), x(1, 2, 4, 3, 2, 2), in_place=True)


def hooks(module: nn.Module) -> dict[str, Any]:
    return {
        "forward": lambda f: module.register_forward_hook(lambda m, args, y: f()),
        "before": lambda f: module.register_forward_pre_hook(lambda m, args: f()),
        "backward": lambda f: module.register_full_backward_hook(lambda m, dx, dy: f()),
        "before_backward": lambda f: module.register_full_backward_pre_hook(lambda m, dy: f()),
    }


@pytest.mark.parametrize("kind", ["forward", "before", "backward", "before_backward"])
@pytest.mark.parametrize("on", ["bn", "activation"])
def test_hooks_are_called_without_fusion(on, kind, calls) -> None:
    bn, activation = batch_norm(), nn.ReLU()
    seen: list[None] = []
    handle = hooks(bn if on == "bn" else activation)[kind](lambda: seen.append(None))
    y = call_batch_norm(bn, x().requires_grad_(), None, activation)
    y.square().sum().backward()
    assert calls == [PLAIN] and len(seen) == 1
    handle.remove()
    call_batch_norm(bn, x(), None, activation)
    assert calls[1:] == [(False, "relu", 0.01)]


@pytest.mark.parametrize(
    "make",
    [lambda: nn.BatchNorm2d(3), lambda: BatchNorm2d(3, activation="tanh"), nn.Identity],
    ids=["torch", "with_an_activation", "identity"],
)
def test_other_modules_are_called_separately(make) -> None:
    module = make().double()
    y = call_batch_norm(module, x(), x(1), nn.ReLU())
    assert torch.equal(y, (make().double()(x()) + x(1)).relu())


def test_a_subclass_with_its_own_forward_is_called_separately() -> None:
    class Twice(BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    bn = Twice(3, dtype=torch.float64)
    y = call_batch_norm(bn, x(), None, nn.ReLU())
    assert torch.equal(y, (2 * BatchNorm2d(3, dtype=torch.float64)(x())).relu())
