"""A ledger of all claims whose measures are made up, with its figures."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bn_lightning.claims.claim_figures import claim_figure
from bn_lightning.claims.claim_overview import overview_figure
from bn_lightning.claims.design import Claim
from bn_lightning.claims.registry import find_claims
from bn_lightning.claims.result_table import ResultTable, TrialKey, TrialResult
from bn_lightning.claims.run_claims import judge
from bn_lightning.sweeps.report.figure import Figure

SETUP = {
    "versions": {"bn-lightning": "0.2.0", "torch": "2.13.0"},
    "data": {"source": "digits", "sha256": None},
    "budget": "full",
    "overrides": ["data=digits"],
}


class Measures(dict[str, float]):
    """Has any measure that it is asked for."""

    def __missing__(self, name: str) -> float:
        return self.setdefault(name, 90 * random.Random(f"{name} {self['level']}").random())


def made_up_ledger(folder: Path) -> tuple[dict[str, Any], Mapping[str, Figure], Figure]:
    """Return the content of summary.json, and the figures by the name of the claim."""
    claims = find_claims()
    table = ResultTable(folder, SETUP, False)
    for claim in claims:
        for arm in claim.arms:
            for label, setting in claim.settings_of("full", arm).items():
                for seed in range(1, 4):
                    key = TrialKey(claim.name, arm, label, seed)
                    table.results[key] = TrialResult(0, 60.0, _measures(claim, key, setting.x))
    content = {
        "notes": ["data: digits, 1,317 / 120 / 360"],
        "setups": [SETUP],
        "claims": {claim.name: judge(claim, "full", table) for claim in claims},
    }
    figures = {claim.name: claim_figure(claim, "full", table) for claim in claims}
    return content, figures, overview_figure(content["claims"])


def _measures(claim: Claim, key: TrialKey, x: float) -> Measures:
    generator = random.Random(str(key))
    level = list(claim.arms).index(key.arm) + 0.3 * generator.random()
    found = Measures(level=level)
    for curves in claim.curves:
        places = [(curves.measure, x), *(p for c in curves.along.values() for p in c.items())]
        for name, place in places:
            value = (1 + level) * (1 + abs(place)) ** -0.2
            found[name] = value if curves.scale == "log" else 20 * value
    return found
