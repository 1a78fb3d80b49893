"""An agent without a token: it exchanges what the kubelet gave its pod, as often as it has to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from leoflow_celery.protocol import agent_pb2 as pb
from tests.integration.agent.conftest import AgentProcess
from tests.integration.agent.control_plane import Call, ControlPlane, Refusal

CODE = grpc.StatusCode
Start = Callable[..., AgentProcess]
PROOF, TOKEN = "pr00f", "t0k3n"
#: A token counts as given long ago.
OLD = "import leoflow_celery.agent.client as c; c._EXCHANGE_AGAIN_SECONDS = 0"


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    path = tmp_path / "proof"
    path.write_text(f"{PROOF}-1\n")
    return path


@pytest.fixture
def start(start_agent: Start, proof: Path) -> Start:
    def start(defect: str = "", **env: str) -> AgentProcess:
        return start_agent(defect, LEOFLOW_AGENT_TOKEN="", LEOFLOW_AGENT_TOKEN_PATH=str(proof), **env)

    return start


def bearer(call: Call) -> str:
    return call.metadata["authorization"].removeprefix("Bearer ")


def proofs(plane: ControlPlane) -> list[str]:
    return [bearer(call) for call in plane.calls if call.name == "ExchangeToken"]


def giving(plane: ControlPlane) -> Callable[[Call], pb.ExchangeTokenResponse]:
    """Each exchange gives the next token: t0k3n-1, t0k3n-2 …"""
    return lambda _: pb.ExchangeTokenResponse(agent_token=f"{TOKEN}-{plane.count('ExchangeToken')}")


def refusing(code: grpc.StatusCode, text: str = "", trailing: Any = ()) -> Callable[[Call], Any]:
    def refuse(_: Call) -> Any:
        raise Refusal(code, text, trailing)

    return refuse


def bash(script: str) -> pb.TaskSpec:
    return pb.TaskSpec(operator="bash", entrypoint=script)


def test_it_exchanges_once_and_calls_with_what_it_got(plane: ControlPlane, start: Start) -> None:
    plane.spec, plane.script["ExchangeToken"] = bash("true"), giving(plane)
    assert start().wait() == 0
    assert proofs(plane) == [f"{PROOF}-1"]
    others = {bearer(call) for call in plane.calls if call.name != "ExchangeToken"}
    assert others == {f"{TOKEN}-1"}
    assert "StreamLogs" in {call.name for call in plane.calls}


def test_user_code_finds_neither_token_nor_path_and_no_file_has_the_token(plane: ControlPlane, start: Start) -> None:
    """Only the kubelet's own file is there for it, which is good for an exchange of its own attempt."""
    script = 'env; grep -rs t0k3n "$(dirname "$LEOFLOW_RETURN_VALUE_PATH")" "$HOME" | wc -l'
    plane.spec, plane.script["ExchangeToken"] = bash(script), giving(plane)
    agent = start(HOME="/nonexistent")
    agent.wait()
    printed = "\n".join(plane.text("stdout"))
    assert "LEOFLOW_TASK_INSTANCE_ID" in printed
    assert "TOKEN_PATH" not in printed
    assert TOKEN not in printed + agent.output + agent.log.read_text()
    assert PROOF not in printed + agent.output


def test_a_control_plane_that_is_away_or_does_not_know_yet_is_asked_again(
    plane: ControlPlane, start: Start, proof: Path
) -> None:
    """The kubelet may have replaced the file in between, so each try reads it."""
    plane.spec = bash("true")

    def not_yet(call: Call) -> Any:
        if plane.count("ExchangeToken") < 4:
            proof.write_text(f"{PROOF}-{plane.count('ExchangeToken') + 1}")
            raise Refusal(CODE.UNAVAILABLE, "no launch worker has vouched for it yet")
        return pb.ExchangeTokenResponse(agent_token=TOKEN)

    plane.script["ExchangeToken"] = not_yet
    assert start().wait() == 0
    assert proofs(plane) == [f"{PROOF}-{number}" for number in range(1, 5)]


def test_a_token_that_has_expired_is_exchanged_again_with_the_newest_proof(
    plane: ControlPlane, start: Start, proof: Path
) -> None:
    plane.spec, plane.script["ExchangeToken"] = bash("true"), giving(plane)

    def expire(call: Call) -> Any:
        if bearer(call) == f"{TOKEN}-1":
            proof.write_text(f"{PROOF}-2")
            raise Refusal(CODE.UNAUTHENTICATED, "the agent token has expired")
        return None

    plane.script["GetTaskSpec"] = expire
    agent = start(OLD, LEOFLOW_AGENT_HEARTBEAT_SECONDS="60")
    assert agent.wait() == 0
    assert proofs(plane) == [f"{PROOF}-1", f"{PROOF}-2"]
    assert [bearer(call) for call in plane.calls if call.name == "GetTaskSpec"] == [f"{TOKEN}-1", f"{TOKEN}-2"]
    assert bearer(plane.final()) == f"{TOKEN}-2"  # type: ignore[arg-type]


def test_a_log_stream_goes_on_with_the_new_token(plane: ControlPlane, start: Start) -> None:
    plane.spec, plane.script["ExchangeToken"] = bash("echo one; sleep 0.5; echo two"), giving(plane)

    def expire(call: Call) -> Any:
        if bearer(call) == f"{TOKEN}-1":
            raise Refusal(CODE.UNAUTHENTICATED, "the agent token has expired")

    plane.script["StreamLogs"] = expire
    assert start(OLD).wait() == 0
    assert plane.text("stdout") == ["one", "two"]
    assert plane.count("ExchangeToken") == 2


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (CODE.UNAUTHENTICATED, "the service account token has expired"),
        (CODE.PERMISSION_DENIED, "has the seal of another pod"),
        (CODE.FAILED_PRECONDITION, "this gateway exchanges no tokens"),
        (CODE.UNIMPLEMENTED, "Method not found!"),
    ],
)
def test_a_refusal_is_final_and_says_why(plane: ControlPlane, start: Start, code: Any, text: str) -> None:
    plane.script["ExchangeToken"] = refusing(code, text)
    agent = start()
    assert agent.wait() == 1
    assert plane.count("ExchangeToken") == 1
    assert plane.count("Register") == 0
    left = agent.termination()
    assert (left["reason"], text in left["message"]) == ("forbidden", True)


def test_the_pod_of_an_attempt_that_is_over_runs_nothing_and_that_is_in_order(
    plane: ControlPlane, start: Start
) -> None:
    over = refusing(CODE.FAILED_PRECONDITION, "is success already", (("x-leoflow-refused", "terminal"),))
    plane.script["ExchangeToken"] = over
    assert start().wait() == 0
    assert plane.count("Register") == 0


def test_a_token_that_is_refused_at_once_is_not_exchanged_for_ever(plane: ControlPlane, start: Start) -> None:
    plane.script["ExchangeToken"] = giving(plane)
    plane.script["Register"] = refusing(CODE.UNAUTHENTICATED, "signature is not ours")
    agent = start()
    assert agent.wait() == 1
    assert plane.count("ExchangeToken") == 1
    assert agent.termination()["reason"] == "forbidden"


def test_a_missing_file_is_named(start_agent: Start, tmp_path: Path) -> None:
    agent = start_agent(LEOFLOW_AGENT_TOKEN="", LEOFLOW_AGENT_TOKEN_PATH=str(tmp_path / "missing"))
    assert agent.wait() == 1
    assert f"LEOFLOW_AGENT_TOKEN_PATH={tmp_path}/missing cannot be read" in agent.output


def test_a_token_in_the_environment_is_used_as_it_is(plane: ControlPlane, start_agent: Start, proof: Path) -> None:
    plane.spec = bash("true")
    assert start_agent(LEOFLOW_AGENT_TOKEN_PATH=str(proof)).wait() == 0
    assert plane.count("ExchangeToken") == 0
