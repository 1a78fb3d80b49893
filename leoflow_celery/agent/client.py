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
from leoflow_celery.agent.patience import Patience
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
from leoflow_celery.protocol.service import AUTHORIZATION_KEY, METHODS, REFUSED_KEY, SESSION_KEY, serialize

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

    An agent without a token first exchanges what its pod's file holds for one, and again when that was refused (it has
    expired). The token is kept in memory alone.
    """

    def __init__(self, channel: grpc.aio.Channel, config: AgentConfig) -> None:
        self._channel = channel
        #: When a unary call was last answered (monotonic): the control plane was there.
        self.answered_at = 0.0
        self._token, self._token_path, self._session = config.token, config.token_path, config.session
        self._exchanging, self._exchanged_at = asyncio.Lock(), float("-inf")

    async def call(self, name: str, request: Any, metadata: Sequence[tuple[str, str]] = ()) -> Any:
        """One unary call, with further metadata beside ours.

        Raises:
            GatewayUnavailable, InvalidToken, ClaimRefused, Fenced, NotFound, CallRefused: see ``map_error``.
        """
        if not self._token:
            await self._exchange("")
        token = self._token
        try:
            return await self._call(name, request, (*self._credentials(token), *metadata))
        except InvalidToken as error:
            await self.replace_token(token, error)
        return await self._call(name, request, (*self._credentials(self._token), *metadata))

    async def replace_token(self, refused: str, error: InvalidToken) -> None:
        """Get another token than the one that was refused.

        Raises:
            InvalidToken: there is no other; ``error`` itself when none was asked for.
            GatewayUnavailable, ClaimRefused: as the exchange was answered.
        """
        if self._token == refused:
            if not self._token_path or time.monotonic() - self._exchanged_at < _EXCHANGE_AGAIN_SECONDS:
                raise error
            await self._exchange(refused)

    async def _exchange(self, refused: str) -> None:
        async with self._exchanging:
            if self._token != refused:
                return  # another call has exchanged it meanwhile
            proof = _read_proof(self._token_path)
            try:
                answer = await self._call("ExchangeToken", pb.ExchangeTokenRequest(), _bearer(proof))
            except CallRefused as error:
                raise InvalidToken("refused", f"the control plane gives this pod no token: {error}") from error
            if not answer.agent_token:
                raise InvalidToken("refused", "the control plane answered the exchange without a token")
            self._token, self._exchanged_at = answer.agent_token, time.monotonic()

    def _credentials(self, token: str) -> tuple[tuple[str, str], ...]:
        return (*_bearer(token), (SESSION_KEY, self._session))

    async def _call(self, name: str, request: Any, metadata: Sequence[tuple[str, str]]) -> Any:
        method = METHODS[name]
        stub = self._channel.unary_unary(method.path, serialize, method.response.FromString)
        try:
            answer = await stub(request, timeout=CALL_TIMEOUT_SECONDS, metadata=tuple(metadata))
        except grpc.aio.AioRpcError as error:
            raise _mapped(error) from error
        self.answered_at = time.monotonic()
        return answer

    def open_log_stream(self) -> LogStream:
        """A new StreamLogs call, with the token of the calls before it."""
        method = METHODS["StreamLogs"]
        stub: Any = self._channel.stream_stream(method.path, None, method.response.FromString)
        return LogStream(stub(metadata=self._credentials(self._token)), self._token)


def _bearer(token: str) -> tuple[tuple[str, str], ...]:
    return ((AUTHORIZATION_KEY, f"Bearer {token}"),)


def _read_proof(path: str) -> str:
    """The service account's token, as it is now: the kubelet replaces it."""
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"LEOFLOW_AGENT_TOKEN_PATH={path} cannot be read: {error}") from error


class LogStream:
    """One StreamLogs call; lines go in serialized, acknowledged line numbers come out."""

    def __init__(self, call: Any, token: str) -> None:
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


async def retried(operation: Callable[[], Awaitable[T]], patience: Patience) -> T:
    """The result of an operation, tried with jittered backoff while the control plane is away.

    Raises what the operation raised last.
    """
    backoff = _FIRST_BACKOFF_SECONDS
    while True:
        try:
            return await operation()
        except GatewayUnavailable:
            if patience.left() <= 0:
                raise
        await asyncio.sleep(random.uniform(0, backoff))  # noqa: S311 - jitter
        backoff = min(backoff * 2, _MAX_BACKOFF_SECONDS)
