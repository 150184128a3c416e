"""Whatever an upstream's bursts and a subscriber's bound, who takes events as fast as it is scheduled never overflows."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from itertools import count, islice

import anyio
import anyio.to_thread
import pytest
from anyio.lowlevel import checkpoint

from anyio_sharedstream import SharedSource, SubscriberOverflow, Subscription
from tests.support import Feed, settle
from tests.sweep import SCOPE, Cut, Reader, drain, managed

BOUNDS = [1, 8, 63, 64, 65]
BURSTS = [1, 63, 64, 65, 200, 1000]
EVENTS = sum(BURSTS) * 2

Stream = Subscription[int]
Take = Callable[[Stream], AsyncGenerator[int, None]]
Pause = Callable[[], Awaitable[object]]


async def per_item(stream: Stream) -> AsyncGenerator[int, None]:
    while True:
        yield await stream.receive()


async def iterated(stream: Stream) -> AsyncGenerator[int, None]:
    while True:
        yield await anext(stream)


async def in_small_batches(stream: Stream) -> AsyncGenerator[int, None]:
    batches = stream.batches(5)
    while True:
        for event in await anext(batches):
            yield event


async def in_large_batches(stream: Stream) -> AsyncGenerator[int, None]:
    batches = stream.batches(100)
    while True:
        for event in await anext(batches):
            yield event


async def nowait(stream: Stream) -> AsyncGenerator[int, None]:
    while True:
        yield await stream.receive()
        for event in drain(stream)[0]:
            yield event


TAKES: list[Take] = [per_item, iterated, in_small_batches, in_large_batches, nowait]


async def wait_for_an_event() -> None:
    async with anyio.create_task_group() as tasks:
        rung = anyio.Event()

        async def ring() -> None:
            rung.set()

        tasks.start_soon(ring)
        await rung.wait()


async def wait_for_a_task() -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(checkpoint)


async def wait_for_a_thread() -> None:
    await anyio.to_thread.run_sync(int)


PAUSES: list[Pause] = [checkpoint, wait_for_an_event, wait_for_a_task, wait_for_a_thread]
pausing = pytest.mark.parametrize("pause", PAUSES)
taking = pytest.mark.parametrize("take", TAKES)


def bursting(pause: Pause) -> SharedSource[int]:
    """Bursts of consecutive numbers with a pause after each; every size follows a smaller and a larger one."""

    async def events() -> AsyncIterator[int]:
        numbers = count()
        for size in BURSTS * 2:
            for event in islice(numbers, size):
                yield event
            await pause()
        await anyio.sleep_forever()

    return SharedSource(key="bursts", open=events)


async def receive_all(source: SharedSource[int], readers: list[tuple[Take, int]]) -> None:
    """Each reader, in a task of its own and with a bound of its own, must get every event in order."""

    async def read(take: Take, stream: Stream) -> None:
        async with stream, aclosing(take(stream)) as events:
            assert [await anext(events) for _ in range(EVENTS)] == list(range(EVENTS))
            statistics = stream.statistics()
            assert statistics.events_received == EVENTS
            assert statistics.current_buffer_used == 0
            # The bound, or one turn of the source if that is more.
            assert statistics.peak_buffer_used <= max(statistics.max_buffer_size, 64)

    async with managed() as manager, anyio.create_task_group() as tasks:
        for take, bound in readers:
            tasks.start_soon(read, take, manager.subscribe(source, max_buffer_size=bound))


@pausing
@taking
async def test_a_reader_that_takes_at_once_never_overflows(take: Take, pause: Pause) -> None:
    for bound in BOUNDS:
        await receive_all(bursting(pause), [(take, bound)])


@pausing
async def test_readers_of_every_kind_and_bound_share_one_upstream(pause: Pause) -> None:
    await receive_all(bursting(pause), [(take, bound) for take in TAKES for bound in BOUNDS])


@pytest.mark.parametrize("bound", BOUNDS)
async def test_a_burst_of_any_size_reaches_a_parked_reader_whole(bound: int) -> None:
    for size in BURSTS:
        feed = Feed()
        async with (
            managed(feed) as manager,
            anyio.create_task_group() as tasks,
            manager.subscribe(feed.source, max_buffer_size=bound) as stream,
        ):
            reader = Reader(stream)
            tasks.start_soon(reader.run)
            await settle(5)
            feed.emit(*range(size))
            await settle(60)
            assert reader.got == list(range(size))


@pytest.mark.parametrize("bound", BOUNDS)
async def test_one_turn_is_accepted_by_whoever_was_caught_up_and_the_bound_counts_from_there(bound: int) -> None:
    for size in BURSTS:
        feed = Feed()
        async with managed(feed) as manager, manager.subscribe(feed.source, max_buffer_size=bound) as stream:
            await settle(5)
            feed.emit(*range(size))
            await settle(50)
            events, terminal = drain(stream)
            # The first turn has at most 64 events; whatever comes after it must fit into the bound, all included.
            if size <= max(64, bound):
                assert (events, terminal) == (list(range(size)), None)
            else:
                assert events == []
                assert isinstance(terminal, SubscriberOverflow)


async def test_a_turn_that_joiners_have_published_in_parts_is_accepted_like_any_other() -> None:
    go, again = anyio.Event(), anyio.Event()

    async def source() -> AsyncGenerator[int, None]:
        await go.wait()
        for number in range(9):
            if number in (2, 5):
                async with manager.subscribe(shared):  # publishes what was yielded so far
                    pass
            yield number
        await again.wait()
        yield 9
        await anyio.sleep_forever()

    shared = SharedSource(key="feed", open=source)
    async with managed() as manager, manager.subscribe(shared, max_buffer_size=1) as stream:
        await settle(5)
        go.set()
        await settle(5)
        assert stream.statistics().current_buffer_used == 9
        again.set()  # this is another turn, for which there is no room
        await settle(5)
        assert isinstance(drain(stream)[1], SubscriberOverflow)


async def test_a_joiner_in_each_turn_of_the_source_takes_no_turn_from_a_reader_of_a_buffer_of_one_event() -> None:
    """Who was woken by such a publication has run, too, before the source goes on after its suspension."""

    async def source() -> AsyncGenerator[int, None]:
        numbers = count()
        while True:
            yield next(numbers)
            async with manager.subscribe(shared):
                pass
            await checkpoint()

    shared = SharedSource(key="feed", open=source)
    async with managed() as manager, manager.subscribe(shared, max_buffer_size=1) as stream:
        assert [await stream.receive() for _ in range(100)] == list(range(100))


@pytest.mark.parametrize("bound", BOUNDS)
async def test_an_idle_subscriber_overflows_alone_on_one_event_more_than_its_bound(bound: int) -> None:
    feed = Feed()
    async with (
        managed(feed) as manager,
        manager.subscribe(feed.source, max_buffer_size=bound) as idler,
        manager.subscribe(feed.source, max_buffer_size=1) as reader,
    ):
        for event in range(bound):
            feed.emit(event)
            assert await reader.receive() == event
        assert idler.statistics().current_buffer_used == bound
        feed.emit(bound)
        assert await reader.receive() == bound
        with pytest.raises(SubscriberOverflow) as caught:
            await idler.receive()
        assert caught.value.max_buffer_size == bound
        assert len(manager.statistics().groups[feed.key].subscriptions) == 1


@pytest.mark.parametrize("limit", [0, 1, 5, 64], ids=["receive", "batches of 1", "batches of 5", "batches of 64"])
async def test_a_reader_that_is_behind_gives_the_others_a_turn_within_64_events(limit: int) -> None:
    feed = Feed()
    steps = Cut(SCOPE, 0)  # counted, not cut
    taken: Counter[int] = Counter()

    async def take(stream: Stream) -> None:
        while taken.total() < 1000:
            size = len(await stream.receive_batch(limit) if limit else [await stream.receive()])
            taken[steps.steps] += size

    async with managed(feed) as manager, manager.subscribe(feed.source, max_buffer_size=2000) as stream:
        # Chunks that do not end where batches do.
        for start in range(0, 1000, 41):
            feed.emit(*range(start, start + 41))
            await settle(5)
        await steps.run(take(stream))
    # The event or batch that makes it more than a turn may still be taken before others run.
    assert max(taken.values()) <= 64 + limit
