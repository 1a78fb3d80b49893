"""Revoking the Celery id of a try cancels the try, queued or running; a broadcast of a stranger does nothing."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from celery import Celery
from celery.result import AsyncResult

from leoflow_celery.app import create_app
from leoflow_celery.cli.deployment import keys_for
from leoflow_celery.client import Handle
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import ConfigurationError, TaskFailed
from leoflow_celery.settings import Settings
from tests.support.flower import FlowerSite
from tests.support.ports import free_port
from tests.support.system import ROOT, System, environment, http_task
from tests.support.waiting import wait_until


@pytest.fixture
def system(own_system: System) -> System:
    """The control plane obeys every command, and nothing consumes the queue of subprocess tasks yet."""
    env = {"LEOFLOW_BROKER_REMOTE_CONTROL": "all"}
    own_system.start_worker("workers.control", env=env)
    return own_system


def start_subprocess(system: System) -> None:
    system.start_gateway()
    system.start_worker("workers.subprocess", env={"LEOFLOW_BROKER_REMOTE_CONTROL": "all"})


def submitted(system: System, entrypoint: str) -> Handle:
    fields = {"operator": "bash", "entrypoint": entrypoint, "http_request": None}
    return system.client.submit({**http_task("http://unused/"), **fields})


def running(system: System) -> Handle:
    handle = submitted(system, "echo begun; exec sleep 300")
    wait_until(lambda: handle.state() is TaskState.RUNNING, 60, "the command to run")
    return handle


def check_cancelled_once(system: System, handle: Handle, waiting: AsyncResult[Any] | None = None) -> None:
    """SQL has one end, with its reason; who waits hears the same; nothing was started again."""
    view = wait_until(lambda: found if (found := handle.task_instance()).is_terminal else None, 60, "the try to end")
    assert (view.state, view.reason) == (TaskState.FAILED, FailureReason.CANCELLED)
    assert view.message
    assert view.launch == 1
    kinds = [event.event for event in system.client.events(handle.attempt.task_instance_id)]
    assert (kinds.count("cancel_requested"), kinds.count("finished")) == (1, 1)
    with pytest.raises(TaskFailed, match="cancelled"):
        (waiting or handle).get(timeout=30)


@pytest.fixture
def key_of_flower(system: System) -> dict[str, str]:
    """What a process holds that may cancel and nothing else."""
    with environment(system.env):
        return keys_for("cancel")


@pytest.fixture
def monitor_app(system: System, key_of_flower: dict[str, str]) -> Iterator[Celery]:
    """Our app in a process without SQL and without other keys, as Flower's."""
    with environment({**system.env, **key_of_flower, "LEOFLOW_DATABASE_URL": "sqlite:////nowhere/leoflow.db"}):
        settings = Settings.load()
    app = create_app(settings=settings)
    yield app
    app.close()


def test_a_queued_try_is_cancelled_by_whatever_revokes_it(system: System, monitor_app: Celery) -> None:
    by_revoke, by_result, by_name = (submitted(system, "exit 0") for _ in range(3))
    monitor_app.control.revoke(by_revoke.id)
    monitor_app.AsyncResult(by_result.id).revoke(terminate=True, signal="KILL")
    monitor_app.control.terminate([by_name.id])
    for handle in (by_revoke, by_result, by_name):
        check_cancelled_once(system, handle)
    # The messages that still lie there start nothing.
    start_subprocess(system)
    later = submitted(system, "exit 0")
    later.get(timeout=60)
    for handle in (by_revoke, by_result, by_name):
        check_cancelled_once(system, handle)


def test_a_running_try_is_stopped(system: System, monitor_app: Celery) -> None:
    start_subprocess(system)
    handle = running(system)
    monitor_app.control.revoke(handle.id, terminate=True)
    check_cancelled_once(system, handle)


def test_celery_control_revoke_says_what_it_did(system: System, key_of_flower: dict[str, str]) -> None:
    handle = submitted(system, "exit 0")
    command = (sys.executable, "-m", "celery", "-A", "leoflow_celery.app", "control", "revoke", handle.id)
    env = {**system.env, **key_of_flower}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert f"asked to cancel {handle.id}" in done.stdout
    check_cancelled_once(system, handle)


def test_the_id_of_a_dispatch_cancels_its_try(system: System, monitor_app: Celery) -> None:
    task = {**http_task("http://unused/"), "operator": "bash", "entrypoint": "exit 0"}
    del task["http_request"]
    sent = monitor_app.send_task("leoflow.dispatch", [task], queue="dispatch")
    monitor_app.control.revoke(sent.id)  # perhaps before it is recorded
    with pytest.raises(TaskFailed, match="cancelled"):
        sent.get(timeout=60)
    view = system.client.task_instance(task["task_instance_id"])
    assert (view.state, view.reason) == (TaskState.FAILED, FailureReason.CANCELLED)


def test_flower_cancels_queued_and_running_tries(system: System, key_of_flower: dict[str, str]) -> None:
    start_subprocess(system)
    site = FlowerSite(f"http://127.0.0.1:{free_port()}", "ops", secrets.token_hex(12))
    env = {**key_of_flower, "FLOWER_BASIC_AUTH": f"{site.user}:{site.password}"}
    command = (sys.executable, "-m", "celery", "-A", "leoflow_celery.app", "flower", "--address=127.0.0.1")
    system.start("flower", *command, f"--port={site.url.rpartition(':')[2]}", env=env)
    site.wait_until_up()
    begun = running(system)
    system.process("workers.subprocess").stop()
    queued = submitted(system, "exit 0")
    for handle, query in ((begun, "?terminate=true"), (queued, "")):
        site.wait_for_state(handle.id, "STARTED" if handle is begun else "PENDING")
        url = f"{site.url}/api/task/revoke/{handle.id}{query}"
        answer = requests.post(url, auth=(site.user, site.password), timeout=30)
        assert answer.ok, answer.text
        check_cancelled_once(system, handle)


def test_a_forged_broadcast_changes_nothing(system: System) -> None:
    start_subprocess(system)
    begun = running(system)
    system.process("workers.subprocess").stop()
    queued = submitted(system, "exit 0")
    system.start_worker("workers.inline", env={"LEOFLOW_BROKER_REMOTE_CONTROL": "all"})
    stranger = Celery("stranger", broker=system.broker_url, set_as_current=False)
    stranger.conf.broker_transport_options = {"global_keyprefix": "leoflow:"}
    try:
        for celery_id in (begun.id, queued.id):
            stranger.control.revoke(celery_id, terminate=True, signal="KILL")
        stranger.control.terminate([queued.id], signal="KILL")
        stranger.control.broadcast("hello", {"from_node": "x@y", "revoked": {queued.id: 1}})
        for worker in ("workers.control", "workers.inline"):
            system.process(worker).wait_for_line("control.refused.*hello", 30)
    finally:
        stranger.close()
    system.start_worker("workers.subprocess", name="again")
    queued.get(timeout=60)
    assert queued.task_instance().launch == 1
    assert begun.state() is TaskState.RUNNING
    assert system.client.cancel(begun.attempt.task_instance_id)
    check_cancelled_once(system, begun)


def test_who_has_no_key_cancels_nothing_and_hears_why(system: System) -> None:
    handle = submitted(system, "exit 0")
    app = create_app(settings=system.load_settings(SEAL_KEYS=""))
    try:
        with pytest.raises(ConfigurationError, match="LEOFLOW_SEAL_KEYS"):
            app.control.revoke(handle.id)
    finally:
        app.close()
    assert handle.state() is TaskState.QUEUED
