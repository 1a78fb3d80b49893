"""Finding and killing what an attempt left running."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from leoflow_celery.executors.subprocess.environment import ATTEMPT_NAME


def processes_of(name: str) -> Iterator[int]:
    """Every process (of this user) that descends from the attempt's agent: the mark is inherited, not asked for."""
    mark = f"{ATTEMPT_NAME}={name}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    yield int(entry.name)


def kill_processes_of(name: str) -> int:
    """SIGKILL all of them, again until none is found (they may fork); the number killed."""
    killed: set[int] = set()
    while fresh := set(processes_of(name)) - killed:
        for pid in fresh:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        killed |= fresh
    return len(killed)
