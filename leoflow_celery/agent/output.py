"""Bytes of any kind → lines of text."""

from __future__ import annotations

from collections.abc import Iterator

#: A longer line is cut into pieces of at most this size, so that no line can fill the memory or a message.
MAX_LINE_BYTES = 16_384
_UTF8_CONTINUATION = 0x80


class LineSplitter:
    """Splits at newlines; keeps less than one piece in memory. Bytes that are not UTF-8 are replaced."""

    def __init__(self, max_bytes: int = MAX_LINE_BYTES) -> None:
        self._max = max_bytes
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[str]:
        """The lines (and pieces of long lines) that are complete with this data."""
        *complete, rest = (self._rest + data).split(b"\n")
        for line in complete:
            yield from self._pieces(line.removesuffix(b"\r"))
        *full, self._rest = self._cut(rest)
        yield from map(_decode, full)

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


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "replace")
