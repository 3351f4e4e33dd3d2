"""The arms of a study of any metric: the best point of each, and how many trials reach a value."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from statistics import fmean
from typing import Any

from bn_lightning.sweeps.analysis.arms import label_of, ordered
from bn_lightning.sweeps.analysis.columns import Columns
from bn_lightning.sweeps.analysis.seed_groups import Spread
from bn_lightning.sweeps.analysis.trials import Cell, TrialRow, TrialTable


@dataclass(frozen=True)
class MetricArm:
    """The results of one arm.

    Attributes:
        label: its name in sentences.
        trials: number of its trials with a result.
        point: the parameters with the best mean over seeds, without arm and seed.
        best: the metric at this point.
        tests: test metric -> its values at this point.
        mean: of the metric over all trials.
        reached: number of trials that reach the threshold; None without a threshold.
    """

    label: str
    trials: int
    point: Mapping[str, Cell]
    best: Spread
    tests: Mapping[str, Spread]
    mean: float
    reached: int | None

    def as_json(self) -> dict[str, Any]:
        """Return the arm as plain values."""
        return asdict(self)

    @property
    def point_text(self) -> str:
        """The point as overrides."""
        return ", ".join(f"{key}={value}" for key, value in self.point.items())


def metric_arms(table: TrialTable, columns: Columns, threshold: float | None) -> list[MetricArm]:
    """Return the arms of a study, in the order of a report.

    The best point is the one with the best mean over seeds among those with the most seeds.

    Args:
        table: of one direction, with at least one complete trial.
        columns: which parameters are arm and seed.
        threshold: a trial trains if its value is at least this, or at most where the study
            minimizes; None for no threshold.
    """
    sign = -1 if table.directions[0] == "minimize" else 1
    rows: dict[str, list[TrialRow]] = {}
    # Of trials with the same parameters the first counts.
    first = {tuple(row.params.items()): row for row in reversed(table.complete)}
    for row in sorted(first.values(), key=lambda row: row.number):
        rows.setdefault(columns.arm_of(row), []).append(row)
    found = []
    for arm in ordered(rows):
        points: dict[tuple[tuple[str, Cell], ...], list[TrialRow]] = {}
        for row in rows[arm]:
            point = tuple(
                item for item in row.params.items() if item[0] not in (*columns.arm, columns.seed)
            )
            points.setdefault(point, []).append(row)
        most = max(map(len, points.values()))
        whole = {point: of_it for point, of_it in points.items() if len(of_it) == most}
        means = {point: fmean(row.values[0] for row in of_it) for point, of_it in whole.items()}
        best = max(means, key=lambda point: sign * means[point])
        values = [row.values[0] for row in rows[arm]]
        reached = None
        if threshold is not None:
            reached = sum(sign * value >= sign * threshold for value in values)
        spread = Spread.of(row.values[0] for row in whole[best] if isfinite(row.values[0]))
        tests = {name: _spread(whole[best], name) for name in metrics_of_test(table)}
        found.append(
            MetricArm(label_of(arm), len(values), dict(best), spread, tests, fmean(values), reached)
        )
    return found


def metrics_of_test(table: TrialTable) -> list[str]:
    """Return the metrics of the test that the trials of a study returned."""
    names = {name for row in table.complete for name in row.attributes}
    return sorted(name for name in names - {*table.value_names} if name.startswith("test/"))


def arm_sentences(table: TrialTable, arms: list[MetricArm], threshold: float | None) -> list[str]:
    """Return the results of the arms in sentences."""
    (metric,), (direction,) = table.value_names, table.directions
    texts = []
    for arm in arms:
        seeds = f" (mean ± deviation of {arm.best.n} seeds)" if arm.best.n > 1 else ""
        at = f" at {arm.point_text}" if arm.point else ""
        texts.append(
            f"{metric} ({direction}d), best {arm.label}: {arm.best.text('.4g')}{seeds}{at}."
        )
    if threshold is not None:
        how = "at most" if direction == "minimize" else "at least"
        counts = ", ".join(f"{arm.reached} of {arm.trials} {arm.label}" for arm in arms)
        texts.append(f"Trials that train, with {metric} {how} {threshold:g}: {counts}.")
    return texts


def _spread(rows: list[TrialRow], name: str) -> Spread:
    values = [row.attributes.get(name) for row in rows]
    return Spread.of(float(v) if isinstance(v, int | float) else None for v in values)
