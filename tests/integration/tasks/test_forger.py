"""A forger with all of Redis in his hands, and no key; and a launch worker that has the key of its own queue.

Victims stand in every state. What the forger saw he sends again, under other names, with other seals, altered and bare.
Afterwards SQL says of every victim what it said before, and no back end was asked to do anything to one.
"""

from __future__ import annotations

import base64
import itertools
import json
import signal
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from leoflow_celery.client import Handle
from leoflow_celery.domain.attempt import LaunchReport
from leoflow_celery.domain.backend import BackEnd
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.errors import DecryptionFailed
from leoflow_celery.queueing.dead_letters import DeadLetters
from leoflow_celery.queueing.messages import (
    AdvanceTry,
    AttemptEnded,
    AttemptLaunched,
    Launch,
    Message,
    Present,
    StagingDeleted,
    Stop,
    open_message,
    seal_message,
)
from leoflow_celery.security import KeyRing
from leoflow_celery.store.attempts import FinishCondition
from tests.integration.tasks.back_ends import SETTINGS, BackEnds, name_of
from tests.support.redis_server import RedisServer
from tests.support.system import System
from tests.support.waiting import wait_until

QUEUES = ("k8s", "docker", "docker.h1", "results")
STEPS = ("", "\x06\x163", "\x06\x166", "\x06\x169")
TASKS_OF = {
    "k8s": ("leoflow.execute.kubernetes", "leoflow.stop.kubernetes", "leoflow.reconcile.kubernetes"),
    "docker": ("leoflow.execute.docker", "leoflow.stop.docker", "leoflow.reconcile.docker", "leoflow.staging.docker"),
    "results": (
        *("leoflow.results.record", "leoflow.results.present", "leoflow.results.staging_deleted"),
        "leoflow.results.advance",
    ),
}


@pytest.fixture
def back_ends(tmp_path: Path, redis_server: RedisServer) -> Iterator[BackEnds]:
    with System(tmp_path, redis_server.url(), **SETTINGS) as system:
        yield BackEnds(system)


def lists_of(queue: str) -> list[str]:
    return [f"leoflow:{queue}{step}" for step in STEPS]


def waiting(back_ends: BackEnds) -> list[dict[str, Any]]:
    """Every message that lies in Redis now."""
    names = [name for queue in (*QUEUES, "inline", "subprocess") for name in lists_of(queue)]
    return [json.loads(item) for name in names for item in back_ends.redis.lrange(name, 0, -1)]


def sealed_in(message: dict[str, Any]) -> str:
    _, kwargs, _ = json.loads(base64.b64decode(message["body"]))
    return str(kwargs["sealed"])


def send(back_ends: BackEnds, task: str, queue: str, celery_id: str = "", **kwargs: Any) -> None:
    back_ends.client.app.send_task(
        task, kwargs=kwargs, queue=queue, task_id=celery_id or str(uuid.uuid4()), ignore_result=True
    )


def wait_until_served(back_ends: BackEnds) -> None:
    def depth() -> int:
        return sum(back_ends.client.services.queues.depth(queue) for queue in QUEUES)

    wait_until(lambda: depth() == 0 and back_ends.client.services.launch_notes.waiting() == 0, 120, depth)


def rows(handles: list[Handle]) -> list[dict[str, Any]]:
    """What SQL says of each try, but for when its message was sent and when it was read."""
    views = [handle.task_instance() for handle in handles]
    return [
        {name: getattr(view, name) for name in view.__slots__ if name not in ("sent_at", "read_at")} for view in views
    ]


def victims(back_ends: BackEnds) -> dict[str, Handle]:
    """Three of both executors; they are queued until ``bring_into_their_states``."""
    return {
        f"{state}-{executor}": back_ends.submit(executor, f"{state}-{executor}")
        for executor in ("kubernetes", "docker")
        for state in ("launched", "claimed", "ended")
    }


def bring_into_their_states(back_ends: BackEnds, found: dict[str, Handle]) -> None:
    for handle in found.values():
        back_ends.wait_until_launched(handle)
    attempts = back_ends.store.attempts
    for name, handle in found.items():
        if not name.startswith("launched"):
            attempts.claim(handle.attempt, f"holder-of-{name}", "host", 3600)
        if name.startswith("ended"):
            attempts.start(handle.attempt, f"holder-of-{name}")
            attempts.finish(
                handle.attempt,
                Outcome.failed(FailureReason.NON_ZERO_EXIT, "3", 3),
                FinishCondition(f"holder-of-{name}"),
            )


def test_a_forger_without_a_key_changes_nothing(back_ends: BackEnds) -> None:
    """Every message and note of the system, again, with every other seal, under every task, and bare."""
    known = victims(back_ends)
    seals = [sealed_in(message) for message in waiting(back_ends)]
    assert len(seals) == len(known)
    control = back_ends.system.start_worker("workers.control")
    back_ends.start("k8s")
    back_ends.start("docker", "h1")
    back_ends.wait_until_present("kubernetes", "docker:h1")
    bring_into_their_states(back_ends, known)
    cancelled = back_ends.submit("kubernetes", "cancelled")
    back_ends.wait_until_launched(cancelled)
    # What only workers say is caught while nobody takes it.
    for process in back_ends.system.processes:
        process.send_signal(signal.SIGSTOP)
    assert cancelled.cancel()
    back_ends.client.publisher.advance_try(known["ended-docker"].attempt.task_instance_id, 1)
    back_ends.client.publisher.present(Present(BackEnd.parse("docker:h1")), 60)
    seals += [sealed_in(message) for message in waiting(back_ends)]
    for process in back_ends.system.processes:
        process.send_signal(signal.SIGCONT)
    for handle in (*known.values(), cancelled):
        report = LaunchReport(handle.attempt, "pod", "elsewhere", "kubernetes")
        seals.append(seal_message(back_ends.client.services.keys, "k8s", AttemptLaunched(report)))
    wait_until_served(back_ends)
    before, calls = rows(list(known.values())), back_ends.calls("cancel")

    ids = [handle.id for handle in known.values()]
    for queue, task in ((queue, task) for queue, tasks in TASKS_OF.items() for task in tasks):
        speakers: tuple[str, ...] = ("k8s", "docker", "control") if queue == "results" else ("",)
        for number, (sealed, speaker) in enumerate(itertools.product([*altered(seals)], speakers)):
            told = {"speaker": speaker} if speaker else {}
            send(back_ends, task, queue, ids[number % len(ids)] if number % 7 == 0 else "", sealed=sealed, **told)
    attempt = known["claimed-kubernetes"].attempt.to_json()
    outcome = Outcome.success().to_json()
    for bare in ({"attempt": attempt, "sealed": "x"}, {"attempt": attempt, "outcome": outcome}, {"back_end": "docker"}):
        send(back_ends, "leoflow.results.record", "results", **bare)
        send(back_ends, "leoflow.results.present", "results", **bare)
    for number, (sealed, handle) in enumerate(itertools.product(seals, known.values())):
        scope = ("k8s", "docker", "control", "request", "nobody")[number % 5]
        back_ends.redis.hset("leoflow:launched", str(handle.attempt), f"{scope} {sealed}")
    wait_until_served(back_ends)

    assert rows(list(known.values())) == before
    touched = {details["name"] for _, details in back_ends.calls("cancel")[len(calls) :]}
    assert touched <= {name_of(cancelled)}, "a stop that was sent may be sent again; it is of nobody else"
    assert back_ends.present() == ["docker:h1", "kubernetes"]
    assert control.returncode is None
    assert back_ends.system.output().count("message.refused") > len(seals), "they were read, and not believed"
    good = back_ends.submit("kubernetes", "good")
    back_ends.wait_until_launched(good)


def altered(seals: list[str]) -> Iterator[str]:
    """Each seal as it is, cut, with one letter changed, and with the end of another."""
    for one, other in zip(seals, [*seals[1:], seals[0]], strict=True):
        middle = len(one) // 2
        yield from (one, one[:middle], one[:middle] + ("A" if one[middle] != "A" else "B") + one[middle + 1 :])
        yield one[:middle] + other[middle:]
    yield from ("", "x", "gAAAAA")


def test_a_launch_worker_with_the_key_of_docker_speaks_for_docker_only(back_ends: BackEnds) -> None:
    """It opens nothing of another queue, and what it says of pods, or of another host's containers, is not believed."""
    known = victims(back_ends)
    secret = sealed_in(next(one for one in waiting(back_ends) if one["headers"]["task"].endswith("kubernetes")))
    master = back_ends.client.services.keys
    stolen = KeyRing(",".join(f"docker:{key}" for key in master.keys("docker")))
    with pytest.raises(DecryptionFailed):
        open_message(stolen, "docker", Launch, secret)
    back_ends.system.start_worker("workers.control")
    back_ends.start("k8s")
    back_ends.start("docker", "h1")
    back_ends.wait_until_present("kubernetes", "docker:h1")
    bring_into_their_states(back_ends, known)
    wait_until_served(back_ends)
    before = rows(list(known.values()))

    for handle in known.values():
        for host, unclaimed in itertools.product(("", "h2", "../k8s"), (True, False)):
            for end in (Outcome.success(), Outcome.failed(FailureReason.EVICTED, "gone")):
                tell(
                    back_ends, stolen, "leoflow.results.record", AttemptEnded(handle.attempt, end, unclaimed, "1", host)
                )
        for back_end in ("kubernetes", "docker:h2", "subprocess", "inline"):
            report = LaunchReport(handle.attempt, "stolen", "stolen", back_end)
            note = f"docker {seal_message(stolen, 'docker', AttemptLaunched(report))}"
            back_ends.redis.hset("leoflow:launched", str(handle.attempt), note)
            wait_until(lambda: back_ends.client.services.launch_notes.waiting() == 0, 60, "the note to be collected")
    tell(back_ends, stolen, "leoflow.results.present", Present(BackEnd.parse("kubernetes")))
    tell(back_ends, stolen, "leoflow.results.staging_deleted", StagingDeleted(BackEnd.parse("kubernetes"), {"c": "x"}))
    tell(back_ends, stolen, "leoflow.results.advance", AdvanceTry(known["ended-docker"].attempt.task_instance_id, 1))
    stop = seal_message(stolen, "docker", Stop(name_of(known["claimed-kubernetes"]), 0))
    send(back_ends, "leoflow.stop.kubernetes", "k8s", sealed=stop)
    wait_until_served(back_ends)

    assert rows(list(known.values())) == before
    assert back_ends.calls("cancel") == []


def tell(back_ends: BackEnds, keys: KeyRing, task: str, message: Message) -> None:
    for speaker in ("docker", "k8s", "control"):
        send(back_ends, task, "results", speaker=speaker, sealed=seal_message(keys, "docker", message))


def test_what_has_the_wrong_form_keeps_nobody_else_s_word_waiting(back_ends: BackEnds) -> None:
    """Of a forger without a key, and of a launch worker with the key of docker: neither ends or blocks a collector."""
    stolen = KeyRing(",".join(f"docker:{key}" for key in back_ends.client.services.keys.keys("docker")))
    control = back_ends.system.start_worker("workers.control")
    back_ends.start("k8s")
    for number, fact in enumerate(MISSHAPEN):
        back_ends.redis.hset("leoflow:launched", f"odd{number}", f"docker {misshapen(stolen, 'launched', fact)}")
        send(back_ends, "leoflow.results.record", "results", speaker="docker", sealed=misshapen(stolen, "ended", fact))
    back_ends.redis.hset("leoflow:unacked", "deep", "[" * 100_000)
    back_ends.redis.hset("leoflow:launched", "large", b"x" * 20_000_000)
    back_ends.redis.hset("leoflow:launched", b"\xff" * 100_000, b"x")
    for odd in ([], {}, None, 1, datetime.now(UTC), Decimal(1), b"x", uuid.uuid4()):
        send(back_ends, "leoflow.results.record", "results", speaker="docker", sealed=odd)
        send(back_ends, "leoflow.results.record", "results", speaker=odd, sealed="x")
        send(back_ends, "leoflow.stop.kubernetes", "k8s", sealed=odd)
    back_ends.wait_until_launched(back_ends.submit("kubernetes", "good"))
    wait_until_served(back_ends)
    letters = DeadLetters(back_ends.system.settings, back_ends.redis).all()
    assert len(letters) == 2 * len(MISSHAPEN) + 2 + 3 * 8
    assert {letter.kind for letter in letters} == {"not_believed"}
    assert max(letter.size_bytes for letter in letters) == 20_000_000

    back_ends.redis.set("leoflow:launched", "no hash")
    back_ends.wait_until_launched(back_ends.submit("kubernetes", "after"))
    assert len(back_ends.redis.keys("leoflow:launched.set-aside.*")) == 1
    assert control.returncode is None
    assert "Traceback" not in back_ends.system.output()


#: What no column, no clock and no number takes, in a fact that is sealed as it must be.
MISSHAPEN: list[dict[str, Any]] = [
    {"attempt": {"task_instance_id": "a", "try_number": float("inf")}},
    {"attempt": {"task_instance_id": "a", "try_number": 10**30}},
    {"attempt": {"task_instance_id": "a", "try_number": 1, "launch": 0}},
    {"attempt": {"task_instance_id": "a\0", "try_number": 1}},
    {"attempt": {"task_instance_id": "\ud800", "try_number": 1}},
    {"attempt": {"task_instance_id": "a" * 600, "try_number": 1}},
    {"attempt": {"task_instance_id": ["a"], "try_number": 1}},
    {"external_name": "\0", "host": "\0"},
    {"hostname": "a" * 300, "host": "a" * 300},
    {"back_end": "docker:\ud800", "host": "\ud800"},
    {"at": 10**400},
    {"back_end": {}, "outcome": {"state": "running"}},
]


def misshapen(keys: KeyRing, purpose: str, fact: dict[str, Any]) -> str:
    message = {
        "attempt": {"task_instance_id": "a", "try_number": 1},
        "external_name": "a",
        "hostname": "a",
        "back_end": "docker:a",
        "host": "a",
        "outcome": Outcome.success().to_json(),
        "unclaimed": False,
        "return_value": None,
        **fact,
    }
    return keys.sealer("docker").seal({"purpose": purpose, "at": time.time(), "message": message} | fact)


def test_what_does_harm_when_it_is_sent_again_is_believed_for_minutes_only(back_ends: BackEnds) -> None:
    keys = back_ends.client.services.keys
    for age in (605, -605, float("nan")):
        content = {"purpose": "present", "at": time.time() - age, "message": {"back_end": "docker:h1"}}
        sealed = keys.sealer("docker").seal(content)
        with pytest.raises(DecryptionFailed, match="s old, 600 s are allowed"):
            open_message(keys, "docker", Present, sealed)
