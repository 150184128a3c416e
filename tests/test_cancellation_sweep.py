"""Whatever is cancelled, before whichever of its steps: nothing is lost, nothing stays, nobody else notices."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from anyio_sharedstream import SharedStreamManager, Subscription
from tests.support import Feed, idle, settle, until
from tests.sweep import NATIVE_WOKEN, SCOPE_WOKEN, Cut, Reader, drain, managed, nothing_left, sweep

EVENTS = 12

Stream = Subscription[int]
Receive = Callable[[Stream, list[int], int], Coroutine[Any, Any, None]]


async def one_by_one(stream: Stream, got: list[int], total: int) -> None:
    while len(got) < total:
        got.append(await stream.receive())


async def iterated(stream: Stream, got: list[int], total: int) -> None:
    async for event in stream:
        got.append(event)
        if len(got) == total:
            break


async def in_batches(stream: Stream, got: list[int], total: int) -> None:
    while len(got) < total:
        got += await stream.receive_batch(5)


async def in_iterated_batches(stream: Stream, got: list[int], total: int) -> None:
    async for batch in stream.batches(100):
        got += batch
        if len(got) == total:
            break


receiving = pytest.mark.parametrize("receive", [one_by_one, iterated, in_batches, in_iterated_batches])


@asynccontextmanager
async def sibling(manager: SharedStreamManager, feed: Feed, total: int) -> AsyncIterator[Reader]:
    """Another subscriber of the feed, which must have got the whole feed when the block is over."""
    async with manager.subscribe(feed.source) as stream, anyio.create_task_group() as tasks:
        reader = Reader(stream)
        tasks.start_soon(reader.run)
        yield reader
        await until(lambda: len(reader.got) >= total)
        assert reader.got == list(range(total))
        assert reader.terminal is None
        tasks.cancel_scope.cancel()


async def release(feed: Feed, cut: Cut) -> None:
    """Let a hanging clean-up end once the scenario waits for it, unless the scenario is cancelled while it waits."""
    await settle(10)
    if not cut.reached or cut.way in (SCOPE_WOKEN, NATIVE_WOKEN):
        assert feed.clean_up is not None
        feed.clean_up.set()


@receiving
async def test_receiving_idle_loses_nothing(receive: Receive) -> None:
    async def trial(cut: Cut) -> None:
        feed = Feed()
        got: list[int] = []

        def next_one(event: int) -> None:
            # Only now, so that the swept reader is idle before each event and woken by it.
            if event + 1 < EVENTS:
                feed.emit(event + 1)

        async with managed(feed) as manager, manager.subscribe(feed.source) as stream, anyio.create_task_group() as tasks:
            async with manager.subscribe(feed.source) as other:
                reader = Reader(other, next_one)
                tasks.start_soon(reader.run)
                await settle(5)
                feed.emit(0)
                await cut.run(receive(stream, got, EVENTS))
                await until(lambda: len(reader.got) == EVENTS)
                assert reader.got == list(range(EVENTS))
                await settle(5)
            assert got + drain(stream)[0] == reader.got

    assert await sweep(trial) >= 2


@receiving
async def test_receiving_behind_loses_nothing(receive: Receive) -> None:
    async def trial(cut: Cut) -> None:
        feed = Feed()
        got: list[int] = []

        async def catch_up() -> None:
            await receive(stream, got, 300)
            feed.emit(*range(300, 320))
            await receive(stream, got, 320)

        async with managed(feed) as manager, manager.subscribe(feed.source) as stream:
            for start in range(0, 300, 50):
                feed.emit(*range(start, start + 50))
                await settle(5)
            await cut.run(catch_up())
            await settle(5)
            assert got + drain(stream)[0] == list(range(manager.statistics().groups[feed.key].events_published))

    assert await sweep(trial) >= 2


async def test_a_cancelled_life_as_one_of_many_harms_nobody() -> None:
    async def trial(cut: Cut) -> None:
        feed = Feed()
        got: list[int] = []

        async def life() -> None:
            async with manager.subscribe(feed.source) as stream:
                feed.emit(*range(4))
                await one_by_one(stream, got, 4)
                feed.emit(*range(4, 8))
                await in_batches(stream, got, 8)

        async with managed(feed) as manager:
            feed_total = 10
            async with sibling(manager, feed, feed_total) as reader:
                await settle(5)
                await cut.run(life())
                (group,) = manager.statistics().groups.values()
                assert [known.subscriber_id for known in group.subscriptions] == [reader.stream.subscriber_id]
                assert got == list(range(len(got)))
                # What the life did not come to emit comes now.
                await settle(5)
                published = manager.statistics().groups[feed.key].events_published
                feed.emit(*range(published, feed_total))
        assert feed.opened == 1

    assert await sweep(trial) >= 3


async def test_a_cancelled_life_alone_leaves_nothing() -> None:
    async def trial(cut: Cut) -> None:
        feed = Feed()
        feed.emit(0, 1, 2)
        got: list[int] = []

        async def life() -> None:
            async with manager.subscribe(feed.source) as stream:
                await one_by_one(stream, got, 3)

        async with managed(feed) as manager:
            await cut.run(life())
            assert not manager.statistics().groups
            assert got == list(range(len(got)))
            await until(lambda: idle(manager))
            assert feed.open_now == 0

    assert await sweep(trial) >= 3


async def exits(stream: Stream) -> None:
    await stream.__aexit__(None, None, None)


@pytest.mark.parametrize("leave", [Subscription.aclose, exits], ids=["aclose", "aexit"])
async def test_entering_and_leaving_among_others_take_no_step_that_could_be_cancelled(
    leave: Callable[[Stream], Awaitable[None]],
) -> None:
    async def trial(cut: Cut) -> None:
        feed = Feed()

        async def come_and_go() -> None:
            stream = manager.subscribe(feed.source)
            await stream.__aenter__()
            await leave(stream)

        async with managed(feed) as manager, sibling(manager, feed, 3):
            await cut.run(come_and_go())
            feed.emit(0, 1, 2)
            assert cut.completed

    assert await sweep(trial) == 1


async def test_leaving_last_is_cancelled_alone_and_the_upstream_closes_regardless() -> None:
    async def trial(cut: Cut) -> None:
        feed, other = Feed(), Feed("other")
        feed.clean_up = anyio.Event()
        async with managed(feed, other) as manager, sibling(manager, other, 2), anyio.create_task_group() as tasks:
            stream = await manager.subscribe(feed.source).__aenter__()
            await until(lambda: feed.opened)
            tasks.start_soon(release, feed, cut)
            await cut.run(stream.aclose())
            assert feed.key not in manager.statistics().groups
            other.emit(0, 1)
            if feed.open_now:
                assert not cut.completed
                assert [group.key for group in manager.statistics().closing] == [feed.key]
                # The next subscriber waits for its turn.
                async with manager.subscribe(feed.source) as late:
                    assert manager.statistics().groups[feed.key].state == "waiting"
                    feed.clean_up.set()
                    feed.emit(7)
                    assert await late.receive() == 7
            # A second attempt waits again.
            await stream.aclose()
            assert feed.open_now == 0

    assert await sweep(trial) == 2


@pytest.mark.parametrize("everything", [False, True], ids=["stop", "stop_all"])
async def test_a_cancelled_stop_has_stopped_and_its_subscribers_get_what_was_published(everything: bool) -> None:
    async def trial(cut: Cut) -> None:
        feed, other = Feed(), Feed("other")
        feed.clean_up = anyio.Event()
        feeds = [feed, other]
        async with managed(*feeds) as manager, anyio.create_task_group() as tasks:
            readers = []
            for source in [feed.source, feed.source, other.source]:
                stream = await manager.subscribe(source).__aenter__()
                readers.append(Reader(stream))
            behind = await manager.subscribe(feed.source).__aenter__()
            for reader in readers:
                tasks.start_soon(reader.run)
            for each in feeds:
                each.emit(0, 1, 2)
            await settle(10)
            tasks.start_soon(release, feed, cut)
            await cut.run(manager.stop_all() if everything else manager.stop(feed.key))
            assert feed.key not in manager.statistics().groups
            await settle(5)
            for reader in readers[: 3 if everything else 2]:
                assert reader.got == [0, 1, 2]
                assert isinstance(reader.terminal, anyio.EndOfStream)
            events, terminal = drain(behind)
            assert events == [0, 1, 2]
            assert isinstance(terminal, anyio.EndOfStream)
            # The manager stays usable.
            feed.clean_up.set()
            async with manager.subscribe(feed.source) as again:
                feed.emit(3)
                assert await again.receive() == 3
            await manager.stop_all()
            assert [reader.got for reader in readers] == [[0, 1, 2]] * 3

    assert await sweep(trial) >= 2


async def test_a_manager_cancelled_anywhere_ends_everything_and_its_subscribers() -> None:
    async def trial(cut: Cut) -> None:
        feeds = [Feed("one"), Feed("two")]
        readers: list[Reader] = []

        async def life() -> None:
            async with SharedStreamManager() as manager:
                for feed in feeds * 2:
                    reader = Reader(await manager.subscribe(feed.source).__aenter__())
                    readers.append(reader)
                    tasks.start_soon(reader.run)
                for feed in feeds:
                    feed.emit(0, 1)
                await settle(4)
                for feed in feeds:
                    feed.emit(2, 3)
                await readers[0].stream.aclose()
                await settle(2)

        async with nothing_left(*feeds), anyio.create_task_group() as tasks:
            await cut.run(life())
            assert all(feed.open_now == 0 for feed in feeds)
            await until(lambda: all(reader.terminal is not None for reader in readers))
            for reader in readers:
                assert reader.got == list(range(len(reader.got)))
                assert isinstance(reader.terminal, anyio.EndOfStream | anyio.ClosedResourceError)

    assert await sweep(trial) >= 6


async def test_a_manager_cancelled_while_leaving_still_waits_for_a_slow_clean_up() -> None:
    async def trial(cut: Cut) -> None:
        feed = Feed()
        feed.clean_up = anyio.Event()

        async def life() -> None:
            async with SharedStreamManager() as manager:
                stream = await manager.subscribe(feed.source).__aenter__()
                feed.emit(0)
                await stream.receive()

        async def release_later() -> None:
            await settle(10)
            assert feed.clean_up is not None
            feed.clean_up.set()

        async with nothing_left(feed), anyio.create_task_group() as tasks:
            tasks.start_soon(release_later)
            await cut.run(life())
            assert feed.open_now == 0

    assert await sweep(trial) >= 3
