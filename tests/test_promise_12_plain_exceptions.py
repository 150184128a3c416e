"""Promise 12: an exception leaves the body of a manager or a subscription as itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from anyio_sharedstream import PollTerminated, SharedSource, SharedStreamManager, Subscription
from tests.conftest import BACKENDS
from tests.support import Feed, idle, settle, until

Body = Callable[[SharedStreamManager, Feed, BaseException], Awaitable[None]]


class Unusual(BaseException):
    """Not an `Exception`, and known to nobody."""


ERRORS = pytest.mark.parametrize(
    "error",
    [
        ValueError("body"),
        KeyboardInterrupt("body"),
        SystemExit(3),
        Unusual("body"),
        ExceptionGroup("body", [ValueError(1), OSError(2)]),
        BaseExceptionGroup("body", [KeyboardInterrupt(), ValueError()]),
    ],
    ids=repr,
)


async def manager_body(manager: SharedStreamManager, feed: Feed, error: BaseException) -> None:
    async with manager:
        await manager.subscribe(feed.source).__aenter__()
        await until(lambda: feed.opened)
        raise error


async def subscription_body(manager: SharedStreamManager, feed: Feed, error: BaseException) -> None:
    async with manager:
        await leave_the_last(manager, feed, error)


async def leave_the_last(manager: SharedStreamManager, feed: Feed, error: BaseException) -> None:
    async with manager.subscribe(feed.source), manager.subscribe(feed.source):
        await until(lambda: feed.opened)
        raise error


BODIES = pytest.mark.parametrize("body", [manager_body, subscription_body])


@ERRORS
@BODIES
async def test_an_exception_leaves_the_body_as_itself(body: Body, error: BaseException) -> None:
    feed = Feed()
    with pytest.raises(type(error)) as caught:
        await body(SharedStreamManager(), feed, error)
    assert caught.value is error
    assert feed.closed == 1


@ERRORS
async def test_a_subscriptions_exception_passes_and_the_manager_goes_on(error: BaseException) -> None:
    feed = Feed()
    async with SharedStreamManager() as manager:
        with pytest.raises(type(error)) as caught:
            await leave_the_last(manager, feed, error)
        assert caught.value is error
        async with manager.subscribe(feed.source) as stream:
            feed.emit(1)
            assert await stream.receive() == 1


async def interrupt(manager: SharedStreamManager, feed: Feed, cancel: Callable[[], object]) -> None:
    """Cancel those who wait for the feed's clean-up, then let it finish."""
    await until(lambda: manager.statistics().closing)
    await settle()
    cancel()
    await settle()
    assert not feed.closed
    assert feed.clean_up is not None
    feed.clean_up.set()


@ERRORS
@BODIES
async def test_a_cancelled_scope_while_leaving_waits_does_not_replace_it(body: Body, error: BaseException) -> None:
    feed = Feed()
    feed.clean_up = anyio.Event()
    manager = SharedStreamManager()
    async with anyio.create_task_group() as tasks:
        scope = anyio.CancelScope()
        tasks.start_soon(interrupt, manager, feed, scope.cancel)
        with scope, pytest.raises(type(error)) as caught:
            await body(manager, feed, error)
    assert caught.value is error
    assert feed.closed == 1


@ERRORS
async def test_a_cancelled_scope_while_the_last_subscription_waits_does_not_replace_it(error: BaseException) -> None:
    feed = Feed()
    feed.clean_up = anyio.Event()
    async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:
        scope = anyio.CancelScope()
        tasks.start_soon(interrupt, manager, feed, scope.cancel)
        with scope, pytest.raises(type(error)) as caught:
            await leave_the_last(manager, feed, error)
        assert not feed.closed
    assert caught.value is error
    assert feed.closed == 1


@ERRORS
@BODIES
@pytest.mark.parametrize("anyio_backend", BACKENDS[:2], indirect=True)
async def test_a_native_cancellation_while_leaving_waits_does_not_replace_it(body: Body, error: BaseException) -> None:
    feed = Feed()
    feed.clean_up = anyio.Event()
    manager = SharedStreamManager()
    raised: list[BaseException] = []

    async def run() -> None:
        # A task that fails with a KeyboardInterrupt would end the event loop.
        with pytest.raises(type(error)) as caught:
            await body(manager, feed, error)
        raised.append(caught.value)

    task = asyncio.create_task(run())
    await interrupt(manager, feed, task.cancel)
    await task
    assert raised == [error]
    assert feed.closed == 1


@pytest.mark.parametrize("leave", ["manager", "subscription"])
async def test_a_cancellation_while_leaving_waits_is_raised_if_nothing_else_is_on_its_way(leave: str) -> None:
    feed = Feed()
    feed.clean_up = anyio.Event()
    manager = SharedStreamManager()
    async with anyio.create_task_group() as tasks:
        with anyio.CancelScope() as scope:
            async with manager:
                stream = await manager.subscribe(feed.source).__aenter__()
                await until(lambda: feed.opened)
                tasks.start_soon(interrupt, manager, feed, scope.cancel)
                if leave == "subscription":
                    await stream.__aexit__(None, None, None)
            await checkpoint()  # trio's own task groups, too, may leave it to the next checkpoint
        assert scope.cancelled_caught
    assert feed.closed == 1


@pytest.mark.parametrize("receive", [Subscription.receive, anext, lambda stream: stream.receive_batch(5)])
async def test_a_cancelled_body_leaves_as_cancelled(receive: Callable[[Subscription[Any]], Awaitable[Any]]) -> None:
    feed = Feed()
    with anyio.CancelScope() as scope:
        async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream:
            await until(lambda: feed.opened)
            scope.cancel()
            await receive(stream)
    assert scope.cancelled_caught
    assert feed.closed == 1
    await checkpoint()


# What an upstream raises that is no Exception.

DEADLY = pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt("upstream"), SystemExit(4), Unusual("upstream"), BaseExceptionGroup("upstream", [SystemExit(5)])],
    ids=repr,
)


@DEADLY
async def test_an_upstreams_base_exception_leaves_the_manager_as_itself(error: BaseException) -> None:
    feed, other = Feed(), Feed("other")
    manager = SharedStreamManager()
    streams: list[Subscription[Any]] = []

    async def run() -> None:
        async with manager:
            streams.append(await manager.subscribe(feed.source).__aenter__())
            async with manager.subscribe(other.source) as unrelated:
                await until(lambda: feed.opened and other.opened)
                feed.fail(error)
                await unrelated.receive()

    with pytest.raises(type(error)) as caught:
        await run()
    assert caught.value is error
    assert idle(manager)
    assert feed.closed == other.closed == 1
    with pytest.raises(PollTerminated) as told:
        streams[0].receive_nowait()
    assert told.value.__cause__ is error
    with pytest.raises(RuntimeError, match="left"):
        manager.subscribe(feed.source)


@DEADLY
async def test_it_does_so_from_a_clean_up(error: BaseException) -> None:
    async def play() -> AsyncGenerator[int, None]:
        try:
            yield 1
            await anyio.sleep_forever()
        finally:
            raise error

    async def run() -> None:
        async with SharedStreamManager() as manager, manager.subscribe(SharedSource(key="deadly", open=play)) as stream:
            assert await stream.receive() == 1

    with pytest.raises(type(error)) as caught:
        await run()
    assert caught.value is error


async def test_it_does_so_with_the_body_finished() -> None:
    feed = Feed()
    feed.clean_up = anyio.Event()
    manager = SharedStreamManager()

    async def play() -> AsyncGenerator[int, None]:
        try:
            async for event in feed.source.open():  # type: ignore[union-attr]
                yield event
        finally:
            raise KeyboardInterrupt

    async def run() -> None:
        async with manager:
            stream = await manager.subscribe(SharedSource(key="deadly", open=play)).__aenter__()
            feed.emit(1)
            assert await stream.receive() == 1

    async with anyio.create_task_group() as tasks:
        scope = anyio.CancelScope()
        tasks.start_soon(interrupt, manager, feed, scope.cancel)
        with pytest.raises(KeyboardInterrupt), scope:
            await run()
    assert feed.closed == 1


async def test_the_first_of_several_leaves_the_manager() -> None:
    async def play() -> AsyncGenerator[int, None]:
        try:
            yield 1
            await anyio.sleep_forever()
        finally:
            raise KeyboardInterrupt("second")

    feed = Feed()
    second = SharedSource(key="second", open=play)

    async def run() -> None:
        async with SharedStreamManager() as manager, manager.subscribe(feed.source), manager.subscribe(second) as stream:
            assert await stream.receive() == 1
            feed.fail(KeyboardInterrupt("first"))
            await anyio.sleep_forever()

    with pytest.raises(KeyboardInterrupt, match="first"):
        await run()


async def test_meanwhile_nobody_can_subscribe_any_more() -> None:
    feed = Feed()
    said: list[str] = []

    async def run() -> None:
        async with SharedStreamManager() as manager, manager.subscribe(feed.source):
            feed.fail(KeyboardInterrupt())
            with anyio.CancelScope(shield=True):
                await until(lambda: idle(manager))
                with pytest.raises(RuntimeError) as caught:
                    await manager.subscribe(Feed("another").source).__aenter__()
                said.append(str(caught.value))
            await anyio.sleep_forever()

    with pytest.raises(KeyboardInterrupt):
        await run()
    assert said == ["the SharedStreamManager is being left: subscribe inside its `async with` block"]


async def run_until_interrupted() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source):
        feed.fail(KeyboardInterrupt())
        await anyio.sleep_forever()


async def test_the_task_that_ran_the_manager_is_not_left_cancelled() -> None:
    with pytest.raises(KeyboardInterrupt):
        await run_until_interrupted()
    await settle()
    with anyio.CancelScope() as scope:
        await settle()
    assert not scope.cancelled_caught


@pytest.mark.parametrize("anyio_backend", BACKENDS[:2], indirect=True)
async def test_the_task_that_ran_the_manager_has_no_cancellation_request_left() -> None:
    with pytest.raises(KeyboardInterrupt):
        await run_until_interrupted()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
