"""`Block`: the source waits before its next step while a subscriber has no room, exactly as long as that is so or allowed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from anyio_sharedstream import Block, DropOldest, Latest, SharedSource, SharedStreamManager, SubscriberOverflow, Subscription
from tests.block_support import KINDS, Steps, generator, published
from tests.support import Feed, settle, until
from tests.sweep import Reader, drain, managed
from tests.virtual_time import in_virtual_time

FOREVER = Block(math.inf)
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@kinds
@pytest.mark.parametrize("rests", [0, 1, 3])
@pytest.mark.parametrize("size", [1, 2, 8, 64, 100])
async def test_the_source_is_held_before_its_next_step_until_there_is_room(
    size: int, rests: int, kind: Callable[[Steps], Any]
) -> None:
    steps = Steps(kind, rests)
    async with (
        managed() as manager,
        anyio.create_task_group() as tasks,
        manager.subscribe(steps.source, max_buffer_size=size, overflow=FOREVER) as stream,
        manager.subscribe(steps.source, max_buffer_size=1) as other,
    ):
        reader = Reader(other)
        tasks.start_soon(reader.run)
        got: list[int] = []
        # One at a time, then so many that the source goes on for a while.
        for taken in [0, 1, 2, 3, 3 + size, 250]:
            while len(got) < taken:
                got.append(await stream.receive())
            await until(lambda: steps.begun == len(got) + size)
            await settle()
            assert steps.begun == len(got) + size
            # Whatever was published, others have.
            assert reader.got == list(range(steps.begun))
        assert got == list(range(250))
        assert stream.statistics().peak_buffer_used == size
        assert reader.terminal is None
    assert steps.opened == steps.closed


async def one_by_one(stream: Subscription[int], got: list[int]) -> None:
    while True:
        got.append(await anext(stream))


async def in_batches(stream: Subscription[int], got: list[int]) -> None:
    async for batch in stream.batches(5):
        got += batch


async def slowly(stream: Subscription[int], got: list[int]) -> None:
    while True:
        got.append(await stream.receive())
        await settle(len(got) % 4)


@kinds
@pytest.mark.parametrize("rests", [0, 3])
async def test_readers_of_every_speed_get_everything_in_order(rests: int, kind: Callable[[Steps], Any]) -> None:
    steps = Steps(kind, rests)
    async with managed() as manager:
        received: list[list[int]] = []
        streams = []
        async with anyio.create_task_group() as tasks:
            for size in [1, 2, 8, 64, 100]:
                for read in [one_by_one, in_batches, slowly]:
                    stream = await manager.subscribe(steps.source, max_buffer_size=size, overflow=FOREVER).__aenter__()
                    streams.append(stream)
                    received.append([])
                    tasks.start_soon(read, stream, received[-1])
            await until(lambda: min(map(len, received)) >= 150)
            tasks.cancel_scope.cancel()
        for stream, got in zip(streams, received, strict=True):
            assert got + drain(stream)[0] == list(range(published(manager)))
            statistics = stream.statistics()
            assert statistics.peak_buffer_used <= statistics.max_buffer_size
        await manager.stop_all()
    assert steps.opened == steps.closed


async def test_only_block_shortens_the_turn_of_the_source() -> None:
    rounds = 0
    steps_in: Counter[int] = Counter()

    async def busy() -> AsyncGenerator[int, None]:
        while True:
            steps_in[rounds] += 1
            yield 0

    async def longest_turn() -> int:
        nonlocal rounds
        begun = rounds
        while rounds < begun + 20:
            rounds += 1
            await checkpoint()
        # The first one had begun before.
        return max(steps_in[turn] for turn in range(begun + 5, rounds))

    source = SharedSource(key="busy", open=busy)
    async with managed() as manager, anyio.create_task_group() as tasks:
        others: list[Any] = [
            manager.subscribe(source, max_buffer_size=1),
            manager.subscribe(source, max_buffer_size=2, overflow=DropOldest()),
            manager.subscribe(source, overflow=Latest()),
            manager.subscribe(source, max_buffer_size=100, overflow=FOREVER),  # that it has room is no matter of who has left
        ]
        for other in others:
            tasks.start_soon(Reader(await other.__aenter__()).run)
        assert await longest_turn() == 64
        for size in [100, 8, 1]:
            blocking = await manager.subscribe(source, max_buffer_size=size, overflow=FOREVER).__aenter__()
            tasks.start_soon(Reader(blocking).run)
            assert await longest_turn() == min(size, 64)
            await blocking.aclose()
            assert await longest_turn() == 64
        tasks.cancel_scope.cancel()
        await manager.stop_all()


async def test_what_the_subscriber_does_not_want_takes_no_room() -> None:
    steps = Steps(generator)
    async with (
        managed() as manager,
        manager.subscribe(steps.source, max_buffer_size=1, overflow=FOREVER, where=lambda event: event % 10 == 9) as stream,
    ):
        for expected in [9, 19, 29]:
            await until(partial(steps.have_begun, expected + 1))
            await settle()
            assert steps.begun == expected + 1
            assert await stream.receive() == expected
        assert stream.statistics().events_refused == published(manager) - 3


async def test_routes_of_others_take_no_room() -> None:
    steps = Steps(generator)
    source = SharedSource(key="routed", open=steps.source.open, route_by=lambda event: event % 3)
    async with managed() as manager, manager.subscribe(source, max_buffer_size=2, overflow=FOREVER, routes={1}) as stream:
        await until(lambda: steps.begun == 5)
        await settle()
        assert steps.begun == 5
        assert [await stream.receive() for _ in range(4)] == [1, 4, 7, 10]


async def test_a_source_that_receives_from_a_block_subscription_passes_the_hold_on() -> None:
    steps = Steps(generator)

    async def relay() -> AsyncGenerator[int, None]:
        async with manager.subscribe(steps.source, max_buffer_size=3, overflow=FOREVER) as stream:
            while True:
                yield await stream.receive()

    relayed = SharedSource(key="relayed", open=relay)
    async with managed() as manager, manager.subscribe(relayed, max_buffer_size=2, overflow=FOREVER) as stream:
        for taken in range(10):
            await until(partial(steps.have_begun, taken + 5))
            await settle()
            assert steps.begun == taken + 5
            assert await stream.receive() == taken
    assert steps.closed == 1


async def test_who_joins_during_a_hold_starts_after_what_was_published() -> None:
    steps = Steps(generator)
    async with managed() as manager, manager.subscribe(steps.source, max_buffer_size=3, overflow=FOREVER) as stream:
        await until(lambda: steps.begun == 3)
        async with (
            manager.subscribe(steps.source) as late,
            manager.subscribe(steps.source, max_buffer_size=1, overflow=FOREVER) as blocking,
        ):
            await settle()
            assert drain(late) == drain(blocking) == ([], None)
            assert [await stream.receive() for _ in range(3)] == [0, 1, 2]
            # Now it is the newcomer who holds the source.
            await settle()
            assert steps.begun == 4
            assert await late.receive() == await blocking.receive() == await stream.receive() == 3


async def emit_and_watch(manager: SharedStreamManager, feed: Feed, tasks: anyio.abc.TaskGroup) -> list[tuple[float, int]]:
    """Let the feed give four events; returns where it will be written when another subscriber receives them."""
    watched: list[tuple[float, int]] = []
    reader = Reader(
        await manager.subscribe(feed.source).__aenter__(), lambda event: watched.append((anyio.current_time(), event))
    )
    tasks.start_soon(reader.run)
    feed.emit(0, 1, 2, 3)
    await settle()
    return watched


@pytest.mark.parametrize("began", [0, 1.3, 1e6 + 1 / 3])
@pytest.mark.parametrize("up_to", [0.1, 0.7, 5, 1e5])
@in_virtual_time
async def test_after_its_time_the_subscriber_fails_alone_and_the_upstream_goes_on(began: float, up_to: float) -> None:
    feed = Feed()
    async with managed(feed) as manager, anyio.create_task_group() as tasks:
        await anyio.sleep(began)
        stream = await manager.subscribe(feed.source, max_buffer_size=1, overflow=Block(up_to)).__aenter__()
        watched = await emit_and_watch(manager, feed, tasks)
        await anyio.sleep_until(began + up_to - 0.01)
        assert watched == [(began, 0)]
        assert stream.statistics().current_buffer_used == 1
        await anyio.sleep_until(began + up_to)
        # The exact moment, also where began + up_to - began is less than up_to: a clock may stand still.
        await settle()
        assert watched == [(began, 0)] + [(began + up_to, event) for event in [1, 2, 3]]
        with pytest.raises(SubscriberOverflow) as caught:
            await stream.receive()
        assert (caught.value.key, caught.value.max_buffer_size) == (feed.key, 1)
        assert caught.value.subscriber_id == stream.subscriber_id
        assert stream.statistics().held_seconds == began + up_to - began
        feed.emit(4)
        await settle()
        assert watched[-1] == (began + up_to, 4)
        tasks.cancel_scope.cancel()
        await manager.stop_all()


@in_virtual_time
async def test_several_are_waited_for_side_by_side() -> None:
    feed = Feed()
    async with managed(feed) as manager, anyio.create_task_group() as tasks:
        streams = {
            up_to: await manager.subscribe(feed.source, max_buffer_size=1, overflow=Block(up_to)).__aenter__()
            for up_to in [4, 1, math.inf, 2, 10**9, 16]
        }
        roomy = await manager.subscribe(feed.source, overflow=Block(0.5)).__aenter__()
        watched = await emit_and_watch(manager, feed, tasks)
        await anyio.sleep_until(8)
        assert watched == [(0, 0)]
        assert await streams[16].receive() == 0
        await anyio.sleep_until(1000)
        assert await streams[math.inf].receive() == 0
        await anyio.sleep_until(2000)
        assert await streams[10**9].receive() == 0
        await settle()
        # Then the next hold: the one with little patience, which had room in the first, has none in this.
        await anyio.sleep_until(3000)
        assert await streams[math.inf].receive() == 1
        assert await streams[10**9].receive() == 1
        await settle()
        held = {up_to: stream.statistics().held_seconds for up_to, stream in streams.items()}
        assert held == {4: 4, 1: 1, math.inf: 2000, 2: 2, 10**9: 3000, 16: 24}
        assert watched == [(0, 0), (2000, 1), (3000, 2)]
        for up_to in [1, 2, 4, 16]:
            assert isinstance(drain(streams[up_to])[1], SubscriberOverflow)
        assert roomy.statistics().held_seconds == 0
        assert drain(roomy) == ([0, 1, 2], None)
        tasks.cancel_scope.cancel()
        await manager.stop_all()


@in_virtual_time
async def test_every_hold_has_all_the_time_and_their_sum_is_in_the_statistics() -> None:
    feed = Feed()
    async with managed(feed) as manager, manager.subscribe(feed.source, max_buffer_size=2, overflow=Block(2)) as stream:
        feed.emit(*range(20))
        for expected in range(20):
            await anyio.sleep(1.5)
            assert await stream.receive() == expected
        # Only before the last reception was there room: for the last event, which had come.
        await settle()
        assert stream.statistics().held_seconds == 1.5 * 19


@in_virtual_time
async def test_the_statistics_count_a_hold_while_it_lasts() -> None:
    feed = Feed()
    async with managed(feed) as manager, manager.subscribe(feed.source, max_buffer_size=1, overflow=FOREVER) as stream:
        feed.emit(0, 1)
        await anyio.sleep(60)
        # Who watches wants to know of a hold that does not end.
        assert stream.statistics().held_seconds == 60


@pytest.mark.parametrize(
    "up_to", [0, -1, -math.inf, math.nan, True, False, "5", None, 1j, 10**400], ids=lambda up_to: repr(up_to)[:9]
)
def test_a_bad_time_is_refused_by_name(up_to: Any) -> None:
    # The last is a number that no clock can add to its time: found out during a hold, that would be everyone's failure.
    with pytest.raises(ValueError, match="up_to must be a positive number of seconds") as caught:
        Block(up_to)
    assert repr(up_to) in str(caught.value)
