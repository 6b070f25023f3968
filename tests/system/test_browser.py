"""What a user sees of a sweep in MLflow's pages, by a real browser.

Screenshots go to the folder that LORVP_SCREENSHOTS names, else to one that is named at the end: how each test left its
page, and the README's two, which `make pictures` makes again.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import mlflow
import pytest
from conftest import Server
from PIL import Image
from playwright.sync_api import sync_playwright
from support import debian, warm
from support.samples import synthetic
from support.waiting import LIMIT, wait_for

from sweeps import launch
from sweeps.folder import read_spec
from sweeps.results.leaderboard import Leaderboard
from sweeps.results.outcome import Outcome
from sweeps.spec import file as spec_file
from sweeps.spec.model import Spec
from sweeps.tracking.tracker import Tracker

pytestmark = [pytest.mark.slow, pytest.mark.browser]
QUICKSTART = Path(launch.__file__).parent / "quickstart.yaml"
NO_ASSISTANT = """
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
"""
TICKS = ".du-bois-light-tree-checkbox"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    debian.need(["chromium"], ["chromium", "fonts-dejavu-core"])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, screenshots: Path, request: pytest.FixtureRequest) -> Iterator:
    """Of somebody who is here for the first time."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(1000 * LIMIT)
    context.add_init_script(NO_ASSISTANT)
    page = context.new_page()
    yield page
    page.screenshot(path=screenshots / f"{request.node.name}.png")
    context.close()


PICTURES = os.environ.get("LORVP_SCREENSHOTS")


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = Path(PICTURES or tmp_path_factory.mktemp("screenshots"))
    yield folder
    print(f"screenshots: {folder}")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the quickstart, with half of its trials; few and small ones where nobody asks for pictures."""
    output = tmp_path_factory.mktemp("finished")
    changes = ["search.trials=8", f"output={output}"]
    changes += [] if PICTURES else ["search.trials=5", "trial.dataset.max_per_class=20", "trial.epochs=3"]
    command = [launch.__file__, str(QUICKSTART), *(f"--set={change}" for change in changes)]
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    done = warm.run(command, output, environment | warm.for_jobs(environment))
    assert done.returncode == 0, done.stdout + done.stderr
    return output / "quickstart"


@pytest.fixture(scope="module")
def runs(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the page with the sweep's runs."""
    store = f"sqlite:///{finished.parent / 'mlflow.db'}"
    experiment = mlflow.MlflowClient(store).get_experiment_by_name("lorvp").experiment_id
    with Server(tmp_path_factory.mktemp("server"), store) as server:
        yield f"{server.uri}/#/experiments/{experiment}/runs"


def opened(page, runs: str) -> None:
    page.goto("about:blank")  # else only what is behind the # changes, and the page stays as it is
    page.goto(runs)
    page.get_by_role("link", name="quickstart").first.wait_for()


def expand(page) -> None:
    page.locator(".ag-cell[col-id*='Run Name'] button").first.click()


def names(page, wanted: Callable[[list[str]], bool]) -> list[str]:
    """The table's runs from top to bottom, once they are as they should be."""
    found: list[str] = []

    def look() -> bool:
        cells = page.locator(".ag-cell[col-id*='Run Name'] a").evaluate_all(
            "links => links.map(link => [Number(link.closest('.ag-row').getAttribute('row-index')), link.innerText])"
        )
        found[:] = [name for _, name in sorted(cells)]
        return wanted(found)

    wait_for("the table's runs", look, said=lambda: f"it shows {found}")
    return found


def tick_columns(page, *columns: str) -> None:
    page.get_by_test_id("column-selection-dropdown").first.click()
    for column in columns:
        page.get_by_placeholder("Search columns").fill(column)
        node = page.locator(".du-bois-light-tree-treenode").filter(has=page.get_by_text(column, exact=True))
        node.locator(TICKS).first.click()
    page.keyboard.press("Escape")


def choose_axes(page, selector: int, *axes: str) -> None:
    """In one of the two selectors beside the parallel coordinates: 0 has the parameters, 1 the metrics."""
    page.get_by_role("combobox").nth(selector).click(force=True)
    options = page.locator(".du-bois-light-select-item-option").filter(visible=True)
    options.first.wait_for()
    for axis in axes:
        option = page.locator(f".du-bois-light-select-item-option[title='{axis}']").filter(visible=True)
        page.locator(".du-bois-light-select-dropdown").filter(visible=True).hover()
        page.mouse.wheel(0, -10_000)
        wait_for(f"{axis} in the list", lambda: option.count() or page.mouse.wheel(0, 100))  # noqa: B023  it has what is in view
        option.click()
    page.get_by_role("heading", name="Comparing").click()  # closes the list


def picture_is_shown(page, folder: str, name: str) -> None:
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text(folder, exact=True).click()
    page.get_by_text(name, exact=True).click()
    page.wait_for_function(
        "[...document.images].some(image => image.src.startsWith('blob:') && image.naturalWidth > 100)"
    )


def keep_part(page, path: Path, top: int, height: int) -> None:
    """For the README: what is right of the navigation, in 128 colours, which is some 30 kB."""
    shot = page.screenshot(clip={"x": 198, "y": top, "width": 1060, "height": height})
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(BytesIO(shot)).convert("RGB").quantize(128).save(path, optimize=True)


def test_the_sweep_expands_to_its_trials(page, runs, finished):
    opened(page, runs)
    assert names(page, bool) == ["quickstart"]
    expand(page)
    board = Leaderboard.read(read_spec(finished)[1])
    trials = {f"{'control-' * entry.control}{entry.trial.name}" for entry in board.entries}
    assert set(names(page, lambda found: len(found) > len(trials))) == {"quickstart"} | trials


def test_sorting_shows_the_best_first(page, runs, finished, screenshots):
    opened(page, runs)
    tick_columns(page, "Dataset", "Source", "Models", "head", "rank", "prompt.lr", "best_val_top1", "test_top1")
    page.get_by_test_id("sort-header-best_val_top1").click()
    entries = Leaderboard.read(read_spec(finished)[1]).entries
    accuracy = {f"{'control-' * entry.control}{entry.trial.name}": entry.best()["val_top1"] for entry in entries}
    best_first = sorted(accuracy.values(), reverse=True)
    found = names(page, lambda found: [accuracy.get(name) for name in found] == [*best_first, None])
    assert [accuracy.get(name) for name in found] == [*best_first, None]  # the sweep's own run has none
    keep_part(page, screenshots / "mlflow-trials.png", top=90, height=500)


def test_pictures_are_among_the_artifacts(page, runs, finished):
    opened(page, runs)
    page.get_by_role("link", name="quickstart").first.click()
    picture_is_shown(page, "report", "leaderboard.png")
    best = Outcome.read(finished).best().trial.name
    opened(page, runs)
    expand(page)
    page.get_by_role("link", name=best).first.click()
    page.wait_for_url(re.compile("runs/[0-9a-f]{32}"))
    picture_is_shown(page, "bundle", "prompt.png")


def test_comparing_runs_draws_parallel_coordinates(page, runs, finished, screenshots):
    opened(page, runs)
    expand(page)
    entries = len(Leaderboard.read(read_spec(finished)[1]).entries)
    rows = names(page, lambda found: len(found) > entries)
    trials = [place for place, name in enumerate(rows) if name != "quickstart" and not name.startswith("control-")]
    for place in trials:
        page.locator(f".ag-row[row-index='{place}'] input[type=checkbox]").filter(visible=True).check(force=True)
    page.get_by_role("button", name="Compare").click()
    page.get_by_role("heading", name=f"Comparing {len(trials)} Runs").wait_for()
    page.get_by_role("button", name="Clear All").click()
    choose_axes(page, 0, "head", "prompt.lr", "rank")
    choose_axes(page, 1, "best_val_top1")
    page.locator(".parcoords .axis-title", has_text="best_val_top1").wait_for()
    drawn = page.locator(".parcoords .axis-title").all_text_contents()
    assert drawn == ["head", "prompt.lr", "rank", "best_val_top1"]
    keep_part(page, screenshots / "mlflow-compare.png", top=50, height=540)


@pytest.mark.alone
def test_500_trials_are_there_in_five_seconds(browser, tmp_path):
    start = time.monotonic()
    spec = recorded_synthetic(tmp_path)
    print(f"500 trials: made and sent to MLflow in {time.monotonic() - start:.0f} s")
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    experiment = mlflow.MlflowClient(store).get_experiment_by_name("lorvp").experiment_id
    with Server(tmp_path, store) as server:
        address = f"{server.uri}/#/experiments/{experiment}/runs"
        visits = [seconds_to_trials(browser, address, spec.name) for _ in range(5)]
        took = visits[2:]  # MLflow's own job runners still start beside the first ones
    print(f"500 trials: shown in {', '.join(f'{seconds:.1f}' for seconds in visits)} s; the first two don't count")
    assert sorted(took)[1] < 5, took


def seconds_to_trials(browser, address: str, sweep: str) -> float:
    """Of a new visitor, until the sweep's trials are in the table."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.add_init_script(NO_ASSISTANT)
    page = context.new_page()
    start = time.monotonic()
    page.goto(address)
    page.get_by_role("link", name=sweep).first.wait_for()
    expand(page)
    shown = names(page, lambda found: len(found) > 10)
    took = time.monotonic() - start
    context.close()
    assert len(shown) > 10
    return took


def recorded_synthetic(folder: Path) -> Spec:
    """A sweep of 500 trials that nobody trained, sent to MLflow as a driver sends it."""
    changes = [f"output={folder}", "search.trials=500", f"tracking.uri=sqlite:///{folder}/mlflow.db"]
    spec = spec_file.load(QUICKSTART, changes)
    trials = synthetic.make(spec, 500, stopped=200, failed=10)
    tracker = Tracker(spec, "synthetic", QUICKSTART.read_text())
    for trial in trials:
        tracker.record(trial, trial.results(), control=False)
        tracker.end(trial, trial.ended(), control=False)
    return spec
