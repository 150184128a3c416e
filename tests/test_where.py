"""`where`: predicates before the buffer. What they refuse costs their subscriber nothing, and many may share one."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from typing import Any

import anyio
import pytest

from anyio_sharedstream import SharedSource, SharedStreamManager, SubscriberOverflow
from tests.contract_support import EVERY_POLICY, drain, even, routed
from tests.support import Feed, settle, until


def multiple_of(divisor: int) -> Callable[[int], bool]:
    return lambda number: number % divisor == 0


class Asked:
    """A predicate that records what it was asked, and does what it is told to. It cannot be hashed."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, answer: Callable[[Any], object] = bool) -> None:
        self.events: list[Any] = []
        self._answer = answer

    def __call__(self, event: Any) -> object:
        self.events.append(event)
        return self._answer(event)


class Steps:
    """Awaits something, and counts how often that took a step."""

    def __init__(self, awaitable: Awaitable[Any]) -> None:
        self._awaitable = awaitable
        self.steps = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        inner: Any = self._awaitable.__await__()
        sent: Any = None
        while True:
            self.steps += 1
            try:
                signal = inner.send(sent)
            except StopIteration as done:
                return done.value
            sent = yield signal


# What is refused.


@EVERY_POLICY
async def test_what_is_refused_takes_no_room_and_wakes_nobody(policy: Any) -> None:
    feed = Feed()
    received: list[Any] = []
    async with (
        SharedStreamManager() as manager,
        manager.subscribe(feed.source) as witness,
        manager.subscribe(feed.source, where=even, overflow=policy, max_buffer_size=1) as stream,
        anyio.create_task_group() as tasks,
    ):
        reading = Steps(stream.receive())

        async def read() -> None:
            received.append(await reading)

        tasks.start_soon(read)
        await settle()
        for number in range(1, 101, 2):
            feed.emit(number)
            assert await witness.receive() == number
        await settle()
        assert reading.steps == 1
        told = stream.statistics()
        assert (told.events_refused, told.events_missed, told.current_buffer_used, told.peak_buffer_used) == (50, 0, 0, 0)
        feed.emit(2)
        await until(lambda: received)
    assert received == [2]
    assert stream.statistics().events_received == 1


@EVERY_POLICY
async def test_what_is_refused_causes_no_overflow(policy: Any) -> None:
    feed = Feed()
    async with (
        SharedStreamManager() as manager,
        manager.subscribe(feed.source, where=even, overflow=policy, max_buffer_size=2) as stream,
        manager.subscribe(feed.source) as witness,
    ):
        # There is room for one more, for a full buffer of a `Block` would hold the source back before it is known what comes.
        feed.emit(0, *range(1, 60, 2))
        for _ in range(31):
            await witness.receive()
        told = stream.statistics()
        assert (told.current_buffer_used, told.events_refused, told.events_missed) == (1, 30, 0)
        assert told.held_seconds == 0
        assert drain(stream) == [0]


async def test_the_bound_counts_what_was_accepted() -> None:
    feed = Feed()
    async with (
        SharedStreamManager() as manager,
        manager.subscribe(feed.source) as witness,
        manager.subscribe(feed.source, where=even, max_buffer_size=3) as stream,
    ):
        for number in range(6):
            feed.emit(number)
            await witness.receive()
        assert stream.statistics().current_buffer_used == 3  # of six, and each in a turn of its own
        feed.emit(7)
        await witness.receive()
        feed.emit(8)
        await witness.receive()
        with pytest.raises(SubscriberOverflow):
            await stream.receive()


async def test_the_bound_does_not_count_a_turn_that_is_published_in_several_parts() -> None:
    go = anyio.Event()
    siblings: list[Any] = []

    async def play() -> AsyncGenerator[int, None]:
        await go.wait()
        for number in range(20):
            yield number
            # Whoever joins starts after what was gathered before, so this publishes it, in the middle of the source's turn.
            siblings.append(await manager.subscribe(source, max_buffer_size=math.inf).__aenter__())
        await anyio.sleep_forever()

    source = SharedSource(key="feed", open=play)
    async with SharedStreamManager() as manager, manager.subscribe(source, where=even, max_buffer_size=1) as stream:
        await settle()
        go.set()
        await until(lambda: len(siblings) == 20)
        await settle()
        assert drain(stream) == [*range(0, 20, 2)]
        assert [sibling.statistics().current_buffer_used for sibling in siblings] == [*range(19, -1, -1)]


async def test_events_keep_their_order_whoever_else_chooses() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager:
        streams = [await manager.subscribe(feed.source, where=multiple_of(n)).__aenter__() for n in range(1, 6)]
        for start in range(0, 120, 40):
            feed.emit(*range(start, start + 40))
            await settle()
        for n, stream in enumerate(streams, 1):
            assert drain(stream) == [*range(0, 120, n)]
            assert stream.statistics().events_refused == 120 - len(range(0, 120, n))


@pytest.mark.parametrize(("answer", "accepted"), [(0, False), ("", False), (None, False), (1, True), ("no", True)], ids=repr)
async def test_any_truth_value_is_an_answer(answer: object, accepted: bool) -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source, where=lambda _: answer) as stream:
        feed.emit("event")
        await settle()
        assert bool(stream.statistics().current_buffer_used) == accepted
        assert bool(stream.statistics().events_refused) != accepted


# One predicate for many.


@EVERY_POLICY
async def test_one_predicate_of_many_subscribers_is_asked_once_per_event(policy: Any) -> None:
    feed = Feed()
    shared, own = Asked(even), Asked(even)
    assert shared is not own
    async with SharedStreamManager() as manager:
        for _ in range(20):
            await manager.subscribe(feed.source, where=shared, overflow=policy).__aenter__()
        await manager.subscribe(feed.source, where=own).__aenter__()
        feed.emit(*range(10))
        feed.emit(4, 4)
        await settle()
        assert shared.events == own.events == [*range(10), 4, 4]
        told = manager.statistics().groups["feed"].subscriptions
        assert [subscription.events_refused for subscription in told] == [5] * 21


async def test_it_is_asked_once_also_by_those_who_ask_for_routes_and_of_nothing_else() -> None:
    feed = Feed()
    where = Asked(even)
    source = routed(feed, lambda number: number % 5)
    async with SharedStreamManager() as manager:
        streams = [await manager.subscribe(source, where=where, routes={n, n + 1}).__aenter__() for n in range(3)]
        feed.emit(*range(20))
        await settle()
        assert sorted(where.events) == [number for number in range(20) if number % 5 < 4]
        where.events.clear()
        everything = await manager.subscribe(source, where=where).__aenter__()
        feed.emit(*range(20))
        await settle()
        assert sorted(where.events) == [*range(20)]
        assert drain(everything) == [*range(0, 20, 2)]
        for n, stream in enumerate(streams):
            assert drain(stream) == [number for number in range(0, 20, 2) if number % 5 in (n, n + 1)] * 2
