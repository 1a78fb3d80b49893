"""Bytes of any kind → lines of text."""

from __future__ import annotations

import re
from collections.abc import Iterator

#: A longer line is cut into pieces of at most this size, so that no line can fill the memory or a message.
MAX_LINE_BYTES = 16_384
_UTF8_CONTINUATION = 0x80
_ENDS = re.compile(rb"(\r?\n|\r)")
_RETURN = ord("\r")


class LineSplitter:
    """Splits at newlines and carriage returns (progress bars); keeps less than one piece in memory.

    Bytes that are not UTF-8 are replaced.
    """

    def __init__(self, max_bytes: int = MAX_LINE_BYTES) -> None:
        self._max = max_bytes
        self._rest = b""
        #: The line went out already, up to an end that may still come: it makes no line of its own.
        self._said = False

    @property
    def pending(self) -> bool:
        """Whether a line has begun and not ended."""
        return bool(self._rest)

    def feed(self, data: bytes) -> Iterator[str]:
        """The lines (and pieces of long lines) that are complete with this data."""
        if b"\r" not in data:
            *complete, rest = (self._rest + data).split(b"\n")
            ended_by = b"\n" * len(complete)
        else:
            parts = _ENDS.split(self._rest + data)
            complete, rest = parts[:-1:2], parts[-1]
            ended_by = b"".join(end[-1:] for end in parts[1::2])
        self._rest = rest
        for line, end in zip(complete, ended_by, strict=True):
            if line or not (self._said or end == _RETURN):
                yield from self._pieces(line)
            # A newline may follow a carriage return in the next data, and is the same end.
            self._said = end == _RETURN
        *full, self._rest = self._cut(rest)
        if rest:
            self._said = False
        yield from map(_decode, full)

    def flush(self) -> Iterator[str]:
        """What there is of a line that has not ended: a prompt, dots. Half a character waits for its other half."""
        end = len(self._rest) - _unfinished(self._rest)
        said, self._rest = self._rest[:end], self._rest[end:]
        if said:
            self._said = True
            yield _decode(said)

    def end(self) -> Iterator[str]:
        """The last line when it has no newline."""
        rest, self._rest = self._rest, b""
        if rest:
            yield _decode(rest)

    def _pieces(self, line: bytes) -> Iterator[str]:
        return map(_decode, self._cut(line))

    def _cut(self, line: bytes) -> list[bytes]:
        """At least one piece; only the last may be shorter than the limit by more than a character."""
        pieces, start = [], 0
        while len(line) - start > self._max:
            end = _character_boundary(line, start + self._max)
            pieces.append(line[start:end])
            start = end
        pieces.append(line[start:])
        return pieces


def _character_boundary(data: bytes, end: int) -> int:
    """The last position at or before ``end`` that does not split a UTF-8 character."""
    for back in range(4):
        if data[end - back] & 0xC0 != _UTF8_CONTINUATION:
            return end - back
    return end


def _unfinished(data: bytes) -> int:
    """How many bytes at the end are the beginning of a character."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte & 0xC0 != _UTF8_CONTINUATION:
            length = 2 if byte >> 5 == 0b110 else 3 if byte >> 4 == 0b1110 else 4 if byte >> 3 == 0b11110 else 1
            return back if length > back else 0
    return 0


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "replace")
