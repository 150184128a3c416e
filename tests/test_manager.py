"""`SharedStreamManager`: its life, its arguments, stopping."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import nullcontext
from typing import Any

import anyio
import pytest

from anyio_sharedstream import (
    DEFAULT_MAX_BUFFER_SIZE,
    PollTerminated,
    Restart,
    SharedSource,
    SharedStreamError,
    SharedStreamManager,
    Subscription,
    shared_source,
)
from tests.conftest import BACKENDS
from tests.support import Feed, failing_to_close, idle, settle, until
from tests.sweep import drain

# Its life.


async def test_subscribing_before_entering_is_refused() -> None:
    manager = SharedStreamManager()
    with pytest.raises(RuntimeError, match="has not been entered"):
        manager.subscribe(Feed().source)
    assert idle(manager)
    async with manager, manager.subscribe(Feed().source):
        assert not idle(manager)


async def test_subscribing_after_leaving_is_refused() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager:
        made_before = manager.subscribe(feed.source)
    with pytest.raises(RuntimeError, match="left"):
        manager.subscribe(feed.source)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="left"):
            await made_before.__aenter__()
    assert feed.opened == 0


async def test_subscribing_while_leaving_waits_is_refused() -> None:
    feed = Feed()
    feed.clean_up = clean_up = anyio.Event()
    refused: list[str] = []

    async def subscribe() -> None:
        await until(lambda: manager.statistics().closing)
        clean_up.set()
        with pytest.raises(RuntimeError, match="left"):
            await manager.subscribe(feed.source).__aenter__()
        refused.append("")

    async with anyio.create_task_group() as tasks, SharedStreamManager() as manager:
        await manager.subscribe(feed.source).__aenter__()
        await until(lambda: feed.opened)
        tasks.start_soon(subscribe)
    assert refused


@pytest.mark.parametrize("left", [False, True])
async def test_entering_twice_is_refused(left: bool) -> None:
    manager = SharedStreamManager()
    async with manager:
        if not left:
            with pytest.raises(RuntimeError, match="only once"):
                await manager.__aenter__()
    with pytest.raises(RuntimeError, match="only once"):
        await manager.__aenter__()


async def test_leaving_stops_all_and_ends_the_streams() -> None:
    one, two = Feed("one"), Feed("two")
    async with SharedStreamManager() as manager:
        streams = [await manager.subscribe(feed.source).__aenter__() for feed in (one, two)]
        one.emit(1)
        await until(lambda: streams[0].statistics().current_buffer_used and two.opened)
    assert idle(manager)
    assert one.closed == two.closed == 1
    assert [event async for event in streams[0]] == [1]
    assert [event async for event in streams[1]] == []


# Its arguments.

BAD_BUFFER_SIZES = pytest.mark.parametrize("size", [0, -1, True, False, 1.5, 1.0, -math.inf, math.nan, "5", [5]], ids=repr)


@BAD_BUFFER_SIZES
async def test_a_bound_that_is_no_positive_number_is_refused_by_the_manager(size: Any) -> None:
    with pytest.raises(ValueError, match="max_buffer_size must be a positive number") as caught:
        SharedStreamManager(max_buffer_size=size)
    assert repr(size) in str(caught.value)


@BAD_BUFFER_SIZES
async def test_a_bound_that_is_no_positive_number_is_refused_by_subscribe(size: Any) -> None:
    async with SharedStreamManager() as manager:
        with pytest.raises(ValueError, match="max_buffer_size must be a positive number") as caught:
            manager.subscribe(Feed().source, max_buffer_size=size)
        assert repr(size) in str(caught.value)
        assert idle(manager)


async def test_the_bound_is_the_subscribers_else_the_managers_else_the_default() -> None:
    feed = Feed()
    async with SharedStreamManager(max_buffer_size=7) as manager, SharedStreamManager() as plain:
        for subscription, bound in [
            (manager.subscribe(feed.source, max_buffer_size=1), 1),
            (manager.subscribe(feed.source, max_buffer_size=math.inf), math.inf),
            (manager.subscribe(feed.source), 7),
            (plain.subscribe(feed.source), DEFAULT_MAX_BUFFER_SIZE),
        ]:
            assert subscription.statistics().max_buffer_size == bound


async def test_an_unbounded_subscriber_never_overflows() -> None:
    feed = Feed()
    async with SharedStreamManager(max_buffer_size=math.inf) as manager, manager.subscribe(feed.source) as stream:
        feed.emit(*range(5000))
        await until(lambda: stream.statistics().current_buffer_used == 5000)
        assert await stream.receive_batch(5000) == tuple(range(5000))


@shared_source
async def decorated() -> AsyncGenerator[int, None]:
    yield 1
    await anyio.sleep_forever()


@pytest.mark.parametrize("source", [decorated, "feed", None, Feed()])
async def test_what_is_no_shared_source_is_refused(source: Any) -> None:
    async with SharedStreamManager() as manager:
        with pytest.raises(TypeError, match="must be a SharedSource"):
            manager.subscribe(source)
        assert idle(manager)
        async with manager.subscribe(decorated()) as stream:
            assert await stream.receive() == 1


async def test_an_unhashable_subscriber_id_is_refused() -> None:
    unhashable: Any = ["me"]
    async with SharedStreamManager() as manager:
        with pytest.raises(TypeError, match=r"subscriber_id must be hashable, and \['me'\] is not"):
            manager.subscribe(Feed().source, subscriber_id=unhashable)
        assert idle(manager)


class EqualToAll:
    """An id that claims to be any other."""

    def __init__(self, hash_value: int) -> None:
        self._hash = hash_value

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return type(other) in (int, str)


async def test_generated_ids_equal_no_callers_id_and_no_other() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager:
        generated = [manager.subscribe(feed.source).subscriber_id for _ in range(5)]
        callers = {*range(10), *map(str, range(10)), *map(repr, generated), *(EqualToAll(hash(one)) for one in generated)}
        assert len(set(generated)) == 5
        assert callers.isdisjoint(generated)
        async with manager.subscribe(feed.source) as first, manager.subscribe(feed.source) as second:
            taken = {first.subscriber_id, second.subscriber_id}
            async with manager.subscribe(feed.source, subscriber_id=repr(first.subscriber_id)) as third:
                assert third.subscriber_id not in taken


async def test_a_key_whose_repr_fails_leaves_no_state() -> None:
    class Shy:
        def __repr__(self) -> str:
            raise ZeroDivisionError

    async with SharedStreamManager() as manager:
        stream = manager.subscribe(SharedSource(key=Shy(), open=Feed().source.open))
        for _ in range(2):  # the second time, too: it was not entered
            with pytest.raises(ZeroDivisionError):
                await stream.__aenter__()
        assert idle(manager)


# Stopping.


async def test_stop_ends_one_key_and_the_manager_stays_usable() -> None:
    one, two = Feed("one"), Feed("two")
    async with SharedStreamManager() as manager, manager.subscribe(one.source) as first:
        second = await manager.subscribe(two.source).__aenter__()
        one.emit(1)
        await until(lambda: first.statistics().current_buffer_used and two.opened)
        await manager.stop("one")
        assert one.closed == 1
        assert [event async for event in first] == [1]
        two.emit(2)
        assert await second.receive() == 2
        async with manager.subscribe(one.source) as again:
            one.emit(3)
            assert await again.receive() == 3


@pytest.mark.parametrize(("key", "error"), [(None, ValueError), ([1], TypeError)])
async def test_stopping_what_can_be_no_key_is_refused(key: Any, error: type[Exception]) -> None:
    async with SharedStreamManager() as manager:
        with pytest.raises(error, match="key must"):
            await manager.stop(key)


async def test_stopping_what_does_not_run_does_nothing_at_once() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await manager.stop("unknown")
        assert not scope.cancelled_caught
        feed.emit(1)
        assert await stream.receive() == 1
        await manager.stop_all()
        await manager.stop_all()
        await manager.stop("feed")


@pytest.mark.parametrize("everything", [False, True])
async def test_stop_waits_for_those_that_are_closing_already(everything: bool) -> None:
    feed = Feed()
    feed.clean_up = clean_up = anyio.Event()
    stopped: list[int] = []

    async def stop() -> None:
        await (manager.stop_all() if everything else manager.stop("feed"))
        stopped.append(feed.closed)

    async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:
        stream = await manager.subscribe(feed.source).__aenter__()
        await until(lambda: feed.opened)
        stream.close()
        async with manager.subscribe(feed.source) as waiting:
            tasks.start_soon(stop)
            tasks.start_soon(stop)
            await settle()
            assert not stopped
            with pytest.raises(anyio.EndOfStream):
                await waiting.receive()
            clean_up.set()
    assert stopped == [1, 1]
    assert feed.opened == 1


async def test_upstreams_are_closed_side_by_side() -> None:
    feeds = [Feed(n) for n in range(3)]
    all_cleaning_up = anyio.Event()
    cleaning_up = 0

    async def play(feed: Feed) -> AsyncGenerator[Any, None]:
        nonlocal cleaning_up
        try:
            yield feed.key
            await anyio.sleep_forever()
        finally:
            cleaning_up += 1
            if cleaning_up == len(feeds):
                all_cleaning_up.set()
            with anyio.CancelScope(shield=True):
                await all_cleaning_up.wait()

    def source(feed: Feed) -> SharedSource[Any]:
        return SharedSource(key=feed.key, open=lambda: play(feed))

    async with SharedStreamManager() as manager:
        for feed in feeds:
            stream = await manager.subscribe(source(feed)).__aenter__()
            assert await stream.receive() == feed.key
        await manager.stop_all()
        assert idle(manager)
        assert cleaning_up == 3


@pytest.mark.parametrize("everything", [False, True])
async def test_a_source_may_stop_itself(everything: bool, caplog: pytest.LogCaptureFixture) -> None:
    raised: list[type[BaseException]] = []

    async def play() -> AsyncGenerator[int, None]:
        yield 1
        try:
            await (manager.stop_all() if everything else manager.stop("own"))
        except BaseException as exc:
            raised.append(type(exc))
            raise

    async with SharedStreamManager() as manager, manager.subscribe(SharedSource(key="own", open=play)) as stream:
        assert [event async for event in stream] == [1]
        await until(lambda: idle(manager))
    assert raised == [anyio.get_cancelled_exc_class()]  # it cannot wait for its own end
    assert not caplog.records


async def test_a_cancelled_stop_has_stopped() -> None:
    feed = Feed()
    feed.clean_up = anyio.Event()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream:
        await until(lambda: feed.opened)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await manager.stop("feed")
        assert scope.cancelled_caught
        with pytest.raises(anyio.EndOfStream):
            await stream.receive()
        feed.clean_up.set()
        await until(lambda: idle(manager))


# Its tasks, cancelled behind its back.


async def test_the_librarys_tasks_say_whose_they_are() -> None:
    feed = Feed("prices")
    async with SharedStreamManager() as manager, manager.subscribe(feed.asking_for(silence_timeout=1000)):
        await until(lambda: feed.opened)
        await settle()
        names = {task.name for task in anyio.get_running_tasks()}
        assert names >= {"shared stream 'prices'", "shared streams' clock"}


async def test_an_upstream_that_fails_while_everything_is_being_cancelled_has_failed() -> None:
    async def source() -> AsyncGenerator[str, None]:
        try:
            yield "event"
            await anyio.sleep_forever()
        finally:
            raise ValueError("broken")

    with anyio.CancelScope() as scope:
        async with SharedStreamManager() as manager:
            stream = await manager.subscribe(SharedSource(key="feed", open=source)).__aenter__()
            assert await stream.receive() == "event"
            scope.cancel()
            with anyio.CancelScope(shield=True):
                await until(lambda: idle(manager))
    with pytest.raises(ValueError, match="broken"):
        await stream.receive()


@pytest.mark.parametrize("anyio_backend", BACKENDS[:2], indirect=True)
@pytest.mark.parametrize("steps", range(5))
@pytest.mark.filterwarnings("ignore:coroutine '.*' was never awaited:RuntimeWarning")  # one cancelled before its first step
async def test_tasks_that_are_cancelled_natively_at_any_step_leave_nothing(steps: int) -> None:
    feed = Feed()
    before = asyncio.all_tasks()
    manager = SharedStreamManager()
    body: list[str] = []

    async def run() -> None:
        async with manager:
            streams.append(await manager.subscribe(feed.source).__aenter__())
            await settle(steps)
            for task in asyncio.all_tasks() - before:
                task.cancel()
            await settle()
            body.append("completed")

    streams: list[Subscription[Any]] = []
    # Before its first step, a task takes the manager's task group with it; and nobody may take that for an ordinary end.
    with nullcontext() if steps else pytest.raises(SharedStreamError, match=r"Task\.cancel"):
        await run()
    assert bool(body) == bool(steps)
    assert idle(manager)
    assert asyncio.all_tasks() == before
    assert feed.opened == feed.closed
    with pytest.raises((PollTerminated, anyio.EndOfStream)):
        await streams[0].receive()


async def cancelled_around(source: SharedSource[Any]) -> BaseException | None:
    """Cancel all around a manager; gives what a subscriber is told.

    The body gives way later, for on its way out it would stop everything.
    """
    with anyio.CancelScope() as scope:
        async with SharedStreamManager() as manager:
            stream = await manager.subscribe(source).__aenter__()
            await settle()
            scope.cancel()
            with anyio.CancelScope(shield=True):
                await until(lambda: idle(manager))
    return drain(stream)[1]


async def test_a_failure_of_an_upstream_that_is_cancelled_with_all_around_it_is_told() -> None:
    assert type(await cancelled_around(failing_to_close(ValueError("broken")))) is ValueError


async def test_nobody_is_asked_whether_to_restart_what_was_cancelled_with_all_around_it() -> None:
    asked: list[Exception] = []
    source = Feed().asking_for(restart=Restart(on=asked.append))
    assert type(await cancelled_around(source)) is anyio.EndOfStream
    assert not asked
