"""What others chose never commands the terminal of whoever looks at it."""

from __future__ import annotations

import json

import pytest

from leoflow_celery.cli.output import echo_json, json_text, log_line, note, table
from leoflow_celery.domain.fields import is_printable

HOSTILE = "a\x1b[2J\x1b]0;t\x07\x9b31m\x85\u202eb\u200b\u2066\u2028\r\x7f\ufeffend"


def obeyed(text: str) -> list[str]:
    return [one for one in text if one != "\n" and not is_printable(one)]


def test_lines_notes_and_tables_show_what_they_would_obey(capsys: pytest.CaptureFixture[str]) -> None:
    note(HOSTILE)
    table(HOSTILE, ("id",), [(HOSTILE,)])
    said = capsys.readouterr()
    assert not obeyed(said.out + said.err + log_line({"msg": HOSTILE, "stream": "agent", "level": HOSTILE}))
    assert "\\x1b[2J" in said.err


def test_json_is_exact_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    value = {HOSTILE: [HOSTILE, "é", "\U000e0041"]}
    echo_json(value)
    said = capsys.readouterr().out
    assert not obeyed(said)
    assert json.loads(said) == json.loads(json_text(value)) == value


def test_a_tab_stays_a_tab() -> None:
    assert log_line({"msg": "a\tb"}).endswith("a\tb")
