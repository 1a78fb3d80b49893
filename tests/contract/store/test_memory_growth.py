"""After an OOM kill a try starts again with more memory, within its budget and the cap."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import ConfigurationError
from leoflow_celery.settings import MaintenanceSettings
from leoflow_celery.store import Store
from tests.contract.store.rows import EVICTED, claim, new_try, settings_for

OOM = Outcome.failed(FailureReason.OOM_KILLED, "the container was killed at its memory limit", 137)


@pytest.fixture
def store(migrated_database_url: str, tmp_path: Path) -> Iterator[Store]:
    made = store_with(migrated_database_url, tmp_path, max_relaunches=3)
    yield made
    made.close()


def store_with(url: str, root: Path, **maintenance: Any) -> Store:
    """A store with these settings of relaunches, capped at 512 MiB."""
    settings = settings_for(url, root)
    group = MaintenanceSettings(**{"oom_max_memory": "512Mi", "relaunch_backoff_seconds": 0, **maintenance})
    return Store(settings.model_copy(update={"maintenance": group}))


def submit(store: Store, limit: str | None = "128Mi", factor: float = 2.0, on: str = "kubernetes") -> AttemptId:
    resources = {"limits": {"memory": limit}}
    item = new_try("ti-1", on=ExecutorType(on), oom_memory_factor=factor, resources=resources)
    [done] = store.submissions.record([item])
    return done.attempt


def killed(store: Store) -> str:
    """One OOM kill of the current launch; what the event says of the limit, or the end's reason."""
    view = store.attempts.get("ti-1")
    finished = store.attempts.finish(view.attempt, OOM, claim(store, view.attempt))
    assert finished.recorded
    event = store.events.of("ti-1")[-1]
    if finished.relaunch:
        assert event.event == "relaunched"
        return str(event.details["memory_limit"])
    assert "memory_limit" not in event.details
    return str(store.attempts.get("ti-1").reason)


def test_a_limit_of_the_pod_override_is_the_one_that_grows(store: Store) -> None:
    part = {"spec": {"containers": [{"name": "task", "resources": {"limits": {"memory": "64Mi"}}}]}}
    resources = {"limits": {"memory": "1Gi"}}
    item = new_try("ti-1", on=ExecutorType.KUBERNETES, oom_memory_factor=2, resources=resources, pod_override=part)
    store.submissions.record([item])
    assert killed(store) == "64Mi → 128Mi"


def test_the_limit_grows_to_the_cap_and_then_the_kill_is_final(store: Store) -> None:
    submit(store)
    assert [killed(store) for _ in range(3)] == ["128Mi → 256Mi", "256Mi → 512Mi", "oom_killed"]
    view = store.attempts.get("ti-1")
    assert (view.state, view.launch, view.try_number, view.oom_relaunches) == (TaskState.FAILED, 3, 1, 2)
    assert view.memory.current(store.relaunch_policy) == 512 * 1024**2


def test_the_last_step_stops_at_the_cap(store: Store) -> None:
    submit(store, "200Mi")
    assert [killed(store) for _ in range(3)] == ["200Mi → 400Mi", "400Mi → 512Mi", "oom_killed"]


@pytest.mark.parametrize(
    ("limit", "factor", "on"),
    [(None, 2.0, "docker"), ("128Mi", 1.0, "docker"), ("1Gi", 2.0, "kubernetes"), ("128Mi", 2.0, "subprocess")],
    ids=["no limit", "switched off", "above the cap", "an executor without limits"],
)
def test_what_cannot_grow_is_final_at_once(store: Store, limit: str | None, factor: float, on: str) -> None:
    submit(store, limit, factor, on)
    assert killed(store) == "oom_killed"


def test_the_budget_is_shared_with_other_relaunches_which_grow_nothing(store: Store) -> None:
    submit(store, "64Mi")
    for _ in range(2):
        store.attempts.finish(store.attempts.get("ti-1").attempt, EVICTED)
    assert store.attempts.get("ti-1").oom_relaunches == 0
    assert killed(store) == "64Mi → 128Mi"
    assert killed(store) == "oom_killed"


def test_a_cancelled_try_does_not_grow(store: Store) -> None:
    attempt = submit(store)
    guard = claim(store, attempt)
    store.attempts.request_cancel("ti-1")
    assert store.attempts.finish(attempt, OOM, guard).relaunch is None
    assert store.attempts.get("ti-1").reason == "cancelled"


def test_a_cap_that_is_no_quantity_is_named(migrated_database_url: str, tmp_path: Path) -> None:
    store = store_with(migrated_database_url, tmp_path, oom_max_memory="lots")
    with pytest.raises(ConfigurationError, match="LEOFLOW_MAINTENANCE_OOM_MAX_MEMORY: 'lots' is not"):
        _ = store.attempts
    store.close()
