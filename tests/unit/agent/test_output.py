from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from leoflow_celery.agent.output import LineSplitter


def split(*chunks: bytes, max_bytes: int = 16) -> list[str]:
    splitter = LineSplitter(max_bytes)
    lines = [line for chunk in chunks for line in splitter.feed(chunk)]
    return [*lines, *splitter.end()]


def test_lines_may_come_in_any_pieces():
    assert split(b"a", b"b\nc", b"\n", b"\nlast") == ["ab", "c", "", "last"]


def test_a_carriage_return_ends_a_line_and_makes_no_empty_one():
    assert split(b"a\r\nb\rc\n") == ["a", "b", "c"]
    assert split(b"\r 10%\r 20%\n") == [" 10%", " 20%"]
    assert split(b"a\r", b"\nb\n", b"\n") == ["a", "b", ""]


def test_a_line_that_has_not_ended_can_leave_and_makes_no_second_one():
    splitter = LineSplitter()
    assert list(splitter.feed("name? é".encode()[:-1])) == []
    assert list(splitter.flush()) == ["name? "]
    assert list(splitter.feed("é".encode()[1:] + b"\n\n")) == ["é", ""]
    assert list(splitter.feed(b"dots")) == []
    assert list(splitter.flush()) == ["dots"]
    assert list(splitter.feed(b"\nnext\n")) == ["next"]


def test_a_long_line_is_cut_and_its_newline_makes_no_empty_line():
    assert split(b"x" * 32, b"\n") == ["x" * 16, "x" * 16]
    assert split(b"x" * 33 + b"\n") == ["x" * 16, "x" * 16, "x"]


def test_a_cut_never_splits_a_character():
    assert split("é".encode() * 20, max_bytes=15) == ["é" * 7, "é" * 7, "é" * 6]


def test_bytes_that_are_no_text_are_replaced():
    assert split(b"\xff\x00a\n") == ["\ufffd\0a"]


@given(st.binary(max_size=200).filter(lambda data: b"\r" not in data), st.integers(5, 40), st.integers(1, 20))
def test_nothing_is_lost_however_it_is_fed(data, max_bytes, step):
    whole = split(data, max_bytes=max_bytes)
    assert split(*(data[i : i + step] for i in range(0, len(data), step)), max_bytes=max_bytes) == whole
    # Replacement works per piece, so compare what is valid text only.
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    assert "".join(whole) == text.replace("\n", "")
