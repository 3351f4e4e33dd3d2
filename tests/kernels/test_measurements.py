"""The table of measured BatchNorms: its file, and the regime that is chosen from it."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from bn_lightning.kernels import dispatch
from bn_lightning.kernels.layout import is_channels_last, strides_are_channels_last
from bn_lightning.kernels.measurements import PATH, TABLE_COLUMNS, Cost, Fusion, Tensors, read_table
from bn_lightning.kernels.schedule import Regime, forced_regime

ROW = {
    "device": "interpreter",
    "shape": "4x8x8",
    "dtype": "fp32",
    "layout": "contiguous",
    "fusion": "bn",
    "mode": "training",
    "who": "eager",
    "device_us": "12.5",
    "host_us": "50",
    "torch": "2.13.0",
    "triton": "3.7.1",
    "date": "2026-11-25",
    "commit": "1f5601a",
}
TENSORS = Tensors((4, 8, 8), torch.float32, False)
BN = Fusion("identity", False, True)


def _write(path: Path, *changes: dict[str, Any]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, TABLE_COLUMNS)
        writer.writeheader()
        writer.writerows(ROW | change for change in changes)
    return path


def test_rows_are_found_by_what_was_measured(tmp_path: Path) -> None:
    table = read_table(
        _write(
            tmp_path / "measured.csv",
            {},
            {"who": "two_pass", "device_us": "10"},
            {"mode": "evaluation", "device_us": "3"},
            {"layout": "channels_last", "fusion": "bn_add_relu"},
        )
    )
    assert len(table) == 4
    found = table.find("interpreter", TENSORS, BN)
    assert found == (Cost(12.5, 50.0), Cost(10.0, 50.0))
    evaluation = table.find("interpreter", TENSORS, BN._replace(training=False))
    assert evaluation == (Cost(3.0, 50.0), None)
    # relu stands for every activation.
    channels_last = TENSORS._replace(channels_last=True)
    assert table.find("interpreter", channels_last, Fusion("silu", True, True)).eager
    for device, tensors in (("other", TENSORS), ("interpreter", TENSORS._replace(shape=(4, 8)))):
        assert table.find(device, tensors, BN) == (None, None)


def test_without_a_file_nothing_was_measured(tmp_path: Path) -> None:
    assert len(read_table(tmp_path / "none.csv")) == 0


def test_the_table_of_this_package_is_well_formed() -> None:
    read_table(PATH)


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"dtype": "fp64"}, "dtype"),
        ({"layout": "nchw"}, "layout"),
        ({"fusion": "bn_gelu"}, "fusion"),
        ({"mode": "both"}, "mode"),
        ({"who": "compile"}, "who"),
        ({"shape": "64"}, "shape"),
        ({"shape": "64x0"}, "shape"),
        ({"shape": "64x-3"}, "shape"),
        ({"device_us": ""}, "device_us"),
        ({"device_us": "nan"}, "device_us"),
        ({"host_us": "-1"}, "host_us"),
        ({"host_us": "inf"}, "host_us"),
        ({"commit": "a\nb"}, None),
        ({}, "who"),
    ],
    ids=str,
)
def test_a_malformed_row_is_refused_by_name(
    change: dict[str, str], column: str | None, tmp_path: Path
) -> None:
    path = _write(tmp_path / "measured.csv", {}, change)
    if column is None:
        assert len(read_table(_write(path, change))) == 1
        return
    with pytest.raises(ValueError, match=rf"`{column}` in line 3 of .*measured\.csv .*gpu_day\.py"):
        read_table(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "shape,dtype\n",
        ",".join(reversed(TABLE_COLUMNS)) + "\n",
        ",".join(TABLE_COLUMNS) + "\na,b\n",
    ],
    ids=["empty", "columns", "order", "cut"],
)
def test_a_file_of_another_form_is_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "measured.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"line [12] of .*measured\.csv"):
        read_table(path)


def _regimes(fusion: str, **times: float) -> list[dict[str, str]]:
    return [{"fusion": fusion, "who": who, "device_us": str(us)} for who, us in times.items()]


def test_the_regime_is_the_fastest_over_the_fusions(tmp_path: Path) -> None:
    table = read_table(
        _write(
            tmp_path / "measured.csv",
            *_regimes("bn", eager=1, single_launch=5, two_pass=4),
            *_regimes("bn_relu", single_launch=5, two_pass=7),
            # A fusion that lacks a regime is not counted.
            *_regimes("bn_add_relu", two_pass=1),
            {"shape": "9x9"},
        )
    )
    assert table.regime("interpreter", TENSORS) is Regime.SINGLE_LAUNCH
    assert table.regime("interpreter", TENSORS._replace(shape=(9, 9))) is None
    assert table.regime("other", TENSORS) is None


def test_the_schedule_takes_the_measured_regime(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = _regimes("bn", single_launch=5, two_pass=4)
    table = read_table(_write(tmp_path / "measured.csv", *rows))
    monkeypatch.setattr(dispatch, "load_table", lambda: table)
    x = torch.ones(4, 8, 8)
    monkeypatch.setattr(dispatch, "device_name", lambda device: "interpreter")
    assert dispatch.schedule_of(x, False).regime is Regime.TWO_PASS
    assert dispatch.schedule_of(x.half(), False).regime is Regime.SINGLE_LAUNCH
    with forced_regime(Regime.SINGLE_LAUNCH):
        assert dispatch.schedule_of(x, False).regime is Regime.SINGLE_LAUNCH


@pytest.mark.parametrize("shape", [(4, 3, 5, 2), (1, 3, 5, 2), (4, 1, 5, 2), (4, 3, 1, 1), (4, 3)])
def test_strides_tell_the_layout(shape: tuple[int, ...]) -> None:
    contiguous = torch.empty(shape)
    channels_last = torch.empty(*shape[:1], *shape[2:], shape[1]).movedim(-1, 1)
    for x in (contiguous, channels_last, contiguous[::2], contiguous[:1].expand(shape)):
        assert strides_are_channels_last(x.shape, x.stride()) is is_channels_last(x)
