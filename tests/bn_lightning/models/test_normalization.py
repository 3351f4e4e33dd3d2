"""Each choice of the config group `norm` builds the layer for the number of dimensions."""

from functools import partial

import pytest
import torch
from torch import nn

import bn_lightning
from bn_lightning.models.normalization import (
    NormFactory,
    batch_norm,
    ghost_batch_norm,
    torch_batch_norm,
)

FACTORIES: dict[str, NormFactory] = {
    "torch": partial(torch_batch_norm, eps=1e-3, momentum=0.2),
    "batch": partial(batch_norm, eps=1e-3, momentum=0.2, backend="native"),
    "ghost": partial(ghost_batch_norm, eps=1e-3, momentum=0.2, backend="native", ghost_size=2),
}
factories = pytest.mark.parametrize("norm", FACTORIES.values(), ids=FACTORIES.keys())
KINDS = {
    "torch": [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d],
    "batch": [
        bn_lightning.BatchNorm1d,
        bn_lightning.BatchNorm1d,
        bn_lightning.BatchNorm2d,
        bn_lightning.BatchNorm3d,
    ],
    "ghost": [
        bn_lightning.GhostBatchNorm1d,
        bn_lightning.GhostBatchNorm1d,
        bn_lightning.GhostBatchNorm2d,
        bn_lightning.GhostBatchNorm3d,
    ],
}


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("spatial_dims", range(4))
def test_the_layer_for_each_number_of_dimensions(name: str, spatial_dims: int) -> None:
    layer = FACTORIES[name](3, spatial_dims)
    assert type(layer) is KINDS[name][spatial_dims]
    x = torch.randn(4, 3, *(5, 2, 3)[:spatial_dims]) + 2
    y = layer(x)
    assert y.shape == x.shape
    others = [dim for dim in range(x.dim()) if dim != 1]
    torch.testing.assert_close(y.mean(others), torch.zeros(3), atol=1e-5, rtol=0)


@factories
def test_without_spatial_dims_it_is_for_a_linear_layer(norm: NormFactory) -> None:
    assert norm(3)(torch.randn(4, 3)).shape == (4, 3)


@factories
def test_eps_and_momentum_are_passed_on(norm: NormFactory) -> None:
    layer = norm(7, 2)
    assert (layer.num_features, layer.eps, layer.momentum) == (7, 1e-3, 0.2)
    assert layer.affine
    assert layer.track_running_stats


def test_momentum_none_averages_over_all_batches() -> None:
    for layer in (
        torch_batch_norm(2, eps=1e-5, momentum=None),
        batch_norm(2, eps=1e-5, momentum=None, backend="native"),
    ):
        batches = torch.randn(3, 8, 2).unbind()
        for batch in batches:
            layer(batch)
        mean = torch.stack([batch.mean(0) for batch in batches]).mean(0)
        torch.testing.assert_close(layer.running_mean, mean)


def test_the_backend_is_passed_on() -> None:
    assert batch_norm(3, 2, eps=1e-5, momentum=0.1, backend="native").backend == "native"
    with pytest.raises(ValueError, match="`backend`.*'cuda'"):
        batch_norm(3, eps=1e-5, momentum=0.1, backend="cuda")


def test_state_dicts_are_interchangeable() -> None:
    ours, theirs = (norm(3, 1) for norm in (FACTORIES["batch"], FACTORIES["torch"]))
    theirs(torch.randn(4, 3, 2))
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.running_mean, theirs.running_mean)
