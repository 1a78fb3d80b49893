"""From gRPC to plain async functions: authentication before, errors as statuses after.

A function takes the ``Caller`` and the request and returns the response. Whatever it raises becomes a status; an error
that nobody expected is logged with a number, and the caller hears the number only.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import grpc
import grpc.aio

from leoflow_celery import metrics
from leoflow_celery.errors import InvalidToken
from leoflow_celery.gateway.callers import Caller
from leoflow_celery.gateway.refusals import Refusal, refusal_of
from leoflow_celery.protocol.service import METHODS, SERVICE, Method, serialize

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Metadata = Iterable[tuple[str, str | bytes]] | None
#: Who calls, from a call's metadata and its peer: what the method's function takes first.
Authenticate = Callable[[Metadata, Callable[[], str]], Any]
Unary = Callable[[Any, Any], Awaitable[Any]]
Stream = Callable[[Caller, Context], Awaitable[None]]


def agent_service(
    authenticate: Authenticate,
    unary: Mapping[str, Unary],
    streams: Mapping[str, Stream],
    otherwise: Mapping[str, Authenticate],
) -> grpc.GenericRpcHandler:
    """The AgentService over functions, one for each method of the protocol.

    ``otherwise`` authenticates the methods it names; their functions take what it returns instead of a ``Caller``.
    """
    handlers = {
        method.name: _stream_handler(method, streams[method.name], authenticate)
        if method.streaming
        else _unary_handler(method, unary[method.name], otherwise.get(method.name, authenticate))
        for method in METHODS.values()
    }
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


def _unary_handler(method: Method, function: Unary, authenticate: Authenticate) -> Any:
    async def call(request: Any, context: Context) -> Any:
        try:
            return await function(authenticate(context.invocation_metadata(), context.peer), request)
        except Exception as error:  # noqa: BLE001 - one bad call must not take the others down
            return await _abort(context, method, error)

    return grpc.unary_unary_rpc_method_handler(call, method.request.FromString, serialize)


def _stream_handler(method: Method, function: Stream, authenticate: Authenticate) -> Any:
    async def call(_requests: object, context: Context) -> None:
        try:
            await function(authenticate(context.invocation_metadata(), context.peer), context)
        except Exception as error:  # noqa: BLE001 - as above
            await _abort(context, method, error)

    return grpc.stream_stream_rpc_method_handler(call, method.request.FromString, serialize)


async def _abort(context: Context, method: Method, error: Exception) -> None:
    refusal = refusal_of(error)
    if isinstance(error, InvalidToken):
        metrics.record_auth_failure(error.reason)
    if refusal is None:
        number = uuid.uuid4().hex[:8]
        log.error("%s failed, error %s", method.name, number, exc_info=error, extra={"method": method.name})
        refusal = Refusal(grpc.StatusCode.INTERNAL, f"internal error {number}; the gateway's log has its cause")
    await context.abort(refusal.code, refusal.text, refusal.trailing)
