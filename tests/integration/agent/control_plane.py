"""A control plane for tests: a real grpc.aio server in a thread that records every call and can be killed.

It keeps its record over a restart, as a real one keeps its database, so it can be started again.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.protocol.service import METHODS, SERVICE, serialize


class Refusal(Exception):
    """Raised by a scripted answer: end the call with this status."""

    def __init__(self, code: grpc.StatusCode, details: str = "", trailing: tuple[tuple[str, str], ...] = ()) -> None:
        self.code, self.details, self.trailing = code, details, trailing


@dataclass
class Call:
    """One call that arrived."""

    name: str
    request: Any
    metadata: dict[str, str]


@dataclass
class ControlPlane:
    """``spec`` and ``xcoms`` are what it serves, the lists below are what arrived. It listens on ``host``."""

    spec: pb.TaskSpec = field(default_factory=pb.TaskSpec)
    xcoms: dict[str, bytes] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    connections: dict[str, str] = field(default_factory=dict)
    #: method → a function of the call that returns another answer, or raises Refusal
    script: dict[str, Callable[[Call], Any]] = field(default_factory=dict)
    should_terminate: bool = False
    ack_logs: bool = True

    calls: list[Call] = field(default_factory=list)
    lines: dict[int, pb.LogLine] = field(default_factory=dict)
    line_versions: dict[int, set[bytes]] = field(default_factory=dict)
    pushed: list[pb.PushXComRequest] = field(default_factory=list)
    holder: str = ""
    host: str = "127.0.0.1"

    def __post_init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._port = 0
        self._server: grpc.aio.Server | None = None
        self._streams: set[asyncio.Event] = set()

    # -- for the test -------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        return f"{self.host}:{self._port}"

    def start(self) -> ControlPlane:
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def stop(self) -> None:
        """Die at once: open calls break."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def abort_streams(self) -> None:
        """Close every log stream with ABORTED."""
        self._loop.call_soon_threadsafe(lambda: [event.set() for event in self._streams])

    def reports(self) -> list[pb.ReportStateRequest]:
        return [call.request for call in self.calls if call.name == "ReportState"]

    def final(self) -> Call | None:
        ended = [c for c in self.calls if c.name == "ReportState" and c.request.state != pb.TASK_STATE_RUNNING]
        return ended[-1] if ended else None

    def count(self, name: str) -> int:
        return sum(call.name == name for call in self.calls)

    def text(self, stream: str) -> list[str]:
        return [line.message for _, line in sorted(self.lines.items()) if line.stream == stream]

    # -- the server ---------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        handlers = {name: self._handler(name) for name in METHODS}
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self._port = server.add_insecure_port(f"{self.host}:{self._port}")
        await server.start()
        self._server = server

    async def _stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    def _handler(self, name: str) -> grpc.RpcMethodHandler:
        method = METHODS[name]
        if method.streaming:
            return grpc.stream_stream_rpc_method_handler(self._stream_logs, pb.LogLine.FromString, serialize)

        async def unary(request: Any, context: Any) -> Any:
            call = Call(name, request, {k: str(v) for k, v in context.invocation_metadata()})
            self.calls.append(call)
            try:
                answer = self.script[name](call) if name in self.script else None
                return answer if answer is not None else getattr(self, "_" + name)(call)
            except Refusal as refusal:
                await context.abort(refusal.code, refusal.details, refusal.trailing)

        return grpc.unary_unary_rpc_method_handler(unary, method.request.FromString, serialize)

    async def _stream_logs(self, lines: AsyncIterator[pb.LogLine], context: Any) -> AsyncIterator[pb.LogAck]:
        call = Call("StreamLogs", None, {k: str(v) for k, v in context.invocation_metadata()})
        self.calls.append(call)
        if "StreamLogs" in self.script:
            try:
                self.script["StreamLogs"](call)
            except Refusal as refusal:
                await context.abort(refusal.code, refusal.details)
        aborted = asyncio.Event()
        self._streams.add(aborted)
        abort = asyncio.ensure_future(aborted.wait())
        iterator = aiter(lines)
        try:
            while True:
                following = asyncio.ensure_future(anext(iterator, None))
                await asyncio.wait({following, abort}, return_when=asyncio.FIRST_COMPLETED)
                if abort.done():
                    following.cancel()
                    await context.abort(grpc.StatusCode.ABORTED, "fenced")
                line = following.result()
                if line is None:
                    return
                self.lines[line.line_number] = line
                self.line_versions.setdefault(line.line_number, set()).add(line.SerializeToString())
                if self.ack_logs:
                    yield pb.LogAck(acknowledged_through_line=line.line_number)
        finally:
            abort.cancel()
            self._streams.discard(aborted)

    def _Register(self, call: Call) -> pb.RegisterResponse:
        session = call.metadata.get("x-leoflow-session", "")
        if self.holder not in ("", session):
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "held by another", (("x-leoflow-refused", "held"),))
        self.holder = session
        return pb.RegisterResponse(session_id="s")

    def _GetTaskSpec(self, call: Call) -> pb.TaskSpec:
        return self.spec

    def _FetchXCom(self, call: Call) -> pb.FetchXComResponse:
        if call.request.upstream_task_id not in self.xcoms:
            raise Refusal(grpc.StatusCode.NOT_FOUND, "no such XCom")
        return pb.FetchXComResponse(value=self.xcoms[call.request.upstream_task_id])

    def _PushXCom(self, call: Call) -> pb.PushXComResponse:
        self.pushed.append(call.request)
        return pb.PushXComResponse(accepted=True)

    def _ReportState(self, call: Call) -> pb.ReportStateResponse:
        return pb.ReportStateResponse(acknowledged=True)

    def _Heartbeat(self, call: Call) -> pb.HeartbeatResponse:
        return pb.HeartbeatResponse(should_terminate=self.should_terminate)

    def _GetVariables(self, call: Call) -> pb.GetVariablesResponse:
        return pb.GetVariablesResponse(variables=self.variables)

    def _GetConnections(self, call: Call) -> pb.GetConnectionsResponse:
        return pb.GetConnectionsResponse(connection_uris=self.connections)

    def _ExchangeToken(self, call: Call) -> pb.ExchangeTokenResponse:
        raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "this control plane exchanges no tokens")
