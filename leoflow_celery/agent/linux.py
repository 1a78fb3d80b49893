"""What the kernel offers to look after descendants: adoption, listing, killing, OOM counters."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
_RLIMIT_LOCKS = 10
_KILL_POLL_SECONDS = 0.002


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, as PID 1 is anyway, so that none can slip away."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def hide_from_our_user() -> None:
    """Keep other processes of our user, the task above all, from reading our environment and memory: the token."""
    _prctl(_PR_SET_DUMPABLE, 0)


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def children(pid: int | str = "self") -> list[int]:
    """The process ids of the living and dead children of a process, ours unless said."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found.extend(int(pid) for pid in (task / "children").read_text().split())
    return found


def signal_group(group: int, number: int) -> None:
    """Signal a process group that may be gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def mark_descendants(mark: int) -> None:
    """Give us, and so all that we start, a limit that Linux ignores and everybody may read: whose processes we are."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(_RLIMIT_LOCKS, (mark, mark))


def kill_descendants(patience_seconds: float = 1.0, spare: frozenset[int] = frozenset()) -> None:
    """Kill and reap every descendant but ``spare`` and theirs: those of a killed child become ours and are next."""
    deadline = time.monotonic() + patience_seconds
    while (victims := [pid for pid in children() if pid not in spare]) and time.monotonic() < deadline:
        for pid in victims:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_KILL_POLL_SECONDS)
        for pid in victims:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def offer_children_to_oom_kill() -> None:
    """Let the kernel, out of memory, choose what we started before us: somebody has to tell.

    All of it alike, or the kernel takes a small shell before its child that eats the memory. A process first, then what
    it had started before that; what it starts later inherits it.
    """
    pending = children()
    while pending:
        pid = pending.pop()
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/oom_score_adj").write_text("1000")
        pending += children(pid)


def oom_kills(root: Path = Path("/")) -> int:
    """How often the kernel has killed in our memory cgroup so far; 0 when it cannot be known."""
    with contextlib.suppress(OSError):
        for path in _oom_counters((root / "proc/self/cgroup").read_text()):
            with contextlib.suppress(OSError, ValueError):
                counters = dict(line.split() for line in (root / path).read_text().splitlines())
                return int(counters["oom_kill"]) if "oom_kill" in counters else 0
    return 0


def _oom_counters(memberships: str) -> Iterator[str]:
    """Where the counter of our cgroup may be: version 2, then 1; as the host sees it, then as a container does."""
    for line in memberships.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, own = rest.partition(":")
        if not controllers:
            yield f"sys/fs/cgroup{own}/memory.events"
            yield "sys/fs/cgroup/memory.events"
        elif "memory" in controllers.split(","):
            yield f"sys/fs/cgroup/memory{own}/memory.oom_control"
            yield "sys/fs/cgroup/memory/memory.oom_control"
