"""Lines on disk that come again are recognised, and only those."""

from __future__ import annotations

from pathlib import Path

import pytest

from leoflow_celery.gateway.log_writer import Replay, record_of
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.store.logs import LogLimits, LogRecord


def records(*texts: str) -> list[bytes]:
    found = [LogRecord(1_700_000_000 + number, "info", "stdout", text) for number, text in enumerate(texts)]
    return [record.line(LogLimits()) for record in found]


def disk(found: list[bytes]) -> bytes:
    return b"".join(found)


def test_what_is_on_disk_is_left_out_until_the_first_new_line() -> None:
    old, new = records("a", "b", "c", "d")[:3], records("a", "b", "c", "d")[3:]
    replay = Replay(disk(old))
    assert replay.fresh(old[1:2]) == ()
    assert replay.fresh([old[2], *new]) == new
    assert replay.fresh(old) == old, "the comparison is over: nothing comes again after a new line"


def test_lines_of_control_characters_are_recognised_although_they_are_longer_on_disk(tmp_path: Path) -> None:
    """As much as a stream may have waiting, and the line that fills it up."""
    sent = [LogRecord(float(number), "info", "stdout", "\x01" * 10_000).line(LogLimits()) for number in range(32)]
    path = tmp_path / "1.log"
    path.write_bytes(b'{"msg":"before"}\n' * 100_000 + disk(sent))
    assert Replay.of_file(path).fresh(sent) == ()


def test_as_many_as_are_on_disk() -> None:
    (same,) = records("a")
    assert Replay(disk([same, same])).fresh([same, same, same]) == [same]


def test_a_torn_line_is_new() -> None:
    one, two = records("a", "b")
    assert Replay(disk([one, two])[:-5]).fresh([one, two]) == [two]


def test_an_empty_log_compares_nothing() -> None:
    assert Replay(b"").fresh(records("a")) == records("a")


def test_a_line_gives_the_same_bytes_every_time() -> None:
    line = pb.LogLine(message="x \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), stream="stdout")
    line.time.FromNanoseconds(1_700_000_000_123_456_789)
    again = pb.LogLine.FromString(line.SerializeToString())
    assert record_of(line).to_json() == record_of(again).to_json()
    assert '"ts":"2023-11-14T22:13:20.123457+00:00"' in record_of(line).to_json()


@pytest.mark.parametrize(("seconds", "nanos"), [(0, 0), (-5, 0), (2**62, 0), (253_402_300_799, 999_999_999)])
def test_any_time_on_the_wire_can_be_stored(seconds: int, nanos: int) -> None:
    line = pb.LogLine(message="x")
    line.time.seconds, line.time.nanos = seconds, nanos
    assert record_of(line).to_json()


@pytest.mark.parametrize(
    ("level", "stream", "text", "expected"),
    [
        (pb.LOG_LEVEL_INFO, "stdout", "x", "info"),
        (pb.LOG_LEVEL_WARN, "stdout", "x", "warning"),
        (pb.LOG_LEVEL_UNSPECIFIED, "", "x", "info"),
        (pb.LOG_LEVEL_UNSPECIFIED, "stderr", "x", "error"),
        (pb.LOG_LEVEL_ERROR, "stderr", "DEBUG x", "debug"),
        (pb.LOG_LEVEL_INFO, "stdout", "Traceback (most recent call last):", "error"),
    ],
)
def test_levels(level: int, stream: str, text: str, expected: str) -> None:
    line = pb.LogLine(level=level, stream=stream, message=text)  # type: ignore[arg-type]
    assert record_of(line).level == expected
