"""The page in a browser: all figures are drawn, nothing is requested, cells can be selected.

Needs playwright and a Chromium of the system (`apt install chromium`); no browser is downloaded.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_up_ledger import made_up_ledger
from optuna.trial import TrialState

from bn_lightning.claims.claim_page import claims_page
from bn_lightning.sweeps.analysis.columns import Columns
from bn_lightning.sweeps.analysis.summary import summarize
from bn_lightning.sweeps.analysis.tolerance import GridTrial
from bn_lightning.sweeps.analysis.trials import TrialRow, TrialTable
from bn_lightning.sweeps.report.grid_figures import cells_json, grid_figures
from bn_lightning.sweeps.report.grid_page import grid_page
from bn_lightning.sweeps.report.write_report import ReportOptions, write_report

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the dev extra")

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("empty_pictures"),  # the pages draw their figures themselves
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium in the PATH"),
]

# A function of JavaScript that returns what cannot be read.
TEXT_BOXES = (Path(__file__).parents[2] / "support" / "text_boxes.js").read_text()
MEASURE = TEXT_BOXES[TEXT_BOXES.index("() =>") :]

WIDTHS = (390, 768, 1280)  # pixels: a phone, a tablet, a laptop
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class Opened:
    """An open page, with its console messages and its requests."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, scheme: str = "light") -> None:
        viewport = {"width": width, "height": 900}
        self.page = browser.new_page(viewport=viewport, color_scheme=scheme)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.absolute().as_uri())
        # `wait_for_function` polls by eval, which the page's Content-Security-Policy forbids.
        self.page.locator("html[data-drawn]").wait_for(state="attached", timeout=60_000)

    def check(self, readable: bool = True) -> None:
        """Check that all figures are drawn, without a message or a request but for the page."""
        assert self.said == []
        assert self.asked == [self.page.url]
        plots = self.page.locator(".plot")
        assert self.page.locator(".plot .main-svg").count() >= plots.count() > 0
        assert not readable or self.page.evaluate(MEASURE) == []
        width = self.page.evaluate("document.documentElement.scrollWidth")
        assert width <= self.page.viewport_size["width"]


@pytest.fixture(scope="module")
def open_page(browser: Any) -> Iterator[Callable[..., Opened]]:
    opened: list[Opened] = []

    def open_one(*arguments: Any, **options: Any) -> Opened:
        opened.append(Opened(browser, *arguments, **options))
        return opened[-1]

    yield open_one
    for one in opened:
        one.page.close()


@pytest.mark.parametrize(
    ("style", "complaint"),
    [
        ("", None),
        ("width: 20px; overflow: hidden; white-space: nowrap", "cut off by P"),
        ("position: absolute; left: 380px; white-space: nowrap", "outside the window"),
        ("margin-top: -20px", "overlap"),
    ],
    ids=["fine", "cut", "outside", "overlap"],
)
def test_what_cannot_be_read_is_found(
    browser: Any, tmp_path: Path, style: str, complaint: str | None
) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.set_content(f"<p>first line</p><p style='{style}'>second line</p>")
    found = page.evaluate(MEASURE)
    page.close()
    assert any(complaint in text for text in found) if complaint else found == []


@pytest.fixture(scope="module")
def sweep_page(
    tmp_path_factory: pytest.TempPathFactory, make_study: Callable[..., Path], empty_pictures: None
) -> Path:
    """Write the page of a grid whose trial 7 has a directory, and return its path."""
    sweep = make_study(tmp_path_factory.mktemp("grid") / "sweep")
    (sweep / "7").mkdir()
    return write_report([str(sweep)])


def test_a_grid_is_drawn(open_page: Any, sweep_page: Path) -> None:
    for width, scheme in ((390, "light"), (390, "dark"), (768, "dark"), (1280, "light")):
        opened = open_page(sweep_page, width=width, scheme=scheme)
        opened.check()
        ids = {plot.get_attribute("id") for plot in opened.page.locator(".plot").all()}
        assert {"accuracy-0", "accuracy-1", "difference-0", "outcome-1", "widths"} <= ids
        paper = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


def test_pointing_at_a_cell_shows_its_trials(open_page: Any, sweep_page: Path) -> None:
    opened = open_page(sweep_page)
    plot = opened.page.locator("#accuracy-0")
    plot.scroll_into_view_if_needed()
    box = plot.locator(".heatmaplayer image").first.bounding_box()
    # The lower left cell of 4 x 2.
    x, y = box["x"] + box["width"] / 8, box["y"] + box["height"] * 3 / 4
    opened.page.mouse.move(x, y)
    hover = plot.locator(".hoverlayer text").first
    hover.wait_for(timeout=10_000)
    text = hover.text_content()
    assert "learning rate 0.01" in text and "initial standard deviation 0.01" in text
    assert "seed 3: 0.9500 (trial 5)" in text
    opened.page.mouse.click(x, y)
    opened.page.locator("#cell li").first.wait_for()
    assert "seed 1: 0.9500, trial 3" in opened.page.locator("#cell").inner_text()
    opened.check()


def test_cells_are_reached_by_keys_and_lead_to_their_runs(open_page: Any, sweep_page: Path) -> None:
    opened = open_page(sweep_page)
    opened.page.locator("#difference-0").focus()
    for key in ("ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight", "ArrowLeft", "ArrowUp"):
        opened.page.keyboard.press(key)
    cell = opened.page.locator("#cell")
    assert "initial standard deviation 0.1, learning rate 0.01" in cell.inner_text()
    assert cell.locator("li").count() == 6
    link = cell.locator("a")
    assert link.count() == 1 and link.inner_text() == "trial 7"
    assert link.evaluate("a => a.href") == (sweep_page.parent / "7").as_uri() + "/"


def test_on_paper_it_is_light_and_fits(open_page: Any, sweep_page: Path) -> None:
    opened = open_page(sweep_page, scheme="dark")
    colour = "getComputedStyle(document.querySelector('#accuracy-0 .xtick text')).fill"
    width = "Math.max(...[...document.querySelectorAll('.main-svg')].map(svg => svg.clientWidth))"
    dark = opened.page.evaluate(colour)
    for event, words in (("beforeprint", "light"), ("afterprint", "dark")):
        opened.page.evaluate(f"dispatchEvent(new Event('{event}'))")
        is_dark = opened.page.evaluate(f"{colour} === '{dark}'")
        assert is_dark == (words == "dark")
        assert (opened.page.evaluate(width) <= 640) == (words == "light")
    opened.check()


def test_numbers_that_are_wider_than_their_cells_are_left_out(
    open_page: Any, tmp_path: Path
) -> None:
    trials = {
        n: GridTrial(arm, init, 1.3**n, 1, n / 40, 1.0)
        for n, (arm, init) in enumerate([(a, i) for a in ("batch", "none") for i in (0.1, 1.0)] * 5)
    }
    found = summarize(trials.values(), 2.3, is_planned=False)
    rows = tuple(TrialRow(n, "COMPLETE", (t.accuracy,), {"lr": t.lr}) for n, t in trials.items())
    figures = grid_figures(found, "test accuracy", "")
    cells = cells_json(found.grid, trials, {}, ".")
    page = tmp_path / "page.html"
    page.write_text(
        grid_page(TrialTable("wide", ("maximize",), rows), found, figures, cells, {}, [])
    )
    for width, has_numbers in ((390, False), (768, True)):
        opened = open_page(page, width=width)
        opened.check()
        assert (opened.page.locator("#accuracy-0 .heatmap-label").count() > 0) == has_numbers


def test_all_trials_are_listed(open_page: Any, sweep_page: Path) -> None:
    opened = open_page(sweep_page, width=390)
    opened.page.locator("#all-trials summary").click()
    rows = opened.page.locator("#all-trials tbody tr")
    rows.last.wait_for()  # the browser tells that it was opened when it has the time
    assert rows.count() == 48
    assert rows.nth(7).locator("a").inner_text() == "trial 7"
    opened.check()


def test_names_with_html_run_nothing(
    open_page: Any, tmp_path: Path, make_study: Callable[..., Path]
) -> None:
    failed = {"state": TrialState.FAIL, "user_attrs": {"error": HOSTILE}}
    space = {"optimizer.lr": [0.1, 1.0], "init": [HOSTILE, "he"], HOSTILE: [HOSTILE, "b"]}
    sweep = make_study(
        tmp_path / "s", name=HOSTILE, space=space, change=lambda n, p: [failed, {}] if not n else {}
    )
    pages = [
        write_report(
            [str(sweep)], ReportOptions(tmp_path / "grid", columns=Columns(arm=(HOSTILE,)))
        ),
        write_report([str(sweep)], ReportOptions(tmp_path / "study")),
    ]
    for page in pages:
        opened = open_page(page)
        opened.check(readable=False)  # these names are longer than the page is wide
        assert opened.page.evaluate("window.hacked") is None
        assert opened.page.locator("img").count() == 0
        assert HOSTILE in opened.page.locator("h1").inner_text()
    opened = open_page(pages[0])
    opened.page.locator("#accuracy-0").focus()
    opened.page.keyboard.press("ArrowUp")
    assert HOSTILE in opened.page.locator("#cell").inner_text()
    assert opened.page.evaluate("window.hacked") is None


def test_runs_are_drawn(open_page: Any, tmp_path: Path, make_run: Callable[..., Path]) -> None:
    runs = [
        make_run(tmp_path / name, norm) for name, norm in (("a", {"_target_": "x"}), ("b", None))
    ]
    page = write_report([*map(str, runs)], ReportOptions(tmp_path / "out"))
    for width in WIDTHS:
        opened = open_page(page, width=width)
        opened.check()
    ids = [plot.get_attribute("id") for plot in opened.page.locator(".plot").all()]
    assert ids == ["accuracy", "loss", "percentiles-0", "percentiles-1", "throughput"]


def test_a_study_of_ones_own_is_drawn(
    open_page: Any, tmp_path: Path, make_study: Callable[..., Path]
) -> None:
    space = {
        "optimizer.lr": [0.01, 0.1],
        "model.network.activation_function": ["sigmoid", "a_name.of_a.class_of.ones_own"],
        "data.batch_size": [16, 32, 64],
    }

    def change(number: int, params: dict[str, Any]) -> dict[str, Any]:
        found = {"val/loss": number / 7, "test/accuracy": 0.5}
        return {"value": number / 7, "user_attrs": found}

    page = write_report([str(make_study(tmp_path / "sweep", space=space, change=change))])
    for width in (WIDTHS[0], WIDTHS[-1]):
        opened = open_page(page, width=width)
        opened.check()
    ids = {plot.get_attribute("id") for plot in opened.page.locator(".plot").all()}
    assert ids == {"history", "parameter-0", "parameter-1", "parameter-2", "importances"}


def test_a_study_that_minimizes_is_drawn(
    open_page: Any, tmp_path: Path, make_study: Callable[..., Path]
) -> None:
    def change(number: int, params: dict[str, Any]) -> dict[str, Any]:
        return {"value": 9 - number / 7, "user_attrs": {"val/mae": 9 - number / 7}}

    page = write_report([str(make_study(tmp_path / "sweep", direction="minimize", change=change))])
    for width, scheme in zip(WIDTHS, ("light", "dark", "light"), strict=True):
        opened = open_page(page, width=width, scheme=scheme)
        opened.check()
    ids = {plot.get_attribute("id") for plot in opened.page.locator(".plot").all()}
    assert {"map-0", "map-1", "history", "importances"} <= ids
    plot = opened.page.locator("#map-0")
    plot.scroll_into_view_if_needed()
    box = plot.locator(".heatmaplayer image").first.bounding_box()
    opened.page.mouse.move(box["x"] + box["width"] / 8, box["y"] + box["height"] * 3 / 4)
    hover = plot.locator(".hoverlayer text").first
    hover.wait_for(timeout=10_000)
    assert "initial standard deviation 0.01, learning rate 0.01" in hover.text_content()
    assert "seed 1: 8.571" in hover.text_content()


def test_a_window_made_narrow_does_not_scroll_sideways(open_page: Any, sweep_page: Path) -> None:
    page = open_page(sweep_page).page
    # Read before plotly draws anew, which it does a moment later.
    page.evaluate(
        "addEventListener('resize', () => { const page = document.documentElement; "
        "page.dataset.measured ??= [page.scrollWidth, innerWidth]; })"
    )
    page.set_viewport_size({"width": 390, "height": 900})
    page.locator("html[data-measured]").wait_for(state="attached")
    assert page.locator("html").get_attribute("data-measured") == "390,390"


def test_a_page_without_figures(
    open_page: Any, tmp_path: Path, make_study: Callable[..., Path]
) -> None:
    sweep = make_study(tmp_path, change=lambda n, p: {"state": TrialState.WAITING})
    opened = open_page(write_report([str(sweep)]))
    assert opened.said == [] and opened.asked == [opened.page.url]


def test_the_claims_are_drawn(open_page: Any, tmp_path: Path) -> None:
    """Of the whole budget, which has the most panels and curves."""
    content, figures, overview = made_up_ledger(tmp_path)
    page = tmp_path / "claims.html"
    page.write_text(claims_page(content, figures, overview))
    for width, scheme in ((WIDTHS[0], "light"), (WIDTHS[-1], "dark")):
        opened = open_page(page, width=width, scheme=scheme)
        opened.check()
    ids = {plot.get_attribute("id") for plot in opened.page.locator(".plot").all()}
    panels = [panel for figure in (overview, *figures.values()) for panel in figure.panels]
    assert ids == {panel.id for panel in panels} and len(ids) == len(panels)
