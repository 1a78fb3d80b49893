"""The user's lines on the agent's own output."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable, Iterator

import pytest

from leoflow_celery.agent.stdout_mirror import StdoutMirror

_PIPE_BYTES = 4_096


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe as small as the kernel makes one: (reader, writer)."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    yield reader, writer
    for descriptor in (reader, writer):
        try:
            os.close(descriptor)
        except OSError:
            continue


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in the loop, not in an event
            await asyncio.sleep(0)


def read_all(reader: int) -> bytes:
    os.set_blocking(reader, False)
    found = b""
    while True:
        try:
            data = os.read(reader, 65_536)
        except BlockingIOError:
            return found
        if not data:
            return found
        found += data


def test_lines_come_out_in_order_and_the_output_blocks_again_afterwards(pipe: tuple[int, int]) -> None:
    async def scenario() -> None:
        echo = StdoutMirror(pipe[1])
        for number in range(100):
            echo.line(f"é {number}")
        await echo.close()

    asyncio.run(scenario())
    assert read_all(pipe[0]).decode().splitlines() == [f"é {number}" for number in range(100)]
    assert os.get_blocking(pipe[1])


def test_a_reader_that_is_slow_gets_everything_that_fits_the_buffer(pipe: tuple[int, int]) -> None:
    received = bytearray()

    async def scenario() -> None:
        asyncio.get_running_loop().add_reader(pipe[0], lambda: received.extend(os.read(pipe[0], 1_000)))
        echo = StdoutMirror(pipe[1])
        for number in range(5_000):
            echo.line(str(number))
        await echo.close()
        os.close(pipe[1])
        await until(lambda: len(received.splitlines()) == 5_000)
        asyncio.get_running_loop().remove_reader(pipe[0])

    asyncio.run(scenario())
    assert received.decode().splitlines() == [str(number) for number in range(5_000)]


def test_a_stuck_reader_costs_lines_and_no_time_and_is_told_how_many(pipe: tuple[int, int]) -> None:
    received = bytearray()

    async def scenario() -> None:
        echo = StdoutMirror(pipe[1], max_bytes=10_000)
        for number in range(5_000):
            echo.line(f"{number:05}")
            if number % 100 == 0:
                await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        loop.add_reader(pipe[0], lambda: received.extend(os.read(pipe[0], 65_536)))
        await until(lambda: b"lines are missing here" in received)
        echo.line("after")
        await until(lambda: received.endswith(b"after\n"))
        await echo.close()
        loop.remove_reader(pipe[0])

    asyncio.run(scenario())
    lines = received.decode().splitlines()
    notice = next(line for line in lines if "missing" in line)
    kept = [line for line in lines if line.isdigit()]
    assert notice == f"leoflow-agent: {5_000 - len(kept)} lines are missing here: they were not read in time"
    assert kept == [f"{number:05}" for number in range(len(kept))]
    assert lines[-1] == "after"


def test_a_reader_that_never_reads_does_not_keep_the_agent(pipe: tuple[int, int]) -> None:
    async def scenario() -> None:
        echo = StdoutMirror(pipe[1])
        echo.line("x" * 100_000)
        await echo.close()

    asyncio.run(scenario())
    assert len(read_all(pipe[0])) == _PIPE_BYTES


def test_a_reader_that_is_gone_ends_the_echo_in_silence(pipe: tuple[int, int]) -> None:
    async def scenario() -> None:
        os.close(pipe[0])
        echo = StdoutMirror(pipe[1])
        echo.line("lost")
        await echo.close()
        echo.line("also lost")
        await echo.close()

    asyncio.run(scenario())


def test_no_descriptor_echoes_nothing() -> None:
    async def scenario() -> None:
        echo = StdoutMirror(-1)
        echo.line("nothing")
        await echo.close()

    asyncio.run(scenario())
