"""One test for each way in which libraries of this kind have failed again and again."""

from __future__ import annotations

import gc
import traceback
import weakref
from collections.abc import AsyncGenerator
from contextvars import ContextVar
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from anyio_sharedstream import PollTerminated, SharedSource, SharedStreamManager, SubscriberOverflow, Subscription
from tests.support import Busy, Feed, idle, settle, until


async def test_01_first_join_race_opens_one_upstream() -> None:
    """Two first subscribers started two upstreams, or one overwrote the other's registration."""
    feed = Feed()
    received: list[int] = []

    async def subscribe() -> None:
        async with manager.subscribe(feed.source) as stream:
            received.append(await stream.receive())

    async with SharedStreamManager() as manager:
        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(subscribe)
            await until(lambda: feed.opened and len(manager.statistics().groups["feed"].subscriptions) == 10)
            feed.emit(1)
        assert received == [1] * 10
        assert feed.opened == 1


async def test_02_a_joiner_does_not_land_on_the_run_that_the_last_leaver_ends() -> None:
    """The joiner heard nothing; or a late leave of an old subscription tore down the new run of the same id and key."""
    feed = Feed()
    feed.clean_up = anyio.Event()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source, subscriber_id="me") as old:
        await until(lambda: feed.opened)
        old.close()
        async with manager.subscribe(feed.source, subscriber_id="me") as new:
            old.close()
            feed.clean_up.set()
            await old.aclose()
            feed.emit(1)
            assert await new.receive() == 1


async def test_03_leaving_while_others_join_leaves_no_ghost() -> None:
    """Counts went wrong, buffers were wiped, a share stayed subscribed but mute."""
    feed = Feed()
    async with SharedStreamManager() as manager:
        for leave_first in (True, False):
            first, second = manager.subscribe(feed.source), manager.subscribe(feed.source)
            await first.__aenter__()
            if leave_first:
                first.close()  # before its upstream has been opened
            await second.__aenter__()
            first.close()
            assert len(manager.statistics().groups["feed"].subscriptions) == 1
            feed.emit(1)
            assert await second.receive() == 1
            await second.aclose()
            assert idle(manager)


@pytest.mark.parametrize("error", [ValueError("end"), StopAsyncIteration()], ids=["raises", "returns"])
async def test_04_joining_at_the_instant_of_the_terminal_starts_afresh(error: BaseException) -> None:
    """Whoever subscribed while the upstream ended waited for ever."""
    feed = Feed()
    async with SharedStreamManager() as manager:
        async with manager.subscribe(feed.source) as first:
            feed.fail(error)
            with pytest.raises((ValueError, PollTerminated)):
                await first.receive()
            async with manager.subscribe(feed.source) as second:
                feed.emit(1)
                assert await second.receive() == 1
        assert feed.opened == 2


async def stray_cancellation() -> None:
    """Raise a cancellation that nobody asked for: one that has left its scope."""
    stray: BaseException
    with anyio.CancelScope() as scope:
        scope.cancel()
        try:
            await checkpoint()
        except anyio.get_cancelled_exc_class() as exc:
            stray = exc
    raise stray


async def test_05_a_dead_upstream_is_no_silent_hang() -> None:
    """Subscribers waited for ever when the upstream failed or ended; a stray cancellation made the key a zombie."""

    async def play() -> AsyncGenerator[int, None]:
        yield 1
        await stray_cancellation()

    async with SharedStreamManager() as manager, manager.subscribe(SharedSource(key="stray", open=play)) as stream:
        assert await stream.receive() == 1
        with pytest.raises(PollTerminated, match="cancelled"):
            await stream.receive()
        assert "stray" not in manager.statistics().groups


async def test_06_a_slow_consumer_is_bounded_told_and_alone() -> None:
    """Its buffer grew without bound, it stalled the others, it lost events silently, or it was evicted and never woken."""
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as fast:
        async with manager.subscribe(feed.source, subscriber_id="slow", max_buffer_size=3) as slow:
            for n in range(10):
                feed.emit(n)
                assert await fast.receive() == n
                assert slow.statistics().current_buffer_used <= 3
            with pytest.raises(SubscriberOverflow, match="'slow' of 'feed'"):
                await slow.receive()
        feed.emit(10)
        assert await fast.receive() == 10


async def test_07_no_consumer_owns_the_upstream() -> None:
    """Cancelling the consumer that had started or was driving the upstream killed the others."""
    feed = Feed()
    async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:

        async def subscribe_first() -> None:
            async with manager.subscribe(feed.source) as stream:
                await stream.receive()

        tasks.start_soon(subscribe_first)
        await until(lambda: feed.opened)
        async with manager.subscribe(feed.source) as second:
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await until(lambda: len(manager.statistics().groups["feed"].subscriptions) == 1)
                feed.emit(1)
                assert await second.receive() == 1
    assert feed.opened == 1


async def test_08_leaving_never_blocks_on_a_full_buffer_or_a_hung_clean_up() -> None:
    """Unsubscribing waited on a full queue, or without a limit on a clean-up that hung."""
    feed = Feed()
    async with SharedStreamManager() as manager:
        feed.clean_up = anyio.Event()
        async with manager.subscribe(feed.source, max_buffer_size=1) as stream:
            feed.emit(1)
            await until(lambda: stream.statistics().current_buffer_used)
            stream.close()
            assert not manager.statistics().groups
            with anyio.CancelScope() as scope:
                scope.cancel()
                await stream.aclose()
            assert scope.cancelled_caught
            assert feed.open_now
            feed.clean_up.set()


async def test_09_what_a_subscriber_does_with_an_event_reaches_no_sibling() -> None:
    """A failing observer starved its siblings or hit the producer."""
    feed = Feed()

    async def misbehave() -> None:
        async with manager.subscribe(feed.source) as stream:
            feed.emit(1)
            raise ZeroDivisionError(await stream.receive())

    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as sibling:
        with pytest.raises(ZeroDivisionError):
            await misbehave()
        feed.emit(2)
        assert [await sibling.receive(), await sibling.receive()] == [1, 2]


class Key:
    """A key that can be watched being forgotten."""


async def test_10_keys_that_nobody_holds_are_forgotten() -> None:
    """They stayed in the table."""

    async def visit(key: Key) -> weakref.ref[Key]:
        feed = Feed(key)
        async with manager.subscribe(feed.source):
            await until(lambda: feed.opened)
        return weakref.ref(key)

    async with SharedStreamManager() as manager:
        references = [await visit(Key()) for _ in range(20)]
        await settle()
        assert idle(manager)
        gc.collect()
        assert [reference() for reference in references] == [None] * 20


async def test_11_registered_means_registered() -> None:
    """An event published between "subscribed" and "really registered" was lost."""

    source = Busy().source
    async with SharedStreamManager() as manager, manager.subscribe(source) as first:
        assert await first.receive() == 0
        for _ in range(5):
            async with manager.subscribe(source) as late:
                published = manager.statistics().groups["busy"].events_published
                assert [await late.receive() for _ in range(3)] == [published, published + 1, published + 2]


async def test_12_generators_are_finalised_in_the_task_that_ran_them() -> None:
    """The garbage collector closed them, in the wrong task, or never."""
    tasks: list[int] = []

    async def play() -> AsyncGenerator[int, None]:
        tasks.append(anyio.get_current_task().id)
        try:
            with anyio.CancelScope():
                yield 1
                await anyio.sleep_forever()
        finally:
            await checkpoint_in_clean_up()
            tasks.append(anyio.get_current_task().id)

    async def checkpoint_in_clean_up() -> None:
        with anyio.CancelScope(shield=True):
            await checkpoint()

    async with SharedStreamManager() as manager:
        async with manager.subscribe(SharedSource(key="generator", open=play)) as stream:
            assert await stream.receive() == 1
        assert len(tasks) == 2
        assert tasks[0] == tasks[1] != anyio.get_current_task().id


async def test_13_every_subscriber_has_an_exception_of_its_own() -> None:
    """One object was raised in all tasks: its traceback grew by megabytes, and notes of one showed in another's."""
    feed = Feed()
    errors: list[BaseException] = []

    async def subscribe() -> None:
        async with manager.subscribe(feed.source) as stream:
            with pytest.raises(ValueError, match="shared") as caught:
                await stream.receive()
            caught.value.add_note(str(len(errors)))
            errors.append(caught.value)

    async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:
        for _ in range(100):
            tasks.start_soon(subscribe)
        await until(lambda: feed.opened and len(manager.statistics().groups["feed"].subscriptions) == 100)
        feed.fail(ValueError("shared"))
    assert len({id(error) for error in errors}) == 100
    assert [error.__notes__ for error in errors] == [[str(n)] for n in range(100)]
    assert len({len(traceback.extract_tb(error.__traceback__)) for error in errors}) == 1


request: ContextVar[str] = ContextVar("request", default="none")


async def test_14_the_first_subscribers_context_is_not_the_upstreams() -> None:
    """The poll task carried its request id and trace for life."""

    async def play() -> AsyncGenerator[str, None]:
        yield request.get()
        await anyio.sleep_forever()

    async with SharedStreamManager() as manager:
        request.set("first")
        async with manager.subscribe(SharedSource(key="context", open=play)) as stream:
            assert await stream.receive() == "none"


async def test_15_a_source_with_a_backlog_starves_nobody() -> None:
    """It published 1,500 events without giving the loop back: five healthy subscribers overflowed."""
    feed = Feed()

    async def subscribe() -> None:
        async with manager.subscribe(feed.source, max_buffer_size=8) as stream:
            assert [await stream.receive() for _ in range(1500)] == list(range(1500))

    async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:
        feed.emit(*range(1500))
        for _ in range(5):
            tasks.start_soon(subscribe)


async def test_16_a_dead_subscriber_does_not_keep_the_upstream_busy() -> None:
    """After the only subscriber had overflowed, 10,000 events were read for nobody."""
    busy = Busy()
    async with SharedStreamManager() as manager, manager.subscribe(busy.source, max_buffer_size=2) as stream:
        await until(lambda: busy.reads and idle(manager))
        assert busy.reads < 10
        with pytest.raises(SubscriberOverflow):
            await stream.receive()


async def test_17_a_cancellation_of_the_one_who_leaves_is_not_swallowed() -> None:
    """The wait for the upstream's end suppressed the caller's own cancellation."""
    feed = Feed()
    feed.clean_up = anyio.Event()
    async with SharedStreamManager() as manager:
        with anyio.CancelScope() as scope:
            async with manager.subscribe(feed.source):
                await until(lambda: feed.opened)
                scope.cancel()
        assert scope.cancelled_caught
        with anyio.CancelScope() as scope:
            scope.cancel()
            await manager.stop_all()
        assert scope.cancelled_caught
        feed.clean_up.set()


async def test_18_two_upstreams_of_a_key_never_overlap() -> None:
    """The new one was opened while the old one still cleaned up: fatal for exclusive resources."""
    feed = Feed()
    feed.clean_up = anyio.Event()
    async with SharedStreamManager() as manager:
        stream = await manager.subscribe(feed.source).__aenter__()
        await until(lambda: feed.opened)
        stream.close()
        async with manager.subscribe(feed.source) as new:
            await settle()
            assert feed.opened == 1
            feed.clean_up.set()
            feed.emit(1)
            assert await new.receive() == 1
    assert (feed.opened, feed.most_open) == (2, 1)


async def test_19_a_failure_does_not_overtake_data() -> None:
    """It threw away events that had already been published."""
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream:
        feed.emit(1, 2, 3, 4, 5)
        feed.fail(ValueError("end"))
        await until(lambda: feed.closed)
        await settle()
        assert [await stream.receive() for _ in range(5)] == [1, 2, 3, 4, 5]
        with pytest.raises(ValueError, match="end"):
            await stream.receive()


async def test_20_an_event_is_not_lost_with_the_task_that_was_woken_for_it() -> None:
    """An item handed straight to a waiting receiver was lost when that task was cancelled."""
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream:
        for n in range(20):
            taken: list[Any] = []
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(receive_into, taken, stream)
                await settle()
                feed.emit(n)
                await settle(n % 5)
                tasks.cancel_scope.cancel()
            assert (taken or [await stream.receive()]) == [n]


async def receive_into(taken: list[Any], stream: Subscription[Any]) -> None:
    taken.append(await stream.receive())


async def test_21_a_receiver_is_not_slowed_to_one_item_per_turn_of_the_loop() -> None:
    """It yielded for every ready item, fell behind a bursty source, and overflowed although it did no work."""

    async def play() -> AsyncGenerator[int, None]:
        n = 0
        while True:
            for _ in range(8):
                yield n
                n += 1
            await checkpoint()

    source = SharedSource(key="bursts", open=play)
    async with SharedStreamManager() as manager, manager.subscribe(source, max_buffer_size=16) as stream:
        for n in range(640):
            assert await stream.receive() == n
