"""Mutation tests: how many small errors in a source file its own tests notice.

    python benchmarks/mutation.py                            # all of TARGETS, rows to results/
    python benchmarks/mutation.py sweeps/analysis/tolerance.py  # one file, survivors printed

The mutations are cosmic-ray's, less those that fail by their type alone and would flatter the score
(see `_is_kept`). Its own runner starts an interpreter a mutant, which imports torch for seconds.
mutmut forks, but leaves out every decorated function: properties, overrides, cached ones. This one
collects the tests once, forks for each mutant, and exchanges the code of the function in question;
one outside functions, a constant's or a default's, is imported after the fork. A mutant is run
against those tests of the file that execute its line, or all where none does, quickest first, until
one fails. It is killed when one does or none ends in time. It is made in a copy of the checkout, so
that processes which tests start see it, too.

`results/equivalent_mutants.csv` lists mutants that no test can kill, with the reason.
"""

import argparse
import ast
import contextlib
import csv
import dataclasses
import datetime
import functools
import gc
import importlib
import inspect
import itertools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import coverage
import hypothesis
import pytest
from hypothesis import strategies
from rows import append_rows

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
TARGETS = (
    "sweeps/analysis/tolerance.py",
    "kernels/schedule.py",
    "bn_lightning/conversion/convert.py",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "bn_lightning/data").glob("*.py")),
)
# Files whose tests stand in those of the modules that use them.
TESTS = {
    "bn_lightning/data/binarize.py": ["tests/bn_lightning/data/test_mnist.py"],
    "bn_lightning/data/prediction_images.py": ["tests/bn_lightning/test_predict.py"],
    "bn_lightning/data/published.py": [
        "tests/bn_lightning/data/test_mnist.py",
        "tests/bn_lightning/data/test_fashion_mnist.py",
    ],
}
# Imported once, before the forks: what is slow to import, and nothing of this package.
WARM = "torch lightning.pytorch hypothesis.extra.numpy optuna.importance PIL.Image sklearn.ensemble"

# cosmic-ray tries every operator for every other; most fail for any operands that the first takes.
COUNTERPART = {
    "Add": "Sub",
    "Sub": "Add",
    "Mul": "Div",
    "Div": "Mul",
    "FloorDiv": "Mul",
    "Mod": "FloorDiv",
    "Pow": "Mul",
    "LShift": "RShift",
    "RShift": "LShift",
    "BitOr": "BitAnd",
    "BitAnd": "BitOr",
}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One mutation of a file.

    Attributes:
        lines: of the statement that it is in, or of its head.
        code: of the whole file.
        change: the line before and after, stripped.
    """

    lines: range
    code: str
    change: tuple[str, str]


def mutants_of(path: Path) -> list[Mutant]:
    """All mutants of a source file that differ, and compile."""
    import cosmic_ray.plugins
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

    source = path.read_text(encoding="utf-8")
    annotations, statements = _annotations(ast.parse(source)), _statements(ast.parse(source))
    nodes = list(ast_nodes(get_ast(source)))
    kinds = [cosmic_ray.plugins.get_operator(n) for n in cosmic_ray.plugins.operator_names()]
    operators = [kind() for kind in kinds if _is_kept(kind.__name__) and not kind.arguments()]
    found: dict[str, Mutant] = {}
    places = (
        (operator, occurrence, start)
        for operator in operators
        for occurrence, (start, _) in enumerate(
            span for node in nodes for span in operator.mutation_positions(node)
        )
    )
    before = source.splitlines()
    for operator, occurrence, start in places:
        text = before[start[0] - 1].strip()
        decorator = re.match(r"@(override|abstractmethod)\b", text)
        if decorator or text == "*," or any(first <= start < end for first, end in annotations):
            continue  # they say something to readers and type checkers, and do nothing
        try:
            code = mutate_code(source, operator, occurrence)
        except AttributeError:
            continue  # cosmic-ray cannot replace an exception with a dot in its name
        if code is None or code == source or code in found or not _compiles(code):
            continue
        line = start[0]
        lines = min((s for s in statements if line in s), key=len, default=range(line, line + 1))
        after = code.splitlines()
        place = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
        found[code] = Mutant(lines, code, (before[place].strip(), after[place].strip()))
    return list(found.values())


def _is_kept(operator: str) -> bool:
    kind, *operands = operator.split("_")
    if kind == "ReplaceBinaryOperator":
        return COUNTERPART.get(operands[0]) == operands[1]
    if kind == "ReplaceUnaryOperator":
        return operands[0] == "Delete"
    if kind == "ReplaceComparisonOperator":
        identities = {"Is", "IsNot"} & set(operands)
        return not identities or set(operands) == {"Is", "IsNot"}
    return True


def _compiles(code: str) -> bool:
    try:
        compile(code, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _annotations(tree: ast.AST) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where types stand, which nothing evaluates but a type checker."""
    spans = []
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            if (found := getattr(node, field, None)) is not None:
                start = found.lineno, found.col_offset
                spans.append((start, (found.end_lineno, found.end_col_offset)))
    return spans


def _statements(tree: ast.AST) -> list[range]:
    """The lines of each simple statement, and of the head of each compound one."""
    spans = []
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if body else node.end_lineno or node.lineno
            spans.append(range(node.lineno, max(last, node.lineno) + 1))
    return spans


def in_child(
    function: Callable[[], int], seconds: float, limit: float, log: str = os.devnull
) -> int | None:
    """Returns what a function returns in a process of its own.

    Args:
        function: what to call.
        seconds: of processor time that it may take.
        limit: seconds by the clock, for one that waits.
        log: where its output goes.

    Returns:
        Its result; None where it took longer; 70 where it raised.
    """
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds),) * 2)
            file = os.open(log, os.O_RDWR | os.O_CREAT)
            for stream in range(3):
                os.dup2(file, stream)
            code = function()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    end, status = time.monotonic() + limit, None
    while time.monotonic() < end:
        done, raw = os.waitpid(pid, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(raw)
            break
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # what its tests started, too
    if status is None:
        os.waitpid(pid, 0)
    return None if status in (-signal.SIGXCPU, -signal.SIGKILL) else status


class Session:
    """A plugin of pytest that, instead of running the tests once, runs them for each mutant.

    Args:
        path: of the file.
        mutants: of it.
        outcomes: mutant's code -> what became of it, extended here.
    """

    def __init__(self, path: Path, mutants: Sequence[Mutant], outcomes: dict[str, str]) -> None:
        self.path, self.mutants, self.outcomes = path, mutants, outcomes
        self.seconds: dict[str, float] = {}  # of each test, on the file as it is
        self.watched: Any = None
        self.caches: list[Any] = []

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self.watched is not None:
            self.watched.switch_context(nodeid)
            for cached in self.caches:  # or only the first test of several executes its lines
                cached.cache_clear()
            self.seconds[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if self.watched is not None:
            self.seconds[nodeid] = time.monotonic() - self.seconds[nodeid]

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        hypothesis.given(strategies.integers())(lambda number: None)()  # its own caches, once
        found = Path("../watched")

        cache = type(functools.cache(len))
        self.caches = [
            thing
            for thing in gc.get_objects()
            if type(thing) is cache and thing.__module__.startswith("bn_lightning")
        ]

        def watch() -> int:
            self.watched = coverage.Coverage(
                data_file=None, include=[str(self.path)], config_file=False
            )
            self.watched.start()
            code = _run(session, session.items)
            self.watched.stop()
            lines = self.watched.get_data().contexts_by_lineno(str(self.path))
            found.write_bytes(pickle.dumps((lines, self.seconds)))
            return code

        if in_child(watch, 600, 1800, "../log") != 0:
            raise pytest.UsageError("expected these tests to pass on the file as it is")
        contexts, self.seconds = pickle.loads(found.read_bytes())
        items = {item.nodeid: item for item in session.items}
        quickest = sorted(items, key=lambda name: self.seconds[name])
        original = self.path.read_text(encoding="utf-8")
        realpath = functools.cache(os.path.realpath)  # kernels/ is imported by a link
        functions = _functions(compile(original, str(self.path), "exec"))
        live = {
            (f.__code__.co_qualname, f.__code__.co_firstlineno): f
            for f in gc.get_objects()
            if type(f) is types.FunctionType and realpath(f.__code__.co_filename) == str(self.path)
        }
        for mutant in self.mutants:
            if mutant.code in self.outcomes:
                continue
            changed = {
                key: code
                for key, code in _functions(compile(mutant.code, str(self.path), "exec")).items()
                if code != functions.get(key)
            }
            if len(changed) != 1 or changed.keys() - live.keys():
                continue
            names = {name for line in mutant.lines for name in contexts.get(line, ())}
            # All of them for a line that only other processes execute, such as workers.
            chosen = [name for name in quickest if name in names] or quickest

            def run(chosen: list[str] = chosen, changed: Any = changed) -> int:
                for key, code in changed.items():
                    live[key].__code__ = code
                return _run(session, [items[name] for name in chosen])

            self.outcomes[mutant.code] = outcome_of(self.path, mutant, run, chosen, self.seconds)
            Path("../outcomes").write_bytes(pickle.dumps((self.outcomes, self.seconds)))
        self.path.write_text(original, encoding="utf-8")
        Path("../outcomes").write_bytes(pickle.dumps((self.outcomes, self.seconds)))
        return True


def outcome_of(
    path: Path,
    mutant: Mutant,
    run: Callable[[], int],
    chosen: Sequence[str],
    seconds: Mapping[str, float],
) -> str:
    """Writes a mutant, runs the tests chosen, and says what became of it.

    Args:
        path: where to write it.
        mutant: the mutant.
        run: runs the tests; 0 where all passed.
        chosen: their names.
        seconds: that they take.
    """
    path.write_text(mutant.code, encoding="utf-8")
    usual = sum(seconds[name] for name in chosen)
    code = in_child(run, 20 + 5 * usual, 60 + 5 * usual)
    if code == 70:
        raise RuntimeError(f"expected the tests of {mutant.change} to run, got an error")
    return {None: "timeout", 0: "survived"}.get(code, "killed")


def _run(session: pytest.Session, items: Sequence[pytest.Item]) -> int:
    """Runs tests until one fails; 1 where one does."""
    for item, following in itertools.zip_longest(items, items[1:]):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed:
            return 1
    return 0


def _functions(code: types.CodeType) -> dict[tuple[str, int], types.CodeType]:
    """The outermost functions and methods of a module, by name and line."""
    found = {}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            if constant.co_flags & inspect.CO_OPTIMIZED:
                found[constant.co_qualname, constant.co_firstlineno] = constant
            else:
                found |= _functions(constant)
    return found


def _pytest(arguments: Sequence[str], plugins: Sequence[object] = ()) -> int:
    generate = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile(
        "mutation", database=None, deadline=None, phases=generate, derandomize=True
    )
    options = ["-x", "-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:cov"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what was imported before
    options += ["--hypothesis-profile=mutation", "--basetemp=../tmp"]
    return int(pytest.main([*options, *arguments], plugins=list(plugins)))


def test_file(
    target: str, tests: Sequence[str], mutants: Sequence[Mutant], only_survivors: bool
) -> dict[str, object]:
    """Runs all mutants of a file, prints the survivors, and returns the row of results.

    Args:
        target: the file.
        tests: its files of tests.
        mutants: of the file.
        only_survivors: take those that the last call killed as killed, if the file is the same.
    """
    path = (Path.cwd() / target).resolve()
    ledger = ROOT / "build/mutation" / f"{target.replace('/', '.')}.json"
    ledger.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(ledger.read_text()) if only_survivors and ledger.exists() else {}
    outcomes = {code: outcome for code, outcome in known.items() if outcome != "survived"}
    with open(RESULTS / "equivalent_mutants.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["file"] == target]
    listed = {(row["before"], row["after"]) for row in rows}
    to_run = [mutant for mutant in mutants if mutant.change not in listed]
    found = Path("../outcomes")
    found.write_bytes(pickle.dumps((outcomes, {})))
    session = Session(path, to_run, outcomes)
    if in_child(lambda: _pytest(tests, [session]), 10**6, 10**6, "../log") != 0:
        sys.exit(f"expected the tests of {target} to run, got\n{Path('../log').read_text()}")
    outcomes, seconds = pickle.loads(found.read_bytes())
    quickest = sorted(seconds, key=lambda name: seconds[name])
    original = path.read_text(encoding="utf-8")
    for mutant in to_run:
        if mutant.code not in outcomes:  # its code runs on import
            outcomes[mutant.code] = outcome_of(
                path, mutant, lambda: _pytest(quickest), quickest, seconds
            )
    path.write_text(original, encoding="utf-8")
    ledger.write_text(json.dumps(outcomes), encoding="utf-8")
    count = dict.fromkeys(("killed", "timeout", "survived"), 0)
    for mutant in to_run:
        outcome = outcomes[mutant.code]
        count[outcome] += 1
        if outcome != "killed":
            before, after = mutant.change
            line = mutant.lines.start
            print(f"{target}:{line}: {outcome}\n    {before}\n    {after}", flush=True)
    score = (count["killed"] + count["timeout"]) / max(len(to_run), 1)
    equivalent = len(mutants) - len(to_run)
    sizes = {"mutants": len(mutants), "equivalent": equivalent}
    return {"file": target, **sizes, **count, "score": round(score, 3)}


@contextlib.contextmanager
def _copy_of_the_checkout() -> Iterator[None]:
    """Works in a copy of what git knows of here, which is imported instead of what is installed."""
    with tempfile.TemporaryDirectory() as scratch:
        names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
        for name in filter(None, names.split("\0")):
            copy = Path(scratch).resolve() / "checkout" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy, follow_symlinks=False)
        with contextlib.chdir(Path(scratch).resolve() / "checkout"):
            sys.path.insert(0, os.getcwd())
            sys.dont_write_bytecode = True  # two mutants of one second and size would be one to it
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            os.environ["PYTHONPATH"] = os.getcwd()
            yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", help="source files; all of TARGETS where none is named")
    parser.add_argument("--no-rows", action="store_true", help="only print")
    parser.add_argument(
        "--survivors",
        action="store_true",
        help="run only what survived the last time: after tests became sharper, and nothing else",
    )
    arguments = parser.parse_args()
    for name in WARM.split():
        importlib.import_module(name)
    commit = subprocess.check_output(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True
    ).strip()
    with _copy_of_the_checkout():
        for target in arguments.files or TARGETS:
            path = Path(target)
            if not (mutants := mutants_of(path)):
                print(f"{target}: nothing to mutate", flush=True)
                continue
            own = str(Path("tests", *path.parts[:-1], f"test_{path.stem}.py"))
            tests = list(TESTS.get(target, [own]))
            if not all(Path(test).exists() for test in tests):
                sys.exit(f"expected the tests of {target} in {' '.join(tests)}, got no such file")
            row = test_file(target, tests, mutants, arguments.survivors)
            today = datetime.date.today().isoformat()
            print(*(f"{key} {value}" for key, value in row.items()), sep="  ", flush=True)
            if not arguments.no_rows:
                row |= {"date": today, "commit": commit}
                append_rows(RESULTS / "mutation.csv", [row])


if __name__ == "__main__":
    main()
