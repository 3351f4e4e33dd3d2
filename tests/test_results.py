"""The reports in docs/results can be rebuilt from their trials."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).parents[1] / "docs" / "results"
FOLDERS = sorted(path.parent for path in RESULTS.glob("*/trials.csv"))


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Return the places where two JSON documents differ, numbers by more than rounding."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [d for key in one for d in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}/{i}")]
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    same = math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9) if numbers else one == other
    return [] if same else [f"{where}: {one!r}, {other!r}"]


@pytest.mark.slow
@pytest.mark.skipif(not FOLDERS, reason=f"no sweep is committed under {RESULTS.name} yet")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_a_committed_report_is_made_again_from_its_table(folder: Path, tmp_path: Path) -> None:
    from bn_lightning.sweeps.report.write_report import write_report

    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 2e6
    for name in ("trials.csv", "summary.json"):
        shutil.copy(folder / name, tmp_path)
    write_report([str(tmp_path)])
    assert (tmp_path / "trials.csv").read_bytes() == (folder / "trials.csv").read_bytes()
    now, before = (json.loads((place / "summary.json").read_text()) for place in (tmp_path, folder))
    assert differences(now, before) == []


def test_differences_are_found() -> None:
    content = {"a": [1.0, None, {"b": "x"}]}
    assert differences(content, {"a": [1.0 + 1e-9, None, {"b": "x"}]}) == []
    assert differences(content, {"a": [1.1, None, {"b": "y"}]}) == [
        "/a/0: 1.0, 1.1",
        "/a/2/b: 'x', 'y'",
    ]
    assert differences(content, {"c": 1}) and differences([1], [1, 2])
