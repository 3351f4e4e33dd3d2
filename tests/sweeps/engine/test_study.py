"""Claiming, finishing, repeating and recovering trials."""

import os
import signal
from dataclasses import replace

import optuna
import pytest
from optuna.trial import TrialState

from bn_lightning.sweeps.engine import creation
from bn_lightning.sweeps.engine import study as engine
from bn_lightning.sweeps.engine.creation import create_study, study_name
from bn_lightning.sweeps.engine.heartbeat import ProcessIdentity
from bn_lightning.sweeps.engine.outcome import Outcome, failed, outcome_of
from bn_lightning.sweeps.engine.sampling import SamplingPlan, make_pruner
from bn_lightning.sweeps.engine.space import Space, parse_space
from bn_lightning.sweeps.engine.stop_request import StopRequest
from bn_lightning.sweeps.engine.storage import open_storage, storage_url
from bn_lightning.sweeps.engine.stored_names import (
    ERROR,
    FILLER,
    HOPELESS,
    INTERRUPTED,
    SLOT,
    WORKER,
)
from bn_lightning.sweeps.engine.study import FailurePolicy, SweepStudy
from bn_lightning.sweeps.engine.sweep_error import SweepError
from bn_lightning.sweeps.engine.workers import run_trials

GRID = parse_space(None, ["x=range(4)", "y=range(3)"])
REAL = parse_space(None, ["x=interval(0,1)"])


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(engine, "SETTLE", 0.01)
    monkeypatch.setattr(engine, "FILL_PATIENCE", 0.1)
    monkeypatch.setattr(creation, "DESCRIPTION_PATIENCE", 0.1)
    # These tests need no durable files, and fsync takes most of their time.
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def one_by_one(run):
    return lambda trials: [run(trial) for trial in trials]


class Sweep:
    """A command that works on a sweep; with the same arguments, another one on the same study."""

    def __init__(self, folder, storage="journal", space=GRID, sampler="GridSampler", n_trials=None,
                 seed=1, retries=1, directions=("minimize",)):  # fmt: skip
        config = {"_target_": f"optuna.samplers.{sampler}", "seed": seed}
        if isinstance(sampler, dict):
            config = sampler
        plan = SamplingPlan(config, space, n_trials)
        self.storage = open_storage(storage_url(storage, folder), 5)
        description = {"space": space.describe(), "overrides": list(space.fixed)}
        create_study(self.storage, "s", list(directions), description)
        policy = FailurePolicy(retries, heartbeat=60, stale_after=120)
        self.study = SweepStudy(self.storage, "s", folder, plan, make_pruner(None), policy)
        self.study.fill()

    def work(self, run, stop=None):
        try:
            run_trials(self.study, one_by_one(run), stop or StopRequest(), pause=0.01)
        finally:
            self.study.close()
        return self

    @property
    def trials(self):
        return optuna.load_study(study_name="s", storage=self.storage).trials

    def states(self):
        return [trial.state.name for trial in self.trials]


def claim(sweep):
    return next(iter(sweep.study.claim()), None)


def product(claimed):
    return Outcome(
        "COMPLETE", [float(claimed.params["x"] * claimed.params.get("y", 1))], {"a": "b"}
    )


class StopAfter(StopRequest):
    """A worker that is asked to stop after n trials."""

    def __init__(self, n):
        super().__init__()
        self.count = iter(range(n))

    def is_set(self):
        return super().is_set() or next(self.count, None) is None


@pytest.fixture(params=["journal", "sqlite"])
def storage(request, tmp_path):
    return "journal" if request.param == "journal" else f"sqlite:///{tmp_path}/study.db"


class TestWork:
    def test_a_grid(self, tmp_path, storage):
        trials = Sweep(tmp_path, storage).work(product).trials
        assert [trial.params for trial in trials] == GRID.grid()
        assert all(trial.value == trial.params["x"] * trial.params["y"] for trial in trials)
        assert trials[5].user_attrs == {"a": "b", "directory": str(tmp_path / "5")}

    def test_it_resumes_where_it_stopped(self, tmp_path):
        Sweep(tmp_path).work(product, StopAfter(5))
        seen = []
        second = Sweep(tmp_path).work(lambda c: seen.append(c.number) or product(c))
        assert seen == list(range(5, 12))
        assert second.states() == ["COMPLETE"] * 12
        third = Sweep(tmp_path).work(pytest.fail)
        assert third.states() == ["COMPLETE"] * 12

    def test_two_workers_share(self, tmp_path, storage):
        first, second = Sweep(tmp_path, storage), Sweep(tmp_path, storage)
        numbers = []
        while (claims := [claim(first), claim(second)]) != [None, None]:
            for sweep, claimed in zip((first, second), claims, strict=True):
                numbers.append(claimed.number)
                sweep.study.finish({claimed.number: product(claimed)})
        assert sorted(numbers) == list(range(12))

    def test_more_trials_continue_the_study(self, tmp_path):
        Sweep(tmp_path, space=REAL, sampler="RandomSampler", n_trials=5).work(product)
        more = Sweep(tmp_path, space=REAL, sampler="RandomSampler", n_trials=9).work(product)
        assert more.states() == ["COMPLETE"] * 9
        fewer = Sweep(tmp_path, space=REAL, sampler="RandomSampler", n_trials=3).work(pytest.fail)
        assert fewer.study.refresh().settled == 3

    @pytest.mark.parametrize(
        "sampler", ["RandomSampler", "TPESampler", "QMCSampler", "NSGAIISampler", "CmaEsSampler"]
    )
    def test_a_seeded_sampler_does_not_repeat_itself(self, tmp_path, sampler):
        """50 trials, and 50 more after a resume."""
        for n_trials in (50, 100):
            sweep = Sweep(tmp_path, space=REAL, sampler=sampler, n_trials=n_trials)
            trials = sweep.work(product).trials
        assert len({trial.params["x"] for trial in trials}) == 100

    def test_without_interruption_a_seed_gives_optunas_own_points(self, tmp_path):
        trials = Sweep(tmp_path, space=REAL, sampler="TPESampler", n_trials=15).work(product).trials
        plain = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=1))
        plain.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=15)
        assert [t.params for t in trials] == [t.params for t in plain.trials]

    def test_several_directions(self, tmp_path):
        both = ("minimize", "maximize")
        sweep = Sweep(tmp_path, directions=both)
        sweep.work(lambda claimed: outcome_of((claimed.params["x"], 1), None, 2))
        assert sweep.trials[11].values == [3, 1]


class TestRefinement:
    """Rates up to 0.3 train for y = 0 and up to 5 for y = 1; both edges are halved at once."""

    SPACE = parse_space(None, ["lr=0.1,1,10", "y=range(2)"])
    SAMPLER = {
        "_target_": "bn_lightning.sweeps.analysis.edge_search.EdgeSearch",
        "axis": "lr",
        "resolution": 0.25,
    }
    ROUNDS = [
        *([(lr, y) for lr in (0.1, 1, 10) for y in (0, 1)]),
        *((0.31623, 0), (3.1623, 1), (0.17783, 0), (5.6234, 1)),
    ]

    def sweep(self, folder, storage="journal", **keys):
        return Sweep(folder, storage, self.SPACE, self.SAMPLER, **keys)

    @staticmethod
    def trains(claimed):
        largest = (0.3, 5)[claimed.params["y"]]
        return Outcome("COMPLETE", [1.0 if claimed.params["lr"] <= largest else 0.1])

    def points(self, sweep, state="COMPLETE"):
        return [
            (trial.params["lr"], trial.params["y"])
            for trial in sweep.trials
            if trial.state.name == state
        ]

    def test_rounds(self, tmp_path):
        sweep = self.sweep(tmp_path).work(self.trains)
        assert self.points(sweep) == self.ROUNDS
        assert sweep.study.refresh().total == 10

    def test_it_resumes_in_any_round(self, tmp_path):
        for _ in range(10):
            self.sweep(tmp_path).work(self.trains, StopAfter(2))
        assert self.points(self.sweep(tmp_path)) == self.ROUNDS

    def test_a_dead_workers_trial_is_tried_again_in_its_round(self, tmp_path):
        deaths = [4, 8, 11]  # in the grid, in the first round of halvings, in the second
        done = self.sweep(tmp_path)
        while not done.study.slots.is_over():
            claimed = claim(done)
            if claimed is None:
                done.study.recover()
            elif claimed.number in deaths:
                kill(done, claimed.number)
                done = self.sweep(tmp_path)
            else:
                done.study.finish({claimed.number: self.trains(claimed)})
        assert sorted(self.points(done)) == sorted(self.ROUNDS)
        assert len(self.points(done, "FAIL")) == 3

    def test_two_workers_share_each_round(self, tmp_path, storage):
        both = [self.sweep(tmp_path, storage), self.sweep(tmp_path, storage)]
        while not all(sweep.study.slots.is_over() for sweep in both):
            for sweep, claimed in [(sweep, claim(sweep)) for sweep in both]:
                if claimed is not None:
                    sweep.study.finish({claimed.number: self.trains(claimed)})
            for sweep in both:
                sweep.study.refresh()
                sweep.study.recover()
        assert self.points(both[0]) == self.ROUNDS

    def test_a_round_is_one_batch(self, tmp_path):
        sweep, sizes = self.sweep(tmp_path), []

        def run(batch):
            sizes.append(len(batch))
            return list(map(self.trains, batch))

        run_trials(sweep.study, run, StopRequest(), batch_size=66, pause=0.01)
        assert sizes == [6, 2, 2]

    def test_a_lost_trial_does_not_stop_the_others(self, tmp_path):
        def run(claimed):
            is_middle = claimed.params["y"] == 0 and abs(claimed.params["lr"] - 0.3162) < 0.01
            return failed("always") if is_middle else self.trains(claimed)

        sweep = self.sweep(tmp_path, retries=1).work(run)
        rates = [lr for lr, y in self.points(sweep) if y == 0]
        assert rates[3:] == pytest.approx([0.17783, 0.56234])
        assert sweep.study.refresh().lost == 1


class TestFailures:
    def test_an_error_is_tried_again_at_the_same_point(self, tmp_path):
        def run(claimed):
            if claimed.number == 2:
                raise RuntimeError("once")
            return product(claimed)

        sweep = Sweep(tmp_path).work(run)
        assert sweep.states() == ["COMPLETE"] * 2 + ["FAIL"] + ["COMPLETE"] * 10
        assert sweep.trials[12].params == sweep.trials[2].params
        assert sweep.trials[2].user_attrs[ERROR].endswith("RuntimeError: once")

    @pytest.mark.parametrize("retries", [0, 2])
    def test_a_point_that_always_fails_is_lost(self, tmp_path, retries):
        def run(claimed):
            return product(claimed) if claimed.params["x"] else failed("always")

        sweep = Sweep(tmp_path, retries=retries).work(run)
        counts = sweep.study.refresh()
        assert (counts.complete, counts.lost) == (9, 3)
        assert sweep.states().count("FAIL") == 3 * (1 + retries)
        more = Sweep(tmp_path, retries=retries + 1).work(product)
        assert more.study.refresh().complete == 12

    def test_what_another_try_would_repeat_is_not_tried_again(self, tmp_path):
        sweep = Sweep(tmp_path).work(lambda claimed: outcome_of("text", None, 1))
        assert sweep.states() == ["FAIL"] * 12
        assert all(trial.user_attrs[HOPELESS] for trial in sweep.trials)

    def test_pruned_and_diverged_trials_are_results(self, tmp_path):
        def run(claimed):
            if claimed.params["x"] == 0:
                raise optuna.TrialPruned
            return Outcome("COMPLETE", [0.1], {"diverged": True, "diverged_at": 7})

        counts = Sweep(tmp_path).work(run).study.refresh()
        assert (counts.pruned, counts.complete, counts.diverged, counts.lost) == (3, 9, 9, 0)

    def test_an_interruption_comes_out_and_is_tried_again(self, tmp_path):
        def run(claimed):
            if claimed.number == 3:
                raise KeyboardInterrupt
            return product(claimed)

        with pytest.raises(KeyboardInterrupt):
            Sweep(tmp_path, retries=0).work(run)
        sweep = Sweep(tmp_path, retries=0).work(product)
        assert sweep.states().count("COMPLETE") == 12
        assert sweep.trials[3].user_attrs[INTERRUPTED]
        assert sweep.study.refresh().lost == 0

    def test_an_error_that_took_the_place_of_an_interruption(self, tmp_path):
        stop = StopRequest()

        def run(claimed):
            if claimed.number < 3:
                return product(claimed)
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                raise ValueError("half done")

        with stop.on_signals():
            Sweep(tmp_path, retries=0).work(run, stop)
        sweep = Sweep(tmp_path, retries=0).work(product)
        assert sweep.states() == ["COMPLETE"] * 3 + ["FAIL"] + ["COMPLETE"] * 9
        assert sweep.trials[3].user_attrs[INTERRUPTED]

    def test_a_failure_after_one_was_asked_to_stop_is_one(self, tmp_path):
        stop = StopRequest()

        def run(claimed):
            stop.set()
            raise ValueError("of the trial's own")

        sweep = Sweep(tmp_path, retries=0).work(run, stop)
        assert sweep.states() == ["FAIL"] + ["WAITING"] * 11
        assert INTERRUPTED not in sweep.trials[0].user_attrs

    def test_interrupted_while_its_point_is_drawn(self, tmp_path, monkeypatch):
        sweep = Sweep(tmp_path, retries=0)

        def suggest(space, trial):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Space, "suggest", suggest)
            sweep.work(product)
        again = Sweep(tmp_path, retries=0).work(product)
        assert again.states() == ["FAIL"] + ["COMPLETE"] * 12
        assert again.trials[0].user_attrs[INTERRUPTED]


def kill(sweep, number):
    """Mark a trial as run by a process that has ended."""
    trial_id = sweep.study._id(number)
    dead = replace(ProcessIdentity.of(os.getpid()), started="1")
    sweep.storage.set_trial_system_attr(trial_id, WORKER, str(dead))


class TestDeath:
    def test_a_dead_workers_trial_is_tried_again(self, tmp_path, storage):
        dead = Sweep(tmp_path, storage)
        claimed = claim(dead)
        kill(dead, claimed.number)
        sweep = Sweep(tmp_path, storage).work(product)
        assert sweep.states().count("COMPLETE") == 12
        assert sweep.states()[0] == "FAIL"
        assert "ended" in sweep.trials[0].user_attrs[ERROR]

    def test_the_outcome_it_left_is_told(self, tmp_path):
        """The worker died after its trial ended and before it updated the study."""
        dead = Sweep(tmp_path)
        claimed = claim(dead)
        Outcome("COMPLETE", [7.0], {"seconds": 3.0}).write(tmp_path / str(claimed.number))
        kill(dead, claimed.number)
        sweep = Sweep(tmp_path).work(product)
        assert sweep.states() == ["COMPLETE"] * 12
        assert sweep.trials[0].value == 7.0
        assert sweep.trials[0].user_attrs["seconds"] == 3.0

    def test_an_outcome_of_an_older_study_is_not(self, tmp_path):
        Outcome("COMPLETE", [7.0]).write(tmp_path / "0")
        dead = Sweep(tmp_path)
        claim(dead)
        kill(dead, 0)
        assert Sweep(tmp_path).work(product).states()[0] == "FAIL"

    def test_a_living_workers_trial_is_left_alone(self, tmp_path):
        living = Sweep(tmp_path)
        claimed = claim(living)
        other = Sweep(tmp_path)
        run_trials(other.study, one_by_one(product), StopAfter(40), pause=0)
        assert other.states() == ["RUNNING"] + ["COMPLETE"] * 11
        living.study.finish({claimed.number: product(claimed)})
        assert other.study.refresh().settled == 12

    def test_one_who_was_given_up_does_not_overwrite(self, tmp_path, caplog):
        late = Sweep(tmp_path)
        claimed = claim(late)
        kill(late, claimed.number)
        sweep = Sweep(tmp_path).work(product)
        late.study.finish({claimed.number: product(claimed)})
        assert sweep.states().count("COMPLETE") == 12
        assert "trial 0" in caplog.text

    def test_telling_twice_is_telling_once(self, tmp_path, caplog):
        """As when an answer of the storage is lost and the call is repeated."""
        sweep = Sweep(tmp_path)
        claimed = claim(sweep)
        sweep.study.finish({claimed.number: product(claimed)})
        sweep.study.finish({claimed.number: product(claimed)})
        assert not [record for record in caplog.records if record.levelname == "WARNING"]

    def test_half_filled_studies_are_filled(self, tmp_path, monkeypatch):
        with monkeypatch.context() as patched:
            patched.setattr(SweepStudy, "fill", lambda self: None)
            unfilled = Sweep(tmp_path)
        unfilled.study.refresh()
        unfilled.study._enqueue([0, 1, 5])
        study = optuna.load_study(study_name="s", storage=unfilled.storage)
        study.set_user_attr(FILLER, "elsewhere 7 1 x")
        sweep = Sweep(tmp_path)
        assert len(sweep.trials) == 3  # the other process may be filling it
        sweep.work(product)
        assert sweep.states() == ["COMPLETE"] * 12

    def test_slots_filled_twice_are_run_once(self, tmp_path):
        sweep = Sweep(tmp_path)
        sweep.study._enqueue(range(12))
        seen = []
        sweep.work(lambda claimed: seen.append(claimed.params) or product(claimed))
        assert seen == GRID.grid()
        assert sweep.study.refresh().lost == 0


class TestCreateStudy:
    def test_another_direction(self, tmp_path):
        Sweep(tmp_path)
        with pytest.raises(SweepError, match="to maximize, got one made to minimize"):
            Sweep(tmp_path, directions=("maximize",))

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["x=range(4)", "y=range(5)"], "space, .* has y="),
            (["y=range(3)", "x=range(4)", "z=1,2"], "this command z="),
            (["x=range(4)", "y=range(3)", "trainer=gpu"], "this command trainer=gpu"),
        ],
        ids=["distribution", "parameter", "override"],
    )
    def test_another_space(self, tmp_path, arguments, words):
        Sweep(tmp_path)
        with pytest.raises(SweepError, match=words) as error:
            Sweep(tmp_path, space=parse_space(None, arguments))
        assert "hydra.sweeper.restart=fresh" in str(error.value)

    @pytest.mark.parametrize(
        ("before", "now", "words"),
        [
            ({"a.b": "1", "c": "2"}, {"a.b": "3", "c": "2"}, "has a.b=1, this command a.b=3;"),
            ({"c": "2"}, {"c": "2", "d": "null"}, "has nothing else, this command d=null;"),
            ({f"k{i}": "0" for i in range(9)}, {}, "k4=0 and 4 more, this command nothing else;"),
            ({"c": "2"}, {"c": "2"}, None),
            (None, {"c": "2"}, None),
        ],
        ids=["another value", "another key", "many", "the same", "of an earlier version"],
    )
    def test_another_configuration(self, tmp_path, before, now, words):
        storage = open_storage(storage_url("journal", tmp_path), 5)
        made = {"space": {}, "overrides": []}
        first = made if before is None else made | {"configuration": before}
        create_study(storage, "s", ["minimize"], first)
        if words is None:
            create_study(storage, "s", ["minimize"], made | {"configuration": now})
            return
        with pytest.raises(SweepError) as caught:
            create_study(storage, "s", ["minimize"], made | {"configuration": now})
        assert "same configuration" in str(caught.value)
        assert words in str(caught.value) and "restart=fresh" in str(caught.value)

    def test_a_study_of_another_program(self, tmp_path):
        storage = open_storage(storage_url("journal", tmp_path), 5)
        optuna.create_study(storage=storage, study_name="s").optimize(lambda _: 0.0, n_trials=1)
        with pytest.raises(SweepError, match="made by this sweeper"):
            Sweep(tmp_path)

    def test_its_maker_died_at_once(self, tmp_path):
        storage = open_storage(storage_url("journal", tmp_path), 5)
        optuna.create_study(storage=storage, study_name="s")
        assert Sweep(tmp_path).work(product).states() == ["COMPLETE"] * 12

    @pytest.mark.parametrize(
        ("taken", "resumed", "fresh"),
        [((), "s", "s"), (("s",), "s", "s-2"), (("s", "s-2"), "s-2", "s-3")],
    )
    def test_names(self, taken, resumed, fresh):
        assert study_name("s", taken.__contains__, fresh=False) == resumed
        assert study_name("s", taken.__contains__, fresh=True) == fresh


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((-1, 1, 2), "`max_retries`"), ((0, 0, 2), "`stale_after`"), ((0, 2, 3), "`stale_after`")],
)
def test_policies(arguments, words):
    with pytest.raises(SweepError, match=words):
        FailurePolicy(*arguments)


def test_slots_are_kept_with_the_trials(tmp_path):
    sweep = Sweep(tmp_path)
    assert [trial.system_attrs[SLOT] for trial in sweep.trials] == list(range(12))
    assert all(trial.state == TrialState.WAITING for trial in sweep.trials)
