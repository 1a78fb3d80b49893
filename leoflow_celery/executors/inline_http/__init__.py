"""http_api tasks: one HTTP call with retries, a total deadline and guarded addresses. Knows no SQL and no Celery."""

from leoflow_celery.executors.inline_http.errors import HttpTaskError
from leoflow_celery.executors.inline_http.executor import InlineHttpExecutor
from leoflow_celery.executors.inline_http.result import HttpResult

__all__ = ["HttpResult", "HttpTaskError", "InlineHttpExecutor"]
