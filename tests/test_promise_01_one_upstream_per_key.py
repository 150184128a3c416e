"""Promise 1: while a group lives its source is opened once, and two upstreams of one key are never open together."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Hashable
from contextlib import asynccontextmanager
from typing import Any, Self

import anyio
import pytest

from anyio_sharedstream import SharedSource, SharedStreamManager, Subscription
from tests.support import Feed, idle, settle, until


class SlowToClose(Feed):
    """A feed inside a context manager whose clean-up waits for `released`, however the feed ends.

    It is itself a context manager that releases it at last, so that a test that fails does not hang.
    """

    def __init__(self, key: Hashable = "feed") -> None:
        super().__init__(key)
        self.released = anyio.Event()
        self.held = 0
        self.most_held = 0
        self.times_held = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.released.set()

    @property
    def source(self) -> SharedSource[Any]:
        return SharedSource(key=self.key, open=self._hold)

    @asynccontextmanager
    async def _hold(self) -> AsyncIterator[AsyncGenerator[Any, None]]:
        self.held += 1
        self.times_held += 1
        self.most_held = max(self.most_held, self.held)
        try:
            yield self._play()
        finally:
            with anyio.CancelScope(shield=True):
                await self.released.wait()
            self.held -= 1


async def join(manager: SharedStreamManager, feed: Feed) -> Subscription[Any]:
    stream = manager.subscribe(feed.source)
    await stream.__aenter__()
    return stream


def state(manager: SharedStreamManager, key: Hashable = "feed") -> str:
    return manager.statistics().groups[key].state


async def leave(manager: SharedStreamManager, feed: Feed, stream: Subscription[Any]) -> None:
    stream.close()


async def stop(manager: SharedStreamManager, feed: Feed, stream: Subscription[Any]) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await manager.stop(feed.key)


async def fail(manager: SharedStreamManager, feed: Feed, stream: Subscription[Any]) -> None:
    feed.fail(ValueError("broken"))
    await until(lambda: feed.key not in manager.statistics().groups)


async def come_to_an_end(manager: SharedStreamManager, feed: Feed, stream: Subscription[Any]) -> None:
    feed.end()
    await until(lambda: feed.key not in manager.statistics().groups)


End = Callable[[SharedStreamManager, Feed, Subscription[Any]], Awaitable[None]]
every_end = pytest.mark.parametrize("end", [leave, stop, fail, come_to_an_end])
every_early_end = pytest.mark.parametrize("end_early", [leave, stop])


async def test_subscribers_that_come_at_once_open_one_upstream() -> None:
    feed = Feed()

    async def subscriber() -> None:
        async with manager.subscribe(feed.source) as stream:
            assert await stream.receive() == "event"

    async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:
        for _ in range(100):
            tasks.start_soon(subscriber)
        await until(lambda: not idle(manager) and len(manager.statistics().groups["feed"].subscriptions) == 100)
        feed.emit("event")
    assert feed.opened == feed.closed == 1


async def test_subscribers_that_come_while_the_upstream_opens_share_it() -> None:
    feed = Feed()
    opening = anyio.Event()

    @asynccontextmanager
    async def slow_to_open() -> AsyncIterator[Any]:
        await opening.wait()
        yield feed.source.open()

    source = SharedSource(key="feed", open=slow_to_open)
    async with SharedStreamManager() as manager, manager.subscribe(source) as one:
        await until(lambda: state(manager) == "opening")
        async with manager.subscribe(source) as two:
            opening.set()
            feed.emit("event")
            assert await one.receive() == await two.receive() == "event"
    assert feed.opened == feed.closed == 1


async def test_an_upstream_outlives_those_who_come_and_go_while_one_stays() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source):
        for _ in range(10):
            async with manager.subscribe(feed.source) as guest:
                feed.emit("event")
                assert await guest.receive() == "event"
        assert (feed.opened, feed.closed) == (1, 0)
    assert feed.opened == feed.closed == 1


async def test_equal_keys_share_whatever_they_are_made_of() -> None:
    feed, never = Feed(("prices", 1)), Feed(("prices", 1.0))
    async with SharedStreamManager() as manager, manager.subscribe(feed.source), manager.subscribe(never.source) as two:
        feed.emit("event")
        assert await two.receive() == "event"
    assert (feed.opened, never.opened) == (1, 0)


async def test_other_keys_have_upstreams_of_their_own() -> None:
    feeds = [Feed("one"), Feed("two")]
    async with SharedStreamManager() as manager:
        one, two = [await join(manager, feed) for feed in feeds]
        feeds[0].emit("for one")
        feeds[1].emit("for two")
        assert (await one.receive(), await two.receive()) == ("for one", "for two")
    assert [feed.opened for feed in feeds] == [1, 1]


@every_end
async def test_the_next_upstream_waits_until_the_earlier_one_has_closed(end: End) -> None:
    async with SharedStreamManager() as manager, SlowToClose() as feed:
        stream = await join(manager, feed)
        await until(lambda: state(manager) == "live")
        await end(manager, feed, stream)
        later = await join(manager, feed)
        await settle()
        assert state(manager) == "waiting"
        assert feed.times_held == 1
        feed.released.set()
        feed.emit("event")
        assert await later.receive() == "event"
        assert (feed.times_held, feed.most_held) == (2, 1)
    assert feed.held == 0


@every_end
@every_early_end
async def test_the_next_upstream_waits_for_the_one_before_those_that_were_cancelled_while_they_waited(
    end: End, end_early: End
) -> None:
    async with SharedStreamManager() as manager, SlowToClose() as feed:
        stream = await join(manager, feed)
        await until(lambda: state(manager) == "live")
        await end(manager, feed, stream)
        for _ in range(3):
            between = await join(manager, feed)
            await settle()
            await end_early(manager, feed, between)
            await settle()
        later = await join(manager, feed)
        await settle()
        assert state(manager) == "waiting"
        assert feed.times_held == 1
        feed.released.set()
        feed.emit("event")
        assert await later.receive() == "event"
        assert (feed.times_held, feed.most_held) == (2, 1)


@every_early_end
async def test_the_next_upstream_waits_for_the_one_before_those_that_were_cancelled_at_once(end_early: End) -> None:
    async with SharedStreamManager() as manager, SlowToClose() as feed:
        stream = await join(manager, feed)
        await until(lambda: state(manager) == "live")
        stream.close()
        for _ in range(3):
            await end_early(manager, feed, await join(manager, feed))
        later = await join(manager, feed)
        await settle()
        assert feed.times_held == 1
        feed.released.set()
        feed.emit("event")
        assert await later.receive() == "event"
        assert (feed.times_held, feed.most_held) == (2, 1)


async def test_an_upstream_that_is_slow_to_close_holds_up_no_other_key() -> None:
    other = Feed("other")
    async with SharedStreamManager() as manager, SlowToClose("slow") as slow:
        stream = await join(manager, slow)
        await until(lambda: state(manager, "slow") == "live")
        stream.close()
        async with manager.subscribe(other.source) as stream:
            other.emit("event")
            assert await stream.receive() == "event"
        assert other.closed == 1
        assert slow.held == 1


@every_early_end
async def test_a_source_that_nobody_waits_for_any_more_is_not_opened(end_early: End) -> None:
    feed = Feed()
    async with SharedStreamManager() as manager:
        await end_early(manager, feed, await join(manager, feed))
        await until(lambda: idle(manager))
    assert feed.opened == 0


async def test_a_subscriber_that_joins_under_a_cancelled_scope_opens_nothing() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager:
        with anyio.CancelScope() as scope:
            scope.cancel()
            async with manager.subscribe(feed.source) as stream:
                await stream.receive()
        await until(lambda: idle(manager))
    assert feed.opened == 0
