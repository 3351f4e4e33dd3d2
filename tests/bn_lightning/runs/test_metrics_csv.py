"""`metrics.csv`: what is logged is what is read, also after a run was killed and resumed."""

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bn_lightning.plugins.metrics_logger import MetricsCSVLogger
from bn_lightning.runs.metrics_csv import (
    read_columns,
    read_metrics,
    read_rows,
    truncate_metrics,
    write_rows,
)


def log(folder: Path, *rows: tuple[int, dict[str, float]]) -> None:
    logger = MetricsCSVLogger(folder)
    for step, metrics in rows:
        logger.log_metrics(metrics, step)
        logger.save()


TRAIN = [(1, {"train/loss": 2.0}), (2, {"train/loss": 1.5})]
VAL = (2, {"val/loss": 1.0, "val/accuracy": 0.5})
END = (3, {"train/loss": 1.25})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tep,a\n1,2\n", "line 2 is no row of"),
        ("step,a\n1,2\n3,4,5\n", "line 3 is no row of"),
        ("step,a\n1,2\n3\n", "line 3 is no row of"),
        ("step,a\nx,2\n", "line 2 is no row of"),
        ("step,a\n-1,2\n", "line 2 is no row of"),
        ("step,a\n1,two\n", "a number for a at step 1, got 'two'"),
        (f"step,a\n1,{'1' * 200_000}\n", "field larger than field limit"),
    ],
)
def test_another_table(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        read_metrics(tmp_path)
    assert str(tmp_path) in str(error.value)


class TestLogger:
    def test_a_row_for_each_call_and_a_column_for_each_metric(self, tmp_path: Path) -> None:
        log(tmp_path, *TRAIN, VAL, END)
        assert (tmp_path / "metrics.csv").read_text() == (
            "step,train/loss,val/loss,val/accuracy\n1,2.0,,\n2,1.5,,\n2,,1.0,0.5\n3,1.25,,\n"
        )

    def test_what_is_saved_at_once_is_the_same(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        log(tmp_path / "a", *TRAIN, VAL)
        logger = MetricsCSVLogger(tmp_path / "b")
        for step, metrics in (*TRAIN, VAL):
            logger.log_metrics(metrics, step)
        assert not (tmp_path / "b/metrics.csv").exists()
        logger.finalize("success")
        texts = [(tmp_path / name / "metrics.csv").read_text() for name in "ab"]
        assert texts[0] == texts[1]

    def test_nothing_logged_is_no_file(self, tmp_path: Path) -> None:
        logger = MetricsCSVLogger(tmp_path)
        logger.log_hyperparams({"lr": 1.0})
        logger.save()
        logger.finalize("success")
        assert not list(tmp_path.iterdir())

    def test_it_goes_on_with_the_file_of_the_run_it_resumes(self, tmp_path: Path) -> None:
        log(tmp_path, *TRAIN)
        log(tmp_path, VAL, END)
        assert read_metrics(tmp_path) == {
            "train/loss": [(1, 2.0), (2, 1.5), (3, 1.25)],
            "val/loss": [(2, 1.0)],
            "val/accuracy": [(2, 0.5)],
        }

    def test_a_new_column_keeps_what_was_there(self, tmp_path: Path) -> None:
        """Also when the file cannot be replaced: it stays whole."""
        log(tmp_path, *TRAIN)
        before = (tmp_path / "metrics.csv").read_bytes()
        logger = MetricsCSVLogger(tmp_path)
        logger.log_metrics({"a": object()}, 3)  # type: ignore[dict-item]

        def refuse(*_: object) -> None:
            raise OSError("no space left")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("os.replace", refuse)
            with pytest.raises(OSError, match="no space"):
                logger.save()
        assert (tmp_path / "metrics.csv").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]

    def test_what_lightning_asks_of_a_logger(self, tmp_path: Path) -> None:
        logger = MetricsCSVLogger(str(tmp_path))
        assert logger.save_dir == str(tmp_path)
        assert isinstance(logger.name, str)
        assert isinstance(logger.version, str)


class TestRead:
    def test_without_a_file(self, tmp_path: Path) -> None:
        assert read_metrics(tmp_path) == {}
        assert read_rows(tmp_path / "metrics.csv") == []
        assert read_columns(tmp_path / "metrics.csv") == []

    def test_in_order_of_steps(self, tmp_path: Path) -> None:
        log(tmp_path, (9, {"a": 9.0}), (10, {"a": 10.0}), (2, {"a": 2.0}))
        assert read_metrics(tmp_path) == {"a": [(2, 2.0), (9, 9.0), (10, 10.0)]}

    def test_numbers_that_are_none(self, tmp_path: Path) -> None:
        log(tmp_path, (1, {"a": math.nan, "b": math.inf}), (2, {"a": -math.inf}))
        metrics = read_metrics(tmp_path)
        assert math.isnan(metrics["a"][0][1])
        assert metrics["a"][1] == (2, -math.inf)
        assert metrics["b"] == [(1, math.inf)]

    @settings(deadline=None, derandomize=True)
    @given(
        st.lists(
            st.dictionaries(
                st.sampled_from(["a", "b,c", 'd"e', "f/g h"]),
                st.floats(allow_nan=False),
                min_size=1,
            ),
            max_size=6,
        )
    )
    def test_what_is_logged_is_read_to_the_last_bit(
        self, tmp_path_factory: pytest.TempPathFactory, logged: list[dict[str, float]]
    ) -> None:
        folder = tmp_path_factory.mktemp("run")
        log(folder, *enumerate(logged))
        expected: dict[str, list[tuple[int, float]]] = {}
        for step, metrics in enumerate(logged):
            for name, value in metrics.items():
                expected.setdefault(name, []).append((step, value))
        assert read_metrics(folder) == expected

    @settings(deadline=None, derandomize=True)
    @given(st.integers(0, 200))
    def test_a_run_killed_while_writing_leaves_whole_rows(
        self, tmp_path_factory: pytest.TempPathFactory, cut: int
    ) -> None:
        folder = tmp_path_factory.mktemp("run")
        log(folder, *TRAIN, VAL, END)
        path = folder / "metrics.csv"
        whole = read_rows(path)
        text = path.read_text()
        # The header came by replacing the whole file, so it is never cut.
        cut = min(len(text), text.index("\n") + 1 + cut)
        path.write_text(text[:cut])
        assert read_rows(path) == whole[: text[:cut].count("\n") - 1]


class TestTruncate:
    def test_rows_after_the_step_are_taken_out(self, tmp_path: Path) -> None:
        log(tmp_path, *TRAIN, VAL, END)
        truncate_metrics(tmp_path, 2)
        assert read_metrics(tmp_path) == {
            "train/loss": [(1, 2.0), (2, 1.5)],
            "val/loss": [(2, 1.0)],
            "val/accuracy": [(2, 0.5)],
        }

    def test_a_resumed_run_ends_with_the_file_of_one_that_ran_through(self, tmp_path: Path) -> None:
        for name in ("whole", "part"):
            (tmp_path / name).mkdir()
            log(tmp_path / name, *TRAIN, VAL, END)
        path = tmp_path / "part/metrics.csv"
        path.write_text(path.read_text() + "4,0.")  # killed while writing
        truncate_metrics(tmp_path / "part", 2)
        log(tmp_path / "part", END)
        assert path.read_text() == (tmp_path / "whole/metrics.csv").read_text()

    def test_columns_stay_where_no_row_does(self, tmp_path: Path) -> None:
        log(tmp_path, *TRAIN)
        truncate_metrics(tmp_path, 0)
        assert (tmp_path / "metrics.csv").read_text() == "step,train/loss\n"

    def test_without_a_file(self, tmp_path: Path) -> None:
        truncate_metrics(tmp_path, 5)
        assert not list(tmp_path.iterdir())


def test_write_rows_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("something else")
    write_rows(path, ["step", "a"], [{"step": 1}, {"step": 2, "a": 0.5}])
    assert path.read_text() == "step,a\n1,\n2,0.5\n"
