"""A failed upstream is opened again, and its subscribers stay: what they notice of it, and what the statistics show."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from itertools import combinations
from typing import Any

import anyio
import pytest
import structlog

from anyio_sharedstream import (
    Block,
    Conflate,
    DropNewest,
    DropOldest,
    Fail,
    Gap,
    Latest,
    Restart,
    SharedSource,
    SharedStreamManager,
    SubscriberOverflow,
)
from tests.support import Feed, idle, settle, until
from tests.sweep import Reader, RunFeed, drain, managed
from tests.virtual_time import in_virtual_time

AT_ONCE = Restart(initial_delay=0, jitter=0)
IN_A_SECOND = Restart(initial_delay=1, jitter=0)
RESTARTED = Gap(None, "restart")


class Staged(Feed):
    """A feed that takes a while to open and to close, in a context manager, so that the library sees it fail."""

    def __init__(self, opening: float = 1, life: float = 1, closing: float = 1, *, shield: bool = True) -> None:
        super().__init__()
        self.times = opening, life, closing
        self.shield = shield
        self.opened_at: list[float] = []

    @asynccontextmanager
    async def stage(self) -> AsyncIterator[AsyncGenerator[int, None]]:
        opening, _, closing = self.times
        self.opened += 1
        self.opened_at.append(anyio.current_time())
        self.most_open = max(self.most_open, self.open_now)
        try:
            await anyio.sleep(opening)
            yield self.live()
        finally:
            try:
                with anyio.CancelScope(shield=self.shield):
                    await anyio.sleep(closing)
            finally:
                self.closed += 1

    async def live(self) -> AsyncGenerator[int, None]:
        yield self.opened
        await anyio.sleep(self.times[1])
        raise ConnectionError("lost")

    def asking_for(self, **policies: Any) -> SharedSource[Any]:
        return SharedSource(key=self.key, open=self.stage, **policies)


@in_virtual_time
async def test_neither_opening_nor_closing_slowly_is_healthy() -> None:
    """An upstream that dies at once has not lived, however long it takes to connect and to say goodbye."""
    feed = Staged(opening=100, life=0, closing=100)
    async with managed(feed) as manager, manager.subscribe(feed.asking_for(restart=Restart(initial_delay=1, jitter=0))):
        await anyio.sleep(1000)
    assert feed.opened_at == [0, 201, 403, 607, 815]


# What follows plays between two openings of this: opens at 0, is live at 1, fails at 2, has closed at 3, opens again at 4.
MOMENTS = [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5]


@in_virtual_time
async def test_subscribers_come_and_go_in_every_state_and_at_every_deadline_while_one_stays() -> None:
    for begin, end in combinations(MOMENTS, 2):
        feed = Staged()
        source = feed.asking_for(restart=IN_A_SECOND)
        async with managed(feed) as manager, anyio.create_task_group() as tasks, manager.subscribe(source, gaps=True) as stays:
            start = anyio.current_time()
            reader = Reader(stays)
            tasks.start_soon(reader.run)
            await anyio.sleep(begin)
            async with manager.subscribe(source) as stream:
                earlier = manager.statistics().groups["feed"].events_published
                await anyio.sleep(end - begin)
                before_leaving = anyio.current_time()
                await settle()
                published = manager.statistics().groups["feed"].events_published
                assert drain(stream) == (list(range(earlier + 1, published + 1)), None)
            assert anyio.current_time() == before_leaving
            await anyio.sleep_until(start + 5.75)
            assert reader.got == [1, RESTARTED, 2]
            assert feed.opened_at == [start, start + 4]
            tasks.cancel_scope.cancel()


@in_virtual_time
@pytest.mark.parametrize("shield", [True, False])
async def test_the_last_one_to_leave_ends_it_in_every_state_and_it_is_not_opened_again(shield: bool) -> None:
    for moment in MOMENTS:
        feed = Staged(shield=shield)
        async with managed(feed) as manager:
            start = anyio.current_time()
            async with manager.subscribe(feed.asking_for(restart=IN_A_SECOND, linger=0)):
                await anyio.sleep(moment)
                await settle()
                opened = feed.opened
                closing = {2: 3, 2.5: 3}.get(moment, moment + 1) if feed.open_now and shield else moment
            assert anyio.current_time() - start == closing
            assert idle(manager)
            await anyio.sleep(100)
            assert feed.opened == opened == feed.closed


async def stop(manager: SharedStreamManager, scope: anyio.CancelScope) -> None:
    await manager.stop("feed")


async def stop_all(manager: SharedStreamManager, scope: anyio.CancelScope) -> None:
    await manager.stop_all()


async def leave_the_manager(manager: SharedStreamManager, scope: anyio.CancelScope) -> None: ...


async def cancel_around_the_manager(manager: SharedStreamManager, scope: anyio.CancelScope) -> None:
    scope.cancel()


@in_virtual_time
@pytest.mark.parametrize("linger", [0, 100])
@pytest.mark.parametrize("end", [stop, stop_all, leave_the_manager, cancel_around_the_manager])
async def test_whoever_ends_it_meanwhile_ends_it_at_once_and_quietly(
    end: Callable[[SharedStreamManager, anyio.CancelScope], Awaitable[None]], linger: float
) -> None:
    for moment in (2, 2.5, 3, 3.5, 4, 4.5):
        feed = Staged()
        start = anyio.current_time()
        with anyio.CancelScope() as scope:
            async with managed(feed) as manager:
                source = feed.asking_for(restart=IN_A_SECOND, linger=linger)
                stream = await manager.subscribe(source).__aenter__()
                await anyio.sleep(moment)
                await settle()
                closed_at = start + {2: 3, 2.5: 3, 4: 5, 4.5: 5.5}.get(moment, moment)
                await end(manager, scope)
        assert anyio.current_time() == closed_at
        events, terminal = drain(stream)
        assert events == [1]
        assert isinstance(terminal, anyio.EndOfStream)
        assert feed.opened == feed.closed == 1 + (moment >= 4)


@in_virtual_time
async def test_a_new_upstream_waits_until_the_old_one_has_closed() -> None:
    feed = Staged(closing=50)
    async with managed(feed) as manager, manager.subscribe(feed.asking_for(restart=AT_ONCE)):
        await anyio.sleep(500)
    assert feed.opened_at == [0, 52, 104, 156, 208, 260, 312, 364, 416, 468]
    assert feed.most_open == 1


async def test_every_opening_begins_in_the_context_of_the_manager() -> None:
    variable: ContextVar[str] = ContextVar("variable")
    seen: list[str] = []

    async def source() -> AsyncGenerator[str, None]:
        seen.append(variable.get())
        variable.set("source")
        yield variable.get()
        raise ConnectionError

    variable.set("manager")
    async with managed() as manager:
        variable.set("subscriber")
        async with manager.subscribe(SharedSource(key="context", open=source, restart=AT_ONCE)) as stream:
            assert [await stream.receive() for _ in range(4)] == ["source"] * 4
    assert seen[:4] == ["manager"] * 4


async def test_events_from_before_the_failure_come_first() -> None:
    feed = Feed()
    async with managed(feed) as manager, manager.subscribe(feed.asking_for(restart=AT_ONCE)) as stream:
        feed.emit(*range(100))
        feed.fail(ConnectionError())
        await until(lambda: feed.opened == 2)
        feed.emit(100)
        await settle()
        assert drain(stream) == (list(range(101)), None)


POLICIES = [Fail(), Block(math.inf), DropOldest(), DropNewest(), Latest(), Conflate(lambda event: event[1] % 2)]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("gaps", [True, False])
@pytest.mark.parametrize("reads", [0, 1, 9], ids=["late", "a bit late", "in time"])
async def test_one_gap_stands_between_two_openings(policy: Any, gaps: bool, reads: int) -> None:
    feed = RunFeed()
    asked: Any = {"overflow": policy, "gaps": gaps, "max_buffer_size": 3}
    async with managed(feed) as manager, manager.subscribe(feed.asking_for(restart=AT_ONCE), **asked) as stream:
        got: list[Any] = []

        async def look(limit: int) -> None:
            await settle()
            while limit and stream.statistics().current_buffer_used:
                limit -= 1
                got.append(stream.receive_nowait())

        feed.emit(1, 2)
        await look(reads)
        feed.fail(ConnectionError())
        await until(lambda: feed.opened == 2)
        feed.emit(3)
        await look(0)
        got += drain(stream)[0]
    places = [place for place, item in enumerate(got) if item == RESTARTED]
    assert len(places) == gaps
    events = [item for item in got if not isinstance(item, Gap)]
    assert (2, 3) in events
    if gaps:
        runs = [{item[0] for item in part if not isinstance(item, Gap)} for part in (got[: places[0]], got[places[0] :])]
        assert runs[0] <= {1}
        assert runs[1] == {2}


@in_virtual_time
async def test_a_gap_comes_with_the_failure_and_whoever_joins_after_it_gets_none() -> None:
    feed = Feed()
    source = feed.asking_for(restart=IN_A_SECOND)
    async with managed(feed) as manager, manager.subscribe(source, gaps=True) as stream:
        for number in range(3):
            feed.emit(number)
            assert await stream.receive() == number
            feed.fail(ConnectionError())
            failed_at = anyio.current_time()
            assert await stream.receive() == RESTARTED
            assert anyio.current_time() == failed_at
            assert stream.epoch == number + 1
            async with manager.subscribe(source, gaps=True) as late:
                await until(lambda: manager.statistics().groups["feed"].state == "restarting")
                await anyio.sleep(10)
                assert drain(late) == ([], None)
                assert late.epoch == stream.epoch == number + 2


@in_virtual_time
async def test_statistics_follow_every_opening() -> None:
    feed = Staged()
    async with managed(feed) as manager, manager.subscribe(feed.asking_for(restart=IN_A_SECOND)):

        async def at(moment: float) -> tuple[Any, ...]:
            await anyio.sleep_until(moment)
            await settle()
            group = manager.statistics().groups["feed"]
            return group.state, group.epoch, group.restarts, repr(group.last_error), group.opened_at, group.last_event_at

        assert await at(0.5) == ("opening", 1, 0, "None", None, None)
        assert await at(1.5) == ("live", 1, 0, "None", 1, 1)
        assert (await at(2.5))[:4] == ("restarting", 1, 0, "None")
        assert await at(3.5) == ("restarting", 1, 1, "ConnectionError('lost')", None, 1)
        assert await at(4.5) == ("opening", 2, 1, "ConnectionError('lost')", None, 1)
        assert await at(5.5) == ("live", 2, 1, "ConnectionError('lost')", 5, 5)


async def test_the_epoch_of_a_subscription_that_has_ended_does_not_change() -> None:
    feed = Feed()
    source = feed.asking_for(restart=AT_ONCE)
    async with managed(feed) as manager, manager.subscribe(source), manager.subscribe(source, max_buffer_size=1) as slow:
        closed = await manager.subscribe(source).__aenter__()
        await settle()
        closed.close()
        for number in range(3):
            feed.emit(number)
            await settle()
        assert isinstance(drain(slow)[1], SubscriberOverflow)
        feed.fail(ConnectionError())
        await until(lambda: feed.opened == 2)
        assert closed.epoch == 1
        assert slow.epoch == 1


class Held:
    """What a source has in hand."""


def raised(error: Exception, held: Held, cause: Exception | None = None) -> Exception:
    """The error with a traceback, whose frame has *held* in hand."""
    try:
        raise error from cause
    except Exception as exc:
        return exc


def caused(held: Held) -> Exception:
    return raised(ConnectionError("lost"), held, raised(KeyError("cause"), held))


def in_handling(held: Held) -> Exception:
    try:
        raise KeyError("context") from caused(held)
    except KeyError:
        try:
            raise ConnectionError("lost")
        except ConnectionError as exc:
            return exc


def grouped(held: Held) -> Exception:
    return ExceptionGroup("several", [caused(held), ExceptionGroup("more", [caused(held)])])


def silently(*_: object) -> Any:
    raise structlog.DropEvent


QUIET: Any = structlog.wrap_logger(None, processors=[silently])  # a log keeps what it is given


@pytest.mark.parametrize("make", [caused, in_handling, grouped])
async def test_the_last_error_keeps_nothing_alive(make: Callable[[Held], Exception]) -> None:
    alive: weakref.WeakSet[Held] = weakref.WeakSet()

    async def source() -> AsyncGenerator[int, None]:
        alive.add(held := Held())
        yield len(alive)
        raise make(held)

    shared = SharedSource(key="held", open=source, restart=Restart(initial_delay=1000, max_delay=1000))
    async with SharedStreamManager(logger=QUIET) as manager, manager.subscribe(shared) as stream:
        assert await stream.receive() == 1
        await until(lambda: manager.statistics().groups["held"].restarts)
        await settle()
        gc.collect()
        last_error = manager.statistics().groups["held"].last_error
        assert isinstance(last_error, ConnectionError | ExceptionGroup)
        assert not alive


async def test_hundreds_of_restarts_leave_nothing_behind() -> None:
    alive: weakref.WeakSet[Held] = weakref.WeakSet()
    counted: list[int] = []

    async def source() -> AsyncGenerator[int, None]:
        alive.add(held := Held())
        yield id(held)
        raise ConnectionError("lost")

    shared = SharedSource(key="held", open=source, restart=AT_ONCE)
    async with SharedStreamManager(logger=QUIET) as manager, manager.subscribe(shared, gaps=True) as stream:
        gc.collect()
        gc.disable()
        try:
            while stream.epoch < 500:
                await stream.receive()
                if stream.epoch % 100 == 0:
                    counted.append(len(gc.get_objects()))
                    assert len(anyio.get_running_tasks()) < 10
                    assert len(alive) <= 2  # not even in reference cycles
        finally:
            gc.enable()
    assert max(counted[2:]) - min(counted[2:]) < 100
