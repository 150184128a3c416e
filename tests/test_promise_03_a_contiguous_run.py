"""Promise 3: exactly the events published since registration, in order, without gap or repetition, then exactly one terminal."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import anyio
import pytest
from anyio.abc import TaskGroup

from anyio_sharedstream import PollTerminated, SharedSource, SharedStreamManager, SubscriberOverflow, Subscription
from tests.support import Feed, settle, until

SIZES = [1, 8, 63, 64, 65]


async def take(stream: Subscription[Any], number: int) -> list[Any]:
    return [await stream.receive() for _ in range(number)]


async def fall_behind(feed: Feed, number: int) -> None:
    """Publish that many events one by one, in publications of their own."""
    for event in range(number):
        feed.emit(event)
        await settle()


async def test_a_subscriber_receives_what_is_published_from_its_registration_on() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as first:
        feed.emit(*range(10))
        assert await take(first, 5) == [0, 1, 2, 3, 4]
        async with manager.subscribe(feed.source) as second:
            feed.emit(*range(10, 20))
            assert await take(second, 10) == list(range(10, 20))
        assert await take(first, 15) == list(range(5, 20))


async def test_the_first_subscriber_misses_nothing_of_what_its_source_yields() -> None:
    async def source() -> AsyncGenerator[int, None]:
        for event in range(200):
            yield event
        await anyio.sleep_forever()

    async with SharedStreamManager() as manager, manager.subscribe(SharedSource(key="feed", open=source)) as stream:
        await settle(5)
        assert await take(stream, 200) == list(range(200))


async def by_receive_nowait(stream: Subscription[Any], number: int) -> list[Any]:
    run: list[Any] = []
    while len(run) < number:
        try:
            run.append(stream.receive_nowait())
        except anyio.WouldBlock:
            await settle(1)
    return run


async def by_receive_batch(stream: Subscription[Any], number: int) -> list[Any]:
    run: list[Any] = []
    while len(run) < number:
        run += await stream.receive_batch(7)
    return run


async def by_iterating(stream: Subscription[Any], number: int) -> list[Any]:
    return [event async for event in stream]


async def by_iterating_over_batches(stream: Subscription[Any], number: int) -> list[Any]:
    return [event async for batch in stream.batches(100) for event in batch]


@pytest.mark.parametrize("burst", [1, 3, 64, 65, 200])
async def test_every_way_of_receiving_gives_the_same_run(burst: int) -> None:
    feed = Feed()
    total = 5 * burst
    runs: list[list[int]] = []

    async def read(reader: Callable[[Subscription[Any], int], Awaitable[list[Any]]], stream: Subscription[Any]) -> None:
        runs.append(await reader(stream, total))

    async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:
        for reader in (take, by_receive_nowait, by_receive_batch, by_iterating, by_iterating_over_batches):
            stream = manager.subscribe(feed.source)
            await stream.__aenter__()
            tasks.start_soon(read, reader, stream)
        for start in range(0, total, burst):
            feed.emit(*range(start, start + burst))
            await settle(3)
        await settle()
        await manager.stop("feed")
    assert runs == [list(range(total))] * 5


async def test_what_is_buffered_is_received_in_order_however_it_came_and_is_taken() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream:
        await until(lambda: feed.opened)
        for chunk in ([0, 1, 2], [3], [4, 5, 6, 7], [8, 9], [10]):
            feed.emit(*chunk)
            await settle()
        assert await stream.receive() == 0
        assert await stream.receive_batch(4) == (1, 2, 3, 4)
        assert stream.receive_nowait() == 5
        assert await stream.receive_batch(100) == (6, 7, 8, 9, 10)
        with pytest.raises(anyio.WouldBlock):
            stream.receive_nowait()


async def test_one_who_joins_starts_after_the_events_that_the_source_has_already_yielded() -> None:
    joined: list[Subscription[int]] = []

    async def source() -> AsyncGenerator[int, None]:
        yield 1
        yield 2
        joined.append(manager.subscribe(shared))
        await joined[0].__aenter__()  # no suspension lies between the events
        yield 3
        await anyio.sleep_forever()

    shared = SharedSource(key="feed", open=source)
    async with SharedStreamManager() as manager, manager.subscribe(shared) as first:
        assert await take(first, 3) == [1, 2, 3]
        assert await take(joined[0], 1) == [3]
        joined[0].close()


async def test_one_who_is_stopped_still_gets_the_events_that_the_source_has_already_yielded() -> None:
    async def source() -> AsyncGenerator[int, None]:
        yield 1
        yield 2
        await manager.stop("feed")  # no suspension lies between the events and the stop

    async with SharedStreamManager() as manager, manager.subscribe(SharedSource(key="feed", open=source)) as stream:
        assert [event async for event in stream] == [1, 2]


async def test_events_that_were_published_come_before_the_error() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream:
        await fall_behind(feed, 3)
        feed.emit(3, 4)
        feed.fail(ValueError("broken"))
        await settle()
        assert await take(stream, 5) == [0, 1, 2, 3, 4]
        with pytest.raises(ValueError, match="broken"):
            await stream.receive()


async def test_events_that_were_published_come_before_the_end_of_a_stopped_stream() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream:
        await fall_behind(feed, 3)
        await manager.stop("feed")
        assert [event async for event in stream] == [0, 1, 2]


def fail(feed: Feed, manager: SharedStreamManager, tasks: TaskGroup) -> None:
    feed.fail(ValueError("broken"))


def end(feed: Feed, manager: SharedStreamManager, tasks: TaskGroup) -> None:
    feed.end()


def stop(feed: Feed, manager: SharedStreamManager, tasks: TaskGroup) -> None:
    tasks.start_soon(manager.stop, feed.key)


def overflow(feed: Feed, manager: SharedStreamManager, tasks: TaskGroup) -> None:
    tasks.start_soon(fall_behind, feed, 3)


@pytest.mark.parametrize(
    ("act", "terminal"),
    [(fail, ValueError), (end, PollTerminated), (stop, anyio.EndOfStream), (overflow, SubscriberOverflow)],
)
async def test_the_terminal_is_one_and_every_later_receive_repeats_it(
    act: Callable[[Feed, SharedStreamManager, TaskGroup], None], terminal: type[Exception]
) -> None:
    feed = Feed()
    async with (
        SharedStreamManager() as manager,
        manager.subscribe(feed.source, max_buffer_size=2) as stream,
        anyio.create_task_group() as tasks,
    ):
        await until(lambda: feed.opened)
        act(feed, manager, tasks)
        await settle(100)
        for _ in range(2):
            with pytest.raises(terminal):
                await stream.receive()
            with pytest.raises(terminal):
                stream.receive_nowait()
            with pytest.raises(terminal):
                await stream.receive_batch(10)


async def test_what_a_fresh_upstream_publishes_does_not_reach_those_of_the_dead_one() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as old:
        feed.emit("old")
        feed.fail(ValueError("broken"))
        assert await old.receive() == "old"
        with pytest.raises(ValueError, match="broken"):
            await old.receive()
        async with manager.subscribe(feed.source) as new:
            feed.emit("new")
            assert await new.receive() == "new"
            with pytest.raises(ValueError, match="broken"):
                await old.receive()


@pytest.mark.parametrize("bound", SIZES)
async def test_a_subscriber_may_be_as_many_events_behind_as_its_buffer_holds(bound: int) -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source, max_buffer_size=bound) as stream:
        await until(lambda: feed.opened)
        await fall_behind(feed, bound)
        assert await take(stream, bound) == list(range(bound))
        await fall_behind(feed, bound)
        assert await take(stream, bound) == list(range(bound))


@pytest.mark.parametrize("bound", SIZES)
async def test_one_event_more_than_the_buffer_holds_is_an_overflow_at_once(bound: int) -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source, max_buffer_size=bound) as stream:
        await until(lambda: feed.opened)
        await fall_behind(feed, bound + 1)
        with pytest.raises(SubscriberOverflow) as caught:
            await stream.receive()  # the backlog is stale, and dropped
        assert caught.value.max_buffer_size == bound


@pytest.mark.parametrize("bound", SIZES)
async def test_a_subscriber_that_had_taken_everything_accepts_a_whole_turn_whatever_its_bound(bound: int) -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source, max_buffer_size=bound) as stream:
        await until(lambda: feed.opened)
        for _ in range(3):
            feed.emit(*range(64))
            await settle()
            assert await take(stream, 64) == list(range(64))


async def leave_one_untaken(feed: Feed, stream: Subscription[Any]) -> None:
    await until(lambda: feed.opened)
    feed.emit("taken", "untaken")
    await settle()
    assert await stream.receive() == "taken"


@pytest.mark.parametrize("bound", SIZES[1:])
async def test_one_who_had_not_taken_everything_accepts_as_much_of_a_turn_as_its_buffer_has_room_for(bound: int) -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source, max_buffer_size=bound) as stream:
        await leave_one_untaken(feed, stream)
        feed.emit(*range(bound - 1))
        await settle(100)
        assert await take(stream, bound) == ["untaken", *range(bound - 1)]


@pytest.mark.parametrize("bound", SIZES)
async def test_a_turn_for_which_there_is_no_room_is_an_overflow_of_one_who_had_not_taken_everything(bound: int) -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source, max_buffer_size=bound) as stream:
        await leave_one_untaken(feed, stream)
        feed.emit(*range(bound))
        await settle(100)
        with pytest.raises(SubscriberOverflow):
            await stream.receive()


async def test_an_unbounded_subscriber_keeps_everything() -> None:
    feed = Feed()
    async with SharedStreamManager(max_buffer_size=float("inf")) as manager, manager.subscribe(feed.source) as stream:
        await until(lambda: feed.opened)
        feed.emit(*range(5000))
        await until(lambda: stream.statistics().current_buffer_used == 5000)
        assert await take(stream, 5000) == list(range(5000))
