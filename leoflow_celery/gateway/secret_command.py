"""The back end that asks a command, as kubectl asks its credential plugins.

The command gets one JSON object on stdin and answers with one on stdout. It has a time limit and an output limit, and
whatever it started ends with it. Its answers are kept as long as it says.
"""

from __future__ import annotations

import json
import logging
import math
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

from leoflow_celery.errors import ConfigurationError
from leoflow_celery.gateway.secret_backends import BackendFailed, Kind, Query
from leoflow_celery.settings import GatewaySettings, environment_for_commands

log = logging.getLogger(__name__)

MAX_OUTPUT_BYTES = 1024 * 1024
_MAX_ERROR_BYTES = 2_000
#: However long the command says.
MAX_TTL_SECONDS = 3_600.0
#: A failure is kept too: a task that asks in a loop starts one process a second.
FAILURE_SECONDS = 1.0
_MAX_KEPT, _MAX_KEPT_BYTES = 4_096, 32 * 1024 * 1024
_POLL_SECONDS = 0.02

_Scope = tuple[Kind, str, str, frozenset[str] | None]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the command said about one scope: values, or why it failed. ``size`` is in bytes."""

    values: Mapping[str, str]
    ttl_seconds: float
    failure: str = ""
    size: int = 0

    def result(self) -> Mapping[str, str]:
        if self.failure:
            raise BackendFailed(self.failure)
        return self.values


class CommandBackend:
    """Asks the command, once at a time for each tenant, DAG and set of names."""

    def __init__(self, settings: GatewaySettings) -> None:
        """Raises:
        ConfigurationError: there is no command, or it cannot be found.
        """
        self._argv = command_line(settings.secret_command)
        self._timeout, self._ttl = settings.secret_command_timeout_seconds, settings.secret_command_ttl_seconds
        self._environment = environment_for_commands()
        self._lock = threading.Lock()
        self._kept: OrderedDict[_Scope, tuple[float, Answer]] = OrderedDict()
        self._kept_bytes = 0
        self._flights: dict[_Scope, Future[Answer]] = {}
        self._closed = threading.Event()

    def get(self, query: Query) -> Mapping[str, str]:
        scope = (query.kind, query.tenant_id, query.dag_id, query.names)
        with self._lock:
            if (kept := self._fresh(scope)) is not None:
                return kept.result()
            flight, leads = self._flights.get(scope), False
            if flight is None:
                flight, leads = self._flights.setdefault(scope, Future()), True
        if leads:
            return self._lead(scope, query, flight).result()
        answer = flight.result()  # ends with the leader, whose time is limited
        # An answer that may not be kept is for the run and task of the leader alone.
        return answer.result() if answer.ttl_seconds > 0 else self._ask(query).result()

    def _lead(self, scope: _Scope, query: Query, flight: Future[Answer]) -> Answer:
        answer = Answer({}, FAILURE_SECONDS, "it was interrupted")
        try:
            answer = self._ask(query)
        finally:
            with self._lock:
                self._keep(scope, answer)
                del self._flights[scope]
            flight.set_result(answer)
        return answer

    def _ask(self, query: Query) -> Answer:
        question = {
            "version": 1,
            "kind": query.kind.value,
            "tenant_id": query.tenant_id,
            "dag_id": query.dag_id,
            "run_id": query.run_id,
            "task_id": query.task_id,
            "names": None if query.names is None else sorted(query.names),
        }
        try:
            ran = run_command(self._argv, json.dumps(question).encode(), self._timeout, self._environment, self._closed)
        except BackendFailed as error:
            return Answer({}, FAILURE_SECONDS, str(error))
        answer = read_answer(ran.output, self._ttl)
        if ran.exit_code != 0:
            state = f"a signal ({-ran.exit_code})" if ran.exit_code < 0 else f"status {ran.exit_code}"
            failure = f"the command ended with {state}"
            said = safe_text(ran.errors, answer.values.values())
            log.warning(
                "secrets.command_failed", extra={"cause": failure, "stderr": said, "tenant_id": query.tenant_id}
            )
            return Answer({}, FAILURE_SECONDS, failure)
        return answer

    def _fresh(self, scope: _Scope) -> Answer | None:
        expires, answer = self._kept.get(scope, (0.0, None))
        if answer is not None and time.monotonic() >= expires:
            self._drop(scope)
            return None
        return answer

    def _keep(self, scope: _Scope, answer: Answer) -> None:
        if answer.ttl_seconds <= 0:
            return
        self._drop(scope)
        self._kept[scope] = (time.monotonic() + answer.ttl_seconds, answer)
        self._kept_bytes += answer.size
        while len(self._kept) > _MAX_KEPT or self._kept_bytes > _MAX_KEPT_BYTES:
            self._drop(next(iter(self._kept)))

    def _drop(self, scope: _Scope) -> None:
        _, answer = self._kept.pop(scope, (0.0, None))
        self._kept_bytes -= answer.size if answer else 0

    def close(self) -> None:
        """End the commands that run."""
        self._closed.set()


def command_line(text: str) -> list[str]:
    """The words of the setting.

    Raises:
        ConfigurationError: it is empty, badly quoted, or names no program.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigurationError(f"LEOFLOW_GATEWAY_SECRET_COMMAND has a quote without an end: {error}") from error
    if not words:
        raise ConfigurationError(
            "LEOFLOW_GATEWAY_SECRET_BACKENDS names 'command'; set LEOFLOW_GATEWAY_SECRET_COMMAND to the command to run"
        )
    program = words[0]
    if ("/" in program and not os.path.isabs(program)) or shutil.which(program) is None:
        raise ConfigurationError(
            f"LEOFLOW_GATEWAY_SECRET_COMMAND: {program!r} is not a program; give its absolute path, or its name if it "
            "is on PATH, and let the gateway's user execute it"
        )
    return words


def read_answer(output: bytes, standard_ttl: float) -> Answer:
    """The command's answer; one that breaks the form is a failure, and no part of it is used or quoted."""
    try:
        data = json.loads(output)
    except (ValueError, RecursionError):
        return Answer({}, FAILURE_SECONDS, "the command's output is not valid JSON")
    values = data.get("values") if isinstance(data, dict) else None
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        return Answer({}, FAILURE_SECONDS, "the command's output has no object 'values' of names and texts")
    ttl = data.get("ttl_seconds", standard_ttl)
    if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not (ttl >= 0 and math.isfinite(ttl)):
        return Answer({}, FAILURE_SECONDS, "the command's 'ttl_seconds' is not a number of seconds, 0 or more")
    return Answer(values, min(float(ttl), MAX_TTL_SECONDS), size=len(output))


def safe_text(said: bytes, secrets: Iterable[str]) -> str:
    """The end of what a command said, for the log: no value that it answered with, no control characters."""
    text = said.decode(errors="replace")
    for secret in sorted((value for value in secrets if value), key=len, reverse=True):
        text = text.replace(secret, "***")
    return "".join(character if character.isprintable() else " " for character in text).strip()


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that ended by itself."""

    exit_code: int
    output: bytes
    errors: bytes


def run_command(
    argv: Sequence[str], document: bytes, timeout: float, environment: Mapping[str, str], closed: threading.Event
) -> Ran:
    """Run a command in a session of its own, and end whatever is left of it.

    Raises:
        BackendFailed: it cannot be started, takes too long, says too much, or ``closed`` was set.
    """
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=environment,
            cwd="/",
            bufsize=0,
        )
    except OSError as error:
        raise BackendFailed(f"the command cannot be started: {error.strerror}") from error
    try:
        output, errors = _converse(process, document, time.monotonic() + timeout, timeout, closed)
    finally:
        _kill_group(process.pid)
        exit_code = process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
    return Ran(exit_code, output, errors)


def _converse(
    process: subprocess.Popen[bytes], document: bytes, deadline: float, timeout: float, closed: threading.Event
) -> tuple[bytes, bytes]:
    assert process.stdin is not None  # noqa: S101 - for the type checker: all three are pipes
    assert process.stdout is not None  # noqa: S101
    assert process.stderr is not None  # noqa: S101
    output, errors, unsent = bytearray(), bytearray(), memoryview(document)
    with selectors.DefaultSelector() as selector:
        for pipe, event in (
            (process.stdin, selectors.EVENT_WRITE),
            (process.stdout, selectors.EVENT_READ),
            (process.stderr, selectors.EVENT_READ),
        ):
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, event)
        ended = False
        while True:
            if closed.is_set():
                raise BackendFailed("the gateway shuts down")
            if (left := deadline - time.monotonic()) <= 0:
                raise BackendFailed(f"the command did not answer within {timeout:g} s and was stopped")
            if not ended and _has_ended(process.pid):
                ended = True
                _kill_group(process.pid)  # children that stay would hold the pipes open
            ready = selector.select(0 if ended else min(left, _POLL_SECONDS))
            if ended and not any(key.fileobj is not process.stdin for key, _ in ready):
                return bytes(output), bytes(errors)
            for key, _ in ready:
                if key.fileobj is process.stdin:
                    unsent = _write(process.stdin, unsent)
                    if not unsent:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                elif not (data := os.read(key.fd, 65_536)):
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stdout:
                    output += data
                    if len(output) > MAX_OUTPUT_BYTES:
                        raise BackendFailed(f"the command printed more than {MAX_OUTPUT_BYTES} bytes and was stopped")
                else:
                    errors = (errors + data)[-_MAX_ERROR_BYTES:]


def _write(pipe: IO[bytes], unsent: memoryview) -> memoryview:
    try:
        return unsent[os.write(pipe.fileno(), unsent) :]
    except BlockingIOError:
        return unsent
    except OSError:  # it does not read its input, which is its right
        return unsent[len(unsent) :]


def _has_ended(pid: int) -> bool:
    """Whether the process ended. It is not reaped: until then no other group can have its number."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
