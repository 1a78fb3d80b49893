"""Marks of Redis: a lost second is found once, and opens what was told in it."""

from __future__ import annotations

from leoflow_celery.domain.attempt import celery_task_id
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.store import Store
from leoflow_celery.store.redis_marks import Mark, SaidAgain
from tests.contract.store.rows import race, submit
from tests.support.waiting import wait_until


def finished(store: Store, task_instance_id: str, try_number: int = 1) -> str:
    store.attempts.finish(submit(store, task_instance_id, try_number=try_number), Outcome.success())
    return celery_task_id(task_instance_id, try_number)


def told(store: Store, task_instance_id: str, try_number: int = 1) -> str:
    name = finished(store, task_instance_id, try_number)
    store.completions.done(store.completions.take(60, task_instance_id, try_number))
    return name


def due(store: Store) -> set[str]:
    return {item.celery_task_id for item in store.completions.take(60)}


def say_again(store: Store, known: Mark, found: Mark, limit: int = 100) -> SaidAgain | None:
    return store.redis_marks.say_again("broker", known, found, longest_seconds=600, limit=limit)


def test_a_mark_grows_and_never_shrinks_and_a_stranger_writes_none(store: Store) -> None:
    assert store.redis_marks.read("broker")[0] is None
    for mark in (Mark("a", 5.0), Mark("a", 7.0), Mark("a", 6.0), Mark("b", 9.0)):
        store.redis_marks.write("broker", mark)
    assert store.redis_marks.read("broker")[0] == Mark("a", 7.0)
    assert store.redis_marks.read("results")[0] is None


def test_what_was_told_since_the_mark_is_due_again_and_nothing_older(store: Store) -> None:
    told(store, "old")
    told_at = store.now()
    wait_until(lambda: store.now() > told_at)  # a database may count milliseconds
    _, at = store.redis_marks.read("broker")
    new, in_flight = told(store, "new"), finished(store, "flying")
    [flying] = store.completions.take(60, "flying", 1)
    known, found = Mark("a", at + 1), Mark("b", at)
    store.redis_marks.write("broker", known)
    said = say_again(store, known, found)
    assert said is not None
    assert (said.completions, said.is_capped) == (1, False)
    store.completions.done([flying])  # told to the server that has forgotten it
    assert due(store) == {new, in_flight}
    assert store.redis_marks.read("broker")[0] == found


def test_of_several_workers_that_find_it_out_one_opens_it(store: Store) -> None:
    told(store, "a")
    known = Mark("a", store.now())
    store.redis_marks.write("broker", known)
    said = race(8, lambda _: say_again(store, known, Mark("b", 0.0)))
    assert not [one for one in said if isinstance(one, Exception)]
    assert len([one for one in said if one is not None]) == 1


def test_an_empty_redis_is_told_the_newest_up_to_a_limit(store: Store) -> None:
    names = [told(store, f"ti-{number}") for number in range(4)]
    known = Mark("a", store.now())
    store.redis_marks.write("broker", known)
    said = say_again(store, known, Mark("a", 0.0), limit=2)
    assert said is not None
    assert (said.completions, said.is_capped) == (2, True)
    assert len(again := due(store)) == 2
    assert again <= set(names)


def test_messages_that_nobody_had_taken_are_sent_again(store: Store) -> None:
    since = store.now()
    waiting, claimed = submit(store, "waiting"), submit(store, "claimed")
    store.submissions.mark_sent([waiting, claimed])
    store.attempts.claim(claimed, "h", "host", 60)
    known = Mark("a", since)
    store.redis_marks.write("broker", known)
    said = say_again(store, known, Mark("b", since))
    assert said is not None
    assert said.tries == 1
    assert [view.task_instance_id for view in store.submissions.unsent(0)] == ["waiting"]
    store.submissions.mark_sent([waiting])  # by a submit that was under way
    assert store.redis_marks.send_again(said.since, said.detected_at + 5) == 1


def test_a_success_whose_value_was_replaced_is_not_told_again(store: Store) -> None:
    since = store.now()
    told(store, "a")
    second = told(store, "a", 2)
    known = Mark("a", since)
    store.redis_marks.write("broker", known)
    assert say_again(store, known, Mark("b", since)) is not None
    assert due(store) == {second}
