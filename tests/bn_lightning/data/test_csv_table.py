"""CSV files: what is read of them, all that can be wrong with one, and the memory they take."""

import tracemalloc

import pytest

from bn_lightning.data import csv_table
from bn_lightning.data.csv_table import parse_csv, parse_features
from bn_lightning.data.errors import DataError

HEADER = "name,cgpa,iq,placement\n"


def of_classes(count: int) -> str:
    """Six rows of so many classes."""
    return HEADER + "".join(f"n,{i},{90 + i},{min(i, count - 1)}\n" for i in range(6))


def parsed(text: str | bytes, features=("cgpa", "iq")):
    payload = text if isinstance(text, bytes) else text.encode()
    return parse_csv(payload, features, "placement", "table.csv")


def test_columns_are_named_by_their_header() -> None:
    inputs, targets, classes = parsed(HEADER + "a,7,100,no\nb,8,90,yes\n", ("iq",))
    assert inputs.tolist() == [[100], [90]] and targets.tolist() == [0, 1]
    assert classes == ("no", "yes")


@pytest.mark.parametrize(
    ("values", "targets", "classes"),
    [
        (("0", "1", "1.0"), [0, 1, 1], ("0", "1.0")),
        (("2", "10", "2"), [0, 1, 0], ("2", "10")),
        (("placed", "not", "not"), [1, 0, 0], ("not", "placed")),
        (("1", "no", "1"), [0, 1, 0], ("1", "no")),
    ],
    ids=["numbers", "not as texts", "texts", "mixed"],
)
def test_classes(values, targets, classes) -> None:
    found = parsed(HEADER + "".join(f"a,1,2,{value}\n" for value in values))
    assert (found[1].tolist(), found[2]) == (targets, classes)


def test_features_alone() -> None:
    for text in ("iq,cgpa\n100,7\n", "cgpa,placement,iq\n7,,100\n"):
        found = parse_features(text.encode(), ("cgpa", "iq"), "table.csv")
        assert found.tolist() == [[7, 100]]
    found = parse_features(b"iq,cgpa\n100,7\n90,8\n", ("cgpa", "iq"), "table.csv")
    assert found.tolist() == [[7, 100], [8, 90]]
    with pytest.raises(DataError, match="iq is absent .*network"):
        parse_features(b"cgpa,IQ\n7,100\n", ("cgpa", "iq"), "table.csv")


def test_what_spreadsheets_write() -> None:
    text = '\ufeffname, cgpa ,iq,placement\r\n"Doe, J.",7.5,1e2,1\r\n\r\nx,8,90,0\r\n'
    assert parsed(text)[0].tolist() == [[7.5, 100], [8, 90]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (HEADER, "expected rows after the header"),
        (
            "grade;iq;placement\n7;100;1\n",
            "got grade;iq;placement: cgpa, iq, placement is absent .*`data.features`",
        ),
        ("cgpa,iq,iq,placement\n1,2,3,0\n", "got cgpa, iq, iq, placement: iq is"),
        (
            HEADER + "a,7,100,1\nb,high,90,0\n",
            "cgpa, got 'high' in line 3",
        ),
        (HEADER + "a,7,100,1\nb,inf,90,0\n", "'inf' in line 3"),
        (
            HEADER + "a,7,100,1\nb,,90,0\nc,8,NA,0\nd,9,95,nan\n",
            "3 rows .* line 3, 4, 5;",
        ),
        (
            HEADER + "a,,100,1\n" * 6,
            "6 rows .* line 2, 3, 4, 5, 6;",
        ),
        (HEADER + "a,7,100,1\nb,8,90,1\n", "got 1 in 2 rows: 1$"),
        (
            HEADER + "a,7,100,1\nb,8,90,2\nc,8,90,0\n",
            "two values in placement, .* got 3 in 3 rows: 1, 2, 0",
        ),
        (of_classes(5), r"got 5 in 6 rows: 0, 1, 2, 3, 4$"),
        (of_classes(6), r"got 6 in 6 rows: 0, 1, 2, 3, 4, \.\.\.$"),
        (HEADER + "a,7,100,1\nb,8,90,1,0\n", "expected 4 cells .* 5 in line 3"),
        (HEADER + "a,7,100,1\nb,8,90\n", "expected 4 cells .* 3 in line 3"),
        (HEADER.encode() + "Jos\u00e9,7,100,1\n".encode("latin-1"), "UTF-8.* 0xe9 in line 2"),
        (HEADER + 'a,7,100,1\nb,"8"x,90,0\n', "expected a CSV file.* line 3"),
        (
            HEADER + "".join(f"n,{i},90,{i}\n" for i in range(1001)),
            r"got more than 1,000 in 1001 rows: 0, 1, 2, 3, 4, \.\.\.$",
        ),
        (
            HEADER + "a,7,100,1\n" + "b," * (1 << 19) + "\n",
            "at most 1,048,576 characters.* line 3;",
        ),
        (
            HEADER + "a,7,100,1\n" + 'b,"\n",' * (1 << 18) + "\n",
            "at most 1,048,576 characters.* line 3;",
        ),
    ],
    ids=[
        "empty",
        "header only",
        "other columns",
        "a column twice",
        "text",
        "infinite",
        "missing",
        "six missing",
        "one class",
        "three classes",
        "five classes",
        "six classes",
        "long line",
        "short line",
        "not UTF-8",
        "quotes",
        "a column of numbers",
        "a row too long",
        "of many lines",
    ],
)
def test_errors_name_the_file_and_the_line(content: str | bytes, words: str) -> None:
    with pytest.raises(DataError, match=words) as raised:
        parsed(content)
    assert str(raised.value).startswith("table.csv: expected")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_ends_of_lines(end) -> None:
    text = HEADER + '"a\nb",7,100,1\n\nc,8,90,0\nd,9,95,1'
    inputs, targets, _ = parsed(text.replace("\n", end))
    assert inputs.tolist() == [[7, 100], [8, 90], [9, 95]] and targets.tolist() == [1, 0, 1]
    with pytest.raises(DataError, match="'x' in line 6"):
        parsed(text.replace("9,95", "9,x").replace("\n", end))


def test_the_longest_row(monkeypatch) -> None:
    """Of each row, and not of what came before; the end of the line counts."""
    monkeypatch.setattr(csv_table, "_LONGEST_ROW", 30)
    rows = 'a,7,100,1\n"{}",8,90,0\nc,9,95,1\n'.format("\n".join("0123456789b"))
    assert len(rows.split("a,7,100,1\n")[1].split("c,9")[0]) == 31
    with pytest.raises(DataError, match="at most 30 characters.* line 3"):
        parsed(HEADER + rows)
    assert len(parsed(HEADER + rows.replace("b", ""))[0]) == 3


def test_memory() -> None:
    """Of a table of numbers of three characters: its numbers, not a text for each cell."""
    row = "1.5," * 20
    names = [f"f{i}" for i in range(20)]
    payload = ",".join([*names, "placement\n"]).encode()
    payload += b"".join(f"{row}{i % 2}\n".encode() for i in range(10_000))
    tracemalloc.start()
    try:
        inputs, _, _ = parse_csv(payload, names, "placement", "table.csv")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert inputs.shape == (10_000, 20)
    assert peak < 3 * len(payload)
