"""The clocks of servers, and where a host's own clock may be looked at."""

from __future__ import annotations

import ast
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from celery.app.task import Context
from cryptography.fernet import Fernet

import leoflow_celery
from leoflow_celery import metrics
from leoflow_celery.app.extras import note_expired
from leoflow_celery.clock import ServerClock
from leoflow_celery.errors import MessageExpired
from leoflow_celery.queueing import messages
from leoflow_celery.security import KeyRing

PACKAGE = Path(leoflow_celery.__file__).parent
#: Why each of these may look at its host's wall clock. Nothing of it may be compared with another host's.
ALLOWED = {
    "clock.py": "measures how far it is off",
    "agent/logs.py": "shown to people",
    "beat_schedule.py": "against the time of its own last look",
    "cli/progress.py": "shown to people",
    "cli/runs.py": "a name",
    "lite/driver.py": "inside one process",
    "executors/inline_http/failure.py": "against an HTTP date of a stranger, bounded",
    "gateway/exchange.py": "the cluster decides; this only spares asking",
    "gateway/heartbeats.py": "shown to agents",
    "gateway/lifecycle.py": "shown to agents",
    "gateway/log_writer.py": "shown to people",
    "queueing/dead_letters.py": "shown to people; the bound of an eta",
    "store/logs.py": "the file system's own times; shown to people",
    "store/xcom/redis.py": "shown to people",
    "tasks/inline.py": "shown to people",
}


def looks(path: Path) -> bool:
    """Whether a module reads the wall clock."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            if name in ("time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "date.today"):
                return True
    return False


def test_every_look_at_a_hosts_own_clock_has_a_reason() -> None:
    looking = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if looks(path)}
    assert looking == ALLOWED.keys()


def test_a_servers_clock_is_read_once_and_goes_on_by_our_monotonic_one(monkeypatch: pytest.MonkeyPatch) -> None:
    own, monotonic = 1_000.0, 50.0
    monkeypatch.setattr("leoflow_celery.clock.time.time", lambda: own)
    monkeypatch.setattr("leoflow_celery.clock.time.monotonic", lambda: monotonic)
    clock = ServerClock()
    assert (clock.time(), clock.offset_seconds) == (1_000.0, None)
    clock.read(lambda: 880.0)
    assert (clock.time(), clock.offset_seconds) == (880.0, 120.0)
    own, monotonic = 5_000.0, 60.0  # somebody set our clock
    assert clock.time() == 890.0


def test_the_date_of_an_answer_is_the_servers_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monotonic = 50.0
    monkeypatch.setattr("leoflow_celery.clock.time.monotonic", lambda: monotonic)
    clock = ServerClock()
    clock.read_date("Thu, 01 Jan 1970 00:16:40 GMT", sent_at=48.0)
    assert clock.time() == 1_001.5  # half of the two seconds that it took, and of the second that was cut off
    monotonic = 60.0
    for nothing in (None, "", "yesterday", "Thu, 01 Jan 99999 00:00:00 GMT"):
        clock.read_date(nothing, sent_at=59.0)
    assert clock.time() == 1_011.5


def test_an_expired_message_is_counted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    request = Context(delivery_info={"routing_key": "maintenance"}, task="leoflow.maintenance.reap", id="1")
    before = _expired()
    with caplog.at_level("WARNING"):
        note_expired(request=request, expired=False)
        note_expired(request=request, expired=True)
    assert _expired() == before + 1
    assert [record.message for record in caplog.records] == ["message.expired"]


def _expired() -> float:
    lines = metrics.exposition().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("leoflow_messages_expired_total{"))


def test_beat_goes_on_when_its_clock_was_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEOFLOW_BROKER_URL", "redis://127.0.0.1:1/0")
    from leoflow_celery.beat_schedule import Every

    every, now = Every(15), datetime.now(UTC)
    assert every.is_due(now + timedelta(hours=1)).is_due
    assert every.is_due(now - timedelta(seconds=16)).is_due
    assert not every.is_due(now).is_due


def test_what_a_message_is_good_for_is_measured_by_the_brokers_clock_on_both_sides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys, broker = KeyRing(Fernet.generate_key().decode()), 1_000.0
    clocks = {"sender": ServerClock(), "receiver": ServerClock()}

    def is_at(name: str) -> None:
        clocks[name].read(lambda: broker)
        monkeypatch.setattr(messages, "broker_clock", clocks[name])

    is_at("sender")
    sealed = messages.seal_message(keys, "k8s", messages.Stop("pod", 3), good_for_seconds=15)
    broker += 14
    # The receiver's own clock says decades later; nobody asks it.
    is_at("receiver")
    assert messages.open_message(keys, "k8s", messages.Stop, sealed) == messages.Stop("pod", 3)
    broker += 2
    is_at("receiver")
    with pytest.raises(MessageExpired, match="16 s old"):
        messages.open_message(keys, "k8s", messages.Stop, sealed)
