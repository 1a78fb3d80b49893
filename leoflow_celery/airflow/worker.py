"""``python -m leoflow_celery.airflow.worker``: runs the one workload that comes on its standard input.

The agent starts it as the user's process and ships its output, one JSON object a line as Airflow's own log has them.
Its exit code is the task's. What ended before any code of the user ran is named in ``LEOFLOW_REASON_PATH``: an API
server that is away is a failure of the infrastructure, and a workload that Airflow refuses is not ours to run.
"""

from __future__ import annotations

import os
import sys
import time
from http import HTTPStatus
from typing import Any

_WAIT_VARIABLE = "LEOFLOW_AIRFLOW_API_WAIT_SECONDS"
_WAIT_SECONDS = 60.0
_LONGEST_PAUSE_SECONDS = 5.0
#: Airflow's answers that mean: this copy is not to run.
_REFUSALS = frozenset({HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT, HTTPStatus.GONE})
_LAUNCH_FAILED, _SKIPPED = "launch_failed", "skipped"


class NotRun(Exception):
    """No code of the user ran. ``reason`` is what the agent reports."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def main() -> int:
    """Run it; the exit code."""
    text = _take_input()
    try:
        return _run(text)
    except NotRun as error:
        _leave_reason(error.reason, str(error))
        sys.stderr.write(f"{error}\n")
        return 0 if error.reason == _SKIPPED else 1


def _take_input() -> bytes:
    """Everything on standard input; what the user's code inherits there is empty, and the token is nowhere else."""
    text = sys.stdin.buffer.read()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return text


def _run(text: bytes) -> int:
    from airflow.executors import workloads
    from airflow.executors.base_executor import BaseExecutor, get_execution_api_server_url
    from airflow.sdk.log import configure_logging
    from airflow.settings import dispose_orm
    from pydantic import TypeAdapter, ValidationError

    dispose_orm(do_log=False)
    configure_logging(output=sys.stdout.buffer, json_output=True)
    adapter: TypeAdapter[Any] = TypeAdapter(workloads.All)
    try:
        workload = adapter.validate_json(text)
    except ValidationError as error:
        what = ", ".join(".".join(map(str, one["loc"])) for one in error.errors(include_input=False))
        raise NotRun("invalid_spec", f"this version of Airflow cannot read the workload: {what}") from None
    if getattr(workload, "log_path", None):
        # Without a file each line goes to our standard output, once.
        workload.log_path = None
    server = get_execution_api_server_url()
    _wait_for(server)
    try:
        return int(BaseExecutor.run_workload(workload, server=server))
    except Exception as error:
        raise _not_run(error) from error


def _wait_for(server: str) -> None:
    """Until the API server answers, whatever it says.

    Raises:
        NotRun: it did not.
    """
    import httpx

    deadline = time.monotonic() + float(os.environ.get(_WAIT_VARIABLE) or _WAIT_SECONDS)
    pause = 0.1
    while True:
        try:
            httpx.get(f"{server.rstrip('/')}/health", timeout=5.0)
        except httpx.TransportError as error:
            if time.monotonic() + pause > deadline:
                raise NotRun(_LAUNCH_FAILED, f"Airflow's API server {server} did not answer: {error}") from error
        else:
            return
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _not_run(error: Exception) -> Exception:
    """What an error of the supervisor means; itself when it is not about the API server."""
    import httpx
    from airflow.sdk.exceptions import TaskAlreadyRunningError

    if isinstance(error, TaskAlreadyRunningError):
        return NotRun(_SKIPPED, "another copy of this task runs already")
    if isinstance(error, httpx.HTTPStatusError):
        status = error.response.status_code
        if status in _REFUSALS:
            return NotRun(_SKIPPED, f"Airflow refused to start this task: {error}")
        return NotRun(_LAUNCH_FAILED, f"Airflow's API server answered {status}: {error}")
    if isinstance(error, httpx.TransportError):
        return NotRun(_LAUNCH_FAILED, f"Airflow's API server went away: {error}")
    return error


def _leave_reason(reason: str, message: str) -> None:
    path = os.environ.get("LEOFLOW_REASON_PATH")
    if path:
        with open(path, "w") as file:
            file.write(f"{reason}\n{message}\n")


if __name__ == "__main__":
    sys.exit(main())
