"""What a task is given before it starts: XCom inputs, variables and connections."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from leoflow_celery.agent.client import CallRefused, ControlPlane, retried
from leoflow_celery.agent.deadline import Deadline
from leoflow_celery.errors import ClaimRefused, LeoflowError, NotFound
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.protocol.service import FAN_IN


class InputRefused(LeoflowError):
    """The control plane does not let this task read an input it needs."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything fetched, still under its own name. ``warnings`` are said to a task that uses what is missing."""

    xcoms: Mapping[str, bytes] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    connections: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


#: Values that are fetched at a time. The gateway answers 16 calls of an attempt at a time; a heartbeat is one too.
_AT_A_TIME = 8


def declared_inputs(spec: pb.TaskSpec) -> dict[str, str | tuple[str, ...]]:
    """Parameter → the task that its value comes from, or the tasks whose values make its list."""
    lists = json.loads(spec.extra.fields[FAN_IN].string_value) if FAN_IN in spec.extra.fields else {}
    return {**spec.xcom_input_mapping, **{name: tuple(many) for name, many in lists.items()}}


async def fetch_inputs(plane: ControlPlane, mapping: Mapping[str, str | tuple[str, ...]], deadline: Deadline) -> Inputs:
    """Fetch all inputs; ``mapping`` is parameter → upstream task id, or several: null stands for one without a value.

    Raises:
        InputRefused: an XCom input may not be read.
        GatewayUnavailable: the control plane stayed away for too long.
    """
    room = asyncio.Semaphore(_AT_A_TIME)
    variables, connections, values = await asyncio.gather(
        _optional(plane, "GetVariables", pb.GetVariablesRequest(), deadline),
        _optional(plane, "GetConnections", pb.GetConnectionsRequest(), deadline),
        asyncio.gather(*(_xcoms(plane, room, parameter, source, deadline) for parameter, source in mapping.items())),
    )
    refused = dict.fromkeys(answer for answer in (variables, connections) if isinstance(answer, str))
    return Inputs(
        xcoms={name: value for name, value in zip(mapping, values, strict=True) if value is not None},
        variables={} if isinstance(variables, str) else dict(variables.variables),
        connections={} if isinstance(connections, str) else dict(connections.connection_uris),
        warnings=tuple(f"going on without variables or connections: {why}" for why in refused),
    )


async def _xcoms(
    plane: ControlPlane, room: asyncio.Semaphore, parameter: str, source: str | tuple[str, ...], deadline: Deadline
) -> bytes | None:
    async def one(task_id: str) -> bytes | None:
        async with room:
            return await _xcom(plane, parameter, task_id, deadline)

    if isinstance(source, str):
        return await one(source)
    found = dict(zip(names := set(source), await asyncio.gather(*map(one, names)), strict=True))
    return b"[" + b",".join(found[task_id] or b"null" for task_id in source) + b"]"


async def _xcom(plane: ControlPlane, parameter: str, task_id: str, deadline: Deadline) -> bytes | None:
    request = pb.FetchXComRequest(upstream_task_id=task_id)
    try:
        answer = await retried(lambda: plane.call("FetchXCom", request), deadline)
    except NotFound:
        return None
    except (CallRefused, ClaimRefused) as error:
        raise InputRefused(f"XCom input {parameter!r} from task {task_id!r}: {error}") from error
    return bytes(answer.value)


async def _optional(plane: ControlPlane, method: str, request: Any, deadline: Deadline) -> Any:
    """The answer, or why it was refused (a text): these two a task can do without."""
    try:
        return await retried(lambda: plane.call(method, request), deadline)
    except (CallRefused, ClaimRefused, NotFound) as error:
        return str(error)
