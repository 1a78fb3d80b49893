"""Messages that nobody well-meaning would send, made from one that is right: each with what is wrong with it."""

from __future__ import annotations

import base64
import bz2
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: In every place of a poisoned message that may hold something secret.
CANARY = "c4n4ry-9b1e"
Envelope = dict[str, Any]


def envelope(task: str, args: Any = (), kwargs: Any = None, celery_id: str = "", **headers: Any) -> Envelope:
    """A message as kombu writes it into Redis."""
    identity = celery_id or str(uuid.uuid4())
    return {
        "body": encoded(
            [list(args), kwargs or {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
        ),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py",
            "task": task,
            "id": identity,
            "shadow": None,
            "eta": None,
            "expires": None,
            "group": None,
            "group_index": None,
            "retries": 0,
            "timelimit": [None, None],
            "root_id": identity,
            "parent_id": None,
            "argsrepr": "()",
            "kwargsrepr": "{}",
            "origin": "gen1@host",
            "ignore_result": False,
            "replaced_task_nesting": 0,
            "stamped_headers": None,
            "stamps": {},
            **headers,
        },
        "properties": {
            "correlation_id": identity,
            "reply_to": "",
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "q"},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
        },
    }


def encoded(value: Any) -> str:
    return base64.b64encode(value if isinstance(value, bytes) else json.dumps(value).encode()).decode()


def raw(message: Any) -> bytes:
    return json.dumps(message).encode()


@dataclass(frozen=True)
class Poison:
    """How a right message is spoiled, and what the refusal says: its kind, and the field named."""

    name: str
    spoil: Callable[[Envelope], bytes]
    kind: str
    field: str = ""

    def __str__(self) -> str:
        return self.name


def _text(data: bytes) -> Callable[[Envelope], bytes]:
    return lambda _: data


def _without(*path: str) -> Callable[[Envelope], bytes]:
    def spoil(message: Envelope) -> bytes:
        place = message
        for name in path[:-1]:
            place = place[name]
        del place[path[-1]]
        return raw(message)

    return spoil


def _with(value: Any, *path: str) -> Callable[[Envelope], bytes]:
    def spoil(message: Envelope) -> bytes:
        place = message
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value
        return raw(message)

    return spoil


def _body(value: Any) -> Callable[[Envelope], bytes]:
    return _with(encoded(value), "body")


def _json_in_headers(text: str) -> Callable[[Envelope], bytes]:
    """A header whose JSON no encoder of Python would write."""

    def spoil(message: Envelope) -> bytes:
        message["headers"]["x-extra"] = "@here@"
        return raw(message).replace(b'"@here@"', text.encode())

    return spoil


def _inflated(message: Envelope) -> bytes:
    message["headers"]["compression"] = "application/x-bz2"
    message["body"] = encoded(bz2.compress(b" " * 1_000_000))
    return raw(message)


_NOTHING: dict[str, Any] = {}
DEEP = "[" * 100_000
_E, _H, _P, _B, _A = "envelope", "headers", "properties", "body", "arguments"

POISONS: tuple[Poison, ...] = (
    # the envelope
    Poison("not json", _text(f"not json {CANARY}".encode()), _E, "message"),
    Poison("empty", _text(b" "), _E),
    Poison("not utf-8", _text(b"\xff\xfe" + CANARY.encode()), _E),
    Poison("nul", _text(b"\0" * 100), _E),
    Poison("a list", _text(raw([CANARY])), _E),
    Poison("a number", _text(b"3"), _E),
    Poison("null", _text(b"null"), _E),
    Poison("a string", _text(raw(CANARY)), _E),
    Poison("cut off", lambda message: raw(message)[:-40], _E),
    Poison("deep", _text(DEEP.encode()), _E),
    Poison("deep headers", _json_in_headers("[" * 500 + "]" * 500), _E),
    Poison("infinite", _json_in_headers("1e999"), _E),
    Poison("not a number", _json_in_headers("NaN"), _E),
    Poison("huge number", _json_in_headers("1" * 5_000), _E),
    Poison("lone surrogate", _json_in_headers('"\\ud800"'), _E),
    Poison("no headers", _without("headers"), _H, "headers"),
    Poison("headers null", _with(None, "headers"), _H, "headers"),
    Poison("headers a list", _with([CANARY], "headers"), _H, "headers"),
    Poison("no properties", _without("properties"), _P, "properties"),
    Poison("properties null", _with(None, "properties"), _P, "properties"),
    Poison("no content-type", _without("content-type"), "content", "content-type"),
    *(
        Poison(f"content-type {kind}", _with(kind, "content-type"), "content", "content-type")
        for kind in ("application/x-yaml", "application/x-python-serialize", "application/x-msgpack", "text/plain")
    ),
    Poison("content-type a list", _with([CANARY], "content-type"), "content"),
    Poison("content-encoding binary", _with("binary", "content-encoding"), "content", "content-encoding"),
    Poison("content-encoding utf-16", _with("utf-16", "content-encoding"), "content"),
    Poison("content-encoding a number", _with(7, "content-encoding"), "content"),
    Poison("inflated", _inflated, "compression", "headers.compression"),
    Poison("compression of a kind", _with("application/x-gzip", "headers", "compression"), "compression"),
    Poison("compression a list", _with([1], "headers", "compression"), "compression"),
    # headers
    Poison("no id", _without("headers", "id"), _H, "headers.id"),
    *(Poison(f"id {value!r}", _with(value, "headers", "id"), _H) for value in (None, 3, True, [CANARY], {}, "")),
    *(
        Poison(f"id {value!r}", _with(value, "headers", "id"), _H, "id")
        for value in ("a\nforged line", "a\x1b[31m", "a\u202eb", "x" * 300)
    ),
    Poison("no task", _without("headers", "task"), _H, "headers.task"),
    Poison("task a list", _with([CANARY], "headers", "task"), _H, "headers.task"),
    Poison("task with a newline", _with("leoflow.dispatch\nforged", "headers", "task"), _H, "headers.task"),
    Poison("unknown task", _with("leoflow.dispach", "headers", "task"), "unknown_task", "headers.task"),
    Poison("a task of Celery", _with("celery.starmap", "headers", "task"), "unknown_task"),
    *(
        Poison(f"shadow {value!r}", _with(value, "headers", "shadow"), _H, "headers.shadow")
        for value in ("a\nforged", "\x1b]0;title\x07", "a\u202eb", [CANARY], 7, "x" * 300)
    ),
    *(
        Poison(f"{name} {value!r}", _with(value, "headers", name), _H, f"headers.{name}")
        for name in ("eta", "expires")
        for value in ("garbage", "", 7, True, [], {}, ["2030-01-01T00:00:00"], "0001-01-01T00:00:00+14:00", "9" * 400)
    ),
    Poison("eta far ahead", _with("9999-12-31T23:59:59+00:00", "headers", "eta"), _H, "headers.eta"),
    *(
        Poison(f"retries {value!r}", _with(value, "headers", "retries"), _H, "headers.retries")
        for value in ("x", -1, 10**9, 1.5, True, [])
    ),
    *(
        Poison(f"timelimit {value!r}", _with(value, "headers", "timelimit"), _H, "headers.timelimit")
        for value in ("x", 5, [1], [1, 2, 3], [-1, None], ["a", "b"], {"a": 1})
    ),
    *(
        Poison(f"{name} {value!r}", _with(value, "headers", name), _H, f"headers.{name}")
        for name in ("root_id", "parent_id", "group", "origin", "lang")
        for value in ([CANARY], 3, "a\nb")
    ),
    *(
        Poison(f"{name} {value!r}", _with(value, "headers", name), _H, f"headers.{name}")
        for name, value in (
            ("argsrepr", [CANARY]),
            ("kwargsrepr", 3),
            ("argsrepr", "x" * 100_000),
            ("group_index", "x"),
            ("ignore_result", "yes"),
            ("replaced_task_nesting", "x"),
            ("stamped_headers", "x"),
            ("stamped_headers", [["x"]]),
            ("stamps", [1]),
            ("headers", "x"),
        )
    ),
    *(
        Poison(f"header {name}", _with(CANARY, "headers", name), _H, "headers")
        for name in ("args", "callbacks", "chain", "delivery_info", "hostname", "get", "update", "__class__")
    ),
    # properties
    *(
        Poison(f"{name} {value!r}", _with(value, "properties", name), _P, f"properties.{name}")
        for name, value in (
            ("priority", "x"),
            ("priority", [1]),
            ("priority", -5),
            ("priority", True),
            ("reply_to", [CANARY]),
            ("reply_to", "a\nb"),
            ("correlation_id", {}),
            ("body_encoding", "rot13"),
            ("body_encoding", 7),
        )
    ),
    # the body
    Poison("no body", _without("body"), _B, "body"),
    Poison("body null", _with(None, "body"), _B, "body"),
    Poison("body an object", _with({"a": CANARY}, "body"), _B, "body"),
    Poison("body empty", _with("", "body"), _B, "body"),
    Poison("body not base64", _with("a", "body"), _B, "body"),
    Poison("body not in base64 at all", _with(f"é{CANARY}", "body"), _B, "body"),
    Poison("body plain, said to be base64", _with(f"[[], {{}}, {{}}] {CANARY}", "body"), _B, "body"),
    Poison("body of bytes", _body(b"\xff\xfe\0"), _B, "body"),
    *(
        Poison(f"body {json.dumps(value)}", _body(value), _B, "body")
        for value in ([], None, {}, "x", 3, [[], {}], [[], {}, {}, {}], [CANARY])
    ),
    Poison("protocol 1", _body({"task": "leoflow.dispatch", "id": "1", "args": [CANARY], "kwargs": {}}), _B, "body"),
    Poison("deep arguments", _body(f"[{DEEP}".encode()), _B, "body"),
    Poison("deeper than allowed", _body(("[[" + "[" * 300 + "]" * 300 + "], {}, {}]").encode()), _B, "body"),
    Poison("infinite argument", _body(b"[[1e999], {}, {}]"), _B, "body"),
    Poison("argument not a number", _body(b"[[NaN], {}, {}]"), _B, "body"),
    Poison("huge number as argument", _body(b"[[" + b"1" * 10_000 + b"], {}, {}]"), _B, "body"),
    Poison("half a surrogate pair", _body(b'[["\\ud800"], {}, {}]'), _B, "body"),
    Poison("typed garbage", _body([[{"__type__": "decimal", "__value__": CANARY}], {}, {}]), _B, "body"),
    Poison("typed by a list", _body([[{"__type__": [1], "__value__": 1}], {}, {}]), _B, "body"),
    Poison("of an unknown type", _body([[{"__type__": "x", "__value__": CANARY}], {}, {}]), _B, "body"),
    Poison("args an object", _body([{"a": CANARY}, {}, {}]), _A, "args"),
    Poison("args null", _body([None, {}, {}]), _A, "args"),
    Poison("args text", _body([CANARY, {}, {}]), _A, "args"),
    Poison("kwargs a list", _body([[], [CANARY], {}]), _A, "kwargs"),
    Poison("kwargs null", _body([[], None, {}]), _A, "kwargs"),
    Poison("unknown kwargs", _body([[], {f"no_such_{CANARY}\nforged": CANARY}, {}]), _A, "args"),
    Poison("too many args", _body([[1] * 50, {}, {}]), _A, "args"),
    Poison("embed null", _body([[], {}, None]), _B, "embed"),
    Poison("embed a list", _body([[], {}, [CANARY]]), _B, "embed"),
    Poison("embed with an id", _body([[], {}, {"id": "somebody-else"}]), _B, "embed"),
    *(
        Poison(f"embed {name} {value!r}", _body([[], {}, {name: value}]), _B, f"embed.{name}")
        for name in ("callbacks", "errbacks", "chain", "chord")
        for value in ("x", 3, [3], [{"no": "task"}], [{"task": [1]}])
    ),
)
