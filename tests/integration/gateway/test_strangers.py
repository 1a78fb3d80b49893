"""What callers without a token can make the gateway do: answer with a status, and write next to nothing."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.protocol.service import METHODS
from tests.integration.gateway.harness import Agent, line
from tests.integration.gateway.test_process import ProcessWorld
from tests.support.waiting import wait_until

SERVICE = "leoflow.agent.v1.AgentService"
#: A message that ends in the middle, none, and one whose text is not UTF-8.
BODIES = (b"\xff\xff\xff\xff", b"", b"\x0a\x02\xff\xfe")
WITHOUT_TOKEN = {
    "/grpc.health.v1.Health/Check": {"INVALID_ARGUMENT", "OK"},
    "/no.Service/Nothing": {"UNIMPLEMENTED"},
    f"/{SERVICE}/Nothing": {"UNIMPLEMENTED"},
    **{f"/{SERVICE}/{name}": {"UNAUTHENTICATED"} for name in METHODS},
}


@pytest.fixture
def world(migrated_database_url: str, tmp_path: Path) -> Iterator[ProcessWorld]:
    made = ProcessWorld(migrated_database_url, tmp_path)
    yield made
    made.close()


def code(agent: Agent, path: str, body: bytes, metadata: list[tuple[str, str]], **options: Any) -> str:
    """What a call with these bytes ends with."""
    try:
        if path.endswith("StreamLogs"):
            call: Any = agent.channel.stream_stream(path)(iter([body]), metadata=metadata, timeout=10)
            list(call)
        else:
            agent.channel.unary_unary(path)(body, metadata=metadata, timeout=10, **options)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def test_a_call_without_a_token_is_refused_before_it_is_read(world: ProcessWorld) -> None:
    stranger = world.agent_with("not a token", session=None)
    quiet = len(world.process.output())
    for path, expected in WITHOUT_TOKEN.items():
        for metadata in ([], stranger.metadata, [("authorization", "Bearer x.y.z")], [("authorization", "Basic x")]):
            for body in BODIES:
                assert code(stranger, path, body, metadata) in expected, (path, metadata, body)
    assert code(stranger, f"/{SERVICE}/Heartbeat", bytes(9 * 1024 * 1024), []) == "RESOURCE_EXHAUSTED"
    packed = code(stranger, f"/{SERVICE}/Heartbeat", bytes(100_000), [], compression=grpc.Compression.Gzip)
    assert packed == "UNIMPLEMENTED", "nothing is unpacked"
    written = world.process.output()[quiet:]
    assert "Traceback" not in written
    assert len(written) < 2_000, written


def test_a_holder_that_sends_what_cannot_be_decoded_hears_so_and_goes_on(world: ProcessWorld) -> None:
    agent = world.agent(world.submit())
    agent.run()
    quiet = len(world.process.output())
    for name in METHODS.keys() - {"ExchangeToken"}:  # it takes no agent token at all
        assert code(agent, f"/{SERVICE}/{name}", BODIES[0], agent.metadata) == "INVALID_ARGUMENT", name
    assert not agent.heartbeat().should_terminate
    assert world.process.output()[quiet:] == ""


def test_metadata_that_no_client_library_would_send_costs_some_lines_at_the_most(world: ProcessWorld) -> None:
    quiet = len(world.process.output())
    for _ in range(100):
        send(world, b"Heartbeat", b"Bearer \xff\xfe canary")
    world.agent(world.submit()).run()
    written = world.process.output()[quiet:]
    assert "Traceback" not in written
    assert "canary" not in written
    assert len(written) < 4_000, written


def test_a_path_that_is_not_text_does_not_end_the_gateway(world: ProcessWorld) -> None:
    """It ends grpc's server, which is made anew. When this passes without ``_serve_again``, grpc can do without it."""
    agent = world.agent(world.submit())
    agent.run()
    logs = agent.logs()
    logs.send(line(1))
    wait_until(lambda: logs.acked == 1)
    quiet = len(world.process.output())
    for number in range(2, 5):
        send(world, b"\xff\xfe canary", b"x")
        logs.join()
        assert logs.code is not None
        wait_until(lambda: code(agent, f"/{SERVICE}/Heartbeat", b"", agent.metadata) == "OK", 15)
        logs = agent.logs()
        logs.send(line(number))
        wait_until(lambda: logs.acked == number, 10)  # noqa: B023
    assert agent.report(pb.TASK_STATE_SUCCESS).acknowledged
    written = world.process.output()[quiet:]
    assert "Traceback" not in written
    assert "canary" not in written
    assert len(written) < 2_000, written
    assert world.process.terminate() == 0


def send(world: ProcessWorld, method: bytes, authorization: bytes) -> None:
    """A call straight over a socket, until the gateway answered something."""
    host, port = world.address.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as stranger:
        stranger.sendall(http2_call(method, authorization))
        assert stranger.recv(4096)


def http2_call(method: bytes, authorization: bytes) -> bytes:
    """An HTTP/2 preface and a call with an empty message; headers are literals without an index."""
    headers = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", b"/leoflow.agent.v1.AgentService/" + method),
        (b":authority", b"gateway"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
        (b"authorization", authorization),
    ]
    block = b"".join(bytes([0, len(name)]) + name + bytes([len(value)]) + value for name, value in headers)
    frames = frame(4, 0, 0, b"") + frame(1, 4, 1, block) + frame(0, 1, 1, bytes(5))
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frames


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload
