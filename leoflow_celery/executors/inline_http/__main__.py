"""One HTTP call for an agent: ``python -m leoflow_celery.executors.inline_http``.

The request is ``LEOFLOW_HTTP_REQUEST_JSON``, or the file ``LEOFLOW_HTTP_REQUEST_PATH`` (an environment string ends at
128 KiB). ``LEOFLOW_TASK_INSTANCE_ID`` and ``LEOFLOW_TRY_NUMBER`` (1) give the Idempotency-Key.
``LEOFLOW_TIMEOUT_SECONDS`` is the deadline: a pod is not the control plane, so the inline cap does not apply. The
return value goes to ``LEOFLOW_RETURN_VALUE_PATH``, the reason of a failure to ``LEOFLOW_REASON_PATH``. Exit 0 or 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.reasons import FailureReason, parse_reason
from leoflow_celery.domain.request import HttpRequest, invalid_request
from leoflow_celery.errors import ConfigurationError, XComRejected
from leoflow_celery.executors.inline_http.errors import HttpTaskError
from leoflow_celery.executors.inline_http.executor import InlineHttpExecutor
from leoflow_celery.executors.inline_http.prepare import idempotency_key
from leoflow_celery.settings import InlineSettings

#: The longest timeout_seconds that a request may ask for.
_NO_TIMEOUT_SECONDS = 30 * 24 * 3600


def main(environ: Mapping[str, str]) -> int:
    """Make the call; the exit code is the task's."""
    try:
        summary, value = _call(environ)
    except HttpTaskError as error:
        return _fail(environ, error.reason, str(error))
    except XComRejected as error:
        return _fail(environ, parse_reason(error.reason), str(error))
    except ValidationError as error:
        return _fail(environ, FailureReason.INVALID_SPEC, f"http_request: {invalid_request(error)}")
    except (ConfigurationError, ValueError) as error:
        return _fail(environ, FailureReason.INVALID_SPEC, str(error))
    if value is not None and (path := environ.get("LEOFLOW_RETURN_VALUE_PATH")):
        Path(path).write_bytes(value)
    sys.stdout.write(f"{summary}\n")
    return 0


def _call(environ: Mapping[str, str]) -> tuple[str, bytes | None]:
    request = HttpRequest.model_validate_json(_request_text(environ))
    attempt = AttemptId(environ.get("LEOFLOW_TASK_INSTANCE_ID", ""), int(environ.get("LEOFLOW_TRY_NUMBER") or 1))
    deadline_seconds = float(environ.get("LEOFLOW_TIMEOUT_SECONDS") or 0) or _NO_TIMEOUT_SECONDS
    result = InlineHttpExecutor(InlineSettings()).call(request, idempotency_key(attempt), deadline_seconds)
    return result.summary, result.return_value()


def _request_text(environ: Mapping[str, str]) -> str:
    if path := environ.get("LEOFLOW_HTTP_REQUEST_PATH"):
        try:
            return Path(path).read_text()
        except OSError as error:
            raise ConfigurationError(f"LEOFLOW_HTTP_REQUEST_PATH={path}: {error.strerror}") from error
    try:
        return environ["LEOFLOW_HTTP_REQUEST_JSON"]
    except KeyError:
        raise ConfigurationError("LEOFLOW_HTTP_REQUEST_JSON is not set: there is no request to send") from None


def _fail(environ: Mapping[str, str], reason: FailureReason, message: str) -> int:
    if path := environ.get("LEOFLOW_REASON_PATH"):
        Path(path).write_text(reason.value)
    sys.stderr.write(f"{message}\n")
    return 1


if __name__ == "__main__":
    raise SystemExit(main(os.environ))
