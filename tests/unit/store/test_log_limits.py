"""What a log may cost, and that it says so itself."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from leoflow_celery.store.logs import LogKey, LogLimits, LogRecord, LogStore, cut_text

KEY = LogKey("acme", "sales", "r1", "load", 1)


def line(text: str, stream: str = "stdout") -> LogRecord:
    return LogRecord(1.0, "info", stream, text)


@pytest.mark.parametrize("text", ["x" * 9_000, "\x01" * 9_000, "\u202e" * 9_000, "\U0001f600" * 9_000, "a\x00" * 4_000])
def test_a_line_is_cut_to_its_limit_with_its_escapes_and_says_so(text: str) -> None:
    found = line(text, stream="s\x02" * 500).line(LogLimits(line_bytes=2_000))
    assert len(found) <= 2_000
    assert f"cut here: {len(text)} characters" in json.loads(found)["msg"]
    assert text.startswith(json.loads(found)["msg"].partition("…")[0])


def test_a_line_that_fits_is_whole_and_a_cut_one_is_not_cut_again() -> None:
    assert cut_text("x" * 1_600, 2_000) == "x" * 1_600
    once = cut_text("\x01" * 5_000, 2_000)
    assert cut_text(once, 2_000) == once


def test_a_full_log_ends_with_the_reason_once_whoever_writes_next(tmp_path: Path) -> None:
    store = LogStore(tmp_path, LogLimits(try_bytes=65_536))
    for _ in range(3):
        with store.writer(KEY) as writer:
            for number in range(400):
                writer.append([line(f"{number} \x01\x02"), line("")])
    assert store.path(KEY).stat().st_size < 65_536 + 500
    messages = [found["msg"] for found in store.read(KEY)]
    assert messages[0].startswith("0 ")
    assert "LEOFLOW_LOGS_MAX_TRY_BYTES" in messages[-1]
    assert sum("LEOFLOW_LOGS_MAX_TRY_BYTES" in message for message in messages) == 1


def test_a_long_line_of_an_old_log_is_read_in_linear_time(tmp_path: Path) -> None:
    store = LogStore(tmp_path)
    path = store.path(KEY)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"msg": "\x01" * (8 << 20)}) + "\n" + json.dumps({"msg": "next"}) + "\n")
    started = time.process_time()
    assert [len(found["msg"]) for found in store.read(KEY)] == [8 << 20, 4]
    assert time.process_time() - started < 5, "joining what was read again with every block takes half a minute"


def test_the_tail_of_a_failure_holds_the_longest_line(tmp_path: Path) -> None:
    store = LogStore(tmp_path)
    with store.writer(KEY) as writer:
        writer.append([line("\x01" * 500_000)])
    assert len(store.last_lines(KEY)) == 1
