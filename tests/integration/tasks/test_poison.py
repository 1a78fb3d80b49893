"""Every poison over every queue of real workers: they live, the next message is served, the dead letter is there.

One worker per queue takes all of them; what must hold is looked at afterwards.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis

from leoflow_celery.errors import InvalidRequest, NotFound
from leoflow_celery.queueing.dead_letters import DeadLetters
from leoflow_celery.queueing.decoder import printable
from tests.integration.tasks.back_ends import BackEnds
from tests.support.monitor import Monitor
from tests.support.poison import CANARY, POISONS, encoded, envelope, raw
from tests.support.process import ManagedProcess
from tests.support.redis_server import RedisServer
from tests.support.redis_spy import dump
from tests.support.system import System
from tests.support.waiting import wait_until

_LAUNCH = {"sealed": "x"}
#: A task of each queue, with arguments that it takes and that do nothing.
TASK_OF: dict[str, tuple[str, dict[str, Any]]] = {
    "dispatch": ("leoflow.dispatch", {"request": {"no": "request"}}),
    "results": ("leoflow.results.present", {"speaker": "docker", "sealed": "x"}),
    "maintenance": ("leoflow.maintenance.expire_xcoms", {}),
    "inline": ("leoflow.execute.inline", _LAUNCH),
    "subprocess": ("leoflow.execute.subprocess", _LAUNCH),
    "k8s": ("leoflow.execute.kubernetes", _LAUNCH),
    "docker": ("leoflow.execute.docker", _LAUNCH),
    "docker.host-1": ("leoflow.execute.docker", _LAUNCH),
}
LETTERS = 2_000


@dataclass
class Poisoned:
    """The system, its workers by queue, and what was sent."""

    system: System
    workers: dict[str, ManagedProcess]
    letters: DeadLetters
    waiting: dict[str, str] = field(default_factory=dict)

    def push(self, queue: str, *messages: bytes) -> None:
        for message in messages:
            self.system.redis.lpush(f"leoflow:{queue}", message)

    def serve(self, queue: str) -> str:
        """A well-formed message is taken, so everything before it was; its id, since nobody believes its content."""
        name, kwargs = TASK_OF[queue]
        message = envelope(name, kwargs=kwargs, ignore_result=True)
        self.push(queue, raw(message))
        celery_id = str(message["headers"]["id"])
        self.workers[queue].wait_for_line(rf"{re.escape(name)}\[{celery_id}\] received", 60)
        return celery_id

    def all_live(self) -> bool:
        return all(worker.returncode is None for worker in self.workers.values())

    def of_queue(self, queue: str) -> list[Any]:
        return [letter for letter in self.letters.all() if letter.queue == queue]


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory, shared_redis: RedisServer) -> Iterator[Poisoned]:
    overrides = {"BROKER_DEAD_LETTERS": LETTERS, "BROKER_VISIBILITY_TIMEOUT_SECONDS": 600}
    with System(tmp_path_factory.mktemp("poison"), shared_redis.url(), **overrides) as system:
        system.start_workers("workers.control", "workers.inline", "workers.subprocess")
        back_ends = BackEnds(system)
        k8s, docker = back_ends.start("k8s"), back_ends.start("docker", "host-1")
        workers = {
            **dict.fromkeys(("dispatch", "results", "maintenance"), system.process("workers.control")),
            "inline": system.process("workers.inline"),
            "subprocess": system.process("workers.subprocess"),
            "k8s": k8s,
            "docker": docker,
            "docker.host-1": docker,
        }
        docker.wait_for_line("Started consuming from docker.host-1|docker.host-1", 60)
        letters = DeadLetters(system.settings)
        yield Poisoned(system, workers, letters)
        letters.close()


@pytest.fixture(autouse=True)
def shown(poisoned: Poisoned) -> None:
    poisoned.system.shown_on_failure()


@pytest.mark.parametrize("queue", TASK_OF)
def test_every_poison_becomes_a_dead_letter_and_the_next_message_is_served(poisoned: Poisoned, queue: str) -> None:
    name, kwargs = TASK_OF[queue]
    with Monitor(poisoned.system.client.app) as monitor:
        for poison in POISONS:
            message = envelope(name, kwargs=kwargs)
            message["headers"]["x-secret"] = CANARY
            poisoned.push(queue, poison.spoil(message))
        served = poisoned.serve(queue)
        found = [letter.kind for letter in poisoned.of_queue(queue) if letter.celery_id != served]
    assert Counter(found) == Counter(poison.kind for poison in POISONS)
    assert poisoned.all_live()
    assert CANARY not in str(monitor.events)
    wait_until(lambda: not poisoned.system.redis.hlen("leoflow:unacked"), 30, "nothing to be held")


def test_the_logs_show_nothing_of_them_and_no_forged_line(poisoned: Poisoned) -> None:
    for worker in poisoned.workers.values():
        output = worker.output()
        assert CANARY not in output
        assert "Traceback" not in output
        assert "\x1b]0;" not in output
        assert not re.search(r"^forged", output, re.MULTILINE)
        assert output.count("ready.") == 1, "it connected again"
    output = poisoned.workers["dispatch"].output()
    line = next(line for line in output.splitlines() if "kind=unknown_task" in line)
    assert re.search(r"message\.refused .*task=leoflow\.dispach .*content_type=application/json size_bytes=\d+", line)


def test_the_letters_show_nothing_and_hold_everything_sealed(poisoned: Poisoned) -> None:
    assert CANARY not in dump(poisoned.system.redis)
    letter = next(letter for letter in poisoned.of_queue("dispatch") if letter.task == "leoflow.dispach")
    message = json.loads(poisoned.letters.message(letter))
    assert message["headers"]["x-secret"] == CANARY
    assert letter.is_whole


def test_who_waits_hears_what_is_wrong_and_with_which_field(poisoned: Poisoned) -> None:
    app = poisoned.system.client.app
    wrong: dict[str, Any] = {
        "headers.eta": {"eta": "garbage"},
        "headers.task": {"task": "leoflow.dispach"},
        "headers.shadow": {"shadow": "a\nb"},
    }
    for named, headers in wrong.items():
        message = envelope("leoflow.dispatch", [{}])
        message["headers"] |= headers
        poisoned.push("dispatch", raw(message))
        with pytest.raises(InvalidRequest) as caught:
            app.AsyncResult(message["headers"]["id"]).get(timeout=30)
        assert (caught.value.field, str(caught.value).startswith(f"{named}: ")) == (named, True)


def test_a_result_that_there_is_stays(poisoned: Poisoned) -> None:
    """The id of a message may be somebody else's."""
    app, celery_id = poisoned.system.client.app, str(uuid.uuid4())
    app.backend.store_result(celery_id, 42, "SUCCESS")
    app.backend.store_result(running := str(uuid.uuid4()), {}, "STARTED")
    for taken in (celery_id, running):
        poisoned.push("dispatch", raw(envelope("leoflow.dispach", celery_id=taken)))
    poisoned.serve("dispatch")
    assert app.AsyncResult(celery_id).get(timeout=10) == 42
    assert app.AsyncResult(running).state == "STARTED"


def test_a_message_of_a_hundred_megabytes_is_refused_and_its_beginning_kept(poisoned: Poisoned) -> None:
    message = envelope("leoflow.dispatch", celery_id=str(uuid.uuid4()))
    message["body"] = "x" * 100_000_000
    poisoned.push("dispatch", raw(message))
    with pytest.raises(InvalidRequest, match="message: it has 100000"):
        poisoned.system.client.app.AsyncResult(message["headers"]["id"]).get(timeout=60)
    poisoned.serve("dispatch")
    letter = next(letter for letter in poisoned.of_queue("dispatch") if letter.kind == "too_large")
    assert (letter.kept_bytes, letter.is_whole) == (65_536, False)
    with pytest.raises(InvalidRequest, match="cannot be sent again"):
        poisoned.letters.send_again(letter)


def test_a_letter_is_sent_again_once_and_refused_again(poisoned: Poisoned) -> None:
    message = envelope("leoflow.dispach")
    poisoned.push("dispatch", raw(message))
    poisoned.serve("dispatch")
    [letter] = [one for one in poisoned.of_queue("dispatch") if one.celery_id == message["headers"]["id"]]
    poisoned.letters.send_again(letter)
    with pytest.raises(NotFound):
        poisoned.letters.send_again(letter)
    poisoned.serve("dispatch")
    again = [one for one in poisoned.of_queue("dispatch") if one.celery_id == letter.celery_id]
    assert [one.kind for one in again] == ["unknown_task"]
    assert again[0].id != letter.id


# -- other keys that a worker reads ---------------------------------------------------------------------------------


def test_garbage_among_the_messages_that_workers_hold_goes_and_what_is_right_comes_back(poisoned: Poisoned) -> None:
    client: redis.Redis[bytes] = poisoned.system.redis
    good = envelope("leoflow.dispatch", [{"no": "request"}])
    entries: dict[str, bytes] = {
        "a": b"not json",
        "b": b"[" * 100_000,
        "c": raw([1, 2]),
        "d": raw([[CANARY], "", "dispatch"]),
        "e": raw([{"headers": None, "properties": {}}, "", "dispatch"]),
        "f": raw([envelope("leoflow.dispatch"), {"x": CANARY}, "dispatch"]),
        "g": raw([envelope("leoflow.dispatch"), "", [CANARY]]),
        "h": raw([{**envelope("leoflow.dispatch"), "properties": 7}, "", "dispatch"]),
        "\xff\xfe": raw(CANARY),
        "good": raw([good, "no-such-exchange", "dispatch"]),
    }
    for tag, entry in entries.items():
        client.hset("leoflow:unacked", tag, entry)
    client.zadd("leoflow:unacked_index", {**dict.fromkeys(entries, 1.0), "nothing": 2.0})
    worker = poisoned.workers["dispatch"]
    worker.wait_for_line(rf"leoflow.dispatch\[{good['headers']['id']}\] received", 60)
    wait_until(
        lambda: not client.zcard("leoflow:unacked_index"), 60, lambda: client.zrange("leoflow:unacked_index", 0, -1)
    )
    letters = [letter for letter in poisoned.of_queue("unacked") if letter.kind == "unacked"]
    assert len(letters) == len(entries) - 1
    assert poisoned.all_live()
    assert not any(CANARY in one.output() or "Traceback" in one.output() for one in poisoned.workers.values())


@pytest.mark.parametrize("key", ["inline", "inline\x06\x163", "unacked", "unacked_index", "unacked.subprocess"])
def test_a_key_of_another_kind_is_moved_out_of_the_way(poisoned: Poisoned, key: str) -> None:
    client: redis.Redis[bytes] = poisoned.system.redis
    full = f"leoflow:{key}"
    wait_until(lambda: not client.exists(full), 30, lambda: f"{full} is in use")
    client.set(full, "a string")
    target = "subprocess" if key.startswith("unacked.") else "inline"
    wait_until(lambda: client.type(full) != b"string", 30, "the key to be moved") if "unacked" not in key else None
    poisoned.serve(target)
    [moved] = client.keys(f"{full}.set-aside.*")
    assert client.get(moved) == b"a string"
    shown = printable(moved.decode())
    assert any(letter.kind == "wrong_type" and shown in letter.sentence for letter in poisoned.letters.all())
    assert poisoned.all_live()


# -- remote control -------------------------------------------------------------------------------------------------


def test_no_broadcast_ends_or_changes_a_worker_and_who_asks_is_answered(poisoned: Poisoned) -> None:
    client: redis.Redis[bytes] = poisoned.system.redis
    database = client.connection_pool.connection_kwargs["db"]
    control = poisoned.system.client.app.control
    before = control.inspect(timeout=5).active_queues()
    assert len(before) == 5
    for data in (b"not json", b"[" * 100_000, raw([CANARY]), raw({"headers": 7}), raw(None), b"\xff"):
        for channel in ("celery.pidbox", "celery.pidbox/x", "no.such", ""):
            client.publish(f"/{database}.{channel}", data)
            client.publish(f"leoflow:/{database}.{channel}", data)
    commands: list[dict[str, Any]] = [
        {"method": "ping", "arguments": {f"x\nforged {CANARY}": 1}},
        {"method": "no_such", "arguments": {"a": CANARY}},
        {"method": "ping", "reply_to": {"exchange": "x"}},
    ]
    for command in commands:
        client.publish(
            f"leoflow:/{database}.celery.pidbox", raw({**envelope("x"), "headers": {}, "body": encoded(command)})
        )
    control.shutdown()
    control.revoke("some-id", terminate=True)
    control.broadcast("pool_restart")
    control.cancel_consumer("inline")
    control.add_consumer("other")
    control.broadcast("pool_shrink", {"n": 8})
    for queue in TASK_OF:
        poisoned.serve(queue)
    inspect = control.inspect(timeout=5)
    assert inspect.active_queues() == before
    assert all(reply == [] for reply in (inspect.revoked() or {}).values())
    assert len(control.ping(timeout=5)) == 5
    assert poisoned.all_live()
    for worker in poisoned.workers.values():
        output = worker.output()
        assert "control.refused" in output
        assert CANARY not in output
        assert not re.search(r"^forged", output, re.MULTILINE)


def test_an_operator_may_allow_every_command(own_system: System) -> None:
    worker = own_system.start(
        "obedient",
        *(sys.executable, "-m", "celery", "-A", "workers.inline", "worker", "-l", "INFO", "-n", "obedient@%h"),
        env={"LEOFLOW_BROKER_REMOTE_CONTROL": "all"},
    )
    worker.wait_for_line("ready", 60)
    own_system.client.app.control.shutdown()
    wait_until(lambda: worker.returncode == 0, 30, worker.output)


def test_a_refused_message_is_kept_once_the_broker_takes_it(poisoned: Poisoned) -> None:
    client: redis.Redis[bytes] = poisoned.system.redis
    kept, worker = {letter.id for letter in poisoned.letters.all()}, poisoned.workers["inline"]
    worker.send_signal(signal.SIGSTOP)
    poisoned.push("inline", b"not json")
    client.config_set("maxmemory", 1)  # the broker gives, and takes nothing
    try:
        worker.send_signal(signal.SIGCONT)
        worker.wait_for_line("dead_letter.not_kept", 30)
    finally:
        client.config_set("maxmemory", 0)
    poisoned.push("inline", b"not json either")
    served = poisoned.serve("inline")
    found = [letter for letter in poisoned.letters.all() if letter.id not in kept and letter.celery_id != served]
    assert [letter.kind for letter in found] == ["envelope", "envelope"]
