"""`Gap` at a restart: where it stands for each policy, that it takes no room, and that nobody who does not read keeps many."""

from __future__ import annotations

import gc
import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any

import anyio
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from anyio_sharedstream import (
    Block,
    Conflate,
    DropNewest,
    DropOldest,
    Fail,
    Gap,
    Latest,
    PollTerminated,
    Restart,
    SharedSource,
    SharedStreamManager,
    SubscriberOverflow,
)
from tests.policies_support import missing, parity, publish
from tests.properties import on_each
from tests.support import Feed, settle, until
from tests.sweep import Reader, drain, managed, noted
from tests.virtual_time import in_virtual_time, run

AT_ONCE = Restart(initial_delay=0, jitter=0)
RESTARTED = Gap(None, "restart")
POLICIES: list[Any] = [Fail(), Block(math.inf), DropOldest(), DropNewest(), Latest(), Conflate(parity)]
NAMES = ["Fail", "Block", "DropOldest", "DropNewest", "Latest", "Conflate"]
policies = pytest.mark.parametrize("policy", POLICIES, ids=NAMES)


@asynccontextmanager
async def subscribed(
    policy: Any, bound: int = 100, *, gaps: bool = True, again: Restart = AT_ONCE
) -> AsyncIterator[tuple[Feed, Any]]:
    feed = Feed()
    asked: Any = {"overflow": policy, "max_buffer_size": bound, "gaps": gaps}
    async with managed(feed) as manager, manager.subscribe(feed.asking_for(restart=again), **asked) as stream:
        await settle()
        yield feed, stream


async def restart(feed: Feed) -> None:
    opened = feed.opened
    feed.fail(ConnectionError("lost"))
    await until(lambda: feed.opened > opened)
    await settle()


@pytest.mark.parametrize("gaps", [True, False])
@policies
async def test_the_gap_stands_between_the_events_of_two_openings(policy: Any, gaps: bool) -> None:
    async with subscribed(policy, gaps=gaps) as (feed, stream):
        feed.emit(1)
        await restart(feed)
        await publish(feed, 2)
        expected = [missing(1), RESTARTED, 2] if isinstance(policy, Latest) else [1, RESTARTED, 2]
        assert drain(stream) == ([item for item in expected if gaps or not isinstance(item, Gap)], None)
        await restart(feed)
        assert drain(stream) == ([RESTARTED] * gaps, None)
        await publish(feed, 3)
        assert drain(stream) == ([3], None)


@policies
async def test_a_source_that_is_not_restarted_has_no_such_gaps(policy: Any) -> None:
    feed = Feed()
    async with managed(feed) as manager, manager.subscribe(feed.source, overflow=policy, gaps=True) as stream:
        await publish(feed, 1)
        feed.fail(ConnectionError("lost"))
        await settle()
        items, terminal = drain(stream)
        assert (items, type(terminal)) == ([1], ConnectionError)


@policies
async def test_gaps_of_restarts_with_nothing_between_are_one(policy: Any) -> None:
    async with subscribed(policy) as (feed, stream):
        for _ in range(3):
            await restart(feed)
        await publish(feed, 1)
        for _ in range(3):
            await restart(feed)
        assert stream.receive_nowait() == RESTARTED
        assert drain(stream) == ([1, RESTARTED], None)
        for _ in range(2):
            await restart(feed)
            assert drain(stream) == ([RESTARTED], None)  # what was received is not told again, and what is new is


async def test_a_gap_of_a_restart_stands_before_what_a_burst_after_it_has_lost() -> None:
    async with subscribed(Latest()) as (feed, stream):
        await restart(feed)
        for event in range(3):
            feed.emit(event)
        await settle()
        assert drain(stream) == ([RESTARTED, missing(2), 2], None)


@pytest.mark.parametrize("bound", [1, 2, 3])
async def test_gaps_of_restarts_between_which_every_event_was_dropped_are_one(bound: int) -> None:
    async with subscribed(DropOldest(), bound) as (feed, stream):
        for event in range(bound + 2):
            await publish(feed, event)
            await restart(feed)
        left = [item for event in range(2, bound + 2) for item in (event, RESTARTED)]
        assert stream.statistics().current_buffer_used == bound
        assert drain(stream) == ([missing(2), RESTARTED, *left], None)


async def test_the_oldest_event_left_is_the_first_of_the_end_too() -> None:
    async with subscribed(DropOldest(), 2) as (feed, stream):
        for event in range(4):
            await publish(feed, event)
            await restart(feed)
        feed.end()
        await settle()
        items, terminal = drain(stream)
        assert items == [missing(2), RESTARTED, 2, RESTARTED, 3, RESTARTED]
        assert isinstance(terminal, PollTerminated)


async def test_gaps_between_which_the_only_event_was_replaced_are_one() -> None:
    async with subscribed(Conflate(parity)) as (feed, stream):
        for event in (1, 3, 5):
            await publish(feed, event)
            await restart(feed)
        await publish(feed, 2)
        assert drain(stream) == ([RESTARTED, 5, RESTARTED, 2], None)
    async with subscribed(Conflate(parity)) as (feed, stream):
        for event in (1, 3, 5):
            await restart(feed)
            await publish(feed, event)
        assert drain(stream) == ([RESTARTED, 5], None)


async def test_an_entry_that_is_replaced_after_a_restart_moves_behind_the_gap() -> None:
    async with subscribed(Conflate(parity), 3) as (feed, stream):
        await publish(feed, 1, 2)
        await restart(feed)
        await publish(feed, 3, 5)
        assert stream.statistics().current_buffer_used == 2
        assert drain(stream) == ([2, RESTARTED, 5], None)
    async with subscribed(Conflate(parity, lambda old, new: old + new), 3) as (feed, stream):
        await publish(feed, 1, 2)
        await restart(feed)
        await publish(feed, 3, 5)
        assert drain(stream) == ([2, RESTARTED, 9], None)


def third(event: int) -> int:
    return event % 3


async def test_entries_that_have_all_moved_behind_the_gap_are_all_kept_in_their_order() -> None:
    async with subscribed(Conflate(third)) as (feed, stream):
        await publish(feed, 0, 1, 2)
        await restart(feed)
        await publish(feed, 3, 4, 5)
        assert stream.statistics().current_buffer_used == 3
        assert drain(stream) == ([RESTARTED, 3, 4, 5], None)


@pytest.mark.parametrize("moved", [1, 2])
async def test_the_rest_is_received_by_one_that_began_to_read_after_entries_had_moved(moved: int) -> None:
    async with subscribed(Conflate(third)) as (feed, stream):
        await publish(feed, 0, 1, 2)
        await restart(feed)
        await publish(feed, 3, 4, 5)
        await restart(feed)
        await publish(feed, *[6, 7][:moved])
        assert [stream.receive_nowait(), stream.receive_nowait()] == [RESTARTED, [3, 4, 5][moved]]
        feed.end()
        await settle()
        items, terminal = drain(stream)
        assert items == [*[3, 4, 5][moved + 1 :], RESTARTED, *[6, 7][:moved]]
        assert isinstance(terminal, PollTerminated)


@pytest.mark.parametrize(
    ("policy", "first", "second", "third"),
    [
        (DropOldest(), [missing(1), 2, 3, RESTARTED], [missing(3), RESTARTED, 4, 5], [missing(4), RESTARTED, 5, 6, RESTARTED]),
        (DropNewest(), [1, 2, missing(1), RESTARTED], [1, 2, missing(3), RESTARTED], [1, 2, missing(4), RESTARTED]),
        (Latest(), [missing(2), 3, RESTARTED], [missing(4), RESTARTED, 5], [missing(5), RESTARTED, 6, RESTARTED]),
    ],
    ids=["DropOldest", "DropNewest", "Latest"],
)
async def test_of_each_cause_there_is_one_gap_in_a_place(
    policy: Any, first: list[Any], second: list[Any], third: list[Any]
) -> None:
    for steps, expected in ((1, first), (2, second), (3, third)):
        async with subscribed(policy, 2) as (feed, stream):
            await publish(feed, 1, 2, 3)
            await restart(feed)
            if steps > 1:
                await publish(feed, 4, 5)
            if steps > 2:
                await publish(feed, 6)
                await restart(feed)
            assert drain(stream) == (expected, None)
            assert stream.statistics().events_missed == sum(item.missed or 0 for item in expected if isinstance(item, Gap))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (DropOldest(), [RESTARTED, missing(2), 3, 4]),
        (DropNewest(), [RESTARTED, 1, 2, missing(2)]),
        (Latest(), [RESTARTED, missing(3), 4]),
    ],
    ids=["DropOldest", "DropNewest", "Latest"],
)
async def test_what_is_missed_after_a_restart_is_told_after_it(policy: Any, expected: list[Any]) -> None:
    async with subscribed(policy, 2) as (feed, stream):
        await restart(feed)
        assert drain(stream) == ([RESTARTED], None)
        await restart(feed)
        await publish(feed, 1, 2, 3, 4)
        assert drain(stream) == (expected, None)


@policies
async def test_gaps_come_before_the_terminal_and_an_end_that_is_final_leaves_none(policy: Any) -> None:
    async with subscribed(policy, again=Restart(initial_delay=0, jitter=0, max_restarts=2)) as (feed, stream):
        await publish(feed, 1)
        await restart(feed)
        await restart(feed)
        feed.fail(ConnectionError("lost for good"))
        await until(lambda: feed.closed == 3)
        await settle()
        items, terminal = drain(stream)
        assert items == [1, RESTARTED]
        assert repr(terminal) == repr(ConnectionError("lost for good"))
    async with subscribed(policy) as (feed, stream):
        await restart(feed)
        feed.end()
        await settle()
        items, terminal = drain(stream)
        assert (items, type(terminal)) == ([RESTARTED], PollTerminated)


@policies
async def test_batches_have_gaps_among_their_items(policy: Any) -> None:
    async with subscribed(policy) as (feed, stream):
        await publish(feed, 2)
        await restart(feed)
        if not isinstance(policy, Latest):
            await publish(feed, 1)
            await restart(feed)
            assert await stream.receive_batch(3) == (2, RESTARTED, 1)
            assert stream.statistics().events_received == 2
            assert await anext(stream.batches(3)) == (RESTARTED,)
        else:
            assert await stream.receive_batch(1) == (2,)
            assert await stream.receive_batch(3) == (RESTARTED,)
        await restart(feed)
        await publish(feed, 3)
        assert await stream.receive_batch(3) == (RESTARTED, 3)


@pytest.mark.parametrize("bound", [1, 2, 64])
@policies
async def test_gaps_take_no_room_and_are_not_counted(policy: Any, bound: int) -> None:
    # Who holds the upstream when there is no room must have some for it to be restarted.
    async with subscribed(policy, bound + isinstance(policy, Block)) as (feed, stream):
        for number in range(bound):
            await restart(feed)
            await publish(feed, number)
        await restart(feed)
        statistics = stream.statistics()
        # It keeps one, or one of each kind.
        kept = {"Latest": 1, "Conflate": min(bound, 2)}.get(type(policy).__name__, bound)
        assert statistics.current_buffer_used == statistics.peak_buffer_used == kept
        assert statistics.events_missed == bound - kept
        items, terminal = drain(stream)
        assert terminal is None
        assert [item for item in items if not isinstance(item, Gap)] == [*range(bound - kept, bound)]
        assert stream.statistics().current_buffer_used == 0
        assert stream.statistics().events_received == kept


@policies
@in_virtual_time
async def test_the_gap_wakes_its_reader_when_the_upstream_has_closed_and_not_only_when_it_is_back(policy: Any) -> None:
    feed = Feed()
    source = feed.asking_for(restart=Restart(initial_delay=5, jitter=0))
    times: list[tuple[float, object]] = []

    async with managed(feed) as manager, anyio.create_task_group() as tasks:
        async with manager.subscribe(source, overflow=policy, gaps=True) as stream:
            reader = Reader(stream, lambda item: times.append((anyio.current_time(), item)))
            tasks.start_soon(reader.run)
            await anyio.sleep(1)
            feed.fail(ConnectionError("lost"))
            await anyio.sleep(1)
            feed.emit(1)
            await anyio.sleep(10)
        assert times == [(1, RESTARTED), (6, 1)]


@policies
@in_virtual_time
async def test_one_that_comes_after_the_failure_has_missed_nothing(policy: Any) -> None:
    feed, close = Feed(), anyio.Event()
    source = SharedSource(key="feed", open=feed.closed_late(close), restart=Restart(initial_delay=1, jitter=0))
    asked: Any = {"overflow": policy, "gaps": True}
    async with managed(feed) as manager, AsyncExitStack() as stack:
        stack.callback(close.set)
        witness = await stack.enter_async_context(manager.subscribe(source, **asked))
        await settle()
        feed.fail(ConnectionError("lost"))
        await settle()
        assert manager.statistics().groups["feed"].state == "restarting"
        first = await stack.enter_async_context(manager.subscribe(source, **asked))
        close.set()
        await settle()
        second = await stack.enter_async_context(manager.subscribe(source, **asked))
        await anyio.sleep(2)
        await publish(feed, 1)
        assert drain(witness) == ([RESTARTED, 1], None)
        assert drain(second) == ([1], None)
        assert drain(first) == ([1], None)


@pytest.mark.parametrize("events", [0, 2])
@policies
@in_virtual_time
async def test_one_that_never_reads_keeps_a_few_gaps_over_thousands_of_restarts(policy: Any, events: int) -> None:
    opened = 0

    async def play() -> AsyncGenerator[int, None]:
        nonlocal opened
        opened += 1
        for number in range(0 if isinstance(policy, Fail | Block) else events):
            yield number
        if opened == 2000:
            await anyio.sleep_forever()
        raise ConnectionError("lost")

    source = SharedSource(key="feed", open=play, restart=AT_ONCE)
    quiet = structlog.wrap_logger(None, processors=[drop])  # its lines would keep everything
    gc.collect()
    before = gaps_alive()
    async with (
        SharedStreamManager(logger=quiet) as manager,
        manager.subscribe(source, overflow=policy, max_buffer_size=3, gaps=True) as stream,
    ):
        await until(lambda: opened == 2000, rounds=100_000)
        await settle()
        # Conflating clears up once in a while.
        assert gaps_alive() - before < (300 if isinstance(policy, Conflate) else 20)
        items, _ = drain(stream)
        assert RESTARTED in items
        assert gaps_alive() > before


def drop(*_: object) -> Any:
    raise structlog.DropEvent


def gaps_alive() -> int:
    return sum(isinstance(thing, Gap) for thing in gc.get_objects())


class Pairs:
    """Subscribers that differ in nothing but that one of each two is told of gaps."""

    def __init__(self, manager: SharedStreamManager, replay: int) -> None:
        self.feed = Feed()
        self.source = self.feed.asking_for(restart=AT_ONCE, replay=replay)
        self._manager = manager
        self._pairs: list[tuple[Any, Any]] = []
        self._number = 0

    async def act(self, action: tuple[Any, ...]) -> None:
        with noted(action):
            await getattr(self, action[0])(*action[1:])
            await settle()
            for plain, told in self._pairs:
                one, other = plain.statistics(), told.statistics()
                for name in ("current_buffer_used", "peak_buffer_used", "events_received", "events_missed", "events_refused"):
                    assert getattr(one, name) == getattr(other, name), name

    async def join(self, bound: int, even: bool) -> None:
        where = (lambda event: event % 2 == 0) if even else None
        plain, told = (
            self._manager.subscribe(self.source, max_buffer_size=bound, where=where, gaps=gaps) for gaps in (False, True)
        )
        self._pairs.append((await plain.__aenter__(), await told.__aenter__()))

    async def publish(self, *bursts: int) -> None:
        for burst in bursts:
            self.feed.emit(*range(self._number, self._number + burst))
            self._number += burst
            await settle()

    async def restart(self) -> None:
        await restart(self.feed)

    async def receive(self, index: int, events: int) -> None:
        plain, told = self._pairs[index % len(self._pairs)]
        assert take(plain, events) == take(told, events)

    def leave(self) -> None:
        for plain, told in self._pairs:
            plain.close()
            told.close()


def take(stream: Any, events: int) -> tuple[list[Any], bool]:
    """Receive so many events, if there are; and say whether that was the end."""
    got: list[Any] = []
    with suppress(anyio.WouldBlock):
        try:
            while len(got) < events:
                item = stream.receive_nowait()
                got += [item] * (not isinstance(item, Gap))
        except SubscriberOverflow:
            return got, True
    return got, False


async def play_pairs(program: list[tuple[Any, ...]], replay: int) -> None:
    async with SharedStreamManager() as manager:
        pairs = Pairs(manager, replay)
        async with manager.subscribe(pairs.source, max_buffer_size=math.inf):
            try:
                for action in program:
                    await pairs.act(action)
            finally:
                pairs.leave()


joins = st.tuples(st.just("join"), st.sampled_from([1, 2, 3, 10, 64, 65]), st.booleans())
publications = st.lists(st.sampled_from([1, 1, 2, 3, 9, 63, 64, 65, 130]), min_size=1, max_size=3).map(
    lambda sizes: ("publish", *sizes)
)
receptions = st.tuples(st.just("receive"), st.integers(0, 8), st.sampled_from([1, 2, 3, 10, 64, 1000]))
actions = st.one_of(joins, publications, publications, receptions, receptions, receptions, st.just(("restart",)))
programs = st.builds(lambda first, others: [first, *others], joins, st.lists(actions, max_size=25))


@on_each(["asyncio", "trio"], max_examples=200)
@given(program=programs, replay=st.sampled_from([0, 1, 5, 100]))
def test_who_is_told_of_gaps_overflows_exactly_when_it_would_otherwise(
    backend: str, program: list[tuple[Any, ...]], replay: int
) -> None:
    run(partial(play_pairs, program, replay), backend=backend)
