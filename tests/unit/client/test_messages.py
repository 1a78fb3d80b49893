"""What a launch message shows and what it seals; requests at rest."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.fernet import Fernet

from leoflow_celery.client.messages import LaunchMessage, MessageSender, open_request, seal_request
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.errors import Unsealable
from leoflow_celery.services import Services
from leoflow_celery.settings import SecuritySettings, Settings

CANARY = "c4n4ry"


def services() -> Services:
    return Services(Settings(security=SecuritySettings(jwt_secret="x" * 32, seal_keys=Fernet.generate_key().decode())))


def request(**fields: Any) -> TaskRequest:
    given = {"task_instance_id": "ti", "dag_id": "d", "run_id": "r", "task_id": "t", "operator": "bash"}
    return TaskRequest.model_validate({**given, "entrypoint": "true", **fields})


class RecordingApp:
    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, Any], dict[str, Any]]] = []

    def send_task(self, name: str, kwargs: dict[str, Any], **options: Any) -> None:
        self.sent.append((name, kwargs, options))


def test_a_launch_message_shows_ids_and_seals_the_rest():
    app, process = RecordingApp(), services()
    secret = request(env={"TOKEN": CANARY}, call_args={"a": CANARY}, image="img:1", priority=7)
    MessageSender(app, process).launch(LaunchMessage(secret, ExecutorType.DOCKER, secret.attempt, "celery-id"))
    [(name, kwargs, options)] = app.sent
    assert name == "leoflow.execute.docker"
    assert (options["queue"], options["task_id"], options["priority"]) == ("docker", "celery-id", 7)
    assert CANARY not in str(app.sent)
    assert (kwargs["operator"], kwargs["image"]) == ("bash", "img:1")
    ready = TaskRequest.model_validate(process.sealer.open(kwargs["sealed"])["request"])
    assert ready.env == {"TOKEN": CANARY}
    assert ready.control_plane_addr == process.settings.agent.control_plane_addr
    assert process.tokens.verify(ready.agent_token).attempt == secret.attempt


def test_a_relaunch_gets_a_token_of_its_own_launch():
    app, process = RecordingApp(), services()
    given = request(agent_token="of-launch-1")
    MessageSender(app, process).launch(
        LaunchMessage(given, ExecutorType.SUBPROCESS, given.attempt.evolve(launch=2), "id")
    )
    sealed = process.sealer.open(app.sent[0][1]["sealed"])["request"]
    assert process.tokens.verify(sealed["agent_token"]).attempt.launch == 2


def test_an_inline_message_carries_ids_only():
    app = RecordingApp()
    call = request(operator="http_api", http_request={"method": "GET", "url": f"http://h/{CANARY}"})
    MessageSender(app, services()).launch(LaunchMessage(call, ExecutorType.INLINE, call.attempt, "id"))
    assert app.sent[0][1] == {"attempt": {"task_instance_id": "ti", "try_number": 1, "launch": 1}}
    assert CANARY not in str(app.sent)


def test_a_request_at_rest_opens_again_with_its_key_only():
    process = services()
    sealed = seal_request(process, request(env={"A": CANARY}))
    assert CANARY not in sealed
    assert open_request(process, sealed).env == {"A": CANARY}
    with pytest.raises(Unsealable, match="LEOFLOW_SEAL_KEYS"):
        open_request(services(), sealed)


@pytest.mark.parametrize("content", [{}, {"request": {"task_instance_id": "ti", "of_the_future": 1}}])
def test_a_request_of_another_version_is_unsealable(content: dict[str, Any]):
    process = services()
    with pytest.raises(Unsealable, match="none of this version"):
        open_request(process, process.sealer.seal(content))
