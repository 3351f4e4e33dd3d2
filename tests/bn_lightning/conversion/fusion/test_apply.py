"""Whole models: who calls what, and what is told when nobody is known to."""

import torch
from torch import Tensor, nn

from bn_lightning import BatchNorm2d
from bn_lightning.conversion.fusion import fuse, is_fused, unfuse


class Branching(nn.Module):
    """Does not trace."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else x


class Chain(nn.Module):
    """Calls the children of a ModuleList one by one."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def pair() -> list[nn.Module]:
    return [BatchNorm2d(3), nn.ReLU()]


def test_children_of_a_module_list_are_called_by_who_holds_it() -> None:
    model = Chain(*pair(), *pair())
    assert fuse(model) == (["layers.0", "layers.2"], {})
    assert is_fused(model) and not is_fused(model.layers)


def test_grandchildren_called_by_their_names() -> None:
    class Reaches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 3, 1), BatchNorm2d(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.stem[1](self.stem[0](x)).relu()

    model = Reaches().eval()
    x = torch.randn(2, 3, 2, 2)
    wanted = model(x)
    assert fuse(model) == (["stem.1"], {})
    assert torch.allclose(model(x), wanted)


def test_what_is_inside_a_forward_that_does_not_trace_is_fused() -> None:
    assert fuse(Branching(nn.Sequential(*pair()))) == (["inner.0"], {})


def test_the_nearest_that_does_not_trace_is_named() -> None:
    fused, reasons = fuse(Branching(nn.ModuleDict({"a": Branching(BatchNorm2d(3))})))
    assert fused == []
    assert reasons == {
        "inner.a.inner": "Branching.forward of 'inner.a' is not known: it branches on the value of "
        "a tensor, or on a shape"
    }


def test_the_root_has_no_name() -> None:
    _, reasons = fuse(Branching(BatchNorm2d(3)))
    assert reasons["inner"].startswith("Branching.forward of the model itself is not known")


def test_nothing_follows() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), BatchNorm2d(3), nn.Flatten())
    assert fuse(model) == ([], {})
    assert not is_fused(model)


def test_an_activation_shared_by_all() -> None:
    relu = nn.ReLU(inplace=True)
    model = nn.Sequential(BatchNorm2d(3), relu, BatchNorm2d(3), relu)
    assert fuse(model) == (["0", "2"], {})


def test_a_forward_of_the_instances_own_is_left_alone() -> None:
    model = nn.Sequential(*pair())
    model.forward = own = lambda x: x
    fused, reasons = fuse(model)
    assert fused == [] and "the instance has a forward of its own" in reasons["0"]
    assert unfuse(model) == [] and model.forward is own


def test_the_forward_of_its_class_on_an_instance_is_no_other() -> None:
    """As Lightning leaves it after a fit in several processes."""
    model = Chain(*pair()).eval()
    model.forward = model.forward
    x = torch.randn(2, 3, 2, 2)
    wanted = model(x)
    assert fuse(model)[0] and is_fused(model)
    assert torch.allclose(model(x), wanted)
    unfuse(model)
    assert torch.equal(model(x), wanted)


def test_a_sequential_with_a_forward_of_its_own_is_traced() -> None:
    class Negative(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return -super().forward(input)

    model = Negative(*pair()).eval()
    x = torch.randn(2, 3, 2, 2)
    wanted = model(x)
    assert fuse(model) == (["0"], {})
    assert torch.allclose(model(x), wanted)


def test_unfused_is_as_before() -> None:
    model = nn.Sequential(Chain(*pair()), nn.Sequential(*pair()))
    before = [dict(m.__dict__) for m in model.modules()]
    fuse(model)
    assert unfuse(model) == ["0", "1"]
    assert [dict(m.__dict__) for m in model.modules()] == before
    assert unfuse(model) == []
