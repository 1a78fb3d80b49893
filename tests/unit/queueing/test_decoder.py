"""Whatever a message holds, the decoder either admits it as everybody after it can read it, or says what is wrong."""

from __future__ import annotations

import base64
import json
import time
from datetime import datetime
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context
from hypothesis import given, settings
from hypothesis import strategies as st
from kombu.serialization import loads
from kombu.transport.memory import Channel
from kombu.utils.json import dumps

from leoflow_celery.app.transport import Message
from leoflow_celery.clock import ServerClock, due_in
from leoflow_celery.queueing import decoder
from leoflow_celery.queueing.decoder import (
    RESERVED_HEADERS,
    Admitted,
    Kind,
    Limits,
    Refused,
    TaskRules,
    decode_broadcast,
    decode_held,
    decode_task,
    printable,
)
from tests.support.poison import CANARY, POISONS, Poison, encoded, envelope, raw

#: Not one of ours: those are in every app of a process that loaded them.
TASK = "unit.dispatch"
#: Of queue results.
SYSTEM_TASK = "leoflow.results.advance"


@pytest.fixture(scope="module")
def app() -> Celery:
    made = Celery(broker="memory://", set_as_current=False)

    @made.task(name=TASK, bind=True)
    def dispatch(self: Any, request: Any = None) -> None: ...

    return made


@pytest.fixture(scope="module")
def rules(app: Celery) -> TaskRules:
    return TaskRules({**app.tasks, SYSTEM_TASK: app.tasks[TASK]}, Limits(max_bytes=1_000_000))


def decoded(data: bytes, rules: TaskRules, queue: str = "dispatch") -> Admitted:
    return decode_task(data, queue, rules, time.time())


@pytest.mark.parametrize("poison", POISONS, ids=str)
def test_each_poison_is_refused_with_its_kind_and_field_and_without_its_content(
    poison: Poison, rules: TaskRules
) -> None:
    message = envelope(TASK, [{"env": CANARY}], argsrepr=CANARY)
    with pytest.raises(Refused) as caught:
        decoded(poison.spoil(message), rules)
    refused = caught.value
    assert refused.kind == poison.kind, refused
    assert poison.field in ("", refused.field), refused
    assert CANARY not in refused.sentence
    assert refused.sentence.isprintable()
    assert refused.sentence.startswith(f"{refused.field}: ")


def test_a_right_message_is_admitted_as_it_is_but_for_where_it_comes_from(rules: TaskRules) -> None:
    message = envelope(TASK, [{"a": 1}], traceparent="00-1", eta="2020-01-01T00:00:00+00:00", retries=3)
    message["properties"]["delivery_info"] = {"exchange": "other", "routing_key": [1]}
    admitted = decoded(raw(message), rules)
    assert admitted.content == [[{"a": 1}], {}, dict.fromkeys(("callbacks", "errbacks", "chain", "chord"))]
    assert admitted["headers"] == message["headers"]
    assert admitted["properties"]["delivery_info"] == {"exchange": "", "routing_key": "dispatch"}
    assert admitted["properties"]["delivery_tag"] != message["properties"]["delivery_tag"]


def test_what_kombu_writes_of_dates_and_decimals_is_read_as_kombu_reads_it(rules: TaskRules) -> None:
    typed = {"__type__": "datetime", "__value__": "2026-01-01T00:00:00"}
    admitted = decoded(raw({**envelope(TASK), "body": encoded([[typed], {}, {}])}), rules)
    assert admitted.content[0][0].year == 2026


def test_a_body_need_not_be_base64(rules: TaskRules) -> None:
    message = envelope(TASK)
    message["body"] = '[[{"ü": 1}], {}, {}]'
    message["properties"]["body_encoding"] = "utf-8"
    assert decoded(raw(message), rules).content[0] == [{"ü": 1}]
    del message["properties"]["body_encoding"]
    assert decoded(raw(message), rules).content[0] == [{"ü": 1}]


def test_too_large_a_message_is_not_parsed_but_its_id_is_found(rules: TaskRules) -> None:
    message = envelope(TASK, [CANARY * 200_000], celery_id="waits")
    with pytest.raises(Refused) as caught:
        decoded(raw(message), rules)
    assert caught.value.kind is Kind.TOO_LARGE
    assert (caught.value.about.celery_id, caught.value.about.task) == ("waits", TASK)


def test_a_task_comes_over_its_own_queue_or_one_of_its_hosts(rules: TaskRules, app: Celery) -> None:
    with pytest.raises(Refused, match="of queue 'results'"):
        decoded(raw(envelope(SYSTEM_TASK)), rules)
    assert decoded(raw(envelope(SYSTEM_TASK)), rules, "results.host-1")


def test_every_name_that_celery_keeps_something_else_under_is_reserved() -> None:
    known = set(envelope(TASK)["headers"]) | {"headers"}
    public = {name for name in dir(Context) if not name.startswith("_")}
    assert public - known - RESERVED_HEADERS == set()


# -- Hypothesis: any mutation ---------------------------------------------------------------------------------------

_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
_PLACES = st.sampled_from(
    [
        *((name,) for name in ("body", "content-type", "content-encoding", "headers", "properties")),
        *(("headers", name) for name in [*envelope(TASK)["headers"], "compression", "x-own", "headers"]),
        *(("properties", name) for name in envelope(TASK)["properties"]),
    ]
)


def admitted_or_refused(data: bytes, app: Celery, rules: TaskRules) -> None:
    """Either way nothing else happens; and what is admitted, kombu and Celery's request take."""
    try:
        admitted = decoded(data, rules)
    except Refused:
        return
    message = Message(json.loads(dumps(admitted)), channel=Channel(app.connection_for_read().transport))
    assert not message.errors
    content = loads(message.body, message.content_type, message.content_encoding, accept={"application/json"})
    assert repr(content) == repr(admitted.content)
    task = app.tasks[message.headers["task"]]
    from celery.worker.request import Request

    request = Request(message, app=app, task=task, hostname="h")
    assert (request.id, repr(request.args)) == (admitted["headers"]["id"], repr(admitted.content[0]))
    assert str(request).isprintable()
    request.revoked()
    assert request._context.id == request.id


@settings(max_examples=300, deadline=None)
@given(place=_PLACES, value=_VALUES)
def test_any_value_in_any_place_of_the_envelope(app: Celery, rules: TaskRules, place: Any, value: Any) -> None:
    message = envelope(TASK)
    target = message if len(place) == 1 else message[place[0]]
    target[place[-1]] = value
    admitted_or_refused(json.dumps(message).encode(errors="surrogatepass"), app, rules)


@settings(max_examples=200, deadline=None)
@given(value=_VALUES, part=st.integers(0, 3))
def test_any_value_in_any_part_of_the_body(app: Celery, rules: TaskRules, value: Any, part: int) -> None:
    parts: Any = [[], {}, {}]
    body = value if part == 3 else [*parts[:part], value, *parts[part + 1 :]]
    admitted_or_refused(raw({**envelope(TASK), "body": encoded(body)}), app, rules)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_bytes_anywhere(app: Celery, rules: TaskRules, data: st.DataObject) -> None:
    whole = raw(envelope(TASK))
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, len(whole)))
    admitted_or_refused(whole[:start] + data.draw(st.binary(max_size=30)) + whole[end:], app, rules)


@settings(max_examples=200, deadline=None)
@given(entry=st.binary(max_size=50) | _VALUES.map(lambda value: json.dumps(value).encode(errors="surrogatepass")))
def test_any_entry_of_what_workers_hold(entry: bytes) -> None:
    try:
        message, exchange, routing_key = decode_held(entry, 1_000_000)
    except Refused:
        return
    assert (type(message), type(exchange), type(routing_key)) == (dict, str, str)


# -- remote control -------------------------------------------------------------------------------------------------


def broadcast(command: Any, **headers: Any) -> bytes:
    return raw({**envelope("x"), "body": encoded(command), "headers": {"clock": 3, **headers}})


REPLY_TO = {"exchange": "reply.celery.pidbox", "routing_key": "0b3a-1"}


@pytest.mark.parametrize(
    "command",
    [
        {"method": "ping", "arguments": {}, "destination": None, "pattern": None, "matcher": None},
        {"method": "active", "arguments": {"safe": None}, "destination": ["a@h"], "reply_to": REPLY_TO, "ticket": "1"},
        {"method": "registered", "arguments": {"taskinfoitems": ["rate_limit"], "builtins": False}},
        {"method": "query_task", "arguments": {"ids": ["1"]}, "pattern": "a*", "matcher": "glob"},
        {"method": "enable_events"},
    ],
)
def test_who_asks_is_answered(command: Any) -> None:
    assert decode_broadcast(broadcast(command), Limits(), all_commands=False)


@pytest.mark.parametrize("method", ["shutdown", "pool_restart", "add_consumer", "cancel_consumer", "rate_limit"])
def test_who_changes_a_worker_is_refused_unless_a_setting_allows_it(method: str) -> None:
    data = broadcast({"method": method, "arguments": {}})
    with pytest.raises(Refused, match="LEOFLOW_BROKER_REMOTE_CONTROL=all"):
        decode_broadcast(data, Limits(), all_commands=False)
    assert decode_broadcast(data, Limits(), all_commands=True)


@pytest.mark.parametrize("all_commands", [False, True])
@pytest.mark.parametrize("method", ["revoke", "terminate", "revoke_by_stamped_headers", "hello"])
def test_nobody_revokes_by_a_broadcast_whatever_the_setting(method: str, all_commands: bool) -> None:
    data = broadcast({"method": method, "arguments": {"task_id": ["x"]}})
    with pytest.raises(Refused, match="leoflow cancel"):
        decode_broadcast(data, Limits(), all_commands=all_commands)


@pytest.mark.parametrize(
    "data",
    [
        b"not json",
        b"[" * 100_000,
        raw([1]),
        raw({"headers": {}, "properties": {}}),
        broadcast([CANARY]),
        broadcast({"method": ["ping"]}),
        broadcast({"method": "ping\nforged"}),
        broadcast({"method": "ping", "arguments": [CANARY]}),
        broadcast({"method": "ping", "arguments": {f"x\n{CANARY}": 1}}),
        broadcast({"method": "registered", "arguments": {"taskinfoitems": ["runtime"]}}),
        broadcast({"method": "ping", "reply_to": {"exchange": "dispatch", "routing_key": "dispatch"}}),
        broadcast({"method": "ping", "reply_to": 7}),
        broadcast({"method": "ping", "destination": 7}),
        broadcast({"method": "ping", "pattern": "(a+)+$", "matcher": "pcre"}),
        broadcast({"method": "ping", "surprise": 1}),
        broadcast({"method": "ping"}, clock="x"),
        broadcast({"method": "ping"}, clock=10**300),
        broadcast({"method": "ping"}, compression="zlib"),
    ],
)
def test_a_command_about_which_anything_is_wrong_is_refused_and_not_repeated(data: bytes) -> None:
    with pytest.raises(Refused) as caught:
        decode_broadcast(data, Limits(), all_commands=False)
    assert CANARY not in caught.value.sentence
    assert caught.value.sentence.isprintable()


def test_words_of_a_stranger_are_made_safe() -> None:
    assert printable("a\nb\x1b[31m\u202e") == "a\\nb\\x1b[31m\\u202e"
    assert printable("x" * 500) == "x" * 100 + "…"


@pytest.mark.parametrize("seconds_off", [-120.0, 0.0, 120.0])
def test_when_a_message_of_ours_is_due_goes_by_the_brokers_clock(
    rules: TaskRules, monkeypatch: pytest.MonkeyPatch, seconds_off: float
) -> None:
    """Celery compares an eta with the clock of the worker's host, and a user's message names it by a clock of his."""
    broker, clock = time.time(), ServerClock()
    clock.read(lambda: broker)
    monkeypatch.setattr("leoflow_celery.clock.broker_clock", clock)
    monkeypatch.setattr(decoder, "broker_clock", clock)
    due = due_in(30).isoformat()
    monkeypatch.setattr("leoflow_celery.clock.time.time", lambda: broker + seconds_off)
    moments = {}
    for task in ("leoflow.results.advance", "leoflow.dispatch"):
        headers = {"task": task, "eta": due}
        moments[task] = datetime.fromisoformat(decoder._with_own_eta(headers)["eta"]).timestamp()
    assert moments["leoflow.results.advance"] == pytest.approx(broker + seconds_off + 30, abs=2)
    assert moments["leoflow.dispatch"] == pytest.approx(broker + 30, abs=2)
    assert decoder._with_own_eta({"task": "leoflow.results.advance", "eta": "soon"})["eta"] == "soon"


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        (b'"headers": {', b'"headers": {"id": "another", ', Kind.ENVELOPE),
        (b'{"body": ', b'{"body": "", "body": ', Kind.ENVELOPE),
    ],
)
def test_a_key_that_is_there_twice_is_refused_wherever_it_is(
    rules: TaskRules, before: bytes, after: bytes, kind: Kind
) -> None:
    """One reader of the message, in whatever language, takes the first value and the next one the last."""
    sent = json.dumps(envelope(TASK)).encode()
    assert sent.count(before) == 1, sent
    with pytest.raises(Refused) as refused:
        decoded(sent.replace(before, after), rules)
    assert (refused.value.kind, "the same key twice" in refused.value.sentence) == (kind, True)


def test_a_key_that_is_there_twice_in_the_arguments_is_refused(rules: TaskRules) -> None:
    body = b'[[], {"request": {"a": 1, "a": 2}}, {}]'
    message = {**envelope(TASK), "body": base64.b64encode(body).decode()}
    with pytest.raises(Refused, match="the same key twice") as refused:
        decoded(json.dumps(message).encode(), rules)
    assert refused.value.kind is Kind.BODY
