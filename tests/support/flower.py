"""Flower of a system under test: its API and its pages, as a user with a password sees them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import requests

from tests.support.waiting import wait_until

_ANSWER_SECONDS = 30


@dataclass(frozen=True)
class FlowerSite:
    """One Flower at ``url`` behind basic auth."""

    url: str
    user: str
    password: str

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, auth=(self.user, self.password), timeout=_ANSWER_SECONDS)

    def status_without_password(self, path: str) -> int:
        return requests.get(self.url + path, timeout=_ANSWER_SECONDS).status_code

    def tasks(self) -> dict[str, dict[str, Any]]:
        """All tasks it knows by Celery id."""
        answer = self.get("/api/tasks")
        answer.raise_for_status()
        found: dict[str, dict[str, Any]] = answer.json()
        return found

    def wait_for_state(self, celery_id: str, state: str) -> dict[str, Any]:
        """The task once Flower shows it in a state."""

        def reached() -> dict[str, Any] | None:
            task = self.tasks().get(celery_id)
            return task if task is not None and task["state"] == state else None

        return wait_until(reached, 60, lambda: f"{celery_id} to be {state}: {self.tasks().get(celery_id)}", 0.2)

    def workers(self) -> dict[str, dict[str, Any]]:
        """What each worker answers, by name; empty while none has answered."""
        answer = self.get("/api/workers?refresh=true")
        found: dict[str, dict[str, Any]] = answer.json() if answer.ok else {}
        return found

    def wait_until_up(self) -> None:
        def answers() -> bool:
            try:
                return self.get("/healthcheck").ok
            except requests.ConnectionError:
                return False

        wait_until(answers, 60, f"Flower at {self.url}", 0.2)

    def everything(self) -> Iterator[tuple[str, str]]:
        """Every page and every readable address of the API: path and text."""
        paths = ["/", "/workers", "/workers?json=1", "/tasks", "/broker", "/metrics", "/api/tasks", "/api/task/types"]
        paths += ["/api/workers?refresh=true", "/api/queues/length"]
        paths += [f"/worker/{name}" for name in self.workers()]
        for celery_id in self.tasks():
            paths += [f"/task/{celery_id}", f"/api/task/info/{celery_id}"]
        for path in paths:
            answer = self.get(path)
            assert answer.ok, f"{path}: {answer.status_code} {answer.text[:300]}"
            yield path, answer.text
