"""Converting keeps what a model computes; reverting restores the model."""

import copy
import pickle
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from module_snapshot import snapshot
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from bn_lightning import (
    BatchNorm1d,
    BatchNorm2d,
    convert_batchnorm,
    fold_batchnorm,
    fusion_counts,
    revert_batchnorm,
)
from bn_lightning.conversion.class_swap import restore_class, swap_class
from bn_lightning.conversion.convert import Conversion, is_converted

# Both run the same operations in the same order.
TOLERANCES = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
}
architectures = pytest.mark.parametrize("name", ARCHITECTURES)


def train(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Return the outputs of ten steps of SGD, and of one evaluation."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    outputs = []
    for _ in range(10):
        y = model(torch.randn(shape, dtype=dtype) + 0.5)
        outputs.append(y.detach())
        (y - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return [*outputs, model(torch.randn(shape, dtype=dtype))]


def pair(name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = ARCHITECTURES[name].build().to(dtype)
    return model, copy.deepcopy(model)


def batch_norms(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, _BatchNorm)]


class TestArchitectures:
    @pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp64", "fp32"])
    @pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
    @architectures
    def test_ten_steps_and_back(self, name: str, fuse: bool, dtype: torch.dtype) -> None:
        model, untouched = pair(name, dtype)
        model.register_forward_hook(lambda *_: None)
        model.get_submodule(batch_norms(model)[0]).bias.requires_grad_(False)
        untouched.get_submodule(batch_norms(model)[0]).bias.requires_grad_(False)
        before = snapshot(model)
        convert_batchnorm(model, fuse=fuse)
        converted = train(model, ARCHITECTURES[name].shape, dtype)
        keys = list(model.state_dict())
        revert_batchnorm(model.train())
        assert snapshot(model) == before
        plain = train(untouched, ARCHITECTURES[name].shape, dtype)
        torch.testing.assert_close(converted, plain, **TOLERANCES[dtype])
        torch.testing.assert_close(model.state_dict(), untouched.state_dict(), **TOLERANCES[dtype])
        assert keys == list(untouched.state_dict())

    @architectures
    def test_native_backend_is_bit_identical_to_torch(self, name: str) -> None:
        model, untouched = pair(name, torch.float32)
        convert_batchnorm(model, backend="native")
        a, b = (train(m, ARCHITECTURES[name].shape, torch.float32) for m in (model, untouched))
        assert all(map(torch.equal, a, b))
        assert all(map(torch.equal, model.state_dict().values(), untouched.state_dict().values()))

    @architectures
    def test_everything_fusable_is_fused(self, name: str, fused_calls: list[bool]) -> None:
        model, _ = pair(name, torch.float32)
        report = convert_batchnorm(model, fuse=True)
        names = batch_norms(model)
        assert report.converted == report.fusable == tuple(names) and report.skipped == {}
        unfused = ARCHITECTURES[name].unfused
        for run, training in enumerate((True, True, False, False)):
            fused_calls.clear()
            model.train(training)(torch.randn(ARCHITECTURES[name].shape))
            assert len(fused_calls) == len(names)
            assert sum(fused_calls) == len(names) - len(unfused)
            counts = fusion_counts(model)
            assert {n for n in names if not counts[n].fused} == set(unfused)
            assert {sum(count) for count in counts.values()} == {run + 1}

    @architectures
    def test_checkpoints_load_both_ways(self, name: str) -> None:
        model, other = pair(name, torch.float32)
        train(other, ARCHITECTURES[name].shape, torch.float32)
        convert_batchnorm(model, fuse=True)
        model.load_state_dict(other.state_dict())
        x = torch.randn(ARCHITECTURES[name].shape)
        torch.testing.assert_close(model.eval()(x), other(x))
        train(model.train(), ARCHITECTURES[name].shape, torch.float32)
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(model(x), other(x))


def test_the_triton_kernels_train_a_fused_network() -> None:
    pytest.importorskip("triton")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sigmoid(), nn.Linear(4, 2))
    untouched = copy.deepcopy(model)
    convert_batchnorm(model, fuse=True, backend="triton")
    a, b = (train(m, (5, 3), torch.float32) for m in (model, untouched))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class TestIdentity:
    def test_parameters_and_buffers_are_the_same_objects(self) -> None:
        bn = nn.BatchNorm2d(3).eval()
        bn.weight.requires_grad_(False)
        tensors = [id(t) for t in (*bn.parameters(), *bn.buffers())]
        convert_batchnorm(bn)
        assert [id(t) for t in (*bn.parameters(), *bn.buffers())] == tensors
        assert not bn.training and not bn.weight.requires_grad

    def test_a_batch_norm_by_itself(self) -> None:
        bn = nn.BatchNorm1d(3)
        assert convert_batchnorm(bn) == Conversion(("",), (), {})
        assert type(bn) is BatchNorm1d
        assert revert_batchnorm(bn) == ("",) and type(bn) is nn.BatchNorm1d

    def test_an_optimizer_built_before_goes_on(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        convert_batchnorm(model)
        model(torch.randn(4, 3)).square().sum().backward()
        before = model[1].bias.clone()
        optimizer.step()
        assert not torch.equal(model[1].bias, before)

    def test_shared_modules_stay_shared(self) -> None:
        bn = nn.BatchNorm1d(3)
        model = nn.ModuleDict({"a": bn, "b": nn.Sequential(bn)})
        assert convert_batchnorm(model).converted == ("a",)
        assert model["a"] is model["b"][0] is bn
        assert revert_batchnorm(model) == ("a",) and type(bn) is nn.BatchNorm1d

    @pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
    def test_hooks_run_on(self, fuse: bool) -> None:
        model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
        seen: list[Tensor] = []
        model[0].register_forward_hook(lambda m, args, y: seen.append(y))
        convert_batchnorm(model, fuse=fuse)
        y = model(torch.randn(4, 3))
        assert torch.equal(seen[0].relu(), y) and not torch.equal(seen[0], y)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_dtype_stays(self, dtype: torch.dtype) -> None:
        bn = nn.BatchNorm1d(3, dtype=dtype)
        convert_batchnorm(bn)
        assert {bn.weight.dtype, bn.running_mean.dtype} == {dtype}
        assert bn(torch.randn(4, 3, dtype=dtype)).dtype == dtype

    def test_moved_and_retyped_while_converted(self) -> None:
        model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
        convert_batchnorm(model, fuse=True)
        model.to(torch.float64).to("meta")
        revert_batchnorm(model)
        assert model[0].weight.device.type == "meta" and model[0].weight.dtype == torch.float64

    @pytest.mark.parametrize(
        "options",
        [
            {"momentum": None},
            {"affine": False},
            {"track_running_stats": False},
            {"eps": 0.1, "momentum": 0.5},
        ],
        ids=str,
    )
    def test_options(self, options: dict[str, Any]) -> None:
        bn = nn.BatchNorm1d(3, **options)
        untouched = copy.deepcopy(bn)
        convert_batchnorm(bn)
        for training in (True, True, False):
            x = torch.randn(5, 3)
            torch.testing.assert_close(bn.train(training)(x), untouched.train(training)(x))
        revert_batchnorm(bn)
        assert bn.__dict__.keys() == untouched.__dict__.keys()
        torch.testing.assert_close(bn.state_dict(), untouched.state_dict())

    @pytest.mark.parametrize(
        "duplicate",
        [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
        ids=["deepcopy", "pickle"],
    )
    def test_a_copy_is_reverted_by_itself(self, duplicate) -> None:
        model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
        convert_batchnorm(model, fuse=True)
        twin = duplicate(model)
        assert revert_batchnorm(twin) == ("0",)
        assert type(twin[0]) is nn.BatchNorm1d and type(model[0]) is BatchNorm1d


class TestRepeated:
    def test_converting_twice_is_converting_once(self) -> None:
        model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
        before = snapshot(model)
        first = convert_batchnorm(model, fuse=True)
        assert convert_batchnorm(model, fuse=True) == first
        revert_batchnorm(model)
        assert snapshot(model) == before

    def test_the_last_call_counts(self) -> None:
        model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
        convert_batchnorm(model, fuse=True, backend="native")
        report = convert_batchnorm(model)
        assert report == Conversion(("0",), (), {}) and not fusion_counts(model)
        assert model[0].backend == "auto"

    def test_reverting_what_was_never_converted(self) -> None:
        model = nn.Sequential(nn.BatchNorm1d(3), BatchNorm1d(3, backend="native"), nn.ReLU())
        before = snapshot(model)
        assert revert_batchnorm(model) == ()
        assert revert_batchnorm(nn.Linear(2, 2)) == ()
        assert snapshot(model) == before

    def test_reverting_twice(self) -> None:
        model = nn.BatchNorm1d(3)
        convert_batchnorm(model)
        assert revert_batchnorm(model) == ("",) and revert_batchnorm(model) == ()

    def test_another_swap_over_it(self) -> None:
        class Over(BatchNorm2d):
            pass

        bn = nn.BatchNorm2d(3)
        convert_batchnorm(bn)
        swap_class(bn, Over, "other")
        assert convert_batchnorm(bn).converted == ("",)
        revert_batchnorm(bn)
        assert type(bn) is Over
        restore_class(bn, "other")
        assert type(bn) is nn.BatchNorm2d


class OwnBatchNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class OwnFused(BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class OwnLazyBatchNorm(nn.LazyBatchNorm1d):
    pass


class TestSkipped:
    @pytest.mark.parametrize(
        ("make", "reason"),
        [
            (lambda: OwnBatchNorm(3), "OwnBatchNorm is not torch's"),
            (lambda: OwnFused(3), "OwnFused is not torch's"),
            (OwnLazyBatchNorm, "OwnLazyBatchNorm is not torch's"),
            (lambda: nn.SyncBatchNorm(3), "FusedSyncBatchNorm"),
        ],
        ids=["subclass", "subclass_of_ours", "lazy_subclass", "sync"],
    )
    def test_others_are_named(self, make, reason: str) -> None:
        model = nn.Sequential(nn.BatchNorm2d(3), make(), nn.BatchNorm2d(3))
        before = snapshot(model[1])
        report = convert_batchnorm(model, fuse=True)
        assert report.converted == ("0", "2") and list(report.skipped) == ["1"]
        assert reason in report.skipped["1"]
        assert snapshot(model[1]) == before

    def test_an_instance_with_its_own_forward(self) -> None:
        bn = nn.BatchNorm2d(3)
        bn.forward = lambda x: x
        assert "its own forward" in convert_batchnorm(bn).skipped[""]
        assert type(bn) is nn.BatchNorm2d

    def test_this_packages_own(self) -> None:
        bn = BatchNorm1d(3, activation="relu", backend="native")
        assert convert_batchnorm(bn) == Conversion((), (), {}) and not is_converted(bn)
        assert bn.backend == "native" and revert_batchnorm(bn) == () and type(bn) is BatchNorm1d
        beside = nn.Sequential(bn, nn.BatchNorm1d(3))
        assert convert_batchnorm(beside).converted == ("1",) and is_converted(beside)

    def test_other_normalizations_are_not_converted(self) -> None:
        model = nn.Sequential(nn.InstanceNorm1d(3), nn.GroupNorm(1, 3), nn.LayerNorm(3))
        with pytest.warns(UserWarning, match="`model`.*BatchNorm, got Sequential") as warned:
            assert convert_batchnorm(model, fuse=True) == Conversion((), (), {})
        assert warned[0].filename == __file__  # the caller's line

    def test_a_forward_that_branches_on_values_is_fused(self) -> None:
        class Branching(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bn = nn.BatchNorm1d(3)

            def forward(self, x: Tensor) -> Tensor:
                return self.bn(x).relu() if x.sum() > 0 else x

        model = Branching()
        convert_batchnorm(model, fuse=True)
        x = torch.rand(4, 3)
        torch.testing.assert_close(model(x), nn.BatchNorm1d(3)(x).relu())
        assert fusion_counts(model) == {"bn": (1, 0)}


class TestArguments:
    @pytest.mark.parametrize("function", [convert_batchnorm, revert_batchnorm])
    def test_no_module(self, function) -> None:
        with pytest.raises(TypeError, match="`model`.*Module, got list"):
            function([nn.BatchNorm1d(3)])

    def test_an_unknown_backend_changes_nothing(self) -> None:
        bn = nn.BatchNorm1d(3)
        with pytest.raises(ValueError, match="`backend`.*got 'cudnn'"):
            convert_batchnorm(bn, backend="cudnn")
        assert type(bn) is nn.BatchNorm1d

    def test_the_result_as_text(self) -> None:
        model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.SyncBatchNorm(3))
        lines = str(convert_batchnorm(model, fuse=True)).splitlines()
        assert lines[0] == "1 BatchNorms converted, 1 may be fused, 1 skipped:"
        assert lines[1].startswith("  2: nn.SyncBatchNorm")


class TestLazy:
    @staticmethod
    def model() -> nn.Sequential:
        return nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.ReLU())

    def test_it_becomes_ours_when_it_learns_its_size(self) -> None:
        model = self.model()
        report = convert_batchnorm(model, backend="native")
        assert report.converted == ("1",) and type(model[1]) is nn.LazyBatchNorm1d
        model(torch.randn(4, 2))
        assert type(model[1]) is BatchNorm1d and model[1].backend == "native"
        assert convert_batchnorm(model, fuse=True).fusable == ("1",)
        assert revert_batchnorm(model) == ("1",)
        reference = self.model()
        reference(torch.randn(4, 2))
        assert type(model[1]) is nn.BatchNorm1d
        assert model[1].__dict__.keys() == reference[1].__dict__.keys()

    def test_reverted_before(self) -> None:
        model = self.model()
        before = snapshot(model)
        convert_batchnorm(model)
        revert_batchnorm(model)
        assert snapshot(model) == before
        model(torch.randn(4, 2))
        assert type(model[1]) is nn.BatchNorm1d

    def test_fusing_has_to_wait(self) -> None:
        model = self.model()
        report = convert_batchnorm(model, fuse=True)
        assert report.fusable == () and "no size yet" in report.skipped["1"]
        model(torch.randn(4, 2))

    def test_another_swap_over_it(self) -> None:
        class Over(BatchNorm1d):
            pass

        model = self.model()
        convert_batchnorm(model)
        model(torch.randn(4, 2))
        swap_class(model[1], Over, "other")
        revert_batchnorm(model)
        assert type(model[1]) is Over
        restore_class(model[1], "other")
        assert type(model[1]) is nn.BatchNorm1d


class Double(nn.Module):
    """A parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class TestParametrized:
    @staticmethod
    def check(bn: nn.Module, weight: float, bias: float) -> None:
        x = torch.randn(4, 3)
        y = nn.functional.batch_norm(
            x, None, None, torch.full((3,), weight), torch.full((3,), bias), training=True
        )
        torch.testing.assert_close(bn(x), y)

    def test_it_is_kept(self) -> None:
        bn = nn.BatchNorm1d(3)
        parametrize.register_parametrization(bn, "weight", Double())
        before, cls = snapshot(bn), type(bn)
        assert convert_batchnorm(bn).converted == ("",)
        assert isinstance(bn, BatchNorm1d) and type(bn).__name__ == "ParametrizedBatchNorm1d"
        assert parametrize.is_parametrized(bn, "weight")
        self.check(bn, 2.0, 0.0)
        self.check(copy.deepcopy(bn), 2.0, 0.0)
        revert_batchnorm(bn)
        assert snapshot(bn) == before and type(bn) is cls
        self.check(bn, 2.0, 0.0)

    def test_it_is_fused(self) -> None:
        model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
        parametrize.register_parametrization(model[0], "weight", Double())
        assert convert_batchnorm(model, fuse=True).fusable == ("0",)
        x = torch.randn(4, 3)
        torch.testing.assert_close(model(x), (2 * nn.BatchNorm1d(3)(x)).relu())

    def test_it_comes_while_converted(self) -> None:
        bn = nn.BatchNorm1d(3)
        convert_batchnorm(bn)
        parametrize.register_parametrization(bn, "weight", Double())
        self.check(bn, 2.0, 0.0)
        revert_batchnorm(bn)
        assert type(bn).__bases__ == (nn.BatchNorm1d,)
        self.check(bn, 2.0, 0.0)
        parametrize.remove_parametrizations(bn, "weight")
        assert type(bn) is nn.BatchNorm1d
        self.check(bn, 2.0, 0.0)

    def test_another_comes_while_converted(self) -> None:
        bn = nn.BatchNorm1d(3)
        nn.init.ones_(bn.bias)
        parametrize.register_parametrization(bn, "weight", Double())
        convert_batchnorm(bn)
        parametrize.register_parametrization(bn, "bias", Double())
        revert_batchnorm(bn)
        assert type(bn).__bases__ == (nn.BatchNorm1d,)
        self.check(bn, 2.0, 2.0)

    def test_it_goes_while_converted(self) -> None:
        bn = nn.BatchNorm1d(3)
        parametrize.register_parametrization(bn, "weight", Double())
        convert_batchnorm(bn)
        parametrize.remove_parametrizations(bn, "weight")
        assert type(bn) is BatchNorm1d
        revert_batchnorm(bn)
        assert type(bn) is nn.BatchNorm1d
        self.check(bn, 2.0, 0.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_part_is_left_as_it_is():
    head = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), torch.jit.script(head)).eval()
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    assert convert_batchnorm(model, fuse=True).converted == ("1",)
    torch.testing.assert_close(model(x), expected)
    revert_batchnorm(model)
    folded = fold_batchnorm(model, x)
    assert type(folded[1]) is nn.Identity
    torch.testing.assert_close(folded(x), expected)
