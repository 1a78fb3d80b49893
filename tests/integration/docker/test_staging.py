"""Staging volumes on the real Engine: the rules of claims, and what holds a volume."""

from __future__ import annotations

from dataclasses import replace

import pytest

from leoflow_celery.domain.staging import StagingPlan
from leoflow_celery.errors import PermanentLaunchError
from tests.support.engine import now

DAY = 24 * 3600


@pytest.fixture
def claim(docker_system) -> str:
    return f"{docker_system.system}-staging"


def plan(*, delete: dict[str, str] | None = None, keep: set[str] | None = None, **more) -> StagingPlan:
    return StagingPlan(**{"read_at": now(), "delete": delete or {}, "keep": frozenset(keep or ()), **more})


def test_a_volume_goes_when_its_run_succeeded_although_ended_containers_wait_for_their_grace(
    engine, docker_system, executor, claim
):
    launch = docker_system.launch(staging_claim=claim)
    executor.execute(launch)
    engine.wait(launch.name)
    assert engine.volumes(docker_system.system) == [claim]
    assert executor.collect_staging(plan(delete={claim: "run_succeeded"})) == {claim: "run_succeeded"}
    assert engine.volumes(docker_system.system) == []


def test_a_volume_that_a_container_still_uses_is_not_gone_yet(engine, docker_system, executor, claim):
    executor.execute(docker_system.launch(staging_claim=claim))
    running = docker_system.launch("running")
    mounts = [{"Type": "volume", "Source": claim, "Target": "/staging"}]
    docker_system.run_plain(running, "sleep", "1000", Mounts=mounts)
    assert executor.collect_staging(plan(delete={claim: "ttl_expired"})) == {}
    assert engine.status(running.name) == "running"
    executor.cancel(running.name, 0)
    engine.wait(running.name)
    assert executor.collect_staging(plan(delete={claim: "ttl_expired"})) == {claim: "ttl_expired"}


def test_one_that_is_not_there_is_gone(executor, claim):
    assert executor.collect_staging(plan(delete={claim: "run_succeeded"})) == {claim: "run_succeeded"}


def test_what_sql_does_not_know_goes_when_it_is_old(engine, docker_system, executor, claim):
    launch = docker_system.launch(staging_claim=claim)
    executor.execute(launch)
    engine.wait(launch.name)
    assert executor.collect_staging(plan(orphan_seconds=DAY)) == {}
    assert executor.collect_staging(plan(orphan_seconds=0, keep={claim})) == {}
    assert docker_system.executor(system="another").collect_staging(plan(orphan_seconds=0)).get(claim) is None
    assert executor.collect_staging(plan(orphan_seconds=0)) == {claim: "orphaned"}
    assert engine.volumes(docker_system.system) == []


@pytest.mark.parametrize("other", [{"run_id": "other"}, {"dag_id": "other"}, {"tenant_id": "other"}])
def test_the_volume_of_another_run_is_refused_by_its_labels(engine, docker_system, executor, claim, other):
    executor.execute(docker_system.launch(staging_claim=claim))
    launch = docker_system.launch("thief")
    with pytest.raises(PermanentLaunchError, match=f"staging volume '{claim}' belongs to another run"):
        executor.execute(replace(launch, request=launch.request.evolve(staging_claim=claim, **other)))


@pytest.mark.parametrize("labels", [{}, {"leoflow.io/staging": "true"}, {"leoflow.io/dag-id": "d"}])
def test_a_volume_that_is_not_labelled_as_this_runs_is_refused(engine, docker_system, executor, claim, labels):
    engine.api.create_volume(claim, labels={"leoflow.io/system": docker_system.system, **labels})
    with pytest.raises(PermanentLaunchError) as caught:
        executor.execute(docker_system.launch(staging_claim=claim))
    assert caught.value.reason == "invalid_spec"
    assert f"staging_claim: a volume named '{claim}' exists on this host without our label" in caught.value.message
    assert engine.containers(docker_system.system) == []
    assert engine.volumes(docker_system.system) == [claim]


def test_an_operators_own_volume_of_that_name_is_left_alone(engine, docker_system, executor, claim):
    engine.api.create_volume(claim, labels={"leoflow.io/system": docker_system.system})
    assert executor.collect_staging(plan(delete={claim: "run_succeeded"}, orphan_seconds=0)) == {}
    assert engine.volumes(docker_system.system) == [claim]
