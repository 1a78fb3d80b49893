"""The mark of a Redis whose ACL forbids INFO: the mark alone tells that it went back."""

from __future__ import annotations

from pathlib import Path

import pytest

from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.tasks.redis_marks import Marker
from tests.integration.tasks.test_results import waiting_pod
from tests.support.redis_server import SERVERS, RedisServer
from tests.support.system import System

RULES = ("on", ">secret", "~leoflow:mark", "+get", "+set", "+eval", "+evalsha", "+script|load", "+select")


@pytest.mark.parametrize("redis_server", SERVERS, indirect=True)
@pytest.mark.parametrize("allowed", [RULES, (*RULES, "+info")], ids=["without INFO", "with INFO"])
def test_a_mark_that_is_gone_is_found_out(tmp_path: Path, redis_server: RedisServer, allowed: tuple[str, ...]) -> None:
    with System(tmp_path, redis_server.url()) as system:
        system.redis.execute_command("ACL", "SETUSER", "marker", *allowed)
        services, app = system.client.services, system.client.app
        url = system.broker_url.replace("redis://", "redis://marker:secret@")
        marker = Marker(app, services, "broker", services.settings.broker.model_copy(update={"url": url}))
        handle = waiting_pod(system.client)
        services.store.attempts.finish(handle.attempt, Outcome.success())
        services.store.completions.done(services.store.completions.take(60))
        assert [marker(), marker()] == [None, None]
        known, _ = services.store.redis_marks.read("broker")
        assert known is not None
        assert bool(known.identity) is ("+info" in allowed)

        system.redis.delete("leoflow:mark")
        said = marker()
        assert said is not None
        assert (said.completions, said.tries) == (1, 0)
        assert [item.celery_task_id for item in services.store.completions.take(60)] == [handle.id]
        assert marker() is None
        assert system.redis.exists("leoflow:mark")
        marker.close()
