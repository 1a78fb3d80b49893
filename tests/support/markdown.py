"""The fenced code blocks of a Markdown page, in order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^( *)```(\w*)(.*)$")


@dataclass(frozen=True)
class Block:
    """One code block: its language, the ``title`` behind it, its text, and the line where it begins."""

    page: Path
    line: int
    language: str
    title: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page.

    Raises:
        AssertionError: a block is not closed.
    """
    lines = iter(enumerate(page.read_text().splitlines(), 1))
    for number, line in lines:
        if not (opening := _FENCE.match(line)):
            continue
        indent, language, rest = opening.groups()
        title = re.search(r'title="([^"]*)"', rest)
        text = []
        for _, inner in lines:
            if inner.strip() == "```":
                break
            text.append(inner.removeprefix(indent))
        else:
            raise AssertionError(f"{page}:{number}: a code block without an end")
        yield Block(page, number, language, title[1] if title else "", "\n".join(text) + "\n")
