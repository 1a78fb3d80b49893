"""A worker of queue inline with a defect: ``celery -A tests.integration.tasks.defective_inline`` reads no answer."""

from __future__ import annotations

from leoflow_celery.executors.inline_http import HttpResult
from workers.inline import app

__all__ = ["app"]


def _defect(_: HttpResult) -> bytes:
    raise RuntimeError("a defect")


HttpResult.return_value = _defect  # type: ignore[method-assign]
