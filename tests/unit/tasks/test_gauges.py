"""How old the oldest message of a queue is."""

from __future__ import annotations

from leoflow_celery.tasks.gauges import QueueHeads


def test_a_queue_ages_while_the_same_message_is_its_oldest() -> None:
    heads = QueueHeads()
    looks = [("a", 10.0), ("a", 25.0), ("a", 40.0), ("b", 55.0), ("b", 70.0), (None, 85.0), ("b", 100.0)]
    assert [heads.age("results", tag, now) for tag, now in looks] == [0, 15, 30, 0, 15, 0, 0]


def test_queues_age_by_themselves() -> None:
    heads = QueueHeads()
    heads.age("results", "a", 0.0)
    assert heads.age("dispatch", "a", 10.0) == 0
    assert heads.age("results", "a", 10.0) == 10
