"""The load of bench/gateway.py: processes that are many agents at once. Prints one JSON object each."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import Any

import grpc.aio

from leoflow_celery.gateway.server import raise_open_files_limit
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.protocol.service import AUTHORIZATION_KEY, METHODS, SESSION_KEY, serialize

_CHANNELS = 4


def _metadata(agent: list[str]) -> grpc.aio.Metadata:
    token, session = agent
    return grpc.aio.Metadata((AUTHORIZATION_KEY, f"Bearer {token}"), (SESSION_KEY, session))


def _stub(channel: grpc.aio.Channel, name: str) -> Any:
    method = METHODS[name]
    return channel.unary_unary(method.path, serialize, method.response.FromString)


def _channel(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])


async def register(address: str, agents: list[list[str]], concurrency: int) -> dict[str, float]:
    """Register and start every agent; claims per second."""
    channel = _channel(address)
    claim, report = _stub(channel, "Register"), _stub(channel, "ReportState")
    waiting = iter(agents)

    async def work() -> None:
        for agent in waiting:
            await claim(pb.RegisterRequest(hostname="bench"), metadata=_metadata(agent))
            await report(pb.ReportStateRequest(state=pb.TASK_STATE_RUNNING), metadata=_metadata(agent))

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    await channel.close()
    return {"count": len(agents), "seconds": time.perf_counter() - began}


async def heartbeats(address: str, agents: list[list[str]], seconds: float, concurrency: int) -> dict[str, float]:
    """Heartbeats as fast as they are answered, each of another agent."""
    channels = [_channel(address) for _ in range(_CHANNELS)]
    request = pb.HeartbeatRequest()
    counted = 0
    began = time.perf_counter()
    end = began + seconds

    async def work(number: int) -> None:
        nonlocal counted
        beat = _stub(channels[number % _CHANNELS], "Heartbeat")
        mine = [_metadata(agent) for agent in agents[number::concurrency]]
        while True:
            for metadata in mine:
                if time.perf_counter() > end:
                    return
                answer = await beat(request, metadata=metadata)
                assert not answer.should_terminate
                counted += 1

    await asyncio.gather(*(work(number) for number in range(concurrency)))
    elapsed = time.perf_counter() - began
    for channel in channels:
        await channel.close()
    return {"count": counted, "seconds": elapsed}


async def latencies(address: str, agents: list[list[str]], seconds: float, rate: float) -> dict[str, list[float]]:
    """Seconds that heartbeats and state reports take, one after the other at a steady rate."""
    channel = _channel(address)
    calls = {
        "Heartbeat": (_stub(channel, "Heartbeat"), pb.HeartbeatRequest()),
        "ReportState": (_stub(channel, "ReportState"), pb.ReportStateRequest(state=pb.TASK_STATE_RUNNING)),
    }
    found: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, (stub, request) in calls.items():
            began = time.perf_counter()
            await stub(request, metadata=_metadata(random.choice(agents)), timeout=30)  # noqa: S311
            found[name].append(time.perf_counter() - began)
            await asyncio.sleep(1 / rate / len(calls))
    await channel.close()
    return found


async def streams(address: str, agents: list[list[str]], seconds: float, lines_per_second: float) -> dict[str, float]:
    """One connection and one log stream per agent, each sending lines at a steady rate until all are acknowledged."""
    acked = sent = 0
    opened = asyncio.Semaphore(50)
    all_open = asyncio.Barrier(len(agents))

    async def one(agent: list[str]) -> None:
        nonlocal acked, sent
        async with opened:
            channel = _channel(address)
            method = METHODS["StreamLogs"]
            call: Any = channel.stream_stream(method.path, serialize, method.response.FromString)(
                metadata=_metadata(agent)
            )
            await _send(call, 1)
            assert (await call.read()).acknowledged_through_line == 1
        await all_open.wait()
        if agent is agents[0]:
            print("open", flush=True)
        number, end = 1, time.perf_counter() + seconds
        await asyncio.sleep(random.random() / lines_per_second)  # noqa: S311
        while time.perf_counter() < end:
            number += 1
            await _send(call, number)
            await asyncio.sleep(1 / lines_per_second)
        await call.done_writing()
        last = 0
        while (ack := await call.read()) is not grpc.aio.EOF:
            last = ack.acknowledged_through_line
        assert last == number, (last, number)
        acked, sent = acked + last, sent + number
        await channel.close()

    began = time.perf_counter()
    await asyncio.gather(*(one(agent) for agent in agents))
    return {"sent": sent, "acked": acked, "seconds": time.perf_counter() - began}


async def _send(call: Any, number: int) -> None:
    line = pb.LogLine(message=f"line {number} of a task that says a few words", stream="stdout", line_number=number)
    line.time.FromNanoseconds(time.time_ns())
    await call.write(line)


def main() -> None:
    kind, *arguments = json.load(sys.stdin)
    raise_open_files_limit()
    functions = {"register": register, "heartbeats": heartbeats, "latencies": latencies, "streams": streams}
    json.dump(asyncio.run(functions[kind](*arguments)), sys.stdout)  # type: ignore[operator]


if __name__ == "__main__":
    main()
