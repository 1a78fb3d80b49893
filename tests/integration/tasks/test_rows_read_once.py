"""No row of a try is read twice on the way of one event."""

from __future__ import annotations

from typing import Any

import pytest

from leoflow_celery.client import Client
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reap import Verdict
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.queueing.messages import AdvanceTry, AttemptEnded, seal_message
from leoflow_celery.store import Store
from leoflow_celery.store.attempts import FinishCondition
from leoflow_celery.store.views import TaskInstanceView
from leoflow_celery.tasks import maintenance, results
from leoflow_celery.tasks.completion import complete_due
from leoflow_celery.tasks.context import services_of
from tests.support.statements import recorded
from tests.support.system import System

EVICTED = Outcome.failed(FailureReason.EVICTED, "the node was drained")
EXIT_1 = Outcome.failed(FailureReason.NON_ZERO_EXIT, "exit 1", 1)


@pytest.fixture
def client(own_system: System) -> Client:
    """Nothing runs: the test is the worker."""
    return own_system.client


def submitted(client: Client, name: str) -> TaskInstanceView:
    request = {"task_instance_id": name, "dag_id": "d", "run_id": "r", "task_id": name, "operator": "bash"}
    return client.submit({**request, "entrypoint": "true"}).task_instance()


def store_of(client: Client) -> Store:
    return services_of(client.app).store


def task(client: Client, name: str) -> Any:
    assert results.record_end.name.startswith("leoflow.results."), "the tasks are registered"
    return client.app.tasks[name]


def reads(statements: list[tuple[str, Any]]) -> int:
    return sum(text.startswith("SELECT") and "FROM task_instance" in text for text, _ in statements)


@pytest.mark.parametrize("outcome", [Outcome.success(), EXIT_1, EVICTED], ids=lambda one: str(one.reason))
def test_record_reads_the_try_once(client: Client, outcome: Outcome) -> None:
    view = submitted(client, "recorded")
    ended = AttemptEnded(view.attempt, outcome, return_value="1")
    sealed = seal_message(services_of(client.app).keys, "subprocess", ended)
    with recorded(store_of(client)) as statements:
        task(client, "leoflow.results.record").run(speaker="subprocess", sealed=sealed)
    assert reads(statements) == 1
    after = client.task_instance("recorded")
    assert (after.launch, after.state) == ((2, TaskState.QUEUED) if outcome is EVICTED else (1, outcome.state))


def test_settle_reads_the_try_once_however_many_wait_for_it(client: Client) -> None:
    view, store = submitted(client, "ended"), store_of(client)
    for number in range(3):
        store.completions.register(f"another-{number}", "ended", 1, {"task": "leoflow.dispatch"})
    store.attempts.finish(view.attempt, EXIT_1)
    sealed = seal_message(services_of(client.app).keys, "control", AdvanceTry("ended", 1))
    with recorded(store) as statements:
        task(client, "leoflow.results.advance").run(sealed=sealed, speaker="control")
    assert reads(statements) == 1
    assert client.app.AsyncResult("another-2").state == "FAILURE"


@pytest.mark.parametrize("reason", [FailureReason.CANCELLED, FailureReason.AGENT_LOST])
def test_giving_up_reads_nothing_that_the_sweep_read(client: Client, reason: FailureReason) -> None:
    view = submitted(client, "given-up")
    verdict = Verdict(reason, "silent")
    with recorded(store_of(client)) as statements:
        assert maintenance._give_up(task(client, "leoflow.maintenance.reap"), view, verdict, FinishCondition())
    assert reads(statements) == 0
    assert client.task_instance("given-up").launch == (1 if reason is FailureReason.CANCELLED else 2)


def test_the_sweep_of_completions_reads_all_tries_at_once(client: Client) -> None:
    store = store_of(client)
    for number in range(4):
        store.attempts.finish(submitted(client, f"ti-{number}").attempt, EXIT_1)
    with recorded(store) as statements:
        assert complete_due(client.app, services_of(client.app)) == 4
    assert reads(statements) == 1
