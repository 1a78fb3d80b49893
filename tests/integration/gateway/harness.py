"""A real gateway on a loopback port, and agents that are nothing but gRPC calls."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import grpc
from cryptography.fernet import Fernet
from pydantic import SecretStr

from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.gateway import GatewayServer
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.protocol.service import AUTHORIZATION_KEY, METHODS, REASON_KEY, SESSION_KEY, serialize
from leoflow_celery.queueing.messages import seal_request
from leoflow_celery.security import KeyRing, TokenIssuer
from leoflow_celery.settings import (
    DatabaseSettings,
    GatewaySettings,
    LogSettings,
    MaintenanceSettings,
    SecuritySettings,
    Settings,
)
from leoflow_celery.store import Store
from leoflow_celery.store.logs import LogKey
from leoflow_celery.store.submissions import NewTry
from leoflow_celery.store.views import TaskInstanceView
from tests.support.listening import listened

JWT_SECRET = "a secret of the tests, thirty-two bytes or more"
SEAL_KEY = Fernet.generate_key().decode()
FLUSH_SECONDS = 0.1


def settings_for(database_url: str, directory: Path, database_timeout: float = 2, **gateway: Any) -> Settings:
    """A gateway on a free port, with fast heartbeats' flushes."""
    given: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "heartbeat_flush_seconds": FLUSH_SECONDS,
        "shutdown_grace_seconds": 2,
    } | gateway
    return Settings(
        database=DatabaseSettings(url=SecretStr(database_url), timeout_seconds=database_timeout),
        security=SecuritySettings(jwt_secret=SecretStr(JWT_SECRET), seal_keys=SecretStr(SEAL_KEY)),
        logs=LogSettings(root=directory / "logs"),
        gateway=GatewaySettings(**given),
        maintenance=MaintenanceSettings(relaunch_backoff_seconds=0),
    )


class Gateway:
    """A gateway in a thread of this process. ``finished`` collects what its hook was called with."""

    def __init__(self, settings: Settings, fail_hook: bool = False) -> None:
        self.settings = settings
        self.finished: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self.server: GatewayServer | None = None
        self._fail_hook = fail_hook
        self._started: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="gateway", daemon=True)

    def _hook(self, task_instance_id: str, try_number: int) -> None:
        self.finished.put((task_instance_id, try_number))
        if self._fail_hook:
            raise RuntimeError("the broker is away")

    async def _serve(self) -> None:
        self._stopping = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        try:
            self.server = GatewayServer(self.settings, self._hook)
            await self.server.start()
        except Exception as error:
            self._started.put(error)
            if self.server is not None:
                await self.server.stop()
            return
        self._started.put(None)
        await self._stopping.wait()
        await self.server.stop()

    def start(self) -> Self:
        self._thread.start()
        if error := self._started.get(timeout=20):
            self._thread.join(20)
            raise error
        return self

    @property
    def address(self) -> str:
        assert self.server is not None
        return self.server.address

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(20)
        assert not self._thread.is_alive()


class Agent:
    """One agent's calls: raw, without retries. ``session=None`` sends none, as agents of others do."""

    def __init__(
        self, address: str, token: str, session: str | None = "", credentials: grpc.ChannelCredentials | None = None
    ) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        if credentials is None:
            self.channel = grpc.insecure_channel(address, options)
        else:
            self.channel = grpc.secure_channel(address, credentials, options)
        self.session = uuid.uuid4().hex if session == "" else session
        self.metadata: list[tuple[str, str]] = [(AUTHORIZATION_KEY, f"Bearer {token}")]
        if self.session is not None:
            self.metadata.append((SESSION_KEY, self.session))

    def call(self, name: str, request: Any, *extra: tuple[str, str], timeout: float = 10) -> Any:
        method = METHODS[name]
        stub: Any = self.channel.unary_unary(method.path, serialize, method.response.FromString)
        return stub(request, timeout=timeout, metadata=[*self.metadata, *extra], wait_for_ready=True)

    def register(self, hostname: str = "host") -> pb.RegisterResponse:
        answer: pb.RegisterResponse = self.call("Register", pb.RegisterRequest(hostname=hostname))
        return answer

    def spec(self) -> pb.TaskSpec:
        answer: pb.TaskSpec = self.call("GetTaskSpec", pb.GetTaskSpecRequest())
        return answer

    def heartbeat(self) -> pb.HeartbeatResponse:
        answer: pb.HeartbeatResponse = self.call("Heartbeat", pb.HeartbeatRequest())
        return answer

    def report(self, state: int, exit_code: int = 0, message: str = "", reason: str = "") -> pb.ReportStateResponse:
        request = pb.ReportStateRequest(state=state, exit_code=exit_code, error_message=message)  # type: ignore[arg-type]
        answer: pb.ReportStateResponse = self.call("ReportState", request, *([(REASON_KEY, reason)] if reason else []))
        return answer

    def run(self) -> pb.ReportStateResponse:
        """Register and report RUNNING."""
        self.register()
        return self.report(pb.TASK_STATE_RUNNING)

    def push(self, value: bytes, key: str = "", content_type: str = "application/json") -> pb.PushXComResponse:
        request = pb.PushXComRequest(key=key, value=value, content_type=content_type)
        answer: pb.PushXComResponse = self.call("PushXCom", request)
        return answer

    def fetch(self, task_id: str, key: str = "") -> pb.FetchXComResponse:
        answer: pb.FetchXComResponse = self.call("FetchXCom", pb.FetchXComRequest(upstream_task_id=task_id, key=key))
        return answer

    def logs(self) -> LogCall:
        return LogCall(self)

    def close(self) -> None:
        self.channel.close()


class LogCall:
    """One StreamLogs call: ``send`` lines, ``acks`` arrive, ``end`` closes our side."""

    def __init__(self, agent: Agent) -> None:
        self._lines: queue.SimpleQueue[pb.LogLine | None] = queue.SimpleQueue()
        method = METHODS["StreamLogs"]
        stub: Any = agent.channel.stream_stream(method.path, serialize, method.response.FromString)
        self.call = stub(iter(self._lines.get, None), metadata=agent.metadata, wait_for_ready=True)
        self.acks: list[int] = []
        self.error: grpc.RpcError | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            for ack in self.call:
                self.acks.append(ack.acknowledged_through_line)
        except grpc.RpcError as error:
            self.error = error
        finally:
            self._lines.put(None)

    def send(self, *lines: pb.LogLine) -> None:
        for line in lines:
            self._lines.put(line)

    def end(self) -> None:
        self._lines.put(None)

    def join(self, timeout: float = 10) -> None:
        """Until the server has ended the call."""
        self._reader.join(timeout)
        assert not self._reader.is_alive(), "the stream is still open"

    @property
    def code(self) -> grpc.StatusCode | None:
        return self.error.code() if self.error else None

    @property
    def acked(self) -> int:
        return max(self.acks, default=0)

    def cancel(self) -> None:
        self.call.cancel()
        self.join()


def line(number: int, text: str = "", stream: str = "stdout", level: int = pb.LOG_LEVEL_INFO) -> pb.LogLine:
    """A numbered line whose time is its number: sent again, it is the same line."""
    found = pb.LogLine(message=text or f"line {number}", stream=stream, line_number=number, level=level)  # type: ignore[arg-type]
    found.time.FromMilliseconds(1_700_000_000_000 + number)
    return found


class World:
    """A database, a log directory, one gateway at a time, and its agents."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = Store(settings)
        self.tokens = TokenIssuer(JWT_SECRET, 3600)
        self.gateway: Gateway | None = None
        self._agents: list[Agent] = []

    def submit(self, task_instance_id: str = "ti-1", **changes: Any) -> TaskRequest:
        """Record a try, as the client does."""
        executor = changes.pop("recorded_executor", ExecutorType.SUBPROCESS)
        values: dict[str, Any] = {
            "task_instance_id": task_instance_id,
            "dag_id": "sales",
            "run_id": "run:1",
            "task_id": "load",
            "operator": "bash",
            "entrypoint": "true",
        }
        request = TaskRequest(**(values | changes))
        sealed = seal_request(KeyRing(SEAL_KEY), request)
        self.store.submissions.record([NewTry(request, executor, sealed)])
        return request

    def start(self, **hook: bool) -> Gateway:
        self.gateway = Gateway(self.settings, **hook).start()
        return self.gateway

    def restart(self) -> Gateway:
        assert self.gateway is not None
        self.gateway.stop()
        return self.start()

    def agent(self, request: TaskRequest, launch: int = 1, session: str | None = "") -> Agent:
        token = self.tokens.mint(request, request.attempt.evolve(launch=launch))
        return self.agent_with(token, session)

    def agent_with(self, token: str, session: str | None = "") -> Agent:
        assert self.gateway is not None
        agent = Agent(self.gateway.address, token, session)
        self._agents.append(agent)
        return agent

    def view(self, request: TaskRequest) -> TaskInstanceView:
        return self.store.attempts.get(request.task_instance_id, request.try_number)

    def log(self, request: TaskRequest) -> list[str]:
        """The messages in a task's log."""
        return [entry["msg"] for entry in self.store.logs.read(self.log_key(request))]

    @staticmethod
    def log_key(request: TaskRequest) -> LogKey:
        return LogKey(request.tenant_id, request.dag_id, request.run_id, request.task_id, request.try_number)

    def expire_lease(self, request: TaskRequest) -> None:
        """The holder was silent for too long, and somebody listened."""
        from leoflow_celery.store.attempts import Beat

        listened(self.store)
        view = self.view(request)
        self.store.attempts.heartbeat([Beat(view.attempt, view.holder or "")], lease_seconds=-1)

    def close(self) -> None:
        for agent in self._agents:
            agent.close()
        if self.gateway is not None:
            self.gateway.stop()
        self.store.close()


def refused(call: Any, *arguments: Any) -> Any:
    """The error a call was refused with."""
    try:
        answer = call(*arguments)
    except grpc.RpcError as error:
        return error
    raise AssertionError(f"the call was answered: {answer}")


def polled(seconds: float = 10.0, interval: float = 0.01) -> Iterator[float]:
    """Times to look, until a deadline."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield time.monotonic()
        time.sleep(interval)
