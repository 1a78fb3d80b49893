"""The report in a real browser: what is drawn, filtered, zoomed, reached by keys, and told to a screen reader."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest
from selenium.webdriver import Keys

from leoflow_celery.domain.states import RunState, TaskState
from leoflow_celery.report.data import Found, build
from leoflow_celery.report.page import render
from tests.support.browser import Browser, browsing
from tests.support.reports import HOSTILE, T0, large, run_view, view

SPECS = {
    "fetch": {"task_id": "fetch", "type": "http_api", "depends_on": []},
    "clean": {"task_id": "clean", "type": "python", "depends_on": ["fetch"]},
    "train": {"task_id": "train", "type": "python", "depends_on": ["clean"]},
    "notify": {"task_id": "notify", "type": "bash", "depends_on": ["clean"]},
    "publish": {"task_id": "publish", "type": "bash", "depends_on": ["train", "notify"]},
}


class Show(Protocol):
    """Opens the page of a run."""

    def __call__(
        self, found: Found, dag_id: str = ..., width: int = ..., height: int = ..., **prefers: bool
    ) -> None: ...


LOG = [f"epoch {n}" for n in range(20)] + ["torch.OutOfMemoryError: no memory"]


def sales() -> Found:
    """A run of five tasks: one tried twice, one failed, one that never ran."""
    none = dict.fromkeys(("sent_at", "launched_at", "started_at"))
    failed = replace(view("train", at=30, ran=20), state=TaskState.FAILED, reason="oom_killed", message="killed at 2Gi")
    tries = [
        replace(view("fetch", ran=2), state=TaskState.FAILED, reason="http_status", message="it answered 425"),
        replace(view("fetch", at=8, ran=1), try_number=2),
        view("clean", at=14, ran=12),
        failed,
        view("notify", at=30, ran=1),
        replace(view("publish", at=54), **none, state=TaskState.UPSTREAM_FAILED, ended_at=T0 + 54),
    ]
    earlier = [run_view(f"before-{n}", at=-500 * (n + 1), seconds=40.0 + 5 * n) for n in range(6)]
    return Found(
        run_view(seconds=55, state=RunState.FAILED),
        tries,
        T0 + 60,
        SPECS,
        xcoms=[("clean", "return_value", 2_048)],
        earlier=earlier,
        seconds={one.run_id: {"clean": 6.0, "notify": 1.0} for one in earlier},
        tail_of=lambda one: LOG if one.task_id == "train" else [],
    )


@pytest.fixture
def browser() -> Iterator[Browser]:
    with browsing("nobody", "nothing") as opened:
        yield opened


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Show]:
    """Opens the page of a run and waits until it is drawn; afterwards the console has no complaint."""

    def open_page(
        found: Found, dag_id: str = "sales", width: int = 1_300, height: int = 1_500, **prefers: bool
    ) -> None:
        file = tmp_path / "run.html"
        file.write_text(render(build("default", dag_id, "r1", found)))
        browser.screen(width, height, **prefers)
        browser.complaints()
        browser.open(file.as_uri())
        browser.wait_for("#count", "shown")

    yield open_page
    assert browser.complaints() == []


def screenshot(browser: Browser, tmp_path: Path, name: str) -> None:
    """LEOFLOW_TEST_SCREENSHOTS keeps what the browser saw."""
    browser.screenshot(Path(os.environ.get("LEOFLOW_TEST_SCREENSHOTS") or tmp_path) / f"report-{name}.png")


def shown_tasks(browser: Browser) -> list[str]:
    """The tasks of the rows that are visible."""
    return [text for text in browser.texts("#rows tr th") if text]


def test_the_page_shows_states_times_reasons_and_the_graph(show: Show, browser: Browser, tmp_path: Path) -> None:
    show(sales())
    screenshot(browser, tmp_path, "light")
    [title] = browser.texts("h1")
    assert title == "sales r1 ✗ failed"
    assert shown_tasks(browser) == ["fetch", "clean", "train", "notify", "publish"]
    rows = dict(zip(shown_tasks(browser), browser.texts("#rows tr"), strict=True))
    assert "✓ success" in rows["clean"]
    assert "12.0 s" in rows["clean"]
    assert "6.00 s +100 %" in rows["clean"]
    assert "oom_killed" in rows["train"]
    assert "⊘ upstream failed" in rows["publish"]
    why = " ".join(browser.texts("#failures article"))
    for text in ("oom_killed", "killed at 2Gi", "torch.OutOfMemoryError"):
        assert text in why
    assert len(browser.texts(".node")) == 5
    assert len(browser.texts("path.edge")) == 5
    assert len(browser.texts(".chart li")) == 7
    # The bar of the second try stands right of the first's, below it, and at its time.
    box = "getBoundingClientRect().toJSON()"
    first = "document.querySelectorAll('#rows tr:first-child .p-running')"
    boxes = browser.run(f"return [...{first}].map((one) => one.{box})")
    lane = browser.run(f"return document.querySelector('#rows tr:first-child .lanes').{box}")
    assert len(boxes) == 2
    assert boxes[1]["top"] > boxes[0]["top"]
    assert boxes[1]["left"] == pytest.approx(lane["left"] + lane["width"] * 11 / 55, abs=2)
    assert boxes[1]["width"] == pytest.approx(lane["width"] / 55, abs=2)


def test_words_and_states_filter_rows_and_graph(show: Show, browser: Browser) -> None:
    show(sales())
    browser.write("#filter", "OOM")
    assert shown_tasks(browser) == ["train"]
    assert browser.texts("#count") == ["1 of 5 tasks shown"]
    assert browser.run("return document.querySelectorAll('.node.off').length") == 4
    browser.write("#filter", "torch.Out")  # a line of its log
    assert shown_tasks(browser) == ["train"]
    browser.run("document.querySelector('#filter').value=''")
    browser.click("[data-state=success]")
    assert shown_tasks(browser) == ["fetch", "clean", "notify"]
    browser.click("[data-state=upstream_failed]")
    assert shown_tasks(browser) == ["fetch", "clean", "notify", "publish"]
    browser.click("[data-state=success]")
    browser.click("[data-state=upstream_failed]")
    assert browser.texts("#count") == ["5 of 5 tasks shown"]


def test_the_timeline_and_the_graph_zoom(show: Show, browser: Browser) -> None:
    show(sales())

    def width(selector: str) -> float:
        return float(browser.run("return document.querySelector(arguments[0]).getBoundingClientRect().width", selector))

    for name, selector in (("gantt", ".lanes"), ("graph", "#graph-scroll svg")):
        before = width(selector)
        browser.click(f"#{name}-in")
        browser.click(f"#{name}-in")
        larger = width(selector)
        assert larger > before * 1.3
        browser.click(f"#{name}-out")
        assert before < width(selector) < larger
        browser.click(f"#{name}-fit")
        assert width(selector) <= width(f"#{name}-scroll")
    before = width(".lanes")
    browser.run("document.querySelector('#gantt-scroll').focus()")
    browser.press("+", "+")
    assert width(".lanes") > before * 1.3


def test_everything_is_reached_by_keys(show: Show, browser: Browser, tmp_path: Path) -> None:
    show(sales())
    active = "return document.activeElement.getAttribute('aria-label') || document.activeElement.id"
    browser.press("/")
    assert browser.run(active) == "filter"
    browser.run("document.querySelector('.node').focus()")
    for key, task in (
        (Keys.ARROW_RIGHT, "clean"),
        (Keys.ARROW_RIGHT, "train"),
        (Keys.ARROW_DOWN, "notify"),
        (Keys.ARROW_UP, "train"),
        (Keys.ARROW_RIGHT, "publish"),
        (Keys.ARROW_LEFT, "train"),
    ):
        browser.press(key)
        assert browser.run(active).startswith(f"{task}, "), key
    browser.press(Keys.ENTER)
    [title] = browser.texts("#d-title")
    assert title == "train ✗ failed"
    screenshot(browser, tmp_path, "details")
    details = browser.texts("#d-body")[0]
    for text in ("oom_killed", "host-1", "running", "20.0 s", "epoch 19"):
        assert text in details
    browser.press(Keys.ESCAPE)
    assert browser.run("return document.querySelector('#details').open") is False
    assert browser.run(active).startswith("train, ")  # the focus is back where it was
    browser.run("document.querySelector('[data-task]').focus()")
    browser.press(Keys.ENTER)
    assert browser.texts("#d-title") == ["fetch ✓ success"]
    assert "it answered 425" in browser.texts("#d-body")[0]


def test_a_task_shows_the_sizes_of_its_values_and_leads_to_its_neighbours(show: Show, browser: Browser) -> None:
    show(sales())
    browser.click("[data-task='1']")
    assert "return_value 2.0 KiB" in " ".join(browser.texts("#d-body tbody tr"))
    browser.click("#d-body dd button")
    assert browser.texts("#d-title") == ["fetch ✓ success"]
    browser.click("#close")


def test_a_screen_reader_is_told_all_of_it(show: Show, browser: Browser) -> None:
    show(sales())
    nodes = browser.accessibility()
    told = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if "role" in node]
    headings = [name for role, name in told if role == "heading"]
    assert headings[:2] == ["sales r1 ✗ failed", "What went wrong"]
    assert {"Timeline", "Graph", "Durations"} <= set(headings)
    assert ("rowheader", "clean") in told
    assert ("columnheader", "State") in told
    assert ("button", "train, failed, after clean") in told
    assert ("searchbox", "Filter") in told
    assert any("dispatch 1.00 s, queued 1.00 s" in name for _, name in told)
    assert [name for role, name in told if role == "button" and not name] == []


def test_it_is_dark_for_who_prefers_that(show: Show, browser: Browser, tmp_path: Path) -> None:
    def luminance(colour: str) -> float:
        red, green, blue = (int(part) / 255 for part in colour.removeprefix("rgb(").rstrip(")").split(","))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    colours = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    show(sales(), dark=True)
    screenshot(browser, tmp_path, "dark")
    back, text = map(luminance, browser.run(colours))
    assert back < 0.1 < 0.7 < text
    show(sales())
    back, text = map(luminance, browser.run(colours))
    assert text < 0.2 < 0.9 < back


def test_it_fits_a_phone(show: Show, browser: Browser, tmp_path: Path) -> None:
    long = {**SPECS, "x" * 150: {"task_id": "x" * 150, "depends_on": ["fetch"]}}
    show(replace(sales(), tasks=long), width=390, height=844, phone=True)
    screenshot(browser, tmp_path, "phone")
    assert browser.run("return document.documentElement.scrollWidth") <= 390
    assert browser.run("return document.querySelector('.lanes').getBoundingClientRect().left") < 390
    browser.click("[data-state=failed]")
    assert shown_tasks(browser) == ["train"]


def test_what_users_chose_is_text_and_nothing_else(show: Show, browser: Browser) -> None:
    specs = {HOSTILE: {"task_id": HOSTILE, "type": HOSTILE, "depends_on": []}}
    one = replace(view(HOSTILE), state=TaskState.FAILED, reason=HOSTILE, message=HOSTILE, hostname=HOSTILE)
    earlier = [run_view(HOSTILE, at=-100)]
    show(
        Found(
            run_view(),
            [one],
            T0,
            specs,
            xcoms=[(HOSTILE, HOSTILE, 3)],
            earlier=earlier,
            tail_of=lambda _: [HOSTILE, "<b>bold</b>"],
        ),
        HOSTILE,
    )
    browser.click("[data-task='0']")
    assert browser.run("return document.querySelectorAll('img,b').length") == 0
    seen = browser.run("return document.body.innerText")
    assert "<img src=x onerror=alert(1)>\\x1b[2J\\u202egnp" in seen
    assert "<b>bold</b>" in seen
    assert not {"\x1b", "\u202e"} & set(browser.source())


def test_a_script_that_got_in_would_not_run_and_nothing_is_asked_for(browser: Browser, tmp_path: Path) -> None:
    """The policy is the second wall: a page into which markup was put by hand runs none of it."""
    page = render(build("default", "sales", "r1", sales()))
    put_in = "<script>document.title='taken'</script><img src=http://127.0.0.1:9/x onerror=\"document.title='taken'\">"
    file = tmp_path / "run.html"
    file.write_text(page.replace("<header>", f"{put_in}<header>"))
    browser.complaints()
    browser.open(file.as_uri())
    browser.wait_for("#count", "shown")
    assert browser.run("return document.title") == "sales r1: failed"
    assert sum("Content Security Policy" in text for text in browser.complaints()) >= 2


def test_a_thousand_tasks_are_drawn_and_filtered_at_once(show: Show, browser: Browser, tmp_path: Path) -> None:
    found = large(1_000)
    before = time.monotonic()
    show(found)
    took = time.monotonic() - before
    screenshot(browser, tmp_path, "large")
    drawn = browser.run("return performance.getEntriesByType('navigation')[0].domComplete") / 1_000
    print(f"1,000 tasks: drawn in {drawn:.2f} s, made and opened in {took:.2f} s")  # noqa: T201
    # Two processors that others use as well: the bound is for what grows with the square of the tasks.
    assert drawn < 10
    assert len(browser.texts(".node")) == 1_000
    browser.write("#filter", "task-0777")
    assert browser.texts("#count") == ["1 of 1000 tasks shown"]
