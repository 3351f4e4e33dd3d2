"""The page: all text is escaped, nothing is fetched, and its size is bounded."""

import json
import re

import pytest

from bn_lightning.sweeps.analysis.arms import label_of
from bn_lightning.sweeps.analysis.summary import summarize
from bn_lightning.sweeps.analysis.tolerance import GridTrial
from bn_lightning.sweeps.analysis.trials import TrialRow, TrialTable
from bn_lightning.sweeps.report.grid_figures import cells_json, grid_figures
from bn_lightning.sweeps.report.grid_page import grid_page
from bn_lightning.sweeps.report.page_skeleton import (
    Html,
    Plot,
    html_table,
    json_block,
    places_for,
    render_page,
    tag,
)
from bn_lightning.sweeps.report.plotly_renderer import plots_of

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>{{plotly}}"


def test_text_is_escaped_and_html_is_not() -> None:
    assert (
        tag("p", "<b>", Html("<i></i>"), title='"').text == '<p title="&quot;">&lt;b&gt;<i></i></p>'
    )
    assert "&lt;b&gt;" in html_table(["<b>"], [["<b>", "x"]], "<b>").text
    assert "<b>" not in html_table(["<b>"], [["<b>", "x"]], "<b>").text


def test_json_cannot_end_its_element() -> None:
    text = json_block({"a": "</script><!--&\u2028", "b": float("nan")})
    assert "<" not in text and ">" not in text and "&" not in text and "\u2028" not in text
    assert json.loads(text) == {"a": "</script><!--&\u2028", "b": None}


def test_nothing_of_a_hostile_name_becomes_html() -> None:
    plot = Plot("plot", HOSTILE, [{"type": "bar", "x": [1], "y": [HOSTILE]}], {}, HOSTILE)
    text = render_page(HOSTILE, [tag("h1", HOSTILE), places_for([plot])], [plot])
    assert "<img" not in re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert len(re.findall(r"<script[ >]", without_plotly(text))) == 3
    assert text.count("{{plotly}}") >= 3  # as text, not as the field it names


def test_only_its_own_scripts_may_run() -> None:
    text = render_page("t", [], [])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'")
    assert re.search(r"script-src 'sha256-[^']+=' 'sha256-[^']+='$", policy[1])
    assert not re.search(r"<(?:link|img|iframe|script)[^>]*(?:src|href)=", text[:5000])


def without_plotly(text: str) -> str:
    """Remove plotly's code, whose strings contain tags."""
    start = text.index("</script>\n<script>") + len("</script>\n<script>")
    return text[:start] + text[text.index("</script>", start) :]


def big_grid(inits: int, rates: int) -> dict[int, GridTrial]:
    points = [
        (arm, 1.1**i, 1.1**r, seed)
        for arm in ("batch", "none")
        for i in range(inits)
        for r in range(rates)
        for seed in (1, 2, 3)
    ]
    return {
        n: GridTrial(arm, init, lr, seed, ((n * 37) % 1000) / 1000, 1.0)
        for n, (arm, init, lr, seed) in enumerate(points)
    }


@pytest.mark.parametrize(("inits", "rates"), [(8, 11), (41, 41)], ids=["528", "10,086"])
def test_the_page_of_a_grid_is_small_enough(inits: int, rates: int) -> None:
    trials = big_grid(inits, rates)
    rows = tuple(TrialRow(n, "COMPLETE", (t.accuracy,), {"lr": t.lr}) for n, t in trials.items())
    found = summarize(trials.values(), 2.3, is_planned=False)
    links = {number: str(number) for number in trials}
    cells = cells_json(found.grid, trials, links, ".")
    study = TrialTable("big", ("maximize",), rows)
    text = grid_page(study, found, grid_figures(found, "test accuracy", ""), cells, {}, [])
    assert len(text.encode()) <= 6e6
    assert len(cells["trials"]) == len(trials) == 6 * inits * rates
    data = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    content = json.loads(data[1])
    for plot in content["plots"]:
        assert f'id="{plot["id"]}"' in text
    number, arm, init, rate, seed, accuracy, diverged, link = content["grid"]["trials"][-1]
    assert (number, accuracy, diverged, link) == (number, trials[number].accuracy, 0, 1)
    assert content["grid"]["arms"][arm] == label_of(trials[number].arm)
    assert (init, rate, seed) == (inits - 1, rates - 1, 3)


@pytest.mark.parametrize(("count", "angle"), [(4, 0), (5, -90)])
def test_few_learning_rates_are_labelled_level(count: int, angle: int) -> None:
    found = summarize(big_grid(2, count).values(), 2.3, is_planned=False)
    figures = grid_figures(found, "test accuracy", "")
    plots = [*plots_of(figures["accuracy"]), *plots_of(figures["rates"])]
    axes = {plot.id: plot.layout["xaxis"] for plot in plots}
    assert axes["accuracy-0"]["tickangle"] == angle
    assert (axes["rates-0"].get("tickvals") == list(found.grid.rates)) == (count == 4)
