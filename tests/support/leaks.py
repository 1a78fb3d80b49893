"""What a test left behind: child processes, orphans, non-daemon threads, temporary directories of ours, and things on
servers that ``look_also`` lists.

Servers that live for the whole session are declared with ``keep_process``; everything else has to be gone, or go within
a few seconds, when its test is over.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.environment import SESSION_VARIABLE

_GRACE_SECONDS = 15.0
#: Lives as long as the process that first met a schema, and ends with it.
_STAYS = "leoflow_celery.domain.schema_engine"
_kept: set[int] = set()
_lists: list[Callable[[], Iterable[str]]] = []


def look_also(list_names: Callable[[], Iterable[str]]) -> None:
    """Further things of this session, one name each, that a test may not leave behind; until ``look_no_more``."""
    _lists.append(list_names)


def look_no_more(list_names: Callable[[], Iterable[str]]) -> None:
    """Their server is not there any more."""
    _lists.remove(list_names)


def keep_process(pid: int) -> None:
    """A process (and what it starts) that may outlive the test that started it."""
    _kept.add(pid)


def release_process(pid: int) -> None:
    """It is gone, or may not outlive its test any more."""
    _kept.discard(pid)


@dataclass(frozen=True)
class Footprint:
    """What exists now and could be left behind."""

    processes: frozenset[int]
    threads: frozenset[threading.Thread]
    directories: frozenset[str]
    remote: frozenset[str]

    orphans: bool

    @classmethod
    def take(cls, orphans: bool) -> Footprint:
        """``orphans`` also looks for processes that no longer descend from us, which reads all of /proc."""
        threads = frozenset(thread for thread in threading.enumerate() if not thread.daemon)
        remote = frozenset(name for list_names in _lists for name in _listed(list_names))
        return cls(frozenset(_our_processes(orphans)), threads, frozenset(_our_directories()), remote, orphans)


def leaks_since(before: Footprint) -> list[str]:
    """One line per thing that is still there after a short grace and was not there before."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while found := _difference(before):
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return found


def _difference(before: Footprint) -> list[str]:
    now = Footprint.take(before.orphans)
    return [
        *(f"process {pid}: {_command(pid)}" for pid in sorted(now.processes - before.processes)),
        *(f"thread {thread.name!r}" for thread in now.threads - before.threads),
        *(f"directory {name}" for name in sorted(now.directories - before.directories)),
        *sorted(now.remote - before.remote),
    ]


def kill_leaked_processes(before: Footprint) -> None:
    """End what a test left running, so that the next one starts clean."""
    for pid in Footprint.take(before.orphans).processes - before.processes:
        try:
            psutil.Process(pid).kill()
        except psutil.NoSuchProcess:
            continue


def _listed(list_names: Callable[[], Iterable[str]]) -> list[str]:
    """Nothing when the server does not answer any more: that is no fault of the test that happens to run."""
    try:
        return list(list_names())
    except Exception:
        return []


def _our_processes(orphans: bool) -> set[int]:
    """Our descendants and, when asked for, orphans with the mark of our session; never the kept ones and theirs."""
    found = _descendants(os.getpid())
    if orphans:
        kept = _kept.union(*(_descendants(pid) for pid in _kept))
        marker = f"{SESSION_VARIABLE}={os.environ.get(SESSION_VARIABLE, '-')}".encode()
        found |= {pid for pid in psutil.pids() if pid not in kept and pid != os.getpid() and _has_marker(pid, marker)}
    return {pid for pid in found if not _is_gone(pid) and _STAYS not in _command(pid)}


def _descendants(pid: int) -> set[int]:
    """All below ``pid``, without the kept ones and what is below those. From /proc: psutil takes 10 ms per test."""
    children: set[int] = set()
    try:
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            children.update(int(text) for text in path.read_text().split())
    except OSError:
        return children
    children -= _kept
    return children.union(*(_descendants(child) for child in children))


def _has_marker(pid: int, marker: bytes) -> bool:
    try:
        return marker in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _is_gone(pid: int) -> bool:
    """Ended, and at most waiting for a parent that is not us to notice."""
    try:
        process = psutil.Process(pid)
        return bool(process.status() == psutil.STATUS_ZOMBIE and process.ppid() != os.getpid())
    except psutil.NoSuchProcess:
        return True


def _command(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline()) or "(zombie)"
    except psutil.NoSuchProcess:
        return "(gone)"


def _our_directories() -> set[str]:
    root = Path(tempfile.gettempdir())
    return {str(path) for path in root.glob("leoflow*") if path.is_dir()}
