"""Deferred BatchNorms: what forwards fuse, and that values, gradients and statistics stay."""

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from swish import Swish
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bn_lightning import BatchNorm2d, convert_batchnorm, fusion_counts, revert_batchnorm
from bn_lightning.conversion.deferred import Deferred
from bn_lightning.kernels import update_in_recomputation


class Net(nn.Module):
    """Two convolutions and two BatchNorms; its forward is given by each test."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 1)
        self.conv2 = nn.Conv2d(3, 3, 1)
        self.bn1 = nn.BatchNorm2d(3)
        self.bn2 = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.prelu = nn.PReLU()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 3, 1), nn.Sigmoid())
        self.slope = 0.3
        self.kept: Any = None


Forward = Callable[[Any, Tensor], Tensor]


def net(forward: Forward) -> tuple[Net, Net]:
    """Return a converted net with this forward, and the same unconverted."""
    torch.manual_seed(0)
    untouched = type("Forward", (Net,), {"forward": forward})().double()
    for bn in (untouched.bn1, untouched.bn2):
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
    module = copy.deepcopy(untouched)
    convert_batchnorm(module, fuse=True)
    return module, untouched


def run(module: nn.Module, seed: int, training: bool, twice: bool = True) -> list[Tensor]:
    """Return what a forward and a backward compute: output, gradients of two orders, buffers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 4, 4, generator=generator, dtype=torch.float64).requires_grad_()
    module.train(training)
    y = module(x + 1)  # not a leaf: in-place operations may write to it
    assert type(y) is Tensor
    upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    wanted = [x, *module.parameters()]
    found = list(torch.autograd.grad(y, wanted, upstream, create_graph=twice, allow_unused=True))
    squares = [g.square().sum() for g in found if g is not None and g.requires_grad]
    if twice and squares:
        found += torch.autograd.grad(squares, wanted, allow_unused=True)
    gradients = [torch.zeros(()) if g is None else g.clone() for g in found]
    return [y.detach().clone(), *gradients, *(b.clone() for b in module.buffers())]


def compared(forward: Forward, twice: bool = True) -> Net:
    """Compare three training steps and two evaluations with the unconverted net's."""
    module, untouched = net(forward)
    for seed, training in enumerate((True, True, True, False, False)):
        found, wanted = (run(m, seed, training, twice) for m in (module, untouched))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        assert type(module.kept) is not Deferred
    return module


def fused(module: nn.Module) -> str:
    """Return the numbers of the BatchNorms of which at least one call ran fused."""
    return "".join(name[-1] for name, count in fusion_counts(module).items() if count.fused)


def relu_module(self, x):
    return self.relu(self.bn1(x))


def relu_function(self, x):
    return F.relu(self.bn1(x), inplace=True)


def relu_of_torch(self, x):
    return torch.relu(self.bn1(x))


def relu_method(self, x):
    return self.bn1(x).relu()


def relu_method_in_place(self, x):
    y = self.bn1(x)
    y.relu_()
    return y * 2


def leaky_relu(self, x):
    return F.leaky_relu(self.bn1(x), self.slope)


def relu6_as_hardtanh(self, x):
    return F.hardtanh(self.bn1(x), 0.0, 6.0)


def gelu_tanh(self, x):
    return F.gelu(self.bn1(x), approximate="tanh")


def two_activations(self, x):
    x = torch.sigmoid(self.bn1(x))
    return F.hardswish(self.bn2(x))


def addition(self, x):
    return self.bn1(self.conv1(x)) + x


def addition_relu(self, x):
    return F.relu(self.bn1(self.conv1(x)) + x)


def other_order(self, x):
    return F.relu(x + self.bn1(self.conv1(x)))


def addition_in_place(self, x):
    y = self.bn1(self.conv1(x))
    y += x
    return self.relu(y)


def add_of_torch(self, x):
    return torch.add(x, self.bn1(self.conv1(x)), alpha=1).tanh()


def add_method_in_place(self, x):
    return self.relu(self.bn1(self.conv1(x)).add_(x))


def addition_silu(self, x):
    return F.silu(self.bn1(self.conv1(x)) + x)


def residual_comes_later(self, x):
    y = self.bn1(self.conv1(x))
    return self.relu(y + self.conv2(x))


def operations_between(self, x):
    y = self.bn1(self.conv1(x))
    z = self.conv2(x)
    return self.relu(y) * z


def across_modules(self, x):
    block = nn.Sequential(self.conv1, self.bn1, nn.Identity(), nn.Dropout(0.0))
    return F.relu(block(x))


def branch_on_values(self, x):
    y = self.bn1(x)
    return y.relu() if x.sum() > 1 else y.tanh()


def metadata_is_asked_for(self, x):
    y = self.bn1(x)
    assert y.shape == x.shape and y.dtype == x.dtype and y.device == x.device
    assert y.stride() == x.stride() and y.is_contiguous() and y.dim() == len(y) == 4
    assert y.requires_grad and isinstance(y, Tensor) and torch.is_tensor(y)
    return y.relu()


def several_names(self, x):
    y = self.bn1(self.conv1(x))
    z = F.relu(y)
    return self.conv2(z)


def autocast_in_between(self, x):
    y = self.bn1(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.relu(y)


def attributes_are_set(self, x):
    y = self.bn1(self.conv1(x))
    y.original = x
    y = self.relu(y)
    return y + y.original


def called_twice(self, x):
    return self.relu(self.bn1(self.conv2(self.relu(self.bn1(self.conv1(x))))))


def called_twice_before_either_is_read(self, x):
    y, z = self.bn1(x), self.bn1(self.conv1(x))
    return F.relu(z) + F.relu(y)


def two_are_added(self, x):
    return self.relu(self.bn1(self.conv1(x)) + self.bn2(self.conv2(x)))


def added_in_place_to_another(self, x):
    y = z = x * 2
    y += self.bn1(self.conv1(x))
    return self.relu(y) + z


def added_in_place_to_views(self, x):
    y = x * 2
    y[:, :, :2] += self.bn1(self.conv1(x))[:, :, :2]
    y.view_as(y).add_(self.bn2(self.conv2(x)))
    return y


def slices_are_added(self, x):
    a, b = torch.cat([x, x], 2).split(4, 2)
    return F.relu(a + self.bn1(x)) + (self.bn2(x) + b)


FUSED = {
    **dict.fromkeys([relu_module, relu_function, relu_of_torch, relu_method], "1"),
    **dict.fromkeys([relu_method_in_place, leaky_relu, relu6_as_hardtanh, gelu_tanh], "1"),
    two_activations: "12",
    **dict.fromkeys([addition, addition_relu, other_order, addition_in_place], "1"),
    **dict.fromkeys([add_of_torch, add_method_in_place, addition_silu], "1"),
    **dict.fromkeys([residual_comes_later, operations_between, across_modules], "1"),
    **dict.fromkeys([branch_on_values, metadata_is_asked_for, several_names], "1"),
    **dict.fromkeys([autocast_in_between, attributes_are_set, called_twice], "1"),
    called_twice_before_either_is_read: "1",
    two_are_added: "1",
    added_in_place_to_another: "1",
    added_in_place_to_views: "2",
    slices_are_added: "12",
}


@pytest.mark.parametrize(("forward", "names"), FUSED.items(), ids=[f.__name__ for f in FUSED])
def test_fused(forward: Forward, names: str) -> None:
    assert fused(compared(forward)) == names


class Same(torch.autograd.Function):
    """Returns its inputs, as torch's hooks of modules do, without reading them."""

    @staticmethod
    def forward(ctx, *inputs):
        return inputs

    @staticmethod
    def backward(ctx, *gradients):
        return gradients


def scripted(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it is deprecated
    scripted = torch.jit.script(scripted)


def read_by_a_convolution(self, x):
    return self.conv1(self.bn1(x))


def activation_of_another_kind(self, x):
    return self.prelu(self.bn1(x))


def elu_of_another_slope(self, x):
    return F.elu(self.bn1(x), alpha=2.0)


def elu_in_place(self, x):
    return F.elu(self.bn1(x), inplace=True)


def number_is_added(self, x):
    return F.relu(self.bn1(x) + 3)


def broadcast_is_added(self, x):
    return F.relu(self.bn1(x) + x.mean(dim=(2, 3), keepdim=True))


def other_strides_are_added(self, x):
    return F.relu(self.bn1(x) + x.transpose(2, 3))


def other_dtype_is_added(self, x):
    return F.relu(self.bn1(x) + x.float())


def scaled_addition(self, x):
    return F.relu(torch.add(self.bn1(x), x, alpha=2))


def added_to_itself(self, x):
    y = self.bn1(x)
    return F.relu(y + y)


def swish_of_functions(self, x):
    y = self.bn1(x)
    return y * torch.sigmoid(y)


def squeeze_and_excitation(self, x):
    y = self.bn1(x)
    return y * self.gate(y)


def read_twice_in_one_operation(self, x):
    y = self.bn1(x)
    return F.relu(y) + y


def read_again_later(self, x):
    y = self.bn1(self.conv1(x))
    z = self.conv2(F.gelu(y))
    return z + y


def kept(self, x):
    y = self.kept = self.bn1(x)
    return F.relu(y)


def only_kept(self, x):
    self.kept = self.bn1(x)
    return x * 2


def discarded(self, x):
    self.bn1(x)
    return x * 2


def autograd_function(self, x):
    return Swish.apply(self.bn1(x))


def autograd_function_of_a_sum(self, x):
    y = self.bn1(x)
    return Same.apply(y + self.conv1(x))[0] * 2


def torchscript(self, x):
    return scripted(self.bn1(x))


def hook_on_the_tensor(self, x):
    y = self.bn1(x)
    y.register_hook(lambda gradient: gradient * 2)
    return F.relu(y)


def no_grad_in_between(self, x):
    y = self.bn1(x)
    with torch.no_grad():
        z = F.relu(y)
    return y * z


def detached(self, x):
    y = self.bn1(x)
    return y.detach().relu() + y.data + y


def vmapped(self, x):
    return torch.vmap(torch.relu)(self.bn1(x))


def written_to_by_index(self, x):
    y = self.bn1(x)
    y[:, 0] = 0
    return y


def in_lists(self, x):
    y = self.bn1(x)
    a, b, c = torch.stack([y, x]).chunk(3, 2)
    return torch.cat([a, b * c], 2)[0]


def checkpointed_activation(self, x):
    return checkpoint(lambda y: F.relu(y) * 2, self.bn1(x), use_reentrant=False)


NOT_FUSED = [
    *(read_by_a_convolution, activation_of_another_kind, elu_of_another_slope, elu_in_place),
    *(number_is_added, broadcast_is_added, other_strides_are_added, other_dtype_is_added),
    *(scaled_addition, added_to_itself, swish_of_functions),
    *(squeeze_and_excitation, read_twice_in_one_operation, read_again_later, kept, only_kept),
    *(discarded, autograd_function, torchscript, hook_on_the_tensor, no_grad_in_between),
    *(
        autograd_function_of_a_sum,
        detached,
        vmapped,
        written_to_by_index,
        in_lists,
        checkpointed_activation,
    ),
]


@pytest.mark.parametrize("forward", NOT_FUSED, ids=lambda forward: forward.__name__)
def test_not_fused(forward: Forward) -> None:
    assert fused(compared(forward)) == ""


def test_a_sum_read_twice_is_fused_without_the_activation() -> None:
    def forward(self, x):
        z = self.bn1(self.conv1(x)) + x
        return F.relu(z) * z

    assert fused(compared(forward)) == "1"


def test_an_output_read_twice_is_normalized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for forward in (read_twice_in_one_operation, read_again_later, kept):
        module, _ = net(forward)
        calls: list[None] = []
        original = F.batch_norm
        monkeypatch.setattr(
            F, "batch_norm", lambda *a, o=original, c=calls, **k: (c.append(None), o(*a, **k))[1]
        )
        for step in range(4):
            module(torch.randn(2, 3, 4, 4, dtype=torch.float64))
            assert len(calls) == step + 1, forward.__name__
        monkeypatch.undo()


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("last", [False, True], ids=["inside", "last"])
@pytest.mark.parametrize("updates", [1, 2], ids=["once", "as_torch"])
def test_checkpointed(reentrant: bool, last: bool, updates: int) -> None:
    """The statistics are updated once, or, if chosen, twice as torch's are."""

    def forward(self, x):
        part = nn.Sequential(self.conv1, self.bn1, *([] if last else [self.relu]))
        return F.relu(checkpoint(part, x, use_reentrant=reentrant))

    module, untouched = net(forward)
    found = []
    update_in_recomputation(updates == 2)
    for m in (module, untouched):
        x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1)).double()
        x.requires_grad_()
        y = m(x * 1)
        (y - 1).square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in (*m.conv1.parameters(), *m.bn1.parameters()))])
    update_in_recomputation(False)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    if updates == 2:
        torch.testing.assert_close(module.bn1.running_var, untouched.bn1.running_var)
    else:
        assert module.bn1.num_batches_tracked == 1 and untouched.bn1.num_batches_tracked == 2


class TestOwnStep:
    """A deferred tensor is computed with the values of its own step, or reading it is an error."""

    @staticmethod
    def deferred(training: bool = True) -> tuple[nn.Module, Tensor, Tensor]:
        bn = nn.ModuleDict({"bn": nn.BatchNorm2d(3)}).train(training)
        convert_batchnorm(bn, fuse=True)
        x = torch.randn(2, 3, 4, 4)
        y = bn["bn"](x)
        assert type(y) is Deferred
        return bn["bn"], x, y

    @pytest.mark.parametrize(
        "change",
        [
            lambda bn, x: x.add_(1),
            lambda bn, x: bn.weight.add_(1),
            lambda bn, x: bn.running_var.add_(1),
        ],
        ids=["input", "weight", "statistics"],
    )
    def test_a_change_in_place_is_an_error(self, change) -> None:
        bn, x, y = self.deferred()
        with torch.no_grad():
            change(bn, x)
        with pytest.raises(RuntimeError, match="unchanged until its output is read.*fuse=False"):
            y.relu().sum()
        assert type(bn(x)) is Tensor  # from now on it is computed at once

    def test_a_residual_changed_in_place_is_an_error(self) -> None:
        _, x, y = self.deferred()
        r = torch.randn_like(x)
        z = y + r
        r.mul_(2)
        with pytest.raises(RuntimeError, match="got a change in place of what was added"):
            z.relu().sum()

    def test_in_inference_mode_the_values_before_the_change_are_used(self) -> None:
        bn, _, _ = self.deferred(training=False)
        with torch.inference_mode():
            x = torch.randn(2, 3, 4, 4)
            y = bn(x)
            assert type(y) is Deferred
            wanted = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias)
            x.zero_()
            assert torch.equal(y.relu(), wanted.relu())

    def test_in_inference_mode_also_if_the_output_is_known(self) -> None:
        module, untouched = (m.eval() for m in net(lambda self, x: self.use(self.bn1(x), x)))
        for use in (*[lambda y, x: F.relu(y)] * 3, lambda y, x: (x.zero_(), F.tanh(y))[1]):
            found = []
            for m in (module, untouched):
                m.use = use
                with torch.inference_mode():
                    x = torch.linspace(-1, 1, 96, dtype=torch.float64).view(2, 3, 4, 4)
                    found.append(m(x + 0))
            assert torch.equal(*found)

    def test_in_inference_mode_all_activations_are_of_the_values_before_the_change(self) -> None:
        def forward(self, x):
            y = self.bn1(x)
            first, second = F.relu(y), torch.tanh(y)
            level = first.sum()
            del y
            x.zero_()
            return first + second + level

        module, untouched = (m.eval() for m in net(forward))
        for _ in range(3):
            with torch.inference_mode():
                x = torch.linspace(-1, 1, 96, dtype=torch.float64).view(2, 3, 4, 4)
                assert torch.equal(module(x + 0), untouched(x + 0))

    def test_in_inference_mode_a_known_sum_is_of_the_values_before_the_change(self) -> None:
        module, untouched = (m.eval() for m in net(lambda self, x: self.use(self.bn1(x), x)))

        def use(y: Tensor, x: Tensor) -> Tensor:
            r = x * 2
            x.zero_()
            return F.relu(y + r)

        module.use = untouched.use = use
        untouched.use = lambda y, x: F.relu(y + x * 2)
        for _ in range(4):
            found = []
            for m in (module, untouched):
                with torch.inference_mode():
                    x = torch.linspace(-1, 1, 96, dtype=torch.float64).view(2, 3, 4, 4)
                    found.append(m(x + 0))
            assert torch.equal(*found)
        assert fusion_counts(module)["bn1"] == (4, 0)

    def test_kept_across_a_step(self) -> None:
        bn, x, y = self.deferred()
        wanted = F.batch_norm(x, None, None, bn.weight, bn.bias, training=True)
        z = bn(x + 1)
        assert bn.num_batches_tracked == 1  # that of the first call comes before the second
        torch.testing.assert_close(y.relu(), wanted.relu())
        assert bn.num_batches_tracked == 1 and type(z) is Deferred

    def test_a_discarded_output_updates_the_statistics(self) -> None:
        bn, x, y = self.deferred()
        del y
        gc.collect()
        assert bn.num_batches_tracked == 1
        torch.testing.assert_close(bn.running_mean, 0.1 * x.mean((0, 2, 3)))

    def test_swapped_parameters(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()).eval()
        convert_batchnorm(model, fuse=True)
        state = {k: torch.rand_like(v) for k, v in model.state_dict().items() if v.dim()}
        x = torch.randn(2, 3, 4, 4)
        y = torch.func.functional_call(model, state, (x,))
        model.load_state_dict(state, strict=False)
        torch.testing.assert_close(y, model(x))


class TestAsATensor:
    """What other libraries do with a tensor computes it."""

    @pytest.mark.parametrize(
        "use",
        [
            lambda y: y.detach().numpy(),
            lambda y: copy.deepcopy(y.detach()),
            lambda y: pickle.loads(pickle.dumps(y.detach())),
            lambda y: torch.save(y, io.BytesIO()),
            repr,
            lambda y: y.tolist(),
            lambda y: bool((y == 0).any()),
            lambda y: list(y),
            lambda y: y.to("meta"),
            lambda y: torch.utils.dlpack.to_dlpack(y.detach()),
            lambda y: y.untyped_storage(),
            lambda y: y.data_ptr(),
        ],
        ids=[
            *("numpy", "deepcopy", "pickle", "save", "print", "list", "bool", "iterate"),
            *("to", "dlpack", "storage", "data_ptr"),
        ],
    )
    def test_it_becomes_plain(self, use) -> None:
        _, _, y = TestOwnStep.deferred()
        same = y
        use(y)
        assert type(same) is Tensor and same.grad_fn is not None

    def test_in_another_thread(self) -> None:
        _, x, y = TestOwnStep.deferred()
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.append(y.relu()))
        thread.start()
        thread.join()
        torch.testing.assert_close(found[0], F.batch_norm(x, None, None, training=True).relu())


def hooks(module: nn.Module) -> dict[str, Any]:
    return {
        "forward": lambda f: module.register_forward_hook(lambda m, args, y: f(y)),
        "before": lambda f: module.register_forward_pre_hook(lambda m, args: f(args[0])),
        "backward": lambda f: module.register_full_backward_hook(lambda m, dx, dy: f(dy[0])),
        "before_backward": lambda f: module.register_full_backward_pre_hook(lambda m, dy: f(dy[0])),
    }


@pytest.mark.parametrize("kind", ["forward", "before", "backward", "before_backward"])
@pytest.mark.parametrize("on", ["bn1", "relu", ""])
def test_hooks_see_what_they_see_without(on: str, kind: str) -> None:
    def forward(self, x):
        return self.relu(self.bn1(self.conv1(x)))

    seen: list[list[Tensor]] = []
    for module in net(forward):
        module.relu.inplace = False  # torch refuses it beside a full backward hook
        seen.append(values := [])
        hooks(module.get_submodule(on))[kind](lambda t, values=values: values.append(t.clone()))
        for step in range(3):
            values += run(module, step, training=True, twice=False)
    torch.testing.assert_close(*seen, rtol=1e-12, atol=1e-12)


class Branches(nn.Module):
    """The input of branches has as many gradients, whose sum is rounded by their order."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.side = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.skip = nn.BatchNorm2d(8)
        self.small = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.large = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skip = self.skip(x)  # deferred until after all convolutions, as is the sum
        total = x + self.side(x)
        small = self.small(x)
        return torch.relu(self.large(x) + small + skip) + total.relu()


def test_gradients_are_summed_in_the_order_of_the_calls() -> None:
    torch.manual_seed(0)
    untouched = Branches()
    converted = copy.deepcopy(untouched)
    convert_batchnorm(converted, fuse=True)
    for _ in range(3):
        x, dy = torch.randn(4, 3, 12, 12), torch.randn(4, 8, 10, 10)
        for module in (untouched, converted):
            module.zero_grad()
            module(x).backward(dy)
        for a, b in zip(untouched.parameters(), converted.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
    assert fusion_counts(converted)["skip"].fused == 3


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_modes_of_autograd() -> None:
    module, untouched = net(addition_relu)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    tangent = torch.randn_like(x)
    for m in (module, untouched):
        m.eval()
    for function in (
        lambda m: torch.func.jvp(m, (x,), (tangent,))[1],
        lambda m: torch.func.grad(lambda t: m(t).square().sum())(x),
        lambda m: torch.vmap(m)(x[None]),
        lambda m: torch.autograd.functional.jvp(m, x, tangent)[1],
    ):
        torch.testing.assert_close(function(module), function(untouched))
    with torch.inference_mode():
        assert module(x).is_inference()
        torch.testing.assert_close(module(x), untouched(x))
    with torch.no_grad():
        torch.testing.assert_close(module(x), untouched(x))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_and_dtypes(dtype: torch.dtype, layout: torch.memory_format) -> None:
    module, untouched = (m.to(dtype) for m in net(addition_relu))
    x = torch.randn(4, 3, 4, 4, dtype=dtype).to(memory_format=layout)
    for _ in range(2):
        y, wanted = module(x), untouched(x)
        assert y.stride() == wanted.stride() and torch.equal(y, wanted)
    assert fused(module) == "1"


def test_a_tensor_subclass_is_computed_at_once() -> None:
    class Own(Tensor):
        pass

    module, untouched = net(relu_module)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64).as_subclass(Own)
    y, wanted = module(x), untouched(x)
    assert type(y) is type(wanted) is Own and torch.equal(y, wanted)


def test_another_use_than_before_is_right_or_an_error() -> None:
    module, untouched = net(lambda self, x: self.use(self.bn1(x)))
    for m in (module, untouched):
        m.use = F.relu
    for step in range(2):
        run(module, step, training=True)
        run(untouched, step, training=True)
    for m in (module, untouched):
        m.use = lambda y: F.softplus(y) + y
    found, wanted = (run(m, 2, training=True) for m in (module, untouched))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)

    module, untouched = net(lambda self, x: self.use(self.bn1(x)))
    module.use = F.relu
    for step in range(2):
        run(module, step, training=True)
    module.use = Swish.apply
    with pytest.raises(RuntimeError, match="read by an addition or activation.*fuse=False"):
        run(module, 2, training=True)
    untouched.load_state_dict(module.state_dict())
    untouched.use = Swish.apply
    found, wanted = (run(m, 3, training=True) for m in (module, untouched))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def two_activations_of_it(y: Tensor) -> Tensor:
    return F.relu(y) + F.tanh(y)


def inside_no_grad(y: Tensor) -> Tensor:
    with torch.no_grad():
        z = F.relu(y)
    return z + y


def added_to_another_twice(y: Tensor) -> Tensor:
    z = y.detach() * 2
    z += y
    return z + y


@pytest.mark.parametrize("first", [F.relu, F.relu_, lambda y: y + 1 * y.shape[0]])
@pytest.mark.parametrize(
    "then",
    [
        *(F.tanh, F.leaky_relu, F.relu_, torch.square, two_activations_of_it, inside_no_grad),
        *(added_to_another_twice, lambda y: F.relu(y + y.detach()), lambda y: torch.ones(())),
    ],
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_known_output_is_used_otherwise(first, then, training: bool) -> None:
    """What was computed before it was asked for is not used, and nothing is updated twice."""

    def forward(self, x):
        return self.use(self.bn1(self.conv1(x))) * x

    nets = net(forward)
    for step, use in enumerate((first, first, first, then, then, first)):
        for module in nets:
            module.use = use
        found, wanted = (run(m, step, training, twice=step == 3) for m in nets)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    counts = fusion_counts(nets[0])["bn1"]
    assert counts.fused + counts.separate == 6


@pytest.mark.parametrize("forward", [relu_module, addition_relu, addition_in_place])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_known_batch_norm(forward: Forward, copied, monkeypatch) -> None:
    """They learn by themselves, and share nothing with the original."""
    monkeypatch.setattr(Net, "forward", forward, raising=False)
    module = Net().double()
    convert_batchnorm(module, fuse=True)
    for step in range(3):
        run(module, step, training=True)
    again = copied(module)
    for step in range(3):
        found, wanted = (run(m, step, training=True) for m in (again, module))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert fusion_counts(again) == fusion_counts(module)
    assert fusion_counts(again)["bn1"].fused == 6


def test_a_known_model_is_freed_without_the_garbage_collector(monkeypatch) -> None:
    monkeypatch.setattr(Net, "forward", addition_relu, raising=False)
    module = Net().double()
    convert_batchnorm(module, fuse=True)
    for step, training in product(range(3), (True, False)):
        run(module, step, training=training)
    gc.collect()
    gc.disable()
    try:
        parts = [weakref.ref(part) for part in module.modules()]
        del module
        assert not any(part() for part in parts)
    finally:
        gc.enable()


@pytest.mark.parametrize("forward", [relu_function, addition_relu])
def test_known_calls_of_the_kernels(forward: Forward) -> None:
    """What is repeated has the bits of what was launched, where the input changes as well."""
    pytest.importorskip("triton")
    module, _ = net(forward)
    separate = copy.deepcopy(module).float()
    module.float()
    for m, fuse in ((module, True), (separate, False)):
        convert_batchnorm(m, fuse=fuse, backend="triton")
    for step, rows in enumerate((2, 2, 2, 3, 2)):
        found = []
        for m in (module, separate):
            x = torch.randn(rows, 3, 1, 2, generator=torch.Generator().manual_seed(step))
            y = m(x.requires_grad_() * 1)
            dy = torch.linspace(-1, 1, y.numel()).view_as(y)
            found.append([y, torch.autograd.grad(y, x, dy)[0], *map(torch.clone, m.buffers())])
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
    assert fusion_counts(module)["bn1"] == (5, 0)


@pytest.mark.parametrize("forward", [relu_function, addition_relu])
def test_a_fused_node_leaves_the_places_of_others(forward: Forward) -> None:
    pytest.importorskip("triton")
    module, _ = net(lambda self, x: forward(self, self.conv1(x)) * 1)
    module.float()
    convert_batchnorm(module, fuse=True, backend="triton")
    seen: list[Any] = []
    module.conv1.register_forward_hook(
        lambda conv, args, y: seen.append((y.grad_fn, y.grad_fn._sequence_nr()))
    )
    for _ in range(3):
        module(torch.randn(2, 3, 1, 2))
        while seen:
            node, place = seen.pop()
            assert node._sequence_nr() == place
    assert fusion_counts(module)["bn1"].fused == 3


def test_known_calls_of_two_shapes() -> None:
    """The second call is made before the first one is computed."""

    def forward(self, x):
        y, z = self.bn1(x), self.bn1(x[:, :, :2].contiguous())
        a = self.bn1(x[:, :, :3])  # its memory is not contiguous: it is computed at once
        assert (y.shape[2], z.shape[2], a.shape[2]) == (4, 2, 3)
        return F.relu(y)[:, :, :2] + F.relu(z) + a[:, :, :2]

    compared(forward)


@pytest.mark.parametrize("forward", [relu_module, addition_relu], ids=["ahead", "deferred"])
def test_a_known_batch_norm_changes(forward: Forward) -> None:
    """Its statistics, parameters, hooks and modes may, as may shape and dtype of its input."""
    nets = net(forward)
    changes: list[Callable[[Net], Any]] = [
        lambda m: setattr(m.bn1, "track_running_stats", False),
        lambda m: setattr(m.bn1, "momentum", None),
        lambda m: setattr(m.bn1, "bias", None),
        lambda m: m.bn1.weight.requires_grad_(False),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.bn1.register_forward_hook(lambda m, args, y: y * 2),
        lambda m: m.float(),
    ]
    for change in changes:
        for step in range(3):
            found = []
            for m in nets:
                x = torch.randn(2 + step, 3, 4, 4, generator=torch.Generator().manual_seed(step))
                y = m(x.requires_grad_().to(m.conv1.weight))
                (y - 1).square().sum().backward()
                found.append(
                    [y, *m.buffers(), *(p.grad for p in m.parameters() if p.grad is not None)]
                )
                m.zero_grad()
            torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
        for m in nets:
            change(m)


def test_a_known_output_is_not_computed_of_changed_inputs() -> None:
    module, _ = net(lambda self, x: self.use(self.bn1(x), x))
    module.use = lambda y, x: F.relu(y)
    for step in range(3):
        run(module, step, training=True)

    def use(y, x):
        x.add_(1)
        return F.tanh(y)

    module.use = use
    with pytest.raises(RuntimeError, match="unchanged until its output is read"):
        run(module, 3, training=True)


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    def forward(self, x):
        y = self.bn1(x)
        if x.sum() > 1000:
            raise ArithmeticError
        return F.relu(y)

    module, untouched = net(forward)
    for m in (module, untouched):
        with pytest.raises(ArithmeticError):
            m(torch.full((2, 3, 2, 2), 50.0, dtype=torch.float64))
    gc.collect()
    found, wanted = (run(m, 1, training=True) for m in (module, untouched))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_batch_norm_of_this_package() -> None:
    module = nn.Sequential(BatchNorm2d(3), nn.ReLU(), BatchNorm2d(3, activation="tanh"), nn.ReLU())
    report = convert_batchnorm(module, fuse=True)
    assert report.converted == () and report.fusable == ("0",)
    module(torch.randn(2, 3, 4, 4))
    assert fusion_counts(module) == {"0": (1, 0)}
    revert_batchnorm(module)
    assert fusion_counts(module) == {} and "deferral" not in module[0].__dict__


def test_wrong_inputs_raise_as_without() -> None:
    module = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    convert_batchnorm(module, fuse=True)
    for x in (torch.randn(1, 3, 1, 1), torch.randn(2, 4, 3, 3), torch.randn(2, 3)):
        with pytest.raises((ValueError, RuntimeError)):
            module(x)
    assert module[0].num_batches_tracked == 0


def level_of_an_activation(self, x):
    h = F.relu(self.bn1(self.conv1(x)))
    with torch.no_grad():
        self.level = h.abs().mean()
    return self.conv2(h)


def level_after_an_activation(self, x):
    y = self.bn1(self.conv1(x))
    z = F.silu(y) * 2
    with torch.no_grad():
        self.level = y.abs().mean()
    return z + y


def level_in_inference_mode(self, x):
    y = self.bn1(self.conv1(x))
    z = torch.sigmoid(y)
    with torch.inference_mode():
        self.level = y.mean() + z.mean()
    return z * y


class Pair(NamedTuple):
    """Two tensors."""

    low: Tensor
    high: Tensor


class Tensors(list[Tensor]):
    """A list of a class of its own."""


def in_a_named_tuple(self, x):
    return torch.cat(Pair(self.bn1(x), self.bn2(x)), 1) * 2


def in_a_list_of_its_own_class(self, x):
    return torch.cat(Tensors([self.bn1(x), self.bn2(x)]), 1) * 2


def changed_after_its_activation(self, x):
    y = self.bn1(self.conv1(x))
    positive = F.relu(y)
    return torch.cat([positive, F.relu(y.neg_())], 1)


def changed_after_its_sum(self, x):
    y = self.bn1(self.conv1(x))
    z = y + x
    y *= 2
    return z * y


def replaced_after_its_activation(self, x):
    y = self.bn1(self.conv1(x))
    z = torch.tanh(y)
    torch.sigmoid_(y)
    return z + y


def called_twice_before_the_sums_are_read(self, x):
    y = self.bn1(self.conv1(x))
    y += x
    z = self.bn1(self.conv2(x))
    z += x
    return F.relu(z) - F.relu(y)


def called_again_when_it_is_not_fused_any_more(self, x):
    y = self.bn1(x)
    z = F.elu(y)
    level = z.mean()
    unread = self.bn1(self.conv1(z))
    y = self.bn1(self.conv2(y))
    return y + level + unread


def gradient_hook_after_the_activation_was_read(self, x):
    y = self.bn1(self.conv1(x))
    z = F.elu(y)
    level = z.mean()
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient * 2)
    return z + level


def gradient_hook_and_a_change_in_place(self, x):
    y = self.bn1(self.conv1(x))
    with torch.no_grad():
        self.level = y.abs().mean()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        z = self.bn2(self.conv2(x))
    for tensor in (y, z):
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: gradient * 2)
        tensor.mul_(3)
    return y * z


def beside_a_checkpointed_branch(self, x):
    y = self.bn1(self.conv1(x))
    return y + checkpoint(self.conv2, F.silu(y), use_reentrant=False)


def frozen_and_then_changed_in_place(self, x):
    self.bn1.eval()
    with torch.no_grad():
        y = F.relu(self.bn1(self.conv1(x)) + x)
        z = self.bn1(self.conv2(x))
    y += self.conv2.bias.view(1, 3, 1, 1)
    z *= self.conv1.bias.view(1, 3, 1, 1)
    return y * z


@pytest.mark.parametrize(
    "forward",
    [
        *(changed_after_its_activation, changed_after_its_sum, replaced_after_its_activation),
        *(called_twice_before_the_sums_are_read, called_again_when_it_is_not_fused_any_more),
        *(gradient_hook_after_the_activation_was_read, gradient_hook_and_a_change_in_place),
        *(beside_a_checkpointed_branch, frozen_and_then_changed_in_place),
        *(level_of_an_activation, level_after_an_activation, level_in_inference_mode),
        *(in_a_named_tuple, in_a_list_of_its_own_class),
    ],
    ids=lambda forward: forward.__name__,
)
def test_reads(forward: Forward) -> None:
    compared(forward)


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.ReLU(), nn.Sigmoid()], ids=str)
def test_hooks_that_keep_the_saved_tensors(activation: nn.Module) -> None:
    def forward(self, x):
        return self.conv2(activation(self.bn1(self.conv1(x))))

    module, untouched = net(forward)
    for seed in range(3):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            found, wanted = (run(m, seed, training=True) for m in (module, untouched))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_part_reads_it() -> None:
    def forward(self, x):
        return self.tail(self.bn1(self.conv1(x)))

    module, untouched = net(forward)
    for m in (module, untouched):
        m.tail = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1)).double()
    module.tail.load_state_dict(untouched.tail.state_dict())
    module.tail.compile(backend="eager")
    for seed, training in enumerate((True, True, True, True, False)):
        found, wanted = (run(m, seed, training, twice=False) for m in (module, untouched))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()


def test_an_update_that_cannot_be_made_is_an_error_of_the_forward() -> None:
    def forward(self, x):
        h = self.conv1(x)
        unread = [self.bn1(h), self.bn2(h)]
        y = F.relu_(h)
        del unread
        return y

    module, untouched = net(forward)
    with pytest.raises(RuntimeError, match="unchanged until its output is read"):
        run(module, 0, training=True)
    for seed in range(1, 3):
        found, wanted = (run(m, seed, training=True) for m in (module, untouched))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert module.bn1.num_batches_tracked == untouched.bn1.num_batches_tracked == 2


@pytest.mark.parametrize("fused_before", [0, 3])
def test_a_kept_output_has_a_gradient(fused_before: int) -> None:
    def forward(self, x):
        y = self.bn1(self.conv1(x))
        z = F.relu(y)
        if self.keeps:
            self.kept = y
        return self.conv2(z)

    module, untouched = net(forward)
    for step in range(fused_before + 3):
        x, gradients = torch.randn(2, 3, 4, 4, dtype=torch.float64), []
        for m in (module, untouched):
            m.keeps = step >= fused_before
            y = m(x)
            if m.keeps:
                m.kept.retain_grad()
                y.square().sum().backward()
                gradients.append(m.kept.grad)
        if fused_before and step == fused_before:
            assert gradients[0] is None  # documented
        elif gradients:
            torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert module.bn1.deferral.fused == fused_before  # but the first forward, and the exception


def test_ctrl_c_in_a_forward_leaves_nothing_behind() -> None:
    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        if self.is_interrupted:
            raise KeyboardInterrupt
        return y

    module, _ = net(forward)
    module.is_interrupted = True
    with pytest.raises(KeyboardInterrupt):
        run(module, 0, training=True)
    revert_batchnorm(module)
    reference = weakref.ref(module)
    del module
    gc.collect()
    assert reference() is None
    compared(only_kept)
