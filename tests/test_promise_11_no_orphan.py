"""Promise 11: when the manager has been left, nothing of the library runs and every clean-up has finished."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import anyio
import pytest
import trio
from anyio.lowlevel import checkpoint

from anyio_sharedstream import PollTerminated, SharedSource, SharedStreamManager
from tests.support import Feed, idle, settle, until


@pytest.fixture
def count_tasks(backend_name: str) -> Any:
    if backend_name == "trio":
        return lambda: trio.lowlevel.current_statistics().tasks_living
    return lambda: len(asyncio.all_tasks())


async def groups_in_every_state(manager: SharedStreamManager, stack: AsyncExitStack) -> list[Feed]:
    """Bring groups of the manager into each of their states; gives the feeds in use, of which the second closes slowly."""
    live, closing, opening = feeds = [Feed(name) for name in ("live", "closing", "opening")]
    await stack.enter_async_context(manager.subscribe(live.source))
    await stack.enter_async_context(manager.subscribe(closing.source))
    await until(lambda: live.opened and closing.opened)
    closing.clean_up = anyio.Event()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await manager.stop("closing")
    await stack.enter_async_context(manager.subscribe(closing.source))
    await settle()
    await stack.enter_async_context(manager.subscribe(opening.source))
    return feeds


async def leave() -> None:
    """Leave the manager by the end of its body."""


async def fail() -> None:
    raise ValueError("body")


@pytest.mark.parametrize("end", [leave, fail])
async def test_no_task_is_left_and_every_upstream_has_closed(count_tasks: Any, end: Any) -> None:
    before = count_tasks()
    feeds: list[Feed] = []

    async def run() -> None:
        async with AsyncExitStack() as stack, SharedStreamManager() as manager:
            feeds.extend(await groups_in_every_state(manager, stack))
            assert [group.state for group in manager.statistics().groups.values()] == ["live", "waiting", "waiting"]
            assert [group.state for group in manager.statistics().closing] == ["closing"]
            assert count_tasks() > before + 4
            assert feeds[1].clean_up is not None
            feeds[1].clean_up.set()
            await end()

    with suppress(ValueError):
        await run()
    assert count_tasks() == before
    assert [feed.opened - feed.closed for feed in feeds] == [0, 0, 0]


async def test_leaving_waits_for_a_slow_clean_up(count_tasks: Any) -> None:
    feed = Feed()
    feed.clean_up = anyio.Event()
    manager = SharedStreamManager()
    before = count_tasks()
    left: list[int] = []

    async def run() -> None:
        async with manager:
            await manager.subscribe(feed.source).__aenter__()
            await until(lambda: feed.opened)
        left.append(feed.closed)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await until(lambda: feed.opened)
        await settle()
        assert not left
        feed.clean_up.set()
    assert left == [1]
    assert idle(manager)
    assert count_tasks() == before


async def test_a_manager_that_is_cancelled_waits_for_a_shielded_clean_up_all_the_same(count_tasks: Any) -> None:
    feed = Feed()
    feed.clean_up = clean_up = anyio.Event()
    manager = SharedStreamManager()
    before = count_tasks()

    async def run(scope: anyio.CancelScope) -> None:
        with scope:
            async with manager, manager.subscribe(feed.source) as stream:
                await stream.receive()
        assert scope.cancelled_caught
        assert feed.closed == 1

    async with anyio.create_task_group() as tasks:
        scope = anyio.CancelScope()
        tasks.start_soon(run, scope)
        await until(lambda: feed.opened)
        scope.cancel()
        await settle()
        assert not feed.closed
        clean_up.set()
    assert idle(manager)
    assert count_tasks() == before


class Fragile:
    """Upstreams in the three forms that a source may give, each failing when it is closed."""

    def __aiter__(self) -> Fragile:
        return self

    async def __anext__(self) -> Any:
        await anyio.sleep_forever()

    async def aclose(self) -> None:
        raise ZeroDivisionError("clean-up")

    @staticmethod
    async def generator() -> AsyncGenerator[int, None]:
        try:
            yield 0
            await anyio.sleep_forever()
        finally:
            raise ZeroDivisionError("clean-up")

    @staticmethod
    @asynccontextmanager
    async def context_manager() -> AsyncIterator[Feed | AsyncGenerator[int, None]]:
        feed = Feed("inner")
        try:
            yield feed.source.open()  # type: ignore[misc]
        finally:
            raise ZeroDivisionError("clean-up")


FRAGILE = pytest.mark.parametrize("opening", [Fragile, Fragile.generator, Fragile.context_manager])


def clean_up_errors(caplog: pytest.LogCaptureFixture) -> list[Any]:
    assert {record.message.partition(" key=")[0] for record in caplog.records} <= {"clean-up failed"}
    return [record.exc_info and record.exc_info[0] for record in caplog.records]


@FRAGILE
async def test_an_error_in_the_clean_up_after_the_last_leave_is_logged_only(
    opening: Any, caplog: pytest.LogCaptureFixture
) -> None:
    source: SharedSource[int] = SharedSource(key="fragile", open=opening)
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as unrelated:
        async with manager.subscribe(source):
            await until(lambda: manager.statistics().groups["fragile"].state == "live")
            await settle()
        assert clean_up_errors(caplog) == [ZeroDivisionError]
        async with manager.subscribe(source):  # the key is as good as new
            feed.emit(1)
            assert await unrelated.receive() == 1


async def stop(manager: SharedStreamManager) -> None:
    await manager.stop_all()
    assert idle(manager)


async def leave_the_manager(manager: SharedStreamManager) -> None:
    assert not idle(manager)


@FRAGILE
@pytest.mark.parametrize("end", [stop, leave_the_manager])
async def test_an_error_in_the_clean_up_after_a_stop_is_logged_only(
    opening: Any, end: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with SharedStreamManager() as manager:
        stream = await manager.subscribe(SharedSource(key="fragile", open=opening)).__aenter__()
        await until(lambda: manager.statistics().groups["fragile"].state == "live")
        await settle()
        await end(manager)
    assert clean_up_errors(caplog) == [ZeroDivisionError]
    assert {event async for event in stream} <= {0}  # and then the end of the stream


class Exhausted(Fragile):
    async def __anext__(self) -> Any:
        raise StopAsyncIteration


async def test_an_error_in_the_clean_up_does_not_take_the_place_of_the_terminal(caplog: pytest.LogCaptureFixture) -> None:
    async with SharedStreamManager() as manager, manager.subscribe(SharedSource(key="exhausted", open=Exhausted)) as stream:
        with pytest.raises(PollTerminated, match="returned"):
            await stream.receive()
    assert [record.message.split(" key=")[0] for record in caplog.records] == ["clean-up failed", "poll failed"]


async def test_churn_leaves_nothing(count_tasks: Any) -> None:
    running = [0] * 5

    async def play(number: int) -> AsyncGenerator[int, None]:
        running[number] += 1
        assert running[number] == 1
        try:
            while True:
                yield number
                await checkpoint()
        finally:
            running[number] -= 1

    async def visit(n: int) -> None:
        async with manager.subscribe(SharedSource(key=n % 5, open=lambda: play(n % 5))) as stream:
            assert n % 3 == 0 or await stream.receive() == n % 5

    before = count_tasks()
    async with SharedStreamManager() as manager:
        own = count_tasks()
        async with anyio.create_task_group() as tasks:
            for n in range(200):
                tasks.start_soon(visit, n)
        assert idle(manager)
        assert count_tasks() == own
    assert count_tasks() == before
    assert running == [0] * 5
