"""Promise 7: a source that does not await starves nobody and overflows nobody who takes events as fast as it is scheduled."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from itertools import pairwise
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from anyio_sharedstream import Restart, SharedSource, SharedStreamManager, SubscriberOverflow, Subscription
from tests.support import until

TURN = 64
SIZES = [1, 8, 63, 64, 65]
TOTAL = 500


class Numbers:
    """Sources that yield 0, 1, 2, ... without end, and say how far they are."""

    def __init__(self) -> None:
        self.published = 0

    def _next(self) -> int:
        self.published += 1
        return self.published - 1

    async def endlessly(self) -> AsyncGenerator[int, None]:
        while True:
            yield self._next()

    async def in_bursts(self, size: int) -> AsyncGenerator[int, None]:
        while True:
            for _ in range(size):
                yield self._next()
            await checkpoint()

    def __aiter__(self) -> Numbers:
        return self

    async def __anext__(self) -> int:
        return self._next()


OPEN: dict[str, Callable[[Numbers], AsyncGenerator[int, None] | Numbers]] = {
    "endless": Numbers.endlessly,
    "iterator": lambda numbers: numbers,
    "bursts of 1": lambda numbers: numbers.in_bursts(1),
    "bursts of 63": lambda numbers: numbers.in_bursts(63),
    "bursts of 64": lambda numbers: numbers.in_bursts(64),
    "bursts of 65": lambda numbers: numbers.in_bursts(65),
    "bursts of 1000": lambda numbers: numbers.in_bursts(1000),
}


async def one_by_one(stream: Subscription[int]) -> list[int]:
    return [await stream.receive() for _ in range(TOTAL)]


async def in_batches(stream: Subscription[int]) -> list[int]:
    run: list[int] = []
    while len(run) < TOTAL:
        run += await stream.receive_batch(10)
    return run[:TOTAL]


async def as_ready(stream: Subscription[int]) -> list[int]:
    """Take what is there, and give way when there is nothing."""
    run: list[int] = []
    while len(run) < TOTAL:
        try:
            run.append(stream.receive_nowait())
        except anyio.WouldBlock:
            await checkpoint()
    return run


every_source = pytest.mark.parametrize("open_", OPEN.values(), ids=OPEN.keys())
every_reader = pytest.mark.parametrize("read", [one_by_one, in_batches, as_ready], ids=lambda read: read.__name__)
every_size = pytest.mark.parametrize("size", SIZES)
Read = Callable[[Subscription[int]], Awaitable[list[int]]]


@every_size
@every_source
@every_reader
async def test_a_subscriber_that_takes_what_comes_overflows_with_no_buffer_and_no_source(
    read: Read, open_: Callable[[Numbers], AsyncGenerator[int, None] | Numbers], size: int
) -> None:
    numbers = Numbers()
    async with SharedStreamManager() as manager:
        source = SharedSource(key="numbers", open=lambda: open_(numbers))
        async with manager.subscribe(source, max_buffer_size=size) as stream:
            assert await read(stream) == list(range(TOTAL))


@every_source
async def test_subscribers_of_all_kinds_and_sizes_keep_up_side_by_side(
    open_: Callable[[Numbers], AsyncGenerator[int, None] | Numbers],
) -> None:
    numbers = Numbers()
    source = SharedSource(key="numbers", open=lambda: open_(numbers))
    runs: list[list[int]] = []

    async def subscriber(read: Read, size: int) -> None:
        async with manager.subscribe(source, max_buffer_size=size) as stream:
            runs.append(await read(stream))

    async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:
        for size in SIZES:
            for read in (one_by_one, in_batches, as_ready, one_by_one):
                tasks.start_soon(subscriber, read, size)
    assert runs == [list(range(TOTAL))] * 20


@pytest.mark.parametrize("asked", [{}, {"gaps": True}], ids=["events", "events and gaps"])
async def test_one_who_is_behind_and_takes_small_batches_falls_no_further_behind(asked: Any) -> None:
    numbers = Numbers()
    run: list[Any] = []
    source = SharedSource(key="numbers", open=numbers.endlessly, restart=Restart())
    async with SharedStreamManager() as manager, manager.subscribe(source, max_buffer_size=4 * TURN, **asked) as stream:
        await until(lambda: numbers.published > 2 * TURN)
        while len(run) < 20 * TURN:
            run += await stream.receive_batch(10)
    assert run == list(range(len(run)))


@every_source
@pytest.mark.parametrize("reading", [True, False], ids=["read", "not read"])
async def test_a_heartbeat_gets_a_turn_at_least_once_in_64_events(
    open_: Callable[[Numbers], AsyncGenerator[int, None] | Numbers], reading: bool
) -> None:
    numbers = Numbers()
    beats: list[int] = []

    async def heartbeat() -> None:
        while True:
            beats.append(numbers.published)
            await checkpoint()

    async def unread(stream: Subscription[int]) -> list[int]:
        await until(lambda: numbers.published >= TOTAL)
        return []

    async with SharedStreamManager(max_buffer_size=float("inf")) as manager, anyio.create_task_group() as tasks:
        tasks.start_soon(heartbeat)
        async with manager.subscribe(SharedSource(key="numbers", open=lambda: open_(numbers))) as stream:
            await {True: one_by_one, False: unread}[reading](stream)
        tasks.cancel_scope.cancel()
    assert max(later - earlier for earlier, later in pairwise(beats)) <= TURN


@every_source
async def test_one_who_takes_nothing_overflows_and_holds_up_nobody(
    open_: Callable[[Numbers], AsyncGenerator[int, None] | Numbers],
) -> None:
    numbers = Numbers()
    source = SharedSource(key="numbers", open=lambda: open_(numbers))
    async with (
        SharedStreamManager() as manager,
        manager.subscribe(source, max_buffer_size=8) as idle,
        manager.subscribe(source, max_buffer_size=1) as stream,
    ):
        assert await one_by_one(stream) == list(range(TOTAL))
        with pytest.raises(SubscriberOverflow):
            await idle.receive()


@every_size
async def test_a_long_run_of_events_reaches_one_who_joins_in_the_middle_of_it(size: int) -> None:
    numbers = Numbers()
    source = SharedSource(key="numbers", open=numbers.endlessly)
    async with SharedStreamManager() as manager, manager.subscribe(source, max_buffer_size=size) as first:
        assert await first.receive() == 0
        async with manager.subscribe(source, max_buffer_size=size) as second:
            start = await second.receive()
            assert 0 < start <= numbers.published
            first.close()
            assert await one_by_one(second) == list(range(start + 1, start + 1 + TOTAL))


class Crowd:
    """Many subscribers, and how many events they have taken together."""

    SIZE = 50

    def __init__(self) -> None:
        self.taken = 0
        self.lagging: list[int] = []

    async def subscriber(self, stream: Subscription[int], total: int) -> None:
        for _ in range(total):
            await stream.receive()
            self.taken += 1

    async def run(self, source: Callable[[], AsyncGenerator[int, None]], turns: int, turn: int) -> None:
        async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:
            for _ in range(self.SIZE):
                stream = manager.subscribe(SharedSource(key="numbers", open=source), max_buffer_size=1)
                await stream.__aenter__()
                tasks.start_soon(self.subscriber, stream, turns * turn)
            await until(lambda: len(self.lagging) == turns)

    def look(self, published: int) -> None:
        """Called by the source when it runs again after a publication: how many deliveries has nobody taken yet?"""
        self.lagging.append(published * self.SIZE - self.taken)


@pytest.mark.parametrize("burst", [1, 8, TURN])
async def test_every_task_that_a_publication_woke_has_run_before_the_source_goes_on_after_a_suspension(burst: int) -> None:
    crowd = Crowd()

    async def source() -> AsyncGenerator[int, None]:
        for turn in range(20):
            for _ in range(burst):
                yield turn
            await checkpoint()
            crowd.look((turn + 1) * burst)
        await anyio.sleep_forever()

    await crowd.run(source, 20, burst)
    assert crowd.lagging == [0] * 20


async def test_every_task_that_a_publication_woke_has_run_before_the_source_goes_on_after_a_full_turn() -> None:
    crowd = Crowd()

    async def source() -> AsyncGenerator[int, None]:
        for turn in range(20):
            for _ in range(TURN):
                yield turn
            crowd.look((turn + 1) * TURN)
        await anyio.sleep_forever()

    await crowd.run(source, 20, TURN)
    assert crowd.lagging == [0] * 20


async def test_events_are_published_before_the_source_is_suspended() -> None:
    gate = anyio.Event()

    async def source() -> AsyncGenerator[int, None]:
        yield 0
        yield 1
        await gate.wait()
        yield 2
        await anyio.sleep_forever()

    async with SharedStreamManager() as manager, manager.subscribe(SharedSource(key="numbers", open=source)) as stream:
        assert await stream.receive() == 0
        assert stream.receive_nowait() == 1
        with pytest.raises(anyio.WouldBlock):
            stream.receive_nowait()
        gate.set()
        assert await stream.receive() == 2
