"""Promise 4: whatever happens to one subscriber changes nothing for the others, and one that has failed keeps nothing alive."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from anyio_sharedstream import SharedStreamManager, SubscriberOverflow, Subscription
from tests.support import Feed, idle, settle, until

EVENTS = 20


async def overflow(stream: Subscription[Any]) -> None:
    await until(lambda: stream.statistics().peak_buffer_used == 2)
    await settle(200)
    with pytest.raises(SubscriberOverflow):
        await stream.receive()


async def crash(stream: Subscription[Any]) -> None:
    await stream.receive()
    raise LookupError("a subscriber's own")


async def time_out(stream: Subscription[Any]) -> None:
    await stream.receive()
    with anyio.move_on_after(0):
        await anyio.sleep_forever()


async def be_cancelled_while_receiving(stream: Subscription[Any]) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        while True:
            await stream.receive()


async def close_early(stream: Subscription[Any]) -> None:
    await stream.receive()
    stream.close()


async def take_little(stream: Subscription[Any]) -> None:
    for expected in range(EVENTS):
        assert await stream.receive() == expected


Misfortune = Callable[[Subscription[Any]], Awaitable[None]]


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize(
    "misfortune", [overflow, crash, time_out, be_cancelled_while_receiving, close_early, take_little], ids=lambda f: f.__name__
)
async def test_a_sibling_receives_everything_whatever_happens_to_one_subscriber(misfortune: Misfortune, first: bool) -> None:
    feed = Feed()
    ready = anyio.Event()
    received: list[int] = []
    over = 0

    async def unfortunate() -> None:
        nonlocal over
        try:
            async with manager.subscribe(feed.source, max_buffer_size=2) as stream:
                ready.set()
                await misfortune(stream)
        except LookupError:
            pass
        over += 1

    async def sibling() -> None:
        async with manager.subscribe(feed.source) as stream:
            ready.set()
            while len(received) < EVENTS:
                received.append(await stream.receive())
            await until(lambda: over)
            assert feed.closed == 0

    async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:
        for subscriber in (unfortunate, sibling) if first else (sibling, unfortunate):
            tasks.start_soon(subscriber)
            await ready.wait()
            ready = anyio.Event()
        await until(lambda: feed.opened)
        for event in range(EVENTS):
            feed.emit(event)
            await settle()
    assert received == list(range(EVENTS))
    assert feed.opened == feed.closed == 1


async def test_an_upstream_outlives_the_cancelled_task_that_started_it() -> None:
    feed = Feed()
    started = anyio.Event()

    async def starter() -> None:
        async with manager.subscribe(feed.source):
            started.set()
            await anyio.sleep_forever()

    async with SharedStreamManager() as manager:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(starter)
            await started.wait()
            stream = manager.subscribe(feed.source)
            await stream.__aenter__()
            tasks.cancel_scope.cancel()
        feed.emit("event")
        assert await stream.receive() == "event"
        assert (feed.opened, feed.closed) == (1, 0)
        await stream.aclose()
    assert feed.closed == 1


async def test_several_that_overflow_at_once_harm_nobody_else() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as healthy:
        slow = [manager.subscribe(feed.source, subscriber_id=n, max_buffer_size=n) for n in range(1, 4)]
        for stream in slow:
            await stream.__aenter__()
        await until(lambda: feed.opened)
        for event in range(10):
            feed.emit(event)
            await settle()
        assert await healthy.receive_batch(100) == tuple(range(10))
        for stream in slow:
            with pytest.raises(SubscriberOverflow) as caught:
                await stream.receive()
            assert caught.value.subscriber_id == stream.subscriber_id
            stream.close()
        feed.emit("still alive")
        assert await healthy.receive() == "still alive"


async def test_a_subscription_that_has_failed_does_not_keep_the_upstream_alive() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source, max_buffer_size=1) as stream:
        await until(lambda: feed.opened)
        for event in range(2):
            feed.emit(event)
            await settle()
        await until(lambda: idle(manager))  # while the subscription is still held
        assert feed.closed == 1
        with pytest.raises(SubscriberOverflow):
            await stream.receive()


async def test_the_upstream_goes_when_the_last_healthy_one_leaves_although_a_failed_one_stays() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source, max_buffer_size=1) as failed:
        async with manager.subscribe(feed.source) as healthy:
            for event in range(5):
                feed.emit(event)
                assert await healthy.receive() == event
                await settle()
            assert feed.closed == 0
        assert feed.closed == 1
        with pytest.raises(SubscriberOverflow):
            await failed.receive()


async def test_a_late_leave_of_a_failed_subscription_touches_no_later_upstream() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager:
        stream = manager.subscribe(feed.source, subscriber_id="same")
        await stream.__aenter__()
        feed.fail(ValueError("broken"))
        with pytest.raises(ValueError, match="broken"):
            await stream.receive()
        async with manager.subscribe(feed.source, subscriber_id="same") as fresh:
            await stream.aclose()
            feed.emit("event")
            assert await fresh.receive() == "event"
    assert (feed.opened, feed.closed) == (2, 2)


async def test_a_late_leave_of_a_failed_subscription_does_not_unregister_another_that_has_its_id_by_now() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as healthy:
        failed = manager.subscribe(feed.source, subscriber_id="same", max_buffer_size=1)
        await failed.__aenter__()
        await until(lambda: feed.opened)
        for event in range(2):
            feed.emit(event)
            assert await healthy.receive() == event
            await settle()
        with pytest.raises(SubscriberOverflow):
            await failed.receive()
        async with manager.subscribe(feed.source, subscriber_id="same") as successor:
            failed.close()
            feed.emit("event")
            await settle()
            assert successor.receive_nowait() == "event"


async def test_a_failing_upstream_harms_no_other_key() -> None:
    failing, other = Feed("failing"), Feed("other")
    async with SharedStreamManager() as manager, manager.subscribe(other.source) as stream:
        async with manager.subscribe(failing.source) as victim:
            failing.fail(ValueError("broken"))
            with pytest.raises(ValueError, match="broken"):
                await victim.receive()
        other.emit("event")
        assert await stream.receive() == "event"
    assert other.opened == other.closed == 1
