"""What every XCom back end keeps, forgets and tells apart."""

from __future__ import annotations

import os
import time

import pytest
import sqlalchemy as sa

from leoflow_celery.domain.xcom import MAX_VALUE_BYTES, XComKey, XComValue, check_value
from leoflow_celery.errors import XComRejected
from leoflow_celery.store import Store
from leoflow_celery.store.models import XCom, table_of
from leoflow_celery.store.xcom import XComStore
from tests.contract.store.rows import race
from tests.contract.xcom.conftest import StoreFactory

KEY = XComKey("default", "sales", "run-1", "extract")

#: Everything a run id may hold that a key or a pattern could trip over.
HOSTILE_RUNS = (
    "r",
    "r:2",
    "r:*",
    "r?",
    "r*",
    "[a-z]",
    "r\\*",
    "r:t:return_value",
    "scheduled:2026-01-01T00:00:00",
    "é%3A:",
)


def put(xcom: XComStore, key: XComKey, value: bytes = b"1") -> None:
    xcom.put([(key, XComValue(value))])


def test_a_value_comes_back_with_its_type_and_time(xcom: XComStore) -> None:
    assert xcom.get(KEY) is None
    before = time.time()
    xcom.put([(KEY, XComValue(b'{"rows": 3}'))])
    found = xcom.get(KEY)
    assert found is not None
    assert (found.value, found.content_type) == (b'{"rows": 3}', "application/json")
    assert before - 1 <= found.created_at <= time.time() + 1
    xcom.put([(KEY, XComValue(b"\x00\xff", "application/octet-stream", 1_000.5))])
    assert xcom.get(KEY) == XComValue(b"\x00\xff", "application/octet-stream", 1_000.5)


def test_the_last_value_of_a_key_wins_also_in_one_call(xcom: XComStore) -> None:
    put(xcom, KEY, b"1")
    xcom.put([(KEY, XComValue(b"2")), (KEY, XComValue(b"3"))])
    found = xcom.get(KEY)
    assert found is not None
    assert found.value == b"3"
    assert len(xcom.of_run("default", "sales", "run-1")) == 1
    xcom.put([])


def test_a_value_of_exactly_the_limit_is_kept_whole(xcom: XComStore) -> None:
    value = b'"' + os.urandom((MAX_VALUE_BYTES - 2) // 2).hex().encode() + b'"'
    assert len(value) == 262_144
    check_value(value)
    put(xcom, KEY, value)
    found = xcom.get(KEY)
    assert found is not None
    assert found.value == value
    with pytest.raises(XComRejected) as rejected:
        check_value(value + b" ")
    assert rejected.value.reason == "payload_too_large"


def test_the_sizes_of_a_runs_values_are_told_without_them(xcom: XComStore, store_with: StoreFactory) -> None:
    assert xcom.sizes_of_run("default", "sales", "run-1") == []
    put(xcom, KEY, "ü".encode())
    put(xcom, XComKey("default", "sales", "run-1", "extract", "a:b"), b"\x00" * 1_000)
    put(xcom, XComKey("default", "sales", "run-2", "extract"))
    put(store_with(ttl_seconds=-1).xcom, XComKey("default", "sales", "run-3", "extract"))
    assert xcom.sizes_of_run("default", "sales", "run-3") == []
    found = [(key.task_id, key.key, size) for key, size in xcom.sizes_of_run("default", "sales", "run-1")]
    assert found == [("extract", "a:b", 1_000), ("extract", "return_value", 2)]


def test_expired_values_are_gone(store_with: StoreFactory) -> None:
    brief, lasting = store_with(ttl_seconds=-1).xcom, store_with(ttl_seconds=60).xcom
    put(brief, KEY)
    assert lasting.get(KEY) is None
    assert lasting.of_run("default", "sales", "run-1") == []
    put(lasting, KEY, b"2")
    assert lasting.delete_expired() == 0
    assert lasting.get(KEY) is not None
    put(brief, KEY, b"3")
    lasting.delete_expired()
    assert lasting.get(KEY) is None
    assert lasting.delete_expired() == 0


def test_many_expired_values_go_in_transactions_of_bounded_size(
    sql_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leoflow_celery.store.xcom.sql.CHUNK_ROWS", 2)
    for n in range(6):
        put(sql_store.xcom, XComKey("default", "sales", "run-1", "extract", f"key-{n}"))
    table, sizes = table_of(XCom), []
    with sql_store.database.transaction() as connection:
        expired = sa.update(table).where(table.c.key != "key-3").values(expires_at=time.time() - 1)
        connection.execute(expired)
    sa.event.listen(
        sql_store.database.engine, "after_cursor_execute", lambda _conn, cursor, *_: sizes.append(cursor.rowcount)
    )
    assert sql_store.xcom.delete_expired() == 5
    assert [size for size in sizes if size > 0] == [2, 2, 1]
    assert [key.key for key, _ in sql_store.xcom.of_run("default", "sales", "run-1")] == ["key-3"]


def test_the_values_of_a_run_in_order(xcom: XComStore) -> None:
    for task, key in (("load", "return_value"), ("extract", "rows"), ("extract", "a:b")):
        put(xcom, XComKey("default", "sales", "run-1", task, key))
    for other in (("other", "sales", "run-1"), ("default", "other", "run-1"), ("default", "sales", "run-10")):
        put(xcom, XComKey(*other, "extract"))
    found = [(key.task_id, key.key) for key, _ in xcom.of_run("default", "sales", "run-1")]
    assert found == [("extract", "a:b"), ("extract", "rows"), ("load", "return_value")]
    assert xcom.of_run("default", "sales", "never") == []


def test_a_run_of_many_values(xcom: XComStore) -> None:
    xcom.put([(XComKey("default", "sales", "big", f"t{n:04}"), XComValue(b"%d" % n)) for n in range(1_050)])
    found = xcom.of_run("default", "sales", "big")
    assert [value.value for _, value in found] == [b"%d" % n for n in range(1_050)]


@pytest.mark.parametrize("run_id", HOSTILE_RUNS)
def test_runs_whose_ids_look_like_each_other_stay_apart(xcom: XComStore, run_id: str) -> None:
    for run in HOSTILE_RUNS:
        put(xcom, XComKey("default", "sales", run, "t", "k"), run.encode())
    for run in HOSTILE_RUNS:
        [(key, value)] = xcom.of_run("default", "sales", run)
        assert (key.run_id, value.value) == (run, run.encode())
    xcom.delete_task("default", "sales", run_id, "t")
    left = [run for run in HOSTILE_RUNS if xcom.get(XComKey("default", "sales", run, "t", "k"))]
    assert left == [run for run in HOSTILE_RUNS if run != run_id]


def test_a_colon_in_a_key_is_not_a_colon_in_a_run(xcom: XComStore) -> None:
    twins = [
        XComKey("default", "sales", "r:t", "x", "k"),
        XComKey("default", "sales", "r", "t", "x:k"),
        XComKey("default", "sales", "r", "t", "x%3Ak"),
    ]
    for key in twins:
        put(xcom, key, repr(key).encode())
    for key in twins:
        found = xcom.get(key)
        assert found is not None
        assert found.value == repr(key).encode()
    xcom.delete_task("default", "sales", "r:t", "x")
    assert [xcom.get(key) is None for key in twins] == [True, False, False]


def test_deleting_a_task_forgets_all_its_keys_and_nothing_else(xcom: XComStore) -> None:
    for task, key in (("t", "a"), ("t", "b:c"), ("t*", "a"), ("tt", "a")):
        put(xcom, XComKey("default", "sales", "run-1", task, key))
    xcom.delete_task("default", "sales", "run-1", "t")
    xcom.delete_task("default", "sales", "run-1", "t")
    assert {key.task_id for key, _ in xcom.of_run("default", "sales", "run-1")} == {"t*", "tt"}
    put(xcom, XComKey("default", "sales", "run-1", "t", "a"))
    assert len(xcom.of_run("default", "sales", "run-1")) == 3


def test_threads_that_write_one_key_leave_one_whole_value(xcom: XComStore) -> None:
    values = [str(n).encode() * 10_000 for n in range(10)]
    results = race(10, lambda number: put(xcom, KEY, values[number]))
    assert results == [None] * 10
    found = xcom.get(KEY)
    assert found is not None
    assert found.value in values
