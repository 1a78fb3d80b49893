"""What the user process left behind, and what its end means."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import stat
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason, parse_reason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.domain.xcom import RETURN_VALUE, check_value
from leoflow_celery.errors import XComRejected

#: What a gRPC server takes at most by default (4 MiB), with room for the envelope. XCom limits are far below.
MAX_RETURN_VALUE_BYTES = 4 * 1024 * 1024 - 65_536
#: Keys of one try beside its return value.
MAX_PUSHED = 100
SKIPPED = "skipped"
RESCHEDULE = "up_for_reschedule"
_LATEST_SECOND = 253_402_300_799  # the end of the year 9999: the wire knows none later


def read_return_value(path: Path) -> bytes | None:
    """The return value a process wrote, or None for none.

    Raises:
        XComRejected: it is no regular file, far too large, or not JSON.
    """
    value = _read_regular(path, MAX_RETURN_VALUE_BYTES + 1)
    if value is None or not value.strip():
        return None
    value = value.strip()
    check_value(value, max_bytes=MAX_RETURN_VALUE_BYTES)
    return value


def read_pushed(path: Path) -> dict[str, bytes]:
    """Key → value of what a process pushed beside its return value; the last value of a key counts.

    Raises:
        XComRejected: it is no regular file, too large, or a line is not ``{"key": …, "value": …}``.
    """
    content = _read_regular(path, MAX_RETURN_VALUE_BYTES + 1) or b""
    if len(content) > MAX_RETURN_VALUE_BYTES:
        raise XComRejected(FailureReason.PAYLOAD_TOO_LARGE, f"more than {MAX_RETURN_VALUE_BYTES} bytes were pushed")
    found: dict[str, bytes] = {}
    for number, line in enumerate(filter(bytes.strip, content.splitlines()), 1):
        try:
            item = json.loads(line)
            key, value = item["key"], json.dumps(item["value"], allow_nan=False).encode()
        except (ValueError, TypeError, KeyError, RecursionError):
            key = None
        if not isinstance(key, str) or not key or key == RETURN_VALUE:
            raise XComRejected(
                FailureReason.INVALID_XCOM,
                f'line {number} of LEOFLOW_PUSH_PATH is not {{"key": ..., "value": ...}} with a key of its own',
            )
        found[key] = value
    if len(found) > MAX_PUSHED:
        raise XComRejected(FailureReason.INVALID_XCOM, f"{len(found)} keys were pushed, the limit is {MAX_PUSHED}")
    return found


def read_reason(path: Path) -> tuple[str, str]:
    """The reason a process named (first line) and its sentence (the rest), or two empty strings."""
    with contextlib.suppress(XComRejected):
        first, _, rest = (_read_regular(path, 8_192) or b"").decode("utf-8", "replace").partition("\n")
        return first.strip(), rest.strip()
    return "", ""


def _read_regular(path: Path, limit: int) -> bytes | None:
    """Up to ``limit`` bytes. The path is the user's to write: it may be a pipe, a link or a directory by now."""
    try:
        with open(path, "rb", opener=_open_regular) as file:
            return file.read(limit)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise XComRejected(FailureReason.INVALID_XCOM, f"{path.name} cannot be read: {error.strerror}") from error


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return descriptor


class OomWatch:
    """Tells a kill for memory that ended the process from one that it outlived: by then the counter had risen."""

    _SECONDS = 1.0

    def __init__(self, count: Callable[[], int]) -> None:
        self._count = count
        #: At the start, and at the last two looks: the older one is at least ``_SECONDS`` ago.
        self._first = self._older = self._newer = count()

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(self._SECONDS)
            self.look()

    def look(self) -> None:
        self._older, self._newer = self._newer, self._count()

    @property
    def killed(self) -> bool:
        """Whether the kernel killed anything since the start."""
        return self._count() > self._first

    @property
    def outlived(self) -> bool:
        """Whether the last such kill is so long ago that it did not end what has ended now."""
        return self._count() == self._older


def outcome_of_exit(
    exit_code: int, named: tuple[str, str] = ("", ""), oom_killed: bool = False, outlived: bool = False
) -> Outcome:
    """What an exit code (negative for a signal) and the reason that was left behind mean.

    ``oom_killed``: the kernel killed a process of the task for memory; ``outlived``: and the task went on after that.
    """
    reason, message = named
    if exit_code == 0 and reason == RESCHEDULE:
        return _reschedule(message)
    if exit_code == 0:
        return Outcome(TaskState.SKIPPED, message=message) if reason == SKIPPED else Outcome.success()
    described = describe_exit(exit_code)
    if message:  # one without a reason is the program's own word for what the exit code only counts
        described = f"{described}: {message}" if reason else message
    default = FailureReason.NON_ZERO_EXIT
    if oom_killed:
        described += ": out of memory, the kernel killed a process of this task"
        # 137 is a child's exit code that was handed on, however late; SIGKILL itself may come from anybody.
        if exit_code == shell_exit_code(-signal.SIGKILL) or (exit_code == -signal.SIGKILL and not outlived):
            default = FailureReason.OOM_KILLED
    return Outcome.failed(parse_reason(reason, default), described, shell_exit_code(exit_code))


def _reschedule(text: str) -> Outcome:
    """The task looks again at a time that it left behind: RFC 3339 with an offset, or epoch seconds."""
    with contextlib.suppress(ValueError, OverflowError):
        at = float(text) if text.replace(".", "", 1).isdigit() else datetime.fromisoformat(text).timestamp()
        if 0 <= at <= _LATEST_SECOND:
            return Outcome(TaskState.UP_FOR_RESCHEDULE, message=text, exit_code=0, reschedule_at=at)
    message = f"the time to look again, {text[:80]!r}, is not RFC 3339 (2030-01-31T12:00:00+00:00) or epoch seconds"
    return Outcome.failed(FailureReason.NON_ZERO_EXIT, message, 0)


def outcome_of_defect(error: Exception, exit_code: int | None) -> Outcome:
    """What a defect of the agent means: a process that has ended (``exit_code``) is not run again for our sake."""
    message = f"the agent failed: {type(error).__name__}: {error}"
    if exit_code is None:
        return Outcome.failed(FailureReason.AGENT_LOST, message)
    reason = FailureReason.NON_ZERO_EXIT if exit_code else FailureReason.INVALID_XCOM
    return Outcome.failed(reason, f"{describe_exit(exit_code)}; then {message}", shell_exit_code(exit_code))


def describe_exit(exit_code: int) -> str:
    """``exit code 3``, or ``exit code 137 (killed by SIGKILL)``."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    return f"exit code {shell_exit_code(exit_code)} (killed by {name})"


def shell_exit_code(exit_code: int) -> int:
    """128 + n for signal n, as shells and container engines count."""
    return exit_code if exit_code >= 0 else 128 - exit_code
