"""BatchNorms of other classes: converted they compute the same, and come back as they were."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from foreign_batch_norms import (
    ABN,
    AnyRank,
    BatchNormAct2d,
    DetrFrozenBatchNorm2d,
    FrozenBatchNorm2d,
    FrozenBatchNormAct2d,
    Renamed,
    detectron2_frozen,
)
from module_snapshot import snapshot
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from bn_lightning import (
    Adapter,
    BatchNorm2d,
    FusedSyncBatchNorm,
    convert_batchnorm,
    register_batchnorm,
    revert_batchnorm,
)
from bn_lightning.conversion import adapters
from bn_lightning.conversion.adapters import AdapterError, find_adapter
from bn_lightning.conversion.convert import convert_model, is_converted

KNOWN: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: BatchNormAct2d(3, nn.Identity(), nn.ReLU(inplace=True)),
    "timm_own_activation": lambda: BatchNormAct2d(3, nn.Dropout(0.0), nn.PReLU(), momentum=None),
    "timm_parametrized": lambda: parametrize.register_parametrization(
        BatchNormAct2d(3, nn.Identity(), nn.SiLU()), "weight", nn.Softplus()
    ),
    "timm_plain": lambda: BatchNormAct2d(
        3, nn.Identity(), nn.Identity(), affine=False, track_running_stats=False
    ),
    "frozen": lambda: FrozenBatchNorm2d(3),
    "frozen_detr": lambda: DetrFrozenBatchNorm2d(3),
    "frozen_act": lambda: FrozenBatchNormAct2d(3),
    "frozen_detectron2": lambda: detectron2_frozen(3),
    "abn": lambda: ABN(3),
    "abn_elu": lambda: ABN(3, "elu", 1.0),
    "subclass": lambda: Renamed(3),
    "subclass_any_rank": lambda: AnyRank(3),
}


@pytest.fixture(autouse=True)
def own_registry(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(adapters, "_REGISTERED", {})
    return


def run(model: nn.Module) -> list[Tensor]:
    """Return outputs, gradients and buffers of three steps, and the output of an evaluation."""
    g = torch.Generator().manual_seed(0)
    results = []
    for step in range(4):
        model.train(step < 3)
        x = (torch.randn(4, 3, 2, 2, generator=g, dtype=torch.float64) + 1).requires_grad_()
        y = model(x)
        gradients = torch.autograd.grad(y.square().sum(), [x, *model.parameters()])
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients[1:], strict=True):
                parameter -= 0.01 * gradient
        results += [y.detach(), *gradients, *(b.clone().double() for b in model.buffers())]
    return results


@pytest.mark.parametrize("make", KNOWN.values(), ids=KNOWN.keys())
class TestKnown:
    def test_the_same_and_back(self, make: Callable[[], nn.Module]) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(make()).double()
        untouched = copy.deepcopy(model)
        hooked: list[Any] = []
        model[0].register_forward_hook(lambda module, args, y: hooked.append(y))
        before, keys, cls = snapshot(model), list(model.state_dict()), type(model[0])
        report = convert_batchnorm(model, fuse=True)
        assert report.converted == ("0",) and not report.skipped
        assert isinstance(model[0], parametrize.type_before_parametrizations(untouched[0]))
        assert convert_batchnorm(model, fuse=True).converted == ("0",)  # again
        torch.testing.assert_close(run(model), run(untouched), rtol=1e-12, atol=1e-12)
        assert list(model.state_dict()) == keys and len(hooked) == 4
        assert revert_batchnorm(model.train()) == ("0",)
        assert snapshot(model) == before and type(model[0]) is cls

    def test_a_copy_is_reverted_by_itself(self, make: Callable[[], nn.Module]) -> None:
        model = make().double()
        if not parametrize.is_parametrized(model) and "<locals>" not in type(model).__qualname__:
            pickle.dumps(model)  # otherwise torch or pickle refuses
            convert_batchnorm(model)
            twin = pickle.loads(pickle.dumps(model))
            assert revert_batchnorm(twin) == ("",)
        convert_batchnorm(model)
        cls = type(model)
        twin = copy.deepcopy(model)
        assert type(twin) is cls
        revert_batchnorm(twin)
        assert type(twin) is not cls and type(model) is cls


@pytest.mark.parametrize("name", ["timm", "timm_parametrized", "frozen_act", "abn"])
def test_the_activation_is_computed_in_the_same_call(name: str, monkeypatch) -> None:
    model = nn.Sequential(KNOWN[name]())
    convert_batchnorm(model, fuse=True)
    activations, compute = [], type(model[0])._batch_norm

    def watched(self: Any, *args: Any, **options: Any) -> Tensor:
        activations.append(options["activation"])
        return compute(self, *args, **options)

    monkeypatch.setattr(type(model[0]), "_batch_norm", watched)
    for training in (True, False):
        model.train(training)(torch.randn(2, 3, 4, 4))
    assert len(activations) == 2 and "identity" not in activations


@pytest.mark.parametrize("name", ["timm", "frozen_act", "abn"])
def test_a_copy_during_a_fit_has_the_original_class(name: str) -> None:
    model = nn.Sequential(KNOWN[name]())
    before, cls = snapshot(model), type(model[0])
    convert_model(model, fuse=True, backend="auto", is_temporary=True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[0]) is cls and not is_converted(twin)
    revert_batchnorm(model)
    assert snapshot(model) == before


def test_a_layer_by_its_name_and_shape_alone_is_not_believed() -> None:
    class BatchNormAct2d(nn.BatchNorm2d):
        def __init__(self) -> None:
            super().__init__(3)
            self.act = nn.ReLU()

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(self.act(input))

    class FrozenBatchNorm2d(DetrFrozenBatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input) if self.training else super().forward(input)

    model = nn.ModuleList([BatchNormAct2d(), FrozenBatchNorm2d(3), ABN(3, "elu", 0.5)])
    before = snapshot(model)
    report = convert_batchnorm(model)
    assert report.converted == () and list(report.skipped) == ["0", "1", "2"]
    assert all("register_batchnorm" in reason for reason in report.skipped.values())
    assert snapshot(model) == before


def test_others_are_named() -> None:
    class InPlaceABN(ABN):
        def forward(self, input: Tensor) -> Tensor:
            raise NotImplementedError

    model = nn.ModuleDict(
        {
            "in_place": InPlaceABN(3),
            "quantized": torch.ao.nn.quantized.BatchNorm2d(3),
            "instance": nn.InstanceNorm2d(3, track_running_stats=True),
        }
    )
    skipped = convert_batchnorm(model).skipped
    assert list(skipped) == ["in_place", "quantized"]
    assert "absolute value" in skipped["in_place"] and "quantized model" in skipped["quantized"]


@pytest.mark.parametrize(
    ("make", "dtype"),
    [(FrozenBatchNorm2d, torch.float32), (detectron2_frozen, torch.bfloat16)],
    ids=["torchvision", "detectron2"],
)
def test_the_dtype_of_a_frozen_layer(make: Callable[[int], nn.Module], dtype: torch.dtype) -> None:
    model = make(3)
    x = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16)
    wanted = model(x)
    convert_batchnorm(model)
    assert model(x).dtype == wanted.dtype == dtype
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_frozen_layer_has_the_same_bits(dtype: torch.dtype) -> None:
    model = nn.Sequential(FrozenBatchNorm2d(3), nn.ReLU(), FrozenBatchNormAct2d(3))
    x = torch.randn(2, 3, 5, 5).to(dtype).requires_grad_()
    results = []
    for _ in range(2):
        y = model(x)
        results += [y, *torch.autograd.grad((y * y.detach()).sum(), x)]
        convert_batchnorm(model, fuse=True)
    assert all(map(torch.equal, results[:2], results[2:]))


@pytest.mark.parametrize("make", [FrozenBatchNorm2d, detectron2_frozen, ABN])
def test_the_triton_kernels(make: Callable[[int], nn.Module]) -> None:
    pytest.importorskip("triton")
    model, x = make(3), torch.randn(2, 3, 5, 5)
    wanted = copy.deepcopy(model)(x)
    convert_batchnorm(model, backend="triton")
    torch.testing.assert_close(model(x), wanted)


def test_a_frozen_layer_takes_an_image_without_a_batch() -> None:
    model = FrozenBatchNorm2d(3)
    x = torch.randn(3, 3, 4)
    wanted = model(x)
    convert_batchnorm(model)
    assert torch.equal(model(x), wanted)


def test_a_frozen_layer_does_not_become_a_batch_norm() -> None:
    model = FrozenBatchNorm2d(3)
    convert_batchnorm(model)
    assert not isinstance(model, nn.BatchNorm2d)


def test_modules_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(DetrFrozenBatchNorm2d(3), BatchNormAct2d(3, nn.Identity(), nn.ReLU()))
    assert convert_batchnorm(model).converted == ("0", "1")


def test_conversion_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    convert_batchnorm(BatchNormAct2d(3, nn.Dropout(0.5), nn.RReLU()))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("make", [KNOWN["timm"], KNOWN["frozen_act"], KNOWN["abn"]])
def test_compile_and_export(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), make()).eval()
    x = torch.randn(2, 3, 4, 4)
    wanted = model(x)
    convert_batchnorm(model, fuse=True)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), wanted)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), wanted)


class BatchNormSwish(nn.Module):
    """A user's own, with its own names."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.epsilon, self.momentum = 1e-2, 0.2
        self.weight = nn.Parameter(torch.rand(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("calls", torch.zeros(()))
        self.gate = nn.Sigmoid()

    def forward(self, input: Tensor) -> Tensor:
        state = self.running_mean, self.running_var, self.weight, None
        y = F.batch_norm(input, *state, self.training, self.momentum, self.epsilon)
        return self.gate(F.silu(y))


def swish(module: BatchNormSwish) -> Adapter:
    return Adapter(after=("gate",), activation="silu", eps=module.epsilon)


class TestRegistered:
    @pytest.mark.parametrize(
        "adapter", [swish, Adapter(("gate",), "silu", eps=0.01)], ids=["function", "adapter"]
    )
    def test_it_is_converted_and_reverted(self, adapter: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(BatchNormSwish()).double()
        assert "register_batchnorm" in convert_batchnorm(model).skipped["0"]
        register_batchnorm(BatchNormSwish, adapter)
        untouched, before = copy.deepcopy(model), snapshot(model)
        assert convert_batchnorm(model).converted == ("0",)
        torch.testing.assert_close(run(model), run(untouched), rtol=1e-12, atol=1e-12)
        revert_batchnorm(model.train())
        assert snapshot(model) == before
        register_batchnorm(BatchNormSwish, None)
        assert find_adapter(model[0]) is None

    def test_a_subclass_with_the_same_forward(self) -> None:
        class Child(BatchNormSwish):
            pass

        class Other(BatchNormSwish):
            def forward(self, input: Tensor) -> Tensor:
                return -super().forward(input)

        register_batchnorm(BatchNormSwish, swish)
        report = convert_batchnorm(nn.ModuleList([Child(), Other()]))
        assert report.converted == ("0",) and list(report.skipped) == ["1"]

    @staticmethod
    def raises(module: BatchNormSwish) -> Adapter:
        raise KeyError("nothing")

    @staticmethod
    def sets_an_attribute(module: BatchNormSwish) -> Adapter:
        module.epsilon = 0.0
        return swish(module)

    @staticmethod
    def writes_a_tensor(module: BatchNormSwish) -> Adapter:
        module.running_mean.fill_(1)
        return swish(module)

    @staticmethod
    def removes_a_child(module: BatchNormSwish) -> Adapter:
        module.gate = nn.Identity()
        return swish(module)

    @pytest.mark.parametrize(
        ("adapter", "message"),
        [
            (raises, "got KeyError"),
            (lambda module: "silu", "got 'silu'"),
            (sets_an_attribute, "changes its state"),
            (writes_a_tensor, "changes its state"),
            (removes_a_child, "changes its state"),
            (Adapter(("gate",), "relu", eps=0.01), "another output in training"),
            (Adapter(("gate",), "silu", eps=0.02), "another output in training"),
            (Adapter(("gate",), "silu", eps=0.01, frozen=True), "another output in training"),
            (Adapter(("gate", "act"), "silu", eps=0.01), "no child 'act'"),
            (Adapter(("gate",), "silu"), "AttributeError"),
        ],
        ids=[
            "raises",
            "returns_something_else",
            "sets_an_attribute",
            "writes_a_tensor",
            "replaces_a_child",
            "another_activation",
            "another_eps",
            "frozen",
            "no_such_child",
            "no_eps",
        ],
    )
    @pytest.mark.parametrize("convert", [convert_batchnorm, FusedSyncBatchNorm().apply])
    def test_a_wrong_adapter_is_refused_and_changes_nothing(
        self, convert: Callable[[nn.Module], Any], adapter: Any, message: str
    ) -> None:
        model = nn.Sequential(nn.BatchNorm2d(3), BatchNormSwish(), nn.BatchNorm2d(3))
        before, state = snapshot(model), copy.deepcopy(model.state_dict())
        register_batchnorm(BatchNormSwish, adapter)
        with pytest.raises(AdapterError, match=f"BatchNormSwish.*{message}"):
            convert(model)
        assert snapshot(model) == before
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("cls", "adapter", "name"),
        [(nn.BatchNorm2d(3), swish, "cls"), (BatchNormSwish, "silu", "adapter")],
        ids=["cls", "adapter"],
    )
    def test_arguments(self, cls: Any, adapter: Any, name: str) -> None:
        with pytest.raises(TypeError, match=f"`{name}`"):
            register_batchnorm(cls, adapter)

    def test_an_unknown_activation(self) -> None:
        with pytest.raises(ValueError, match="`activation`"):
            Adapter(activation="swish")


class TestSynchronized:
    @pytest.mark.filterwarnings("ignore:expected an initialized process group")
    def test_the_activation_stays(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(KNOWN["timm"](), FrozenBatchNorm2d(3), ABN(3)).double()
        untouched, before = copy.deepcopy(model), snapshot(model)
        plugin = FusedSyncBatchNorm()
        plugin.apply(model)
        assert [hasattr(m, "_group_compared") for m in model] == [True, False, True]
        assert convert_batchnorm(model).converted == ("1",)
        torch.testing.assert_close(run(model), run(untouched), rtol=1e-12, atol=1e-12)
        plugin.revert(model)
        revert_batchnorm(model.train())
        assert snapshot(model) == before

    @pytest.mark.parametrize("first", ["sync", "convert"])
    def test_both_swaps_end_in_any_order(self, first: str) -> None:
        model = nn.Sequential(KNOWN["timm"](), ABN(3))
        before = snapshot(model)
        plugin = FusedSyncBatchNorm()
        convert_batchnorm(model)
        plugin.apply(model)
        assert isinstance(model[0], BatchNormAct2d) and not isinstance(model[0], BatchNorm2d)
        ends = [plugin.revert, revert_batchnorm]
        for end in ends if first == "sync" else reversed(ends):
            end(model)
        assert snapshot(model) == before

    @pytest.mark.slow
    def test_two_ranks_normalize_by_both_batches(self, ranks) -> None:
        ranks(rank_activation)


def rank_activation() -> None:
    """Compare timm's layer on two parts of a batch with itself on the whole."""
    x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    part = slice(4) if dist.get_rank() == 0 else slice(4, None)
    plain = KNOWN["timm"]().double()
    model = nn.Sequential(copy.deepcopy(plain))
    FusedSyncBatchNorm().apply(model)
    torch.testing.assert_close(model(x[part]), plain(x)[part], rtol=0, atol=1e-12)
    torch.testing.assert_close(model[0].state_dict(), plain.state_dict(), rtol=0, atol=1e-12)
