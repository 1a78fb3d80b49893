"""Dead letters in a real Redis, by hand and by command; and attempts that could not be launched."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import redis
from cryptography.fernet import Fernet

from leoflow_celery import metrics
from leoflow_celery.cli import main
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import BrokerUnavailable, DecryptionFailed, InvalidRequest, NotFound
from leoflow_celery.queueing.dead_letters import GIVEN_UP, DeadLetter, DeadLetters
from leoflow_celery.queueing.messages import open_request
from leoflow_celery.settings import Settings
from tests.support.poison import CANARY, envelope, raw
from tests.support.redis_server import RedisServer
from tests.support.system import System, environment
from tests.support.waiting import wait_until

Run = Callable[..., str]


@pytest.fixture
def system(tmp_path: Path, shared_redis: RedisServer) -> Iterator[System]:
    overrides = {
        "BROKER_DEAD_LETTERS": 5,
        "BROKER_DEAD_LETTER_MAX_BYTES": 2_000,
        "MAINTENANCE_QUEUED_TIMEOUT_SECONDS": 0.2,
        "MAINTENANCE_LOST_MESSAGE_SECONDS": 0.2,
        "MAINTENANCE_MAX_RELAUNCHES": 0,
        "EXECUTOR_TYPE": "docker",
    }
    with System(tmp_path, shared_redis.url(), **overrides) as made:
        yield made


@pytest.fixture
def letters(system: System) -> Iterator[DeadLetters]:
    made = DeadLetters(system.settings)
    yield made
    made.close()


@pytest.fixture
def leoflow(system: System, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """The command line of this system, in this process: what it printed, both streams."""

    def run(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["leoflow", "dead-letters", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert int(ended.value.code or 0) == code, printed
        return printed.out + printed.err

    with environment({**system.env, "COLUMNS": "240"}):
        yield run


def letter(number: int = 0, message: bytes = b"", queue: str = "dispatch", **fields: Any) -> DeadLetter:
    return DeadLetter(f"id{number}", queue, "body", "body: is wrong", time.time(), size_bytes=len(message), **fields)


def kept(letters: DeadLetters, number: int = 0) -> tuple[DeadLetter, bytes]:
    message = raw(envelope("leoflow.dispatch", [{"env": CANARY}]))
    return letters.keep(letter(number, message, task="leoflow.dispatch"), message), message


def test_the_list_is_bounded_and_what_goes_is_counted(letters: DeadLetters) -> None:
    def dropped() -> float:
        text = metrics.exposition().decode()
        return sum(float(line.split()[1]) for line in text.splitlines() if line.startswith("leoflow_dead_letters_drop"))

    before = dropped()
    for number in range(8):
        kept(letters, number)
    assert [one.id for one in letters.all()] == ["id7", "id6", "id5", "id4", "id3"]
    assert dropped() - before == 3
    with pytest.raises(NotFound):
        letters.get("id0")


def test_a_letter_is_kept_once_whoever_keeps_it_again(letters: DeadLetters) -> None:
    kept(letters)
    kept(letters)
    assert letters.count() == len(letters.all()) == 1


def test_of_two_who_send_again_one_does_and_the_message_is_as_it_was(letters: DeadLetters, system: System) -> None:
    found, message = kept(letters)
    letters.send_again(found)
    with pytest.raises(NotFound):
        letters.send_again(found)
    assert system.redis.lrange("leoflow:dispatch", 0, -1) == [message]
    assert letters.all() == []


def test_two_at_the_same_moment_send_it_once(letters: DeadLetters, system: System) -> None:
    found, message = kept(letters)
    opened = letters.message(found)
    for _ in range(2):
        try:
            letters._take(found.id, ["leoflow:dispatch"], opened)
        except NotFound:
            continue
    assert system.redis.lrange("leoflow:dispatch", 0, -1) == [message]


def test_a_message_that_is_too_large_is_kept_as_its_beginning_and_not_sent_again(letters: DeadLetters) -> None:
    message = b"x" * 10_000
    found = letters.keep(letter(message=message), message)
    assert (found.kept_bytes, found.is_whole) == (2_000, False)
    assert letters.message(found) == b"x" * 2_000
    with pytest.raises(InvalidRequest, match="2000 of its 10000 bytes are kept"):
        letters.send_again(found)


def test_nobody_makes_a_letter_say_something_else(letters: DeadLetters, system: System) -> None:
    """Who can write to Redis changes what is not sealed: the queue, or whose message it is."""
    client: redis.Redis[bytes] = system.redis
    first, _ = kept(letters, 1)
    second, _ = kept(letters, 2)
    moved = replace(first, queue="maintenance")
    client.hset("leoflow:dead-letters:entries", first.id, json.dumps(asdict(moved)))
    with pytest.raises(DecryptionFailed, match="belongs to another letter or queue"):
        letters.send_again(letters.get(first.id))
    swapped = client.hget("leoflow:dead-letters:raw", first.id)
    assert swapped is not None
    client.hset("leoflow:dead-letters:raw", second.id, swapped)
    with pytest.raises(DecryptionFailed, match="belongs to another letter or queue"):
        letters.send_again(second)
    assert client.llen("leoflow:dispatch") == client.llen("leoflow:maintenance") == 0


def test_garbage_among_the_letters_is_passed_over(letters: DeadLetters, system: System) -> None:
    found, _ = kept(letters)
    garbage: list[bytes] = [b"not json", b"[]", b'{"id": 3}', b"[" * 100_000]
    garbage += [raw({**asdict(found), "at": at}) for at in ("x", float("inf"), float("nan"), -1, 10**400, 10**12)]
    for number, text in enumerate(garbage):
        system.redis.lpush("leoflow:dead-letters", f"g{number}")
        system.redis.hset("leoflow:dead-letters:entries", f"g{number}", text)
    assert [one.id for one in letters.all()] == [found.id]
    with pytest.raises(NotFound):
        letters.get("g0")


def test_a_key_of_another_type_takes_no_letter(letters: DeadLetters, system: System) -> None:
    names = ("dead-letters", "dead-letters:entries", "dead-letters:raw")
    for name in names:
        system.redis.set(f"leoflow:{name}", "x")
    found, message = kept(letters)
    assert letters.all() == [found]
    assert all(len(system.redis.keys(f"leoflow:{name}.set-aside.*")) == 1 for name in names)
    system.redis.set("leoflow:dispatch", "no queue")
    with pytest.raises(BrokerUnavailable):
        letters.send_again(found)
    assert letters.message(letters.get(found.id)) == message
    system.redis.delete("leoflow:dispatch")
    letters.send_again(found)
    assert system.redis.lrange("leoflow:dispatch", 0, -1) == [message]
    assert letters.all() == []


def test_without_keys_the_letter_is_kept_and_the_message_is_not(system: System) -> None:
    keyless = DeadLetters(system.load_settings(SEAL_KEYS=""))
    found, _ = kept(keyless)
    assert found.kept_bytes == 0
    with pytest.raises(NotFound, match="nothing is kept"):
        keyless.message(found)
    keyless.close()


# -- commands -------------------------------------------------------------------------------------------------------


def test_list_and_show_tell_what_is_known_and_nothing_secret(leoflow: Run, letters: DeadLetters) -> None:
    assert "0 dead letters" in leoflow("list")
    found, message = kept(letters)
    listed = json.loads(leoflow("list", "--json"))
    assert [(one["id"], one["queue"], one["kind"]) for one in listed] == [(found.id, "dispatch", "body")]
    assert found.id in leoflow("list")
    shown = leoflow("show", found.id) + leoflow("show", found.id, "--json")
    assert "body: is wrong" in shown
    assert "leoflow.dispatch" in shown
    assert CANARY not in shown
    assert leoflow("show", found.id, "--body").strip() == message.decode()


def test_a_forged_letter_commands_no_terminal(leoflow: Run, letters: DeadLetters) -> None:
    letters.keep(letter(task="\x1b]0;title\x07\nforged", celery_id="\u202e"))
    printed = leoflow("list") + leoflow("show", "id0")
    assert "\x1b" not in printed
    assert "\u202e" not in printed
    assert not any(line.startswith("forged") for line in printed.splitlines())


def test_resend_and_drop(leoflow: Run, letters: DeadLetters, system: System) -> None:
    for number in range(4):
        kept(letters, number)
    assert "sent again to queue 'dispatch'" in leoflow("resend", "id0")
    assert system.redis.llen("leoflow:dispatch") == 1
    assert "there is no dead letter 'id0'" in leoflow("resend", "id0", code=2)
    assert "dropped id1" in leoflow("drop", "id1")
    leoflow("drop", code=2)
    assert "dropped 2 dead letters" in leoflow("drop", "--all")
    assert letters.all() == []
    assert not system.redis.exists("leoflow:dead-letters:raw")


def test_the_body_is_shown_to_who_has_the_keys_only(
    leoflow: Run, letters: DeadLetters, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = kept(letters)
    monkeypatch.setenv("LEOFLOW_SEAL_KEYS", Fernet.generate_key().decode())
    assert "LEOFLOW_SEAL_KEYS" in leoflow("show", found.id, "--body", code=2)
    assert found.id in leoflow("show", found.id)


# -- attempts that could not be launched ----------------------------------------------------------------------------


def test_an_attempt_that_was_never_launched_is_a_letter_and_is_sent_again_as_the_next_try(
    leoflow: Run, letters: DeadLetters, system: System
) -> None:
    client = system.client
    system.start_worker("workers.control")
    request = {
        "task_instance_id": "waits",
        "dag_id": "d",
        "run_id": "r",
        "task_id": "t",
        "operator": "bash",
        "entrypoint": "true",
        "env": {"SECRET": CANARY},
    }
    handle = client.submit(request)

    def given_up() -> bool:
        system.maintain("reap")
        return handle.state() is TaskState.FAILED

    wait_until(given_up, 60, "the reaper", interval=0.5)
    [found] = wait_until(letters.all, 20, "the letter")
    assert (found.kind, found.queue, found.task_instance_id, found.try_number) == (GIVEN_UP, "docker", "waits", 1)
    assert found.sentence.startswith("queued_timeout: ")
    assert CANARY not in str(found)

    assert "submitted d.t again as try 2; try 1 stays failed" in leoflow("resend", found.id)
    assert letters.all() == []
    assert [client.task_instance("waits", number).state for number in (1, 2)] == [TaskState.FAILED, TaskState.QUEUED]
    assert open_request(client.services.keys, client.task_instance("waits", 2).sealed_request).env == {"SECRET": CANARY}
    letters.keep(found)
    assert "is at try 2" in leoflow("resend", found.id, code=2)


def test_doctor_mentions_them(system: System, letters: DeadLetters) -> None:
    from leoflow_celery.cli.doctor import check_broker

    settings: Settings = system.settings
    assert "there are no dead letters" in check_broker(settings).sentence
    kept(letters)
    assert "dead letters: 1, look at 'leoflow dead-letters list'" in check_broker(settings).sentence
