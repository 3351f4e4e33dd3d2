"""The notebook runs from its first cell to its last, and a notebook can show each result."""

import ast
import json
import time
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure

NOTEBOOK = Path(__file__).parents[2] / "examples" / "tolerance.ipynb"


def executed(source: str, names: dict[str, Any]) -> Any:
    """Runs a cell, and returns the value of its last line if that is an expression."""
    body = ast.parse(source).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    if last is None:
        return None
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


@pytest.mark.slow
def test_from_nothing_to_the_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert len(cells) == 10
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in code), "outputs are stripped"
    names: dict[str, Any] = {}
    started = time.process_time()
    results = [executed("".join(cell["source"]), names) for cell in code]
    assert time.process_time() - started < 120
    accuracies, _, figures, (params, _), tolerance_map, network, page = results
    assert 0.5 < accuracies["batch"] <= 1
    assert isinstance(tolerance_map, Figure)
    assert [len(line.get_xdata()) for line in names["axes"].lines] == [10, 10]
    assert figures._repr_html_().count("<img ") == len(figures) > 1
    assert params.keys() == {"norm", "optimizer.lr", "init.std"}
    assert not network.training
    assert page.is_file()
