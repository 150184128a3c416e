"""Three subscribers, one ticking source, one opening.

python examples/quickstart.py [--backend asyncio|trio]
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncGenerator
from itertools import count

import anyio

from anyio_sharedstream import SharedStreamManager, shared_source


@shared_source
async def ticks(interval: float) -> AsyncGenerator[int, None]:
    """Tick for as long as anybody listens; the key is this function and its argument."""
    print("source: opened")
    try:
        for number in count(1):
            await anyio.sleep(interval)
            yield number
    finally:
        print("source: closed")


async def listen(manager: SharedStreamManager, name: str, how_many: int) -> None:
    async with manager.subscribe(ticks(0.2), subscriber_id=name) as stream:
        async for number in stream:
            print(f"{name}: tick {number}")
            if number == how_many:
                break
    print(f"{name}: has left")


async def main() -> None:
    async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:
        # Each leaves when it has had enough. The last one to leave closes the source, whoever opened it.
        tasks.start_soon(listen, manager, "Ada", 2)
        tasks.start_soon(listen, manager, "Bob", 3)
        tasks.start_soon(listen, manager, "Cleo", 4)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Three subscribers share one ticking source.")
    parser.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio")
    anyio.run(main, backend=parser.parse_args().backend)
