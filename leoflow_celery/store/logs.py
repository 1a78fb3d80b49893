"""Task logs on disk: JSON lines ``{ts, level, stream, msg}`` at ``{root}/{tenant}/{dag}/{run}/{task}/{try}.log``.

Ids never escape the root: a component that is unsafe or too long for a file name is replaced by a readable rest and a
hash. Lines are appended with one write each batch, so a reader never sees half a batch from a dead writer but for its
last line, which readers leave alone until it ends.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tenacity import retry, retry_if_exception_type, stop_after_attempt

from leoflow_celery.domain.attempt import digest
from leoflow_celery.settings import LogSettings

_MAX_COMPONENT_BYTES = 200
_SAFE = re.compile(r"[^\w.:+=@ -]", re.UNICODE)
_LEVELS = (
    ("error", re.compile(r"\b(ERROR|CRITICAL|FATAL)\b|\bTraceback \(most recent call last\)")),
    ("warning", re.compile(r"\bWARN(ING)?\b")),
    ("debug", re.compile(r"\bDEBUG\b")),
    ("info", re.compile(r"\bINFO\b")),
)
#: Only the head of a line names its level; a megabyte of JSON is not searched.
_LEVEL_SEARCH_CHARACTERS = 512
_LAST_LINES, _LAST_LINE_CHARACTERS, _LAST_BYTES = 50, 2_000, 1 << 16
#: Time, level, stream and the quotes and commas of a line; a stream's name is escaped as well.
_STREAM_CHARACTERS, _ENVELOPE_BYTES = 32, 320
#: At the most: a control character as its escape.
_BYTES_OF_A_CHARACTER, _PIECE_CHARACTERS = 6, 256
#: How a full log ends, so that the next writer knows it.
_FULL = "the log of this try is full (LEOFLOW_LOGS_MAX_TRY_BYTES): every line after this one is dropped"
_READ_BYTES = 1 << 16
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class LogLimits:
    """What may be written, in bytes on disk: of one line, and of all lines of one try."""

    line_bytes: int = 65_536
    try_bytes: int = 256 * 1024 * 1024

    @classmethod
    def of(cls, settings: LogSettings) -> LogLimits:
        return cls(settings.max_line_bytes, settings.max_try_bytes)


@dataclass(frozen=True, slots=True)
class LogKey:
    """Whose log: one try of one task."""

    tenant_id: str
    dag_id: str
    run_id: str
    task_id: str
    try_number: int

    @property
    def of_task(self) -> tuple[str, str, str]:
        """DAG, run and task."""
        return self.dag_id, self.run_id, self.task_id


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One line; ``ts`` in seconds since the epoch."""

    ts: float
    level: str
    stream: str
    msg: str

    def to_json(self) -> str:
        data = {
            "ts": _moment(self.ts).isoformat(timespec="microseconds"),
            "level": self.level,
            "stream": self.stream,
            "msg": self.msg,
        }
        return json.dumps(data, ensure_ascii=False, separators=(",", ":"))

    def line(self, limits: LogLimits) -> bytes:
        """The line as it is on disk, cut to its limit. The same record gives the same bytes every time."""
        cut = replace(self, stream=self.stream[:_STREAM_CHARACTERS], msg=cut_text(self.msg, limits.line_bytes))
        return f"{cut.to_json()}\n".encode("utf-8", "replace")


def cut_text(text: str, line_bytes: int) -> str:
    """The text, or as much of it as a line has room for when it is escaped, and a remark that it was cut.

    Cut text is not cut again. The time is linear in the limit, however long the text is.
    """
    room = line_bytes - _ENVELOPE_BYTES
    if len(text) * _BYTES_OF_A_CHARACTER <= room or (len(text) <= room and _escaped(text) <= room):
        return text
    remark = f"… [cut here: {len(text)} characters are more than LEOFLOW_LOGS_MAX_LINE_BYTES={line_bytes} allows]"
    room -= len(remark) + 2
    end = 0
    while (size := _escaped(text[end : end + _PIECE_CHARACTERS])) <= room:
        room -= size
        end += _PIECE_CHARACTERS
    return text[: end + room // _BYTES_OF_A_CHARACTER] + remark


def _escaped(text: str) -> int:
    return len(json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")) - 2


def _moment(ts: float) -> datetime:
    try:
        return datetime.fromtimestamp(ts, UTC)
    except (ValueError, OverflowError, OSError):
        return datetime.now(UTC)  # an agent's clock is no reason to lose its line


def refine_level(text: str, default: str = "info") -> str:
    """The level a line names itself, else ``default``; the first word of the list above that occurs decides."""
    head = text[:_LEVEL_SEARCH_CHARACTERS]
    return next((level for level, pattern in _LEVELS if pattern.search(head)), default)


def safe_component(text: str) -> str:
    """An id as one file name: itself when it is safe, else a readable rest and a hash of the whole."""
    clean = _SAFE.sub("_", text)
    if clean == text and text not in ("", ".", "..") and len(text.encode()) <= _MAX_COMPONENT_BYTES:
        return text
    rest = clean.encode()[: _MAX_COMPONENT_BYTES - 20].decode(errors="ignore").strip(".")
    return f"{rest}~{digest(text)}"


class LogWriter:
    """Appends to one try's log, within its limits. Not thread-safe: one writer per stream."""

    def __init__(self, path: Path, limits: LogLimits | None = None) -> None:
        self._limits = limits or LogLimits()
        self._descriptor = _open_for_append(path)
        self._full = False
        if os.fstat(self._descriptor).st_size:
            _end_torn_line(path, self._descriptor)
            self._full = _ends_full(path)

    def append(self, records: Iterable[LogRecord]) -> None:
        """Write the records that fit."""
        self.append_lines([record.line(self._limits) for record in records])

    def append_lines(self, lines: Sequence[bytes]) -> None:
        """Write the lines (see ``LogRecord.line``) that fit. The first one that does not is answered by the last."""
        if self._full or not lines:
            return
        room = self._limits.try_bytes - os.fstat(self._descriptor).st_size
        data = b"".join(lines)
        if len(data) > room:
            kept = list(itertools.takewhile(lambda end: end <= room, itertools.accumulate(map(len, lines))))
            notice = LogRecord(time.time(), "warning", "agent", _FULL).line(self._limits)
            data, self._full = data[: kept[-1] if kept else 0] + notice, True
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> LogWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_for_append(path: Path) -> int:
    try:
        return os.open(path, _APPEND, 0o640)
    except FileNotFoundError:
        return _open_in_new_directory(path)


# Pruning may remove the empty directory between mkdir and open.
@retry(retry=retry_if_exception_type(FileNotFoundError), stop=stop_after_attempt(10), reraise=True)
def _open_in_new_directory(path: Path) -> int:
    os.makedirs(path.parent, exist_ok=True)
    return os.open(path, _APPEND, 0o640)


def _ends_full(path: Path) -> bool:
    """Whether the last line says that the log is full: each writer would else add its own last line."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 512))
        return file.read().endswith(f'"{_FULL}"}}\n'.encode())


def _end_torn_line(path: Path, descriptor: int) -> None:
    # A writer killed in the middle of a line left it without an end; the next line must not be glued to it.
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            os.write(descriptor, b"\n")


class LogReader:
    """Reads one try's log from where it stopped; a line without its end waits for the next look."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self._rest: list[bytes] = []

    def new_lines(self) -> Iterator[dict[str, Any]]:
        """Every line that ended since the last look; none when there is no log yet."""
        try:
            if self._path.stat().st_size <= self._offset:
                return
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self._offset)
            while chunk := file.read(_READ_BYTES):
                self._offset += len(chunk)
                first, *others = chunk.split(b"\n")
                self._rest.append(first)
                if not others:
                    continue  # joined once, when the line ends: it may be long
                lines = (b"".join(self._rest), *others[:-1])
                self._rest = [others[-1]]
                yield from (parsed for line in lines if (parsed := _parse(line)) is not None)


class LogStore:
    """All logs below one root."""

    def __init__(self, root: Path, limits: LogLimits | None = None) -> None:
        self.root, self.limits = root, limits or LogLimits()

    def path(self, key: LogKey) -> Path:
        parts = (safe_component(part) for part in (key.tenant_id, key.dag_id, key.run_id, key.task_id))
        return self.root.joinpath(*parts, f"{int(key.try_number)}.log")

    def writer(self, key: LogKey) -> LogWriter:
        """Open a try's log for appending; several writers of one try may append at once."""
        return LogWriter(self.path(key), self.limits)

    def read(self, key: LogKey) -> Iterator[dict[str, Any]]:
        """Every line so far; none when there is no log yet."""
        return self.follow(key, lambda: True)

    def follow(self, key: LogKey, ended: Callable[[], bool], poll_seconds: float = 0.2) -> Iterator[dict[str, Any]]:
        """Every line, waiting for more until ``ended()`` was true before a look that found nothing new."""
        log = self.reader(key)
        while True:
            last_look = ended()
            yield from log.new_lines()
            if last_look:
                return
            time.sleep(poll_seconds)

    def reader(self, key: LogKey) -> LogReader:
        """The lines of a try's log as they come, for who looks at many logs in turn."""
        return LogReader(self.path(key))

    def tail(self, key: LogKey, max_bytes: int = 1 << 20) -> list[dict[str, Any]]:
        """The lines of the last ``max_bytes`` of a log."""
        path = self.path(key)
        if not path.exists():
            return []
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - max_bytes))
            lines = file.read().split(b"\n")
        complete = lines[1:] if size > max_bytes else lines
        return [parsed for line in complete if (parsed := _parse(line)) is not None]

    def last_lines(self, key: LogKey) -> tuple[str, ...]:
        """What a failure keeps of its log: the last lines, shortened. None of a log that cannot be read here."""
        try:
            lines = self.tail(key, max(_LAST_BYTES, 2 * self.limits.line_bytes))
        except OSError:
            return ()
        return tuple(str(line.get("msg", ""))[:_LAST_LINE_CHARACTERS] for line in lines[-_LAST_LINES:])

    def prune(self, older_than_seconds: float) -> int:
        """Remove logs not written to for that long, and the directories they leave empty; the number removed.

        0 removes nothing, as the setting says.
        """
        removed, before = 0, time.time() - older_than_seconds
        if older_than_seconds <= 0:
            return 0
        for directory, _, files in os.walk(self.root, topdown=False):
            for name in files:
                path = Path(directory, name)
                removed += name.endswith(".log") and _remove_if_older(path, before)
            if Path(directory) != self.root:
                _remove_if_empty(Path(directory))
        return removed


def _remove_if_older(path: Path, before: float) -> bool:
    try:
        if path.stat().st_mtime >= before:
            return False
        path.unlink()
    except FileNotFoundError:
        return False  # another one prunes as well
    return True


def _remove_if_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError:
        return


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError):
        return None  # the torn last line of a writer that was killed
    return parsed if isinstance(parsed, dict) else None
