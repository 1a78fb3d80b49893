"""A defect of the inline worker itself, which shows when the call was made already."""

from __future__ import annotations

from pathlib import Path

import pytest

from leoflow_celery.errors import TaskFailed
from tests.support.http_target import HttpTarget
from tests.support.redis_server import RedisServer
from tests.support.system import System, http_task


def test_a_call_that_was_made_is_not_made_again_by_us(
    tmp_path: Path, redis_server: RedisServer, target: HttpTarget
) -> None:
    with System(tmp_path, redis_server.url()) as system:
        system.start_workers("tests.integration.tasks.defective_inline", "workers.control")
        handle = system.client.submit(http_task(target.url("a")))
        with pytest.raises(TaskFailed, match="the inline worker failed: RuntimeError "):
            handle.get(timeout=30)
        view = handle.task_instance()
        assert (str(view.reason), view.launch, target.calls["a"]) == ("http_error", 1, 1)
