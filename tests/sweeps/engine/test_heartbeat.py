"""Detection of dead workers, by process and by heartbeat."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import optuna
import pytest
from optuna.trial import TrialState

from bn_lightning.sweeps.engine import heartbeat
from bn_lightning.sweeps.engine.heartbeat import (
    Heartbeat,
    ProcessIdentity,
    StaleTrialDetector,
)
from bn_lightning.sweeps.engine.storage import RetryingStorage
from bn_lightning.sweeps.engine.stored_names import BEAT, WORKER

linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs Linux's /proc to know a process"
)


def own():
    return ProcessIdentity.of(os.getpid())


def running(attributes):
    return optuna.trial.create_trial(
        state=TrialState.RUNNING,
        system_attrs={k: v for k, v in attributes.items() if v is not None},
    )


@pytest.fixture
def clock(monkeypatch):
    """A clock of the observer that the test sets."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: Clock.now)
    return Clock


class TestProcessIdentity:
    def test_text(self):
        assert ProcessIdentity.parse(str(own())) == own()

    @linux
    def test_this_process_lives(self):
        assert not own().is_known_dead()

    @linux
    def test_a_process_that_ended(self):
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        worker = ProcessIdentity.of(process.pid)
        assert not worker.is_known_dead()
        process.communicate(b"\n")
        assert worker.is_known_dead()

    @linux
    def test_another_process_with_its_number(self):
        assert replace(own(), started="1").is_known_dead()

    def test_a_process_of_another_machine_is_unknown(self):
        assert not replace(own(), place="elsewhere", started="1").is_known_dead()


class TestStaleTrialDetector:
    ELSEWHERE = str(ProcessIdentity("elsewhere", 7, "1"))

    @linux
    def test_a_dead_process_here_is_seen_at_once(self):
        trial = running({WORKER: str(replace(own(), started="1"))})
        assert StaleTrialDetector(1, 10).stale_trials([trial]) == [trial]

    @linux
    def test_a_living_process_here_is_never_given_up(self, clock):
        """Even without beats: the process may be suspended or busy."""
        watch, trial = StaleTrialDetector(1, 10), running({WORKER: str(own())})
        for clock.now in range(100):
            assert watch.stale_trials([trial]) == []

    @pytest.mark.parametrize("signed", [ELSEWHERE, None], ids=["elsewhere", "unsigned"])
    def test_a_silent_one_is_given_up_after_a_while(self, clock, signed):
        watch, trial = StaleTrialDetector(1, 10), running({WORKER: signed, BEAT: 3})
        for clock.now in range(10):
            assert watch.stale_trials([trial]) == []
        clock.now = 10
        assert watch.stale_trials([trial]) == [trial]

    def test_one_that_beats_is_not(self, clock):
        watch = StaleTrialDetector(1, 10)
        for clock.now in range(100):
            trial = running({WORKER: self.ELSEWHERE, BEAT: clock.now // 8})
            assert watch.stale_trials([trial]) == []

    def test_time_without_a_look_does_not_count(self, clock):
        """The storage was away, or the observer ran a trial: beats could not be seen."""
        watch, trial = StaleTrialDetector(1, 10), running({WORKER: self.ELSEWHERE, BEAT: 1})
        for clock.now in (0, 1000, 2000):
            assert watch.stale_trials([trial]) == []


class TestHeartbeat:
    def test_it_beats_and_survives_a_storage_that_is_away(self):
        class Storage:
            beats: list[tuple[int, int]] = []
            is_away = True

            def set_trial_system_attr(self, trial_id, key, value):
                assert key == BEAT
                if self.is_away:
                    raise OSError("away")
                self.beats.append((trial_id, value))

        storage = Storage()
        beat = Heartbeat(RetryingStorage(storage, "sqlite://", 60), 0.01)
        beat.add(4)
        time.sleep(0.05)
        storage.is_away = False
        _wait(lambda: len(storage.beats) > 2)
        beat.remove(4)
        beat.add(5)
        _wait(lambda: storage.beats[-1][0] == 5)
        beat.stop()
        assert {trial_id for trial_id, _ in storage.beats} == {4, 5}
        counts = [count for _, count in storage.beats]
        assert counts == sorted(set(counts))


def _wait(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
