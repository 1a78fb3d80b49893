"""One decoder for every message that a worker of ours takes from Redis: nothing about it is believed for its form.

kombu and Celery take a message apart in a dozen places, and in most of them a surprise ends the worker. So the raw
bytes are looked at here first, from the envelope to the arguments, and only what all of them can read goes on.
Everything here is pure: it decides, and ``dead_letters.Door`` acts.

An envelope of kombu's Redis transport is a JSON object: ``body`` (base64 of the JSON ``[args, kwargs, embed]``),
``content-type``, ``content-encoding``, ``headers`` (Celery's task protocol 2) and ``properties``.
"""

from __future__ import annotations

import base64
import json
import math
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, NoReturn

from celery.utils.time import maybe_iso8601
from kombu.utils.json import object_hook

from leoflow_celery.clock import broker_clock
from leoflow_celery.domain import fields
from leoflow_celery.domain.request import check_celery_id
from leoflow_celery.domain.routing import OUR_PREFIX, TaskName, queue_for_task
from leoflow_celery.domain.strict_json import MAX_DEPTH, DuplicateKey, is_deeper, unique_keys
from leoflow_celery.errors import InvalidRequest

MAX_NAME_CHARACTERS = 255
#: Tries after an outage of a week, one a minute, are ten thousand.
MAX_RETRIES = 1_000_000
_MAX_REPR_CHARACTERS = 65_536
_MAX_SECONDS = 1_000_000_000
_MAX_CLOCK = 2**53
#: An argument may be as deep as a request; the lists around it come on top.
_MAX_DEPTH = MAX_DEPTH + 4
#: Of a message that is too large to be read: where an id is looked for, at its beginning and at its end.
_EDGE_BYTES = 65_536
_SHOWN_CHARACTERS = 100
#: Who asks for a result under a longer name asks for nothing that a Celery client made.
_MAX_ANSWERED_ID_CHARACTERS = 1_024


class Kind(StrEnum):
    """What is wrong with a message: the label of the metric."""

    TOO_LARGE = "too_large"
    ENVELOPE = "envelope"
    PROPERTIES = "properties"
    HEADERS = "headers"
    CONTENT = "content"
    COMPRESSION = "compression"
    BODY = "body"
    ARGUMENTS = "arguments"
    UNKNOWN_TASK = "unknown_task"
    #: An entry of the messages that workers hold, which would have come back.
    UNACKED = "unacked"
    #: Whoever took it died, time and again.
    TOO_OFTEN = "too_often"
    #: A key of the broker that holds another kind of value than it is for.
    WRONG_TYPE = "wrong_type"
    CONTROL = "control"
    #: It is well formed, and nobody who may say so said it.
    NOT_BELIEVED = "not_believed"
    #: Celery refused what the decoder let through.
    UNEXPECTED = "unexpected"


@dataclass(frozen=True, slots=True)
class About:
    """What may be said of a message: no body, no header but its names."""

    size_bytes: int = 0
    celery_id: str = ""
    task: str = ""
    content_type: str = ""

    @property
    def answered_id(self) -> str:
        """The id under which somebody may wait for a result; empty when there is none."""
        return self.celery_id if len(self.celery_id) <= _MAX_ANSWERED_ID_CHARACTERS else ""


class Refused(Exception):
    """A message is not taken. ``sentence`` names the field and the fix, and repeats no value."""

    def __init__(self, kind: Kind, field_name: str, sentence: str) -> None:
        super().__init__(kind, field_name, sentence)
        self.kind, self.field, self.sentence = kind, field_name, sentence
        self.about = About()


class Admitted(dict[str, Any]):
    """An envelope that everybody can read; ``content`` is its body, decoded."""

    __slots__ = ("content",)
    content: Any


@dataclass(frozen=True, slots=True)
class Limits:
    """What a worker takes: ``max_bytes`` of a message, ``max_delay_seconds`` until its ``eta``."""

    max_bytes: int = 8 * 1024 * 1024
    max_delay_seconds: float = 24 * 3600


@dataclass(frozen=True, slots=True)
class TaskRules:
    """Which tasks a worker runs, by name, and what it takes."""

    tasks: Mapping[str, Any]
    limits: Limits = field(default_factory=Limits)


def printable(text: object, characters: int = _SHOWN_CHARACTERS) -> str:
    """Text of a stranger as part of a line: bounded, and without what a terminal or a log takes for a command."""
    return fields.printable(str(text), characters)


# -- the envelope ---------------------------------------------------------------------------------------------------


def decode_task(raw: bytes, queue: str, rules: TaskRules, now: float) -> Admitted:
    """The task message that ``queue`` holds. Where it was taken from is what we know, not what it says of itself.

    Raises:
        Refused: it cannot be run; ``about`` says what may be said of it.
    """
    about = About(len(raw))
    try:
        if len(raw) > rules.limits.max_bytes:
            about = _about_a_large_one(raw)
            raise _too_large(len(raw), rules.limits.max_bytes)
        envelope = parse_json(raw, Kind.ENVELOPE, "message")
        about = about_of(envelope, len(raw))
        _check_envelope(envelope)
        _check_headers(envelope["headers"], rules.limits, now)
        _check_fields(envelope["properties"], _PROPERTIES, Kind.PROPERTIES, "properties")
        admitted = _readable(envelope, queue)
        _check_task(admitted, queue, rules.tasks)
    except Refused as refused:
        refused.about = about
        raise
    return admitted


def _too_large(size_bytes: int, max_bytes: int) -> Refused:
    return Refused(
        Kind.TOO_LARGE,
        "message",
        f"message: it has {size_bytes} bytes, the limit is {max_bytes}; put large data into the image, an XCom or the "
        "staging volume, or raise LEOFLOW_BROKER_MAX_MESSAGE_BYTES",
    )


def parse_json(data: bytes, kind: Kind, name: str, *, with_types: bool = False) -> Any:
    """JSON that can be written again: finite numbers, whole characters, not nested without end.

    ``with_types``: objects by which kombu writes dates, decimals and the like become those, as kombu reads them.

    Raises:
        Refused: says what is wrong with it.
    """
    try:
        text = data.decode()
        value = (_TYPED if with_types else _PLAIN).decode(text)
    except RecursionError:
        raise Refused(kind, name, f"{name}: lists and objects are nested too deep; flatten them") from None
    except DuplicateKey as error:
        raise Refused(kind, name, f"{name}: {error}") from None
    except Exception:  # noqa: BLE001 - a type's own reader may raise anything
        raise Refused(kind, name, f"{name}: is not valid JSON in UTF-8; send what a JSON encoder writes") from None
    # An escaped half of a surrogate pair is no character; it is rare enough to look for only where one begins.
    if _SURROGATE.search(text) and not _is_whole(value):
        raise Refused(kind, name, f"{name}: holds half a surrogate pair, which is not a character; remove it")
    if data.count(b"[") + data.count(b"{") > _MAX_DEPTH and is_deeper(value, _MAX_DEPTH):
        raise Refused(kind, name, f"{name}: lists and objects are nested deeper than {MAX_DEPTH} levels; flatten them")
    return value


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _no_number(_: str) -> NoReturn:
    raise ValueError


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


#: Made once: that costs as much as reading a message.
_PLAIN = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=_no_number, parse_float=_finite)
_TYPED = json.JSONDecoder(
    object_pairs_hook=lambda pairs: object_hook(unique_keys(pairs)), parse_constant=_no_number, parse_float=_finite
)


def _is_whole(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def about_of(envelope: Any, size_bytes: int = 0) -> About:
    """What may be said of an envelope, whatever it is."""
    headers = envelope.get("headers") if isinstance(envelope, dict) else None
    headers = headers if isinstance(headers, dict) else {}
    content_type = envelope.get("content-type") if isinstance(envelope, dict) else None
    celery_id, task = headers.get("id"), headers.get("task")
    return About(
        size_bytes,
        celery_id if isinstance(celery_id, str) else "",
        task if isinstance(task, str) else "",
        content_type if isinstance(content_type, str) else "",
    )


def _about_a_large_one(raw: bytes) -> About:
    """The same without reading all of it: JSON encoders write headers before or after the body."""
    edges = raw[:_EDGE_BYTES] + b"\n" + raw[-_EDGE_BYTES:]
    found = {name: re.search(rb'"%s"\s*:\s*"([^"\\]{1,255})"' % name.encode(), edges) for name in ("id", "task")}
    names = {name: match.group(1).decode(errors="replace") if match else "" for name, match in found.items()}
    return About(len(raw), names["id"], names["task"])


def _check_envelope(envelope: Any) -> None:
    if not isinstance(envelope, dict):
        raise Refused(Kind.ENVELOPE, "message", "message: is not a JSON object; send a message of the Celery protocol")
    for name, kind in (("headers", Kind.HEADERS), ("properties", Kind.PROPERTIES)):
        if not isinstance(envelope.get(name), dict):
            raise Refused(kind, name, f"{name}: is not an object; send a message of the Celery task protocol 2")
    if envelope["headers"].get("compression"):
        raise Refused(
            Kind.COMPRESSION,
            "headers.compression",
            "headers.compression: compressed messages are not unpacked; send the body as it is",
        )
    if envelope.get("content-type") != "application/json":
        raise Refused(Kind.CONTENT, "content-type", "content-type: is not application/json; use the serializer json")
    encoding = envelope.get("content-encoding", "utf-8")
    if not (isinstance(encoding, str) and encoding.lower() in ("utf-8", "utf8", "us-ascii")):
        raise Refused(Kind.CONTENT, "content-encoding", "content-encoding: is not utf-8; send the body in UTF-8")


def _with_own_eta(headers: dict[str, Any]) -> dict[str, Any]:
    """Headers of a message of ours, whose ``eta`` is by the broker's clock, with that instant of this host's clock.

    Celery compares it with the host's. A user's message says it by a clock that we do not know.
    """
    task, eta = headers.get("task"), headers.get("eta")
    if eta is None or not isinstance(task, str) or not task.startswith(OUR_PREFIX) or task == TaskName.DISPATCH:
        return headers
    if (moment := _timestamp(eta)) <= 0:
        return headers
    return {**headers, "eta": datetime.fromtimestamp(broker_clock.to_own(moment), UTC).isoformat()}


def _readable(envelope: dict[str, Any], queue: str) -> Admitted:
    """The envelope as everything after us reads it."""
    properties = envelope["properties"]
    body = body_of(envelope.get("body"), properties.get("body_encoding"))
    admitted = Admitted(envelope)
    admitted["content-encoding"] = "utf-8"
    admitted["headers"] = _with_own_eta(envelope["headers"])
    admitted["properties"] = {
        **properties,
        # Two messages with one tag would be acknowledged as one, and go back to where a stranger wants them to.
        "delivery_tag": str(uuid.uuid4()),
        "delivery_info": {"exchange": "", "routing_key": queue},
    }
    admitted.content = parse_json(body, Kind.BODY, "body", with_types=True)
    return admitted


def body_of(body: Any, encoding: Any) -> bytes:
    """The bytes of a body.

    Raises:
        Refused: they cannot be read.
    """
    if not isinstance(body, str):
        raise Refused(Kind.BODY, "body", "body: is not text; send base64, and properties.body_encoding base64")
    if encoding == "base64":
        try:
            return base64.b64decode(body.encode())
        except ValueError:
            raise Refused(Kind.BODY, "body", "body: is not base64, as properties.body_encoding says it is") from None
    return body.encode(errors="surrogatepass")


# -- headers and properties -----------------------------------------------------------------------------------------


def _name(value: Any) -> str:
    if isinstance(value, str) and len(value) <= MAX_NAME_CHARACTERS and value.isprintable():
        return ""
    return f"is not printable text of at most {MAX_NAME_CHARACTERS} characters"


def _represented(value: Any) -> str:
    return "" if isinstance(value, str) and len(value) <= _MAX_REPR_CHARACTERS else "is not text of bearable length"


def _time(value: Any) -> str:
    return "" if isinstance(value, str) and _timestamp(value) > 0 else "is not a time of ISO 8601 after 1970"


def _timestamp(text: str) -> float:
    """Seconds since 1970, read as Celery reads it; 0 for what is not a time."""
    try:
        found = maybe_iso8601(text)
        return 0.0 if found is None else (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, AttributeError, ArithmeticError):
        return 0.0


def _whole_number(least: int, most: int) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        is_right = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        return "" if is_right else f"is not a whole number from {least} to {most}"

    return check


def _flag(value: Any) -> str:
    return "" if isinstance(value, bool) else "is neither true nor false"


def _time_limits(value: Any) -> str:
    if isinstance(value, list) and len(value) == 2 and all(one is None or _is_seconds(one) for one in value):
        return ""
    return "is not a list of two numbers of seconds or null"


def _is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MAX_SECONDS


def _object(value: Any) -> str:
    return "" if isinstance(value, dict) else "is not an object"


def _names(value: Any) -> str:
    return "" if isinstance(value, list) and not any(map(_name, value)) else "is not a list of printable names"


def _encoding(value: Any) -> str:
    return "" if value in ("base64", "utf-8") else "is neither base64 nor utf-8"


def _anything(_: Any) -> str:
    return ""


#: What Celery and kombu read, and what it must be; null is allowed for all but the first two of the headers.
_HEADERS: dict[str, Callable[[Any], str]] = {
    "task": _name,
    "id": _anything,  # checked with what a database can keep
    "lang": _name,
    "root_id": _name,
    "parent_id": _name,
    "group": _name,
    "group_index": _whole_number(0, 2**31),
    "meth": _name,
    "shadow": _name,
    "origin": _name,
    "argsrepr": _represented,
    "kwargsrepr": _represented,
    "eta": _time,
    "expires": _time,
    "retries": _whole_number(0, MAX_RETRIES),
    "timelimit": _time_limits,
    "ignore_result": _flag,
    "replaced_task_nesting": _whole_number(0, 10_000),
    "stamped_headers": _names,
    "stamps": _object,
    "headers": _object,
    "redelivered": _flag,
}
_PROPERTIES: dict[str, Callable[[Any], str]] = {
    "correlation_id": _name,
    "reply_to": _name,
    "priority": _whole_number(0, 255),
    "body_encoding": _encoding,
}
#: Names under which Celery keeps something else of a running task: a header would take its place.
RESERVED_HEADERS = frozenset(
    (
        *("args", "kwargs", "callbacks", "errbacks", "chain", "chord", "children", "group_id", "groups", "taskset"),
        *("called_directly", "correlation_id", "delivery_info", "hostname", "is_eager", "logfile", "loglevel"),
        *("properties", "reply_to", "soft_time_limit", "time_limit", "utc"),
        *("as_execution_options", "clear", "get", "update"),
    )
)


def _check_fields(values: dict[str, Any], rules: Mapping[str, Callable[[Any], str]], kind: Kind, where: str) -> None:
    for name, value in values.items():
        if value is None or (check := rules.get(name)) is None:
            continue
        if wrong := check(value):
            raise Refused(kind, f"{where}.{name}", f"{where}.{name}: {wrong}; correct it or leave it out")


def _check_headers(headers: dict[str, Any], limits: Limits, now: float) -> None:
    celery_id = headers.get("id")
    if not isinstance(celery_id, str):
        raise Refused(Kind.HEADERS, "headers.id", "headers.id: a message has an id that is text; send it with one")
    try:
        check_celery_id(celery_id)
    except InvalidRequest as error:
        raise Refused(Kind.HEADERS, error.field, error.message) from None
    if not headers.get("task"):
        raise Refused(
            Kind.HEADERS, "headers.task", "headers.task: no task is named; send a message of the Celery task protocol 2"
        )
    for name in headers.keys() - _HEADERS.keys():
        if name in RESERVED_HEADERS or name.startswith("_"):
            raise Refused(
                Kind.HEADERS,
                "headers",
                f"headers: '{printable(name)}' is a name that Celery uses itself; give the header another one",
            )
    _check_fields(headers, _HEADERS, Kind.HEADERS, "headers")
    eta = headers.get("eta")
    if eta is not None and _timestamp(eta) - now > limits.max_delay_seconds:
        raise Refused(
            Kind.HEADERS,
            "headers.eta",
            f"headers.eta: is more than {limits.max_delay_seconds:.0f} s ahead, and a worker would hold the message "
            "all that time; send it later, or raise LEOFLOW_BROKER_MAX_DELAY_SECONDS",
        )


# -- the task and its arguments -------------------------------------------------------------------------------------

_EMBEDDED: dict[str, tuple[type, ...]] = {
    "callbacks": (list,),
    "errbacks": (list,),
    "chain": (list,),
    "chord": (dict,),
}


def _check_task(admitted: Admitted, queue: str, tasks: Mapping[str, Any]) -> None:
    content, name = admitted.content, admitted["headers"]["task"]
    if not (isinstance(content, list) and len(content) == 3):
        raise Refused(Kind.BODY, "body", "body: is not a list of arguments, keyword arguments and an object")
    args, kwargs, embed = content
    if not isinstance(args, list):
        raise Refused(Kind.ARGUMENTS, "args", "args: the arguments are not a list")
    if not isinstance(kwargs, dict):
        raise Refused(Kind.ARGUMENTS, "kwargs", "kwargs: the keyword arguments are not an object")
    _check_embedded(embed)
    task = tasks.get(name)
    if task is None or name.startswith("celery."):
        raise Refused(
            Kind.UNKNOWN_TASK,
            "headers.task",
            f"headers.task: the worker of queue '{printable(queue)}' runs no task of this name; correct it, or start a "
            "worker of the version that has it",
        )
    home = queue_for_task(name)
    if home is not None and queue != home and not queue.startswith(f"{home}."):
        raise Refused(
            Kind.UNKNOWN_TASK,
            "headers.task",
            f"headers.task: a task of queue {home!r} came over queue '{printable(queue)}'; send it to its own",
        )
    check_arguments = getattr(task, "__header__", None)
    try:
        if check_arguments is not None:
            check_arguments(*args, **kwargs)
    except TypeError:
        raise Refused(
            Kind.ARGUMENTS, "args", "args: the task does not take these arguments; look at its signature"
        ) from None


def _check_embedded(embed: Any) -> None:
    if not isinstance(embed, dict):
        raise Refused(Kind.BODY, "embed", "embed: the third part of the body is not an object")
    for name, value in embed.items():
        kinds = _EMBEDDED.get(name)
        if kinds is None:
            raise Refused(
                Kind.BODY,
                "embed",
                f"embed: '{printable(name)}' is not one of callbacks, errbacks, chain and chord; leave it out",
            )
        signatures = value if isinstance(value, list) else [value]
        if value is not None and not (isinstance(value, kinds) and all(map(_is_signature, signatures))):
            raise Refused(
                Kind.BODY, f"embed.{name}", f"embed.{name}: does not hold signatures; send what Celery writes"
            )


def _is_signature(value: Any) -> bool:
    """Whether Celery can make a signature of it. What a signature may name is another question."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("task"), str)
        and isinstance(value.get("args", []), list)
        and isinstance(value.get("kwargs", {}), dict)
        and isinstance(value.get("options", {}), dict)
    )


# -- messages that a worker held, and broadcasts --------------------------------------------------------------------


def decode_held(entry: bytes, max_bytes: int) -> tuple[dict[str, Any], str, str]:
    """An entry of the hash of unacknowledged messages: envelope, exchange and routing key.

    Raises:
        Refused: it cannot go back to a queue.
    """
    refused = Refused(Kind.UNACKED, "unacked", "unacked: an entry is not a message with an exchange and a routing key")
    refused.about = About(len(entry))
    if len(entry) > 2 * max_bytes + _EDGE_BYTES:  # an escaped text may be longer than the text
        raise refused
    try:
        value = parse_json(entry, Kind.UNACKED, "unacked")
    except Refused as error:
        error.about = refused.about
        raise
    if not (isinstance(value, list) and len(value) == 3):
        raise refused
    envelope, exchange, routing_key = value
    refused.about = about_of(envelope, len(entry))
    is_message = (
        isinstance(envelope, dict)
        and isinstance(envelope.get("headers"), dict)
        and isinstance(envelope.get("properties"), dict)
    )
    if not (is_message and isinstance(exchange, str) and isinstance(routing_key, str) and routing_key):
        raise refused
    return envelope, exchange, routing_key


#: How often a message was put back because whoever had it died: a property of it, set by who puts it back.
_PUT_BACK = "put_back"


def put_back_again(envelope: dict[str, Any], max_deliveries: int) -> dict[str, Any]:
    """The envelope as it goes back to its queue once more.

    Raises:
        Refused: it was delivered ``max_deliveries`` times.
    """
    before = envelope["properties"].get(_PUT_BACK)
    times = (before if isinstance(before, int) and 0 < before < max_deliveries else 0) + 1
    if times >= max_deliveries:
        refused = Refused(
            Kind.TOO_OFTEN,
            "message",
            f"message: it was delivered {times} times, and each time its worker or the process of its task died; look "
            "for what kills them (memory?), then send it again",
        )
        refused.about = about_of(envelope)
        raise refused
    return {**envelope, "properties": {**envelope["properties"], _PUT_BACK: times}}


def never_put_back(envelope: dict[str, Any]) -> dict[str, Any]:
    """The envelope as its sender sent it."""
    properties = {name: value for name, value in envelope["properties"].items() if name != _PUT_BACK}
    return {**envelope, "properties": properties}


#: Commands that ask and change nothing, each with the arguments that it takes.
_ITEMS = frozenset(
    (
        *("exchange", "routing_key", "rate_limit", "serializer", "max_retries", "time_limit", "soft_time_limit"),
        *("acks_late", "priority", "expires"),
    )
)


def _items(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) and one in _ITEMS for one in value)


def _ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 1_000 and not any(map(_name, value))


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


_QUESTIONS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "ping": {},
    "stats": {},
    "report": {},
    "clock": {},
    "active_queues": {},
    "enable_events": {},
    "heartbeat": {},
    "reserved": {},
    "scheduled": {},
    "revoked": {},
    "active": {"safe": _is_flag},
    "registered": {"taskinfoitems": _items, "builtins": _is_flag},
    "conf": {"with_defaults": _is_flag},
    "query_task": {"ids": _ids},
}
#: Celery's older names of some.
_OLDER_NAMES = {
    "dump_reserved": "reserved",
    "dump_schedule": "scheduled",
    "dump_revoked": "revoked",
    "dump_active": "active",
    "dump_tasks": "registered",
    "dump_conf": "conf",
}
#: Never obeyed: these make a worker drop messages that SQL says are queued, and store a result that nobody decided.
_REVOKING = ("revoke", "terminate", "revoke_by_stamped_headers", "hello")
REPLY_EXCHANGE = "reply.celery.pidbox"


def decode_broadcast(data: bytes, limits: Limits, *, all_commands: bool) -> dict[str, Any]:
    """The envelope of a remote control command that this worker obeys.

    Raises:
        Refused: it does not, or cannot read it.
    """
    if len(data) > limits.max_bytes:
        raise Refused(Kind.CONTROL, "message", "control: the command is larger than any message may be")
    envelope = parse_json(data, Kind.CONTROL, "control")
    _check_envelope(envelope)
    _check_fields(envelope["properties"], _PROPERTIES, Kind.PROPERTIES, "properties")
    clock = envelope["headers"].get("clock")
    if clock is not None and _whole_number(0, _MAX_CLOCK)(clock):
        raise Refused(Kind.CONTROL, "headers.clock", "headers.clock: is not a clock")
    body = body_of(envelope.get("body"), envelope["properties"].get("body_encoding"))
    _check_command(parse_json(body, Kind.CONTROL, "control"), all_commands)
    return {**envelope, "properties": {**envelope["properties"], "delivery_tag": str(uuid.uuid4())}}


def _check_command(command: Any, all_commands: bool) -> None:
    if not isinstance(command, dict):
        raise Refused(Kind.CONTROL, "control", "control: a command is not an object")
    method, arguments = command.get("method"), command.get("arguments") or {}
    if not isinstance(method, str) or _name(method) or not isinstance(arguments, dict):
        raise Refused(Kind.CONTROL, "control.method", "control: a command has a method, and arguments by name")
    _check_addressees(command, all_commands)
    if method in _REVOKING:
        raise Refused(
            Kind.CONTROL,
            "control.method",
            f"control: {method!r} comes from somebody without a key and is not obeyed; use app.control of "
            "leoflow_celery.app, Flower with that app, or 'leoflow cancel'",
        )
    if all_commands:
        return
    takes = _QUESTIONS.get(_OLDER_NAMES.get(method, method))
    if takes is None:
        raise Refused(
            Kind.CONTROL,
            "control.method",
            f"control: '{printable(method)}' changes or ends a worker and is not obeyed; "
            "set LEOFLOW_BROKER_REMOTE_CONTROL=all where everybody who can write to the broker may do that",
        )
    for name, value in arguments.items():
        if name not in takes or not (value is None or takes[name](value)):
            raise Refused(Kind.CONTROL, "control.arguments", f"control: {method!r} does not take such arguments")


def _check_addressees(command: dict[str, Any], all_commands: bool) -> None:
    unknown = command.keys() - {"method", "arguments", "destination", "reply_to", "ticket", "pattern", "matcher"}
    texts = [command.get(name) for name in ("ticket", "pattern", "matcher")]
    reply_to, destination = command.get("reply_to"), command.get("destination")
    is_right = (
        not unknown
        and not any(text is not None and _name(text) for text in texts)
        # A regular expression of a stranger may take for ever.
        and (all_commands or command.get("matcher") in (None, "glob"))
        and (destination is None or (isinstance(destination, list) and not any(map(_name, destination))))
        and (reply_to is None or _is_reply_address(reply_to))
    )
    if not is_right:
        raise Refused(Kind.CONTROL, "control", "control: a command is not addressed as Celery addresses it")


def _is_reply_address(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.get("exchange") == REPLY_EXCHANGE
        and isinstance(value.get("routing_key"), str)
        and re.fullmatch(r"[A-Za-z0-9-]{1,64}", value["routing_key"]) is not None
    )
