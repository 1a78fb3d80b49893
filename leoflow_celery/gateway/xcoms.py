"""FetchXCom and PushXCom."""

from __future__ import annotations

from typing import Any

from leoflow_celery import metrics
from leoflow_celery.domain.xcom import JSON_CONTENT_TYPE, RETURN_VALUE, XComKey, XComValue, check_value, is_json
from leoflow_celery.errors import Fenced, NotFound, XComRejected
from leoflow_celery.gateway.rpc import InvalidArgument, NotPermitted
from leoflow_celery.gateway.sessions import Caller, Claims
from leoflow_celery.gateway.task_data import Specs
from leoflow_celery.gateway.threads import Threads
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.settings import XComSettings
from leoflow_celery.store import Store

_MAX_KEY_BYTES = 512
_MAX_CONTENT_TYPE_CHARACTERS = 255


class XComMethods:
    """Values in and out, for the holder of an attempt."""

    def __init__(self, store: Store, specs: Specs, claims: Claims, threads: Threads, settings: XComSettings) -> None:
        self._store, self._specs, self._claims = store, specs, claims
        self._threads, self._settings = threads, settings

    async def fetch(self, caller: Caller, request: pb.FetchXComRequest) -> pb.FetchXComResponse:
        """A value of a task that the caller declared as an input."""
        await self._claims.require(caller)
        upstream = request.upstream_task_id
        if upstream not in (await self._specs.wiring(caller)).upstream:
            raise NotPermitted(f"task {upstream!r} is not declared as an input; add it to xcom_input to read its XComs")
        key = _key(caller, request.key, upstream)
        value = await self._threads.store(self._store.xcom.get, key)
        if value is None:
            raise NotFound(f"task {upstream!r} has no XCom {key.key!r} in this run")
        metrics.record_xcom_pull(caller.identity.dag_id)
        response = pb.FetchXComResponse(value=value.value, content_type=value.content_type, size_bytes=len(value.value))
        response.created_at.FromNanoseconds(int(value.created_at * 1e9))
        return response

    async def push(self, caller: Caller, request: pb.PushXComRequest) -> pb.PushXComResponse:
        """Store a value, or say why not."""
        key = _key(caller, request.key)
        content_type = request.content_type or JSON_CONTENT_TYPE
        if len(content_type) > _MAX_CONTENT_TYPE_CHARACTERS or "\x00" in content_type:
            raise InvalidArgument(f"content_type must have at most {_MAX_CONTENT_TYPE_CHARACTERS} characters, no NUL")
        schema = (await self._specs.wiring(caller)).schema if key.key == RETURN_VALUE else None
        try:
            # What waits for its turn is in memory.
            if len(request.value) > self._settings.max_bytes:
                self._check(key, request.value, content_type, None)
            # One after the other for each tenant, and before SQL is asked for anything.
            await self._threads.check(caller.identity.tenant_id, self._check, key, request.value, content_type, schema)
            await self._threads.store(self._put, caller, key, request.value, content_type)
        except XComRejected as rejected:
            await self._claims.require(caller)
            metrics.record_xcom_rejected(rejected.reason)
            return pb.PushXComResponse(accepted=False, rejection_reason=rejected.reason)
        except Fenced:
            metrics.record_fenced("xcom")
            raise
        metrics.record_xcom_push(caller.identity.dag_id, len(request.value))
        return pb.PushXComResponse(accepted=True, ttl_seconds=self._settings.ttl_seconds)

    def _check(self, key: XComKey, value: bytes, content_type: str, schema: dict[str, Any] | None) -> None:
        if key.key == RETURN_VALUE and not is_json(content_type):
            raise XComRejected("invalid_xcom", f"a return value is {JSON_CONTENT_TYPE}, not {content_type!r}")
        check_value(value, content_type, schema, self._settings.max_bytes)

    def _put(self, caller: Caller, key: XComKey, value: bytes, content_type: str) -> None:
        item = (key, XComValue(value, content_type))
        self._store.claims.put_xcoms(caller.attempt, caller.holder, [item])


def _key(caller: Caller, key: str, task_id: str = "") -> XComKey:
    if len(key.encode(errors="surrogatepass")) > _MAX_KEY_BYTES or ":" in key or "\x00" in key:
        raise InvalidArgument(f"XCom key {key[:80]!r} must have at most {_MAX_KEY_BYTES} bytes of UTF-8, no ':' or NUL")
    return caller.identity.xcom_key(key, task_id)
