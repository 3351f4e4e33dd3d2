"""Which calls of a forward are fused, which are not, and that the results do not change."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bn_lightning import convert_batchnorm


class Net(nn.Module):
    """Two convolutions and two BatchNorms; its forward is given by each test."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 1)
        self.conv2 = nn.Conv2d(3, 3, 1)
        self.bn1 = nn.BatchNorm2d(3)
        self.bn2 = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.silu = nn.SiLU()
        self.branch = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1))
        self.slope = 0.3
        self.shared = nn.Sequential(self.bn2)


def net(forward: Callable[..., Tensor]) -> Net:
    torch.manual_seed(0)
    module = type("Forward", (Net,), {"forward": forward})().double()
    for bn in (module.bn1, module.bn2):
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
    return module


def run(module: nn.Module, training: bool, backward: bool = True) -> list[Tensor]:
    """Return what a forward and a backward compute: output, gradients, statistics."""
    x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x.requires_grad_()
    module.train(training)
    torch.manual_seed(2)
    if not backward:
        with torch.no_grad():
            return [module(x + 1), *module.buffers()]
    y = module(x + 1)  # not a leaf: in-place operations may write to it
    upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    wanted = [x, *module.parameters()]
    gradients = torch.autograd.grad(y, wanted, upstream, allow_unused=True)
    return [y, *(torch.zeros(()) if g is None else g for g in gradients), *module.buffers()]


def compared(forward: Callable[..., Tensor], backward: bool = True):
    """Convert a net, check that its results do not change, and return the Conversion."""
    module = net(forward)
    untouched = copy.deepcopy(module)
    report = convert_batchnorm(module, fuse=True)
    for training in (True, False):
        torch.testing.assert_close(
            run(module, training, backward),
            run(untouched, training, backward),
            rtol=1e-12,
            atol=1e-12,
        )
    return report


def relu_module(self, x):
    return self.relu(self.bn1(x))


def relu_function(self, x):
    return F.relu(self.bn1(x), inplace=True)


def torch_relu(self, x):
    return torch.relu(self.bn1(x))


def relu_method(self, x):
    return self.bn1(x).relu()


def relu_method_in_place(self, x):
    return self.bn1(x).relu_()


def leaky_relu(self, x):
    return F.leaky_relu(self.bn1(x), self.slope)


def gelu_tanh(self, x):
    return F.gelu(self.bn1(x), approximate="tanh")


def others(self, x):
    x = torch.sigmoid(self.bn1(x))
    return F.hardswish(self.bn2(x))


def add(self, x):
    return self.bn1(self.conv1(x)) + x


def add_relu(self, x):
    return F.relu(self.bn1(self.conv1(x)) + x)


def add_relu_other_order(self, x):
    return F.relu(x + self.bn1(self.conv1(x)))


def add_in_place(self, x):
    y = self.bn1(self.conv1(x))
    y += x
    return self.relu(y)


def torch_add(self, x):
    return torch.add(x, self.bn1(self.conv1(x)), alpha=1).tanh()


def add_method(self, x):
    return self.bn1(self.conv1(x)).add(x).relu()


def add_method_in_place(self, x):
    return self.relu(self.bn1(self.conv1(x)).add_(x))


def add_silu(self, x):
    return F.silu(self.bn1(self.conv1(x)) + x)


def residual_comes_later(self, x):
    y = self.bn1(self.conv1(x))
    return self.relu(y + self.conv2(x))


def broadcast_residual(self, x):
    return F.relu(self.bn1(self.conv1(x)) + x.mean(dim=(2, 3), keepdim=True))


def residual_is_a_number(self, x):
    return F.relu(self.bn1(self.conv1(x)) + x.shape[0])


def activation_comes_later(self, x):
    y = self.bn1(self.conv1(x))
    z = self.conv2(x)
    return self.relu(y) * z


def with_dropout(self, x):
    y = F.dropout(self.relu(self.bn1(self.conv1(x))), 0.5, self.training)
    z = self.bn2(self.conv2(y))
    y = F.dropout(y, 0.5, self.training)
    return F.relu(z + y)


FUSED = {
    relu_module: "1",
    relu_function: "1",
    torch_relu: "1",
    relu_method: "1",
    relu_method_in_place: "1",
    leaky_relu: "1",
    gelu_tanh: "1",
    others: "12",
    add: "1",
    add_relu: "1",
    add_relu_other_order: "1",
    add_in_place: "1",
    torch_add: "1",
    add_method: "1",
    add_method_in_place: "1",
    add_silu: "1",
    residual_comes_later: "1",
    broadcast_residual: "1",
    residual_is_a_number: "1",
    activation_comes_later: "1",
    with_dropout: "12",
}


@pytest.mark.parametrize(
    ("forward", "names"), FUSED.items(), ids=[forward.__name__ for forward in FUSED]
)
def test_what_is_fused(forward, names) -> None:
    report = compared(forward)
    assert report.fused == tuple(f"bn{i}" for i in names)
    assert not set(report.fused) & set(report.skipped)


def test_one_of_two_that_are_added_takes_the_sum() -> None:
    def forward(self, x):
        return self.relu(self.bn1(self.conv1(x)) + self.bn2(self.conv2(x)))

    report = compared(forward)
    assert report.fused == ("bn2",) and report.skipped == {}


def output_read_twice(self, x):
    y = self.bn1(self.conv1(x))
    return self.relu(y) * y


def read_after_the_activation(self, x):
    y = self.bn1(self.conv1(x))
    self.relu(y)  # in place
    return y * 2


def called_twice(self, x):
    return self.relu(self.bn1(self.conv2(self.relu(self.bn1(self.conv1(x))))))


def added_in_place_to_another(self, x):
    y = x * 2
    z = y
    y += self.bn1(self.conv1(x))
    return self.relu(y) + z


def input_may_be_changed(self, x):
    y = self.bn1(x)
    return y + self.branch(x)  # its ReLU is in place


def input_is_changed_under_another_name(self, x):
    same = x.view(-1, 3, 2, 2)
    y = self.bn1(same)
    x.mul_(2)
    return F.relu(y + x)


def shared_in_between(self, x):
    y = self.bn2(self.conv1(x))
    return F.relu(y + self.shared(x))


def statistics_are_read_in_between(self, x):
    y = self.bn1(self.conv1(x))
    return F.relu(y + x * self.bn1.running_mean.view(1, 3, 1, 1))


def added_to_itself(self, x):
    y = self.bn1(self.conv1(x))
    return F.relu(y + y)


def scaled_addition(self, x):
    return F.relu(torch.add(self.bn1(self.conv1(x)), x, alpha=2))


def other_slope_of_elu(self, x):
    return F.elu(self.bn1(self.conv1(x)), alpha=2.0)


NOT_FUSED = {
    output_read_twice: "its output has 2 readers",
    read_after_the_activation: "its output has 2 readers",
    called_twice: "it is called 2 times",
    added_in_place_to_another: "added in place to another value",
    input_may_be_changed: "branch runs before the addition, and may change its input",
    input_is_changed_under_another_name: "mul_ runs before the addition, and may change its input",
    shared_in_between: "shared calls it too, before the addition",
    statistics_are_read_in_between: "bn1.running_mean is read before the addition",
    added_to_itself: None,
    scaled_addition: None,
    other_slope_of_elu: None,
}


@pytest.mark.parametrize(
    ("forward", "why"), NOT_FUSED.items(), ids=[forward.__name__ for forward in NOT_FUSED]
)
def test_what_is_not_fused(forward, why) -> None:
    # With gradients, torch itself refuses an input that is changed.
    report = compared(forward, backward="changed" not in forward.__name__)
    assert report.fused == ()
    reasons = "".join(report.skipped.values())
    assert (
        (why in reasons and "Forward.forward of the model itself" in reasons)
        if why
        else not report.skipped
    )


def test_a_sum_with_another_reader_is_fused_without_the_activation() -> None:
    def forward(self, x):
        y = self.bn1(self.conv1(x)) + x
        return F.relu(y) * y

    report = compared(forward)
    assert report.fused == ("bn1",)
    assert "only the addition is fused: the sum has 2 readers" in report.skipped["bn1"]


def test_a_residual_that_the_gradient_needs_must_not_be_read_again() -> None:
    # SiLU's gradient keeps the residual, which the original does not: a write would be an error.
    def forward(self, x):
        y = self.conv2(x)
        z = self.silu(self.bn1(self.conv1(x)) + y)
        return z * self.relu(y)  # in place

    report = compared(forward)
    assert report.fused == ("bn1",)
    assert "only the addition is fused: its other operand" in report.skipped["bn1"]


@pytest.mark.parametrize("on", ["bn1", "relu"])
def test_hooked_modules_are_not_fused(on) -> None:
    module = net(relu_module)
    getattr(module, on).register_forward_hook(lambda m, args, y: None)
    report = convert_batchnorm(module, fuse=True)
    assert report.fused == () and "hooks" in report.skipped["bn1"]
    assert "forward" not in module.__dict__


def test_a_batch_norm_with_an_activation_is_not_fused() -> None:
    from bn_lightning import BatchNorm2d

    module = net(relu_module)
    module.bn1 = BatchNorm2d(3, activation="tanh")
    report = convert_batchnorm(module, fuse=True)
    assert report.fused == () and "already ends in an activation" in report.skipped["bn1"]


def test_a_batch_norm_of_this_package_is_fused_too() -> None:
    from bn_lightning import BatchNorm2d

    module = net(relu_module)
    module.bn1 = BatchNorm2d(3)
    report = convert_batchnorm(module, fuse=True)
    assert report.fused == ("bn1",) and report.converted == ("bn2",)


def test_in_place_operators_are_recorded_as_such() -> None:
    # torch.fx's own Proxy would compute `y = y + x` for `y += x`.
    def forward(self, x):
        y = self.conv2(self.relu(self.bn1(x)))
        z = y
        y += x
        return y + z

    assert compared(forward).fused == ("bn1",)
