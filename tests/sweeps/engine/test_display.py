"""Progress, summary and results of a sweep."""

import io

import pytest
from omegaconf import OmegaConf
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial
from rich.console import Console

from bn_lightning.sweeps.engine import display as display_module
from bn_lightning.sweeps.engine.display import (
    Display,
    print_sweep_summary,
    trial_line,
    write_results,
)
from bn_lightning.sweeps.engine.slots import SlotCounts, Slots
from bn_lightning.sweeps.engine.stored_names import SLOT

MIN, MAX = StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE
COUNTS = SlotCounts(total=6, complete=3, pruned=1, diverged=2, lost=1, running=1, failures=0)


def trial(number, values=None, state=TrialState.COMPLETE, params=None, **attributes):
    made = create_trial(
        state=state, values=values, user_attrs=attributes, system_attrs={SLOT: number}
    )
    made.number = number
    made._params = params or {}
    return made


LINES = {
    "complete": (trial(3, [0.5], params={"lr": 0.123456789, "norm": "none"}, seconds=2.04),
                 "trial 3: 0.5  lr=0.123457 norm=none  2.0 s  [5/6]"),
    "diverged": (trial(4, [0.1], diverged=True), "trial 4: 0.1 diverged  [5/6]"),
    "several": (trial(5, [1, 2]), "trial 5: 1, 2  [5/6]"),
    "pruned": (trial(6, None, TrialState.PRUNED, {"a": None}), "trial 6: pruned  a=null  [5/6]"),
    "failed": (trial(7, None, TrialState.FAIL, error="a\nRuntimeError: b"),
               "trial 7: failed (RuntimeError: b)  [5/6]"),
    "interrupted": (trial(8, None, TrialState.FAIL, interrupted=True),
                    "trial 8: interrupted  [5/6]"),
}  # fmt: skip


@pytest.mark.parametrize(("ended", "line"), LINES.values(), ids=LINES.keys())
def test_a_trial_is_a_line(ended, line):
    assert trial_line(ended, COUNTS) == line


class TestDisplay:
    def shown(self, is_terminal):
        output = io.StringIO()
        console = Console(file=output, force_terminal=is_terminal, width=100, soft_wrap=True)
        slots = Slots(3, 0)
        trials = [trial(0, [2], params={"x": 1})]
        slots.update(trials)
        with Display("demo", slots, [MIN], console) as display:
            trials += [
                trial(1, [1], params={"x": 2}, diverged=True),
                trial(2, None, TrialState.FAIL, error="no"),
            ]
            slots.update(trials)
            display.update()
        return output.getvalue()

    def test_in_a_log_each_new_trial_is_a_line(self):
        assert self.shown(is_terminal=False).splitlines() == [
            "trial 1: 1 diverged  x=2  [2/3]",
            "trial 2: failed (no)  [3/3]",
        ]

    def test_in_a_log_the_last_new_trial_tells_the_time_left(self, monkeypatch):
        clock = iter([100.0, 130.0])
        monkeypatch.setattr(display_module.time, "monotonic", lambda: next(clock))
        output, slots = io.StringIO(), Slots(6, 0)
        with Display("demo", slots, [MIN], Console(file=output, width=100)) as display:
            slots.update([trial(0, [2]), trial(1, [1])])
            display.update()
        assert output.getvalue().splitlines() == [
            "trial 0: 2  [1/6]",
            "trial 1: 1  about 0:01:00 left  [2/6]",
        ]

    def test_in_a_terminal_there_is_one_table(self):
        table = self.shown(is_terminal=True)
        for words in ("demo", "3 of 3", "0 / 1 / 1", "1 in trial 1", "x=2", "time left"):
            assert words in table
        assert "trial 2: failed" not in table


class TestSummary:
    @pytest.mark.parametrize(
        ("n_again", "expected"), [(0, "1 failed\n"), (2, "1 failed, 2 to be tried again\n")]
    )
    def test_it_prints_the_command_of_the_best_trial(self, n_again, expected, tmp_path):
        output = io.StringIO()
        best = trial(3, [0.5], params={"lr": 0.1}, directory="/sweep/3")
        print_sweep_summary(
            [best],
            COUNTS,
            n_again,
            {3: "python train.py lr=0.1"},
            tmp_path,
            Console(file=output, soft_wrap=True),
        )
        text = output.getvalue()
        assert "5 of 6 trials: 3 complete (2 of them diverged), 1 pruned, " + expected in text
        assert "best: 0.5 in trial 3  lr=0.1\n  /sweep/3\n  python train.py lr=0.1\n" in text
        assert text.replace("\n", "").endswith(str(tmp_path))

    def test_results_have_the_keys_of_hydra_optuna_sweeper(self, tmp_path):
        write_results(tmp_path, [trial(3, [0.5], params={"lr": 0.1})], 1)
        path = tmp_path / "optimization_results.yaml"
        one = {"name": "optuna", "best_params": {"lr": 0.1}, "best_value": 0.5}
        assert OmegaConf.load(path) == one
        write_results(tmp_path, [trial(3, [1, 2]), trial(4, [2, 3], params={"a": "b"})], 2)
        assert OmegaConf.load(path) == {
            "name": "optuna",
            "solutions": [
                {"params": {}, "values": [1.0, 2.0]},
                {"params": {"a": "b"}, "values": [2.0, 3.0]},
            ],
        }
