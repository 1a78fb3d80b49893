"""Other people's words made safe: a server quotes what it was sent, and what it was sent holds secrets.

What comes back keeps the server's own words, without any value that we sent in confidence, bounded, on plain lines.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from leoflow_celery.domain.fields import printable

HIDDEN = "[hidden]"
#: A sentence and its causes. The longest useful one we saw has 1,100.
MAX_CHARACTERS = 2_000
#: A Go JSON decoder shows where it stopped, with what stands before and after: parts of our own body, cut anywhere.
_QUOTED_BODY = re.compile(
    r",? error found in #?\d+ byte of \.\.\.\|.*?\|\.\.\.(?:, bigger context \.\.\.\|.*?\|\.\.\.)?|\.\.\.\|.*?\|\.\.\.",
    re.DOTALL,
)
#: Shorter values (a digit, ``true``) are words of the language: hidden where they stand in quotes, and nowhere else.
_LEAST = 4
_CUT_MARK = r"(?:\.\.\.|…|\Z)"


class Confidential:
    """Values that were sent in confidence. Calling it with a text gives the text without them."""

    def __init__(self, values: Iterable[Any]) -> None:
        spellings: set[str] = set()
        for value in values:
            if value not in (None, ""):
                spellings |= _spellings(json.dumps(value) if isinstance(value, bool) else str(value))
        self._long = sorted((one for one in spellings if len(one) >= _LEAST), key=len, reverse=True)
        self._short = [one for one in spellings if len(one) < _LEAST]

    def __call__(self, text: str) -> str:
        text = _QUOTED_BODY.sub("", text)
        for value in self._long:
            text = text.replace(value, HIDDEN)
        for value in self._short:
            for mark in ('\\"', '"', "'", "`"):
                text = text.replace(f"{mark}{value}{mark}", f"{mark}{HIDDEN}{mark}")
        for value in self._long:
            text = _without_parts(text, value)
        text = printable(re.sub(r"\s*[\r\n]+\s*", " ", text).strip())
        return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 3]}..."

    def everywhere(self, data: Any) -> Any:
        """JSON-like data with each text in it made safe."""
        if isinstance(data, str):
            return self(data)
        if isinstance(data, list):
            return [self.everywhere(one) for one in data]
        return {key: self.everywhere(one) for key, one in data.items()} if isinstance(data, dict) else data


def _spellings(value: str) -> set[str]:
    """A value as it is, as JSON and Go quote it, as the kubelet's language, a Secret and a URL have it."""
    plain = {value, value.replace("$", "$$"), *(line for line in value.splitlines() if len(line) > _LEAST)}
    quoted = {json.dumps(one, ensure_ascii=ascii_only)[1:-1] for one in plain for ascii_only in (True, False)}
    # Go's JSON writes these three as escapes.
    escaped = {re.sub("[<>&]", lambda one: f"\\u{ord(one[0]):04x}", one) for one in quoted}
    encoded = base64.b64encode(value.encode(errors="surrogatepass")).decode()
    found = plain | quoted | escaped | ({encoded} if len(value) >= _LEAST else set())
    found |= {json.dumps(one)[1:-1] for one in quoted}  # a message that quotes another server's message
    if len(value) >= _LEAST:
        found.add(quote(value, safe="", errors="replace"))
    return found


def _without_parts(text: str, value: str) -> str:
    """Without the beginning or the end of a value that the server itself cut off."""
    for found in reversed(list(re.finditer(_CUT_MARK, text))):
        before = text[: found.start()]
        size = next((n for n in range(min(len(value), len(before)), _LEAST - 1, -1) if before.endswith(value[:n])), 0)
        if size:
            text = before[:-size] + HIDDEN + text[found.start() :]
    position = 0
    while (start := min((at for mark in ("...", "…") if (at := text.find(mark, position)) >= 0), default=-1)) >= 0:
        start += 3 if text.startswith("...", start) else 1
        rest = text[start:]
        size = next((n for n in range(min(len(value), len(rest)), _LEAST - 1, -1) if rest.startswith(value[-n:])), 0)
        if size:
            text = text[:start] + HIDDEN + rest[size:]
        position = start
    return text
