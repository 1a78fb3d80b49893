"""Log lines on disk, from the moment they are read until the control plane has them."""

from __future__ import annotations

import os
import tempfile
from array import array

#: Where no directory can be written, the spool is memory; it must stay small then.
_MAX_MEMORY_BYTES = 4 * 1024 * 1024
_COMPACT_AFTER = 8_192


class Spool:
    """A ring of records in an unlinked file: at most ``capacity`` bytes that nobody acknowledged yet.

    What a full disk does not take is kept in memory, up to 4 MiB.
    Records are numbered from 1 without gaps. The index costs eight bytes of memory per record.
    """

    def __init__(self, capacity: int) -> None:
        self._file, self._capacity = _open(capacity)
        #: Where each record starts, counted from the beginning of time; the last entry is where the next one will.
        self._starts = array("Q", [0])
        self._skipped = 0
        self._in_memory: dict[int, bytes] = {}
        self._memory_bytes = 0
        self.first = 1
        self.next = 1

    @property
    def used_bytes(self) -> int:
        return self._start(self.next) - self._start(self.first)

    @property
    def fill(self) -> float:
        """How full it is, 0 to 1."""
        return self.used_bytes / self._capacity

    def append(self, record: bytes) -> bool:
        """Keep a record; False when there is no room for it (on the disk or in memory)."""
        if self.used_bytes + len(record) > self._capacity:
            return False
        start = self._start(self.next)
        if not self._write(start % self._capacity, record):
            if self._memory_bytes + len(record) > _MAX_MEMORY_BYTES:
                return False
            self._in_memory[self.next] = record
            self._memory_bytes += len(record)
        self._starts.append(start + len(record))
        self.next += 1
        return True

    def read(self, number: int) -> bytes:
        """One record that is kept."""
        if number in self._in_memory:
            return self._in_memory[number]
        start, end = self._start(number), self._start(number + 1)
        offset, length = start % self._capacity, end - start
        head = os.pread(self._file, min(length, self._capacity - offset), offset)
        return head if len(head) == length else head + os.pread(self._file, length - len(head), 0)

    def release(self, through: int) -> None:
        """Forget the records up to and including this one."""
        self.first = max(self.first, min(through + 1, self.next))
        for number in [number for number in self._in_memory if number < self.first]:
            self._memory_bytes -= len(self._in_memory.pop(number))
        skipped = self.first - 1 - self._skipped
        if skipped > _COMPACT_AFTER and skipped > len(self._starts) // 2:
            del self._starts[:skipped]
            self._skipped += skipped

    def close(self) -> None:
        os.close(self._file)

    def _start(self, number: int) -> int:
        return self._starts[number - 1 - self._skipped]

    def _write(self, offset: int, record: bytes) -> bool:
        room = self._capacity - offset
        try:
            written = os.pwrite(self._file, record[:room], offset)
            if len(record) > room:
                written += os.pwrite(self._file, record[room:], 0)
        except OSError:
            return False
        return written == len(record)


def _open(capacity: int) -> tuple[int, int]:
    """A nameless file and the capacity it is good for."""
    try:
        descriptor, path = tempfile.mkstemp(prefix="leoflow-spool-")
        os.unlink(path)
    except OSError:
        return os.memfd_create("leoflow-spool"), min(capacity, _MAX_MEMORY_BYTES)
    return descriptor, capacity
