"""One system per state directory: a lock that the kernel drops with its holder, however that ends."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from leoflow_celery.errors import ConfigurationError

Command = Literal["run", "up"]


@dataclass(frozen=True, slots=True)
class Holder:
    """Who runs the system of a state directory."""

    pid: int
    command: str


class InUse(ConfigurationError):
    """Another process runs this system. ``holder`` says which, when it could be read."""

    def __init__(self, path: Path, holder: Holder | None) -> None:
        self.holder = holder
        who = f"'leoflow lite {holder.command}' (process {holder.pid})" if holder else "another process"
        super().__init__(f"{path.parent} is in use by {who}; wait for it, or choose another --state-dir")


@contextmanager
def exclusive(path: Path, command: Command) -> Iterator[None]:
    """Hold the lock of a state directory.

    Raises:
        InUse: somebody else holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InUse(path, _holder(descriptor)) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "command": command}).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> Holder | None:
    try:
        data = json.loads(os.pread(descriptor, 4_096, 0))
        return Holder(int(data["pid"]), str(data["command"]))
    except (ValueError, KeyError, TypeError):
        return None  # it is just writing its name
