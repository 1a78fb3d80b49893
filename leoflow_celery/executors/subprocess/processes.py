"""Finding and ending what an attempt left running, by what a process inherits and does not change.

The mark is a resource limit that Linux ignores (``RLIMIT_LOCKS``): every descendant has it, through double forks,
``setsid``, an empty environment, another title and ``PR_SET_DUMPABLE`` 0; everybody may read it; nobody without
privileges can raise it again. A variable in the environment finds what was started before the limit was set. Both say
whose system it is: ids of attempts are unique within a system only, and a host may have several.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from leoflow_celery.domain.attempt import AttemptId, attempt_name, digest
from leoflow_celery.executors.subprocess.environment import ATTEMPT_MARK

log = logging.getLogger(__name__)
_RLIMIT_LOCKS = 10
_LINE = b"Max file locks"
_POLL_SECONDS = 0.02
#: Launches of an earlier try that are looked for; a try has a handful.
_MOST_LAUNCHES = 32
_MOST_TRIES = 32


class Processes:
    """The processes of a system's attempts on this host. ``system`` is the id in its state directory."""

    def __init__(self, system: str) -> None:
        self._system = system

    def limit(self, name: str) -> int:
        """The limit that marks the processes of an attempt."""
        return (1 << 61) + int(digest("process", self._system, name, length=15), 16)

    def variable(self, name: str) -> str:
        """The value of the variable that marks them where the limit does not."""
        return f"{self._system}/{name}"

    def of(self, *names: str) -> Iterator[int]:
        """Every process that descends from the agents of these attempts and has not ended."""
        limits = {str(self.limit(name)).encode() for name in names}
        variables = {f"{ATTEMPT_MARK}={self.variable(name)}".encode() for name in names}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or not (_has_limit(entry, limits) or _has_variable(entry, variables)):
                continue
            if not _has_ended(entry):
                yield int(entry.name)

    def kill(self, *names: str, patience_seconds: float = 5.0) -> bool:
        """SIGKILL all of them, again until none is found twice in a row (they may fork); whether they are all gone."""
        deadline, absent = time.monotonic() + patience_seconds, 0
        while absent < 2:
            found = list(self.of(*names))
            absent = 0 if found else absent + 1
            for pid in found:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if found:
                if time.monotonic() > deadline:
                    return False
                time.sleep(_POLL_SECONDS)
        return True


def mark(pid: int, limit: int) -> None:
    """Mark a process and what it will start. Where it cannot be, the environment alone says whose it is."""
    try:
        resource.prlimit(pid, _RLIMIT_LOCKS, (limit, limit))
    except ProcessLookupError:
        return
    except (OSError, ValueError) as error:
        log.warning("subprocess.not_marked", extra={"pid": pid, "error": str(error)})


def earlier_names(attempt: AttemptId, dag_id: str, task_id: str) -> list[str]:
    """The external names of launches and tries of the task instance that came before this one."""
    before = [attempt.evolve(launch=launch) for launch in range(1, attempt.launch)]
    for number in range(max(1, attempt.try_number - _MOST_TRIES), attempt.try_number):
        before += [AttemptId(attempt.task_instance_id, number, launch) for launch in range(1, _MOST_LAUNCHES + 1)]
    return [attempt_name(one, dag_id, task_id) for one in before]


def _has_limit(process: Path, limits: Collection[bytes]) -> bool:
    with contextlib.suppress(OSError):
        for line in (process / "limits").read_bytes().splitlines():
            if line.startswith(_LINE):
                return any(word in limits for word in line[len(_LINE) :].split())
    return False


def _has_variable(process: Path, marks: set[bytes]) -> bool:
    with contextlib.suppress(OSError):
        return not marks.isdisjoint((process / "environ").read_bytes().split(b"\0"))
    return False


def _has_ended(process: Path) -> bool:
    """A process whose first thread has ended looks like a zombie while its other threads run."""
    with contextlib.suppress(OSError):
        state = (process / "stat").read_bytes().rpartition(b")")[2].split()[0]
        return state in (b"Z", b"X") and len(list((process / "task").iterdir())) <= 1
    return True
