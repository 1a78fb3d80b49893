"""The health file: as young as the process's last word with the broker, so that its age tells a supervisor."""

from __future__ import annotations

from pathlib import Path

from tests.support.redis_server import RedisServer
from tests.support.system import System
from tests.support.waiting import wait_until


def test_a_workers_file_grows_old_while_the_broker_is_away(tmp_path: Path, redis_server: RedisServer) -> None:
    alive = tmp_path / "alive"
    with System(tmp_path, redis_server.url(), HEALTH_FILE=alive) as system:
        worker = system.start_worker("workers.inline")
        wait_until(alive.exists, 30, "the first heartbeat")
        first = alive.stat().st_mtime
        wait_until(lambda: alive.stat().st_mtime > first, 30, "another heartbeat")

        redis_server.kill()
        worker.wait_for_line(r"Trying again in 2", 60)
        away = alive.stat().st_mtime
        worker.wait_for_line(r"Trying again in 4", 60)
        assert alive.stat().st_mtime == away
        redis_server.start()
        wait_until(lambda: alive.stat().st_mtime > away, 60, "a heartbeat after the outage")


def test_beat_touches_the_file_with_what_it_sends(tmp_path: Path, redis_url: str) -> None:
    alive = tmp_path / "alive"
    with System(tmp_path, redis_url, HEALTH_FILE=alive, MAINTENANCE_INTERVAL_SECONDS=1) as system:
        system.start_beat()
        wait_until(alive.exists, 30, "the first message")
        first = alive.stat().st_mtime
        wait_until(lambda: alive.stat().st_mtime > first, 30, "another message")
        assert system.client.services.queues.depth("maintenance")
