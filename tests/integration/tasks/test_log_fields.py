"""What real processes print: the cause stands beside the event."""

from __future__ import annotations

from pathlib import Path

from tests.support.redis_server import RedisServer
from tests.support.system import System


def test_beat_says_why(tmp_path: Path, redis_server: RedisServer) -> None:
    file = tmp_path / "missing/alive"
    with System(tmp_path, redis_server.url(), HEALTH_FILE=file, MAINTENANCE_INTERVAL_SECONDS=1) as system:
        beat = system.start_beat()
        beat.wait_for_line(rf'health\.not_touched file={file} error=".*No such file', 60)


def test_worker_and_gateway_say_why(tmp_path: Path, redis_server: RedisServer) -> None:
    with System(tmp_path, redis_server.url(), DOCKER_URL=f"unix://{tmp_path}/no-engine.sock") as system:
        worker = system.start_worker("workers.docker")
        fields = r'executor=docker error="the Docker Engine does not answer: .*No such file'
        worker.wait_for_line(rf"^\[.*: WARNING/MainProcess\] backend\.not_announced {fields}", 60)

        gateway = system.start_gateway()
        address = system.env["LEOFLOW_GATEWAY_LISTEN"]
        gateway.wait_for_line(rf"^\[.*: INFO/MainProcess\] gateway\.listening address={address}$", 60)
