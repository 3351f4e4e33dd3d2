"""Studies are read whole, never written to, and come back from trials.csv as they were."""

import contextlib
import json
import math
import sqlite3
from pathlib import Path

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState, create_trial

from bn_lightning.sweeps.analysis.sources import read_sweep
from bn_lightning.sweeps.analysis.trials import (
    TrialRow,
    TrialTable,
    read_study,
    row_of,
    rows_from_csv,
    to_csv,
)


class TestRead:
    def test_a_journal(self, tmp_path: Path, make_study) -> None:
        journal = make_study(tmp_path) / "journal.log"
        before = journal.read_bytes(), sorted(tmp_path.iterdir())
        table = read_study(journal)
        assert (table.name, table.directions, len(table.rows)) == ("sweep", ("maximize",), 48)
        row = table.rows[0]
        assert row.params == {"optimizer.lr": 0.01, "init.std": 0.01, "norm": "none", "seed": 1}
        assert row.values == (0.1,) and row.attributes["test/accuracy"] == 0.1
        assert read_study(f"journal://{journal.absolute()}") == table
        assert (journal.read_bytes(), sorted(tmp_path.iterdir())) == before

    def test_sqlite_holds_the_same(self, tmp_path: Path, make_study) -> None:
        table = read_study(make_study(tmp_path) / "journal.log")
        url = f"sqlite:///{tmp_path}/study.db"
        study = optuna.create_study(storage=url, study_name="sweep", direction="maximize")
        source = optuna.storages.journal.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(tmp_path / "journal.log"))
        )
        study.add_trials(optuna.load_study(study_name="sweep", storage=source).trials[:5])
        assert read_study(url).rows == table.rows[:5]

    @pytest.mark.parametrize("folder", ["we?ird", "pl%41in", "a#b", "c d"])
    def test_a_database_is_found_by_its_path(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        optuna.create_study(storage="sqlite:///study.db", study_name="sweep")
        place = tmp_path / folder / "study.db"
        place.parent.mkdir()
        Path("study.db").rename(place)
        for path in (place, place.relative_to(tmp_path)):
            assert read_study(path).name == "sweep"
        assert read_sweep(folder, None)[1].name == "sweep"
        assert list(tmp_path.rglob("*")) == [place.parent, place]

    def test_a_database_is_not_changed(self, tmp_path: Path) -> None:
        """Optuna writes the row of its version where it is missing."""
        path = tmp_path / "study.db"
        optuna.create_study(storage=f"sqlite:///{path}", study_name="sweep")
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("DELETE FROM version_info")
            database.commit()
        before = path.read_bytes()
        for storage in (path, f"sqlite:///{path}"):
            with pytest.raises(ValueError, match="readonly database"):
                read_study(storage)
        assert path.read_bytes() == before

    def test_states_are_counted(self, tmp_path: Path, make_study) -> None:
        failed = {"state": TrialState.FAIL, "user_attrs": {"error": "disk full"}}

        def change(number: int, params):
            if params["seed"] == 3:
                return {"state": TrialState.WAITING}
            if params["init.std"] == 0.01:
                return [failed, {}] if params["norm"] == "none" else [failed, failed]
            return {"state": TrialState.PRUNED} if params["optimizer.lr"] == 0.01 else {}

        counts = read_study(make_study(tmp_path, change=change) / "journal.log").counts()
        assert counts == {
            "trials": 64,
            "running": 0,
            "complete": 20,
            "pruned": 4,
            "fail": 24,
            "waiting": 16,
            "retried": 16,
            "lost": 8,
            "diverged": 0,
        }

    @pytest.mark.parametrize("cut", ["half a line", "a damaged line", "no record"])
    def test_what_is_whole_of_a_journal(self, tmp_path: Path, make_study, cut: str) -> None:
        journal = make_study(tmp_path) / "journal.log"
        lines = journal.read_bytes().splitlines(keepends=True)
        # A study made, and a line for each trial.
        damaged = b"{]\n" if cut == "a damaged line" else b'{"op_code": "4"}\n'
        rest = [lines[22][:9]] if cut == "half a line" else [damaged, *lines[23:]]
        journal.write_bytes(b"".join([*lines[:22], *rest]))
        before = journal.read_bytes()
        table = read_study(journal)
        assert 0 < len(table.rows) < 48
        assert "cut off or damaged" in table.notes[0] and "first 22 are whole" in table.notes[0]
        assert journal.read_bytes() == before

    def test_several_studies(self, tmp_path: Path) -> None:
        url = f"sqlite:///{tmp_path}/study.db"
        for name in ("one", "two"):
            optuna.create_study(storage=url, study_name=name)
        with pytest.raises(ValueError, match="got one, two; name one by `--study"):
            read_study(url)
        assert read_study(url, "two").rows == ()
        with pytest.raises(ValueError, match="`--study` to be one of one, two"):
            read_study(url, "three")

    @pytest.mark.parametrize(
        ("content", "words"),
        [(b"", "without a whole record"), (b"text\n", "without a whole record"), (None, "no such")],
        ids=["empty", "text", "absent"],
    )
    def test_what_is_no_journal(self, tmp_path: Path, content: bytes | None, words: str) -> None:
        if content is not None:
            (tmp_path / "journal.log").write_bytes(content)
        with pytest.raises(ValueError, match=words):
            read_study(tmp_path / "journal.log")

    def test_a_database_that_is_not_there_is_not_made(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no such file"):
            read_study(f"sqlite:///{tmp_path}/study.db")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "url",
        [
            "postgresql+nothing://me:sec:r@et@host/db",
            "grpc://me:sec:r@et@127.0.0.1:1",
        ],
        ids=["no driver", "no answer"],
    )
    def test_no_password_is_shown(self, url: str) -> None:
        with pytest.raises(ValueError) as caught:
            read_study(url)
        assert "sec:r@et" not in str(caught.value)
        assert url.replace("sec:r@et", "***") in str(caught.value)

    def test_a_part_of_a_password_is_not_taken_for_the_host(self) -> None:
        """A driver would say that it cannot find the host `cret@127.0.0.1`."""
        with pytest.raises(ValueError, match="write %40 for @") as caught:
            read_study("postgresql+psycopg://me:se@cret@127.0.0.1:1/db")
        assert "cret" not in str(caught.value)

    def test_no_password_is_shown_in_another_s_words(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(url: str, **_: object) -> None:
            raise OSError(f"cannot parse {url!r}, whose password is secret")

        monkeypatch.setattr("bn_lightning.sweeps.analysis.trials.RDBStorage", refuse)
        with pytest.raises(ValueError) as caught:
            read_study("postgresql://me:secret@host/db")
        assert str(caught.value).endswith(
            "cannot parse 'postgresql://me:***@host/db', whose password is ***"
        )


cells = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8"), max_size=12),
    st.sampled_from(
        ["", "1", "1.0", "true", "null", "NaN", "Infinity", '"', "{}", "a,b\r\n", "=1"]
    ),
)
names = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), min_size=1, max_size=8)


class TestTable:
    @settings(deadline=None)
    @given(st.lists(st.tuples(st.dictionaries(names, cells), st.dictionaries(names, cells))))
    def test_csv_gives_back_what_it_was_given(self, given_rows) -> None:
        rows = tuple(
            TrialRow(i, "COMPLETE", (i / 7,), params, attributes)
            for i, (params, attributes) in enumerate(given_rows)
        )
        read = rows_from_csv(to_csv(TrialTable("t", ("maximize",), rows)))
        assert read == rows
        kinds = [[type(v) for v in (*r.params.values(), *r.attributes.values())] for r in rows]
        # A table has its columns in one order.
        assert [
            sorted(map(str, [type(v) for v in (*r.params.values(), *r.attributes.values())]))
            for r in read
        ] == [sorted(map(str, row)) for row in kinds]

    def test_each_trial_is_a_line(self) -> None:
        row = TrialRow(3, "FAIL", (), {"a": "x"}, {"error": "one\ntwo", "loss": math.inf})
        text = to_csv(TrialTable("t", ("maximize",), (row,)))
        assert text.splitlines() == [
            "number,state,value,params/a,attributes/error,attributes/loss",
            '3,FAIL,,x,"""one\\ntwo""",Infinity',
        ]

    def test_several_values(self) -> None:
        rows = (TrialRow(0, "COMPLETE", (1.0, 2.5)), TrialRow(1, "FAIL"))
        text = to_csv(TrialTable("t", ("maximize", "minimize"), rows))
        assert text.startswith("number,state,value/0,value/1\n0,COMPLETE,1.0,2.5\n")
        assert rows_from_csv(text) == rows

    @pytest.mark.parametrize(
        "text",
        ["", "a,b\n1,2\n", "number,state,value\n1,COMPLETE\n", "number,state,value\n1,DONE,2\n"],
        ids=["empty", "another table", "a short line", "another state"],
    )
    def test_what_is_no_table(self, text: str) -> None:
        with pytest.raises(ValueError, match="`trials.csv` to"):
            rows_from_csv(text)

    def test_attributes_of_other_types_are_kept_as_json(self) -> None:
        study = optuna.create_study(direction="maximize")
        study.add_trial(create_trial(value=1.0, user_attrs={"list": [1, {"a": None}]}))
        (trial,) = study.trials
        assert json.loads(str(row_of(trial).attributes["list"])) == [1, {"a": None}]
