"""`linger`: an upstream outlives its last subscriber by exactly so long, and whoever comes meanwhile finds it as it was."""

from __future__ import annotations

import gc
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

import anyio
import pytest
from anyio.lowlevel import checkpoint

from anyio_sharedstream import (
    Restart,
    SharedSource,
    SharedStreamManager,
)
from tests.support import Feed, idle, settle
from tests.sweep import managed, nothing_left
from tests.virtual_time import in_virtual_time

T = TypeVar("T")


class Timed(Feed):
    """A feed that says when it was opened and when it closed: in `times`, one after the other."""

    def __init__(self, key: Any = "feed") -> None:
        super().__init__(key)
        self.times: list[float] = []

    async def _play(self) -> AsyncGenerator[Any, None]:
        self.times.append(anyio.current_time())
        try:
            async with aclosing(super()._play()) as events:
                async for event in events:
                    yield event
        finally:
            self.times.append(anyio.current_time())


def state(manager: SharedStreamManager, key: Any = "feed") -> str:
    return manager.statistics().groups[key].state


async def visit(manager: SharedStreamManager, source: SharedSource[Any]) -> None:
    """Come and go; the upstream is there meanwhile."""
    async with manager.subscribe(source):
        await settle()


def alive(kind: type[T]) -> list[T]:
    """All objects of a type that are not garbage."""
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is kind]


# Adoption, and the end.


@in_virtual_time
async def test_who_comes_within_the_time_finds_the_same_upstream() -> None:
    feed = Timed()
    source = feed.asking_for(linger=10)
    async with managed(feed) as manager:
        async with manager.subscribe(source) as stream:
            feed.emit(1)
            assert await stream.receive() == 1
            opened_at = manager.statistics().groups["feed"].opened_at
            tasks = len(anyio.get_running_tasks())
        assert state(manager) == "lingering"
        await anyio.sleep(9.75)
        assert state(manager) == "lingering"
        async with manager.subscribe(source) as stream:
            group = manager.statistics().groups["feed"]
            assert (group.state, group.epoch, group.restarts, group.opened_at) == ("live", 1, 0, opened_at)
            await settle()
            assert len(anyio.get_running_tasks()) == tasks  # nobody waits for the time any more
            feed.emit(2, 3)
            assert [await stream.receive(), await stream.receive()] == [2, 3]
            # While somebody is there, no time is counted.
            await anyio.sleep(1000)
            assert stream.epoch == 1
        await manager.stop_all()
    assert feed.times == [0, 1009.75]


@in_virtual_time
async def test_it_closes_at_the_very_second() -> None:
    feed = Timed()
    source = feed.asking_for(linger=10)
    async with managed(feed) as manager:
        async with manager.subscribe(source):
            await anyio.sleep(3)
        await anyio.sleep_until(12.875)
        assert state(manager) == "lingering"
        await anyio.sleep_until(13)
        await settle()
        assert idle(manager)
        assert feed.times == [0, 13]
        async with manager.subscribe(source) as stream:
            feed.emit("anew")
            assert await stream.receive() == "anew"
            assert stream.epoch == 1
    assert feed.times == [0, 13, 13, 13]


@in_virtual_time
async def test_the_time_counts_from_the_last_leave_again_and_again() -> None:
    feed = Timed()
    source = feed.asking_for(linger=10)
    async with managed(feed) as manager:
        for _ in range(50):
            await visit(manager, source)
            await anyio.sleep(9.875)
        async with manager.subscribe(source) as one, manager.subscribe(source):
            one.close()
            await anyio.sleep(20)
        left = anyio.current_time()
        await anyio.sleep(11)
    assert feed.times == [0, left + 10]


@in_virtual_time
async def test_to_come_and_go_without_awaiting_counts_as_a_visit() -> None:
    feed = Timed()
    source = feed.asking_for(linger=10)
    async with managed(feed) as manager:
        await visit(manager, source)
        await anyio.sleep(9)
        async with manager.subscribe(source):
            pass
        assert state(manager) == "lingering"
        await anyio.sleep(20)
    assert feed.times == [0, 19]


@in_virtual_time
async def test_joining_in_the_tick_of_the_end_finds_the_old_upstream_or_a_new_one_and_nothing_between() -> None:
    async def try_to_join(in_time: bool, pauses: int) -> bool:
        feed = Timed()
        source = feed.asking_for(linger=10)
        async with managed(feed) as manager, anyio.create_task_group() as tasks:
            start = anyio.current_time()
            there: list[bool] = []

            async def join() -> None:
                await anyio.sleep_until(start + 10)
                await settle(pauses)
                there.append("feed" in manager.statistics().groups)
                async with manager.subscribe(source) as stream:
                    feed.emit("event")
                    assert await stream.receive() == "event"
                    await anyio.sleep(5)

            # Of two that wait for the same moment, one is woken first; trio says by chance which.
            if in_time:
                tasks.start_soon(join)
                await settle()
            await visit(manager, source)
            if not in_time:
                tasks.start_soon(join)
            await anyio.sleep(50)
        assert feed.times == ([start, start + 25] if there[0] else [start, start + 10, start + 10, start + 25])
        return there[0]

    outcomes = {await try_to_join(bool(attempt % 2), attempt // 2 % 5) for attempt in range(100)}
    assert outcomes == {True, False}


@pytest.mark.parametrize("pauses", range(6))
@in_virtual_time
async def test_leaving_in_the_tick_in_which_an_earlier_visit_would_have_run_out_counts_anew(pauses: int) -> None:
    feed = Timed()
    source = feed.asking_for(linger=10)
    async with managed(feed) as manager:
        await visit(manager, source)
        await anyio.sleep_until(5)
        async with manager.subscribe(source):
            await anyio.sleep_until(10)
            await settle(pauses)
        assert state(manager) == "lingering"
        await anyio.sleep(50)
    assert feed.times == [0, 20]


# Times that are no time.


async def test_without_end_it_waits_for_the_next_one_for_ever() -> None:
    feed = Feed()
    source = feed.asking_for(linger=math.inf)
    async with managed(feed) as manager:
        for _ in range(3):
            await visit(manager, source)
            await settle()
            assert state(manager) == "lingering"
        assert feed.opened == 1


@pytest.mark.parametrize("seconds", [math.inf, 1e300])
@in_virtual_time
async def test_no_time_is_too_long(seconds: float) -> None:
    feed = Timed()
    source = feed.asking_for(linger=seconds)
    async with managed(feed) as manager:
        await visit(manager, source)
        await anyio.sleep(80_000)
        await visit(manager, source)
    assert feed.times == [0, 80_000]


async def test_no_time_at_all_is_not_to_linger() -> None:
    feed = Feed()
    async with managed(feed) as manager:
        await visit(manager, feed.asking_for(linger=0))
        assert feed.closed == 1
        assert idle(manager)


# An upstream that has yet to open.


def slow(feed: Feed, seconds: float) -> SharedSource[Any]:
    """A source that takes its time to open."""

    @asynccontextmanager
    async def connect() -> AsyncGenerator[AsyncGenerator[Any, None], None]:
        await anyio.sleep(seconds)
        async with aclosing(feed._play()) as events:
            yield events

    return SharedSource(key="feed", open=connect, linger=10)


@in_virtual_time
async def test_an_opening_goes_on_without_subscribers_and_can_be_adopted_before_and_after() -> None:
    feed = Timed()
    source = slow(feed, 5)
    feed.emit("first")
    async with managed(feed) as manager:
        async with manager.subscribe(source):
            await anyio.sleep(1)
            assert state(manager) == "opening"
        assert state(manager) == "lingering"
        await anyio.sleep_until(2)
        async with manager.subscribe(source) as stream:
            assert state(manager) == "opening"
            assert await stream.receive() == "first"
            assert anyio.current_time() == 5
        await anyio.sleep(100)
        async with manager.subscribe(source):
            await anyio.sleep(1)
        assert state(manager) == "lingering"
        await anyio.sleep(8)
        assert (state(manager), feed.opened) == ("lingering", 2)
        async with manager.subscribe(source):
            assert state(manager) == "live"
    assert feed.times == [5, 15, 110, 114]


@in_virtual_time
async def test_an_opening_that_takes_too_long_is_given_up_when_the_time_is_over() -> None:
    feed = Timed()
    async with managed(feed) as manager:
        async with manager.subscribe(slow(feed, 20)):
            await anyio.sleep(2)
        await anyio.sleep_until(11.875)
        assert state(manager) == "lingering"
        await anyio.sleep_until(12)
        await settle()
        assert idle(manager)
    assert feed.times == []


@in_virtual_time
async def test_an_opening_that_fails_meanwhile_is_not_tried_again() -> None:
    opened: list[float] = []

    @asynccontextmanager
    async def connect() -> AsyncGenerator[AsyncGenerator[Any, None], None]:
        opened.append(anyio.current_time())
        await anyio.sleep(5)
        raise ConnectionError
        yield

    source = SharedSource(key="feed", open=connect, linger=10, restart=Restart(initial_delay=0))
    async with managed() as manager:
        async with manager.subscribe(source):
            await anyio.sleep(1)
        await anyio.sleep_until(5)
        await settle()
        assert idle(manager)
        await anyio.sleep(100)
    assert opened == [0]


# Ends.


@pytest.mark.parametrize(
    "policies",
    [
        {},
        {"on_exhausted": "end"},
        {"restart": Restart(initial_delay=1)},
        {"restart": Restart(initial_delay=0), "on_exhausted": "restart"},
    ],
    ids=str,
)
@pytest.mark.parametrize("finish", [Feed.end, lambda feed: feed.fail(ValueError("broken"))], ids=["returned", "failed"])
@in_virtual_time
async def test_an_upstream_that_ends_meanwhile_is_forgotten_and_not_restarted(
    finish: Callable[[Feed], None], policies: Any
) -> None:
    feed = Timed()
    source = feed.asking_for(linger=10, **policies)
    async with managed(feed) as manager:
        await visit(manager, source)
        await anyio.sleep(5)
        finish(feed)
        await settle()
        assert idle(manager)
        await anyio.sleep(100)
        assert feed.times == [0, 5]
        async with manager.subscribe(source) as stream:
            feed.emit("anew")
            assert await stream.receive() == "anew"
            assert (stream.epoch, manager.statistics().groups["feed"].restarts) == (1, 0)
        await anyio.sleep(9)
        assert state(manager) == "lingering"
    assert feed.times == [0, 5, 105, 114]


async def test_a_failing_upstream_frees_its_key_before_it_has_closed_also_when_nobody_is_there() -> None:
    closes, feed = anyio.Event(), Feed()

    @asynccontextmanager
    async def connect() -> AsyncGenerator[AsyncGenerator[Any, None], None]:
        try:
            async with aclosing(feed._play()) as events:
                yield events
        finally:
            with anyio.CancelScope(shield=True):
                await closes.wait()

    source: Any = SharedSource(key="feed", open=connect, linger=math.inf, restart=Restart(initial_delay=0))
    async with managed(feed) as manager:
        await visit(manager, source)
        feed.fail(ConnectionError("lost"))
        await settle()
        assert (feed.open_now, [group.state for group in manager.statistics().closing]) == (0, ["closing"])
        assert not manager.statistics().groups
        async with manager.subscribe(source) as stream:
            await settle()
            assert (state(manager), feed.opened) == ("waiting", 1)
            closes.set()
            feed.emit("anew")
            assert await stream.receive() == "anew"


async def test_an_interrupt_meanwhile_leaves_the_manager_as_itself() -> None:
    feed, interrupt = Feed(), KeyboardInterrupt()

    async def run() -> None:
        async with SharedStreamManager() as manager:
            await visit(manager, feed.asking_for(linger=math.inf))
            feed.fail(interrupt)
            await anyio.sleep_forever()

    async with nothing_left(feed):
        with pytest.raises(KeyboardInterrupt) as caught:
            await run()
        assert caught.value is interrupt


async def end(manager: SharedStreamManager, scope: anyio.CancelScope, way: str) -> None:
    if way == "cancellation":
        scope.cancel()
        await checkpoint()
    elif way == "error":
        raise LookupError
    elif way != "exit":
        await (manager.stop("feed") if way == "stop" else manager.stop_all())
        assert idle(manager)


@pytest.mark.parametrize("way", ["stop", "stop_all", "exit", "cancellation", "error"])
@pytest.mark.parametrize("linger", [10, math.inf])
@in_virtual_time
async def test_nothing_that_stops_the_upstream_waits_for_the_time_to_pass(way: str, linger: float) -> None:
    feed = Timed()
    async with nothing_left(feed):
        with anyio.CancelScope() as scope:
            try:
                async with SharedStreamManager() as manager:
                    await visit(manager, feed.asking_for(linger=linger))
                    await end(manager, scope, way)
            except LookupError:
                assert way == "error"
        assert scope.cancelled_caught == (way == "cancellation")
        assert feed.times == [0, 0]
        assert anyio.current_time() == 0
