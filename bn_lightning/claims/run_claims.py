"""Measure claims, judge them, and write the ledger into a folder."""

import os
import signal
import time
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from hydra import compose
from hydra.errors import HydraException
from omegaconf import OmegaConf

from bn_lightning.claims.claim_figures import claim_figure
from bn_lightning.claims.claim_overview import overview_figure
from bn_lightning.claims.claim_page import claims_markdown, claims_page
from bn_lightning.claims.claim_training import (
    Configurations,
    Part,
    announce_alone,
    compose_trials,
    first_line,
    hydra_configurations,
    networks_of,
    parts_of,
)
from bn_lightning.claims.design import BUDGETS, Claim, MeasuredPoint
from bn_lightning.claims.registry import find_claims
from bn_lightning.claims.result_table import ResultTable, TrialKey
from bn_lightning.claims.verdict import (
    LEAST_SEEDS,
    condition_outcome,
    effect_of,
    open_reason,
    seeds_inside,
    verdict_of,
)
from bn_lightning.cli.command import quiet_lightning
from bn_lightning.data.errors import DataFallbackWarning
from bn_lightning.data.protocol import data_info
from bn_lightning.runs.atomic_write import json_values, write_atomically, write_json
from bn_lightning.runs.freed_memory import keep_freed_memory
from bn_lightning.runs.interruption import Interrupted
from bn_lightning.runs.machine import package_versions
from bn_lightning.runs.record import data_sentence
from bn_lightning.stack.seed_batches import loaded_data
from bn_lightning.sweeps.analysis.sources import SUMMARY_FILE
from bn_lightning.sweeps.report.matplotlib_renderer import figures_folder, save

LEDGER_SCHEMA_VERSION = 1

_PAGE, _MARKDOWN = "claims.html", "claims.md"
_DEFAULT_SEEDS = {"quick": 3, "full": 10}
_Results = dict[TrialKey, tuple[float, dict[str, float]]]  # seconds, and measures by name
_VERSIONS = ("bn-lightning", "torch")  # those that change a result


@dataclass(frozen=True)
class LedgerOptions:
    """What to measure, and where to write it.

    Attributes:
        names: of the claims; none for all.
        budget: a name of `BUDGETS`.
        seeds: number of seeds; None for 3 of quick and 10 of full.
        overrides: Hydra overrides for all networks.
        output: the folder to write to; None for `logs/claims/BUDGET`.
        allow_mixed: add to results of other versions, data or options.
        n_jobs: processes that train; None for one per core.
    """

    names: tuple[str, ...] = ()
    budget: str = "quick"
    seeds: int | None = None
    overrides: tuple[str, ...] = ()
    output: Path | None = None
    allow_mixed: bool = False
    n_jobs: int | None = None


def run_claims(options: LedgerOptions = LedgerOptions()) -> Path:
    """Measure claims and write their ledger; what the folder has already is not measured again.

    Args:
        options: what to measure, and where to write it.

    Returns:
        The path of the page.

    Raises:
        ValueError: a name or an option is unknown, the folder has results of another setup, or a
            network or the data cannot be measured. Nothing has been measured then.
    """
    if options.budget not in BUDGETS:
        raise ValueError(
            f"expected `budget` to be one of {', '.join(BUDGETS)}, got {options.budget!r}; "
            "choose one"
        )
    count = _DEFAULT_SEEDS[options.budget] if options.seeds is None else options.seeds
    if count < 1:
        raise ValueError(f"expected `seeds` to be at least 1, got {count}; give more")
    if options.n_jobs is not None and options.n_jobs < 1:
        raise ValueError(f"expected `n_jobs` to be at least 1, got {options.n_jobs}; give more")
    claims = find_claims(options.names)
    output = options.output or Path("logs", "claims", options.budget)
    quiet_lightning()
    setup, notes = _setup(options)
    configurations = _composed(claims, options, count, output / "runs", notes)
    claims = [claim for claim in claims if claim.name in configurations]
    table = ResultTable(output, setup, options.allow_mixed)
    of_claims = {name: set(range(1, count + 1)) for name in configurations}
    for key in table.results:
        of_claims.get(key.claim, set()).add(key.seed)
    seeds = min(map(len, of_claims.values()))
    if seeds < LEAST_SEEDS:
        notes.append(
            f"{seeds} seed{'s' * (seeds > 1)}: there are no intervals with fewer than "
            f"{LEAST_SEEDS}, so nothing is decided."
        )
    print(*notes, sep="\n", flush=True)
    try:
        _measure(claims, configurations, options, table)
    except Interrupted as interrupted:
        print(f"interrupted by {interrupted}: {output}; the same command goes on from there")
        raise
    if table.is_mixed:
        notes.append(f"MIXED: results of different setups are together: {table.mixture()}.")
    return _write(claims, options.budget, table, notes)


def _composed(
    claims: Sequence[Claim],
    options: LedgerOptions,
    count: int,
    folder: Path,
    notes: list[str],
) -> dict[str, Configurations]:
    """Compose the networks of claims, by the claim's name.

    If all claims are asked for, those that the overrides do not suit are left out, with a note.

    Raises:
        ValueError: a claim that is named cannot have these overrides, or no claim can.
        HydraException: likewise.
    """
    found: dict[str, Configurations] = {}
    for claim in claims:
        try:
            found[claim.name] = compose_trials(
                claim, options.budget, range(1, count + 1), options.overrides, folder
            )
        except (ValueError, HydraException) as error:
            if options.names or (claim is claims[-1] and not found):
                raise
            notes.append(f"{claim.name} is left out: {first_line(error)}")
    return found


def _setup(options: LedgerOptions) -> tuple[dict[str, Any], list[str]]:
    """Return versions, data and options, and what is to be said of the data.

    Raises:
        ValueError: the data have one class.
    """
    with hydra_configurations():
        config = compose("train", list(options.overrides))
    data: Any = OmegaConf.to_container(config.data, resolve=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataFallbackWarning)
        datamodule = loaded_data(data)
    info = data_info(datamodule) or {}
    if info.get("classes", 2) < 2:
        raise ValueError(
            f"expected `data` to have at least 2 classes, got {info['classes']}; take other data"
        )
    notes = [f"data: {data_sentence({'data': info}) or type(datamodule).__name__}"]
    notes += [str(w.message) for w in caught if issubclass(w.category, DataFallbackWarning)]
    versions = package_versions()
    setup = {
        "versions": {name: versions[name] for name in _VERSIONS},
        "data": {"source": info.get("source"), "sha256": info.get("sha256")},
        "budget": options.budget,
        "overrides": list(options.overrides),
    }
    return setup, notes


def _measure(
    claims: Sequence[Claim],
    configurations: Mapping[str, Configurations],
    options: LedgerOptions,
    table: ResultTable,
) -> None:
    """Measure the networks of claims that the table lacks."""
    parts: list[Part] = []
    for claim in claims:
        settings = claim.settings(options.budget)
        of_claim = configurations[claim.name].items()
        missing = {key: c for key, c in of_claim if key not in table.results}
        if missing:
            print(f"{claim.name}: {len(missing)} networks", flush=True)
        initial = {key: c for key, c in missing.items() if not settings[key.setting].is_trained}
        parts += [Part({key: config}, is_trained=False) for key, config in initial.items()]
        alone: dict[str, Configurations] = {}
        for part in parts_of({key: c for key, c in missing.items() if key not in initial}):
            parts.append(part)
            if part.alone:
                alone.setdefault(part.alone, {}).update(part.configurations)
        for reason, networks in alone.items():
            announce_alone(networks, reason)
    begin = time.perf_counter()
    with closing(_results(parts, options.n_jobs or os.cpu_count() or 1)) as found:
        for results in found:
            table.add(results)
            name = next(iter(results)).claim
            done = sum(key in table.results for key in configurations[name])
            if len(results) > 1 or done == len(configurations[name]):
                elapsed = time.perf_counter() - begin
                print(f"{name}: {done} of {len(configurations[name])}, {elapsed:.0f} s", flush=True)


def _results(parts: Sequence[Part], n_jobs: int) -> Generator[_Results]:
    """Yield what is measured of parts, as it comes, in as many processes.

    The processes are ended when the generator is closed.
    """
    if n_jobs == 1 or len(parts) == 1:
        for part in parts:
            yield from _measured(part)
        return
    others = active_children()
    with ProcessPoolExecutor(n_jobs, get_context("spawn"), initializer=_begin_worker) as pool:
        try:
            futures = [pool.submit(_all_measured, part) for part in parts]
            for future in as_completed(futures):
                yield from future.result()
        except BaseException:
            for worker in set(active_children()).difference(others):
                worker.kill()  # they write nothing of the ledger
            raise


def _begin_worker() -> None:
    # Ctrl-C in the terminal reaches all processes; the main process ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    keep_freed_memory()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """Wait for the end of the main process, which may be killed, and end this one."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _all_measured(part: Part) -> list[_Results]:
    quiet_lightning()
    return list(_measured(part))


def _measured(part: Part) -> Iterator[_Results]:
    """Yield seconds and measures of the networks of a stack, or of one."""
    (claim,) = find_claims((next(iter(part.configurations)).claim,))
    begin = time.process_time()
    for networks in networks_of(part):
        measures = {key: dict(claim.measure(network)) for key, network in networks.items()}
        seconds = (time.process_time() - begin) / len(networks)
        yield {key: (seconds, found) for key, found in measures.items()}
        begin = time.process_time()


def judge(claim: Claim, budget: str, table: ResultTable) -> dict[str, Any]:
    """Return the entry of a claim in summary.json: its numbers, conditions and verdict.

    Args:
        claim: the claim.
        budget: a name of `BUDGETS`.
        table: of the measured networks, other claims' included.
    """
    settings = claim.settings(budget)
    points: dict[tuple[str, int], list[MeasuredPoint]] = {}
    seconds = 0.0
    for key, result in table.results.items():
        if key.claim == claim.name and key.setting in settings and key.arm in claim.arms:
            found = points.setdefault((key.arm, key.seed), [])
            found.append(MeasuredPoint(settings[key.setting], result.measures))
            seconds += result.seconds
    numbers: dict[str, dict[str, dict[str, float | None]]] = {arm: {} for arm in claim.arms}
    for (arm, seed), found in points.items():
        # A seed counts when all of its networks are measured.
        if len(found) == len(claim.settings_of(budget, arm)):
            for name, value in claim.numbers(found).items():
                numbers[arm].setdefault(name, {})[str(seed)] = json_values(float(value))
    conditions = []
    for condition in (condition.as_json() for condition in claim.conditions):
        effect = effect_of(condition, numbers)
        conditions.append(
            {
                **condition,
                "effect": {
                    "value": effect.value,
                    "low": effect.low,
                    "high": effect.high,
                    "at_least": effect.at_least,
                    "seeds": effect.seeds,
                    "inside": seeds_inside(condition, numbers),
                },
                "outcome": condition_outcome(condition, effect),
                "reason": open_reason(condition, effect),
            }
        )
    verdict = verdict_of(conditions, numbers)
    typed = dict.fromkeys(text for setup in table.used_setups for text in setup["overrides"])
    but = f" Where {' '.join(typed)} differs from this, it was used." if typed else ""
    return {
        "sentence": claim.sentence,
        "source": claim.source,
        "verdict": verdict.outcome,
        "text": verdict.text,
        "conditions": conditions,
        "numbers": numbers,
        "not_varied": claim.not_varied + but,
        "would_change": claim.would_change,
        "seconds": round(seconds, 1),
    }


def _write(claims: Sequence[Claim], budget: str, table: ResultTable, notes: Sequence[str]) -> Path:
    """Write summary.json, figures, claims.md and the page, and print the verdicts."""
    folder = table.folder
    entries = {claim.name: judge(claim, budget, table) for claim in claims}
    content = {
        "schema_version": LEDGER_SCHEMA_VERSION,
        "budget": budget,
        "setups": table.used_setups,
        "notes": list(notes),
        "claims": entries,
    }
    figures = {claim.name: claim_figure(claim, budget, table) for claim in claims}
    overview = overview_figure(entries)
    for name, figure in {**figures, "overview": overview}.items():
        save(figure, figures_folder(folder) / name)
    write_json(folder / SUMMARY_FILE, content)
    write_atomically(folder / _MARKDOWN, claims_markdown(content))
    write_atomically(folder / _PAGE, claims_page(content, figures, overview))
    for name, entry in entries.items():
        print(f"{name}: {entry['text']}")
    print(folder / _PAGE)
    return folder / _PAGE
