"""A journal with a damaged last record is reported and not appended to."""

import errno
import os

import optuna
import pytest

from bn_lightning.sweeps.engine import journal_file
from bn_lightning.sweeps.engine.journal_file import open_journal
from bn_lightning.sweeps.engine.storage import open_storage
from bn_lightning.sweeps.engine.sweep_error import SweepError


@pytest.fixture
def journal(tmp_path):
    """A journal with three finished trials."""
    path = tmp_path / "journal.log"
    study = optuna.create_study(storage=open_journal(path), study_name="s")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    return path


def test_optuna_reads_it(journal):
    backend = optuna.storages.journal.JournalFileBackend(str(journal))
    study = optuna.load_study(study_name="s", storage=optuna.storages.JournalStorage(backend))
    assert len(study.trials) == 3


@pytest.mark.parametrize(
    ("damage", "finished"),
    [
        (lambda whole: whole[:-7], 2),
        (lambda whole: whole + b'{"op_code":4', 3),
        (lambda whole: whole + b"\0\n", 3),
    ],
    ids=["cut_off", "half_a_record", "zeros"],
)
def test_a_torn_journal_is_reported_and_left_alone(journal, damage, finished):
    torn = damage(journal.read_bytes())
    journal.write_bytes(torn)
    with pytest.raises(SweepError) as error:
        open_journal(journal)
    assert journal.read_bytes() == torn
    records = [line for line in torn.splitlines(keepends=True) if line.endswith(b"}\n")]
    whole = b"".join(records)
    message = str(error.value)
    assert f"after {len(records)} whole ones ({len(whole):,} of {len(torn):,} bytes)" in message
    assert f"{finished} finished trials" in message
    assert f"truncate -s {len(whole)} " in message
    # The command of the message.
    os.truncate(journal, len(whole))
    study = optuna.load_study(study_name="s", storage=open_journal(journal))
    assert len([t for t in study.trials if t.state.is_finished()]) == finished


def test_nothing_is_appended_to_a_torn_record(journal):
    storage = open_journal(journal)
    with open(journal, "ab") as file:
        file.write(b'{"op_code":')
    torn = journal.read_bytes()
    with pytest.raises(SweepError, match="cut off or damaged"):
        storage.create_new_study([optuna.study.StudyDirection.MINIMIZE], "t")
    assert journal.read_bytes() == torn


def test_a_full_disk_leaves_whole_records(journal, monkeypatch):
    """A partly written record is removed, and later writes succeed."""
    storage = open_journal(journal)
    whole = journal.read_bytes()
    write = os.write

    def full(descriptor, content):
        if len(content) < 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content[:10]) and len(content) - 9

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        storage.set_study_user_attr(0, "key", "value")
    assert journal.read_bytes() == whole
    monkeypatch.undo()
    storage.set_study_user_attr(0, "key", "value")
    assert open_journal(journal).get_study_user_attrs(0) == {"key": "value"}


def test_a_signal_leaves_a_record_that_others_may_have_read(journal, monkeypatch):
    storage, reader = open_journal(journal), open_journal(journal)

    def ended(descriptor):
        assert reader.get_study_user_attrs(0) == {"a": 1}
        raise SystemExit(143)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr("os.fsync", ended)
        storage.set_study_user_attr(0, "a", 1)
    storage.set_study_user_attr(0, "b", 2)
    assert reader.get_study_user_attrs(0) == {"a": 1, "b": 2}


@pytest.mark.parametrize("end", [SystemExit(143), OSError(errno.EIO, "no disk")])
def test_half_a_record_is_taken_back(journal, monkeypatch, end):
    storage, before, write = open_journal(journal), journal.read_bytes(), os.write

    def torn(descriptor, content):
        write(descriptor, content[:10])
        raise end

    with monkeypatch.context() as patched, pytest.raises(type(end)):
        patched.setattr("os.write", torn)
        storage.set_study_user_attr(0, "a", 1)
    assert journal.read_bytes() == before


def test_something_else_is_no_journal(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("just text\n")
    with pytest.raises(SweepError, match="0 whole ones"):
        open_journal(path)
    assert path.read_text() == "just text\n"


class TestTogether:
    """Records that a block appends are in the file at its end, and are read in it."""

    @pytest.fixture
    def writes(self, monkeypatch):
        counted = []
        monkeypatch.setattr("os.fsync", counted.append)
        return counted

    def test_a_block_is_one_write(self, tmp_path, writes):
        storage = open_storage(f"journal://{tmp_path}/journal.log", 5)
        study = optuna.create_study(storage=storage, study_name="s")
        writes.clear()

        def run_five():
            study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=5)
            return storage.together(lambda: [trial.value for trial in study.trials])

        values = storage.together(run_five)
        assert len(writes) == 1 and len(values) == 5
        again = optuna.load_study(study_name="s", storage=open_journal(tmp_path / "journal.log"))
        assert [trial.value for trial in again.trials] == values
        study.optimize(lambda trial: 1.0, n_trials=1)
        assert len(optuna.load_study(study_name="s", storage=storage).trials) == 6

    def test_two_processes_see_each_others_blocks(self, tmp_path):
        path = tmp_path / "journal.log"
        first, second = (open_storage(f"journal://{path}", 5) for _ in range(2))
        optuna.create_study(storage=first, study_name="s")
        for storage in (first, second, second, first):
            study = optuna.load_study(study_name="s", storage=storage)
            before = len(study.trials)
            storage.together(lambda study=study: [study.ask() for _ in range(3)])
            assert [trial.number for trial in study.trials] == list(range(before + 3))

    def test_an_error_in_the_block_loses_no_answered_call(self, tmp_path):
        storage = open_storage(f"journal://{tmp_path}/journal.log", 5)
        study = optuna.create_study(storage=storage, study_name="s")

        def stopped():
            study.ask()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            storage.together(stopped)
        again = optuna.load_study(study_name="s", storage=open_journal(tmp_path / "journal.log"))
        assert len(again.trials) == len(study.trials) == 1

    def test_a_full_disk_repeats_the_block(self, tmp_path, monkeypatch):
        """The storage has read what is not on the disk, so it is opened again."""
        storage = open_storage(f"journal://{tmp_path}/journal.log", 60)
        study = optuna.create_study(storage=storage, study_name="s")
        counts = []

        def ask():
            counts.append(len(study.trials))
            study.ask()

        write, full = os.write, iter([True, True])

        def failing(descriptor, data):
            if next(full, False):
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, data)

        monkeypatch.setattr(journal_file.os, "write", failing)
        storage.together(ask)
        assert counts == [0, 0, 0]
        assert len(study.trials) == 1
