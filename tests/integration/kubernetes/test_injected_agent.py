"""Our agent in images that have nothing of it, in real pods."""

from __future__ import annotations

import json
from typing import Any

import pytest

from leoflow_celery.executors.kubernetes.pod import AGENT_CONTAINER
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.protocol.service import REASON_KEY
from tests.integration.agent.control_plane import ControlPlane
from tests.integration.kubernetes.conftest import MakeExecutor
from tests.support import foreign_images
from tests.support.cluster import Manifest, Namespace
from tests.support.images import agent_image, base_image
from tests.support.launches import launch_spec
from tests.support.waiting import wait_until


def start(plane: ControlPlane, make_executor: MakeExecutor, image: str, spec: pb.TaskSpec, **fields: Any) -> str:
    """Start a task in a pod of an image with our agent, and a read-only root; returns the pod's name."""
    plane.spec = spec
    wanted = {"operator": spec.operator, "entrypoint": spec.entrypoint, "agent": "inject", **fields}
    launch = launch_spec(image=image, control_plane_addr=plane.address, **wanted)
    executor = make_executor(agent_image=agent_image(), read_only_root=True)
    return executor.execute(launch).external_name


def ended(plane: ControlPlane, namespace: Namespace, name: str) -> Manifest:
    """The pod after its end."""

    def pod() -> Manifest | None:
        found = namespace.pod(name)
        return found if found is not None and found["status"]["phase"] in ("Succeeded", "Failed") else None

    found: Manifest = wait_until(pod, 180, lambda: f"{namespace.pod(name)}\n{plane.lines}")
    return found


def reported(plane: ControlPlane) -> tuple[int, str]:
    call = plane.final()
    assert call is not None, plane.lines
    return call.request.state, call.metadata.get(REASON_KEY, "")


@pytest.mark.parametrize("image", ["busybox_image", "musl_image"])
def test_a_shell_command_runs_in_an_image_without_python_and_glibc(
    plane: ControlPlane, make_executor: MakeExecutor, module_namespace: Namespace, image: str
) -> None:
    command = 'echo out; echo "{\\"a\\": $LEOFLOW_XCOM_X}" >$LEOFLOW_RETURN_VALUE_PATH'
    plane.xcoms["up"] = b"[1]"
    spec = pb.TaskSpec(operator="bash", entrypoint=command, xcom_input_mapping={"x": "up"})
    limits = {"limits": {"cpu": "1", "memory": "256Mi"}}
    name = start(plane, make_executor, getattr(foreign_images, image)(), spec, resources=limits)
    pod = ended(plane, module_namespace, name)
    assert reported(plane) == (pb.TASK_STATE_SUCCESS, ""), plane.final()
    assert json.loads(plane.pushed[0].value) == {"a": [1]}
    assert plane.text("stdout") == ["out"]
    [bringing] = pod["spec"]["initContainers"]
    assert (bringing["name"], bringing["resources"]["limits"]) == (AGENT_CONTAINER, limits["limits"])
    assert pod["status"]["qosClass"] == "Guaranteed"


def test_the_command_of_the_override_is_what_the_image_runs(
    plane: ControlPlane, make_executor: MakeExecutor, module_namespace: Namespace
) -> None:
    override = {"name": "task", "command": ["sh", "-c"], "args": ["echo $GREETING from $(pwd) as $(id -u)"]}
    spec = pb.TaskSpec(operator="bash")
    image = foreign_images.opinionated_image()
    name = start(plane, make_executor, image, spec, pod_override={"spec": {"containers": [override]}})
    ended(plane, module_namespace, name)
    assert reported(plane) == (pb.TASK_STATE_SUCCESS, ""), plane.final()
    assert plane.text("stdout") == ["hello from /srv/place as 1234"]


def test_a_python_task_runs_in_the_images_own_python(
    plane: ControlPlane, make_executor: MakeExecutor, module_namespace: Namespace
) -> None:
    spec = pb.TaskSpec(operator="python", entrypoint="platform:python_version")
    user = {"spec": {"securityContext": {"runAsUser": 65534}}}
    ended(plane, module_namespace, start(plane, make_executor, base_image(), spec, pod_override=user))
    assert reported(plane) == (pb.TASK_STATE_SUCCESS, ""), plane.final()
    assert json.loads(plane.pushed[0].value).startswith("3.")


def test_a_timeout_is_the_reason(plane: ControlPlane, make_executor: MakeExecutor, module_namespace: Namespace) -> None:
    spec = pb.TaskSpec(operator="bash", entrypoint="sleep 600", execution_timeout_seconds=1)
    ended(plane, module_namespace, start(plane, make_executor, foreign_images.busybox_image(), spec))
    assert reported(plane) == (pb.TASK_STATE_FAILED, "timeout")
