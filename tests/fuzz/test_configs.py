"""Bad values in every field of every configuration: each runs, or ends with one line and a 1."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bad_configs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SERVER = Path(bad_configs.__file__)
NAN, INF = float("nan"), float("inf")

BAD: dict[str, Any] = {
    "text": "text",
    "empty_text": "",
    "long_text": "a" * 5000,
    "nul": "a\0b",
    "line_break": "é\n",
    "no_such_reference": "${nope}",
    "missing": "???",
    "zero": 0,
    "one": 1,
    "minus": -1,
    "half": 0.5,
    "minus_half": -0.5,
    "large": 10**9,
    "huge": 10**18,
    "beyond_64_bits": 10**30,
    "largest_float": 1.7e308,
    "smallest_float": 5e-324,
    "nan": NAN,
    "inf": INF,
    "minus_inf": -INF,
    "true": True,
    "null": None,
    "empty_list": [],
    "list_of_a_list": [[]],
    "list_of_minus": [-1],
    "list_of_zero": [0],
    "list_of_text": ["text"],
    "list_of_nan": [NAN],
    "list_of_large": [10**9],
    "empty_dict": {},
    "dict": {"a": 1},
    "nested": {"a": {"b": [None]}},
    "command": {"_target_": "os.system"},
}

# Neither /, . nor ~: what is written stays in the server's folder.
texts = st.text(st.characters(exclude_characters="/.~", codec="utf-8"), max_size=20)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = (
    st.sampled_from(sorted(BAD)).map(BAD.__getitem__)
    | scalars
    | st.lists(scalars, max_size=3)
    | st.dictionaries(texts, scalars, max_size=3)
)


class Runs:
    """The server of `bad_configs`, and what came of all that it was asked."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "OMP_NUM_THREADS": "1",
                "BN_LIGHTNING_DATA": "nowhere",
            },
        )
        self.fields = [tuple(field) for field in json.loads(self.process.stdout.readline())]
        self.counts: Counter[str] = Counter()

    def __call__(self, command: str, base: str, field: str, value: Any) -> tuple[int, str]:
        self.process.stdin.write(json.dumps([command, base, field, value]) + "\n")
        self.process.stdin.flush()
        code, said = json.loads(self.process.stdout.readline())
        return code, said

    def check(self, place: tuple[str, str, str], value: Any) -> None:
        """Fails unless it runs, or says one line and exits with 1."""
        code, said = self(*place, value)
        case = f"{place} = {value!r}"
        assert code in (0, 1), f"{case} ended with {code}: {said}"
        errors = [line for line in said.split("\n") if line.startswith("error: ")]
        assert "Traceback" not in said, f"{case}: {said}"
        assert len(errors) == code, f"{case}: {said}"
        if errors:
            assert said.endswith(errors[0] + "\n"), f"{case}: {said}"
        self.counts["a line" if code else "ran"] += 1


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    started = Runs()
    yield started
    with open(os.environ.get("FUZZ_COUNTS", os.devnull), "a") as file:
        file.write(f"configs: {sum(started.counts.values()):,}, {dict(started.counts)}\n")
    started.process.stdin.close()
    started.process.wait()
    started.process.stdout.close()


@pytest.mark.soak
def test_what_is_not_touched_runs(runs: Runs) -> None:
    """So that no field is covered by another's error."""
    bases = sorted({(command, base) for command, base, _ in runs.fields})
    assert len(runs.fields) > 250 and len(bases) > 20
    for command, base in [("train", "experiment=mnist_bn"), *(b for b in bases if not b[1])]:
        assert runs(command, base, "", None) == (0, "")


@pytest.mark.slow
@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_value_in_any_field(runs: Runs, data: st.DataObject) -> None:
    runs.check(data.draw(st.sampled_from(runs.fields)), data.draw(values))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "field", "value"),
    [
        ("data=image_folder", "data.num_workers", 10**9),
        ("model=cifar_resnet", "model.network.depth", 6 * 10**8 + 2),
        ("experiment=mnist_bn", "callbacks.activation_percentiles.points", 10**9),
        ("experiment=mnist_bn", "trainer.max_steps", 10**12),
        ("experiment=mnist_bn", "trainer.devices", 10**9),
        ("experiment=mnist_bn", "extras.num_threads", 10**9),
        ("experiment=mnist_bn", "model.network.widths", [10**9]),
        ("experiment=mnist_bn", "data.batch_size", 10**18),
        ("experiment=mnist_bn", "callbacks", None),
    ],
)
def test_what_once_took_the_machine_or_a_traceback(
    runs: Runs, base: str, field: str, value: Any
) -> None:
    runs.check(("train", base, field), value)


@pytest.mark.soak
@pytest.mark.parametrize("part", range(4))  # for several processes to share
def test_every_bad_value_in_every_field(runs: Runs, part: int) -> None:
    failures = []
    for field in runs.fields[part::4]:
        for value in BAD.values():
            try:
                runs.check(field, value)
            except AssertionError as error:
                failures.append(str(error)[:500])
    assert not failures, "\n".join(failures)


@pytest.mark.soak
@settings(
    max_examples=3000,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_many_values_in_any_field(runs: Runs, data: st.DataObject) -> None:
    runs.check(data.draw(st.sampled_from(runs.fields)), data.draw(values))
