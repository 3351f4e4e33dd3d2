"""The numbers of a report are those of tolerance.py, and its sentences contain them."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bn_lightning.runs.atomic_write import json_values
from bn_lightning.sweeps.analysis import tolerance
from bn_lightning.sweeps.analysis.importances import importances
from bn_lightning.sweeps.analysis.intervals import Estimate, estimate, unpaired_difference
from bn_lightning.sweeps.analysis.summary import (
    SHARE,
    WIDTH,
    Summary,
    decades,
    percent,
    points,
    sentences,
    summarize,
)
from bn_lightning.sweeps.analysis.tolerance import Grid, GridTrial, Levels

INITS, RATES, SEEDS = (0.01, 0.1), (0.01, 0.1, 1.0, 10.0), (1, 2, 3)


def grid_trials(seeds=SEEDS, arms=("batch", "none")) -> list[GridTrial]:
    trials = []
    for init in INITS:
        for lr in RATES:
            for seed in seeds:
                for arm in arms:
                    trains = lr < 10 if arm == "batch" else (init, lr) == (0.1, 1.0) and seed < 3
                    accuracy = 0.95 if trains else 0.1
                    loss = 0.2 if trains else 2.3
                    diverged = arm == "none" and lr == 10
                    trials.append(GridTrial(arm, init, lr, seed, accuracy, loss, diverged))
    return trials


@pytest.fixture(scope="module")
def found() -> Summary:
    return summarize(grid_trials(), math.log(10))


def test_numbers_are_those_of_tolerance(found: Summary) -> None:
    grid = Grid.of(grid_trials())
    assert list(found.arms) == ["batch", "none"]
    for name, arm in found.arms.items():
        accuracy = grid.arms[name].accuracy
        assert arm.measures[SHARE] == estimate(tolerance.share_trained(accuracy))
        assert arm.measures[WIDTH].value == tolerance.mean_width(accuracy, RATES).mean()
        assert arm.trials == 24
    assert found.arms["batch"].measures[SHARE].value == 0.75
    assert found.arms["none"].measures[SHARE].value == pytest.approx(2 / 3 / 8)
    assert found.arms["batch"].measures[WIDTH].at_least
    assert not found.arms["none"].measures[WIDTH].at_least
    assert found.arms["none"].outcomes == {
        "trained": 2,
        "slow": 0,
        "chance": 16,
        "diverged": 6,
        "missing": 0,
    }


def test_the_difference_is_paired(found: Summary) -> None:
    (pair,) = found.comparisons
    assert (pair.first, pair.second, pair.is_paired, pair.cells) == ("batch", "none", True, 8)
    # .625 for seeds 1 and 2, .75 for seed 3: of 27 resamples one has each end.
    share = pair.differences[SHARE]
    assert (share.value, share.low, share.high) == pytest.approx((2 / 3, 0.625, 0.75))
    assert pair.ratio.value == pytest.approx(9)
    assert pair.differences[WIDTH].at_least
    assert pair.headroom is None  # without BatchNorm no rate trains every seed


def test_sentences_say_the_numbers(found: Summary) -> None:
    text = " ".join(sentences(found))
    assert (
        "75% [75, 75] of the cells train with BatchNorm, 8% [0, 12] without BatchNorm: a "
        "difference of 67 points [62, 75], a ratio of 9 [6, inf]." in text
    )
    assert "25% [25, 25] of the cells fail with BatchNorm, 92% [88, 100] without" in text
    assert "that train cover ≥ 3.00 decades [3.00, 3.00] with BatchNorm, " in text
    assert "2 [2, 2] of 2 initializations train at some learning rate with BatchNorm" in text


@pytest.mark.parametrize(
    ("label", "words"),
    [("as configured", "train as configured."), ("torch.nn.GroupNorm", "train in arm torch.nn.G")],
    ids=["the only one", "another"],
)
def test_sentences_say_which_arm_they_are_about(label: str, words: str) -> None:
    assert words in sentences(summarize(grid_trials(arms=(label,)), 2.3))[0]


def test_headroom_is_where_the_other_arm_does_best() -> None:
    trials = [t for t in grid_trials() if t.seed < 3]
    (pair,) = summarize(trials, 2.3).comparisons
    assert pair.headroom == (0.1, 1.0)


def test_json_has_all_of_it(found: Summary) -> None:
    content = json.loads(json.dumps(json_values(found.as_json())))
    share = content["arms"]["batch"]["measures"][SHARE]
    assert share == {"value": 0.75, "low": 0.75, "high": 0.75, "seeds": 3, "at_least": False}
    assert content["comparisons"][0]["differences"][WIDTH]["at_least"] is True
    assert content["comparisons"][0]["ratio"]["high"] is None  # no second share is 0


def test_arms_of_unequal_seeds_are_not_paired() -> None:
    trials = grid_trials((1, 2), ("batch",)) + grid_trials((1, 2, 3), ("none",))
    found = summarize(trials, 2.3)
    (pair,) = found.comparisons
    assert not pair.is_paired
    one, other = (found.grid.arms[name].accuracy for name in ("batch", "none"))
    assert pair.differences[SHARE] == unpaired_difference(
        tolerance.share_trained(one), tolerance.share_trained(other)
    )
    assert pair.differences[WIDTH].value == pytest.approx(3 - 1 / 3)
    assert any("do not have the same seeds" in note for note in found.notes)
    assert found.arms["batch"].measures[WIDTH].seeds == 2


def test_a_pair_is_compared_where_both_have_trials() -> None:
    trials = [t for t in grid_trials() if not (t.arm == "none" and t.lr == 0.01)]
    found = summarize(trials, 2.3)
    (pair,) = found.comparisons
    assert pair.is_paired and pair.cells == 6
    # Of the six cells left 4 train with: .01 is left out of both.
    assert pair.differences[SHARE].value == pytest.approx(4 / 6 - 2 / 3 / 6)
    assert any(note.startswith("Without BatchNorm 6 of 24 trials") for note in found.notes)


def test_one_seed_has_no_interval() -> None:
    found = summarize(grid_trials((1,)), 2.3)
    assert percent(found.arms["batch"].measures[SHARE]) == "75%"
    assert any("One seed" in note for note in found.notes)


def test_one_arm_and_one_rate() -> None:
    trials = [t for t in grid_trials(arms=("batch",)) if t.lr == 1.0]
    found = summarize(trials, 2.3)
    assert found.comparisons == () and WIDTH not in found.arms["batch"].measures
    assert sentences(found) == ["100% [100, 100] of the cells train with BatchNorm."]


def test_one_initialisation_is_not_averaged_over() -> None:
    trials = [t for t in grid_trials() if t.init == 0.1 and t.seed < 3]
    text = " ".join(sentences(summarize(trials, 2.3)))
    assert "train cover ≥ 3.00 decades [3.00, 3.00] with BatchNorm, " in text
    assert "The largest learning rate that trains is the same with BatchNorm." in text
    assert "initialization" not in text
    one_arm = [t for t in trials if t.arm == "batch"]
    assert sentences(summarize(one_arm, 2.3))[1] == (
        "The learning rates that train cover ≥ 3.00 decades [3.00, 3.00]."
    )


def test_another_level_is_in_every_number_and_said() -> None:
    trials = [
        GridTrial(t.arm, t.init, t.lr, t.seed, 0.8 if t.accuracy > 0.9 else 0.5, t.loss, t.diverged)
        for t in grid_trials()
    ]
    levels = Levels.of(2, 0.75)
    found, usual = summarize(trials, 0.7, levels=levels), summarize(grid_trials(), 0.7)
    for name in ("batch", "none"):
        assert found.arms[name].measures == usual.arms[name].measures
        assert found.arms[name].outcomes == usual.arms[name].outcomes
        for one, other in zip(found.arms[name].inits, usual.arms[name].inits, strict=True):
            assert repr(one) == repr(other)  # NaN is not equal to itself
    assert found.comparisons[0].differences == usual.comparisons[0].differences
    assert "A cell trains here from accuracy 0.75 on." in found.notes
    assert not any("accuracy" in note for note in usual.notes)


def test_when_no_cell_trains_it_says_how_far_they_came() -> None:
    trials = [GridTrial(t.arm, t.init, t.lr, t.seed, 0.6, t.loss) for t in grid_trials()]
    (note,) = (note for note in summarize(trials, 2.3).notes if "No cell trains" in note)
    assert "the best accuracy is 0.600, and 0.90 is asked for. `--threshold`" in note


def test_an_arm_that_diverged_everywhere() -> None:
    trials = [
        GridTrial(t.arm, t.init, t.lr, t.seed, 0.1, 2.3, True) if t.arm == "none" else t
        for t in grid_trials()
    ]
    found = summarize(trials, 2.3)
    none = found.arms["none"].measures
    assert none[SHARE].value == 0 and none[WIDTH].value == 0 and none["share_diverged"].value == 1
    text = " ".join(sentences(found))
    assert "a ratio of" not in text and "nan" not in text


def test_importances_are_refused_for_adaptive_samplers() -> None:
    found = summarize(grid_trials(), 2.3, is_planned=False)
    assert not found.arms["batch"].importances
    assert any("No importances of with BatchNorm: an adaptive sampler" in n for n in found.notes)
    shares = summarize(grid_trials(), 2.3, is_planned=True).arms["batch"].importances
    assert shares["lr"] > 0.9 and sum(shares.values()) == pytest.approx(1)


@settings(max_examples=20, deadline=None)
@given(st.permutations(SEEDS), st.data())
def test_names_of_seeds_and_worse_cells(seeds, data) -> None:
    names = dict(zip(SEEDS, seeds, strict=True))
    trials = grid_trials()
    renamed = [GridTrial(t.arm, t.init, t.lr, names[t.seed], t.accuracy, t.loss) for t in trials]
    of = {"is_planned": False}
    one, two = (summarize(ts, 2.3, **of).arms["batch"].measures[SHARE] for ts in (trials, renamed))
    assert one.value == pytest.approx(two.value)
    place = data.draw(st.integers(0, len(trials) - 1))
    t = trials[place]
    worse = [
        *trials[:place],
        GridTrial(t.arm, t.init, t.lr, t.seed, 0.1, 2.3),
        *trials[place + 1 :],
    ]
    after = summarize(worse, 2.3, **of).arms[t.arm].measures
    before = summarize(trials, 2.3, **of).arms[t.arm].measures
    assert after[SHARE].value <= before[SHARE].value + 1e-12
    assert after[WIDTH].value <= before[WIDTH].value + 1e-12


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (percent(Estimate(0.456, 0.44, 0.48, 3)), "46% [44, 48]"),
        (percent(Estimate(0.456, math.nan, math.nan, 1)), "46%"),
        (points(Estimate(-0.1, -0.2, 0.0, 3)), "-10 points [-20, 0]"),
        (decades(Estimate(2.5, 2.4, 2.6, 3, True)), "≥ 2.50 decades [2.40, 2.60]"),
        (percent(Estimate(math.nan, math.nan, math.nan, 0)), "not known"),
    ],
    ids=["share", "one seed", "difference", "width", "nothing"],
)
def test_numbers_as_text(text: str, expected: str) -> None:
    assert text == expected


def test_coverage() -> None:
    trials = grid_trials()
    assert tolerance.coverage(trials) == 1
    drawn = [GridTrial("batch", 10.0**x, 10.0**-x, 1, 0.5, 1.0) for x in np.linspace(0.1, 1, 10)]
    assert tolerance.coverage(drawn) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="share no rates"):
        importances(drawn)
