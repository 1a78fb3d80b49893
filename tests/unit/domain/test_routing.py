"""Which executor and queue a request gets."""

from __future__ import annotations

from typing import Any

import pytest

from leoflow_celery.domain.request import TaskRequest, parse_request
from leoflow_celery.domain.routing import (
    ALL_QUEUES,
    QUEUE_OF,
    ExecutorType,
    Policy,
    TaskName,
    check_inline_timeout,
    check_secrets,
    check_task,
    executor_for,
    is_monitored,
    queue_for_task,
)
from leoflow_celery.errors import InvalidRequest

E = ExecutorType


def request(operator: str, **more: Any) -> TaskRequest:
    own: dict[str, Any] = (
        {"http_request": {"method": "GET", "url": "http://h/"}} if operator == "http_api" else {"entrypoint": "a:b"}
    )
    ids = {"task_instance_id": "ti", "dag_id": "d", "run_id": "r", "task_id": "t"}
    return parse_request({**ids, "operator": operator, **own, **more})


@pytest.mark.parametrize(
    ("operator", "more", "executor"),
    [
        ("http_api", {}, E.INLINE),
        ("http_api", {"execution_mode": "inline"}, E.INLINE),
        ("http_api", {"execution_mode": "pod"}, E.DOCKER),
        ("http_api", {"executor": "subprocess"}, E.SUBPROCESS),
        ("http_api", {"executor": "inline"}, E.INLINE),
        ("http_api", {"execution_mode": "pod", "executor": "kubernetes"}, E.KUBERNETES),
        ("python", {}, E.DOCKER),
        ("bash", {}, E.DOCKER),
        ("bash", {"executor": "subprocess"}, E.SUBPROCESS),
        ("python", {"execution_mode": "pod"}, E.DOCKER),
    ],
)
def test_a_request_goes_to_its_executor(operator: str, more: dict[str, str], executor: ExecutorType) -> None:
    assert executor_for(request(operator, **more), standard=E.DOCKER) is executor


@pytest.mark.parametrize(("mode", "executor"), [("pod", "inline"), ("inline", "docker"), ("inline", "kubernetes")])
def test_an_executor_that_contradicts_the_mode_is_refused(mode: str, executor: str) -> None:
    with pytest.raises(InvalidRequest, match=f"executor: '{executor}' contradicts execution_mode '{mode}'") as caught:
        executor_for(request("http_api", execution_mode=mode, executor=executor), E.SUBPROCESS)
    assert caught.value.field == "executor"


def test_every_executor_has_a_task_that_is_routed_to_its_queue() -> None:
    assert {executor: queue_for_task(TaskName.of("execute", executor)) for executor in E} == QUEUE_OF
    assert len(set(ALL_QUEUES)) == len(ALL_QUEUES) == 7


@pytest.mark.parametrize(
    ("name", "queue"),
    [
        ("leoflow.execute.kubernetes", "k8s"),
        ("leoflow.dispatch", "dispatch"),
        ("leoflow.results.record", "results"),
        ("leoflow.results.push", None),
        ("leoflow.staging.docker", "docker"),
        ("leoflow.maintenance.reap", "maintenance"),
        ("celery.chord_unlock", None),
        ("shop.send_mail", None),
    ],
)
def test_a_celery_task_goes_to_its_queue(name: str, queue: str | None) -> None:
    assert queue_for_task(name) == queue


def test_a_monitor_hears_of_users_tasks_only() -> None:
    of_users = ["leoflow.execute.kubernetes", "leoflow.dispatch", "shop.send_mail", "celery.chord_unlock"]
    ours = ["leoflow.results.record", "leoflow.maintenance.reap", "leoflow.reconcile.docker", "leoflow.stop.docker"]
    assert [name for name in (*of_users, *ours) if is_monitored(name)] == of_users


def test_an_inline_task_may_ask_for_the_cap_and_not_a_second_more() -> None:
    check_inline_timeout(request("http_api", timeout_seconds=300), 300)
    check_inline_timeout(request("http_api"), 300)
    with pytest.raises(
        InvalidRequest, match=r"301 is above the inline cap of 300 s; set execution_mode: pod"
    ) as caught:
        check_inline_timeout(request("http_api", timeout_seconds=301), 300)
    assert caught.value.field == "timeout_seconds"


def test_an_attempt_of_an_inline_call_may_ask_for_the_cap_and_not_a_second_more() -> None:
    def call(**more: Any) -> TaskRequest:
        return request("http_api", http_request={"method": "GET", "url": "http://h/", **more})

    check_inline_timeout(call(timeout_seconds=300), 300)
    check_inline_timeout(call(), 30)  # nothing was asked for
    with pytest.raises(InvalidRequest, match=r"^http_request\.timeout_seconds: 60 is .*: pod") as caught:
        check_inline_timeout(call(timeout_seconds=60), 30)
    assert caught.value.field == "http_request.timeout_seconds"


@pytest.mark.parametrize(
    ("source", "executor", "takes"),
    [
        ("vault", E.KUBERNETES, "it takes 'env' or 'k8s_secret'"),
        ("k8s_secret", E.DOCKER, "it takes 'env'"),
        ("vault", E.SUBPROCESS, "it takes 'env'"),
        ("env", E.INLINE, "it takes none: put it into http_request"),
    ],
)
def test_a_secret_that_nobody_would_resolve_is_refused(source: str, executor: E, takes: str) -> None:
    given = request("bash", secrets=[{"name": "A", "source": "env"}, {"name": "TOKEN", "source": source}])
    if executor is E.INLINE:
        given = given.evolve(secrets=given.secrets[1:])
    with pytest.raises(InvalidRequest, match="'TOKEN' is not resolved by the") as caught:
        check_secrets(given, executor)
    assert caught.value.message.endswith(takes)
    assert caught.value.field.endswith(".source")


@pytest.mark.parametrize(
    ("given", "field", "shown"),
    [
        ({"resources": {"limits": {"memory": "1Gi"}}}, "resources.limits.memory", "(got '1Gi')"),
        ({"execution": {"node_selector": {"disk": "ssd"}}}, "execution.node_selector.disk", "(got 'ssd')"),
        ({"execution": {"tolerations": [{"key": "gpu"}]}}, "execution.tolerations", ""),
        ({"execution": {"termination_grace_seconds": 5}}, "execution.termination_grace_seconds", "(got '5')"),
        ({"pod_override": {"metadata": {"labels": {"a": "c4n4ry"}}}}, "pod_override.metadata.labels.a", ""),
        ({"oom_memory_factor": 2}, "oom_memory_factor", "(got '2.0')"),
        ({"image_pull_policy": "Always"}, "image_pull_policy", "(got 'Always')"),
        ({"task_secret_name": "db", "task_secret_mount_path": "/s"}, "task_secret_name", "(got 'db')"),
        ({"task_secret_mount_path": "/s"}, "task_secret_mount_path", "(got '/s')"),
        ({"agent_tls_ca_config_map": "ca"}, "agent_tls_ca_config_map", "(got 'ca')"),
    ],
)
def test_what_a_call_in_the_control_plane_would_ignore_is_refused(
    given: dict[str, Any], field: str, shown: str
) -> None:
    policy = Policy(E.DOCKER, 300, frozenset(E))
    with pytest.raises(InvalidRequest) as caught:
        check_task(request("http_api", **given), policy)
    assert caught.value.field == field
    assert caught.value.message.startswith(f"{field}: has no effect on a call that the control plane makes")
    assert shown in caught.value.message
    assert "set execution_mode: pod" in caught.value.message
    assert "c4n4ry" not in caught.value.message
    check_task(request("http_api", execution_mode="pod", **given), policy)


def test_what_a_dag_gives_all_its_tasks_is_no_reason_to_refuse_a_call() -> None:
    alike = {"image": "sales:1", "staging_claim": "c", "staging_size": "1Gi", "resources": {}, "execution": {}}
    assert check_task(request("http_api", **alike), Policy(E.DOCKER, 300)) is E.INLINE


@pytest.mark.parametrize("executor", [E.KUBERNETES, E.DOCKER, E.SUBPROCESS])
def test_secrets_that_are_resolved_are_accepted(executor: E) -> None:
    own = [{"name": "B", "source": "k8s_secret", "reference": "s/k"}] if executor is E.KUBERNETES else []
    check_secrets(request("bash", secrets=[{"name": "A", "source": "env"}, *own]), executor)


@pytest.mark.parametrize(
    ("permitted", "asked", "is_permitted"),
    [
        ([], {}, True),
        ([], {"executor": "docker"}, True),
        ([], {"executor": "subprocess"}, False),
        ([], {"executor": "kubernetes"}, False),
        ([E.DOCKER, E.KUBERNETES], {"executor": "kubernetes"}, True),
        ([E.KUBERNETES], {}, False),
    ],
)
def test_a_request_is_run_by_what_the_operator_permits(
    permitted: list[E], asked: dict[str, str], is_permitted: bool
) -> None:
    policy, given = Policy(E.DOCKER, 300, frozenset(permitted)), request("bash", **asked)
    if is_permitted:
        assert check_task(given, policy) is executor_for(given, E.DOCKER)
        return
    with pytest.raises(
        InvalidRequest, match=r"executor: '\w+' is not permitted here; use .*LEOFLOW_DISPATCH_PERMITTED"
    ) as caught:
        check_task(given, policy)
    assert caught.value.field == "executor"


def test_inline_is_permitted_unless_a_list_leaves_it_out() -> None:
    assert check_task(request("http_api"), Policy(E.DOCKER, 300)) is E.INLINE
    with pytest.raises(InvalidRequest, match="'inline' is not permitted here; use docker, or have"):
        check_task(request("http_api"), Policy(E.DOCKER, 300, frozenset({E.DOCKER})))


CLAIM = {"persistentVolumeClaim": {"claimName": "leoflow-staging-d-other"}}


@pytest.mark.parametrize("executor", ["kubernetes", "docker", "subprocess"])
@pytest.mark.parametrize(
    ("named", "field"),
    [
        ({"staging_claim": "leoflow-staging-d-other"}, "staging_claim"),
        ({"staging_claim": "leoflow-staging-d-r-"}, ""),  # no volume's name at all: the request itself is refused
        ({"staging_claim": "leoflow-staging-d-r.x"}, "staging_claim"),
        ({"tenant_id": "acme", "staging_claim": "leoflow-staging-d-r-0123abcd"}, "staging_claim"),
        (
            {"pod_override": {"spec": {"volumes": [{"name": "a"}, {"name": "v", **CLAIM}]}}},
            "pod_override.spec.volumes.1.persistentVolumeClaim.claimName",
        ),
        (
            {"pod_override": {"metadata": {"x": [[CLAIM]]}}},
            "pod_override.metadata.x.0.0.persistentVolumeClaim.claimName",
        ),
    ],
)
def test_the_staging_volume_of_another_run_is_refused_by_its_name(
    executor: str, named: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_task(request("bash", executor=executor, **named), Policy(E.DOCKER, 300, frozenset(E)))
    assert caught.value.field == (field or "staging_claim")
    if field:
        assert "is the volume of another run; this run's is 'leoflow-staging-d-r" in str(caught.value)


@pytest.mark.parametrize("name", ["", "leoflow-staging-d-r", "scratch", "leoflow-staging"])
def test_the_own_volume_and_one_of_any_other_name_are_accepted(name: str) -> None:
    check_task(request("bash", staging_claim=name), Policy(E.DOCKER, 300))
