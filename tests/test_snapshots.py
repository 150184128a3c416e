"""Snapshots for subscribers that fall behind: gap, state, changes, with no hole, whatever they ask for and whenever they read."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
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
    Fold,
    Gap,
    Latest,
    Restart,
    SharedSource,
    SharedStreamManager,
    Snapshot,
    SubscriberOverflow,
)
from tests.policies_support import end, missing, publish
from tests.properties import on_each
from tests.support import Feed, settle, until
from tests.sweep import drain, managed, noted
from tests.virtual_time import run

State = tuple[Any, ...]
LOSSY: list[Any] = [DropOldest(), DropNewest(), Latest()]
lossy = pytest.mark.parametrize("policy", LOSSY, ids=["DropOldest", "DropNewest", "Latest"])
both = pytest.mark.parametrize("gaps", [True, False], ids=["gaps", "no gaps"])
AT_ONCE = Restart(initial_delay=0, jitter=0)
RESTARTED = Gap(None, "restart")


def append(state: State, event: Any) -> State:
    return (*state, event)


HISTORY = Fold((), append)


@asynccontextmanager
async def behind(policy: Any, **contract: Any) -> AsyncIterator[tuple[Feed, Any]]:
    """A subscriber that has taken its first snapshot, and has as many unread events as it may have, up to 2."""
    feed = Feed()
    source = feed.asking_for(fold=HISTORY, restart=AT_ONCE)
    asked: Any = {"overflow": policy, "max_buffer_size": 2, "snapshot": True, **contract}
    async with managed(feed) as manager, manager.subscribe(source, **asked) as stream:
        await settle()
        assert drain(stream) == ([Snapshot(())], None)
        await publish(feed, *([2] if isinstance(policy, Latest) else [1, 2]))
        yield feed, stream


async def restart(feed: Feed) -> None:
    opened = feed.opened
    feed.fail(ConnectionError("lost"))
    await until(lambda: feed.opened > opened)
    await settle()


@lossy
@both
async def test_one_that_falls_behind_gets_the_gap_and_the_state_of_the_moment_when_it_reads(policy: Any, gaps: bool) -> None:
    async with behind(policy, gaps=gaps) as (feed, stream):
        await publish(feed, 3, 4)
        feed.emit(5, 6, 7)
        await settle()
        assert stream.statistics().current_buffer_used == 0
        if gaps:
            assert stream.receive_nowait() == missing(stream.statistics().events_missed)
            await publish(feed, 8)  # the state was taken with the gap
        snapshot = stream.receive_nowait()
        assert snapshot.state[-3:] == (5, 6, 7)
        assert stream.statistics().events_missed == len(snapshot.state) == (6 if isinstance(policy, Latest) else 7)
        assert drain(stream) == ([8] * gaps, None)
        await publish(feed, 9)
        assert drain(stream) == ([9], None)


@lossy
@both
async def test_what_is_left_at_the_end_is_the_gap_and_the_last_state(policy: Any, gaps: bool) -> None:
    async with behind(policy, gaps=gaps) as (feed, stream):
        await publish(feed, 3, 4)
        await end(feed)
        items, terminal = drain(stream)
        state = (2, 3, 4) if isinstance(policy, Latest) else (1, 2, 3, 4)
        assert items == [missing(len(state)), Snapshot(state)][not gaps :]
        assert terminal is not None


@lossy
@both
@pytest.mark.parametrize("stops", [True, False], ids=["stopped", "failed"])
async def test_the_last_state_is_there_too_if_the_upstream_might_have_been_restarted(
    policy: Any, gaps: bool, stops: bool
) -> None:
    """Something around the iteration has a say in what is raised, so it is not known at once whether a restart follows."""
    feed = Feed()

    @asynccontextmanager
    async def opened() -> AsyncIterator[AsyncIterable[Any]]:
        yield feed.source.open()  # type: ignore[misc]

    source = SharedSource(key="feed", open=opened, fold=HISTORY, restart=Restart(on=OSError))
    asked: Any = {"overflow": policy, "max_buffer_size": 1, "gaps": gaps, "snapshot": True}
    async with managed(feed) as manager, manager.subscribe(source, **asked) as stream:
        await publish(feed, 1, 2, 3)
        if stops:
            await manager.stop("feed")
        else:
            feed.fail(ZeroDivisionError())
            await settle()
        items, terminal = drain(stream)
        assert type(terminal) is (anyio.EndOfStream if stops else ZeroDivisionError)
        assert items == [missing(3), Snapshot((1, 2, 3))][not gaps :]


@lossy
async def test_who_came_after_the_failure_of_an_upstream_that_is_not_restarted_gets_no_state(policy: Any) -> None:
    feed, close = Feed(), anyio.Event()
    source = SharedSource(key="feed", open=feed.closed_late(close), fold=HISTORY, restart=Restart(on=OSError))
    asked: Any = {"overflow": policy, "snapshot": True}
    async with managed(feed) as manager, manager.subscribe(source, **asked):
        await publish(feed, 1)
        feed.fail(ZeroDivisionError())
        await settle()
        async with manager.subscribe(source, **asked) as stream:
            close.set()
            await settle()
            items, terminal = drain(stream)
            assert (items, type(terminal)) == ([], ZeroDivisionError)


@lossy
async def test_a_batch_may_begin_with_the_gap_and_go_on_after_the_state(policy: Any) -> None:
    async with behind(policy, gaps=True) as (feed, stream):
        await publish(feed, 3, 4)
        (gap,) = await stream.receive_batch(1)
        await publish(feed, 5)
        snapshot, event = await stream.receive_batch(10)
        assert (gap.missed, snapshot.state[-2:], event) == (len(snapshot.state), (3, 4), 5)
        await publish(feed, 6, 7, 8)
        batch = await anext(stream.batches(2))
        assert batch == (missing(3), Snapshot((*snapshot.state, 5, 6, 7, 8)))


@lossy
@both
async def test_a_restart_makes_the_states_before_it_obsolete(policy: Any, gaps: bool) -> None:
    async with behind(policy, gaps=gaps) as (feed, stream):
        await publish(feed, 3)
        await restart(feed)
        await publish(feed, 4)
        await restart(feed)
        await publish(feed, 5)
        count = 4 if isinstance(policy, Latest) else 5
        assert drain(stream) == ([missing(count), RESTARTED, Snapshot((5,))] if gaps else [Snapshot((5,))], None)
        await restart(feed)
        assert drain(stream) == ([*[RESTARTED] * gaps, Snapshot(())], None)


@pytest.mark.parametrize("policy", [Fail(), Block(math.inf), *LOSSY, Conflate(str)], ids=lambda policy: type(policy).__name__)
async def test_a_state_that_nobody_has_seen_gives_way_to_the_gap_and_the_next_state(policy: Any) -> None:
    feed = Feed()
    source = feed.asking_for(fold=HISTORY, restart=AT_ONCE)
    async with managed(feed) as manager, manager.subscribe(source, overflow=policy, gaps=True, snapshot=True) as stream:
        await settle()
        await restart(feed)
        await restart(feed)
        assert drain(stream) == ([RESTARTED, Snapshot(())], None)


@lossy
async def test_a_gap_that_was_not_received_is_part_of_the_next_one(policy: Any) -> None:
    async with behind(policy, gaps=True) as (feed, stream):
        drain(stream)
        await restart(feed)
        await publish(feed, 1, 2, 3, 4)
        assert stream.receive_nowait() == RESTARTED  # the gap for the events and the state are behind it
        await publish(feed, 5, 6, 7, 8)
        assert drain(stream) == ([missing(8), Snapshot((1, 2, 3, 4, 5, 6, 7, 8))], None)


@lossy
async def test_a_restart_also_makes_a_state_obsolete_of_which_only_the_gap_was_received(policy: Any) -> None:
    async with behind(policy, gaps=True) as (feed, stream):
        await publish(feed, 3, 4)
        assert stream.receive_nowait() == missing(stream.statistics().events_missed)
        await restart(feed)
        assert drain(stream) == ([RESTARTED, Snapshot(())], None)


@lossy
@both
@pytest.mark.parametrize("batches", [True, False])
async def test_one_that_lost_everything_while_it_waits_is_woken_by_the_next_state(policy: Any, gaps: bool, batches: bool) -> None:
    """It has nothing to receive while there is no state, unless it is told of gaps."""
    feed, close = Feed(), anyio.Event()
    source = SharedSource(key="feed", open=feed.closed_late(close), fold=HISTORY, restart=AT_ONCE)
    asked: Any = {"overflow": policy, "max_buffer_size": 1, "gaps": gaps, "snapshot": True}
    received: list[Any] = []

    async def read() -> None:
        try:
            while True:
                received.extend(await stream.receive_batch(10) if batches else [await stream.receive()])
        finally:
            close.set()

    async with managed(feed) as manager, manager.subscribe(source, **asked) as stream, anyio.create_task_group() as tasks:
        await publish(feed, 1, 2)
        feed.fail(ConnectionError("lost"))
        await settle()
        tasks.start_soon(read)
        await settle()
        told = list(received)
        close.set()
        assert told == [missing(2)] * gaps
        await until(lambda: feed.opened == 2)
        await publish(feed, 3)
        assert received == [*[missing(2), RESTARTED] * gaps, Snapshot(()), 3]
        tasks.cancel_scope.cancel()


def folded(items: list[Any]) -> State:
    """The state that somebody comes to who goes by what it has received."""
    state: State | None = None
    for item in items:
        if isinstance(item, Snapshot):
            state = item.state
        elif isinstance(item, Gap):
            state = None
        else:
            assert state is not None, items
            state = append(state, item)
    assert state is not None, items
    return state


@lossy
@both
@pytest.mark.parametrize("whose", ["its own", "of one before it", "of one after it"])
@pytest.mark.parametrize("unread", [1, 2, 3, 4])
async def test_receiving_in_the_middle_of_a_publication_leaves_no_hole_and_repeats_nothing(
    policy: Any, gaps: bool, whose: str, unread: int
) -> None:
    """The state has taken in already what is being published, and predicates may receive it."""
    feed = Feed()
    source = feed.asking_for(fold=HISTORY)
    received: list[Any] = []

    def receives(event: int) -> bool:
        if event == 11:
            received.extend(drain(stream)[0])
        return True

    asked: Any = {"overflow": policy, "max_buffer_size": 2, "gaps": gaps, "snapshot": True}
    async with managed(feed) as manager, AsyncExitStack() as stack:
        stream: Any = manager.subscribe(source, where=receives if whose == "its own" else None, **asked)
        if whose == "of one after it":
            await stack.enter_async_context(stream)
        other: Any = manager.subscribe(source, where=receives if whose != "its own" else None)
        await stack.enter_async_context(other)
        if whose != "of one after it":
            await stack.enter_async_context(stream)
        await publish(feed, *range(unread))
        feed.emit(10, 11, 12)
        await settle()
        received += drain(stream)[0]
        await publish(feed, 13)
        received += drain(stream)[0]
        assert folded(received) == (*range(unread), 10, 11, 12, 13)


@lossy
@both
@pytest.mark.parametrize("unread", [1, 2, 3, 4])
async def test_receiving_inside_of_the_source_between_two_of_its_events_repeats_nothing(
    policy: Any, gaps: bool, unread: int
) -> None:
    """What it has yielded is in the state already, and has yet to be published."""
    received: list[Any] = []

    async def play() -> AsyncGenerator[int, None]:
        for number in range(unread):
            yield number
            await settle()
        yield 10
        received.extend(drain(stream)[0])
        yield 11
        yield 12
        await anyio.sleep_forever()

    source = SharedSource(key="feed", open=play, fold=HISTORY)
    asked: Any = {"overflow": policy, "max_buffer_size": 2, "gaps": gaps, "snapshot": True}
    async with managed() as manager, manager.subscribe(source, **asked) as stream:
        await settle(200)
        received += drain(stream)[0]
        assert folded(received) == (*range(unread), 10, 11, 12)


async def test_conflating_keeps_the_newest_of_every_key_since_the_snapshot() -> None:
    feed = Feed()
    source = feed.asking_for(fold=HISTORY, restart=AT_ONCE)
    asked: Any = {"overflow": Conflate(lambda event: event[0]), "max_buffer_size": 2, "gaps": True, "snapshot": True}
    async with managed(feed) as manager, manager.subscribe(source, **asked) as stream:
        await settle()
        await publish(feed, "a1", "b1", "a2")
        assert drain(stream) == ([Snapshot(()), "a2", "b1"], None)
        await publish(feed, "a3", "b3")
        await restart(feed)
        await publish(feed, "a4")
        assert stream.statistics().current_buffer_used == 2
        assert await stream.receive_batch(10) == ("b3", RESTARTED, Snapshot(()), "a4")
        assert stream.statistics().events_missed == 2


@both
async def test_conflating_merges_nothing_into_what_follows_a_snapshot_that_is_not_in_the_state(gaps: bool) -> None:
    """Sums of changes: what was before the upstream was opened again is no part of the new sum."""
    feed = Feed()
    total = Fold(0, lambda state, event: state + event)
    source = feed.asking_for(fold=total, restart=AT_ONCE)
    asked: Any = {"overflow": Conflate(lambda event: "all", lambda old, new: old + new), "gaps": gaps, "snapshot": True}
    async with managed(feed) as manager, manager.subscribe(source, **asked) as stream:
        await settle()
        await publish(feed, 1, 2)
        await restart(feed)
        await publish(feed, 10, 20)
        items = drain(stream)[0]
        assert items == [*[RESTARTED] * gaps, Snapshot(0), 30]


class Kept:
    """A state or an event that can be counted."""


@both
@pytest.mark.parametrize("events", [0, 2])
@pytest.mark.parametrize(
    "policy",
    [*LOSSY, Conflate(type), Conflate(type, lambda old, new: new), Fail(), Block(math.inf)],
    ids=lambda policy: str(policy)[:8],
)
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_one_that_never_reads_keeps_a_few_things_over_thousands_of_restarts(
    policy: Any, events: int, gaps: bool, backend: str
) -> None:
    run(partial(restart_often, policy, 0 if isinstance(policy, Fail | Block) else events, gaps), backend=backend)


async def restart_often(policy: Any, events: int, gaps: bool) -> None:
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()
    opened = 0

    def kept(*_: object) -> Kept:
        alive.add(made := Kept())
        return made

    async def play() -> AsyncGenerator[Kept, None]:
        nonlocal opened
        opened += 1
        for _ in range(events):
            yield kept()
        if opened == 2000:
            await anyio.sleep_forever()
        raise ConnectionError("lost")

    source = SharedSource(key="feed", open=play, fold=Fold(kept, kept), restart=AT_ONCE)
    asked: Any = {"overflow": policy, "max_buffer_size": 3, "snapshot": True, "gaps": gaps}
    gc.collect()
    before = marks()
    # The lines of the log would keep everything.
    quiet = structlog.wrap_logger(None, processors=[drop])
    async with SharedStreamManager(logger=quiet) as manager, manager.subscribe(source, **asked) as stream:
        await until(lambda: opened == 2000, rounds=100_000)
        await settle()
        gc.collect()
        # Conflating clears up once in a while.
        assert len(alive) < (200 if isinstance(policy, Conflate) else 20)
        assert marks() - before < (500 if isinstance(policy, Conflate) else 50)
        items, _ = drain(stream)
        assert len(items) < (200 if isinstance(policy, Conflate) else 20)
        assert any(isinstance(item, Snapshot) for item in items)


def drop(*_: object) -> Any:
    raise structlog.DropEvent


def marks() -> int:
    return sum(isinstance(thing, Gap | Snapshot) for thing in gc.get_objects())


def first_of(event: tuple[int, int]) -> int:
    return event[0]


@dataclass(eq=False)
class Handle:
    """One subscriber, and the state that it has come to by what it has received."""

    stream: Any
    policy: Any
    gaps: bool
    published_before: int
    state: State | None = None
    missed: int = 0
    failed: bool = False

    def take(self, item: Any) -> None:
        if isinstance(item, Gap):
            assert self.gaps
            self.state = None
            self.missed += item.missed or 0
        elif isinstance(item, Snapshot):
            self.state = item.state
        else:
            assert self.state is not None
            self.state = append(self.state, item)

    def knows(self, state: State) -> None:
        """It has received everything."""
        assert self.state is not None
        if isinstance(self.policy, Conflate):
            assert dict(self.state) == dict(state)
        else:
            assert self.state == state
        if self.gaps:
            assert self.missed == self.stream.statistics().events_missed * (not isinstance(self.policy, Conflate))


class Play:
    """A source whose end takes its time, as does its next opening; and subscribers that read now and then."""

    def __init__(self, manager: SharedStreamManager) -> None:
        self.handles: list[Handle] = []
        self.close = anyio.Event()
        self._manager = manager
        self._feed = Feed()
        self._state: State = ()
        self._number = 0
        again = Restart(initial_delay=1, factor=1, jitter=0)
        self.source: SharedSource[Any] = SharedSource(
            key="feed", open=self._open, fold=Fold(self._initial, self._step), restart=again
        )

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[AsyncIterable[Any]]:
        self.close = anyio.Event()
        try:
            yield self._feed.source.open()  # type: ignore[misc]
        finally:
            with anyio.CancelScope(shield=True):
                await self.close.wait()

    def _initial(self) -> State:
        self._state = ((-1, self._feed.opened),)
        return self._state

    def _step(self, state: State, event: Any) -> State:
        assert state is self._state
        self._state = append(state, event)
        return self._state

    async def act(self, action: tuple[Any, ...]) -> None:
        with noted(action):
            await getattr(self, action[0])(*action[1:])
            await settle()

    async def publish(self, *bursts: int) -> None:
        for burst in bursts:
            self._feed.emit(*((number % 3, number) for number in range(self._number, self._number + burst)))
            self._number += burst
            await settle()

    async def fail(self) -> None:
        self._feed.fail(ConnectionError("lost"))

    async def closes(self) -> None:
        self.close.set()

    async def reopens(self) -> None:
        self.close.set()
        await anyio.sleep(2)

    async def join(self, policy: Any, bound: int, gaps: bool) -> None:
        asked: Any = {"overflow": policy, "max_buffer_size": bound, "gaps": gaps, "snapshot": True}
        stream: Any = self._manager.subscribe(self.source, **asked)
        await stream.__aenter__()
        self.handles.append(Handle(stream, policy, gaps, self._manager.statistics().groups["feed"].events_published))

    async def receive(self, index: int, batch: int, times: int) -> None:
        """So many times, one by one if the size of the batch is 0, or until there is nothing."""
        handle = self.handles[index % len(self.handles)]
        group = self._manager.statistics().groups["feed"]
        state = self._state
        for _ in range(0 if handle.failed else times):
            items: tuple[Any, ...] = ()
            try:
                with anyio.move_on_after(0.001):
                    items = (await handle.stream.receive_batch(batch)) if batch else (handle.stream.receive_nowait(),)
            except anyio.WouldBlock:
                assert not batch
            except SubscriberOverflow:
                assert isinstance(handle.policy, Fail | Conflate)
                handle.failed = True
                return
            for item in items:
                handle.take(item)
            if not items:
                if group.state == self._manager.statistics().groups["feed"].state == "live" and state is self._state:
                    handle.knows(state)
                return

    async def accounts(self) -> None:
        published = self._manager.statistics().groups["feed"].events_published
        for handle in self.handles:
            statistics = handle.stream.statistics()
            counted = statistics.events_received + statistics.events_missed + statistics.current_buffer_used
            if not handle.failed and not isinstance(handle.policy, Fail | Conflate):
                assert counted == published - handle.published_before


async def play(program: list[tuple[Any, ...]]) -> None:
    async with SharedStreamManager() as manager:
        playing = Play(manager)
        async with manager.subscribe(playing.source, max_buffer_size=math.inf):
            try:
                for action in [*program, ("reopens",)]:
                    await playing.act(action)
                    await playing.accounts()
                for index in range(len(playing.handles)):
                    await playing.act(("receive", index, 0, 10_000))
                    await playing.act(("receive", index, 5, 10_000))
            finally:
                playing.close.set()
                for handle in playing.handles:
                    handle.stream.close()


ANY: list[Any] = [*LOSSY, *LOSSY, Conflate(first_of), Fail(), Block(math.inf)]
joins = st.tuples(st.just("join"), st.sampled_from(ANY), st.sampled_from([1, 2, 3, 64]), st.booleans())
publications = st.lists(st.sampled_from([1, 1, 1, 2, 3, 5, 65]), min_size=1, max_size=4).map(lambda sizes: ("publish", *sizes))
receptions = st.tuples(
    st.just("receive"), st.integers(0, 8), st.sampled_from([0, 0, 1, 2, 5, 100]), st.sampled_from([1, 1, 2, 3, 100])
)
restarts = st.sampled_from([("fail",), ("fail",), ("closes",), ("reopens",)])
programs = st.builds(
    lambda first, others: [*first, *others],
    st.lists(joins, min_size=1, max_size=6),
    st.lists(st.one_of(publications, publications, receptions, receptions, receptions, restarts, joins), max_size=30),
)


@on_each(["asyncio", "trio"], max_examples=200)
@given(program=programs)
def test_what_anybody_has_received_always_adds_up_to_the_state(backend: str, program: list[tuple[Any, ...]]) -> None:
    run(partial(play, program), backend=backend)
