"""What a launch message shows and what it seals; requests at rest."""

from __future__ import annotations

import ast
from typing import Any

import pytest
from cryptography.fernet import Fernet

from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.errors import DecryptionFailed, StoredRequestInvalid
from leoflow_celery.queueing.messages import Launch, LaunchInline, open_message, open_request, seal_request
from leoflow_celery.queueing.publisher import LaunchOrder, Publisher
from leoflow_celery.services import Services
from leoflow_celery.settings import SecuritySettings, Settings

CANARY = "c4n4ry"


def runtime() -> Services:
    return Services(Settings(security=SecuritySettings(jwt_secret="x" * 32, seal_keys=Fernet.generate_key().decode())))


def request(**fields: Any) -> TaskRequest:
    given = {"task_instance_id": "ti", "dag_id": "d", "run_id": "r", "task_id": "t", "operator": "bash"}
    entrypoint = "" if fields.get("operator") == "http_api" else "true"
    return TaskRequest.model_validate({**given, "entrypoint": entrypoint, **fields})


class RecordingApp:
    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, Any], dict[str, Any]]] = []

    def send_task(self, name: str, kwargs: dict[str, Any], **options: Any) -> None:
        self.sent.append((name, kwargs, options))


def test_a_launch_message_shows_ids_and_seals_the_rest():
    app, process = RecordingApp(), runtime()
    secret = request(env={"TOKEN": CANARY}, call_args={"a": CANARY}, image="img:1", priority=7)
    Publisher(app, process).launch(LaunchOrder(secret, ExecutorType.DOCKER, secret.attempt, "celery-id"))
    [(name, kwargs, options)] = app.sent
    assert name == "leoflow.execute.docker"
    assert (options["queue"], options["task_id"], options["priority"]) == ("docker", "celery-id", 7)
    assert CANARY not in str(app.sent)
    shown = {"run": "r", "attempt": "ti/1.1", "executor": "docker", "operator": "bash", "image": "img:1"}
    assert ast.literal_eval(options["kwargsrepr"]) == shown
    assert options["shadow"] == "d.t"
    message = open_message(process.keys, "docker", Launch, kwargs["sealed"])
    assert message.attempt == secret.attempt
    ready = message.request
    assert ready.env == {"TOKEN": CANARY}
    assert ready.control_plane_addr == process.settings.agent.control_plane_addr
    assert process.tokens.verify(ready.agent_token).attempt == secret.attempt


def test_a_name_that_is_too_long_for_a_header_is_cut():
    app, process = RecordingApp(), runtime()
    given = request(dag_id="d" * 200, task_id="t" * 200)
    Publisher(app, process).launch(LaunchOrder(given, ExecutorType.SUBPROCESS, given.attempt, "id"))
    assert app.sent[0][2]["shadow"] == "d" * 200 + "." + "t" * 54


def test_a_relaunch_gets_a_token_of_its_own_launch():
    app, process = RecordingApp(), runtime()
    given = request(agent_token="of-launch-1")
    Publisher(app, process).launch(LaunchOrder(given, ExecutorType.SUBPROCESS, given.attempt.evolve(launch=2), "id"))
    message = open_message(process.keys, "subprocess", Launch, app.sent[0][1]["sealed"])
    assert process.tokens.verify(message.request.agent_token).attempt.launch == 2


def test_an_inline_message_carries_ids_only():
    app, process = RecordingApp(), runtime()
    call = request(operator="http_api", http_request={"method": "GET", "url": f"http://h/{CANARY}"})
    Publisher(app, process).launch(LaunchOrder(call, ExecutorType.INLINE, call.attempt, "id"))
    assert app.sent[0][1].keys() == {"sealed"}
    assert open_message(process.keys, "control", LaunchInline, app.sent[0][1]["sealed"]).attempt == call.attempt
    assert CANARY not in str(app.sent)


def test_a_request_at_rest_opens_again_with_its_key_only():
    process = runtime()
    sealed = seal_request(process.keys, request(env={"A": CANARY}))
    assert CANARY not in sealed
    assert open_request(process.keys, sealed).env == {"A": CANARY}
    with pytest.raises(DecryptionFailed, match="LEOFLOW_SEAL_KEYS"):
        open_request(runtime().keys, sealed)


@pytest.mark.parametrize(
    ("content", "error", "text"),
    [
        ({}, DecryptionFailed, "not of this version"),
        ({"request": {"of_the_future": 1}}, StoredRequestInvalid, "dag_id: Field required; .*submit it anew"),
        ({"request": {"env": {"LEOFLOW_AGENT_X": CANARY}}}, StoredRequestInvalid, "breaks a rule of this one"),
    ],
)
def test_a_request_of_another_version_is_unsealable(content: dict[str, Any], error: type[Exception], text: str):
    process = runtime()
    with pytest.raises(error, match=text) as caught:
        open_request(process.keys, process.keys.sealer("request").seal(content))
    assert CANARY not in str(caught.value)
