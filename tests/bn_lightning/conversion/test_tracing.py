"""Which forwards can be traced, and the reasons why others cannot."""

import math
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bn_lightning.conversion.tracing import Guard, NotTraceable, trace_forward


class Net(nn.Module):
    """Has attributes of each kind; each test gives it a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.dropout = nn.Dropout(0.3)
        self.layers = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])
        self.factor = 2
        self.act = F.relu
        self.settings = [1]
        self.plain = torch.ones(3, 1, 1)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("offset", torch.ones(1))

    @property
    def doubled(self):
        return 2 * self.scale


def net(forward) -> Net:
    return type("Forward", (Net,), {"forward": forward})()


def branches(self, x):
    return x if x.sum() > 0 else -x


def branches_on_a_shape(self, x):
    return self.conv(x) if x.shape[1] == 3 else x


def branches_and_catches(self, x):
    try:
        return x if x.sum() > 0 else -x
    except Exception:
        return self.conv(x)


def writes_an_attribute(self, x):
    self.factor += 1
    return x


def appends(self, x):
    self.settings.append(x)
    return x


def writes_to_a_child(self, x):
    self.conv.seen = True
    return x


def draws(self, x):
    return x * torch.rand(1)


def skips_itself(self, x):
    return self.conv(x) if torch.rand(1).item() < 0.5 else x


def draws_in_python(self, x):
    return self.conv(x) if random.random() < 0.5 else x


def draws_and_branches(self, x):
    random.random(), np.random.rand()
    return x if x.sum() > 0 else -x


def draws_in_numpy(self, x):
    return self.conv(x) if np.random.rand() < 0.5 else x


def makes_a_tensor(self, x):
    return x * torch.tensor(2.0)


def reads_a_number_off_a_tensor(self, x):
    return x * float(self.plain[0])


def stops_gradients(self, x):
    with torch.no_grad():
        return self.conv(x)


@torch.no_grad()
def is_without_gradients(self, x):
    return self.conv(x)


def is_for_inference(self, x):
    with torch.inference_mode():
        return self.conv(x)


def leaves_autocast(self, x):
    with torch.autocast("cpu", enabled=False):
        return self.conv(x)


def checkpoints(self, x):
    return checkpoint(self.conv, x, use_reentrant=False)


def checkpoints_reentrantly(self, x):
    return checkpoint(self.conv, x, use_reentrant=True)


def asks_for_the_type(self, x):
    return self.conv(x if isinstance(x, torch.Tensor) else x[0])


def asks_for_the_type_of_an_output(self, x):
    y = self.conv(x)
    return y[0] if isinstance(y, tuple) else y


def prints(self, x):
    print(self.factor)
    return x


def warns(self, x):
    warnings.warn("slow", stacklevel=1)
    return x


def takes_any_number(self, *inputs):
    return inputs[0]


def takes_a_keyword(self, x, *, y):
    return x + y


def writes_into(self, x):
    x[:, 0] = 1
    return x


REFUSED = {
    branches: "branches on the value",
    branches_on_a_shape: "branches on the value of a tensor, or on a shape",
    branches_and_catches: "branches on the value",
    writes_an_attribute: "writes `factor`",
    appends: "reads `settings`, a list",
    writes_to_a_child: "writes `seen`",
    draws: "torch's rand",
    skips_itself: "torch's rand",
    draws_in_python: "random numbers in Python",
    draws_in_numpy: "random numbers in Python",
    draws_and_branches: "branches on the value",
    makes_a_tensor: "torch's tensor",
    reads_a_number_off_a_tensor: "torch's",
    stops_gradients: "_set_grad_enabled",
    is_without_gradients: "_set_grad_enabled",
    is_for_inference: "autocast, gradients or checkpointing",
    leaves_autocast: "autocast, gradients or checkpointing",
    checkpoints: "asks for the type|checkpointing",
    checkpoints_reentrantly: "asks for the type|checkpointing",
    asks_for_the_type: "asks for the type",
    asks_for_the_type_of_an_output: "asks for the type",
    prints: "it prints",
    warns: "it prints or warns",
    takes_any_number: "no tensors by position",
    takes_a_keyword: "no tensors by position",
    writes_into: "does not support item assignment",
}


@pytest.mark.parametrize(
    ("forward", "why"), REFUSED.items(), ids=[forward.__name__ for forward in REFUSED]
)
def test_what_a_graph_would_make_constant_is_refused(forward, why, capsys) -> None:
    module = net(forward)
    before, children = dict(module.__dict__), dict(module.conv.__dict__)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    with pytest.raises(NotTraceable, match=why):
        trace_forward(module)
    # The module and the global state have not changed.
    assert module.__dict__ == before and module.conv.__dict__ == children
    assert module.settings == [1] and module.factor == 2
    assert type(module.conv) is nn.Conv2d
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert all(map(np.array_equal, np.random.get_state(), states[2]))
    assert capsys.readouterr().out == ""


def by_children(self, x):
    for layer in self.layers:
        x = layer(x)
    return x


def by_functions(self, x):
    x = F.pad(F.max_pool2d(F.interpolate(x, scale_factor=2.0), 2), (1, 1))
    a, b = self.act(x).chunk(2, dim=3)
    return (a * math.sqrt(a.shape[1]) - b).flatten(1).view(x.size(0), -1)


def by_all_kinds_of_tensors(self, x):
    return x * self.scale + self.offset - self.plain


def in_place(self, x):
    x = self.conv(x)
    y = x
    y += 1
    y *= self.factor
    return x + y


def by_a_property(self, x):
    return x * self.doubled


def with_a_default(self, x, skip=None):
    return self.conv(x) if skip is None else x + skip


TRACED = [
    by_children,
    by_functions,
    by_all_kinds_of_tensors,
    in_place,
    by_a_property,
    with_a_default,
]


@pytest.mark.parametrize("forward", TRACED, ids=[forward.__name__ for forward in TRACED])
def test_a_graph_is_equivalent_to_its_forward(forward) -> None:
    module = net(forward)
    before = dict(module.__dict__)
    (trace,) = trace_forward(module)
    assert module.__dict__ == before
    names = {}
    exec(trace.graph.python_code("self").src, trace.graph.python_code("self").globals, names)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(names["forward"](module, x), module(x))


def guards_of(forward) -> dict[str, Guard]:
    (trace,) = trace_forward(net(forward))
    return {guard.name: guard for guard in trace.guards}


def test_numbers_functions_and_lists_of_children_are_guarded() -> None:
    def forward(self, x):
        for layer in self.layers:
            x = self.act(layer(x)) * self.factor
        return x + self.conv.stride[0]

    guards = guards_of(forward)
    assert set(guards) == {"factor", "act", "_modules", "stride"}
    assert guards["stride"].value == (1, 1)
    assert all(guard.holds() for guard in guards.values())
    guards["factor"].owner.factor = 3
    guards["act"].owner.act = F.silu
    guards["_modules"].owner.append(nn.Identity())
    guards["stride"].owner.stride = (2, 2)
    assert not any(guard.holds() for guard in guards.values())


def test_init_subclass_is_not_called() -> None:
    registered = []

    class Registered(Net):
        def __init_subclass__(cls) -> None:
            registered.append(cls)

        def forward(self, x):
            return self.conv(x) * self.factor

    assert len(trace_forward(Registered())) == 1 and registered == []


def test_modules_that_refuse_attributes() -> None:
    class Strict(Net):
        def __setattr__(self, name, value):
            if name == "__class__":
                raise AttributeError(name)
            super().__setattr__(name, value)

        def forward(self, x):
            return self.conv(x)

    module = Strict()
    assert len(trace_forward(module)) == 1 and type(module) is Strict


def test_a_guard_checks_the_type_and_that_the_attribute_exists() -> None:
    def forward(self, x):
        return x * self.factor

    guard = guards_of(forward)["factor"]
    for value in (2.0, torch.tensor(2)):
        guard.owner.factor = value
        assert not guard.holds()
    guard.owner.factor = 2
    assert guard.holds()
    del guard.owner.factor
    assert not guard.holds()


def test_training_and_evaluation_have_two_graphs_if_they_differ() -> None:
    def forward(self, x):
        return F.dropout(x, self.dropout.p, self.training)

    module = net(forward).eval()
    module.conv.train()
    training, evaluation = trace_forward(module)
    assert "training = True" in training.graph.python_code("self").src
    assert not module.training and module.conv.training
    assert [all(g.holds() for g in t.guards) for t in (training, evaluation)] == [False, True]
