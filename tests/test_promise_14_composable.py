"""Promise 14: a source may subscribe to other shared sources, and hold task groups and cancel scopes over its yields."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from anyio_sharedstream import PollTerminated, SharedSource, SharedStreamManager, Subscription, shared_source
from tests.conftest import BACKENDS
from tests.support import Feed, idle, until

ASYNCIO_ONLY = pytest.mark.parametrize("anyio_backend", BACKENDS[:2], indirect=True)


# What a source may hold over its yields.


@asynccontextmanager
async def cancel_scope() -> AsyncIterator[None]:
    with anyio.CancelScope():
        yield


@asynccontextmanager
async def deadline() -> AsyncIterator[None]:
    with anyio.fail_after(3600):
        yield


@asynccontextmanager
async def shield() -> AsyncIterator[None]:
    with anyio.CancelScope(shield=True):
        yield


@asynccontextmanager
async def task_group() -> AsyncIterator[None]:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.sleep_forever)
        yield


@asynccontextmanager
async def shielded_task_group() -> AsyncIterator[None]:
    async with shield(), task_group():
        yield


@asynccontextmanager
async def everything() -> AsyncIterator[None]:
    async with cancel_scope(), task_group(), deadline(), task_group():
        yield


@asynccontextmanager
async def subscription() -> AsyncIterator[None]:
    async with task_group(), SharedStreamManager() as manager, manager.subscribe(Feed().source):
        yield


# What it does between them.


async def nothing() -> None:
    """Rest at yields only."""


SHIELDED = [shield, shielded_task_group]
HELD = [nullcontext, cancel_scope, deadline, task_group, everything, subscription, *SHIELDED]
HELD_AND_PACE = [
    (held, pace)
    for held in HELD
    for pace in (nothing, checkpoint, anyio.sleep_forever)
    if held not in SHIELDED or pace is not anyio.sleep_forever  # that one could never be ended
]


def holding(held: Callable[[], AbstractAsyncContextManager[Any]], pace: Any) -> SharedSource[int]:
    async def play() -> AsyncGenerator[int, None]:
        async with held():
            while True:
                yield 1
                await pace()

    return SharedSource(key="holding", open=play)


async def leave(_manager: SharedStreamManager, stream: Subscription[Any]) -> None:
    await stream.aclose()


async def stop(manager: SharedStreamManager, _stream: Subscription[Any]) -> None:
    await manager.stop_all()


async def leave_the_manager(manager: SharedStreamManager, _stream: Subscription[Any]) -> None:
    assert not idle(manager)


@pytest.mark.parametrize("end", [leave, stop, leave_the_manager])
@pytest.mark.parametrize(("held", "pace"), HELD_AND_PACE)
async def test_an_ordinary_end_is_no_error(held: Any, pace: Any, end: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with SharedStreamManager() as manager:
        stream = await manager.subscribe(holding(held, pace)).__aenter__()
        assert await stream.receive() == 1
        await end(manager, stream)
    assert idle(manager)
    assert not caplog.records


async def cancel(scope: anyio.CancelScope) -> None:
    scope.cancel()


@asynccontextmanager
async def cancelled_scope() -> AsyncIterator[None]:
    with anyio.CancelScope() as scope:
        scope.cancel()
        yield


@asynccontextmanager
async def expired_scope() -> AsyncIterator[None]:
    with anyio.move_on_after(0):
        yield


@asynccontextmanager
async def scope_cancelled_by_a_child() -> AsyncIterator[None]:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cancel, tasks.cancel_scope)
        yield


@asynccontextmanager
async def cancelled_scope_inside_a_shield() -> AsyncIterator[None]:
    with anyio.CancelScope(shield=True):
        async with cancelled_scope():
            yield


@pytest.mark.parametrize("pace", [nothing, checkpoint])
@pytest.mark.parametrize("held", [cancelled_scope, expired_scope, scope_cancelled_by_a_child, cancelled_scope_inside_a_shield])
async def test_a_scope_of_the_sources_own_ends_what_is_inside_it_and_nothing_else(
    held: Any, pace: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def play() -> AsyncGenerator[str, None]:
        for _ in range(3):
            async with held():
                while True:
                    yield "inside"
                    await pace()
            yield "outside"
        await anyio.sleep_forever()

    async with SharedStreamManager() as manager, manager.subscribe(SharedSource(key="scopes", open=play)) as stream:
        events: list[str] = []
        while events.count("outside") < 3:
            events.append(await stream.receive())
        assert events[0] == "inside"
    assert not caplog.records


async def fail() -> None:
    raise ValueError("child")


async def drain(stream: Subscription[Any]) -> None:
    while True:
        await stream.receive()


async def test_a_child_task_that_fails_while_the_source_rests_at_a_yield_fails_the_source() -> None:
    async def play() -> AsyncGenerator[int, None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fail)
            while True:
                yield 1

    async with SharedStreamManager() as manager, manager.subscribe(SharedSource(key="child", open=play)) as stream:
        with pytest.raises(ExceptionGroup) as caught:
            await drain(stream)
        assert repr(caught.value.exceptions) == "(ValueError('child'),)"


async def test_a_deadline_that_expires_while_the_source_rests_at_a_yield_is_its_timeout_error() -> None:
    async def play() -> AsyncGenerator[int, None]:
        with anyio.fail_after(0):
            while True:
                yield 1

    async with SharedStreamManager() as manager, manager.subscribe(SharedSource(key="late", open=play)) as stream:
        with pytest.raises(TimeoutError):
            await drain(stream)


@ASYNCIO_ONLY
@pytest.mark.parametrize("pace", [nothing, checkpoint, anyio.sleep_forever])
async def test_asyncios_own_task_group_over_yields(pace: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def play() -> AsyncGenerator[int, None]:
        async with asyncio.TaskGroup() as tasks, asyncio.timeout(3600):
            tasks.create_task(anyio.sleep_forever())
            while True:
                yield 1
                await pace()

    async with SharedStreamManager() as manager:
        async with manager.subscribe(SharedSource(key="native", open=play)) as stream:
            assert await stream.receive() == 1
        assert idle(manager)
    assert not caplog.records


@ASYNCIO_ONLY
async def test_asyncios_own_timeout_over_yields() -> None:
    async def play() -> AsyncGenerator[int, None]:
        async with asyncio.timeout(0):
            while True:
                yield 1

    async with SharedStreamManager() as manager, manager.subscribe(SharedSource(key="native", open=play)) as stream:
        with pytest.raises(TimeoutError):
            await drain(stream)


# Sources made of shared sources.


class Tree:
    """Two levels of derived sources over one feed."""

    def __init__(self, manager: SharedStreamManager) -> None:
        self.feed = Feed("base")
        self._manager = manager
        self.scaled = shared_source(self._scaled)
        self.summed = shared_source(self._summed)

    async def _scaled(self, factor: int) -> AsyncGenerator[int, None]:
        async with anyio.create_task_group(), self._manager.subscribe(self.feed.source) as stream:
            async for event in stream:
                yield event * factor

    async def _summed(self, *factors: int) -> AsyncGenerator[int, None]:
        async with SharedStreams(self._manager, [self.scaled(factor) for factor in factors]) as streams:
            while True:
                yield sum([await stream.receive() for stream in streams])


class SharedStreams:
    """Several subscriptions held at once."""

    def __init__(self, manager: SharedStreamManager, sources: list[SharedSource[int]]) -> None:
        self._streams = [manager.subscribe(source) for source in sources]

    async def __aenter__(self) -> list[Subscription[int]]:
        return [await stream.__aenter__() for stream in self._streams]

    async def __aexit__(self, *_: object) -> None:
        for stream in self._streams:
            await stream.aclose()


async def test_derived_sources_share_what_they_are_derived_from(caplog: pytest.LogCaptureFixture) -> None:
    async with SharedStreamManager() as manager:
        tree = Tree(manager)
        sources = [tree.summed(2, 3), tree.summed(2, 3), tree.scaled(2), tree.feed.source]
        async with SharedStreams(manager, sources) as streams:
            await until(lambda: len(manager.statistics().groups["base"].subscriptions) == 3)
            tree.feed.emit(1, 10)
            for factor in 1, 10:
                assert [await stream.receive() for stream in streams] == [5 * factor, 5 * factor, 2 * factor, factor]
            assert len(manager.statistics().groups) == 4
        assert idle(manager)
        assert tree.feed.opened == tree.feed.closed == 1
    assert not caplog.records


@pytest.mark.parametrize("end", [leave, stop, leave_the_manager])
async def test_the_end_of_a_derived_source_is_no_error_and_ends_what_it_is_derived_from(
    end: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with SharedStreamManager() as manager:
        tree = Tree(manager)
        stream = await manager.subscribe(tree.summed(2, 3)).__aenter__()
        await until(lambda: tree.feed.opened)
        tree.feed.emit(1)
        assert await stream.receive() == 5
        await end(manager, stream)
    assert idle(manager)
    assert tree.feed.closed == 1
    assert not caplog.records


async def test_what_a_derived_source_leaves_goes_on_for_the_others() -> None:
    async with SharedStreamManager() as manager:
        tree = Tree(manager)
        async with manager.subscribe(tree.feed.source) as base:
            async with manager.subscribe(tree.summed(2, 3)) as summed:
                await until(lambda: len(manager.statistics().groups["base"].subscriptions) == 3)
                tree.feed.emit(1)
                assert await summed.receive() == 5
            tree.feed.emit(2)
            assert [await base.receive(), await base.receive()] == [1, 2]
        assert tree.feed.opened == 1


async def test_a_failure_below_reaches_those_above() -> None:
    async with SharedStreamManager() as manager:
        tree = Tree(manager)
        async with SharedStreams(manager, [tree.summed(2, 3), tree.scaled(2)]) as (summed, scaled):
            await until(lambda: tree.feed.opened)
            tree.feed.fail(ValueError("below"))
            for stream in summed, scaled:
                with pytest.raises(ExceptionGroup) as caught:
                    await stream.receive()
                assert repr(caught.value.exceptions) == "(ValueError('below'),)"


async def test_a_stop_below_ends_those_above() -> None:
    async with SharedStreamManager() as manager:
        tree = Tree(manager)
        async with manager.subscribe(tree.scaled(2)) as scaled:
            await until(lambda: tree.feed.opened)
            await manager.stop("base")
            with pytest.raises(PollTerminated, match="returned"):
                await scaled.receive()
