"""What the tests of single policies share: a subscriber that is behind, and how it gets what it gets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from anyio_sharedstream import Conflate, DropNewest, DropOldest, Gap, Latest
from tests.support import Feed, settle, until
from tests.sweep import managed


def missing(count: int) -> Gap:
    return Gap(count, "overflow")


def parity(event: int) -> int:
    return event % 2


LOSSY: list[Any] = [DropOldest(), DropNewest(), Latest(), Conflate(parity)]
NAMES = ["DropOldest", "DropNewest", "Latest", "Conflate"]


@asynccontextmanager
async def subscribed(policy: Any, bound: int = 2, **contract: Any) -> AsyncIterator[tuple[Feed, Any]]:
    """A subscriber that is behind by one event, 0, and so has no more room than its bound says."""
    feed = Feed()
    asked: Any = {"overflow": policy, "max_buffer_size": bound, **contract}
    async with managed(feed) as manager, manager.subscribe(feed.source, **asked) as stream:
        await publish(feed, 0)
        yield feed, stream


async def publish(feed: Feed, *events: Any) -> None:
    """Publish these, each in a turn of its own."""
    for event in events:
        feed.emit(event)
        await settle(5)


async def end(feed: Feed) -> None:
    feed.end()
    await until(lambda: feed.opened == feed.closed)
    await settle()
