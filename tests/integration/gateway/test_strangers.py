"""What callers without a token can make the gateway do: answer with a status, and write next to nothing."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from leoflow_celery.protocol.service import METHODS
from tests.integration.gateway.harness import Agent
from tests.integration.gateway.test_process import ProcessWorld

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


def test_headers_that_no_client_library_would_send_cost_some_lines_at_the_most(world: ProcessWorld) -> None:
    """Straight over a socket: a value and a path that are not text."""
    host, port = world.address.split(":")
    quiet = len(world.process.output())
    for _ in range(100):
        for path, value in ((b"Heartbeat", b"Bearer \xff\xfe canary"), (b"\xff\xfe canary", b"x")):
            with socket.create_connection((host, int(port)), timeout=5) as stranger:
                stranger.sendall(http2_call(path, value))
                stranger.settimeout(5)
                assert stranger.recv(4096)
    world.agent(world.submit()).run()
    written = world.process.output()[quiet:]
    assert "Traceback" not in written
    assert "canary" not in written
    assert len(written) < 6_000, written


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
