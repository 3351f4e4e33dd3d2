"""Fused forwards: copies, pickles, compilers, and changes after fusion."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bn_lightning import convert_batchnorm, revert_batchnorm
from bn_lightning.conversion.fusion.forwards import FusedForward

# Only nn.Sequential; traced forwards; two graphs, one per mode.
NAMES = ["mlp", "resnet18", "densenet"]


def pair(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a fused network, an unfused copy, and an input."""
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    untouched = architecture.build()
    fused = copy.deepcopy(untouched)
    assert convert_batchnorm(fused, fuse=True).fused
    return fused, untouched, torch.randn(architecture.shape)


def forwards(module: nn.Module) -> list[Any]:
    found = [m.__dict__["forward"] for m in module.modules() if "forward" in m.__dict__]
    assert all(isinstance(forward, FusedForward) for forward in found)
    return found


@pytest.mark.parametrize("name", NAMES)
class TestWholeNetworks:
    @pytest.mark.parametrize(
        "duplicate",
        [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
        ids=["deepcopy", "pickle"],
    )
    def test_copies_are_fused_and_independent(self, name, duplicate, fused_calls) -> None:
        fused, untouched, x = pair(name)
        twin = duplicate(fused)
        assert len(forwards(twin)) == len(forwards(fused)) > 0
        with torch.no_grad():
            for parameter in fused.parameters():
                parameter.fill_(torch.nan)
        torch.manual_seed(1)
        y = twin(x)
        assert any(fused_calls)
        torch.manual_seed(1)
        torch.testing.assert_close(y, untouched(x))
        revert_batchnorm(twin)
        assert not forwards(twin) and forwards(fused)

    def test_traced_again(self, name) -> None:
        fused, untouched, x = pair(name)
        again = fx.symbolic_trace(fused.eval())
        torch.testing.assert_close(again(x), untouched.eval()(x))

    def test_types_names_and_representations_stay(self, name) -> None:
        fused, untouched, _ = pair(name)
        for (a, left), (b, right) in zip(
            fused.named_modules(), untouched.named_modules(), strict=True
        ):
            assert a == b and isinstance(left, type(right))
            if not isinstance(right, nn.modules.batchnorm._BatchNorm):
                assert type(left) is type(right)
        assert repr(fused).replace(", backend=auto", "") == repr(untouched)
        assert inspect.signature(fused.forward) == inspect.signature(untouched.forward)

    def test_functional_call(self, name) -> None:
        fused, untouched, x = pair(name)
        fused.eval()
        state = {k: v * 1.5 for k, v in untouched.state_dict().items()}
        untouched.load_state_dict(state)
        y = torch.func.functional_call(fused, state, (x,))
        torch.testing.assert_close(y, untouched.eval()(x))

    def test_autocast(self, name) -> None:
        fused, untouched, x = pair(name)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            a, b = fused.eval()(x), untouched.eval()(x)
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


# DenseNet only in evaluation: its dropout draws other numbers when compiled.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "training"),
    [("mlp", True), ("resnet18", True), ("densenet", False)],
    ids=lambda value: str(value),
)
def test_compiled_without_a_graph_break(name: str, training: bool) -> None:
    fused, untouched, x = pair(name)
    fused.train(training)
    untouched.train(training)
    torch.compiler.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), untouched(x))
    torch.testing.assert_close(fused.state_dict(), untouched.state_dict())


@pytest.mark.parametrize(
    ("name", "strict"),
    [("mlp", True), ("resnet18", False), ("densenet", False), ("conv1d", True)],
    ids=lambda value: str(value),
)
def test_exported(name: str, strict: bool) -> None:
    fused, untouched, x = pair(name)
    argument = next(iter(inspect.signature(untouched.forward).parameters))
    sizes = {argument: {0: torch.export.Dim.AUTO}}
    program = torch.export.export(fused.eval(), (x,), dynamic_shapes=sizes, strict=strict)
    assert program.graph_signature.user_inputs == (argument,)
    assert set(program.state_dict) == set(untouched.state_dict())
    y = program.module()(torch.cat([x, x]))
    torch.testing.assert_close(y, untouched.eval()(torch.cat([x, x])))


class Net(nn.Module):
    """Each test gives it a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.slope = 0.1
        self.flag = True


def net(forward: Callable[..., Any]) -> tuple[Net, Net]:
    torch.manual_seed(0)
    untouched = type("Forward", (Net,), {"forward": forward})().eval()
    fused = copy.deepcopy(untouched)
    assert convert_batchnorm(fused, fuse=True).fused == ("bn",)
    return fused, untouched


def image() -> Tensor:
    return torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(1))


class TestChanges:
    """Changes after fusion that make a trace invalid, so that the original runs."""

    def test_attributes(self, fused_calls) -> None:
        def forward(self, x):
            y = F.leaky_relu(self.bn(self.conv(x)), self.slope)
            return y if self.flag else -y

        fused, untouched = net(forward)
        for changes in ({}, {"slope": 0.5}, {"slope": 0.1, "flag": False}, {"flag": True}):
            for module in (fused, untouched):
                for name, value in changes.items():
                    setattr(module, name, value)
            torch.testing.assert_close(fused(image()), untouched(image()))
        assert fused_calls == [True, False, False, True]

    def test_replaced_modules(self, fused_calls) -> None:
        def forward(self, x):
            return self.relu(self.bn(self.conv(x)))

        fused, untouched = net(forward)
        changes = {
            "relu": [nn.Tanh(), nn.Softplus(), nn.ReLU()],
            "bn": [nn.Identity(), nn.BatchNorm2d(3, eps=1.0).eval()],
            "conv": [nn.Conv2d(3, 3, 1, bias=False)],
        }
        for name, modules in changes.items():
            for module in modules:
                setattr(fused, name, module)
                setattr(untouched, name, module)
                torch.testing.assert_close(fused(image()), untouched(image()))
        assert fused_calls == [True, False, True]

    def test_children_of_a_sequential(self, fused_calls) -> None:
        untouched = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()).eval()
        fused = copy.deepcopy(untouched)
        convert_batchnorm(fused, fuse=True)
        for change in (
            lambda m: m.append(nn.BatchNorm2d(3).eval()),
            lambda m: m.insert(2, nn.Tanh()),
            lambda m: m.pop(3),
            lambda m: m.__delitem__(1),
        ):
            change(fused)
            change(untouched)
            torch.testing.assert_close(fused(image()), untouched(image()))
        assert fused_calls == [True, True, True]

    def test_a_slice_of_a_sequential_is_its_own(self) -> None:
        untouched = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()).eval()
        fused = copy.deepcopy(untouched)
        convert_batchnorm(fused, fuse=True)
        for part in (slice(2), slice(1, 3), slice(0, 3)):
            torch.testing.assert_close(fused[part](image()), untouched[part](image()))
        x, y = image(), image()
        for a, b in zip(fused, untouched, strict=True):
            x, y = a(x), b(y)
            torch.testing.assert_close(x, y)

    @pytest.mark.parametrize("on", ["bn", "relu"])
    def test_hooks(self, on) -> None:
        def forward(self, x):
            return self.relu(self.bn(self.conv(x)))

        fused, untouched = net(forward)
        seen: list[list[Tensor]] = []
        for module in (fused, untouched):
            seen.append([])
            getattr(module, on).register_forward_hook(
                lambda m, args, y, to=seen[-1]: to.extend([args[0].clone(), y.clone()])
            )
            module(image())
        torch.testing.assert_close(*seen)


class TestArguments:
    def test_others_than_tensors_by_position(self, fused_calls) -> None:
        def forward(self, x, skip=None, scale=1.0):
            y = self.relu(self.bn(self.conv(x)))
            return (y if skip is None else y + skip) * scale

        fused, untouched = net(forward)
        x = image()
        for args, kwargs in (
            ((x,), {}),
            ((x, x), {}),
            ((), {"x": x}),
            ((x,), {"skip": x, "scale": 2.0}),
            ((x, None, 3.0), {}),
        ):
            torch.testing.assert_close(fused(*args, **kwargs), untouched(*args, **kwargs))
        assert fused_calls == [True, False, False, False, False]
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
            fused()

    def test_a_list_of_tensors_goes_to_the_original(self, fused_calls) -> None:
        def forward(self, x):
            return self.relu(self.bn(self.conv(x[0])))

        fused, untouched = net(forward)
        torch.testing.assert_close(fused([image()]), untouched([image()]))
        fused(torch.stack([image()]))
        assert fused_calls == [False, True]


def test_a_forward_called_through_its_class_is_the_original(fused_calls) -> None:
    def forward(self, x):
        return self.relu(self.bn(x))

    fused, _ = net(forward)
    type(fused).forward(fused, image())
    assert fused_calls == [False]


def test_another_caller_gets_the_plain_batch_norm(fused_calls) -> None:
    bn = nn.BatchNorm2d(3).eval()
    shared = nn.ModuleList([nn.Sequential(bn, nn.ReLU()), nn.Sequential(bn, nn.Flatten())])
    x = image()
    wanted = [bn(x).relu(), bn(x).flatten(1)]
    report = convert_batchnorm(shared, fuse=True)
    assert report.fused == ("0.0",)
    assert [torch.allclose(m(x), y) for m, y in zip(shared, wanted, strict=True)] == [True, True]
    assert torch.allclose(bn(x), nn.functional.batch_norm(x, bn.running_mean, bn.running_var))
    assert fused_calls == [True, False, False]
