"""Our agent in images that have nothing of it, on the real Engine."""

from __future__ import annotations

import json

import pytest

from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.errors import PermanentLaunchError
from leoflow_celery.executors.docker.labels import AGENT_IMAGE
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.protocol.service import REASON_KEY
from tests.integration.agent.control_plane import ControlPlane
from tests.integration.docker.conftest import Docker, bash, wait_for_output
from tests.support import foreign_images
from tests.support.images import agent_image, task_image

IMAGES = ["busybox_image", "musl_image", "opinionated_image"]


def inject(system: Docker, plane: ControlPlane, image: str, spec: pb.TaskSpec, **settings: object) -> str:
    """Start a task in an image with our agent; returns its container's name."""
    plane.spec = spec
    executor = system.executor(agent="inject", agent_image=agent_image(), **settings)
    fields = {"operator": spec.operator, "entrypoint": spec.entrypoint, "agent": "inject"}
    return executor.execute(system.agent_launch(plane, image=image, **fields)).external_name


def ended(plane: ControlPlane) -> tuple[int, str]:
    """The state that was reported, and its reason."""
    call = plane.final()
    assert call is not None, plane.lines
    return call.request.state, call.metadata.get(REASON_KEY, "")


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("read_only", [False, True])
def test_a_shell_command_runs_in_an_image_without_python_and_glibc(
    docker_system: Docker, plane: ControlPlane, image: str, read_only: bool
) -> None:
    command = 'echo out; echo err >&2; echo "{\\"a\\": $LEOFLOW_XCOM_X}" >$LEOFLOW_RETURN_VALUE_PATH'
    plane.xcoms["up"] = b"[1]"
    spec = bash(command, xcom_input_mapping={"x": "up"})
    name = inject(docker_system, plane, getattr(foreign_images, image)(), spec, read_only_root=read_only)
    docker_system.engine.wait(name)
    assert ended(plane) == (pb.TASK_STATE_SUCCESS, ""), plane.final()
    assert json.loads(plane.pushed[0].value) == {"a": [1]}
    assert (plane.text("stdout"), plane.text("stderr")) == (["out"], ["err"])
    assert docker_system.engine.state(name)["ExitCode"] == 0


def test_the_images_own_command_runs_as_its_user_in_its_directory(docker_system: Docker, plane: ControlPlane) -> None:
    name = inject(docker_system, plane, foreign_images.opinionated_image(), bash(""))
    docker_system.engine.wait(name)
    assert ended(plane) == (pb.TASK_STATE_SUCCESS, ""), plane.final()
    assert plane.text("stdout") == ["hello from /srv/place as 1234"]


def test_an_image_without_a_command_is_refused_when_the_request_names_none_either(
    docker_system: Docker, plane: ControlPlane
) -> None:
    with pytest.raises(PermanentLaunchError, match="names no command of its own") as caught:
        inject(docker_system, plane, foreign_images.silent_image(), bash(""))
    assert caught.value.reason == FailureReason.INVALID_SPEC


def test_a_task_without_a_command_needs_an_injected_agent(docker_system: Docker, plane: ControlPlane) -> None:
    launch = docker_system.agent_launch(plane, entrypoint="", agent="inject")
    launch = type(launch)(launch.request.evolve(agent=None), launch.attempt)
    with pytest.raises(PermanentLaunchError, match="agent: inject"):
        docker_system.executor().execute(launch)


@pytest.mark.parametrize("version", ["3.8", "3.13"])
def test_a_python_task_runs_in_the_images_own_python(docker_system: Docker, plane: ControlPlane, version: str) -> None:
    plane.spec = spec = pb.TaskSpec(operator="python", entrypoint="dag:version")
    executor = docker_system.executor(agent="inject", agent_image=agent_image())
    source = "import sys\ndef version():\n    return list(sys.version_info[:2])\n"
    fields = {"operator": "python", "entrypoint": spec.entrypoint, "source": source}
    image = foreign_images.python_image(version)
    name = executor.execute(docker_system.agent_launch(plane, image=image, **fields)).external_name
    docker_system.engine.wait(name)
    assert ended(plane) == (pb.TASK_STATE_SUCCESS, ""), plane.final()
    assert json.loads(plane.pushed[0].value) == [int(part) for part in version.split(".")]


def test_a_python_task_in_an_image_without_python_says_so(docker_system: Docker, plane: ControlPlane) -> None:
    spec = pb.TaskSpec(operator="python", entrypoint="dag:version")
    docker_system.engine.wait(inject(docker_system, plane, foreign_images.busybox_image(), spec))
    assert ended(plane) == (pb.TASK_STATE_FAILED, "command_not_found")


def test_a_timeout_is_the_reason(docker_system: Docker, plane: ControlPlane) -> None:
    spec = bash("sleep 600", execution_timeout_seconds=1)
    docker_system.engine.wait(inject(docker_system, plane, foreign_images.busybox_image(), spec))
    assert ended(plane) == (pb.TASK_STATE_FAILED, "timeout")


def test_a_stopped_container_stops_its_task(docker_system: Docker, plane: ControlPlane) -> None:
    spec = bash("echo up; sleep 600")
    name = inject(docker_system, plane, foreign_images.opinionated_image(), spec)
    wait_for_output(plane, "up")
    docker_system.executors[0].cancel(name, 5)
    assert docker_system.engine.wait(name)["ExitCode"] == 143


def test_the_volume_is_made_once_per_agent_image_and_replaces_an_older_one(
    docker_system: Docker, plane: ControlPlane
) -> None:
    executor = docker_system.executor(agent="inject", agent_image=agent_image())
    engine, system = docker_system.engine, docker_system.system
    engine.api.create_container_from_config(
        {"Image": task_image(), "Labels": {AGENT_IMAGE: "sha256:old", "leoflow.io/system": system}}, f"{system}-old"
    )
    for task_id in ("one", "two"):
        executor.execute(docker_system.launch(task_id, image=foreign_images.busybox_image(), entrypoint="sleep 600"))
    held = [one for one in engine.containers(system) if AGENT_IMAGE in one["Labels"]]
    assert [one["State"] for one in held] == ["created"]
    assert held[0]["Labels"][AGENT_IMAGE] != "sha256:old"
    [volume] = [one["Name"] for one in held[0]["Mounts"]]
    for one in engine.containers(system):
        [mount] = [mount for mount in one["Mounts"] if mount["Destination"] == "/opt/leoflow-agent"]
        assert mount["Name"] == volume
        assert mount["RW"] is (one["Id"] == held[0]["Id"])


def test_a_kill_for_memory_is_the_reason(docker_system: Docker, plane: ControlPlane) -> None:
    spec = bash("x=a; while true; do x=$x$x; done")
    limits = {"limits": {"memory": "64Mi"}}
    plane.spec = spec
    executor = docker_system.executor(agent="inject", agent_image=agent_image())
    launch = docker_system.agent_launch(plane, image=foreign_images.busybox_image(), resources=limits)
    docker_system.engine.wait(executor.execute(launch).external_name)
    assert ended(plane) == (pb.TASK_STATE_FAILED, "oom_killed"), plane.final()
