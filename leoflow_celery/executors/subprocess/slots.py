"""How many attempts run at once on this host: each holds a directory from its launch until its end was settled."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from leoflow_celery.errors import HostFull
from leoflow_celery.executors.base import standard_max_running
from leoflow_celery.executors.subprocess.directory import all_attempts

_MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def host_memory_bytes() -> int:
    """Of the machine, or of the container that we are in when it has less."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in _MEMORY_LIMITS:
        with suppress(OSError, ValueError):  # "max" is no limit
            found.append(int(Path(file).read_text()))
    return min(found)


class Slots:
    """The slots of a state directory, which all workers of this system on this host share. Thread-safe."""

    def __init__(self, root: Path, configured: int) -> None:
        self._root = root
        self.limit = configured or standard_max_running(len(os.sched_getaffinity(0)), host_memory_bytes())

    def free(self) -> int:
        """How many launches would find room."""
        return self.limit - sum(1 for _ in all_attempts(self._root))

    @contextmanager
    def admission(self, path: Path) -> Iterator[None]:
        """Inside, this attempt's directory may be made and nobody else's.

        Raises:
            HostFull: the host runs as many as it may, and this is none of them.
        """
        lock = os.open(self._root / "admission", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists() and self.free() <= 0:
                raise HostFull(f"this host runs {self.limit} attempts, which is LEOFLOW_SUBPROCESS_MAX_RUNNING")
            yield
        finally:
            os.close(lock)
