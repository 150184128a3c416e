"""One consumer falls behind and is told so; its sibling never notices.

python examples/slow_consumer.py [--backend asyncio|trio]
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncGenerator
from itertools import count

import anyio

from anyio_sharedstream import SharedStreamManager, SubscriberOverflow, shared_source

INTERVAL = 0.01
WANTED = 50


@shared_source
async def readings() -> AsyncGenerator[int, None]:
    """A sensor that waits for nobody."""
    for number in count(1):
        yield number
        await anyio.sleep(INTERVAL)


async def fast(manager: SharedStreamManager) -> None:
    received: list[int] = []
    async with manager.subscribe(readings(), subscriber_id="fast") as stream:
        async for number in stream:
            received.append(number)
            if len(received) == WANTED:
                break
    missing = set(range(1, WANTED + 1)) - set(received)
    print(f"fast: received {len(received)} readings, {len(missing)} missing")


async def slow(manager: SharedStreamManager) -> None:
    handled = 0
    # A small bound, so that this does not take long. The default is 1024 events.
    async with manager.subscribe(readings(), subscriber_id="slow", max_buffer_size=8) as stream:
        try:
            async for _ in stream:
                await anyio.sleep(20 * INTERVAL)  # far too long for each reading
                handled += 1
        except SubscriberOverflow as error:
            # The readings that it never got to are dropped, for they are stale, and it knows. To go on, subscribe again.
            print(f"slow: handled {handled} reading(s), then: {error}")


async def main() -> None:
    async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:
        tasks.start_soon(fast, manager)
        tasks.start_soon(slow, manager)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A slow consumer fails alone.")
    parser.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio")
    anyio.run(main, backend=parser.parse_args().backend)
