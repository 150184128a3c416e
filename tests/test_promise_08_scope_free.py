"""Promise 8: a subscription holds no cancel scope and no task group across the caller's body."""

from __future__ import annotations

import gc
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest

from anyio_sharedstream import SharedStreamManager, Subscription
from tests.support import Feed, idle, settle, until

abandons_a_generator = pytest.mark.filterwarnings("ignore:Async generator .* was garbage collected:ResourceWarning")


async def relay(manager: SharedStreamManager, feed: Feed) -> AsyncGenerator[Any, None]:
    """What a web framework's streaming response looks like: a subscription held over a yield."""
    async with manager.subscribe(feed.source) as stream:
        async for event in stream:
            yield event


async def in_a_task_of_its_own(function: Any, *args: Any) -> Any:
    """Await `function(*args)` in another task, inside a task group and a cancel scope that end with it."""
    results: list[Any] = []

    async def call() -> None:
        with anyio.CancelScope():
            results.append(await function(*args))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call)
    return results[0]


async def test_a_generator_that_holds_one_may_be_driven_and_closed_by_any_task() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager:
        events = relay(manager, feed)
        feed.emit(1, 2, 3)
        with anyio.CancelScope():
            assert await anext(events) == 1
        assert await in_a_task_of_its_own(anext, events) == 2
        assert await anext(events) == 3
        await in_a_task_of_its_own(events.aclose)
        assert idle(manager)
    assert feed.opened == feed.closed == 1


async def test_a_cancelled_scope_around_one_step_of_a_generator_ends_that_generator_alone() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as sibling:
        events = relay(manager, feed)
        feed.emit(1)
        assert await anext(events) == 1
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anext(events)
        assert scope.cancelled_caught
        await settle()  # nothing of that cancellation is left in this task
        with pytest.raises(StopAsyncIteration):
            await anext(events)
        feed.emit(2)
        assert [await sibling.receive(), await sibling.receive()] == [1, 2]
        assert len(manager.statistics().groups["feed"].subscriptions) == 1


@abandons_a_generator
async def test_an_abandoned_generator_lets_the_upstream_go() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager:
        events = relay(manager, feed)
        feed.emit(1)
        assert await anext(events) == 1
        del events
        gc.collect()
        await until(lambda: feed.closed and idle(manager))


@abandons_a_generator
async def test_an_abandoned_generator_changes_nothing_for_the_others() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as sibling:
        events = relay(manager, feed)
        feed.emit(1)
        assert await anext(events) == 1
        del events
        gc.collect()
        await until(lambda: len(manager.statistics().groups["feed"].subscriptions) == 1)
        feed.emit(2)
        assert [await sibling.receive(), await sibling.receive()] == [1, 2]


async def test_a_generator_may_be_finalised_inside_a_cancelled_scope() -> None:
    feed = Feed()
    feed.clean_up = anyio.Event()
    async with SharedStreamManager() as manager:
        events = relay(manager, feed)
        feed.emit(1)
        assert await anext(events) == 1
        with anyio.CancelScope() as scope:
            scope.cancel()
            await events.aclose()
        assert not manager.statistics().groups
        feed.clean_up.set()
    assert feed.closed == 1


async def test_a_generator_may_outlive_the_manager() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager:
        events = relay(manager, feed)
        feed.emit(1, 2)
        assert await anext(events) == 1
    assert await anext(events) == 2
    with pytest.raises(StopAsyncIteration):
        await anext(events)


async def test_left_to_an_exit_stack() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, AsyncExitStack() as outer:
        async with AsyncExitStack() as inner:
            with anyio.CancelScope():
                one = await inner.enter_async_context(manager.subscribe(feed.source))
            two = await inner.enter_async_context(manager.subscribe(feed.source))
            outer.push_async_exit(inner.pop_all())
        feed.emit(1)
        assert [await one.receive(), await two.receive()] == [1, 1]
        await in_a_task_of_its_own(outer.aclose)
        assert idle(manager)


async def test_left_in_any_order_and_from_inside_other_scopes() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager:
        streams = [manager.subscribe(feed.source) for _ in range(3)]
        for stream in streams:
            with anyio.CancelScope():
                await stream.__aenter__()
        async with anyio.create_task_group():
            await streams[0].__aexit__(None, None, None)
        await in_a_task_of_its_own(streams[1].__aexit__, None, None, None)
        feed.emit(1)
        assert await streams[2].receive() == 1
        await streams[2].__aexit__(None, None, None)
        assert idle(manager)


async def close(stream: Subscription[Any]) -> None:
    stream.close()


@pytest.mark.parametrize("leave", [close, Subscription.aclose])
@pytest.mark.parametrize("read", [Subscription.receive, Subscription.__anext__])
async def test_closed_from_another_task_while_it_is_receiving(leave: Any, read: Any) -> None:
    feed = Feed()
    refused: list[BaseException] = []

    async def receive(stream: Subscription[Any]) -> None:
        with pytest.raises(anyio.ClosedResourceError) as caught:
            await read(stream)
        refused.append(caught.value)

    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream, anyio.create_task_group() as tasks:
        tasks.start_soon(receive, stream)
        await until(lambda: feed.opened)
        await settle()
        await leave(stream)
        await until(lambda: refused and idle(manager))


async def test_closed_twice_is_closed_once() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source, subscriber_id="me") as old:
        await until(lambda: feed.opened)
        old.close()
        old.close()
        async with manager.subscribe(feed.source, subscriber_id="me") as new:
            await old.aclose()
            await old.aclose()
            old.close()
            feed.emit(1)
            assert await new.receive() == 1
    assert feed.opened == feed.closed == 2
    assert feed.most_open == 1


async def test_every_aclose_of_the_last_one_waits_until_the_upstream_has_closed() -> None:
    feed = Feed()
    feed.clean_up = anyio.Event()
    closed: list[int] = []

    async def leave(stream: Subscription[Any]) -> None:
        await stream.aclose()
        closed.append(feed.closed)

    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream, anyio.create_task_group() as tasks:
        await until(lambda: feed.opened)
        stream.close()
        tasks.start_soon(leave, stream)
        tasks.start_soon(leave, stream)
        await settle()
        assert not closed
        feed.clean_up.set()
    assert closed == [1, 1]
