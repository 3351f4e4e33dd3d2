"""Which samplers choose beforehand, and how seeds go on."""

import optuna
import pytest

from bn_lightning.sweeps.engine.errors import SweepError
from bn_lightning.sweeps.engine.sampling import Points, make_pruner, make_sampler
from bn_lightning.sweeps.engine.space import parse_space

SPACE = parse_space(None, ["a=x,y", "b=range(3)"])
REAL = parse_space(None, ["x=interval(0,1)", "y=interval(0,1)"])


def config(name, **arguments):
    return {"_target_": f"optuna.samplers.{name}", **arguments}


def points(sampler, space=SPACE, n_trials=None, custom=None):
    return Points(
        sampler, space, lambda trial: space.suggest(trial, custom), custom is not None, n_trials
    )


class TestFinite:
    @pytest.mark.parametrize("name", ["GridSampler", "BruteForceSampler"])
    def test_every_point_once_in_order(self, name):
        made = points(config(name))
        assert made.n_trials == 6
        assert [made[slot][0] for slot in range(6)] == SPACE.grid()

    @pytest.mark.parametrize(("asked", "n_trials"), [(4, 4), (100, 6)])
    def test_no_more_than_asked_for_or_there_are(self, asked, n_trials):
        assert points(config("GridSampler"), n_trials=asked).n_trials == n_trials

    def test_brute_force_tries_what_is_conditional(self):
        def custom(config, trial):
            if trial.params["a"] == "x":
                trial.suggest_categorical("c", [1, 2])

        made = points(config("BruteForceSampler"), custom=custom)
        found = [tuple(made[slot][0].items()) for slot in range(made.n_trials)]
        assert len(found) == len(set(found)) == 3 * 2 + 3
        again = points(config("BruteForceSampler"), custom=custom)
        assert [again[slot] for slot in range(9)] == [made[slot] for slot in range(9)]

    def test_a_grid_does_not(self):
        with pytest.raises(SweepError, match="brute_force"):
            points(config("GridSampler"), custom=lambda config, trial: None)


class TestPlanned:
    @pytest.mark.parametrize("name", ["RandomSampler", "QMCSampler"])
    def test_a_longer_sweep_begins_with_the_shorter(self, name):
        """So that n_trials may grow, and no point is tried twice."""
        extra = {"scramble": True} if name == "QMCSampler" else {}
        short = points(config(name, seed=1, **extra), REAL, 8)
        long = points(config(name, seed=1, **extra), REAL, 16)
        values = [tuple(long[slot][0].values()) for slot in range(16)]
        assert [tuple(short[slot][0].values()) for slot in range(8)] == values[:8]
        assert len(set(values)) == 16

    def test_they_need_a_number(self):
        with pytest.raises(SweepError, match="`n_trials` expected a number, as RandomSampler"):
            points(config("RandomSampler"), REAL)


class TestAdaptive:
    @pytest.mark.parametrize("name", ["TPESampler", "GPSampler", "CmaEsSampler", "NSGAIISampler"])
    def test_they_draw_when_a_trial_begins(self, name):
        made = points(config(name), REAL, 5)
        assert (made.n_trials, made.are_planned, made[3]) == (5, False, None)

    def test_a_seed_goes_on_with_the_first_trial(self):
        def first_point(number):
            study = optuna.create_study(
                sampler=make_sampler(config("TPESampler", seed=1), first_trial=number)
            )
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
        with pytest.raises(SweepError, match="`sampler` expected one of Optuna's samplers"):
            points({"_target_": target}, REAL, 5)

    def test_arguments_of_samplers(self):
        with pytest.raises(SweepError, match=r"`sampler` optuna.samplers.TPESampler cannot be"):
            make_sampler(config("TPESampler", no_such=1))

    @pytest.mark.parametrize("target", ["optuna.pruners.NoSuch", "optuna.samplers.TPESampler"])
    def test_unknown_pruners(self, target):
        with pytest.raises(SweepError, match="`pruner`"):
            make_pruner({"_target_": target})

    def test_a_pruner_that_is_a_command_is_not_run(self, tmp_path):
        with pytest.raises(SweepError, match="`pruner` expected one of Optuna's pruners"):
            make_pruner({"_target_": "os.mkdir", "path": str(tmp_path / "made")})
        assert not (tmp_path / "made").exists()

    def test_no_pruner(self):
        assert isinstance(make_pruner(None), optuna.pruners.NopPruner)
