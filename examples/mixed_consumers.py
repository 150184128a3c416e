"""Five consumers of one feed, each with a contract of its own; what one asks for costs the others nothing, but for the last.

python examples/mixed_consumers.py [--backend asyncio|trio]
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple

import anyio

from anyio_sharedstream import Block, Conflate, DropOldest, Gap, Latest, SharedStreamManager, shared_source

SYMBOLS = ["EUR", "USD", "JPY"]
QUOTES = 300


class Quote(NamedTuple):
    symbol: str
    price: int


@shared_source(route_by=lambda quote: quote.symbol)
async def quotes(done: anyio.Event) -> AsyncGenerator[Quote, None]:
    """Three symbols in turn, much faster than a person can read."""
    for number in range(QUOTES):
        yield Quote(SYMBOLS[number % 3], number)
        await anyio.sleep(0.001)
    done.set()
    await anyio.sleep_forever()


async def consume(stream: Any, name: str, wants: str, pace: float) -> None:
    """Take what the contract gives, at a pace of one's own, until the manager stops; then say what that was."""
    gaps = 0
    async with stream:
        async for item in stream:
            if isinstance(item, Gap):
                gaps += 1
            else:
                await anyio.sleep(pace)
        told = stream.statistics()
    print(f"{name:10}{wants:37} received {told.events_received:3}, missed {told.events_missed:3}", end="")
    print(f", refused {told.events_refused:3}, {gaps:2} gaps, held the feed {'often' if told.held_seconds else 'never'}")


async def main() -> None:
    async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:
        feed = quotes(done := anyio.Event())
        alarm = manager.subscribe(feed, where=lambda quote: quote.price < 100)
        dashboard = manager.subscribe(feed, overflow=Conflate(by=lambda quote: quote.symbol))
        logger = manager.subscribe(feed, overflow=DropOldest(), max_buffer_size=8, gaps=True)
        euro_desk = manager.subscribe(feed, overflow=Latest(), routes={"EUR"})
        ledger = manager.subscribe(feed, overflow=Block(up_to=1.0), max_buffer_size=1)
        tasks.start_soon(consume, alarm, "alarm", "every price below 100, or an error", 0.0)
        tasks.start_soon(consume, dashboard, "dashboard", "the newest price of each symbol", 0.05)
        tasks.start_soon(consume, logger, "logger", "what it can, and where it could not", 0.01)
        tasks.start_soon(consume, euro_desk, "euro desk", "the newest price of the euro alone", 0.03)
        tasks.start_soon(consume, ledger, "ledger", "everything, however long that takes", 0.002)
        await done.wait()
        await manager.stop_all()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Delivery contracts.")
    parser.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio")
    anyio.run(main, backend=parser.parse_args().backend)
