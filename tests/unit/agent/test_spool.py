from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leoflow_celery.agent import logs
from leoflow_celery.agent.logs import Spool


@pytest.fixture
def spool():
    spool = Spool(100)
    yield spool
    spool.close()


def test_records_are_numbered_from_one(spool):
    assert spool.append(b"a")
    assert spool.append(b"bc")
    assert (spool.first, spool.next) == (1, 3)
    assert (spool.read(1), spool.read(2)) == (b"a", b"bc")


def test_it_is_full_at_its_capacity_and_free_again_after_a_release(spool):
    assert spool.append(b"x" * 60)
    assert not spool.append(b"y" * 41)
    assert spool.append(b"y" * 40)
    assert spool.fill == 1.0
    spool.release(1)
    assert spool.append(b"z" * 60)
    assert (spool.read(2), spool.read(3)) == (b"y" * 40, b"z" * 60)


def test_releasing_twice_or_too_much_is_harmless(spool):
    spool.append(b"a")
    spool.release(99)
    spool.release(0)
    assert (spool.first, spool.next, spool.used_bytes) == (2, 2, 0)


def test_without_a_writable_directory_it_is_small_and_in_memory(monkeypatch):
    def refuse(**_):
        raise OSError("read-only file system")

    monkeypatch.setattr(logs.tempfile, "mkstemp", refuse)
    spool = Spool(1 << 30)
    assert spool.append(b"a")
    assert spool.read(1) == b"a"
    assert spool.fill >= 1 / (4 << 20)
    spool.close()


@given(st.lists(st.one_of(st.binary(min_size=1, max_size=60), st.integers(0, 5)), max_size=200))
def test_it_behaves_as_a_bounded_queue(steps):
    spool, model = Spool(128), deque()
    try:
        for step in steps:
            if isinstance(step, bytes):
                fits = sum(map(len, model)) + len(step) <= 128
                assert spool.append(step) is fits
                if fits:
                    model.append(step)
            else:
                spool.release(spool.first - 1 + min(step, len(model)))
                for _ in range(min(step, len(model))):
                    model.popleft()
            assert [spool.read(n) for n in range(spool.first, spool.next)] == list(model)
    finally:
        spool.close()


def test_its_index_does_not_grow_with_time():
    spool = Spool(1_000)
    for number in range(1, 50_001):
        spool.append(b"0123456789")
        spool.release(number)
    assert len(spool._starts) < 20_000
    assert spool.append(b"last")
    assert spool.read(50_001) == b"last"
    spool.close()
