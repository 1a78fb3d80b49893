"""What a publisher's Celery signatures may name: user tasks on user queues, wherever in a canvas one hides."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, chain, chord, chunks, group, signature
from celery.canvas import Signature, xmap, xstarmap
from hypothesis import given, settings
from hypothesis import strategies as st

from leoflow_celery.domain.attempt import celery_task_id
from leoflow_celery.domain.canvas import (
    MAX_DEPTH,
    MAX_SIGNATURES,
    check_context,
    check_headers,
    check_signatures,
    permitted_context,
)
from leoflow_celery.domain.routing import ALL_QUEUES, LAUNCH_QUEUES
from leoflow_celery.errors import InvalidRequest

Json = dict[str, Any]
APP = Celery("canvas", broker="memory://", backend="cache+memory://", set_as_current=False)
OUR_TASKS = [
    *("leoflow.execute.inline", "leoflow.execute.subprocess", "leoflow.execute.docker", "leoflow.execute.kubernetes"),
    *("leoflow.results.present", "leoflow.results.record", "leoflow.results.settle", "leoflow.stop.docker"),
    *("leoflow.reconcile.docker", "leoflow.staging.docker", "leoflow.maintenance.complete_due", "leoflow.anything"),
]
CELERYS = ["celery.backend_cleanup", "celery.chord_unlock", "celery.anything"]
OUR_QUEUES = [*ALL_QUEUES, *(f"{name}.host-1" for name in LAUNCH_QUEUES)]
BROKERS = [
    "unacked",
    "unacked_index",
    "_kombu.binding.k8s",
    "celery-task-meta-abc",
    "celeryev",
    "celery.pidbox",
    "lock:x",
]


def user(name: str = "user.note", **options: Any) -> Signature[Any]:
    return signature(name, args=(1,), app=APP, **{"queue": "user", **options})


def dispatched() -> Signature[Any]:
    return signature("leoflow.dispatch", args=({},), immutable=True, app=APP, queue="dispatch")


def plain(item: Any) -> Json:
    found: Json = json.loads(json.dumps(item))
    return found


def raw(task: str = "user.note", **changes: Any) -> Json:
    return {"task": task, "args": [], "kwargs": {}, "options": {}, "subtask_type": None, "immutable": False} | changes


def signatures_in(item: Any) -> Iterator[Json]:
    """Every signature of a canvas as plain JSON, itself first."""
    if isinstance(item, dict):
        if "task" in item and "subtask_type" in item:
            yield item
        for child in item.values():
            yield from signatures_in(child)
    elif isinstance(item, list):
        for child in item:
            yield from signatures_in(child)


def canvases() -> st.SearchStrategy[Any]:
    leaves = st.sampled_from(["user.a", "user.b", "dispatch"]).map(
        lambda name: dispatched() if name == "dispatch" else user(name)
    )

    def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        many = st.lists(inner, min_size=1, max_size=3)
        return st.one_of(
            many.map(lambda items: chain(*copied(items), app=APP)),
            many.map(lambda items: group(*copied(items), app=APP)),
            st.tuples(many, leaves).map(lambda pair: chord(copied(pair[0]), copied([pair[1]])[0], app=APP)),
            st.tuples(leaves, inner).map(lambda pair: copied([pair[0]])[0].on_error(copied([pair[1]])[0])),
        )

    return st.recursive(leaves, nested, max_leaves=8)


def copied(items: list[Any]) -> list[Any]:
    return [Signature.from_dict(copy.deepcopy(dict(item)), app=APP) for item in items]


@given(canvases())
@settings(max_examples=60, deadline=None)
def test_a_canvas_of_user_tasks_and_dispatches_is_accepted(canvas: Any) -> None:
    check_signatures("link", plain(canvas))
    canvas.freeze()
    check_signatures("link", [plain(canvas)])


FORGERIES: list[Json] = [
    *({"task": name} for name in (*OUR_TASKS, *CELERYS)),
    *({"options": {"queue": name}} for name in (*OUR_QUEUES, *BROKERS)),
    {"options": {"queue": "user", "exchange": "", "routing_key": "k8s"}},
    {"options": {"queue": "user", "exchange": "k8s", "routing_key": "x"}},
    {"options": {"queue": "user", "headers": {"task": "leoflow.execute.inline"}}},
    {"options": {"queue": "user", "link": [raw("leoflow.execute.inline")]}},
    {"options": {"queue": "user", "link_error": raw("leoflow.results.present")}},
    {"options": {"queue": "user", "chord": raw("leoflow.stop.docker")}},
    {"options": {"queue": "user", "chain": [raw("leoflow.stop.docker")]}},
    {"options": {"queue": "user", "task_id": celery_task_id("victim", 1)}},
]


@given(canvases(), st.sampled_from(FORGERIES), st.data())
@settings(max_examples=150, deadline=None)
def test_a_forgery_is_refused_wherever_it_hides(canvas: Any, forgery: Json, data: st.DataObject) -> None:
    forged = plain(canvas)
    places = [one for one in signatures_in(forged) if one["subtask_type"] is None]
    data.draw(st.sampled_from(places)).update({"task": "user.x", **copy.deepcopy(forgery)})
    with pytest.raises(InvalidRequest) as caught:
        check_context({"callbacks": [forged]})
    assert caught.value.field == "callbacks"
    kept, refusals = permitted_context({"callbacks": [forged], "chain": [raw()], "task": "t"})
    assert kept == {"callbacks": None, "chain": [raw()], "task": "t"} | {
        key: None for key in kept if key not in ("callbacks", "chain", "task")
    }
    assert [one.field for one in refusals] == ["callbacks"]


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (raw("leoflow.execute.inline"), "'leoflow.execute.inline' is a task of this system; name a task of your own"),
        (raw("celery.backend_cleanup"), "'celery.backend_cleanup' is a task of Celery itself"),
        (raw(options={"queue": "docker.h1"}), "'docker.h1' is a queue of this system; name a queue of your own"),
        (raw(options={"queue": "dispatch"}), "'dispatch' is a queue of this system"),
        (raw(options={"queue": "k8s\x06\x163"}), "a queue's name is a printable text"),
        (raw(options={"queue": 5}), "is the name of a queue"),
        (raw("user\nnote"), "a task's name is a printable text of 1 to 255 characters"),
        (raw("user\u202enote"), "a task's name is a printable text"),
        (raw("x" * 256), "a task's name is a printable text"),
        # canvas whose two names do not agree: Celery would read the one, and this check the other
        (
            raw("user.x", subtask_type="chain", kwargs={"tasks": [raw("leoflow.x")]}),
            "'chain' does not fit task 'user.x'",
        ),
        (raw("celery.chain", kwargs={"tasks": []}), "None does not fit task 'celery.chain'"),
        (raw("celery.group", subtask_type="chain", kwargs={"tasks": []}), "does not fit"),
        (raw("celery.group", subtask_type="group", kwargs={"tasks": {"0": raw()}}), "is a list of signatures"),
        (raw("celery.group", subtask_type="group", kwargs={"tasks": [], "more": 1}), "a group has no 'more'"),
        (raw("celery.map", subtask_type="xmap", kwargs={"task": raw("leoflow.x"), "it": []}), "(at kwargs.task.task)"),
        (
            raw(
                "celery.chord", subtask_type="chord", kwargs={"header": [raw()], "body": raw("leoflow.x"), "kwargs": {}}
            ),
            "(at kwargs.body.task)",
        ),
        # what Celery would pass on to its sender
        *(
            (raw(options={name: 1}), f"the option {name!r} is not known; remove it")
            for name in ("connection", "producer", "router", "route_name", "declare", "retry_policy", "compression")
        ),
        (raw(options={"shadow": "a\x1b[2J"}), "is a printable text"),
        (raw(options={"task_id": "a\nb"}), "is a printable text"),
        (raw(options={"task_id": celery_task_id("x", 1)}), "is the id of a try"),
        (raw(options={"eta": "garbage"}), "is a time as ISO 8601 writes it"),
        (raw(options={"eta": 5}), "is a time as ISO 8601 writes it"),
        (raw(options={"countdown": 1e300}), "is a number of seconds"),
        (raw(options={"countdown": True}), "is a number of seconds"),
        (raw(options={"expires": "soon"}), "is a time as ISO 8601 writes it"),
        (raw(options={"priority": "high"}), "is a number from 0 to 255"),
        (raw(options={"serializer": "pickle"}), "is 'json'"),
        (raw(options={"exchange_type": "fanout"}), "is 'direct' or 'topic'"),
        (raw(options={"reply_to": "results"}), "is a queue of this system"),
        (raw(options={"headers": {"id": "x"}}), "'id' is a header of Celery's own"),
        (raw(options={"headers": []}), "is an object of headers"),
        (raw(options={"stamped_headers": ["queue"], "queue": "k8s"}), "'queue' is no stamp"),
        (raw(options={"stamped_headers": ["absent"]}), "'absent' is no stamp"),
        (raw(options={"stamped_headers": "abc"}), "is a list of printable names"),
        # shapes
        (raw(type="x"), "a signature has no key 'type'"),
        (raw(immutable="yes"), "has the wrong type"),
        (raw(args={}), "has the wrong type"),
        ({"task": "user.x"}, "a signature needs 'args'"),
        ("user.x", "str is no Celery signature"),
        (raw(args=[float("nan")]), "NaN, Infinity"),
        (raw(args=["\ud800"]), "half a surrogate pair"),
    ],
)
def test_what_is_refused_says_why_and_where(item: Any, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_signatures("link", item)
    assert str(caught.value).startswith("link: ")
    assert text in str(caught.value)
    assert caught.value.field == "link"
    assert str(caught.value).isprintable()


def test_what_celery_itself_puts_into_a_canvas_is_accepted() -> None:
    many = group(
        chunks(user("user.add"), [(1, 2)], 1, app=APP),
        xmap(user("user.add"), [1], app=APP),
        xstarmap(user("user.add"), [(1, 2)], app=APP),
    )
    canvas = chain(dispatched(), many, chord([dispatched(), user()], chain(user("user.x"), dispatched())), app=APP)
    canvas.stamp(traceparent="00-abc")
    canvas.freeze()
    check_signatures("chain", plain(canvas))
    options = {"queue": "user", "countdown": 3, "expires": 30, "eta": "2030-01-01T00:00:00+00:00", "priority": 3}
    check_signatures("link", raw("celery.accumulate", kwargs={"index": 0}))
    check_signatures(
        "link", raw(options={**options, "headers": {"traceparent": "x"}, "shadow": "named", "task_id": "t"})
    )
    check_signatures("link", None)


def test_depth_and_number_are_bounded() -> None:
    nested = raw()
    for _ in range(MAX_DEPTH - 1):
        nested = raw("celery.group", subtask_type="group", kwargs={"tasks": [nested]})
    check_signatures("link", nested)
    with pytest.raises(InvalidRequest, match=f"nested deeper than {MAX_DEPTH} levels"):
        check_signatures("link", raw("celery.group", subtask_type="group", kwargs={"tasks": [nested]}))
    deep: Any = []
    for _ in range(5_000):
        deep = [deep]
    with pytest.raises(InvalidRequest, match="nested deeper than"):
        check_signatures("link", deep)
    check_signatures("link", [raw()] * MAX_SIGNATURES)
    with pytest.raises(InvalidRequest, match=f"more than {MAX_SIGNATURES} signatures"):
        check_signatures("link", [raw()] * (MAX_SIGNATURES + 1))


@pytest.mark.parametrize(
    ("context", "field"),
    [
        ({"callbacks": raw()}, "callbacks"),
        ({"errbacks": "leoflow.x"}, "errbacks"),
        ({"chain": {"0": raw()}}, "chain"),
        ({"chord": [raw()]}, "chord"),
        ({"chord": raw("leoflow.results.present")}, "chord"),
        ({"root_id": ["x"]}, "root_id"),
        ({"parent_id": "a\nb"}, "parent_id"),
        ({"group": "x" * 256}, "group"),
        ({"group_index": "first"}, "group_index"),
        ({"shadow": "a\x1b"}, "shadow"),
    ],
)
def test_the_context_of_a_message_is_refused_by_its_field(context: Json, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_context(context)
    assert caught.value.field == field


def test_the_ids_that_signatures_give_their_tasks_are_told_with_their_field() -> None:
    body = raw(options={"task_id": "two"})
    context = {
        "callbacks": [raw(options={"task_id": "one", "link": [body]})],
        "chain": [raw(options={"task_id": "three"})],
    }
    assert check_context(context) == {"one": "callbacks", "two": "callbacks", "three": "chain"}


def test_headers_that_celery_would_take_for_its_own_are_refused() -> None:
    check_headers({"traceparent": "x"})
    for name in ("task", "id", "chain", "headers"):
        with pytest.raises(InvalidRequest, match=f"headers: '{name}'"):
            check_headers({name: "x"})
