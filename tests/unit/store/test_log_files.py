"""Log files: where they lie, that no id escapes, and what a pruning leaves."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from leoflow_celery.domain.fields import MAX_ID_BYTES
from leoflow_celery.store.logs import LogKey, LogRecord, LogStore, LogWriter, refine_level, safe_component

HOSTILE_IDS = (
    "..",
    ".",
    "",
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "nul\x00byte",
    "line\nbreak",
    "\udcff",
    "x" * 300,
    "é" * 300,
    "日本語" * 100,
    "🚀" * 300,
    "~",
    "-rf",
    " ",
    "con:",
)
KEY = LogKey("default", "sales", "manual:2026-01-01T00:00:00+00:00", "extract", 1)


@pytest.fixture
def store(tmp_path: Path) -> LogStore:
    return LogStore(tmp_path / "logs")


def write(store: LogStore, key: LogKey, *texts: str) -> None:
    with store.writer(key) as writer:
        writer.append([LogRecord(1_700_000_000.25, "info", "stdout", text) for text in texts])


def messages(store: LogStore, key: LogKey = KEY) -> list[str]:
    return [line["msg"] for line in store.read(key)]


def test_the_documented_place_and_line(store: LogStore) -> None:
    write(store, KEY, "zwölf 🚀")
    path = store.root / "default/sales/manual:2026-01-01T00:00:00+00:00/extract/1.log"
    expected = '{"ts":"2023-11-14T22:13:20.250000+00:00","level":"info","stream":"stdout","msg":"zwölf 🚀"}\n'
    assert path.read_text() == expected
    assert path.stat().st_mode & 0o007 == 0


@pytest.mark.parametrize("hostile", HOSTILE_IDS)
@pytest.mark.parametrize("field", ["tenant_id", "dag_id", "run_id", "task_id"])
def test_no_id_escapes_the_root(store: LogStore, field: str, hostile: str) -> None:
    ids = {"tenant_id": "t", "dag_id": "d", "run_id": "r", "task_id": "k", field: hostile}
    key = LogKey(**ids, try_number=1)
    write(store, key, "here")
    assert messages(store, key) == ["here"]
    [file] = [path for path in store.root.rglob("*") if path.is_file()]
    assert len(file.relative_to(store.root).parts) == 5
    assert file == store.path(key)
    assert file.resolve().is_relative_to(store.root.resolve())
    assert all(len(part.encode()) <= 255 for part in file.parts)


def test_different_ids_never_share_a_file() -> None:
    ids = [*HOSTILE_IDS, "a_b", "x" * 301, "x" * MAX_ID_BYTES, "é" * 301, "etc", ".. ", "a b", "A_B"]
    assert len({safe_component(text) for text in ids}) == len(ids)


@pytest.mark.parametrize(
    "text", ["extract", "manual__2026-01-01", "scheduled:2026-01-01T00:00:00+00:00", "größe", "a b=c"]
)
def test_ordinary_ids_stay_readable(text: str) -> None:
    assert safe_component(text) == text


def test_lines_of_any_text_and_time_are_kept(store: LogStore) -> None:
    texts = ["", "two\nlines", "\u2028", "\x00", "x" * 60_000]
    write(store, KEY, *texts)
    assert messages(store) == texts
    with store.writer(KEY) as writer:
        writer.append([LogRecord(moment, "info", "stdout", "lone \udcff") for moment in (1e30, -1e30, float("nan"))])
    assert messages(store)[len(texts) :] == ["lone ?"] * 3


def test_a_torn_line_is_no_line_and_the_next_writer_starts_a_new_one(store: LogStore) -> None:
    write(store, KEY, "whole")
    with store.path(KEY).open("ab") as file:
        file.write(b'{"ts":"2026-01-01T00:00:00+00:00","level":"info","msg":"to')
    assert messages(store) == ["whole"]
    assert [line["msg"] for line in store.tail(KEY)] == ["whole"]
    write(store, KEY, "after")
    assert messages(store) == ["whole", "after"]
    write(store, KEY, "again")
    assert store.path(KEY).read_bytes().count(b"\n") == 4


@pytest.mark.parametrize("junk", [b"\xff\xfe\n", b"[1]\n", b"17\n", b"\n", b"null\n"])
def test_what_is_no_record_is_left_out(store: LogStore, junk: bytes) -> None:
    write(store, KEY, "one")
    with store.path(KEY).open("ab") as file:
        file.write(junk)
    write(store, KEY, "two")
    assert messages(store) == ["one", "two"]


def test_a_log_that_does_not_exist_has_no_lines_and_is_not_made(store: LogStore) -> None:
    assert messages(store) == []
    assert store.tail(KEY) == []
    assert not store.root.exists()


def test_the_tail_starts_with_a_whole_line(store: LogStore) -> None:
    write(store, KEY, *(f"line {n}" for n in range(1_000)))
    tail = [line["msg"] for line in store.tail(KEY, max_bytes=500)]
    assert tail == [f"line {n}" for n in range(1_000 - len(tail), 1_000)]
    assert 3 < len(tail) < 10
    assert len(store.tail(KEY)) == 1_000


def test_a_failure_keeps_the_last_fifty_lines_shortened(store: LogStore) -> None:
    write(store, KEY, *(f"line {n}" for n in range(60)), "x" * 10_000)
    assert store.last_lines(KEY) == (*(f"line {n}" for n in range(11, 60)), "x" * 2_000)


def test_a_log_that_cannot_be_read_leaves_a_failure_without_lines(store: LogStore) -> None:
    assert store.last_lines(KEY) == ()
    store.path(KEY).mkdir(parents=True)
    assert store.last_lines(KEY) == ()


def test_a_closed_writer_can_be_closed_again(store: LogStore) -> None:
    writer = store.writer(KEY)
    writer.append([])
    writer.close()
    writer.close()


def test_pruning_removes_old_logs_and_the_directories_they_leave(store: LogStore) -> None:
    old, young = KEY, LogKey("default", "other", "r", "t", 1)
    write(store, old, "old")
    write(store, young, "young")
    stranger = store.path(old).with_name("notes.txt")
    stranger.write_text("not ours")
    for path in (store.path(old), stranger):
        os.utime(path, (time.time() - 1_000,) * 2)
    assert store.prune(0) == 0
    assert store.prune(2_000) == 0
    assert store.prune(500) == 1
    assert not store.path(old).exists()
    assert stranger.exists()
    assert messages(store, young) == ["young"]
    stranger.unlink()
    store.prune(500)
    assert [path.name for path in store.root.iterdir()] == ["default"]
    assert [path.name for path in (store.root / "default").iterdir()] == ["other"]


def test_pruning_what_is_not_there(store: LogStore) -> None:
    assert store.prune(1) == 0


def test_a_writer_gets_its_file_although_its_directory_is_pruned_meanwhile(
    store: LogStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.open, []

    def pruned_once(path: Path, *arguments: int) -> int:
        calls.append(path)
        if len(calls) == 2:  # the first one found no directory and made it
            store.prune(1_000)
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", pruned_once)
    LogWriter(store.path(KEY)).close()
    assert len(calls) == 3
    assert store.path(KEY).exists()


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("2026-01-01 ERROR something", "error"),
        ("CRITICAL: disk", "error"),
        ("FATAL", "error"),
        ("Traceback (most recent call last):", "error"),
        ("  + Exception Group Traceback (most recent call last):", "error"),
        ("WARN slow", "warning"),
        ("WARNING: slow", "warning"),
        ("DEBUG x=1", "debug"),
        ("INFO retry after ERROR", "error"),
        ("INFO hello", "info"),
        ("TERRORS and WARNINGS", "info"),
        ("no level at all", "info"),
        ("x" * 10_000 + " ERROR", "info"),
    ],
)
def test_a_line_names_its_own_level(text: str, level: str) -> None:
    assert refine_level(text) == level


def test_a_line_without_a_level_has_the_streams() -> None:
    assert refine_level("plain", "error") == "error"
    assert refine_level("INFO plain", "error") == "info"
