"""The injected agent where no server is needed: the door, the container and the pod."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

import leoflow_runtime
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import parse_request
from leoflow_celery.domain.routing import ExecutorType, check_agent
from leoflow_celery.errors import InvalidRequest, PermanentLaunchError
from leoflow_celery.executors.docker.container import build_container, build_environment
from leoflow_celery.executors.kubernetes.pod import build_pod, pod_base
from leoflow_celery.executors.kubernetes.policy import PodPolicy
from leoflow_celery.settings import DockerSettings, KubernetesSettings
from scripts import bundle
from tests.unit.executors.kubernetes.built import build, launch, task

INJECTING = KubernetesSettings(agent="inject", agent_image="leoflow-agent:7")
IDS = {"task_instance_id": "ti", "dag_id": "d", "run_id": "r", "task_id": "t", "image": "alpine"}


def test_a_request_without_a_command_says_whose_agent_finds_it():
    with pytest.raises(InvalidRequest, match="agent: inject"):
        parse_request({**IDS, "operator": "bash"})
    assert parse_request({**IDS, "operator": "bash", "agent": "inject"}).runs_image_command


@pytest.mark.parametrize("executor", [ExecutorType.SUBPROCESS, ExecutorType.INLINE])
def test_where_there_is_no_container_nothing_is_injected(executor):
    request = parse_request({**IDS, "operator": "bash", "entrypoint": "true", "agent": "inject"})
    with pytest.raises(InvalidRequest, match=f"agent: 'inject' .* the {executor} executor"):
        check_agent(request, executor)


def test_a_container_starts_with_the_agent_whatever_its_image_says():
    spec, settings = launch(agent="inject", entrypoint=""), DockerSettings()
    environment = build_environment(spec, settings, ["/bin/serve", "a b"])
    config = build_container(spec, settings, environment, "s", 2, bundle="holder")
    assert config["Entrypoint"] == [f"{bundle.HOME}/bin/leoflow-agent"]
    assert config["Cmd"] == []
    assert config["HostConfig"]["VolumesFrom"] == ["holder:ro"]
    assert json.loads(environment.open["LEOFLOW_AGENT_IMAGE_COMMAND"]) == ["/bin/serve", "a b"]


def test_a_requests_agent_wins_over_the_queues():
    assert "initContainers" not in build(settings=INJECTING, agent="image")["spec"]
    assert "initContainers" in build(agent="inject")["spec"]


def test_a_pod_brings_the_agent_with_no_more_rights_or_room_than_its_task():
    limits = {"limits": {"cpu": "2", "memory": "1Gi"}, "requests": {"cpu": "1"}}
    override = {"spec": {"containers": [{"name": "task", "resources": {"limits": {"nvidia.com/gpu": "1"}}}]}}
    pod = build(settings=INJECTING, resources=limits, pod_override=override)
    [bringing] = pod["spec"]["initContainers"]
    assert bringing["image"] == "leoflow-agent:7"
    assert bringing["resources"] == limits
    assert bringing["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert task(pod)["command"] == [f"{bundle.HOME}/bin/leoflow-agent"]
    [mount] = [one for one in task(pod)["volumeMounts"] if one["mountPath"] == str(bundle.HOME)]
    assert mount["readOnly"] is True


def test_the_policy_judges_the_tasks_image_and_not_the_operators_agent():
    policy = PodPolicy.model_validate({"images": {"allow": ["registry.example/team/"]}, "ceilings": {"memory": "1Gi"}})
    base = pod_base(INJECTING)
    pod = build_pod(launch(image="registry.example/team/app:1"), INJECTING, base, "s", policy)
    [bringing] = pod["spec"]["initContainers"]
    assert bringing["resources"]["limits"] == {"memory": "1Gi"}
    with pytest.raises(PermanentLaunchError) as caught:
        build_pod(launch(image="alpine"), INJECTING, base, "s", policy)
    assert caught.value.reason == FailureReason.FORBIDDEN


def test_an_override_cannot_stand_in_for_the_agents_init_container():
    policy = PodPolicy.model_validate({"allow": {"sidecars": True}})
    theirs = {"spec": {"initContainers": [{"name": "leoflow-agent", "image": "evil"}]}}
    with pytest.raises(PermanentLaunchError, match="container of ours"):
        build_pod(launch(pod_override=theirs), INJECTING, pod_base(INJECTING), "s", policy)


def test_a_pod_runs_the_command_that_the_override_names_and_refuses_two():
    override = {"spec": {"containers": [{"name": "task", "command": ["/bin/serve"], "args": ["a"]}]}}
    pod = build(agent="inject", entrypoint="", pod_override=override)
    told = next(one["value"] for one in task(pod)["env"] if one["name"] == "LEOFLOW_AGENT_IMAGE_COMMAND")
    assert json.loads(told) == ["/bin/serve", "a"]
    assert "args" not in task(pod)
    for fields in ({"entrypoint": ""}, {"entrypoint": "true", "pod_override": override}):
        with pytest.raises(PermanentLaunchError) as caught:
            build(agent="inject", **fields)
        assert caught.value.reason == FailureReason.INVALID_SPEC


def test_the_runtime_is_read_by_python_3_8_and_imports_the_standard_library_alone():
    for path in Path(leoflow_runtime.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(), feature_version=(3, 8))
        for node in ast.walk(tree):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.partition(".")[0] in {*sys.stdlib_module_names, "leoflow_runtime"} or (
                    path.name == "airflow_sdk.py" and name.startswith("airflow.")
                ), path
