"""StreamLogs over real connections: every acknowledged line is on disk, each once, and only the holder writes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

import grpc
import pytest

from leoflow_celery.protocol import agent_pb2 as pb
from tests.integration.gateway.harness import World, line
from tests.support.waiting import wait_until


def test_lines_become_json_with_refined_levels(world: World) -> None:
    request = world.submit()
    agent = world.agent(request)
    agent.run()
    logs = agent.logs()
    logs.send(
        line(1, "plain"),
        line(2, "to stderr", "stderr", pb.LOG_LEVEL_ERROR),
        line(3, "INFO although on stderr", "stderr", pb.LOG_LEVEL_ERROR),
        line(4, "WARN: disk", "stdout", pb.LOG_LEVEL_UNSPECIFIED),
        line(5, "no level", "stderr", pb.LOG_LEVEL_UNSPECIFIED),
        line(6, 'quote " newline \n and ünïcode', "agent", pb.LOG_LEVEL_DEBUG),
    )
    wait_until(lambda: logs.acked == 6, 5)
    text = world.store.logs.path(world.log_key(request)).read_text()
    found = [json.loads(entry) for entry in text.splitlines()]
    assert [(entry["level"], entry["stream"]) for entry in found] == [
        ("info", "stdout"),
        ("error", "stderr"),
        ("info", "stderr"),
        ("warning", "stdout"),
        ("error", "stderr"),
        ("debug", "agent"),
    ]
    assert found[0] == {
        "ts": "2023-11-14T22:13:20.001000+00:00",
        "level": "info",
        "stream": "stdout",
        "msg": "plain",
    }
    assert found[5]["msg"] == 'quote " newline \n and ünïcode'
    logs.end()
    logs.join()
    assert logs.error is None


def test_many_lines_and_long_ones_arrive_in_order(sqlite_world: World) -> None:
    request = sqlite_world.submit()
    agent = sqlite_world.agent(request)
    agent.run()
    logs = agent.logs()
    texts = [f"{number} " + "x" * (60_000 if number == 500 else number % 200) for number in range(1, 5_001)]
    logs.send(*(line(number, text) for number, text in enumerate(texts, 1)))
    logs.end()
    logs.join(30)
    assert logs.acked == 5_000
    assert len(logs.acks) < 2_500, "acknowledgements are batched"
    assert sqlite_world.log(request) == texts


@pytest.mark.parametrize("registered", [True, False])
def test_an_attempt_has_a_handful_of_streams_at_most(sqlite_world: World, registered: bool) -> None:
    """Each costs the gateway memory, a file and questions to SQL, and whoever has the token could open thousands."""
    agent = sqlite_world.agent(sqlite_world.submit(), session=None)
    if registered:
        agent.run()
    streams = [agent.logs() for _ in range(20)]
    wait_until(lambda: sum(stream.error is not None for stream in streams) == 4, 10, "four to be refused")
    refused = next(stream for stream in streams if stream.error is not None)
    assert refused.code is grpc.StatusCode.UNAVAILABLE
    other = sqlite_world.agent(sqlite_world.submit("ti-2", task_id="other"))
    other.run()
    logs = other.logs()
    logs.send(line(1))
    wait_until(lambda: logs.acked == 1, 5)
    open_ones = [stream for stream in streams if stream.error is None]
    for stream in open_ones:
        stream.cancel()
    if not registered:
        agent.run()
    again = agent.logs()
    again.send(line(1))
    wait_until(lambda: again.acked == 1 or again.error is not None, 10)
    assert again.acked == 1


def test_a_stream_may_be_opened_before_register(world: World) -> None:
    request = world.submit()
    agent = world.agent(request)
    logs = agent.logs()
    logs.send(line(1), line(2))
    assert not world.store.logs.path(world.log_key(request)).exists()
    agent.register()
    wait_until(lambda: logs.acked == 2, 5)
    logs.end()
    logs.join()
    assert world.log(request) == ["line 1", "line 2"]


def test_a_follower_sees_a_line_within_half_a_second(sqlite_world: World) -> None:
    request = sqlite_world.submit()
    agent = sqlite_world.agent(request)
    agent.run()
    seen: list[tuple[str, float]] = []
    ended = threading.Event()

    def follow() -> None:
        entries = sqlite_world.store.logs.follow(sqlite_world.log_key(request), ended.is_set, 0.02)
        seen.extend((entry["msg"], time.monotonic()) for entry in entries)

    follower = threading.Thread(target=follow)
    follower.start()
    logs = agent.logs()
    try:
        for number in range(1, 4):
            sent = time.monotonic()
            logs.send(line(number))
            wait_until(lambda: len(seen) == number, 5)  # noqa: B023
            assert seen[-1][1] - sent < 0.5
    finally:
        ended.set()
        follower.join()
        logs.end()
        logs.join()


def test_lines_sent_again_after_a_reconnect_are_written_once(sqlite_world: World) -> None:
    request = sqlite_world.submit()
    agent = sqlite_world.agent(request)
    agent.run()
    first = agent.logs()
    first.send(*(line(number) for number in range(1, 6)))
    wait_until(lambda: first.acked == 5)
    first.cancel()
    second = agent.logs()
    second.send(*(line(number) for number in range(3, 9)))
    second.end()
    second.join()
    assert second.acked == 8
    assert sqlite_world.log(request) == [f"line {number}" for number in range(1, 9)]


def test_a_gateway_restart_neither_loses_nor_doubles_lines(world: World) -> None:
    request = world.submit()
    agent = world.agent(request)
    agent.run()
    logs = agent.logs()
    logs.send(*(line(number, "the same text") for number in range(1, 4)), line(4, "the same text"))
    wait_until(lambda: logs.acked == 4)
    world.restart()
    logs.join()
    assert logs.code is grpc.StatusCode.UNAVAILABLE
    again = world.agent(request, session=agent.session)
    resent = again.logs()
    resent.send(*(line(number, "the same text") for number in range(2, 7)))
    resent.end()
    resent.join()
    assert resent.acked == 6
    assert world.log(request) == ["the same text"] * 6


def test_an_agent_without_a_session_may_begin_its_numbers_anew(sqlite_world: World) -> None:
    request = sqlite_world.submit()
    agent = sqlite_world.agent(request, session=None)
    agent.run()
    for text in ("before", "after"):
        logs = agent.logs()
        logs.send(line(1, text))
        logs.end()
        logs.join()
        assert logs.acked == 1
    assert sqlite_world.log(request) == ["before", "after"]


def test_a_torn_line_is_sent_again_whole(sqlite_world: World) -> None:
    request = sqlite_world.submit()
    agent = sqlite_world.agent(request)
    agent.run()
    logs = agent.logs()
    logs.send(line(1), line(2))
    wait_until(lambda: logs.acked == 2)
    sqlite_world.gateway.stop()  # type: ignore[union-attr]
    logs.join()
    path = sqlite_world.store.logs.path(sqlite_world.log_key(request))
    path.write_bytes(path.read_bytes()[:-10])
    sqlite_world.start()
    again = sqlite_world.agent(request, session=agent.session).logs()
    again.send(line(1), line(2), line(3))
    again.end()
    again.join()
    assert sqlite_world.log(request) == ["line 1", "line 2", "line 3"]


def test_only_the_holder_writes(world: World) -> None:
    request = world.submit()
    holder, other = world.agent(request), world.agent(request)
    holder.run()
    stolen = other.logs()
    stolen.send(line(1, "stolen"))
    stolen.join()
    assert stolen.code is grpc.StatusCode.ABORTED
    assert world.log(request) == []


def test_a_replaced_holder_loses_its_stream_without_a_heartbeat(world: World) -> None:
    request = world.submit()
    silent, fresh = world.agent(request), world.agent(request)
    silent.run()
    logs = silent.logs()
    logs.send(line(1))
    wait_until(lambda: logs.acked == 1)
    world.expire_lease(request)
    fresh.run()
    logs.join()
    assert logs.code is grpc.StatusCode.ABORTED
    again = silent.logs()
    again.send(line(2, "too late"))
    again.join()
    assert again.code is grpc.StatusCode.ABORTED
    assert silent.heartbeat().should_terminate
    assert world.log(request) == ["line 1"]


def test_the_last_lines_may_follow_the_report(sqlite_world: World) -> None:
    request = sqlite_world.submit()
    agent = sqlite_world.agent(request)
    agent.run()
    logs = agent.logs()
    logs.send(line(1))
    wait_until(lambda: logs.acked == 1)
    agent.heartbeat()
    agent.report(pb.TASK_STATE_SUCCESS)
    logs.send(line(2, "after the report"))
    wait_until(lambda: logs.acked == 2)
    logs.end()
    logs.join()
    assert logs.error is None
    assert sqlite_world.log(request) == ["line 1", "after the report"]


def test_a_disk_that_refuses_breaks_the_stream_and_not_the_server(
    sqlite_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = sqlite_world.submit()
    agent = sqlite_world.agent(request)
    agent.run()
    logs = agent.logs()
    logs.send(line(1))
    wait_until(lambda: logs.acked == 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("leoflow_celery.store.logs.LogWriter.append_lines", full)
        logs.send(line(2))
        logs.join()
    assert logs.code is grpc.StatusCode.UNAVAILABLE
    assert logs.acked == 1
    assert not agent.heartbeat().should_terminate
    again = agent.logs()
    again.send(line(2), line(3))
    again.end()
    again.join()
    assert sqlite_world.log(request) == ["line 1", "line 2", "line 3"]


def test_a_stuck_disk_slows_its_streams_and_nothing_else(
    make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world()
    request = world.submit()
    agent = world.agent(request)
    agent.run()
    free = threading.Event()
    from leoflow_celery.store.logs import LogWriter

    append = LogWriter.append

    def stuck(writer: LogWriter, records: object) -> None:
        assert free.wait(20)
        append(writer, records)  # type: ignore[arg-type]

    monkeypatch.setattr(LogWriter, "append", stuck)
    logs = agent.logs()
    logs.send(*(line(number, "x" * 10_000) for number in range(1, 2_001)))
    assert world.gateway is not None
    assert world.gateway.server is not None
    holder_logs = world.gateway.server._holder_logs
    wait_until(lambda: any(not entry.room.is_set() for entry in list(holder_logs._logs.values())), 10)
    (entry,) = holder_logs._logs.values()
    assert sum(len(waiting.message) for waiting in entry.waiting) < 1_000_000, "20 MB were not read into memory"
    for _ in range(20):
        assert not agent.heartbeat().should_terminate
    assert world.agent(world.submit("ti-2")).run().acknowledged
    free.set()
    logs.end()
    logs.join(30)
    assert logs.acked == 2_000
