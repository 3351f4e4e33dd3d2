"""Addresses of storages, and repeated calls."""

import errno
import time

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import DataError, OperationalError, PendingRollbackError

from bn_lightning.sweeps.engine import storage as module
from bn_lightning.sweeps.engine.storage import (
    RetryingStorage,
    call_with_retries,
    is_unreachable,
    open_storage,
    storage_url,
)
from bn_lightning.sweeps.engine.sweep_error import SweepError

URLS = {
    "journal": ("journal", "journal:///sweep/journal.log"),
    "journal_elsewhere": ("journal:///else/where.log", "journal:///else/where.log"),
    "sqlite": ("sqlite:////else/where.db", "sqlite:////else/where.db"),
    "postgresql": ("postgresql://u@h:5432/d", "postgresql://u@h:5432/d"),
    "password": ("postgresql://u:p%40ss@h/d", "postgresql://u:p%40ss@h/d"),
    "grpc": ("grpc://host:13000", "grpc://host:13000"),
}


class TestAddresses:
    @pytest.mark.parametrize(("setting", "url"), URLS.values(), ids=URLS.keys())
    def test_addresses(self, tmp_path, setting, url):
        from pathlib import Path

        assert storage_url(setting, Path("/sweep")) == url

    def test_a_relative_file_is_found_from_everywhere(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert storage_url("sqlite:///study.db", tmp_path) == f"sqlite:///{tmp_path}/study.db"
        assert storage_url("journal://log", tmp_path) == f"journal://{tmp_path}/log"

    @pytest.mark.parametrize(
        "setting", ["", "jurnal", "journal://", "grpc://host", "grpc://host:port", "a file.log"]
    )
    def test_no_address(self, tmp_path, setting):
        with pytest.raises(SweepError, match="`storage` to be journal"):
            storage_url(setting, tmp_path)

    def test_a_password_in_no_address_is_not_shown(self, tmp_path):
        with pytest.raises(SweepError, match="`storage` to be journal") as error:
            storage_url("postgresql:u:secret@h/d", tmp_path)
        assert "secret" not in str(error.value)

    def test_a_part_of_a_password_is_not_taken_for_the_host(self, tmp_path):
        with pytest.raises(SweepError, match="%40 for @") as error:
            storage_url("postgresql://u:se@cret@h/d", tmp_path)
        assert "cret" not in str(error.value)
        assert storage_url("journal:///a@b@c/d", tmp_path) == "journal:///a@b@c/d"

    @pytest.mark.parametrize(
        ("url", "words"),
        [
            ("nosuch://host/db", "`storage` .* nosuch"),
            ("oracle+oracledb://host/db", "pip install"),
        ],
    )
    def test_databases_without_a_driver(self, url, words):
        with pytest.raises(SweepError, match=words):
            open_storage(url, 1)

    def test_a_folder_is_made(self, tmp_path):
        for url in (f"journal://{tmp_path}/a/b.log", f"sqlite:///{tmp_path}/c/d.db"):
            study = optuna.create_study(storage=open_storage(url, 1), study_name="s")
            study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
            again = optuna.load_study(study_name="s", storage=open_storage(url, 1))
            assert [trial.params for trial in again.trials] == [t.params for t in study.trials]

    @pytest.mark.parametrize("url", ["postgresql://u:secret@127.0.0.1:1/d", "grpc://127.0.0.1:1"])
    def test_one_that_does_not_answer(self, url, caplog):
        if url.startswith("grpc"):
            pytest.importorskip("grpc", reason="needs grpcio")
        else:
            pytest.importorskip("psycopg", reason="needs psycopg")
        with pytest.raises(
            SweepError, match=r"`storage` .* no answer for .* s: .*refused"
        ) as error:
            open_storage(url, 0.3)
        assert "secret" not in str(error.value) + caplog.text
        assert "waiting for the storage" in caplog.text


def internal(cause):
    error = StorageInternalError("broken")
    error.__cause__ = cause
    return error


class TestPatience:
    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (internal(OperationalError("SELECT", {}, Exception("away"))), True),
            (internal(PendingRollbackError("rolled back")), True),
            (OSError(errno.ENOSPC, "full"), True),
            (internal(DataError("INSERT", {}, Exception("too long"))), False),
            (internal(None), False),
            (FileNotFoundError(), False),
            (PermissionError(), False),
            (KeyError("study"), False),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_what_is_waited_for(self, error, expected):
        assert is_unreachable(error) is expected

    def test_it_answers_at_last(self, caplog):
        answers = iter([OSError("away")] * 3 + ["here"])

        def call():
            answer = next(answers)
            if isinstance(answer, OSError):
                raise answer
            return answer

        assert call_with_retries(call, 30, "journal:///x") == "here"
        assert caplog.text.count("waiting for the storage (away)") == 1

    def test_the_pauses_grow(self, monkeypatch):
        pauses, clock = [], [0.0]

        def sleep(seconds):
            pauses.append(seconds)
            clock[0] += seconds

        monkeypatch.setattr(module.time, "sleep", sleep)
        monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
        monkeypatch.setattr(module.random, "uniform", lambda low, high: 1.0)

        def call():
            raise OSError("away")

        with pytest.raises(SweepError, match=r"no answer for 60 s: away"):
            call_with_retries(call, 60, "journal:///x")
        assert pauses[:8] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10])
        assert sum(pauses) == pytest.approx(60, abs=0.2)

    def test_a_call_slower_than_the_patience_is_repeated(self, monkeypatch):
        clock, answers = [0.0], iter([OSError("away"), "here"])
        monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])

        def call():
            clock[0] += 1
            answer = next(answers)
            if isinstance(answer, OSError):
                raise answer
            return answer

        assert call_with_retries(call, 0.3, "journal:///x") == "here"

    def test_other_errors_come_out_at_once(self):
        with pytest.raises(ValueError, match="wrong"):
            call_with_retries(lambda: int("wrong"), 60, "journal:///x")

    def test_a_storage_is_patient_in_every_call(self, monkeypatch):
        monkeypatch.setattr(module, "FIRST_PAUSE", 0.001)
        inner = optuna.storages.InMemoryStorage()
        storage = RetryingStorage(inner, "memory://", 10)
        failures = {"left": 25}

        class Flaky:
            def __getattr__(self, name):
                def call(*args, **kwargs):
                    if failures["left"] and failures["left"] % 5:
                        failures["left"] -= 1
                        raise OSError("away")
                    failures["left"] = max(0, failures["left"] - 1)
                    return getattr(inner, name)(*args, **kwargs)

                return call

        storage.inner = Flaky()
        study = optuna.create_study(storage=storage)
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
        assert failures["left"] == 0
        assert len(study.trials) == 3


class TestSQLite:
    def test_one_of_two_claims_a_trial(self, tmp_path):
        """Even if both have read the waiting trial before one of them claims it."""
        import threading

        url = f"sqlite:///{tmp_path}/study.db"
        storages = [open_storage(url, 30) for _ in range(2)]
        study = optuna.create_study(storage=storages[0], study_name="s")
        study_id = storages[0].get_study_id_from_name("s")
        for _ in range(30):
            study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.WAITING))
        claims: list[list[int]] = [[], []]

        def claim(i):
            for trial in storages[i].get_all_trials(study_id):
                trial_id = trial._trial_id
                if storages[i].set_trial_state_values(trial_id, optuna.trial.TrialState.RUNNING):
                    claims[i].append(trial_id)
                time.sleep(0)

        threads = [threading.Thread(target=claim, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(claims[0]) + len(claims[1]) == 30
        assert set(claims[0]).isdisjoint(claims[1])
