from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.errors import NotFound, PermanentLaunchError, TransientLaunchError
from leoflow_celery.executors.base import LaunchSpec
from leoflow_celery.testing.stub import Cancellation, ScriptedExecutor, already, permanent, started, transient


def launch(task_id="extract", number=1):
    request = TaskRequest(
        task_instance_id=f"{task_id}-{number}",
        dag_id="d",
        run_id="r",
        task_id=task_id,
        operator="bash",
        entrypoint="true",
    )
    return LaunchSpec(request, AttemptId(request.task_instance_id))


def test_a_script_is_followed_and_then_everything_starts():
    executor = ScriptedExecutor({"extract": [transient(2, retry_after_seconds=3), started(), permanent("forbidden")]})
    for _ in range(2):
        with pytest.raises(TransientLaunchError) as busy:
            executor.execute(launch())
    assert busy.value.retry_after_seconds == 3
    assert not executor.execute(launch()).already
    with pytest.raises(PermanentLaunchError) as wrong:
        executor.execute(launch(number=2))
    assert wrong.value.reason == "forbidden"
    assert not executor.execute(launch(number=3)).already
    assert [spec.request.task_instance_id for spec in executor.launches] == ["extract-1", "extract-3"]
    assert len(executor.calls) == 5


def test_an_attempt_that_was_started_before_is_no_launch():
    executor = ScriptedExecutor({"extract": [already()]})
    assert executor.execute(launch()).already
    assert executor.launches == []
    assert executor.is_started(launch().attempt)


def test_the_reporter_hears_of_ends():
    heard = []
    lost = Outcome.failed(FailureReason.PROCESS_LOST, "gone")
    executor = ScriptedExecutor({"extract": [started(ends=lost)]}, lambda *event: heard.append(event))
    executor.execute(launch())
    executor.execute(launch("load"))
    executor.report(launch("load").attempt, lost)
    assert heard == [(launch().attempt, lost), (launch("load").attempt, lost)]


def test_only_started_attempts_end():
    executor = ScriptedExecutor(reporter=lambda *event: None)
    with pytest.raises(NotFound):
        executor.report(launch().attempt, Outcome.success())


def test_cancellations_are_recorded():
    executor = ScriptedExecutor()
    executor.cancel(launch().name, 7)
    assert executor.cancellations == [Cancellation(launch().name, 7)]


def test_many_threads_start_an_attempt_once():
    executor = ScriptedExecutor()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: executor.execute(launch()), range(200)))
    assert sum(not result.already for result in results) == 1
    assert len(executor.launches) == 1
