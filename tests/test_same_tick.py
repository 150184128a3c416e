"""Joining, leaving, failing, returning, overflowing and stopping, all of one key and at the same moment, in every order."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import combinations, permutations
from typing import Any

import anyio
import pytest
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from anyio_sharedstream import PollTerminated, SharedSource, SharedStreamManager, SubscriberOverflow, Subscription
from tests.support import Feed, settle, until
from tests.sweep import RunFeed, drain, managed, noted

TERMINALS = (anyio.EndOfStream, anyio.ClosedResourceError, PollTerminated, SubscriberOverflow, ZeroDivisionError)


class Inside(RunFeed):
    """A feed that takes actions itself, if it is given any, between two of its events."""

    def __init__(self) -> None:
        super().__init__()
        self.actions: list[Callable[[], Awaitable[None]]] = []

    async def _play(self) -> AsyncGenerator[Any, None]:
        run = super()._play()
        try:
            async for event in run:
                yield event
                while self.actions:
                    await self.actions.pop(0)()
        finally:
            await run.aclose()


class Joined:
    """A subscriber, and which runs of the upstream it may hear from."""

    def __init__(self, stream: Subscription[Any], runs_before: int, state: str | None) -> None:
        self.stream = stream
        self.name = stream.subscriber_id
        self.events: list[tuple[int, int]] = []
        self.terminal: BaseException | None = None
        self.runs_before = runs_before
        self.state = state

    def read(self) -> None:
        events, terminal = drain(self.stream)
        self.events += events
        if self.terminal is None:
            self.terminal = terminal
        else:
            # Exactly one terminal, however often one asks.
            assert not events
            assert type(terminal) is type(self.terminal)

    def check(self) -> None:
        self.read()
        runs = {run for run, _ in self.events}
        numbers = [number for _, number in self.events]
        assert len(runs) <= 1, "heard from two upstreams"
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
        assert self.terminal is None or isinstance(self.terminal, TERMINALS)
        if self.state == "live":
            assert runs <= {self.runs_before}
        else:
            assert all(run > self.runs_before for run in runs), "landed on a dying run"


class Table:
    """One key with two subscribers: `eager`, who has room for everything, and `tight`, who is one event short of overflowing."""

    def __init__(self, manager: SharedStreamManager, feed: Inside, tasks: TaskGroup) -> None:
        self.manager = manager
        self.feed = feed
        self.tasks = tasks
        self.joined: list[Joined] = []
        self.seen: set[type] = {anyio.ClosedResourceError}
        self.published = 0
        self.source = feed.source

    async def join(self, name: str, max_buffer_size: int = 1000) -> None:
        group = self.manager.statistics().groups.get(self.source.key)
        stream = self.manager.subscribe(self.source, subscriber_id=name, max_buffer_size=max_buffer_size)
        await stream.__aenter__()
        self.joined.append(Joined(stream, self.feed.opened, group.state if group else None))

    def named(self, name: str) -> Subscription[Any]:
        return next(one.stream for one in self.joined if one.name == name)

    # The actions.

    async def enter(self) -> None:
        await self.join("late")

    async def enter_too(self) -> None:
        await self.join("later")

    async def leave_eager(self) -> None:
        self.named("eager").close()

    async def leave_tight(self) -> None:
        self.named("tight").close()

    async def emit(self) -> None:
        self.feed.emit(*self.next_numbers(2))

    async def fail(self) -> None:
        self.feed.fail(ZeroDivisionError())

    async def give_back(self) -> None:
        self.feed.end()

    async def stop(self) -> None:
        # On a task of its own, for it waits; where that task's first step is, there is the stop.
        self.tasks.start_soon(self.manager.stop, self.source.key)

    def next_numbers(self, count: int) -> range:
        self.published += count
        return range(self.published - count, self.published)

    async def end(self) -> None:
        """Everyone still there gets an event of a live upstream, or has got a terminal; then everyone leaves."""
        await settle()
        for one in self.joined:
            one.read()
            self.seen |= {type(one.terminal)} - {type(None)}
        waiting = [one for one in self.joined if one.terminal is None]
        if waiting:
            (marker,) = self.next_numbers(1)
            self.feed.emit(marker)
            await settle()
        for one in self.joined:
            one.check()
        # Nobody is left behind on a run that is dead: there was something to hear, or a reason.
        for one in waiting:
            assert one.terminal is not None or one.events[-1][1] == marker
        for one in self.joined:
            await one.stream.aclose()
            one.terminal = None
            one.check()
            assert isinstance(one.terminal, anyio.ClosedResourceError)


Action = Callable[[Table], Awaitable[None]]
ACTIONS: list[Action] = [
    Table.enter, Table.enter_too, Table.leave_eager, Table.leave_tight, Table.emit, Table.fail, Table.give_back, Table.stop,
]  # fmt: skip


def orders(count: int) -> Iterator[tuple[Action, ...]]:
    """Every order of every so many of the actions, of which one is somebody's joining."""
    for chosen in combinations(ACTIONS, count):
        if Table.enter in chosen:
            yield from permutations(chosen)


@asynccontextmanager
async def table(feed: Inside) -> AsyncIterator[Table]:
    async with managed(feed) as manager, anyio.create_task_group() as tasks:
        at = Table(manager, feed, tasks)
        await at.join("eager")
        await at.join("tight", 2)
        await until(lambda: manager.statistics().groups[feed.key].state == "live")
        for one in at.joined:
            one.state, one.runs_before = "live", 1
        feed.emit(*at.next_numbers(1))
        await settle(4)
        yield at
        await at.end()


def names(order: tuple[Action, ...]) -> str:
    return ", ".join(getattr(action, "__name__", "?") for action in order)


async def every_order(count: int, play: Callable[[Table, tuple[Action, ...]], Awaitable[None]]) -> None:
    """Play each order with a new table, and see to it that every kind of ending has come about in one or another."""
    seen: set[type] = set()
    for order in orders(count):
        with noted(names(order)):
            async with table(Inside()) as at:
                await play(at, order)
            seen |= at.seen
    assert seen == {*TERMINALS}


@pytest.mark.parametrize("turn_after", [None, 0, 1, 2])
async def test_in_one_task(turn_after: int | None) -> None:
    async def play(at: Table, order: tuple[Action, ...]) -> None:
        for place, action in enumerate(order):
            await action(at)
            # One turn of the event loop somewhere in between, so that the upstream's own end falls among the others.
            if place == turn_after:
                await checkpoint()

    await every_order(3, play)


async def test_in_tasks_released_together() -> None:
    async def play(at: Table, order: tuple[Action, ...]) -> None:
        go = anyio.Event()

        async def act(action: Action) -> None:
            await go.wait()
            await action(at)

        for action in order:
            at.tasks.start_soon(act, action)
        await settle(2)
        go.set()
        await settle(2)

    await every_order(4, play)


async def test_in_the_upstream_itself() -> None:
    async def play(at: Table, order: tuple[Action, ...]) -> None:
        at.feed.actions = [partial(action, at) for action in order]
        at.feed.emit(*at.next_numbers(1))
        await settle(4)

    await every_order(3, play)


@pytest.mark.parametrize("awaits", [False, True], ids=["close", "aexit"])
async def test_the_last_leaves_and_the_next_joins_without_a_turn_in_between(awaits: bool) -> None:
    feed = RunFeed()
    async with managed(feed) as manager:
        stream = await manager.subscribe(feed.source).__aenter__()
        for run in range(1, 30):
            feed.emit(run)
            assert await stream.receive() == (run, run)
            if awaits:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(stream.__aexit__, None, None, None)
                    await until(lambda: not manager.statistics().groups)
                    following = await manager.subscribe(feed.source).__aenter__()
            else:
                stream.close()
                following = await manager.subscribe(feed.source).__aenter__()
            stream = following
        stream.close()


class Managed(RunFeed):
    """A feed within a context manager: what hangs is not the generator's own clean-up, but what surrounds it."""

    def __init__(self) -> None:
        super().__init__()
        self.hangs = anyio.Event()

    @property
    def source(self) -> SharedSource[Any]:
        return SharedSource(key=self.key, open=self._connect)

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[AsyncGenerator[Any, None]]:
        try:
            yield self._play()
        finally:
            with anyio.CancelScope(shield=True):
                await self.hangs.wait()


async def raises(feed: Feed, manager: SharedStreamManager) -> None:
    feed.fail(ZeroDivisionError())


async def returns(feed: Feed, manager: SharedStreamManager) -> None:
    feed.end()


async def overflows(feed: Feed, manager: SharedStreamManager) -> None:
    for number in range(2):
        feed.emit(number)
        await settle(5)


async def is_stopped(feed: Feed, manager: SharedStreamManager) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await manager.stop(feed.key)


@pytest.mark.parametrize("ends", [raises, returns, overflows, is_stopped])
async def test_the_key_is_free_before_the_upstream_has_closed(
    ends: Callable[[Feed, SharedStreamManager], Awaitable[None]],
) -> None:
    feed = Managed()
    async with managed(feed) as manager:
        stream = await manager.subscribe(feed.source, max_buffer_size=1).__aenter__()
        await until(lambda: feed.opened)
        await ends(feed, manager)
        await settle()
        assert not manager.statistics().groups
        async with manager.subscribe(feed.source) as fresh:
            await settle()
            assert manager.statistics().groups[feed.key].state == "waiting"
            assert feed.opened == 1
            feed.hangs.set()
            with pytest.raises(TERMINALS):
                await stream.receive()
            feed.emit(7)
            assert await fresh.receive() == (2, 7)
        stream.close()


async def test_first_joins_in_the_same_tick_share_one_upstream() -> None:
    feed = RunFeed()
    got: list[Any] = []

    async def subscriber() -> None:
        await go.wait()
        async with manager.subscribe(feed.source) as stream:
            got.append(await stream.receive())

    async with managed(feed) as manager, anyio.create_task_group() as tasks:
        go = anyio.Event()
        for _ in range(20):
            tasks.start_soon(subscriber)
        await settle(3)
        go.set()
        await until(lambda: feed.opened)
        feed.emit(5)
    assert got == [(1, 5)] * 20
    assert feed.opened == 1


async def test_a_subscriber_that_leaves_while_it_joins_leaves_no_trace() -> None:
    feed = RunFeed()
    async with managed(feed) as manager:
        never_opened = manager.subscribe(feed.source)
        await never_opened.__aenter__()
        never_opened.close()
        assert not manager.statistics().groups
        await settle()
        assert feed.opened == 0
        async with manager.subscribe(feed.source) as stream:
            feed.emit(1)
            assert await stream.receive() == (1, 1)


async def test_two_upstreams_of_one_key_fail_and_start_at_the_same_time_without_overlap() -> None:
    opened: list[str] = []

    async def failing() -> AsyncIterator[int]:
        opened.append("open")
        try:
            yield 1
            raise ZeroDivisionError
        finally:
            await settle(3)
            opened.append("closed")

    source = SharedSource(key="failing", open=failing)

    async def persistent() -> None:
        for _ in range(5):
            async with manager.subscribe(source) as stream:
                assert await stream.receive() == 1
                with pytest.raises(ZeroDivisionError):
                    await stream.receive()

    async with managed() as manager, anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(persistent)
    assert opened == ["open", "closed"] * (len(opened) // 2)
