"""The reports in docs/results can be rebuilt from their trials."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).parents[1] / "docs" / "results"
LEDGER = RESULTS / "claims"
FOLDERS = sorted({path.parent for path in RESULTS.glob("*/trials.csv")} - {LEDGER})


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
@pytest.mark.parametrize(
    "folder",
    [
        # The largest; what it has is in the others, too.
        pytest.param(path, marks=[pytest.mark.soak] if path.name == "lr_init" else [])
        for path in FOLDERS
    ],
    ids=lambda path: path.name,
)
def test_a_committed_report_is_made_again_from_its_table(folder: Path, tmp_path: Path) -> None:
    from bn_lightning.sweeps.report.write_report import write_report

    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 2e6
    for name in ("trials.csv", "summary.json"):
        shutil.copy(folder / name, tmp_path)
    write_report([str(tmp_path)])
    assert (tmp_path / "trials.csv").read_bytes() == (folder / "trials.csv").read_bytes()
    now, before = (json.loads((place / "summary.json").read_text()) for place in (tmp_path, folder))
    assert differences(now, before) == []


class TestLedger:
    """The verdicts on the claims, in docs/results/claims."""

    content = json.loads((LEDGER / "summary.json").read_text(encoding="utf-8"))

    def test_it_follows_from_its_table(self) -> None:
        from bn_lightning.claims.registry import find_claims
        from bn_lightning.claims.result_table import ResultTable
        from bn_lightning.claims.run_claims import judge
        from bn_lightning.runs.atomic_write import json_values

        assert sum(path.stat().st_size for path in LEDGER.rglob("*") if path.is_file()) < 4e6
        table = ResultTable(LEDGER, self.content["setups"][0], allow_mixed=False)
        claims = {claim.name: claim for claim in find_claims()}
        assert self.content["claims"].keys() == claims.keys()
        for name, entry in self.content["claims"].items():
            again = json_values(judge(claims[name], self.content["budget"], table))
            assert differences(again, entry) == [], name

    def test_the_documentation_has_its_verdicts(self) -> None:
        from bn_lightning.claims.verdict_text import verdict_row

        page = (RESULTS.parent / "claims.md").read_text(encoding="utf-8").splitlines()
        for name, entry in self.content["claims"].items():
            _, verdict, number, rule = verdict_row(name, entry)
            assert f"| `{name}` | {verdict} | {number} | {rule} |" in page

    def test_the_documentation_says_what_was_not_varied(self) -> None:
        from bn_lightning.claims.registry import find_claims

        page = " ".join((RESULTS.parent / "claims.md").read_text(encoding="utf-8").split())
        for claim in find_claims():
            assert (
                f"- **`{claim.name}`**. Not varied: {claim.not_varied} What would change the "
                f"verdict: {claim.would_change} " in page
            )

    def test_the_readme_has_a_row_for_each(self) -> None:
        from bn_lightning.claims.verdict import FAILS, HOLDS, HOLDS_IF
        from bn_lightning.claims.verdict_text import effect_text

        readme = (RESULTS.parents[1] / "README.md").read_text(encoding="utf-8")
        _, _, rest = readme.partition("BatchNorm | holds | measured\n")
        rows = rest.partition("\n\n")[0].splitlines()[1:]
        assert len(rows) == len(self.content["claims"])
        for name, entry in self.content["claims"].items():
            outcomes = [c["outcome"] for c in entry["conditions"] if not c["is_control"]]
            part = f"{outcomes.count(HOLDS)}/{len(outcomes)}"
            words = {HOLDS: "yes", HOLDS_IF: part, FAILS: "no"}
            number = effect_text({**entry["conditions"][0], "unit": ""})
            assert any(
                f" | {words.get(entry['verdict'], 'open')} | {number}" in row for row in rows
            ), name


def test_differences_are_found() -> None:
    content = {"a": [1.0, None, {"b": "x"}]}
    assert differences(content, {"a": [1.0 + 1e-9, None, {"b": "x"}]}) == []
    assert differences(content, {"a": [1.1, None, {"b": "y"}]}) == [
        "/a/0: 1.0, 1.1",
        "/a/2/b: 'x', 'y'",
    ]
    assert differences(content, {"c": 1}) and differences([1], [1, 2])
