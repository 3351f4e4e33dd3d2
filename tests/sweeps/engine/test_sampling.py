"""Samplers that plan all points, samplers that do not, and seeds."""

from dataclasses import replace

import optuna
import pytest

from bn_lightning.sweeps.engine.sampling import SamplingPlan, make_pruner
from bn_lightning.sweeps.engine.space import parse_space
from bn_lightning.sweeps.engine.sweep_error import SweepError

SPACE = parse_space(None, ["a=x,y", "b=range(3)"])
REAL = parse_space(None, ["x=interval(0,1)", "y=interval(0,1)"])


def config(name, **arguments):
    return {"_target_": f"optuna.samplers.{name}", **arguments}


def plan(sampler, space=SPACE, n_trials=None, custom=None):
    return SamplingPlan(sampler, replace(space, custom=custom), n_trials)


def params(made):
    return [made.point(slot).params for slot in range(made.n_trials)]


class TestFinite:
    @pytest.mark.parametrize("name", ["GridSampler", "BruteForceSampler"])
    def test_every_point_once_in_order(self, name):
        made = plan(config(name))
        assert made.n_trials == 6
        assert params(made) == SPACE.grid()

    @pytest.mark.parametrize(("asked", "n_trials"), [(4, 4), (100, 6)])
    def test_no_more_than_asked_for_or_there_are(self, asked, n_trials):
        assert plan(config("GridSampler"), n_trials=asked).n_trials == n_trials

    def test_brute_force_tries_what_is_conditional(self):
        def custom(trial):
            if trial.params["a"] == "x":
                trial.suggest_categorical("c", [1, 2])

        made = plan(config("BruteForceSampler"), custom=custom)
        found = [tuple(point.items()) for point in params(made)]
        assert len(found) == len(set(found)) == 3 * 2 + 3
        again = plan(config("BruteForceSampler"), custom=custom)
        assert params(again) == params(made)

    def test_a_grid_does_not(self):
        with pytest.raises(SweepError, match="brute_force"):
            plan(config("GridSampler"), custom=lambda trial: None)


class TestPlanned:
    @pytest.mark.parametrize("name", ["RandomSampler", "QMCSampler"])
    def test_a_longer_sweep_begins_with_the_shorter(self, name):
        """`n_trials` can be increased without repeating a point."""
        extra = {"scramble": True} if name == "QMCSampler" else {}
        short = plan(config(name, seed=1, **extra), REAL, 8)
        long = plan(config(name, seed=1, **extra), REAL, 16)
        assert params(short) == params(long)[:8]
        assert len({tuple(point.values()) for point in params(long)}) == 16

    def test_they_need_a_number(self):
        with pytest.raises(SweepError, match="`n_trials` .* RandomSampler"):
            plan(config("RandomSampler"), REAL)


class TestAdaptive:
    @pytest.mark.parametrize("name", ["TPESampler", "GPSampler", "CmaEsSampler", "NSGAIISampler"])
    def test_they_draw_when_a_trial_begins(self, name):
        made = plan(config(name), REAL, 5)
        assert (made.n_trials, made.is_planned, made.point(3).params) == (5, False, {})

    def test_a_seed_depends_on_the_first_trial(self):
        def first_point(number):
            sampler = plan(config("TPESampler", seed=1), REAL, 5).sampler(first_trial=number)
            study = optuna.create_study(sampler=sampler)
            return tuple(REAL.suggest(study.ask()).items())

        plain = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=1))
        assert first_point(0) == tuple(REAL.suggest(plain.ask()).items())
        assert first_point(7) == first_point(7)
        assert len({first_point(number) for number in range(20)}) == 20


class TestBadInput:
    @pytest.mark.parametrize(
        "target",
        ["optuna.samplers.NoSuch", "no_such.module.Sampler", "optuna.pruners.NopPruner", "x", None],
    )
    def test_unknown_samplers(self, target):
        with pytest.raises(SweepError, match="`sampler` .* Optuna's samplers"):
            plan({"_target_": target}, REAL, 5)

    def test_arguments_of_samplers(self):
        with pytest.raises(SweepError, match=r"`sampler` .* optuna.samplers.TPESampler"):
            plan(config("TPESampler", no_such=1), REAL, 5).sampler()

    @pytest.mark.parametrize("target", ["optuna.pruners.NoSuch", "optuna.samplers.TPESampler"])
    def test_unknown_pruners(self, target):
        with pytest.raises(SweepError, match="`pruner`"):
            make_pruner({"_target_": target})

    def test_a_pruner_that_is_a_command_is_not_run(self, tmp_path):
        with pytest.raises(SweepError, match="`pruner` .* Optuna's pruners"):
            make_pruner({"_target_": "os.mkdir", "path": str(tmp_path / "made")})
        assert not (tmp_path / "made").exists()

    def test_no_pruner(self):
        assert isinstance(make_pruner(None), optuna.pruners.NopPruner)
