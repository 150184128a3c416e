"""Leaving an upstream that lingers, what it does without subscribers, and many of them."""

from __future__ import annotations

import gc
import math
import tracemalloc
from collections.abc import AsyncGenerator
from operator import add
from typing import Any

import anyio
import pytest

from anyio_sharedstream import (
    Block,
    DropOldest,
    Fold,
    LossySubscription,
    SharedSource,
    SubscriberOverflow,
    Subscription,
)
from anyio_sharedstream._clock import Timer
from tests.support import Feed, idle, settle, until
from tests.sweep import drain, managed, noted
from tests.test_linger import Timed, alive, state, visit
from tests.virtual_time import in_virtual_time

# Leaving.


@pytest.mark.parametrize("leave", ["close", "aclose", "exit"])
async def test_the_last_one_does_not_wait_for_an_upstream_that_goes_on(leave: str) -> None:
    feed = Feed()
    async with managed(feed) as manager:
        stream = await manager.subscribe(feed.asking_for(linger=math.inf)).__aenter__()
        await settle()
        with anyio.CancelScope() as scope:
            scope.cancel()
            if leave == "close":
                stream.close()
            else:
                await (stream.aclose() if leave == "aclose" else stream.__aexit__(None, None, None))
        assert not scope.cancelled_caught  # there was no checkpoint
        assert state(manager) == "lingering"
        await stream.aclose()


@in_virtual_time
async def test_who_has_left_does_not_wait_for_the_end_of_the_upstream_later_either() -> None:
    feed = Feed()
    feed.clean_up = anyio.Event()
    source = feed.asking_for(linger=10)
    async with managed(feed) as manager:
        stream = manager.subscribe(source)
        async with stream:
            await settle()
        await anyio.sleep(10)
        await settle()
        assert [group.state for group in manager.statistics().closing] == ["closing"]
        await stream.aclose()
        async with manager.subscribe(source):
            await settle()
            assert (state(manager), feed.opened) == ("waiting", 1)
            feed.clean_up.set()
            await settle()
            assert (state(manager), feed.opened) == ("live", 2)
        assert feed.most_open == 1


@in_virtual_time
async def test_it_lingers_also_when_the_last_one_has_overflowed() -> None:
    feed = Timed()
    source = feed.asking_for(linger=10)
    async with managed(feed) as manager:
        async with manager.subscribe(source, max_buffer_size=1) as stream:
            await anyio.sleep(2)
            for event in range(2):
                feed.emit(event)
                await settle()
            assert state(manager) == "lingering"
            with pytest.raises(SubscriberOverflow):
                await stream.receive()
            await anyio.sleep_until(11.875)
            # It is still inside of its subscription, which does not count any more.
            async with manager.subscribe(source) as other:
                feed.emit("event")
                assert await other.receive() == "event"
            await anyio.sleep(5)
        # Nor does its leaving.
        await anyio.sleep(15)
    assert feed.times == [0, 21.875]


@in_virtual_time
async def test_it_lingers_also_when_the_last_one_has_failed_or_let_the_source_wait_for_too_long() -> None:
    def refuse(event: object) -> bool:
        raise LookupError(event)

    cases: list[tuple[Any, type[Exception]]] = [
        ({"where": refuse}, LookupError),
        ({"overflow": Block(3), "max_buffer_size": 1}, SubscriberOverflow),
    ]
    for options, error in cases:
        feed = Timed()
        source = feed.asking_for(linger=10)
        async with managed(feed) as manager:
            start = anyio.current_time()
            async with manager.subscribe(source, **options) as stream:
                feed.emit(1, 2, 3)
                await anyio.sleep(4)
                assert state(manager) == "lingering"
                assert isinstance(drain(stream)[1], error)
                async with manager.subscribe(source):
                    assert state(manager) == "live"
                await anyio.sleep(15)
        assert feed.times == [start, start + 14]


@in_virtual_time
async def test_who_fails_while_it_adopts_leaves_the_upstream_lingering_from_then_on() -> None:
    def refuse(event: object) -> bool:
        raise LookupError(event)

    feed = Timed()
    source = feed.asking_for(linger=10, replay=5)
    async with managed(feed) as manager:
        feed.emit(1)
        await visit(manager, source)
        await anyio.sleep(9)
        async with manager.subscribe(source, where=refuse) as stream:
            assert state(manager) == "lingering"
            with pytest.raises(LookupError):
                await stream.receive()
        await anyio.sleep(20)
    assert feed.times == [0, 19]


@in_virtual_time
async def test_who_may_not_join_changes_nothing() -> None:
    feed = Timed()
    source = feed.asking_for(linger=10)
    async with managed(feed) as manager:
        await visit(manager, source)
        await anyio.sleep(9)
        with pytest.raises(ValueError, match="linger"):
            await manager.subscribe(feed.asking_for(linger=20)).__aenter__()
        assert state(manager) == "lingering"
        assert manager.statistics().groups["feed"].subscriptions == ()
        await anyio.sleep(20)
    assert feed.times == [0, 10]


# Events.


async def test_what_comes_while_nobody_is_there_is_for_nobody() -> None:
    feed = Feed()
    source = feed.asking_for(linger=math.inf)
    async with managed(feed) as manager:
        async with manager.subscribe(source, overflow=Block(math.inf), max_buffer_size=1):
            feed.emit(0, 1, 2)
            await settle()
            assert manager.statistics().groups["feed"].events_published == 1
        # Whom it waited for has gone.
        await until(lambda: manager.statistics().groups["feed"].events_published == 3)
        feed.emit(*range(3, 1000))
        await until(lambda: manager.statistics().groups["feed"].events_published == 1000)
        feed.emit("for the next")
        async with manager.subscribe(source, gaps=True, overflow=DropOldest()) as stream:
            feed.emit("and this")
            await settle()
            assert await stream.receive_batch(10) == ("for the next", "and this")


async def test_what_it_remembers_outlives_its_subscribers() -> None:
    feed = Feed()
    source = feed.asking_for(linger=math.inf, replay=2)
    async with managed(feed) as manager:
        async with manager.subscribe(source):
            feed.emit(1)
            await settle()
        feed.emit(2, 3)
        await settle()
        async with manager.subscribe(source, gaps=True) as stream:
            feed.emit(4)
            assert [await stream.receive() for _ in range(3)] == [2, 3, 4]


async def test_a_source_that_never_rests_starves_nobody_when_nobody_is_there() -> None:
    async def busy() -> AsyncGenerator[int, None]:
        while True:
            yield 0

    async with managed() as manager:
        await visit(manager, SharedSource(key="feed", open=busy, linger=math.inf))
        published = manager.statistics().groups["feed"].events_published
        await until(lambda: manager.statistics().groups["feed"].events_published > published + 1000)
        assert state(manager) == "lingering"
        await manager.stop("feed")


# Many.


@in_virtual_time
async def test_hundreds_of_keys_linger_each_for_its_own_time() -> None:
    feeds = [Timed(number) for number in range(400)]
    before = len(alive(Timer))
    async with managed(*feeds) as manager:
        tasks_before = len(anyio.get_running_tasks())
        for feed in feeds:
            await visit(manager, feed.asking_for(linger=100))
            await anyio.sleep(0.125)
        assert {group.state for group in manager.statistics().groups.values()} == {"lingering"}
        # Two for each group, and one for all the times.
        assert len(anyio.get_running_tasks()) == tasks_before + 2 * len(feeds) + 1
        for feed in feeds[::2]:
            await visit(manager, feed.asking_for(linger=100))
        await anyio.sleep(200)
        assert idle(manager)
        assert len(anyio.get_running_tasks()) == tasks_before
        assert len(alive(Timer)) == before
    for number, feed in enumerate(feeds):
        assert feed.times == [number / 8, 150 if number % 2 == 0 else number / 8 + 100]


@in_virtual_time
async def test_thousands_of_visits_leave_nothing_behind() -> None:
    feed, steady = Timed(), Timed("steady")
    source = feed.asking_for(linger=10, fold=Fold(0, add), route_by=lambda event: event % 2, replay=3)
    ways: list[Any] = [
        {},
        {"overflow": Block(5), "max_buffer_size": 1},
        {"overflow": DropOldest(), "where": lambda event: event % 3, "gaps": True},
        {"routes": {1}, "snapshot": True},
    ]

    async def come_and_go(visits: int) -> None:
        for number in range(visits):
            async with manager.subscribe(source, **ways[number % len(ways)]):
                feed.emit(number)
                await settle(number % 3)
            await anyio.sleep(number % 5)

    async def memory_after(visits: int) -> int:
        await come_and_go(visits)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    before, kept = len(alive(Timer)), len([*alive(Subscription), *alive(LossySubscription)])  # by others
    async with managed(feed, steady) as manager:
        await visit(manager, steady.asking_for(linger=math.inf))
        await come_and_go(100)
        tasks, used = len(anyio.get_running_tasks()), len(alive(Timer))
        entries = sum(len(gc.get_referrers(timer)) for timer in alive(Timer))
        tracemalloc.start()
        first = await memory_after(100)
        assert await memory_after(3000) < first + 60_000  # less than any object for each of them
        tracemalloc.stop()
        assert (len(anyio.get_running_tasks()), len(alive(Timer))) == (tasks, used)
        assert sum(len(gc.get_referrers(timer)) for timer in alive(Timer)) <= entries + 10
        assert len(manager.statistics().groups) == 2
        assert manager.statistics().groups["feed"].subscriptions == ()
        assert len([*alive(Subscription), *alive(LossySubscription)]) <= kept
    assert feed.opened == steady.opened == 1
    assert len(alive(Timer)) == before


@pytest.mark.parametrize("steady_ones", [0, 1])
@in_virtual_time
async def test_thousands_of_groups_whose_time_was_cut_short_leave_nothing_behind(steady_ones: int) -> None:
    """Nor when the time of another, which is waited for meanwhile, never comes."""
    before = len(alive(Timer))
    async with managed() as manager:
        for number in range(steady_ones):
            await visit(manager, Feed(("steady", number)).asking_for(linger=math.inf))
        for number in range(2000):
            with noted(number):
                await visit(manager, Feed(number).asking_for(linger=1e6))
                await manager.stop(number)
        await settle()
        assert len(manager.statistics().groups) == steady_ones
        assert len(alive(Timer)) <= before + 100
    assert len(alive(Timer)) == before
