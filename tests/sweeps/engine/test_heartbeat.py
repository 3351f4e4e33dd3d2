"""Who is alive, by process and by beat."""

import subprocess
import sys
import time
from dataclasses import replace

import optuna
import pytest
from optuna.trial import TrialState

from bn_lightning.sweeps.engine import heartbeat
from bn_lightning.sweeps.engine.heartbeat import (
    BEAT,
    SIGNATURE,
    DeathWatch,
    Heartbeat,
    Signature,
    is_known_dead,
    signature,
)

linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs Linux's /proc to know a process"
)


def running(attributes):
    return optuna.trial.create_trial(
        state=TrialState.RUNNING,
        system_attrs={k: v for k, v in attributes.items() if v is not None},
    )


@pytest.fixture
def clock(monkeypatch):
    """The observer's clock, moved by hand."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: Clock.now)
    return Clock


class TestSignature:
    def test_text(self):
        assert Signature.parse(str(signature())) == signature()

    @linux
    def test_this_process_lives(self):
        assert not is_known_dead(signature())

    @linux
    def test_a_process_that_ended(self):
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        signed = signature(process.pid)
        assert not is_known_dead(signed)
        process.communicate(b"\n")
        assert is_known_dead(signed)

    @linux
    def test_another_process_with_its_number(self):
        assert is_known_dead(replace(signature(), started="1"))

    def test_of_another_machine_nothing_is_known(self):
        assert not is_known_dead(replace(signature(), place="elsewhere", started="1"))


class TestDeathWatch:
    ELSEWHERE = str(Signature("elsewhere", 7, "1"))

    @linux
    def test_a_dead_process_here_is_seen_at_once(self):
        trial = running({SIGNATURE: str(replace(signature(), started="1"))})
        assert DeathWatch(1, 10).abandoned([trial]) == [trial]

    @linux
    def test_a_living_process_here_is_never_given_up(self, clock):
        """Not even if it does not beat: it may be stopped, or busy."""
        watch, trial = DeathWatch(1, 10), running({SIGNATURE: str(signature())})
        for clock.now in range(100):
            assert watch.abandoned([trial]) == []

    @pytest.mark.parametrize("signed", [ELSEWHERE, None], ids=["elsewhere", "unsigned"])
    def test_a_silent_one_is_given_up_after_a_while(self, clock, signed):
        watch, trial = DeathWatch(1, 10), running({SIGNATURE: signed, BEAT: 3})
        for clock.now in range(10):
            assert watch.abandoned([trial]) == []
        clock.now = 10
        assert watch.abandoned([trial]) == [trial]

    def test_one_that_beats_is_not(self, clock):
        watch = DeathWatch(1, 10)
        for clock.now in range(100):
            trial = running({SIGNATURE: self.ELSEWHERE, BEAT: clock.now // 8})
            assert watch.abandoned([trial]) == []

    def test_time_without_a_look_does_not_count(self, clock):
        """The storage was away, or the observer had a trial of its own: who knows who beat."""
        watch, trial = DeathWatch(1, 10), running({SIGNATURE: self.ELSEWHERE, BEAT: 1})
        for clock.now in (0, 1000, 2000):
            assert watch.abandoned([trial]) == []


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
        beat = Heartbeat(storage, 0.01)
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
