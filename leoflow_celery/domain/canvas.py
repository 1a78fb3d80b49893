"""Celery signatures that a publisher hands over: which tasks, queues and options they may name.

Completion sends them from a control worker, under its own rights. So they are limited to the user's tasks on the user's
queues, wherever one hides: a callback, an errback, the rest of a chain, the body of a chord, a member of any of these,
the ``link`` in a signature's options. An option that is not known here is refused, because Celery would pass it on to
its sender: ``headers`` can replace a message's task name, ``exchange`` its queue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import datetime
from types import NoneType
from typing import Any, NoReturn

from leoflow_celery.domain import strict_json
from leoflow_celery.domain.attempt import is_try_id
from leoflow_celery.domain.fields import MAX_NAME_CHARACTERS, is_printable, printable
from leoflow_celery.domain.routing import user_queue_problem, user_task_problem
from leoflow_celery.errors import InvalidRequest

#: The parts of a Celery message that hold signatures.
SIGNATURE_FIELDS = ("callbacks", "errbacks", "chain", "chord")
#: What ties a message to its group, chain and root, and what logs show of it.
_NAME_FIELDS = ("root_id", "parent_id", "group", "shadow", "origin", "reply_to")
#: Signatures inside each other, and in one field. A worker reads them all before it records anything.
MAX_DEPTH = 32
MAX_SIGNATURES = 10_000
_MAX_REPR_CHARACTERS = 4_096
#: Ten years: what a clock can still be asked for.
_MAX_SECONDS = 10 * 366 * 24 * 3600.0

_KEYS = frozenset({"task", "args", "kwargs", "options", "subtask_type", "immutable"})
_KINDS: dict[str, tuple[type, ...]] = {
    "args": (list, tuple),
    "kwargs": (dict,),
    "options": (dict,),
    "immutable": (bool,),
}
#: Celery's own tasks that carry others → their ``subtask_type``, and the keys of ``kwargs`` that hold signatures.
_CANVAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "celery.chain": ("chain", ("tasks",)),
    "celery.group": ("group", ("tasks",)),
    "celery.chord": ("chord", ("header", "body")),
    "celery.map": ("xmap", ("task",)),
    "celery.starmap": ("xstarmap", ("task",)),
    "celery.chunks": ("chunks", ("task",)),
}
#: Celery writes these without a ``subtask_type``.
_UNTYPED = frozenset({"celery.map", "celery.starmap", "celery.chunks"})
#: ``kwargs`` of a canvas that hold plain values.
_CANVAS_VALUES = {
    "celery.chord": {"kwargs", "interval", "max_retries"},
    "celery.map": {"it"},
    "celery.starmap": {"it"},
    "celery.chunks": {"it", "n"},
}
#: What Celery's ``Task.replace`` makes the body of a group; it returns what it is given.
_HARMLESS = frozenset({"celery.accumulate"})
#: Headers of the message protocol: an option ``headers`` overrides them in the message.
_PROTOCOL_HEADERS = frozenset(
    {
        *("lang", "task", "id", "shadow", "eta", "expires", "group", "group_index", "retries", "timelimit"),
        *("root_id", "parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result", "replaced_task_nesting"),
        *("stamped_headers", "stamps", "callbacks", "errbacks", "chain", "chord", "compression", "meth", "args"),
        *("kwargs", "headers", "properties", "delivery_info", "reply_to", "correlation_id", "hostname", "utc"),
        *("time_limit", "soft_time_limit", "taskset", "called_directly", "is_eager", "logfile", "loglevel"),
    }
)


def check_signatures(field: str, given: Any) -> frozenset[str]:
    """Refuse signatures (one, a list or None) that name what is not the user's; returns the ids they give their tasks.

    Raises:
        InvalidRequest: names ``field``, where in it, the value and the fix.
    """
    if given is None:
        return frozenset()
    try:
        strict_json.check(given)
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidRequest(f"{field}: {error}", field) from error
    reader = _Reader(field)
    reader.read_many(given, "", 0)
    return frozenset(reader.task_ids)


def check_context(context: Mapping[str, Any]) -> dict[str, str]:
    """The same for everything in a message's context that completion sends or writes to; id of a task → field.

    Raises:
        InvalidRequest: names the field, where in it, the value and the fix.
    """
    for field in _NAME_FIELDS:
        if (value := context.get(field)) not in (None, "") and not _is_name(value):
            _refuse(field, f"{_name(value)}{_shown(value)}")
    if (index := context.get("group_index")) is not None and not _is_count(index):
        _refuse("group_index", f"is a number of 0 or more{_shown(index)}")
    for field in ("callbacks", "errbacks", "chain"):
        if not isinstance(context.get(field), list | tuple | NoneType):
            _refuse(field, f"is a list of Celery signatures{_shown(context[field])}")
    if not isinstance(context.get("chord"), dict | NoneType):
        _refuse("chord", f"is a Celery signature{_shown(context['chord'])}")
    return {name: field for field in SIGNATURE_FIELDS for name in check_signatures(field, context.get(field))}


def permitted_context(context: Mapping[str, Any]) -> tuple[dict[str, Any], list[InvalidRequest]]:
    """A context without the fields that are refused, and why each was."""
    kept, refusals = dict(context), []
    for field in (*SIGNATURE_FIELDS, *_NAME_FIELDS, "group_index"):
        try:
            check_context({field: context.get(field)})
        except InvalidRequest as refusal:
            refusals.append(refusal)
            kept[field] = None
    return kept, refusals


def check_headers(headers: Any) -> None:
    """Refuse headers of a user's own that Celery would take for its protocol's when it sends a message again.

    Raises:
        InvalidRequest: names the header.
    """
    if problem := custom_headers_problem(headers):
        _refuse("headers", problem)


class _Reader:
    """Reads the signatures of one field."""

    def __init__(self, field: str) -> None:
        self._field, self._left = field, MAX_SIGNATURES
        self.task_ids: set[str] = set()

    def read_many(self, given: Any, where: str, depth: int) -> None:
        if not isinstance(given, list | tuple):
            self._read(given, where, depth)
            return
        for index, item in enumerate(given):
            self._read(item, _below(where, index), depth)

    def _read(self, item: Any, where: str, depth: int) -> None:
        self._left -= 1
        if depth >= MAX_DEPTH:
            self._refuse(where, f"signatures are nested deeper than {MAX_DEPTH} levels; flatten them")
        if self._left < 0:
            self._refuse(where, f"holds more than {MAX_SIGNATURES} signatures; hand over fewer at once")
        if not isinstance(item, dict) or not isinstance(item.get("task"), str) or not item["task"]:
            kind = type(item).__name__
            self._refuse(where, f"{kind} is no Celery signature; give task.s(…), signature('name') or a list")
        if unknown := sorted(str(key) for key in item.keys() - _KEYS):
            self._refuse(where, f"a signature has no key {unknown[0]!r}; remove it")
        if missing := [key for key in _KINDS if key not in item]:
            self._refuse(where, f"a signature needs {missing[0]!r}; make it with signature('name')")
        for key, kinds in _KINDS.items():
            if not isinstance(item[key], kinds):
                self._refuse(_below(where, key), f"has the wrong type{_shown(item[key])}")
        self._read_task(item, where, depth)
        self._read_options(item, _below(where, "options"), depth)

    def _read_task(self, item: dict[str, Any], where: str, depth: int) -> None:
        name, subtask_type, kwargs = item["task"], item.get("subtask_type"), item["kwargs"]
        expected, children = _CANVAS.get(name, (None, ()))
        if (subtask_type or None) not in (expected, *((None,) if name in _UNTYPED else ())):
            self._refuse(_below(where, "subtask_type"), f"{subtask_type!r} does not fit task '{printable(name)}'")
        if name not in _CANVAS:
            if name not in _HARMLESS and (problem := user_task_problem(name)):
                self._refuse(_below(where, "task"), problem)
            return
        if unknown := sorted(str(key) for key in kwargs.keys() - set(children) - _CANVAS_VALUES.get(name, set())):
            self._refuse(_below(where, "kwargs"), f"a {expected} has no {unknown[0]!r}; remove it")
        for child in children:
            below = _below(_below(where, "kwargs"), child)
            if child == "tasks" and not isinstance(kwargs.get(child), list | tuple):
                self._refuse(below, "is a list of signatures")
            self.read_many(kwargs.get(child), below, depth + 1)

    def _read_options(self, item: dict[str, Any], where: str, depth: int) -> None:
        options, stamps = item["options"], self._stamps(item["options"], where)
        for name, value in options.items():
            if value is None or name in stamps:
                continue
            if name in _SIGNATURE_OPTIONS:
                self.read_many(value, _below(where, name), depth + 1)
            elif name in _QUEUE_OPTIONS:
                if problem := _queue_problem(value, item["task"]):
                    self._refuse(_below(where, name), problem)
            elif name not in _VALUE_OPTIONS:
                self._refuse(where, f"the option '{printable(str(name))}' is not known; remove it")
            elif problem := _VALUE_OPTIONS[name](value):
                self._refuse(_below(where, name), f"{problem}{_shown(value)}")
        if options.get("task_id"):
            self.task_ids.add(options["task_id"])

    def _stamps(self, options: dict[str, Any], where: str) -> set[str]:
        """The names of further options that Celery's stamping announces."""
        names = options.get("stamped_headers") or []
        if not isinstance(names, list | tuple) or not all(_is_name(name) for name in names):
            self._refuse(_below(where, "stamped_headers"), "is a list of printable names")
        known = {*_SIGNATURE_OPTIONS, *_QUEUE_OPTIONS, *_VALUE_OPTIONS, *_PROTOCOL_HEADERS}
        for name in names:
            if name in known or name not in options:
                self._refuse(_below(where, "stamped_headers"), f"{name!r} is no stamp; remove it, or name it otherwise")
        return set(names)

    def _refuse(self, where: str, problem: str) -> NoReturn:
        _refuse(self._field, f"{problem} (at {where})" if where else problem)


def _refuse(field: str, problem: str) -> NoReturn:
    raise InvalidRequest(f"{field}: {problem}", field)


def _below(where: str, part: object) -> str:
    path = printable(f"{where}.{part}" if where else str(part))
    return path if len(path) <= 200 else f"…{path[-199:]}"


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str | float | bool) else ""
    return f" (got {text if len(text) <= 80 else f'{text[:77]}...'})" if text else ""


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME_CHARACTERS and is_printable(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _queue_problem(value: Any, task: str) -> str:
    if value == "":
        return ""  # the anonymous exchange
    return user_queue_problem(value, task) if isinstance(value, str) else "is the name of a queue"


def _task_id(value: Any) -> str:
    if not _is_name(value):
        return f"is a printable text of 1 to {MAX_NAME_CHARACTERS} characters"
    return "is the id of a try; give the task another one, or none" if is_try_id(value) else ""


def _name(value: Any) -> str:
    return "" if _is_name(value) else f"is a printable text of 1 to {MAX_NAME_CHARACTERS} characters"


def _repr(value: Any) -> str:
    is_one = isinstance(value, str) and len(value) <= _MAX_REPR_CHARACTERS and is_printable(value)
    return "" if is_one else f"is a printable text of at most {_MAX_REPR_CHARACTERS} characters"


def _count(value: Any) -> str:
    return "" if _is_count(value) else "is a number of 0 or more"


def _bool(value: Any) -> str:
    return "" if isinstance(value, bool) else "is true or false"


def _seconds(value: Any) -> str:
    is_one = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX_SECONDS
    return "" if is_one and math.isfinite(value) else f"is a number of seconds, at most {_MAX_SECONDS:.0f}"


def _moment(value: Any) -> str:
    try:
        datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return "is a time as ISO 8601 writes it, e.g. 2026-12-24T18:00:00+00:00"
    return ""


def _expires(value: Any) -> str:
    return _moment(value) if isinstance(value, str) else _seconds(value)


def _one_of(*choices: object) -> Callable[[Any], str]:
    def problem(value: Any) -> str:
        is_one = isinstance(value, str | int) and not isinstance(value, bool) and value in choices
        return "" if is_one else f"is {' or '.join(map(repr, choices))}"

    return problem


def custom_headers_problem(value: Any) -> str:
    """Why headers of a user's own cannot be sent with a message; nothing when they can."""
    if not isinstance(value, dict):
        return "is an object of headers"
    for name in value:
        if not _is_name(name) or name in _PROTOCOL_HEADERS:
            return f"'{printable(str(name))}' is a header of Celery's own, or not printable; remove it"
    return ""


_SIGNATURE_OPTIONS = frozenset({"link", "link_error", "chord", "chain"})
_QUEUE_OPTIONS = frozenset({"queue", "routing_key", "exchange", "reply_to"})
#: Every other option that is sent on → what is wrong with a value, nothing when it is fine.
_VALUE_OPTIONS: dict[str, Callable[[Any], str]] = {
    "task_id": _task_id,
    **dict.fromkeys(("group_id", "root_id", "parent_id", "shadow", "origin"), _name),
    **dict.fromkeys(("argsrepr", "kwargsrepr"), _repr),
    **dict.fromkeys(("group_index", "retries", "replaced_task_nesting", "max_retries"), _count),
    # ``clone(immutable=True)`` leaves it among the options.
    **dict.fromkeys(("ignore_result", "add_to_parent", "retry", "use_link", "immutable"), _bool),
    **dict.fromkeys(("countdown", "time_limit", "soft_time_limit", "interval"), _seconds),
    "eta": _moment,
    "expires": _expires,
    "priority": lambda value: "" if _is_count(value) and value < 256 else "is a number from 0 to 255",
    "serializer": _one_of("json"),
    "exchange_type": _one_of("direct", "topic"),
    "delivery_mode": _one_of(1, 2, "persistent", "transient"),
    "headers": custom_headers_problem,
    "stamped_headers": lambda _: "",
}
