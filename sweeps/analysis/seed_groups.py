"""Runs that differ in seed alone as one: mean, standard deviation and number of runs."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from bn_lightning.runs.record import result_names, training_seconds
from bn_lightning.sweeps.analysis.arms import ordered
from bn_lightning.sweeps.analysis.compared_runs import ComparedRun, width_growth

_EARLY = (50, 10)  # a table has the accuracy after 1/50 and 1/10 of the steps, too


@dataclass(frozen=True)
class Spread:
    """Several values as one.

    Attributes:
        mean: NaN without a value.
        deviation: the standard deviation, with n - 1 in its denominator; NaN below two values.
        n: the number of values.
    """

    mean: float
    deviation: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Spread":
        """Return the spread of the values that are not None."""
        known = [value for value in values if value is not None]
        return cls(
            fmean(known) if known else math.nan,
            stdev(known) if len(known) > 1 else math.nan,
            len(known),
        )

    def text(self, form: str) -> str:
        """Return mean ± standard deviation, each in the format `form`; – without a value."""
        if not self.n:
            return "–"
        text = format(self.mean, form)
        return text if math.isnan(self.deviation) else f"{text} ± {format(self.deviation, form)}"


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ in seed alone.

    Attributes:
        label: unique among the groups that are read together.
        runs: at least one, in order of seeds.
    """

    label: str
    runs: tuple[ComparedRun, ...]

    @property
    def arm(self) -> str:
        """The arm of its runs."""
        return self.runs[0].arm

    @property
    def ended(self) -> list[ComparedRun]:
        """The runs that have a result. The others are left out of means."""
        return [run for run in self.runs if run.has_result]

    @property
    def seeds(self) -> str:
        """Its seeds as text."""
        return ", ".join(str(run.record.get("seed", "–")) for run in self.runs)

    @property
    def title(self) -> str:
        """Its label with its seed, or with the number of its seeds."""
        if len(self.runs) > 1:
            return f"{self.label}, {len(self.runs)} seeds"
        return self.runs[0].label

    def spread(self, value: Callable[[ComparedRun], float | None]) -> Spread:
        """Return the spread of a value of its runs with a result."""
        return Spread.of(map(value, self.ended))

    def curve(self, metric: str) -> list[tuple[int, list[float]]]:
        """Return (step, a value for each run) of a metric, at the steps that all its runs logged.

        If no run has a result yet, as while they train, all runs count.
        """
        series = [dict(run.metrics.get(metric, ())) for run in self.ended or self.runs]
        shared = set.intersection(*map(set, series))
        return [(step, [values[step] for values in series]) for step in sorted(shared)]


def seed_groups(runs: Sequence[ComparedRun]) -> list[SeedGroup]:
    """Return the groups of the runs, in the order of their arms, then of their first runs."""
    groups: dict[str, list[ComparedRun]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    arms = ordered(run.arm for run in runs)
    made = [SeedGroup(name, tuple(sorted(found, key=_order))) for name, found in groups.items()]
    return sorted(made, key=lambda group: arms.index(group.arm))


def best_metric(runs: Sequence[ComparedRun], name: str) -> str:
    """Return `test/NAME` if it says most about the runs, else `val/NAME`, "" if none logged either.

    A curve of the validation says more than a single test at the end.
    """
    found = [f"{split}/{name}" for split in ("test", "val")]
    lengths = {key: max(len(run.metrics.get(key, ())) for run in runs) for key in found}
    for key in found:
        if lengths[key] > 1:
            return key
    return next((key for key in found if lengths[key]), "")


def final_metric(runs: Sequence[ComparedRun]) -> str:
    """Return the first of `result_names` that all runs with a result recorded, "" if there is none.

    It is the accuracy, of the test if possible, except for runs that have none.
    """
    ended = [run for run in runs if run.has_result] or list(runs)
    names = dict.fromkeys(name for run in ended for name in result_names(run.record))
    return next((key for key in names if all(_final(r, key) is not None for r in ended)), "")


@dataclass(frozen=True)
class ArmTable:
    """A row for each group of runs.

    Attributes:
        metric: of `final_metric`, such as "test/accuracy"; "" if the runs have none in common.
        tests: other metrics, at the end: "test/loss", of runs without accuracy all of the test.
        steps: after how many steps it was measured, ascending, without the end of the run.
        end: the number of steps of all runs, None if they differ.
        groups: the rows.
    """

    metric: str
    tests: tuple[str, ...]
    steps: tuple[int, ...]
    end: int | None
    groups: tuple[SeedGroup, ...]

    @classmethod
    def of(cls, groups: Sequence[SeedGroup]) -> "ArmTable":
        """Return the table of these groups."""
        runs = [run for group in groups for run in group.runs]
        metric = final_metric(runs)
        whole = [run for run in runs if run.has_result and run.record["status"] != "diverged"]
        logged = [{step for step, _ in run.metrics.get(metric, ())} for run in whole]
        shared = set.intersection(*logged) if logged else set()
        ends = {run.record.get("steps") for run in whole}
        end = ends.pop() if len(ends) == 1 else None
        last = end or max(shared, default=0)
        later = [[step for step in shared if last / part <= step < last] for part in _EARLY]
        steps = tuple(sorted({min(s) for s in later if s}))
        return cls(metric, _tests(runs, metric), steps, end, tuple(groups))

    def results(self, group: SeedGroup) -> list[Spread]:
        """Return the metric of a group after each of `steps`, and at the end.

        A run that diverged counts with the metric of its record, that of a guess, from then on.
        """
        early = [Spread.of(self._at(run, step) for run in group.ended) for step in self.steps]
        return [*early, group.spread(lambda run: _final(run, self.metric))]

    def _at(self, run: ComparedRun, step: int) -> float | None:
        found = dict(run.metrics.get(self.metric, ())).get(step)
        is_over = run.record["status"] == "diverged" and step > run.record.get("steps", 0)
        return _final(run, self.metric) if found is None and is_over else found

    def head(self) -> list[str]:
        """Return the names of the columns."""
        counts = [*self.steps, *([] if self.end is None else [self.end])]
        at = [f"after {count:,} step{'s' * (count != 1)}" for count in counts]
        at += ["at the end"] if self.end is None else []
        name, *tests = (text.replace("/", " ") for text in (self.metric or "result", *self.tests))
        return ["arm", "seeds", *(f"{name} {when}" for when in at), *tests, "seconds"]

    def rows(self) -> list[list[str]]:
        """Return the cells of each row: mean ± standard deviation over the seeds."""
        return [
            [
                group.label,
                group.seeds,
                *(found.text(".3f") for found in self.results(group)),
                *(
                    Spread.of(_final(run, name) for run in group.ended).text(".3f")
                    for name in self.tests
                ),
                group.spread(lambda run: training_seconds(run.record)).text(",.1f"),
            ]
            for group in self.groups
        ]

    def as_json(self) -> list[dict[str, object]]:
        """Return the rows as plain values, for summary.json."""
        return [
            {
                "label": group.label,
                "arm": group.arm,
                "seeds": [run.record.get("seed") for run in group.runs],
                "metric": self.metric,
                "accuracy": {
                    name: {"mean": found.mean, "deviation": found.deviation, "n": found.n}
                    for name, found in zip(
                        (*map(str, self.steps), "end"), self.results(group), strict=True
                    )
                },
                "width_growth": group.spread(width_growth).mean,
            }
            for group in self.groups
        ]


def _tests(runs: Sequence[ComparedRun], metric: str) -> tuple[str, ...]:
    names = dict.fromkeys(name for run in runs for name in run.record.get("metrics") or {})
    if not metric or metric.endswith("/accuracy"):
        return ("test/loss",) if "test/loss" in names else ()
    return tuple(sorted(n for n in names if n.startswith("test/") and n != metric))


def _final(run: ComparedRun, metric: str) -> float | None:
    value = (run.record.get("metrics") or {}).get(metric)
    return float(value) if isinstance(value, int | float) else None


def _order(run: ComparedRun) -> tuple[bool, int]:
    seed = run.record.get("seed")
    return (type(seed) is not int, seed if type(seed) is int else 0)
