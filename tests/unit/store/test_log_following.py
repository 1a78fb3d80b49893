"""Following a log while others write it: every line once, in order, whole."""

from __future__ import annotations

import threading
from itertools import islice
from pathlib import Path

from leoflow_celery.store.logs import LogKey, LogRecord, LogStore

KEY = LogKey("default", "sales", "r", "extract", 1)


def record(text: str) -> LogRecord:
    return LogRecord(0, "info", "stdout", text)


def test_a_follower_sees_every_line_of_concurrent_writers(tmp_path: Path) -> None:
    store, ended, batches = LogStore(tmp_path), threading.Event(), 200

    def write(number: int) -> None:
        with store.writer(KEY) as writer:
            for batch in range(batches):
                # Larger than a pipe or page: a torn write would show.
                writer.append([record(f"{number}:{batch}:{part}:{'x' * 1_500}") for part in range(5)])

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]

    def run() -> None:
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        ended.set()

    conductor = threading.Thread(target=run)
    conductor.start()
    seen = [line["msg"].split(":")[:3] for line in store.follow(KEY, ended.is_set, poll_seconds=0.001)]
    conductor.join()
    assert len(seen) == 4 * batches * 5
    for number in range(4):
        mine = [(int(batch), int(part)) for who, batch, part in seen if who == str(number)]
        assert mine == [(batch, part) for batch in range(batches) for part in range(5)]


def test_a_follower_waits_for_a_log_that_does_not_exist_yet_and_for_half_a_line(tmp_path: Path) -> None:
    store, ended, seen = LogStore(tmp_path), threading.Event(), []
    lines = store.follow(KEY, ended.is_set, poll_seconds=0.001)
    first = threading.Thread(target=lambda: seen.extend(islice(lines, 2)))
    first.start()
    with store.writer(KEY) as writer:
        writer.append([record("one")])
    whole = f"{record('two').to_json()}\n".encode()
    with store.path(KEY).open("ab", buffering=0) as file:
        file.write(whole[:20])
        file.write(whole[20:])
    first.join(10)
    assert [line["msg"] for line in seen] == ["one", "two"]
    ended.set()
    assert list(lines) == []


def test_the_last_lines_are_read_although_the_end_was_known_before(tmp_path: Path) -> None:
    """The end is asked for before each look: what was written before it is never missed."""
    store = LogStore(tmp_path)

    def ended() -> bool:
        with store.writer(KEY) as writer:
            writer.append([record("last words")])
        return True

    assert [line["msg"] for line in store.follow(KEY, ended)] == ["last words"]
