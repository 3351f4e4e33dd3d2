"""Fusion of whole models: which forward calls which BatchNorm, and reasons for none."""

import torch
from torch import Tensor, nn

from bn_lightning import BatchNorm2d
from bn_lightning.conversion.fusion import fuse_model, is_fused, unfuse_model


class Branching(nn.Module):
    """Cannot be traced."""

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


def test_children_of_a_module_list_are_fused_in_its_parent() -> None:
    model = Chain(*pair(), *pair())
    assert fuse_model(model) == (["layers.0", "layers.2"], {})
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
    assert fuse_model(model) == (["stem.1"], {})
    assert torch.allclose(model(x), wanted)


def test_a_sequential_inside_an_untraceable_forward_is_fused() -> None:
    assert fuse_model(Branching(nn.Sequential(*pair()))) == (["inner.0"], {})


def test_the_nearest_untraceable_forward_is_named() -> None:
    fused, reasons = fuse_model(Branching(nn.ModuleDict({"a": Branching(BatchNorm2d(3))})))
    assert fused == []
    assert reasons == {
        "inner.a.inner": "Branching.forward of 'inner.a' cannot be traced: it branches on the"
        " value of a tensor, or on a shape"
    }


def test_the_root_has_no_name() -> None:
    _, reasons = fuse_model(Branching(BatchNorm2d(3)))
    assert reasons["inner"].startswith("Branching.forward of the model itself cannot be traced")


def test_nothing_follows() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), BatchNorm2d(3), nn.Flatten())
    assert fuse_model(model) == ([], {})
    assert not is_fused(model)


def test_an_activation_shared_by_all() -> None:
    relu = nn.ReLU(inplace=True)
    model = nn.Sequential(BatchNorm2d(3), relu, BatchNorm2d(3), relu)
    assert fuse_model(model) == (["0", "2"], {})


def test_a_forward_set_on_the_instance_is_kept() -> None:
    model = nn.Sequential(*pair())
    model.forward = own = lambda x: x
    fused, reasons = fuse_model(model)
    assert fused == [] and "the instance has its own forward" in reasons["0"]
    assert unfuse_model(model) == [] and model.forward is own


def test_the_class_forward_set_on_the_instance_is_fused() -> None:
    """Lightning leaves such a forward after a fit in several processes."""
    model = Chain(*pair()).eval()
    model.forward = model.forward
    x = torch.randn(2, 3, 2, 2)
    wanted = model(x)
    assert fuse_model(model)[0] and is_fused(model)
    assert torch.allclose(model(x), wanted)
    unfuse_model(model)
    assert torch.equal(model(x), wanted)


def test_a_sequential_subclass_with_its_own_forward_is_traced() -> None:
    class Negative(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return -super().forward(input)

    model = Negative(*pair()).eval()
    x = torch.randn(2, 3, 2, 2)
    wanted = model(x)
    assert fuse_model(model) == (["0"], {})
    assert torch.allclose(model(x), wanted)


def test_unfuse_model_restores_everything() -> None:
    model = nn.Sequential(Chain(*pair()), nn.Sequential(*pair()))
    before = [dict(m.__dict__) for m in model.modules()]
    fuse_model(model)
    assert unfuse_model(model) == ["0", "1"]
    assert [dict(m.__dict__) for m in model.modules()] == before
    assert unfuse_model(model) == []
