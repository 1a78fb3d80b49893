"""A turn for each: nobody stands in another one's queue."""

from __future__ import annotations

import asyncio

from leoflow_celery.errors import GatewayUnavailable
from leoflow_celery.gateway.threads import Turns


async def _body() -> None:
    turns, release, running = Turns(2, 3, "calls of one attempt"), asyncio.Event(), 0

    async def call(key: str) -> None:
        nonlocal running
        async with turns.turn(key):
            running += 1
            await release.wait()

    greedy = [asyncio.create_task(call("greedy")) for _ in range(6)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert running == 2
    other = asyncio.create_task(call("other"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert running == 3
    release.set()
    found = await asyncio.gather(*greedy, other, return_exceptions=True)
    assert [type(one) for one in found if one is not None] == [GatewayUnavailable]
    assert running == 6
    async with turns.turn("greedy"):
        pass


def test_one_key_has_its_turns_and_the_rest_is_told_to_come_again() -> None:
    asyncio.run(_body())
