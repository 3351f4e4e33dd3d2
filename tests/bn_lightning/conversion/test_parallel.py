"""Converted models under FSDP2, DataParallel's replicas and threads."""

import copy
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bn_lightning import convert_batchnorm, fusion_counts, revert_batchnorm


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)
        self.last = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(self.bn(self.conv(x)))) + x


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.Sequential(Block()))


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[dist.DeviceMesh]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize("sharded", ["blocks", "norms", "blocks_without_norms"])
@pytest.mark.parametrize("converts_first", [True, False], ids=["convert_first", "shard_first"])
def test_fsdp2(mesh, sharded: str, converts_first: bool) -> None:
    """The weights are freed when a block returns, and its class is FSDP's."""
    model = blocks()
    plain = copy.deepcopy(model)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    whole = {p for norm in norms for p in norm.parameters()}

    def shard() -> None:
        if sharded == "norms":
            for norm in norms:
                fully_shard(norm, mesh=mesh)
        ignored = whole if sharded == "blocks_without_norms" else set()
        for block in (model[0], model[1][0], model):
            fully_shard(block, mesh=mesh, ignored_params=ignored)

    if not converts_first:
        shard()
    classes = [type(m) for m in model.modules()]
    report = convert_batchnorm(model, fuse=True)
    if converts_first:
        shard()
    assert len(report.converted) == 4
    is_fused = sharded == "blocks_without_norms"
    assert converts_first or len(report.fusable) == (4 if is_fused else 0)
    for step in range(3):
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        for m in (model, plain):
            m.zero_grad()
            m(x).square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            assert torch.equal(gradient, q.grad), name
        for a, b in zip(model.buffers(), plain.buffers(), strict=True):
            assert torch.equal(a, b)
    assert all(count.fused == 3 * is_fused for count in fusion_counts(model).values())
    revert_batchnorm(model)
    assert converts_first or [type(m) for m in model.modules()] == classes


def replicas(model: nn.Module) -> list[nn.Module]:
    """Make two replicas as torch.nn.parallel.replicate does, which copies to GPUs only."""
    made = []
    for _ in range(2):
        copies = {m: m._replicate_for_data_parallel() for m in model.modules()}
        for module, replica in copies.items():
            replica._former_parameters = {}
            for name, child in module._modules.items():
                setattr(replica, name, copies[child])
            for name, parameter in module._parameters.items():
                # Not a leaf, so that the gradients come back to the model.
                setattr(replica, name, parameter * 1)
                replica._former_parameters[name] = getattr(replica, name)
            for name, buffer in module._buffers.items():
                setattr(replica, name, buffer.clone())
        made.append(copies[model])
    return made


def run(outputs: dict[int, Tensor], i: int, replica: nn.Module, x: Tensor) -> None:
    outputs[i] = replica(x)


def test_replicas_of_data_parallel() -> None:
    """They share each `Deferral`, and run in threads at the same time."""
    model = blocks()
    plain = copy.deepcopy(model)
    convert_batchnorm(model, fuse=True)
    for step in range(4):
        found: list[list[Tensor]] = []
        x = torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        for m in (model, plain):
            both, outputs = replicas(m), {}
            threads = [
                threading.Thread(target=run, args=(outputs, i, r, x[i])) for i, r in enumerate(both)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            m.zero_grad()
            sum(y.square().sum() for y in outputs.values()).backward()
            values = [outputs[0], outputs[1], *(p.grad for p in m.parameters())]
            found.append([*values, *(b for r in both for b in r.buffers())])
            assert all(type(y) is Tensor for y in outputs.values())
        torch.testing.assert_close(*found)
