"""Flower over a real system: each attempt is one task with its true start, runtime, host and outcome, and no secret."""

from __future__ import annotations

import ast
import os
import re
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families

from leoflow_celery.client import Handle
from leoflow_celery.domain.states import TERMINAL
from tests.support.browser import Browser, browsing
from tests.support.flower import FlowerSite
from tests.support.http_target import HttpTarget
from tests.support.ports import free_port
from tests.support.redis_server import RedisServer
from tests.support.system import System, http_task
from tests.support.waiting import wait_until

CANARY = "c4n4ry-" + secrets.token_hex(6)
BROKER_PASSWORD = "br0ker-" + secrets.token_hex(6)
SOURCE = "def rows(password):\n    return [1, 2, 3]\n"
#: The user's command waits for a file, so that its runtime and its start are the command's own and not a launch's.
HELD = "until [ -e {go} ]; do sleep 0.05; done; exit 3"


@dataclass(frozen=True)
class Monitored:
    """A system with work done, and Flower that watched."""

    system: System
    flower: FlowerSite
    handles: dict[str, Handle]


def subprocess_task(name: str, operator: str, entrypoint: str, **fields: Any) -> dict[str, Any]:
    request = {**http_task("http://unused/", name), "operator": operator, "entrypoint": entrypoint, **fields}
    return {**request, "http_request": None, "env": {"TOKEN": CANARY}}


def start_flower(system: System) -> FlowerSite:
    site = FlowerSite(f"http://127.0.0.1:{free_port()}", "ops", secrets.token_hex(12))
    env = {"FLOWER_BASIC_AUTH": f"{site.user}:{site.password}", "FLOWER_READ_ONLY": "true"}
    port = site.url.rpartition(":")[2]
    command = (sys.executable, "-m", "leoflow_celery.cli", "flower", "--address=127.0.0.1")
    system.start("flower", *command, f"--port={port}", env=env)
    site.wait_until_up()
    wait_until(lambda: len(site.workers()) >= 3, 60, "Flower to know the workers", 0.5)
    return site


@pytest.fixture(scope="module")
def redis_with_password(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = RedisServer(tmp_path_factory.mktemp("redis"), session_wide=True)
    server.start()
    with redis.Redis(port=server.port) as client:
        client.config_set("requirepass", BROKER_PASSWORD)
    yield f"redis://:{BROKER_PASSWORD}@127.0.0.1:{server.port}/0"
    server.stop()


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory, redis_with_password: str) -> Iterator[Monitored]:
    directory = tmp_path_factory.mktemp("flower")
    go = directory / "go"
    with System(directory, redis_with_password) as system, HttpTarget() as target:
        system.start_gateway()
        # Named as the package names them, for what their pages show.
        named = {f"workers.{name}": ("-n", f"{name}@%h") for name in ("subprocess", "inline", "control")}
        system.start_workers(*named, options=named)
        flower = start_flower(system)
        headers = {"Authorization": f"Bearer {CANARY}"}
        requests = {
            "value": subprocess_task("value", "python", "dag:rows", source=SOURCE, call_args={"password": CANARY}),
            "exit 3": subprocess_task("exit-3", "bash", HELD.format(go=go)),
            "call": http_task(target.url("call"), "call", http={"headers": headers}),
            "not found": http_task(target.url("gone", status=404), "not-found", http={"headers": headers}),
        }
        handles = {name: system.client.submit(request) for name, request in requests.items()}
        wait_until(lambda: handles["exit 3"].task_instance().started_at, 60, "the held command to start")
        flower.wait_for_state(handles["exit 3"].id, "STARTED")
        go.touch()
        for name, handle in handles.items():
            wait_until(lambda handle=handle: handle.state() in TERMINAL, 60, f"{name} to end")
            flower.wait_for_state(handle.id, "SUCCESS" if name in ("value", "call") else "FAILURE")
        yield Monitored(system, flower, handles)


@pytest.fixture
def flower(monitored: Monitored) -> FlowerSite:
    monitored.system.shown_on_failure()
    return monitored.flower


@pytest.fixture
def browser(monitored: Monitored) -> Iterator[Browser]:
    with browsing(monitored.flower.user, monitored.flower.password) as opened:
        yield opened


def screenshots(tmp_path: Path) -> Path:
    """LEOFLOW_TEST_SCREENSHOTS keeps what the browser saw."""
    return Path(os.environ.get("LEOFLOW_TEST_SCREENSHOTS") or tmp_path)


def test_each_attempt_is_one_task_with_its_true_times_host_and_outcome(
    monitored: Monitored, flower: FlowerSite
) -> None:
    executions = flower.tasks()
    assert executions.keys() == {handle.id for handle in monitored.handles.values()}
    for handle in monitored.handles.values():
        view, task = handle.task_instance(), executions[handle.id]
        assert view.started_at is not None
        assert view.ended_at is not None
        assert task["worker"].endswith(f"{view.executor}@{view.hostname}")
        # The worker itself tells of an inline success, and it looks at its clock a little later than SQL does.
        exactness = 1.0 if handle is monitored.handles["call"] else 0.001
        ended = task["succeeded"] or task["failed"]
        assert task["started"] == pytest.approx(view.started_at, abs=exactness)
        assert ended == pytest.approx(view.ended_at, abs=exactness)
        assert task["runtime"] == pytest.approx(view.ended_at - view.started_at, abs=exactness)
        assert task["name"] == f"d.{view.task_id}"
        assert ast.literal_eval(task["kwargs"]) == {
            "run": view.run_id,
            "attempt": str(view.attempt),
            "executor": view.executor,
            "operator": view.operator,
            "image": "",
        }
    by_name = {name: executions[handle.id] for name, handle in monitored.handles.items()}
    # What ran in a process and what a worker called look alike.
    assert by_name["value"]["result"] == "'array of 3 items'"
    assert by_name["call"]["result"] == "'object with 2 keys'"
    assert by_name["exit 3"]["result"].startswith("non_zero_exit: ")
    assert by_name["not found"]["result"].startswith("http_status: ")
    assert "non_zero_exit" in by_name["exit 3"]["exception"]
    assert "http_status" in by_name["not found"]["exception"]


def details(browser: Browser) -> dict[str, str]:
    """The labelled facts of a task's page."""
    return dict(zip(browser.texts(".detail-row dt"), browser.texts(".detail-row dd"), strict=True))


def test_the_page_of_a_failed_task_says_why(
    monitored: Monitored, flower: FlowerSite, browser: Browser, tmp_path: Path
) -> None:
    handle = monitored.handles["exit 3"]
    view = handle.task_instance()
    browser.open(f"{flower.url}/task/{handle.id}")
    browser.wait_for(".detail-row dd", handle.id)
    shown = details(browser)
    browser.screenshot(screenshots(tmp_path) / "flower-failed-task.png")
    assert shown["Name"] == "d.t-exit-3"
    assert shown["Status"] == "FAILURE"
    assert "non_zero_exit" in shown["Exception"]
    assert "exit code 3" in shown["Exception"]
    assert "non_zero_exit" in shown["Traceback"]
    assert shown["Worker"] == f"subprocess@{view.hostname}"
    assert str(view.attempt) in shown["Keyword arguments"]
    assert view.run_id in shown["Keyword arguments"]


def test_the_page_of_a_successful_task_sums_its_value_up(
    monitored: Monitored, flower: FlowerSite, browser: Browser, tmp_path: Path
) -> None:
    handle = monitored.handles["value"]
    browser.open(f"{flower.url}/task/{handle.id}")
    browser.wait_for(".detail-row dd", handle.id)
    shown = details(browser)
    browser.screenshot(screenshots(tmp_path) / "flower-task.png")
    assert shown["Status"] == "SUCCESS"
    assert "array of 3 items" in shown["Result"]
    assert re.match(r"[\d.]+ (ms|s)", shown["Runtime"]), shown["Runtime"]


def test_the_list_of_tasks_shows_them_all(
    monitored: Monitored, flower: FlowerSite, browser: Browser, tmp_path: Path
) -> None:
    browser.open(f"{flower.url}/tasks")
    last = list(monitored.handles.values())[-1]
    rows = browser.wait_for("table tbody tr", last.id)
    browser.screenshot(screenshots(tmp_path) / "flower-tasks.png")
    for handle in monitored.handles.values():
        view = handle.task_instance()
        [row] = [row for row in rows if handle.id in row]
        assert row.startswith(f"d.{view.task_id} ")
        assert f"{view.executor}@{view.hostname}" in "".join(row.split())  # the column breaks it
        assert view.reason is None or view.reason in row
    heads = [text for text in browser.texts("#tasks-table thead th, table thead th") if text]
    assert [head.title() for head in heads[:4]] == ["Name", "State", "Result", "Started"]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("d.t-exit-3", {"exit 3"}),
        ("kwargs:run=r", {"value", "exit 3", "call", "not found"}),
        ("kwargs:run=nope", set()),
        ("non_zero_exit", {"exit 3"}),
        ("result:http_status", {"not found"}),
        ("kwargs:executor=inline", {"call", "not found"}),
        ("state:FAILURE kwargs:executor=subprocess", {"exit 3"}),
    ],
)
def test_rows_are_found_by_dag_run_and_reason(
    monitored: Monitored, flower: FlowerSite, words: str, found: set[str]
) -> None:
    answer = flower.get(f"/api/tasks?search={quote(words)}").json()
    assert answer.keys() == {monitored.handles[name].id for name in found}


def test_the_api_reads_results(monitored: Monitored, flower: FlowerSite) -> None:
    answer = flower.get(f"/api/task/result/{monitored.handles['value'].id}").json()
    assert (answer["state"], answer["result"]) == ("SUCCESS", [1, 2, 3])
    failed = flower.get(f"/api/task/result/{monitored.handles['exit 3'].id}").json()
    assert failed["state"] == "FAILURE"
    assert "non_zero_exit" in str(failed["result"])


def test_nothing_is_shown_without_the_password(flower: FlowerSite) -> None:
    paths = ("/", "/tasks", "/broker", "/api/tasks", "/api/workers", "/api/task/types")
    assert {path: flower.status_without_password(path) for path in paths} == dict.fromkeys(paths, 401)


def test_its_metrics_count_the_tasks(monitored: Monitored, flower: FlowerSite) -> None:
    families = text_string_to_metric_families(flower.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    ended = {
        (sample.labels["task"], sample.labels["type"]): sample.value
        for sample in samples
        if sample.name == "flower_events_total" and sample.labels["type"] in ("task-succeeded", "task-failed")
    }
    names = {"value": "succeeded", "call": "succeeded", "exit-3": "failed", "not-found": "failed"}
    assert ended == {(f"d.t-{name}", f"task-{end}"): 1 for name, end in names.items()}


def test_no_secret_is_shown_anywhere(monitored: Monitored, flower: FlowerSite, browser: Browser) -> None:
    env = monitored.system.env
    forbidden = {CANARY, BROKER_PASSWORD, env["LEOFLOW_JWT_SECRET"], env["LEOFLOW_SEAL_KEYS"]}
    seen = dict(flower.everything())
    assert {path for path, text in seen.items() for secret in forbidden if secret in text} == set()
    assert sum(path.startswith("/worker/") for path in seen) >= 3, "no worker's page was looked at"
    assert not any(re.search(r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}", text) for text in seen.values())
    for worker in flower.workers():
        browser.open(f"{flower.url}/worker/{worker}")
        browser.wait_for("body", worker)
        assert not any(secret in browser.source() for secret in forbidden)
