"""Tolerance, intervals and importances: numbers computed by hand, and properties of any grid."""

import itertools
import math

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from bn_lightning.sweeps.analysis.importances import importances
from bn_lightning.sweeps.analysis.intervals import (
    Estimate,
    estimate,
    estimate_rate,
    paired_difference,
    ratio,
    unpaired_difference,
)
from bn_lightning.sweeps.analysis.tolerance import (
    Grid,
    GridOutcome,
    GridTrial,
    Levels,
    coverage,
    inits_that_train,
    largest_rate,
    mean_width,
    rate_sensitivity,
    share_at_chance,
    share_diverged,
    share_trained,
    widths,
)

NAN = math.nan
RATES = (0.01, 0.1, 1.0, 10.0)
# Two initialisations, four rates, two seeds.
ACCURACY = np.array(
    [
        [[0.95, 0.90], [0.97, 0.50], [0.10, 0.19], [0.10, 0.10]],
        [[0.10, 0.89], [0.91, 0.92], [0.93, NAN], [0.96, 0.95]],
    ]
)

accuracies = npst.arrays(
    float, npst.array_shapes(min_dims=3, max_dims=3, max_side=4), elements=st.floats(0, 1)
)


def rates_of(accuracy: np.ndarray) -> list[float]:
    return [10.0**i for i in range(accuracy.shape[1])]


class TestByHand:
    def test_share_trained(self):
        # Seed 1: .95 .97 .91 .93 .96 of 8; seed 2: .90 .92 .95 of 7.
        np.testing.assert_allclose(share_trained(ACCURACY), [5 / 8, 3 / 7])

    def test_share_at_chance(self):
        np.testing.assert_allclose(share_at_chance(ACCURACY), [3 / 8, 2 / 7])

    def test_widths(self):
        width, censored = widths(ACCURACY, RATES)
        np.testing.assert_allclose(width, [[2, 1], [3, 2]])
        assert censored.tolist() == [[True, True], [True, True]]
        inner = np.where(np.arange(4)[None, :, None] % 3 == 0, 0.1, ACCURACY)
        width, censored = widths(inner, RATES)
        np.testing.assert_allclose(width, [[1, 0], [2, 1]])
        assert not censored.any()

    def test_widths_of_uneven_rates(self):
        # At 0, 1 and 3 decades: they stand for 1, (3 - 0) / 2 and 2 decades.
        width, _ = widths(np.ones((1, 3, 1)), (1, 10, 1000))
        np.testing.assert_allclose(width, [[4.5]])
        width, _ = widths(np.array([[[0.0], [1.0], [0.0]]]), (1, 10, 1000))
        np.testing.assert_allclose(width, [[1.5]])

    def test_mean_width(self):
        np.testing.assert_allclose(mean_width(ACCURACY, RATES), [2.5, 1.5])

    def test_a_seed_or_an_initialisation_without_trials_has_no_width(self):
        accuracy = ACCURACY.copy()
        accuracy[:, :, 1] = NAN
        accuracy[1, :, 0] = NAN
        np.testing.assert_array_equal(widths(accuracy, RATES)[0], [[2, NAN], [NAN, NAN]])
        np.testing.assert_array_equal(mean_width(accuracy, RATES), [2, NAN])
        np.testing.assert_array_equal(inits_that_train(accuracy), [1, NAN])

    def test_share_diverged(self):
        diverged = np.zeros(ACCURACY.shape, bool)
        diverged[0, 3] = True
        np.testing.assert_allclose(share_diverged(diverged, ACCURACY), [1 / 8, 1 / 7])

    def test_inits_that_train(self):
        np.testing.assert_allclose(inits_that_train(ACCURACY), [2, 2])
        np.testing.assert_allclose(inits_that_train(ACCURACY - 0.03), [2, 1])

    def test_largest_rate(self):
        np.testing.assert_allclose(largest_rate(ACCURACY, RATES), [[0.1, 0.01], [10, 10]])
        np.testing.assert_array_equal(largest_rate(np.zeros((1, 4, 1)), RATES), [[NAN]])

    def test_rate_sensitivity(self):
        loss = np.array([[[0.3], [0.1], [2.0], [50.0]], [[NAN], [0.5], [0.5], [0.5]]])
        # (.3 + .1 + 2 + 2.3) / 4 - .1, and no loss of not knowing.
        np.testing.assert_allclose(rate_sensitivity(loss, 2.3), [[4.7 / 4 - 0.1], [0]])

    def test_outcomes(self):
        trials = [
            GridTrial("with", 0.1, 1.0, 1, 0.95, 0.1),
            GridTrial("with", 0.1, 10.0, 1, 0.5, 1.2),
            GridTrial("with", 1.0, 1.0, 1, 0.11, 2.3),
            GridTrial("with", 1.0, 10.0, 1, 0.1, 2.3, diverged=True),
            GridTrial("without", 0.1, 1.0, 1, 0.9, 0.3),
        ]
        grid = Grid.of(reversed(trials))
        assert grid.inits == (0.1, 1.0) and grid.rates == (1.0, 10.0) and grid.seeds == (1,)
        assert grid.arms["with"].outcomes()[:, :, 0].tolist() == [
            [GridOutcome.TRAINED, GridOutcome.SLOW],
            [GridOutcome.CHANCE, GridOutcome.DIVERGED],
        ]
        assert grid.arms["with"].missing == 0 and grid.arms["without"].missing == 3
        assert grid.arms["without"].outcomes()[1, 1, 0] == GridOutcome.MISSING

    def test_another_level(self):
        # Seed 1: .93 .95 .96 .97 of 8 reach .93; seed 2: .95 of 7.
        np.testing.assert_allclose(share_trained(ACCURACY, 0.93), [4 / 8, 1 / 7])
        np.testing.assert_allclose(share_at_chance(ACCURACY, 0.15), [3 / 8, 1 / 7])
        np.testing.assert_allclose(widths(ACCURACY, RATES, 0.93)[0], [[2, 0], [2, 1]])
        np.testing.assert_allclose(mean_width(ACCURACY, RATES, 0.93), [2, 0.5])
        np.testing.assert_allclose(inits_that_train(ACCURACY, 0.93), [2, 1])
        np.testing.assert_allclose(largest_rate(ACCURACY, RATES, 0.96), [[0.1, NAN], [10, NAN]])

    @pytest.mark.parametrize(
        ("classes", "at_chance"), [(10, 0.2), (2, 0.6), (3, 1 / 3 + 0.1), (100, 0.02)]
    )
    def test_chance_is_that_of_the_number_of_classes(self, classes, at_chance):
        levels = Levels.of(classes)
        assert (levels.trained, levels.at_chance) == (0.9, pytest.approx(at_chance))
        assert Levels.of(10) == Levels()

    def test_outcomes_at_another_level(self):
        accuracies = {0.1: 0.59, 1.0: 0.61, 10.0: 0.75}
        trials = [GridTrial("with", 0.1, lr, 1, a, 0.6) for lr, a in accuracies.items()]
        grid = Grid.of(trials, Levels.of(2, 0.75))
        assert grid.arms["with"].outcomes()[0, :, 0].tolist() == [
            GridOutcome.CHANCE,
            GridOutcome.SLOW,
            GridOutcome.TRAINED,
        ]

    def test_a_level_belongs_to_what_is_above_it(self):
        levels = np.array([[[0.9], [0.2]]])
        assert (share_trained(levels), share_at_chance(levels)) == (0.5, 0)
        trials = [GridTrial("with", 0.1, lr, 1, a, 1.0) for lr, a in ((1.0, 0.9), (10.0, 0.2))]
        outcomes = Grid.of(trials).arms["with"].outcomes()
        assert outcomes[0, :, 0].tolist() == [GridOutcome.TRAINED, GridOutcome.SLOW]
        assert widths(levels, (1.0, 10.0))[0] == 1 and inits_that_train(levels) == 1
        assert largest_rate(levels, (1.0, 10.0)) == 1.0

    def test_a_grid_keeps_each_trials_numbers(self):
        trial = GridTrial("with", 0.1, 1.0, 1, 0.5, 1.5)
        other = GridTrial("with", 0.1, 1.0, 2, 0.1, 2.3, diverged=True)
        grid = Grid.of([trial, other], Levels(0.4, 0.1))
        arm = grid.arms["with"]
        np.testing.assert_array_equal(arm.accuracy, [[[0.5, 0.1]]])
        np.testing.assert_array_equal(arm.loss, [[[1.5, 2.3]]])
        assert arm.diverged.tolist() == [[[False, True]]] and not trial.diverged
        assert grid.levels == arm.levels == Levels(0.4, 0.1)
        lone = Grid.of([trial, GridTrial("without", 1.0, 1.0, 1, 0.5, 1.5)]).arms["with"]
        assert math.isnan(lone.loss[1, 0, 0]) and not lone.diverged.any()
        with pytest.raises(AttributeError):
            trial.accuracy = 1.0
        with pytest.raises(AttributeError):
            grid.levels = Levels()
        with pytest.raises(AttributeError):
            arm.levels = Levels()
        with pytest.raises(AttributeError):
            Levels().trained = 1.0
        with pytest.raises(AttributeError):
            estimate(np.ones(2)).value = 1.0

    def test_coverage(self):
        trials = [
            GridTrial("a", i, lr, s, 0.5, 1) for i in (1, 2) for lr in (1, 2) for s in (1, 2, 3)
        ]
        assert coverage(trials) == 1 == coverage([*trials, trials[0]])
        assert coverage(trials[:-3]) == 0.75
        assert coverage([GridTrial("a", 1.0, 10.0**-i, i, 0.5, 1) for i in range(4)]) == 0.25
        assert coverage([]) == 0

    def test_named_initialisations_come_after_numbers(self):
        trials = [GridTrial("a", init, 1.0, 1, 0.5, 1.0) for init in ("zeros", 10.0, "he", 0.1)]
        assert Grid.of(trials).inits == (0.1, 10.0, "he", "zeros")

    def test_estimate_of_three_seeds(self):
        # 27 resamples: the smallest and largest mean come up once each, 1/27 > 2.5%.
        assert estimate(np.array([1.0, 2.0, 6.0])) == Estimate(3.0, 1.0, 6.0, 3)

    @pytest.mark.parametrize("size", [5, 6], ids=["all_resamples", "drawn"])
    def test_the_interval_is_that_of_all_resamples(self, size):
        values = np.arange(size) ** 2.0
        means = np.array(list(itertools.product(values, repeat=size))).mean(axis=1)
        ends = np.quantile(means, [0.025, 0.975], method="inverted_cdf")
        found = estimate(values)
        # Of 6^6 resamples 20,000 are drawn: the quantiles may be off by one step of the means.
        tolerance = 0 if size == 5 else 1 / size
        np.testing.assert_allclose([found.low, found.high], ends, rtol=0, atol=tolerance + 1e-12)
        assert found.seeds == size and not found.at_least

    def test_rates_are_averaged_in_decades(self):
        found = estimate_rate(np.array([10.0, 1000.0, NAN]), at_least=True)
        assert (found.seeds, found.at_least) == (2, True)
        np.testing.assert_allclose([found.value, found.low, found.high], [100, 10, 1000])
        assert estimate_rate(np.array([NAN])).seeds == 0
        assert not estimate_rate(np.array([1.0])).at_least

    def test_estimate_of_two_seeds_one_missing(self):
        single = estimate(np.array([0.5, NAN]))
        assert single.value == 0.5 and single.seeds == 1 and math.isnan(single.low)
        assert math.isnan(single.high) and estimate(np.array([0.5]), True).at_least
        none = estimate(np.array([NAN]), True)
        assert none.seeds == 0 and none.at_least and not estimate(np.array([NAN])).at_least
        assert math.isnan(none.value) and math.isnan(none.low) and math.isnan(none.high)

    def test_paired_difference(self):
        # Seeds differ by 10, the arms by 1, 2 and 3: paired, only the latter is seen.
        first, second = np.array([11.0, 22.0, 33.0]), np.array([10.0, 20.0, 30.0])
        assert paired_difference(first, second) == Estimate(2.0, 1.0, 3.0, 3)
        unpaired = unpaired_difference(first, second)
        assert unpaired.value == pytest.approx(2) and unpaired.low < -5 and unpaired.high > 9
        assert paired_difference(first, second, True).at_least

    def test_unpaired_difference(self):
        # The means are 0, 1, 1, 2 and 5, 5: each difference has at least a quarter of the draws.
        few, two = np.array([0.0, NAN, 2.0]), np.array([5.0, 5.0])
        assert unpaired_difference(few, two) == Estimate(-4.0, -5.0, -3.0, 2)
        assert unpaired_difference(two, few, True) == Estimate(4.0, 3.0, 5.0, 2, True)
        # Each arm by itself: the most extreme of 4 x 4 means differ by 4, once in 16.
        assert unpaired_difference(few, few - 2.0) == Estimate(2.0, 0.0, 4.0, 2)
        for one in (unpaired_difference(few, two[:1]), unpaired_difference(two[:1], few)):
            assert (one.seeds, one.at_least) == (1, False) and abs(one.value) == 4
            assert math.isnan(one.low) and math.isnan(one.high)
        nothing = np.array([NAN])
        for none in (unpaired_difference(nothing, two), unpaired_difference(two, nothing, True)):
            assert none.seeds == 0 and all(map(math.isnan, (none.value, none.low, none.high)))
        assert none.at_least and not unpaired_difference(nothing, nothing).at_least

    def test_ratio(self):
        assert ratio(np.array([2.0, 4.0]), np.array([1.0, 1.0])) == Estimate(3.0, 2.0, 4.0, 2)
        assert ratio(np.array([0.5, 0.5]), np.array([0.0, 0.0])).value == math.inf
        assert math.isnan(ratio(np.zeros(2), np.zeros(2)).value)
        # Only seeds that both have: 2 / 1 and 6 / 3, whose means are 4 / 2.
        half = ratio(np.array([2.0, NAN, 6.0, 9.0]), np.array([1.0, 7.0, 3.0, NAN]))
        assert half == Estimate(2.0, 2.0, 2.0, 2)
        one = ratio(np.array([3.0]), np.array([2.0]))
        assert (one.value, one.seeds) == (1.5, 1) and math.isnan(one.low) and math.isnan(one.high)
        none = ratio(np.array([NAN]), np.array([1.0]))
        assert none.seeds == 0 and all(map(math.isnan, (none.value, none.low, none.high)))

    def test_importances(self):
        trials = [
            GridTrial("with", init, lr, seed, float(lr == 1.0), 1.0)
            for init in (0.01, 0.1, 1.0)
            for lr in (0.01, 0.1, 1.0, 10.0)
            for seed in (1, 2)
        ]
        found = importances(trials)
        assert found["lr"] > 0.95 and sum(found.values()) == pytest.approx(1)
        schemes = [GridTrial("with", f"scheme{t.init}", t.lr, 1, t.init, 1.0) for t in trials[::2]]
        assert importances(schemes)["init"] > 0.95
        by_seed = [GridTrial("with", t.init, t.lr, t.seed, float(t.seed == 2), 1.0) for t in trials]
        assert importances(by_seed)["seed"] > 0.95
        assert importances(trials) == found  # the same in every call

    def test_importances_of_what_varies(self):
        # One seed explains nothing, and is left out.
        trials = [GridTrial("with", 0.1 * 2**i, 10.0**-i, 1, i / 6, 1.0) for i in range(7)]
        verbosity = optuna.logging.get_verbosity()
        found = importances(trials, random_sample=True)
        assert set(found) == {"lr", "init"} and sum(found.values()) == pytest.approx(1)
        assert optuna.logging.get_verbosity() == verbosity

    def test_importances_of_points(self):
        # Half the places are enough for a grid, fewer are not.
        trials = [GridTrial("with", i, lr, 1, i + lr, 1.0) for i in (1.0, 2.0) for lr in (1.0, 2.0)]
        half = [trials[0], trials[3]]
        assert coverage(half) == 0.5 and set(importances(half)) == {"lr", "init"}
        points = [GridTrial("with", float(i), float(i), 1, i / 9, 1.0) for i in (1, 2, 3)]
        with pytest.raises(ValueError, match="on a grid, or `random_sample=True`, got points"):
            importances(points)
        assert set(importances(points, random_sample=True)) == {"lr", "init"}

    def test_importances_of_many_trials_are_those_of_some(self, monkeypatch):
        module = "bn_lightning.sweeps.analysis.importances"
        monkeypatch.setattr(f"{module}.MOST_FOR_IMPORTANCES", 4)
        trials = [GridTrial("with", 0.1, 10.0**i, 1, i / 9, 1.0) for i in range(5)]
        seen = []
        create = optuna.trial.create_trial
        monkeypatch.setattr(
            optuna.trial, "create_trial", lambda **made: seen.append(made) or create(**made)
        )
        importances(trials[:4])
        assert [made["value"] for made in seen] == [0, 1 / 9, 2 / 9, 3 / 9]
        seen.clear()
        importances(trials)
        values = [made["value"] for made in seen]
        assert len(set(values)) == 4 and values == sorted(values)
        assert all(made["distributions"]["lr"].log for made in seen)


class TestAnyGrid:
    @settings(deadline=None)
    @given(accuracies, st.floats(0, 0.89))
    def test_a_worse_rate_raises_no_share_and_no_number(self, accuracy, worse):
        more = np.concatenate([accuracy, np.full_like(accuracy[:, :1], worse)], axis=1)
        assert (share_trained(more) <= share_trained(accuracy)).all()
        assert (inits_that_train(more) == inits_that_train(accuracy)).all()

    @settings(deadline=None)
    @given(accuracies, st.data())
    def test_one_cell_getting_worse_raises_nothing(self, accuracy, data):
        place = tuple(data.draw(st.integers(0, n - 1)) for n in accuracy.shape)
        worse = accuracy.copy()
        worse[place] *= data.draw(st.floats(0, 1))
        assert (share_trained(worse) <= share_trained(accuracy)).all()
        assert (share_at_chance(worse) >= share_at_chance(accuracy)).all()
        assert (inits_that_train(worse) <= inits_that_train(accuracy)).all()
        if accuracy.shape[1] > 1:
            rates = rates_of(accuracy)
            assert (mean_width(worse, rates) <= mean_width(accuracy, rates)).all()

    @settings(deadline=None)
    @given(accuracies, st.randoms(use_true_random=False))
    def test_the_order_of_seeds_does_not_matter(self, accuracy, order):
        seeds = list(range(accuracy.shape[2]))
        order.shuffle(seeds)
        permuted = accuracy[:, :, seeds]
        for statistic in (share_trained, share_at_chance, inits_that_train):
            one, other = estimate(statistic(accuracy)), estimate(statistic(permuted))
            assert _close(one, other)
        difference = paired_difference(share_trained(accuracy), share_at_chance(accuracy))
        assert _close(
            difference, paired_difference(share_trained(permuted), share_at_chance(permuted))
        )

    @settings(deadline=None)
    @given(npst.array_shapes(min_dims=3, max_dims=3, min_side=2, max_side=4))
    def test_an_arm_that_diverged_throughout_is_zero(self, shape):
        accuracy, loss = np.full(shape, 0.1), np.full(shape, math.log(10))
        rates = rates_of(accuracy)
        assert estimate(share_trained(accuracy)) == Estimate(0, 0, 0, shape[2])
        assert (share_at_chance(accuracy) == 1).all()
        assert not widths(accuracy, rates)[0].any() and not widths(accuracy, rates)[1].any()
        assert np.isnan(largest_rate(accuracy, rates)).all()
        assert (rate_sensitivity(loss, math.log(10)) == 0).all()
        assert not inits_that_train(accuracy).any()

    @settings(deadline=None)
    @given(accuracies)
    def test_a_share_lies_in_0_1_and_its_interval_around_it(self, accuracy):
        found = estimate(share_trained(accuracy))
        assert 0 <= found.value <= 1
        if found.seeds > 1:
            assert found.low <= found.value + 1e-12 and found.value <= found.high + 1e-12

    @settings(deadline=None)
    @given(npst.arrays(float, st.integers(2, 30), elements=st.floats(-10, 10)))
    def test_an_estimate_is_the_same_in_every_call(self, values):
        assert estimate(values) == estimate(values.copy())


def _close(one: Estimate, other: Estimate) -> bool:
    pairs = ((one.value, other.value), (one.low, other.low), (one.high, other.high))
    return all(a == pytest.approx(b, abs=1e-12, nan_ok=True) for a, b in pairs)


class TestBadInput:
    def test_no_trial(self):
        with pytest.raises(ValueError, match="at least one finished trial"):
            Grid.of([])

    def test_two_trials_of_one_place(self):
        trial = GridTrial("with", 0.1, 1.0, 1, 0.5, 1.0)
        with pytest.raises(ValueError, match="got a second"):
            Grid.of([trial, trial])

    def test_the_levels_that_are_just_allowed(self):
        assert Levels.of(2, 1.0).trained == 1 and Levels(0.7, 0.6).at_chance == 0.6

    @pytest.mark.parametrize("trained", [0.6, 1.01, NAN])
    def test_levels_out_of_order(self, trained):
        with pytest.raises(ValueError, match="`--threshold` to be above 0.6"):
            Levels.of(2, trained)

    @pytest.mark.parametrize("rates", [(1.0,), (1.0, 1.0), (10.0, 1.0)], ids=str)
    def test_rates_out_of_order(self, rates):
        with pytest.raises(ValueError, match="`rates`.*ascending"):
            widths(np.ones((1, len(rates), 1)), rates)

    def test_arms_of_unequal_seeds_are_not_paired(self):
        with pytest.raises(ValueError, match="3 of 3 and 2 of 3; use unpaired_difference"):
            paired_difference(np.ones(3), np.array([1.0, NAN, 1.0]))
        assert unpaired_difference(np.ones(3), np.array([1.0, NAN, 1.0])).seeds == 2

    def test_importances_of_two_arms(self):
        trials = [GridTrial(arm, 0.1, 1.0, 1, 0.5, 1.0) for arm in ("with", "without")]
        with pytest.raises(ValueError, match="`trials`.*got with, without"):
            importances(trials)

    def test_importances_without_variance(self):
        assert importances([GridTrial("with", 0.1, lr, 1, 0.1, 2.3) for lr in RATES]) == {}
