"""`backend="auto"`: the counted costs, and what replaces them."""

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bn_lightning.kernels import cost, dispatch, launch_plan, schedule
from bn_lightning.kernels.activations import ACTIVATIONS
from bn_lightning.kernels.arguments import BatchNormArguments
from bn_lightning.kernels.cost import (
    HostTime,
    Machine,
    backward_passes,
    eager_cost,
    forward_passes,
    triton_cost,
    triton_is_cheaper,
)
from bn_lightning.kernels.measurements import DTYPES, Cost, Fusion, Table, Tensors
from bn_lightning.kernels.schedule import Device, Regime, forced_regime

H200 = Machine("NVIDIA H200", Device(processors=132, cache_bytes=50 << 20), 4.3e6, True)
BN, BN_RELU, BN_ADD_RELU = (
    Fusion("identity", False, True),
    Fusion("relu", False, True),
    Fusion("relu", True, True),
)
BF16 = torch.bfloat16
LARGE = Tensors((256, 256, 56, 56), BF16, False)
TINY = Tensors((60, 100), torch.float32, False)
NOTHING = Table({})


FUSIONS = {
    "bn": BN,
    "bn_relu": BN_RELU,
    "bn_add_relu": BN_ADD_RELU,
    "bn_add": Fusion("identity", True, True),
    "bn_add_tanh": Fusion("tanh", True, True),
    "bn_add_silu": Fusion("silu", True, True),
}


def _moved(launches: list[Any], x: torch.Tensor) -> float:
    """Return the bytes of the tensors and masks in the launches, in passes over `x`.

    A kernel reads or writes each of its tensors once.
    """
    passes = 0.0
    for launch in launches:
        found = torch.utils._pytree.tree_leaves(launch.arguments)
        large = [t for t in found if isinstance(t, torch.Tensor) and 8 * t.numel() >= x.numel()]
        passes += sum(t.nbytes for t in large) / x.nbytes
    return passes


@pytest.mark.parametrize("regime", Regime, ids=lambda r: r.value)
@pytest.mark.parametrize("fusion", FUSIONS.values(), ids=FUSIONS.keys())
def test_passes_and_launches_are_those_of_the_kernels(
    fusion: Fusion, regime: Regime, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    pytest.importorskip("triton")
    if device == "cuda":
        pytest.skip("on a GPU autograd runs backwards in a thread in which nothing is recorded")
    # Two samples are two tiles, and two splits.
    monkeypatch.setattr(schedule, "REDUCTION_BYTES", 256)
    schedule._make_schedule.cache_clear()
    tensors = Tensors((2, 1, 96), BF16, False)
    x, residual = (torch.randn(tensors.shape).to(device, BF16).requires_grad_() for _ in "12")
    per_channel = [torch.ones(1, device=device) for _ in range(4)]
    inputs = [x, per_channel[0].requires_grad_(), *([residual] if fusion.has_residual else [])]

    def forward(training: bool) -> tuple[torch.Tensor, list[Any]]:
        call = BatchNormArguments(
            x,
            residual if fusion.has_residual else None,
            *per_channel,
            num_batches_tracked=None,
            training=training,
            momentum=0.1,
            eps=1e-5,
            activation=fusion.activation,
            negative_slope=0.01,
        )
        # The op, because the eager path notes its launches itself.
        with launch_plan.recorded() as recording:
            y = torch.ops.bn_lightning.batch_norm(*call)
        return y, recording.launches

    with forced_regime(regime):
        y, launches = forward(True)
        assert _moved(launches, x) == pytest.approx(forward_passes(fusion, BF16, regime))
        with launch_plan.recorded() as backward:
            torch.autograd.grad(y, inputs, torch.ones_like(y))
        passes = backward_passes(fusion, BF16, regime)
        assert _moved(backward.launches, x) == pytest.approx(passes)
        launches_us = triton_cost(tensors, fusion, H200).host_us - cost.TRITON_HOST[True].of(fusion)
        expected = len(launches + backward.launches) * cost.LAUNCH_US
        assert launches_us == pytest.approx(expected)
        with torch.no_grad():
            _, launches = forward(False)
    evaluation = fusion._replace(training=False)
    assert _moved(launches, x) == forward_passes(evaluation, BF16, regime)
    assert len(launches) == 1
    schedule._make_schedule.cache_clear()


# The table in docs/performance.md: m, the mask, is a sixteenth of a 16-bit tensor.
@pytest.mark.parametrize(
    ("fusion", "two_pass", "read_once"),
    [
        (BN, (3, 5), (2, 3)),
        (BN_RELU, (3, 5), (2, 3)),
        (BN_ADD_RELU, (4 + 1 / 16, 6 + 2 / 16), (3 + 1 / 16, 4 + 1 / 16)),
    ],
    ids=["bn", "bn_relu", "bn_add_relu"],
)
def test_passes(fusion: Fusion, two_pass: tuple[float, float], read_once: tuple[float, float]):
    for regime in Regime:
        expected = two_pass if regime is Regime.TWO_PASS else read_once
        found = forward_passes(fusion, BF16, regime), backward_passes(fusion, BF16, regime)
        assert found == pytest.approx(expected)
    evaluation = fusion._replace(training=False)
    assert forward_passes(evaluation, BF16, Regime.TWO_PASS) == 2 + fusion.has_residual


def test_the_time_on_the_device_of_a_large_tensor_is_its_bytes():
    T_us = 256 * 256 * 56 * 56 * 2 / 4.3e6
    # 256 channels are a wave of programs without splits, which nothing adds.
    launches = {"two_pass": 5, "bn": 4, "bn_relu": 6, "bn_add_relu": 7}
    # torch's reductions have a quarter of the bandwidth, and 256 of 264 programs.
    norm = 6 * 264 / 256 / 0.25 + 2
    eager = (norm, norm + 5, norm + 8)
    fusions = (BN, BN_RELU, BN_ADD_RELU)
    for fusion, theirs, ours in zip(fusions, eager, (8, 8, 10 + 3 / 16), strict=True):
        found = triton_cost(LARGE, fusion, H200)
        us = ours * T_us / cost.TRITON_SHARE + launches["two_pass"] * cost.LAUNCH_US
        assert found.us == found.device_us == pytest.approx(us)
        found = eager_cost(LARGE, fusion, H200)
        assert found.device_us == pytest.approx(
            theirs * T_us + launches[fusion.name] * cost.LAUNCH_US
        )


def test_eager_reductions_of_few_channels_use_few_processors():
    few = Tensors((256, 33, 56, 56), BF16, False)
    T_us = 256 * 33 * 56 * 56 * 2 / 4.3e6
    eighth = (1 + 5) * 8 / 0.25 + 2
    assert eager_cost(few, BN, H200).device_us == pytest.approx(eighth * T_us + 4 * cost.LAUNCH_US)
    for other in (few._replace(channels_last=True), Tensors((256 * 56 * 56, 33), BF16, False)):
        assert eager_cost(other, BN, H200).device_us < 25 * T_us


GPU_DAY = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu_day" / "times.csv"


def test_the_counted_costs_are_those_that_were_measured() -> None:
    """Nearly all within a factor of two, and the choices by them are right."""
    measured: dict[tuple[Tensors, Fusion], dict[str, float]] = {}
    with open(GPU_DAY, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            sizes = tuple(map(int, row["shape"].split("x")))
            tensors = Tensors(sizes, DTYPES[row["dtype"]], row["layout"] == "channels_last")
            activation = "identity" if row["fusion"] == "bn" else "relu"
            fusion = Fusion(activation, "add" in row["fusion"], row["mode"] == "training")
            case = measured.setdefault((tensors, fusion), {})
            case[row["who"]] = float(row["device_us"])
    good, ratios = 0, []
    measured = {key: case for key, case in measured.items() if "eager" in case}
    for (tensors, fusion), case in measured.items():
        best = min(us for who, us in case.items() if who in {r.value for r in Regime})
        chosen = best if triton_is_cheaper(tensors, fusion, H200, NOTHING) else case["eager"]
        good += chosen <= 1.03 * min(best, case["eager"])
        if best > 100:
            ratios.append(triton_cost(tensors, fusion, H200).device_us / best)
            ratios.append(eager_cost(tensors, fusion, H200).device_us / case["eager"])
    assert len(measured) == 750 and good == 740
    assert sum(0.5 < ratio < 2 for ratio in ratios) > 0.97 * len(ratios)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_tiny_tensor_costs_its_host_time(training: bool) -> None:
    fusion = BN_RELU._replace(training=training)
    ours, theirs = triton_cost(TINY, fusion, H200), eager_cost(TINY, fusion, H200)
    assert ours.us == ours.host_us > cost.TRITON_HOST[training].batch_norm
    times = cost.EAGER_HOST[training]
    assert theirs.us == theirs.host_us > times.batch_norm + times.activation


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_fusion_of_a_large_tensor_goes_to_triton(activation: str) -> None:
    for has_residual in (True, False):
        for training in (True, False):
            assert triton_is_cheaper(
                LARGE, Fusion(activation, has_residual, training), H200, NOTHING
            )


@pytest.mark.parametrize("shape", [(2, 8), (60, 100), (64, 64, 8, 8)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("fusion", [BN, BN_RELU, BN_ADD_RELU], ids=["bn", "bn_relu", "bn_add_relu"])
def test_a_small_tensor_goes_to_triton(
    shape: tuple[int, ...], fusion: Fusion, training: bool
) -> None:
    for dtype in (torch.float32, BF16):
        tensors, wanted = Tensors(shape, dtype, False), fusion._replace(training=training)
        assert triton_is_cheaper(tensors, wanted, H200, NOTHING)
        # Where Triton itself launches, the host takes several times as long.
        unknown = H200._replace(knows_triton=False)
        assert not triton_is_cheaper(tensors, wanted, unknown, NOTHING)


def test_a_batch_norm_alone_goes_to_cudnn_where_that_has_the_bandwidth() -> None:
    half = Tensors((256, 64, 56, 56), torch.float16, True)
    assert not triton_is_cheaper(half._replace(shape=(256, 512, 14, 14)), BN, H200, NOTHING)
    assert triton_is_cheaper(half, BN_RELU, H200, NOTHING)
    assert triton_is_cheaper(half._replace(dtype=BF16), BN, H200, NOTHING)


def test_of_nearly_equal_host_times_the_device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for triton, expected in (
        (Cost(8.0, 104.0), True),
        (Cost(12.0, 104.0), False),
        (Cost(8.0, 115.0), False),
    ):
        monkeypatch.setattr(cost, "triton_cost", lambda *_, triton=triton: triton)
        monkeypatch.setattr(cost, "eager_cost", lambda *_: Cost(10.0, 100.0))
        assert triton_is_cheaper(TINY, BN, H200, NOTHING) is expected


def test_equal_costs_go_to_eager_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for module_cost in ("triton_cost", "eager_cost"):
        monkeypatch.setattr(cost, module_cost, lambda *_: Cost(1.0, 2.0))
    assert not triton_is_cheaper(LARGE, BN, H200, NOTHING)


def test_a_triton_that_is_not_known_costs_more_on_the_host() -> None:
    unknown = H200._replace(knows_triton=False)
    for fusion in (BN_RELU, BN_RELU._replace(training=False)):
        more = triton_cost(TINY, fusion, unknown).host_us - triton_cost(TINY, fusion, H200).host_us
        assert more > 0
        assert triton_cost(LARGE, fusion, unknown) > triton_cost(LARGE, fusion, H200)


def test_host_time_decides_for_a_small_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    for host_us, expected in ((1e-3, True), (1e4, False)):
        monkeypatch.setattr(cost, "TRITON_HOST", {True: HostTime(host_us, 0.0, 0.0)})
        assert triton_is_cheaper(TINY, BN_ADD_RELU, H200, NOTHING) is expected


def _table(eager: Cost, **regimes: Cost) -> Table:
    return Table({("NVIDIA H200", TINY): {("bn", True): {"eager": eager, **regimes}}})


def test_measured_times_of_the_device_replace_counted_ones() -> None:
    eager = Cost(1000.0, 50.0)
    faster, slower = Cost(900.0, 5000.0), Cost(1100.0, 1.0)
    assert triton_is_cheaper(TINY, BN, H200, _table(eager, single_launch=faster))
    assert not triton_is_cheaper(TINY, BN, H200, _table(eager, single_launch=slower))
    # The regime that runs is the one with the least time on the device.
    both = _table(eager, single_launch=slower, two_pass=faster)
    assert triton_is_cheaper(TINY, BN, H200, both)
    # Another device, another fusion, and rows without eager torch: the counted costs.
    counted = triton_is_cheaper(TINY, BN, H200, NOTHING)
    table = _table(eager, single_launch=slower)
    assert counted and triton_is_cheaper(TINY, BN, H200._replace(name="other"), table)
    assert triton_is_cheaper(TINY, BN_RELU, H200, table)
    lonely = Table({("NVIDIA H200", TINY): {("bn", True): {"two_pass": slower}}})
    assert triton_is_cheaper(TINY, BN, H200, lonely)


def test_the_bandwidth_is_that_of_a_copy() -> None:
    # An H100's 2619 MHz and 5120 bits: 3.35 TB/s.
    assert cost.copy_bandwidth(2_619_000, 5120) == pytest.approx(3.017e6, rel=1e-3)
    assert cost.copy_bandwidth(0, 0) == cost.DEFAULT_BYTES_PER_US


@pytest.fixture
def on_an_h200(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Take tensors of the CPU for tensors of an H200, and count the decisions that are made."""
    made: list[Fusion] = []

    def is_cheaper(tensors: Tensors, fusion: Fusion, machine: Machine, table: Table) -> bool:
        made.append(fusion)
        return triton_is_cheaper(tensors, fusion, machine, table)

    dispatch._is_cheaper.cache_clear()
    monkeypatch.setattr(dispatch, "uses_triton", lambda x, backend: backend != "native")
    monkeypatch.setattr(dispatch, "machine_of", lambda device: H200)
    monkeypatch.setattr(dispatch, "load_table", lambda: NOTHING)
    monkeypatch.setattr(dispatch, "triton_is_cheaper", is_cheaper)
    yield made
    dispatch._is_cheaper.cache_clear()


def test_auto_follows_the_cost_and_asks_once(on_an_h200: list[Fusion]) -> None:
    x = torch.empty(256, 512, 14, 14, dtype=torch.float16, memory_format=torch.channels_last)
    for fusion, expected in ((BN, False), (BN_ADD_RELU, True)):
        for _ in range(3):
            assert dispatch.chooses_triton(x, "auto", fusion) is expected
    assert on_an_h200 == [BN, BN_ADD_RELU]


def test_a_backend_that_is_named_is_taken_whatever_it_costs(on_an_h200: list[Fusion]) -> None:
    x = torch.ones(60, 100)
    assert dispatch.chooses_triton(x, "triton", BN)
    assert not dispatch.chooses_triton(x, "native", BN_ADD_RELU)
    assert not on_an_h200


def test_subclasses_are_not_asked_for_costs(on_an_h200: list[Fusion]) -> None:
    class Subclass(torch.Tensor):
        pass

    assert dispatch.chooses_triton(torch.ones(60, 100).as_subclass(Subclass), "auto", BN)
    assert not on_an_h200


@pytest.mark.slow
def test_compilers_are_not_asked_for_costs(on_an_h200: list[Fusion]) -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if dispatch.chooses_triton(x, "auto", BN) else x

    assert compiled(torch.ones(60, 100)).eq(2).all()
    assert not on_an_h200


def test_a_shape_that_the_checks_refuse_reaches_them(on_an_h200: list[Fusion]) -> None:
    assert dispatch.chooses_triton(torch.ones(3), "auto", BN)


def test_the_page_has_the_counted_costs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    section = page.split("## Where auto uses the kernels")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d[\dx]+) \|(.*)\|$", section, re.MULTILINE)
    assert len(rows) > 5
    for shape, figures in rows:
        tensors = Tensors(tuple(map(int, shape.split("x"))), BF16, False)
        expected = [
            eager_cost(tensors, fusion, H200).us / triton_cost(tensors, fusion, H200).us
            for fusion in (BN, BN_RELU, BN_ADD_RELU)
        ]
        assert [float(figure) for figure in figures.split("|")] == pytest.approx(expected, abs=6e-3)
