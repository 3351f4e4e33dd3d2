"""Training steps as replays of a CUDA graph: which are recorded, and that a replay is a step."""

import logging

import pytest
import torch
from torch import nn

from bn_lightning.stack.context import Placed
from bn_lightning.stack.network import StackedNetwork
from bn_lightning.stack.optimizers import StackedOptimizer
from bn_lightning.stack.step_graph import WARM_UP, StepGraph, recordable

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU = torch.device("cpu")


class Recorder:
    """Stands for torch.cuda.CUDAGraph: notes replays and runs the step again."""

    def __init__(self, monkeypatch, error=None):
        self.error = error
        self.recorded = self.replayed = 0
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: None)

    def __enter__(self):
        self.recorded += 1
        if self.error:
            raise self.error

    def __exit__(self, *_):
        pass

    def replay(self):
        self.replayed += 1


def batch(size, value=1.0, dim=None):
    return Placed(torch.full((size, 2), value), dim), Placed(torch.zeros(size), dim)


def test_steps_are_replayed_after_the_warm_up_on_the_batch_they_get(monkeypatch):
    recorder, seen = Recorder(monkeypatch), []

    def step(x, target):
        seen.append(x.value)
        return x.value.sum(0)

    graph = StepGraph(step)
    for number in range(WARM_UP):
        graph(*batch(4, float(number)))
    assert (recorder.recorded, recorder.replayed, len(seen)) == (0, 0, WARM_UP)
    graph(*batch(4, 7.0))
    graph(*batch(4, 8.0))
    assert (recorder.recorded, recorder.replayed, len(seen)) == (1, 2, WARM_UP + 1)
    # What was recorded reads its own memory, which has the last batch.
    assert torch.equal(seen[-1], torch.full((4, 2), 8.0))
    graph.forget()
    graph(*batch(4))
    assert (recorder.recorded, recorder.replayed, len(seen)) == (1, 2, WARM_UP + 2)


@pytest.mark.parametrize("other", [batch(3), batch(4, dim=0)], ids=["shape", "dimension"])
def test_another_batch_is_trained_without_the_graph(monkeypatch, other):
    recorder, seen = Recorder(monkeypatch), []
    graph = StepGraph(lambda x, target: seen.append(x) or x.value)
    for _ in range(WARM_UP + 1):
        graph(*batch(4))
    graph(*other)
    assert recorder.replayed == 1 and seen[-1] is other[0]


def test_a_short_last_batch_is_not_what_is_recorded(monkeypatch):
    recorder, seen = Recorder(monkeypatch), []
    graph = StepGraph(lambda x, target: seen.append(x) or x.value)
    for _ in range(2):
        for size in (4,) * WARM_UP + (3,):  # the first step after the warm-up is an epoch's last
            graph(*batch(size))
    # The second epoch begins after a batch of another size; its second step is recorded.
    assert (recorder.recorded, recorder.replayed) == (1, WARM_UP - 1)
    assert [len(x.value) for x in seen[-3:]] == [4, 4, 3]


def test_a_step_that_cannot_be_recorded_is_trained_and_named_once(monkeypatch, caplog):
    recorder = Recorder(monkeypatch, RuntimeError("operation not permitted\nmore"))
    seen = []
    graph = StepGraph(lambda x, target: seen.append(x) or x.value)
    with caplog.at_level(logging.WARNING):
        for _ in range(WARM_UP + 3):
            graph(*batch(4))
    assert len(seen) == WARM_UP + 3 and recorder.recorded == 1 and recorder.replayed == 0
    assert [r.getMessage() for r in caplog.records] == [
        "steps of this stack are not recorded as a CUDA graph: operation not permitted"
    ]


def test_without_a_gpu_nothing_is_recordable():
    with recordable(CPU):
        assert not torch.cuda.is_initialized()


@on_gpu
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_replayed_steps_are_the_steps(momentum, shared):
    device = torch.device("cuda")

    def trained(replays):
        torch.manual_seed(0)
        networks = [
            nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).to(device)
            for _ in range(4)
        ]
        stack = StackedNetwork(networks)
        members = [
            torch.optim.SGD(n.parameters(), lr=0.1 * (k + 1), momentum=momentum)
            for k, n in enumerate(networks)
        ]
        optimizer = StackedOptimizer(stack.network.parameters(), members)

        def step(x, target):
            stack.context.calls.clear()
            stack.context.update = optimizer.update
            losses = stack.map(lambda net, x, y: nn.functional.cross_entropy(net(x), y), x, target)
            losses.backward(torch.ones_like(losses))
            optimizer.step()
            return losses.detach()

        losses = []
        with recordable(device):
            graph = StepGraph(step)
            generator = torch.Generator().manual_seed(1)
            for _ in range(WARM_UP + 5):
                sizes = (8,) if shared else (4, 8)
                x = torch.randn(*sizes, 6, generator=generator).to(device)
                y = torch.randint(0, 3, sizes, generator=generator).to(device)
                pair = (Placed(part, None if shared else 0) for part in (x, y))
                losses.append((graph if replays else step)(*pair).clone())
        assert (graph._graph is not None) == replays
        return losses, stack.network.state_dict()

    (found, state), (expected, other) = trained(True), trained(False)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(state, other, rtol=1e-6, atol=1e-6)
