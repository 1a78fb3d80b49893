"""From gRPC to plain async functions: authentication first, then decoding, errors as statuses after.

A function takes the ``Caller`` and the request and returns the response. Whatever it raises becomes a status; an error
that nobody expected is logged with a number, and the caller hears the number only. Requests arrive as bytes and are
decoded here, so that whoever has no token costs neither a decoded message nor a traceback.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from leoflow_celery import metrics
from leoflow_celery.errors import (
    ClaimRefused,
    DecryptionFailed,
    Fenced,
    InvalidToken,
    LeoflowError,
    NotFound,
    Unavailable,
)
from leoflow_celery.gateway.threads import Turns
from leoflow_celery.protocol.service import METHODS, REFUSED_KEY, SERVICE, Method, serialize

if TYPE_CHECKING:
    from leoflow_celery.gateway.sessions import Caller

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)
Context = grpc.aio.ServicerContext[Any, Any]
Metadata = tuple[tuple[str, str], ...]
#: Who calls, from a call's metadata, its peer and its method: what the method's function takes first.
Authenticate = Callable[[Any, Callable[[], str], str], Any]
Unary = Callable[[Any, Any], Awaitable[Any]]
Stream = Callable[["Caller", Context], Awaitable[None]]

#: Loggers of grpc's own server: they write a traceback for much that a stranger may send.
_FOREIGN_LOGGERS = ("grpc", "grpc._cython.cygrpc", "grpc.aio", "grpc.aio._server")
#: The logger of exchanges that were not granted.
REFUSED_EXCHANGES = "leoflow_celery.gateway.exchange.refused"
_LOGGED_PER_MINUTE = 20
#: Unary calls of one attempt that run, and that wait.
_CALLS_AT_A_TIME, _CALLS_WAITING = 16, 48
_MINUTE_SECONDS = 60.0


# -- refusals ----------------------------------------------------------------------------------------------------------


class InvalidArgument(LeoflowError):
    """A call holds a value that can never work."""


class NotPermitted(LeoflowError):
    """The caller may not have what it asks for."""


class NotPossible(LeoflowError):
    """The call cannot work as the system is set up; the text names the setting or the secret."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A status with its text and trailing metadata."""

    code: grpc.StatusCode
    text: str
    trailing: Metadata = ()


_CODE_OF: tuple[tuple[type[LeoflowError], grpc.StatusCode], ...] = (
    (InvalidToken, grpc.StatusCode.UNAUTHENTICATED),
    (Fenced, grpc.StatusCode.ABORTED),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (InvalidArgument, grpc.StatusCode.INVALID_ARGUMENT),
    (NotPermitted, grpc.StatusCode.PERMISSION_DENIED),
    (NotPossible, grpc.StatusCode.FAILED_PRECONDITION),
    (DecryptionFailed, grpc.StatusCode.FAILED_PRECONDITION),
)


def refusal_of(error: Exception) -> Refusal | None:
    """The status of an error we raise on purpose; None for one that nobody expected."""
    if isinstance(error, ClaimRefused):
        return Refusal(grpc.StatusCode.FAILED_PRECONDITION, str(error), ((REFUSED_KEY, error.why),))
    return next((Refusal(code, str(error)) for kind, code in _CODE_OF if isinstance(error, kind)), None)


# -- calls -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """A response with trailing metadata."""

    message: Message
    trailing: Metadata


def decoded(kind: type[M], raw: bytes) -> M:
    """The message in some bytes.

    Raises:
        InvalidArgument: they hold no such message.
    """
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise InvalidArgument(f"the {len(raw)} bytes that were sent are not a {kind.DESCRIPTOR.name}") from error


def agent_service(
    authenticate: Authenticate,
    unary: Mapping[str, Unary],
    streams: Mapping[str, Stream],
    otherwise: Mapping[str, Authenticate],
) -> grpc.GenericRpcHandler:
    """The AgentService over functions, one for each method of the protocol.

    ``otherwise`` authenticates the methods it names; their functions take what it returns instead of a ``Caller``.
    """
    # An agent makes three at a time. Streams have a limit of their own (see ``log_streams``).
    turns = Turns(_CALLS_AT_A_TIME, _CALLS_WAITING, "calls of one attempt")
    handlers = {
        method.name: _stream_handler(method, streams[method.name], authenticate)
        if method.streaming
        else _unary_handler(method, unary[method.name], otherwise.get(method.name, authenticate), turns)
        for method in METHODS.values()
    }
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


def _unary_handler(method: Method, function: Unary, authenticate: Authenticate, turns: Turns) -> Any:
    async def call(raw: bytes, context: Context) -> Any:
        try:
            caller = authenticate(context.invocation_metadata(), context.peer, method.name)
            async with turns.turn(getattr(caller, "attempt", None) or caller):
                answer = await function(caller, decoded(method.request, raw))
        except Exception as error:  # noqa: BLE001 - one bad call must not take the others down
            return await _abort(context, method, error)
        if not isinstance(answer, Answer):
            return answer
        context.set_trailing_metadata(answer.trailing)
        return answer.message

    return grpc.unary_unary_rpc_method_handler(call, None, serialize)


def _stream_handler(method: Method, function: Stream, authenticate: Authenticate) -> Any:
    """The function reads bytes from the context."""

    async def call(_requests: object, context: Context) -> None:
        try:
            await function(authenticate(context.invocation_metadata(), context.peer, method.name), context)
        except Exception as error:  # noqa: BLE001 - as above
            await _abort(context, method, error)

    return grpc.stream_stream_rpc_method_handler(call, None, serialize)


async def _abort(context: Context, method: Method, error: Exception) -> None:
    refusal = refusal_of(error)
    if isinstance(error, InvalidToken):
        metrics.record_auth_failure(error.reason)
    if refusal is None:
        number = uuid.uuid4().hex[:8]
        log.error("%s failed, error %s", method.name, number, exc_info=error, extra={"method": method.name})
        refusal = Refusal(grpc.StatusCode.INTERNAL, f"internal error {number}; the gateway's log has its cause")
    await context.abort(refusal.code, refusal.text, refusal.trailing)


class Bounded(logging.Filter):
    """Lets a number of records a minute through and says how many it left out: callers choose how often they fail.

    ``foreign`` records lose their arguments and traceback, which hold what a stranger sent.
    """

    def __init__(self, per_minute: int = _LOGGED_PER_MINUTE, *, foreign: bool = False) -> None:
        super().__init__()
        self._per_minute, self._foreign = per_minute, foreign
        self._since, self._passed, self._left_out = float("-inf"), 0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        now, left_out = time.monotonic(), 0
        if now - self._since > _MINUTE_SECONDS:
            left_out, self._since, self._passed, self._left_out = self._left_out, now, 0, 0
        self._passed += 1
        if self._passed > self._per_minute:
            self._left_out += 1
            return False
        if self._foreign:
            cause = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else record.levelname
            record.msg, record.args, record.exc_info = f"grpc could not serve a call ({cause})", (), None
        if left_out:
            record.msg, record.args = f"{record.getMessage()} ({left_out} more were not logged)", ()
        return True


def bound_logs() -> None:
    """Limit what callers can make this process log; for the process that is a gateway and nothing else."""
    for name in (__name__, "leoflow_celery.gateway.server", REFUSED_EXCHANGES):
        logging.getLogger(name).addFilter(Bounded())
    foreign = Bounded(foreign=True)
    for name in _FOREIGN_LOGGERS:
        logging.getLogger(name).addFilter(foreign)
