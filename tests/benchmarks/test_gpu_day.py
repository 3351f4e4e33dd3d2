"""`benchmarks/gpu_day.py`: its checks, its table and its bars, and a whole day without a GPU."""

import csv
import importlib
import math
import os
import pkgutil
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import gpu_day
from gpu import bars, checks, launches, regimes
from gpu.workers import Failure

from bn_lightning import kernels
from bn_lightning.kernels import launch_plan, schedule
from bn_lightning.kernels.cost import Machine
from bn_lightning.kernels.measurements import (
    TABLE_COLUMNS,
    Cost,
    Fusion,
    Table,
    Tensors,
    read_table,
)
from bn_lightning.kernels.schedule import Device, Regime

MODULES = list(pkgutil.iter_modules(kernels.__path__))
SUPPORT = Path(__file__).parents[1] / "support"
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_day.py"
H200 = Machine("NVIDIA H200", Device(processors=132, cache_bytes=50 << 20), 4.3e6, True)
CHECK = checks.Check(Regime.SINGLE_LAUNCH, "rows", "fp32", Fusion("relu", True, True), True, 2)


def test_the_kernels_pass_their_checks(device: str) -> None:
    (row,) = checks.check(CHECK, device)
    assert row["status"] == "ok" and float(row["share"]) <= 1 and row["regime"] == "single_launch"


@pytest.mark.parametrize(
    ("error", "status"),
    [(lambda call: 0.01, "wrong"), (lambda call: 1.2e-7 * (call % 2), "not repeatable")],
    ids=["wrong", "varying"],
)
def test_an_error_fails_its_check(
    error: Any, status: str, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    calls = iter(range(1000))
    right = checks.batch_norm

    def wrong(*arguments: Any, **options: Any) -> torch.Tensor:
        y = right(*arguments, **(options | {"backend": "native"}))
        return y * (1 + error(next(calls)))

    monkeypatch.setattr(checks, "batch_norm", wrong)
    small = CHECK._replace(fusion=Fusion("sigmoid", True, True))
    assert checks.check(small, device)[0]["status"] == status


def test_every_regime_layout_dtype_fusion_and_activation_is_checked() -> None:
    found = {
        (c.regime, c.layout, c.dtype, c.fusion.activation, c.fusion.has_residual)
        for c in checks.checks(small=False)
    }
    fusions = [("identity", False), ("relu", False), ("relu", True)]
    every = product(Regime, checks.LAYOUTS, ("fp32", "fp16", "bf16"), fusions)
    assert {(*rest, *fusion) for *rest, fusion in every} <= found
    assert {(a, r) for *_, a, r in found} == set(product(checks.ACTIVATIONS, (False, True)))
    # Every other worker has the cases of one regime.
    assert all(c.regime is list(Regime)[i % 2] for i, c in enumerate(checks.checks(small=False)))


@pytest.mark.slow
def test_the_sanitizer_sees_every_kernel(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(launches, "SHAPES", ((2, 1, 96),))
    # Two samples are two tiles, and two splits.
    monkeypatch.setattr(schedule, "REDUCTION_BYTES", 256)
    schedule._make_schedule.cache_clear()
    found = set()

    def note(kernel: Any, *rest: Any) -> Any:
        found.add(kernel.fn.__name__)
        return noted(kernel, *rest)

    noted = launch_plan._Launch
    monkeypatch.setattr(launch_plan, "_Launch", note)
    with launch_plan.recorded():
        launches.launch_all(device)
    schedule._make_schedule.cache_clear()
    modules = [importlib.import_module(f"{kernels.__name__}.{module.name}") for module in MODULES]
    names = {name for module in modules for name in vars(module)}
    assert found == {name for name in names if re.fullmatch(r"_bn_\w+_kernel", name)}


def _row(**columns: Any) -> dict[str, str]:
    row = dict.fromkeys(TABLE_COLUMNS, "") | {
        "device": H200.name,
        "shape": "60x100",
        "dtype": "fp32",
        "layout": "contiguous",
        "fusion": "bn",
        "mode": "training",
        "who": "eager",
        "device_us": 10,
        "host_us": 50,
    }
    return {name: str(value) for name, value in (row | columns).items()}


def test_rows_are_merged_into_the_table(tmp_path: Path) -> None:
    path = tmp_path / "measured.csv"
    regimes.merge_rows(path, [_row(), _row(who="two_pass"), _row(who="compile"), _row(who="auto")])
    regimes.merge_rows(path, [_row(device_us=5), _row(device="other", who="two_pass")])
    table = read_table(path)
    assert len(table) == 3
    tensors, fusion = Tensors((60, 100), torch.float32, False), Fusion("identity", False, True)
    assert table.find(H200.name, tensors, fusion) == (Cost(5.0, 50.0), Cost(10.0, 50.0))
    path.write_text("a,b\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"measured\.csv"):
        regimes.merge_rows(path, [_row()])


def test_only_regimes_whose_checks_passed_are_in_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands = []

    def run(command: list[str], numbers: Any, count: int, limits: Any, on_result: Any) -> int:
        commands.append(command)
        who = ("eager", "auto", *(regime.value for regime in Regime))
        on_result([_row(who=name, commit="") for name in who])
        on_result(Failure(1, "the worker ended"))
        return 3

    monkeypatch.setattr(gpu_day, "run_in_workers", run)
    files = gpu_day.RowFiles(tmp_path / "rows", "c0ffee", ())
    day = gpu_day.GpuDay(files, tmp_path / "measured.csv", math.inf)
    checked = {"single_launch": ("ok", "wrong"), "two_pass": ("ok", "ok")}
    for regime, statuses in checked.items():
        files.add("checks", [{"regime": regime, "status": status} for status in statuses])
    day.run("regimes", math.inf)
    with open(tmp_path / "measured.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["who"] for row in rows} == {"eager", "two_pass"}
    assert {row["commit"] for row in rows} == {"c0ffee"}
    assert [row["reason"] for row in files["failures"]] == ["the worker ended"]
    # What is wrong is timed, what hangs is not.
    assert "single_launch" not in commands[0]
    files.add("checks", [{"regime": "two_pass", "status": "the case took too long"}])
    day.run("regimes", math.inf)
    assert "two_pass" in commands[1] and "single_launch" not in commands[1]
    # Another day keeps the rows of the parts that it does not run.
    later = gpu_day.RowFiles(tmp_path / "rows", "", ["checks", "none"])
    assert len(later["checks"]) == 5 and not later["times"] and not later["none"]


def _day(
    folder: Path,
    *,
    ours_us: float = 1000,
    auto_us: float = 1000,
    host_ratio: float = 0.7,
    gb_per_s: float = 3900,
) -> bars.Day:
    """Return a day: eager torch takes 3000 us, torch.compile 1500, a copy moves 4300 GB/s."""
    timed = []
    for layout, fusion, sizes in product(
        ("contiguous", "channels_last"), regimes.FUSIONS, bars.SHAPE_256
    ):
        of = {
            "layout": layout,
            "fusion": fusion,
            "dtype": "bf16",
            "shape": "x".join(map(str, sizes)),
        }
        times = {"eager": 3000, "compile": 1500, "two_pass": 5000, "single_launch": ours_us}
        times["auto"] = auto_us
        timed += [_row(**of, who=who, device_us=us) for who, us in times.items()]
    host = [
        {"shape": shape, "dtype": dtype, "mode": mode, "fusion": fusion, "ratio": ratio}
        for shape, dtype, mode, fusion in product(
            ("60x100", "64x64x8x8", "2x8"),
            ("fp32", "bf16"),
            ("training", "evaluation"),
            regimes.FUSIONS,
        )
        for ratio in [host_ratio if dtype == "bf16" else 0.5]
    ]
    compared = [
        {
            "shape": "256x64x56x56",
            "dtype": "bf16",
            "layout": "contiguous",
            "fusion": "bn",
            "direction": "forward",
            "who": who,
            "gb_per_s": str(rate),
        }
        for who, rate in (("copy", 4300), ("ours", gb_per_s), ("eager", ""))
    ]
    table = folder / "measured.csv"
    table.unlink(missing_ok=True)
    regimes.merge_rows(table, timed)
    return bars.Day(H200, [{"status": "ok"}], host, compared, timed, read_table(table))


def _verdicts(day: bars.Day) -> dict[str, str]:
    return {bar.name: bar.verdict for bar in bars.bars(day)}


def test_the_bars_of_a_good_day_are_met(tmp_path: Path) -> None:
    assert set(_verdicts(_day(tmp_path)).values()) == {"met"}


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"ours_us": 1250}, "torch.compile"),
        ({"ours_us": 1600}, "_relu: speed-up over eager"),
        ({"auto_us": 3100}, "auto, as timed"),
        ({"host_ratio": 0.8}, "64x64x8x8, training, bn_add_relu"),
        ({"host_ratio": 1.2}, "60x100, evaluation"),
        ({"gb_per_s": 3600}, "share of copy"),
    ],
    ids=str,
)
def test_a_bar_is_missed(change: dict[str, float], missed: str, tmp_path: Path) -> None:
    verdicts = _verdicts(_day(tmp_path, **change))
    assert {verdict for name, verdict in verdicts.items() if missed in name} == {"missed"}
    # What was measured decides what is used, so it is never slower.
    name = next(name for name in verdicts if "auto, by the new table" in name)
    assert verdicts[name] == "met"


def test_a_bar_without_its_rows_is_not_measured(tmp_path: Path) -> None:
    day = _day(tmp_path)
    nothing = day._replace(checks=[], host=[], compared=[], timed=[], table=Table({}))
    verdicts = _verdicts(nothing)
    assert set(verdicts.values()) == {"not measured"}
    # The interpreter's times are no GPU's.
    interpreted = _verdicts(day._replace(machine=H200._replace(name="interpreter")))
    assert interpreted.pop("checks that failed") == "met"
    assert set(interpreted.values()) == {"not measured"}


def test_one_failed_check_misses_its_bar(tmp_path: Path) -> None:
    day = _day(tmp_path)._replace(checks=[{"status": "ok"}, {"status": "wrong"}])
    bar = bars.bars(day)[0]
    assert (bar.figure, bar.verdict) == (1, "missed") and math.isfinite(bar.limit)


# What the project needs beside torch, Triton and numpy is not installed. torch asks for some of it.
FORBIDDEN = """
import importlib.util, sys

NAMES = {
    "PIL", "cmaes", "hydra", "jaxtyping", "lightning", "matplotlib", "omegaconf", "optuna",
    "plotly", "pooch", "pytest", "pytorch_lightning", "rich", "sklearn", "sqlalchemy",
    "torchmetrics",
}
find = importlib.util.find_spec

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in NAMES:
            raise ModuleNotFoundError(f"forbidden here: {name}", name=name)

sys.meta_path.insert(0, Finder())
importlib.util.find_spec = lambda name, *rest: (
    None if name.split(".")[0] in NAMES else find(name, *rest)
)
"""
# As tests/conftest.py does.
QUICK = "from quick_interpreter import speed_up_interpreter; speed_up_interpreter()"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it takes nine minutes on a GPU")
def test_the_day_runs_to_its_end_without_a_gpu(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(FORBIDDEN + QUICK, encoding="utf-8")
    output, table = tmp_path / "rows", tmp_path / "measured.csv"
    env = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{SUPPORT}"}
    options = ["--output", str(output), "--table", str(table), "--commit", "c0ffee"]
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "met           checks that failed: 0" in result.stdout, result.stdout
    assert not (output / "failures.csv").exists(), (output / "failures.csv").read_text()
    with open(output / "checks.csv", encoding="utf-8", newline="") as file:
        assert {row["regime"] for row in csv.DictReader(file)} == {r.value for r in Regime}
    for name in ("times.csv", "batch_norm.csv", "sanitizer.csv", "bars.csv"):
        assert (output / name).read_text(encoding="utf-8").count("\n") > 1, name
    measured = read_table(table)
    assert measured.regime("interpreter", Tensors((3, 8, 4, 4), torch.float32, True)) in Regime
    fusion = Fusion("relu", False, False)
    eager, ours = measured.find("interpreter", Tensors((2, 8), torch.float32, False), fusion)
    assert eager is not None and ours is not None
