"""What a server says of what it was sent comes back without what was sent in confidence."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leoflow_celery.executors.core import HIDDEN, MAX_CHARACTERS, Confidential

SECRET = 'p<ä>"ss\\w$rd\nline two'


@pytest.mark.parametrize(
    "spelled",
    [
        SECRET,
        json.dumps(SECRET),
        json.dumps(SECRET, ensure_ascii=False),
        json.dumps(json.dumps(SECRET)),
        json.dumps(SECRET).replace("<", "\\u003c").replace(">", "\\u003e"),
        SECRET.replace("$", "$$"),
        base64.b64encode(SECRET.encode()).decode(),
        "line two",
    ],
)
def test_a_secret_is_hidden_however_it_is_spelled(spelled: str) -> None:
    text = Confidential([SECRET])(f"Invalid value: {spelled}: no")
    assert text.startswith("Invalid value: ")
    assert text.endswith(": no")
    assert HIDDEN in text
    assert "line two" not in text
    assert "ss\\w" not in text


@pytest.mark.parametrize("text", ["value: abcdefgh...", "value: abcdefgh", "more: ...klmnop: no", "more: …klmnop"])
def test_a_part_that_the_server_cut_off_is_hidden_as_well(text: str) -> None:
    shown = Confidential(["abcdefghijklmnop"])(text)
    assert "abcdef" not in shown
    assert "lmnop" not in shown


def test_a_short_value_is_hidden_where_it_stands_in_quotes() -> None:
    hide = Confidential(["1", 42])
    assert hide("expects \"1\" or '42', found 1 in 42") == f"expects \"{HIDDEN}\" or '{HIDDEN}', found 1 in 42"


def test_words_are_bounded_and_on_one_line() -> None:
    shown = Confidential([])("a\r\n\x1b[31mb\u202e" + "x" * 10_000)
    assert len(shown) == MAX_CHARACTERS
    assert shown.isprintable()
    assert "\x1b" not in shown


@given(st.text('abcxyz-_%$<&"\\', min_size=8, max_size=40))
def test_no_text_brings_it_back(secret: str) -> None:
    assert secret not in Confidential([secret])(f"server says: {secret}; {json.dumps(secret)} is wrong")


def test_all_texts_of_a_status_are_made_safe() -> None:
    data = {"causes": [{"message": "x s3cr3t y", "count": 2}], "name": None}
    assert Confidential(["s3cr3t"]).everywhere(data) == {
        "causes": [{"message": f"x {HIDDEN} y", "count": 2}],
        "name": None,
    }
