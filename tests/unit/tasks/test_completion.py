"""Completing several ids: one that cannot be completed holds nobody up, a broker that is away stops at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from leoflow_celery.store.completions import Waiting
from leoflow_celery.tasks import completion


class Completions:
    def __init__(self, *names: str) -> None:
        self.names, self.finished, self.put_off = names, [], []

    def take(self, *_: object) -> list[Waiting]:
        return [Waiting(name, "ti", 1, {}, None) for name in self.names]

    def failed(self, waiting: Waiting) -> float:
        self.put_off.append(waiting.celery_task_id)
        return 30

    def done(self, names: list[str]) -> None:
        self.finished += names


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Completions:
    return Completions("a", "b", "c")


def run(monkeypatch: pytest.MonkeyPatch, store: Completions, error: Exception) -> int:
    def complete(app: Any, item: Waiting, ended: Any) -> None:
        if item.celery_task_id == "b":
            raise error

    monkeypatch.setattr(completion, "complete", complete)
    monkeypatch.setattr(completion, "_read", lambda *_: None)
    runtime: Any = SimpleNamespace(store=SimpleNamespace(completions=store))
    return completion.complete_due(SimpleNamespace(), runtime)


def test_one_that_cannot_be_completed_holds_nobody_up(monkeypatch, store):
    assert run(monkeypatch, store, KeyError("task")) == 2
    assert store.finished == ["a", "c"]
    assert store.put_off == ["b"]


def test_a_backend_that_is_away_stops_the_round_and_keeps_what_is_done(monkeypatch, store):
    with pytest.raises(RedisConnectionError):
        run(monkeypatch, store, RedisConnectionError("away"))
    assert (store.finished, store.put_off) == (["a"], [])
