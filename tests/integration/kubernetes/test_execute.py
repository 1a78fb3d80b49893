"""Pods that really run, and what is left of them."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor

import pytest

from leoflow_celery.errors import PermanentLaunchError
from leoflow_celery.executors.base import LaunchSpec
from leoflow_celery.executors.kubernetes import KubernetesExecutor
from leoflow_celery.protocol import agent_pb2 as pb
from tests.integration.agent.control_plane import ControlPlane
from tests.integration.kubernetes.conftest import MakeExecutor
from tests.support.cluster import Manifest, Namespace
from tests.support.engine import engine_of_tests
from tests.support.images import task_image
from tests.support.launches import launch_spec, parked
from tests.support.waiting import wait_until

LOOK_AROUND = r"""
echo "uid $(id -u)"
grep -E '^(CapEff|NoNewPrivs)' /proc/self/status
test -e /var/run/secrets/kubernetes.io/serviceaccount || echo "no service account"
env | grep -c _SERVICE_HOST
echo "region $REGION, price $PRICE, password $DB_PASSWORD, file $(cat /secrets/password)"
test -z "$LEOFLOW_AGENT_TOKEN" && echo "no token"
echo hidden > /secrets/password
"""


def spec_of(script: str, **more: object) -> pb.TaskSpec:
    return pb.TaskSpec(operator="bash", entrypoint=script, try_number=1, **more)


def secrets_of(namespace: Namespace, launch: LaunchSpec) -> list[Manifest]:
    """What a pod gets its token from, by name."""
    found = namespace.items("secrets", "leoflow.io/run-id")
    return [one for one in found if one["metadata"]["name"].startswith(f"{launch.name}-")]


@pytest.mark.parametrize("mode", ["secret", "plain"])
def test_a_pod_runs_its_task_and_sees_what_it_should(
    make_executor: MakeExecutor, module_namespace: Namespace, plane: ControlPlane, mode: str
) -> None:
    password = {"password": base64.b64encode(b"hunter2").decode()}
    module_namespace.create(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": f"db-{mode}"}, "data": password}
    )
    plane.spec = spec_of(LOOK_AROUND)
    launch = launch_spec(
        image=task_image(),
        control_plane_addr=plane.address,
        agent_token="a-token-of-its-own",
        env={"REGION": "eu", "PRICE": "$5 $(REGION) $$", "A NAME": "not for the API", "..A": "nor this"},
        resources={"requests": {"cpu": "10m"}, "limits": {"memory": "256Mi"}},
        timeout_seconds=600,
        task_secret_name=f"db-{mode}",
        task_secret_mount_path="/secrets",
        secrets=[{"name": "DB_PASSWORD", "source": "k8s_secret", "reference": f"db-{mode}/password"}],
    )
    launched = make_executor(agent_environment=mode).execute(launch)
    pod = module_namespace.wait_for_pod(launch.name, lambda one: one["status"].get("phase") in ("Succeeded", "Failed"))
    lines = plane.text("stdout")
    assert "uid 10001" in lines
    assert "CapEff:\t0000000000000000" in lines
    assert "NoNewPrivs:\t1" in lines
    assert "no service account" in lines
    assert "region eu, price $5 $(REGION) $$, password hunter2, file hunter2" in lines
    assert "no token" in lines
    assert "Read-only file system" in plane.text("stderr")[-1]
    assert plane.calls[0].metadata["authorization"] == "Bearer a-token-of-its-own"
    assert pod["metadata"]["uid"] == launched.details["uid"]
    assert pod["spec"]["activeDeadlineSeconds"] == 660
    assert launched.external_name == launch.name
    assert not launched.already
    assert len(secrets_of(module_namespace, launch)) == (mode == "secret")


def test_the_secret_of_a_pod_goes_with_it(executor: KubernetesExecutor, module_namespace: Namespace) -> None:
    launch = parked(env={"PASSWORD": "hunter2"})
    launched = executor.execute(launch)
    (secret,) = secrets_of(module_namespace, launch)
    assert secret["metadata"]["ownerReferences"][0]["uid"] == launched.details["uid"]
    assert base64.b64decode(secret["data"]["PASSWORD"]) == b"hunter2"
    module_namespace.delete("pods", launch.name)
    module_namespace.drop_finalizers("pods", launch.name)  # it is held
    wait_until(lambda: not secrets_of(module_namespace, launch), 120, "the Secret goes", 0.2)


def test_a_second_delivery_finds_the_pod(executor: KubernetesExecutor, module_namespace: Namespace) -> None:
    launch = parked()
    first, second = executor.execute(launch), executor.execute(launch)
    assert (first.already, second.already) == (False, True)
    assert first.details == second.details


def test_a_pod_whose_worker_died_before_its_secret_gets_it_with_the_next_delivery(
    make_executor: MakeExecutor, module_namespace: Namespace, plane: ControlPlane
) -> None:
    plane.spec = spec_of("echo ran")
    launch = launch_spec(image=task_image(), control_plane_addr=plane.address)
    half = make_executor()
    half._create_secret = lambda *_: None  # type: ignore[method-assign] # the worker dies here
    half.execute(launch)
    assert secrets_of(module_namespace, launch) == []
    assert make_executor().execute(launch).already
    module_namespace.wait_for_pod(launch.name, "Succeeded")
    assert plane.text("stdout") == ["ran"]


def test_a_pod_that_was_deleted_is_made_again_and_the_claim_decides(
    executor: KubernetesExecutor, module_namespace: Namespace
) -> None:
    launch = parked()
    first = executor.execute(launch)
    executor.cancel(launch.name, grace_seconds=0)
    module_namespace.wait_for_no_pod(launch.name)
    again = executor.execute(launch)
    assert not again.already
    assert again.details != first.details


def test_a_foreign_pod_of_that_name_is_not_taken_for_ours(
    executor: KubernetesExecutor, module_namespace: Namespace
) -> None:
    launch = parked()
    spec = {"containers": [{"name": "task", "image": "nobody-has:this"}], "nodeSelector": {"nobody": "has-this"}}
    metadata = {"name": launch.name}
    module_namespace.create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    with pytest.raises(PermanentLaunchError, match=r"exists in namespace .*, and is not of this attempt"):
        executor.execute(launch)


def test_cancel_deletes_a_running_pod_with_grace(
    executor: KubernetesExecutor, module_namespace: Namespace, plane: ControlPlane
) -> None:
    plane.spec = spec_of("trap 'echo stopping; exit 3' TERM; echo ready; while :; do read -rt 1 <> <(:); done")
    launch = launch_spec(image=task_image(), control_plane_addr=plane.address)
    executor.execute(launch)
    wait_until(lambda: "ready" in plane.text("stdout"), 120, "the task runs", 0.1)
    # A kubelet that has not noticed yet that the container runs lets the pod go without waiting for it.
    module_namespace.wait_for_pod(launch.name, "Running")
    executor.cancel(launch.name, grace_seconds=20)
    module_namespace.wait_for_no_pod(launch.name)
    assert "stopping" in plane.text("stdout")
    executor.cancel(launch.name, grace_seconds=20)


def test_runs_that_sanitise_alike_and_ids_of_any_length_have_pods_of_their_own(
    executor: KubernetesExecutor, module_namespace: Namespace
) -> None:
    launches = [
        parked(run_id="manual:1", task_instance_id="launches manual:1"),
        parked(run_id="manual;1", task_instance_id="launches manual;1"),
        parked(**dict.fromkeys(("dag_id", "run_id", "task_id", "task_instance_id"), "x" * 300)),
        parked(**dict.fromkeys(("dag_id", "run_id", "task_id", "task_instance_id"), "ß" * 150)),
    ]
    with ThreadPoolExecutor(4) as pool:
        launched = list(pool.map(executor.execute, launches))
    assert len({one.details["uid"] for one in launched}) == 4
    labels = [module_namespace.pod(one.external_name)["metadata"]["labels"]["leoflow.io/run-id"] for one in launched]  # type: ignore[index]
    assert len(set(labels)) == 4
    assert [one.already for one in launched] == [False] * 4


def test_template_and_override_reach_the_cluster(
    make_executor: MakeExecutor, module_namespace: Namespace, tmp_path
) -> None:
    template = tmp_path / "template.yaml"
    template.write_text(
        """
        metadata: {annotations: {team: data}}
        spec:
          tolerations: [{key: tasks, operator: Exists}]
          containers:
          - {name: task, env: [{name: FROM, value: template}, {name: ONLY, value: template}]}
        """
    )
    launch = parked(
        env={"FROM": "request"},
        pod_override={"spec": {"priority": None, "containers": [{"name": "proxy", "image": "proxy:1"}]}},
    )
    policy = tmp_path / "policy.yaml"
    policy.write_text("allow: {sidecars: true}")
    make_executor(pod_template=template, policy=policy).execute(launch)
    pod = module_namespace.pod(launch.name)
    assert pod is not None
    assert pod["metadata"]["annotations"]["team"] == "data"
    assert [one["name"] for one in pod["spec"]["containers"]] == ["task", "proxy"]
    assert {"key": "tasks", "operator": "Exists"} in pod["spec"]["tolerations"]
    env = {one["name"]: one.get("value", "from a Secret") for one in pod["spec"]["containers"][0]["env"]}
    assert (env["FROM"], env["ONLY"]) == ("from a Secret", "template")


def test_a_read_only_root_leaves_tmp_and_the_agents_ca_is_there_to_read(
    make_executor: MakeExecutor, module_namespace: Namespace
) -> None:
    authority = {"metadata": {"name": "agent-ca"}, "data": {"ca.crt": "a certificate\n"}}
    module_namespace.create({"apiVersion": "v1", "kind": "ConfigMap", **authority})
    look = "exec 2>&1; cat $LEOFLOW_AGENT_TLS_CA; echo $LEOFLOW_AGENT_INSECURE; touch /tmp/x /app/x /etc/leoflow/tls/x"
    script = {"name": "task", "command": ["sh", "-c", look]}
    launch = launch_spec(
        image=task_image(), agent_tls_ca_config_map="agent-ca", pod_override={"spec": {"containers": [script]}}
    )
    make_executor(read_only_root=True).execute(launch)
    module_namespace.wait_for_pod(launch.name, lambda one: one["status"].get("phase") in ("Succeeded", "Failed"))
    lines = module_namespace.log(launch.name).splitlines()
    assert lines[:2] == ["a certificate", "false"]
    assert [line.split("'")[1] for line in lines[2:]] == ["/app/x", "/etc/leoflow/tls/x"]


def test_two_deliveries_at_the_same_time_make_one_pod_that_runs(
    make_executor: MakeExecutor, module_namespace: Namespace, plane: ControlPlane
) -> None:
    plane.spec = spec_of("echo ran")
    launch = launch_spec(image=task_image(), control_plane_addr=plane.address)
    executors = [make_executor() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        launched = list(pool.map(lambda one: one.execute(launch), executors))
    assert sorted(one.already for one in launched) == [False, True, True, True]
    assert len(secrets_of(module_namespace, launch)) == 1
    module_namespace.wait_for_pod(launch.name, "Succeeded")
    assert plane.text("stdout") == ["ran"]


def test_a_variable_too_large_for_linux_is_refused_by_the_agent(
    executor: KubernetesExecutor, module_namespace: Namespace, plane: ControlPlane
) -> None:
    large = {"LARGE": "x" * 131_072}
    plane.spec = spec_of("echo ran", environment=large)
    launch = launch_spec(image=task_image(), control_plane_addr=plane.address, env=large)
    executor.execute(launch)
    module_namespace.wait_for_pod(launch.name, "Failed")
    assert plane.calls, "the agent itself must have started"
    assert "the environment is too large for Linux" in plane.text("agent")[-1]


@pytest.mark.parametrize("stop_signal", ["SIGQUIT", "SIGRTMIN+3"])
def test_a_pod_whose_image_has_a_stop_signal_of_its_own_is_stopped_and_no_success(
    executor: KubernetesExecutor, module_namespace: Namespace, plane: ControlPlane, stop_signal: str
) -> None:
    plane.spec = spec_of("trap 'echo cleaned up; exit 0' TERM; echo ready; while true; do sleep 0.05; done")
    with engine_of_tests() as engine, engine.image(task_image(), f"STOPSIGNAL {stop_signal}") as image:
        name = f"leoflow-test-stop:{image.removeprefix('sha256:')[:12]}"
        engine.api.tag(image, name)
        launch = launch_spec(image=name, control_plane_addr=plane.address, image_pull_policy="Never")
        executor.execute(launch)
        wait_until(lambda: "ready" in plane.text("stdout"), 120, interval=0.1)
        executor.cancel(launch.name, grace_seconds=30)
        module_namespace.wait_for_no_pod(launch.name)
    assert plane.text("agent")[-1] == f"task stopped: the agent received {stop_signal}"
    assert "cleaned up" in plane.text("stdout")
    assert plane.final() is None


@pytest.mark.parametrize("read_only", [False, True])
def test_a_task_that_empties_tmp_keeps_its_return_value(
    make_executor: MakeExecutor, module_namespace: Namespace, plane: ControlPlane, read_only: bool
) -> None:
    plane.spec = spec_of("rm -rf /tmp/* /tmp/.[!.]*; echo 1 > $LEOFLOW_RETURN_VALUE_PATH")
    uid = {"spec": {"securityContext": {"runAsUser": 4321}}}
    launch = launch_spec(image=task_image(), control_plane_addr=plane.address, pod_override=uid)
    make_executor(read_only_root=read_only).execute(launch)
    module_namespace.wait_for_pod(launch.name, "Succeeded")
    assert plane.final().request.state == pb.TASK_STATE_SUCCESS
    assert [call.request.value for call in plane.calls if call.name == "PushXCom"] == [b"1"]
