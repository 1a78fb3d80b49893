"""Calls to the control plane: one channel, our metadata, foreign errors mapped to ours, retries.

The only file of the agent that imports grpc.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio

from leoflow_celery.agent.config import AgentConfig
from leoflow_celery.agent.deadline import Deadline
from leoflow_celery.errors import (
    ClaimRefused,
    ConfigurationError,
    Fenced,
    GatewayUnavailable,
    InvalidToken,
    LeoflowError,
    NotFound,
)
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.protocol.service import (
    AUTHORIZATION_KEY,
    CAPABILITIES_KEY,
    METHODS,
    REFUSED_KEY,
    RENEWS_TOKEN,
    SESSION_KEY,
    TOKEN_KEY,
    serialize,
)

T = TypeVar("T")

#: One call may take this long before it counts as unanswered.
CALL_TIMEOUT_SECONDS = 20.0
_FIRST_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS = 0.1, 2.0
#: A token that is refused sooner after its exchange will not be better after the next one.
_EXCHANGE_AGAIN_SECONDS = 10.0
_OPTIONS: list[tuple[str, Any]] = [
    # A restarted gateway is found again within a second or two.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_500),
    ("grpc.min_reconnect_backoff_ms", 5_000),
    # A dead peer is noticed; heartbeats in between keep servers from counting the pings as abuse.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", -1),
    # Proxies in the environment are for the user's process, not for the way to the control plane.
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
]
_CODE = grpc.StatusCode
_MAY_WORK_LATER = frozenset(
    {
        _CODE.UNAVAILABLE,
        _CODE.DEADLINE_EXCEEDED,
        _CODE.INTERNAL,
        _CODE.UNKNOWN,
        _CODE.RESOURCE_EXHAUSTED,
        _CODE.CANCELLED,
        _CODE.DATA_LOSS,
    }
)


class CallRefused(LeoflowError):
    """The control plane answers this call with no, and will again. ``code`` is the gRPC status name."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code, self.message = code, message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


def map_error(code: grpc.StatusCode, details: str, trailing: dict[str, Any]) -> LeoflowError:
    """Every gRPC status as an error of ours."""
    if code in _MAY_WORK_LATER:
        return GatewayUnavailable(f"{code.name}: {details}")
    match code:
        case _CODE.UNAUTHENTICATED:
            return InvalidToken("refused", details)
        case _CODE.FAILED_PRECONDITION if REFUSED_KEY in trailing:
            return ClaimRefused(str(trailing[REFUSED_KEY]), details)
        case _CODE.ABORTED:
            return Fenced(details)
        case _CODE.NOT_FOUND:
            return NotFound(details)
        case _:
            return CallRefused(code.name, details)


def _mapped(error: grpc.aio.AioRpcError) -> LeoflowError:
    return map_error(error.code(), error.details() or "", dict(error.trailing_metadata() or ()))


def open_channel(config: AgentConfig) -> grpc.aio.Channel:
    """A channel to the control plane, with TLS when the agent was told so.

    Raises:
        ConfigurationError: the CA file cannot be read.
    """
    if config.insecure:
        return grpc.aio.insecure_channel(config.address, options=_OPTIONS)
    try:
        root = Path(config.tls_ca).read_bytes() if config.tls_ca else None
    except OSError as error:
        raise ConfigurationError(f"LEOFLOW_AGENT_TLS_CA={config.tls_ca}: {error.strerror}") from error
    return grpc.aio.secure_channel(config.address, grpc.ssl_channel_credentials(root), options=_OPTIONS)


class ControlPlane:
    """The methods of AgentService, as one holder.

    An agent without a token first exchanges what its pod's file holds for the token of the launch, and again when that
    was refused (it has expired). No token is ever written down.
    """

    def __init__(self, channel: grpc.aio.Channel, config: AgentConfig) -> None:
        self._channel = channel
        #: When a unary call was last answered (monotonic): the control plane was there.
        self.answered_at = 0.0
        self._session = config.session
        self._launch_token = self._token = config.token
        self._token_path, self._exchanged_at = config.token_path, float("-inf")
        self._registration = pb.RegisterRequest()
        self._registering = asyncio.Lock()

    async def register(self, request: pb.RegisterRequest) -> None:
        """Claim the attempt. Answered with a token, all later calls use that.

        Raises:
            What ``call`` raises.
        """
        self._registration = request
        if not self._launch_token:
            await self._exchange()
        try:
            _, trailing = await self._unary("Register", request, self._launch_token)
        except InvalidToken:
            if not self._may_exchange:
                raise
            await self._exchange()
            _, trailing = await self._unary("Register", request, self._launch_token)
        self.use_token(str(trailing.get(TOKEN_KEY, "")))

    def use_token(self, token: str) -> None:
        """The token of every call from now on; empty: keep the one there is."""
        self._token = token or self._token

    async def token_again(self, refused: str) -> bool:
        """Another token than the one that was refused, by registering or exchanging once more; False without one.

        A renewed token lives for minutes: after a longer absence of the control plane it has expired, and the token of
        the launch still says who we are.

        Raises:
            What ``call`` raises.
        """
        async with self._registering:
            if self._token == refused != self._launch_token:
                await self.register(self._registration)
            elif self._token == refused and self._may_exchange:
                await self._exchange()
            return self._token != refused

    @property
    def _may_exchange(self) -> bool:
        return bool(self._token_path) and time.monotonic() - self._exchanged_at >= _EXCHANGE_AGAIN_SECONDS

    async def _exchange(self) -> None:
        """Show what the pod's file holds for the token of the launch."""
        proof = _read_proof(self._token_path)
        try:
            answer, _ = await self._unary("ExchangeToken", pb.ExchangeTokenRequest(), proof)
        except CallRefused as error:
            raise InvalidToken("refused", f"the control plane gives this pod no token: {error}") from error
        if not answer.agent_token:
            raise InvalidToken("refused", "the control plane answered the exchange without a token")
        self._launch_token = self._token = answer.agent_token
        self._exchanged_at = time.monotonic()

    async def call(self, name: str, request: Any, metadata: Sequence[tuple[str, str]] = ()) -> Any:
        """One unary call, with further metadata beside ours.

        Raises:
            GatewayUnavailable, InvalidToken, ClaimRefused, Fenced, NotFound, CallRefused: see ``map_error``.
        """
        token = self._token
        try:
            answer, _ = await self._unary(name, request, token, metadata)
        except InvalidToken:
            if not await self.token_again(token):
                raise
            answer, _ = await self._unary(name, request, self._token, metadata)
        return answer

    async def _unary(
        self, name: str, request: Any, token: str, metadata: Sequence[tuple[str, str]] = ()
    ) -> tuple[Any, dict[str, Any]]:
        method = METHODS[name]
        stub = self._channel.unary_unary(method.path, serialize, method.response.FromString)
        sent: Any = stub(request, timeout=CALL_TIMEOUT_SECONDS, metadata=(*self._metadata(token), *metadata))
        try:
            answer = await sent
            trailing = dict(await sent.trailing_metadata() or ())
        except grpc.aio.AioRpcError as error:
            raise _mapped(error) from error
        self.answered_at = time.monotonic()
        return answer, trailing

    def _metadata(self, token: str) -> Sequence[tuple[str, str]]:
        own = ((SESSION_KEY, self._session), (CAPABILITIES_KEY, RENEWS_TOKEN))
        return ((AUTHORIZATION_KEY, f"Bearer {token}"), *own)

    def open_log_stream(self) -> LogStream:
        """A new StreamLogs call."""
        method = METHODS["StreamLogs"]
        stub: Any = self._channel.stream_stream(method.path, None, method.response.FromString)
        return LogStream(stub(metadata=self._metadata(self._token)), self._token)


def _read_proof(path: str) -> str:
    """The service account's token, as it is now: the kubelet replaces it."""
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"LEOFLOW_AGENT_TOKEN_PATH={path} cannot be read: {error}") from error


class LogStream:
    """One StreamLogs call; lines go in serialized, acknowledged line numbers come out."""

    def __init__(self, call: Any, token: str) -> None:
        """``token`` is the one that it was opened with."""
        self._call, self.token = call, token

    async def send(self, line: bytes) -> bool:
        """Send one line; False when the stream is over (``acks`` says why)."""
        try:
            await self._call.write(line)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return False
        return True

    async def finish(self) -> None:
        """Say that no further line comes."""
        if not self._call.done():
            await self._call.done_writing()

    async def acks(self) -> AsyncIterator[int]:
        """Line numbers through which everything has arrived, until the server closes the stream.

        Raises:
            LeoflowError: the stream did not end with OK.
        """
        try:
            async for ack in self._call:
                yield ack.acknowledged_through_line
        except grpc.aio.AioRpcError as error:
            raise _mapped(error) from error

    def cancel(self) -> None:
        self._call.cancel()


async def retried(operation: Callable[[], Awaitable[T]], deadline: Deadline) -> T:
    """The result of an operation, tried with jittered backoff while the control plane is away.

    Raises what the operation raised last.
    """
    backoff = _FIRST_BACKOFF_SECONDS
    while True:
        try:
            return await operation()
        except GatewayUnavailable:
            if deadline.left() <= 0:
                raise
        await asyncio.sleep(random.uniform(0, backoff))  # noqa: S311 - jitter
        backoff = min(backoff * 2, _MAX_BACKOFF_SECONDS)
