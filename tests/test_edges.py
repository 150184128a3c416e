"""The decisions at the edges of the contract, where the promises alone leave room."""

from __future__ import annotations

import gc
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from anyio_sharedstream import PollTerminated, SharedSource, SharedStreamManager, SubscriberOverflow, Subscription
from tests.conftest import BACKENDS
from tests.support import Feed, idle, settle, until


def source_of(play: Callable[[], Any]) -> SharedSource[Any]:
    return SharedSource(key="edge", open=play)


# Closing a generator.


@pytest.mark.parametrize("yields_again", [False, True])
async def test_a_generator_that_rests_at_a_yield_is_thrown_a_cancellation(yields_again: bool) -> None:
    thrown: list[type[BaseException]] = []

    async def play() -> AsyncGenerator[int, None]:
        try:
            while True:
                yield 1
        except BaseException as exc:
            thrown.append(type(exc))
            if not yields_again:
                raise
        try:
            yield 2
        except BaseException as exc:
            thrown.append(type(exc))
            raise

    async with SharedStreamManager() as manager:
        async with manager.subscribe(source_of(play)) as stream:
            assert await stream.receive() == 1
        assert idle(manager)
    assert thrown == [anyio.get_cancelled_exc_class(), GeneratorExit][: 1 + yields_again]


async def test_a_generator_that_shields_its_yields_is_closed() -> None:
    thrown: list[type[BaseException]] = []

    async def play() -> AsyncGenerator[int, None]:
        try:
            with anyio.CancelScope(shield=True):
                while True:
                    yield 1
        except BaseException as exc:
            thrown.append(type(exc))
            raise

    async with SharedStreamManager() as manager:
        async with manager.subscribe(source_of(play)) as stream:
            assert await stream.receive() == 1
        assert idle(manager)
    assert thrown == [GeneratorExit]


# The terminal.


async def test_the_terminal_is_what_finally_leaves_the_opened_source() -> None:
    failed = Feed()

    @asynccontextmanager
    async def translating() -> AsyncIterator[AsyncGenerator[Any, None]]:
        try:
            yield failed.source.open()  # type: ignore[misc]
        except ValueError as exc:
            raise OSError("translated") from exc

    async with SharedStreamManager() as manager, manager.subscribe(source_of(translating)) as stream:
        failed.fail(ValueError("raw"))
        with pytest.raises(OSError, match="translated") as caught:
            await stream.receive()
        assert isinstance(caught.value.__cause__, ValueError)


async def test_the_key_is_free_while_what_was_opened_still_cleans_up() -> None:
    clean_up = anyio.Event()
    failed = Feed()

    @asynccontextmanager
    async def slow() -> AsyncIterator[AsyncGenerator[Any, None]]:
        try:
            yield failed.source.open()  # type: ignore[misc]
        finally:
            await clean_up.wait()

    async with SharedStreamManager() as manager, manager.subscribe(source_of(slow)) as stream:
        failed.fail(ValueError("early"))
        await until(lambda: manager.statistics().closing)
        assert not manager.statistics().groups
        with pytest.raises(anyio.WouldBlock):
            stream.receive_nowait()
        clean_up.set()
        with pytest.raises(ValueError, match="early"):
            await stream.receive()


@pytest.mark.parametrize("signal", [anyio.EndOfStream, anyio.WouldBlock])
async def test_a_signal_of_streams_that_leaks_from_a_source_is_a_failure(signal: type[Exception]) -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream:
        feed.fail(signal())
        with pytest.raises(PollTerminated, match=signal.__name__) as caught:
            await stream.receive()
        assert isinstance(caught.value.__cause__, signal)


# The bound.


@pytest.mark.parametrize("bound", [1, 8, 63, 64, 65])
async def test_one_that_had_taken_everything_accepts_a_whole_turn_whatever_its_bound(bound: int) -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source, max_buffer_size=bound) as stream:
        for _ in range(2):
            feed.emit(*range(64))
            await settle()
            assert stream.statistics().current_buffer_used == 64
            assert await stream.receive_batch(100) == tuple(range(64))


@pytest.mark.parametrize("bound", [1, 8, 63, 64, 65])
async def test_otherwise_more_untaken_events_than_the_bound_are_an_overflow(bound: int) -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as other:
        stream = await manager.subscribe(feed.source, max_buffer_size=bound).__aenter__()
        for n in range(bound):
            feed.emit(n)
            assert await other.receive() == n
        statistics = stream.statistics()
        assert statistics.current_buffer_used == statistics.peak_buffer_used == bound
        feed.emit(bound)
        assert await other.receive() == bound
        for _ in range(2):  # the backlog is dropped, and the error comes at once
            with pytest.raises(SubscriberOverflow):
                stream.receive_nowait()
        assert stream.statistics().current_buffer_used == 0


async def test_one_untaken_event_makes_a_turn_count() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source, max_buffer_size=3) as stream:
        feed.emit(1)
        await settle()
        feed.emit(2, 3)
        await settle()
        assert stream.receive_nowait() == 1
        feed.emit(4, 5)
        await settle()
        with pytest.raises(SubscriberOverflow):
            stream.receive_nowait()


# Publishing inside a suspension.


async def test_what_publication_decides_inside_a_suspension_reaches_the_source_as_a_cancellation() -> None:
    seen: list[type[BaseException]] = []

    async def play() -> AsyncGenerator[int, None]:
        while True:
            yield 1
            try:
                await checkpoint()  # the third event overflows the only subscriber, here
            except BaseException as exc:
                seen.append(type(exc))
                raise

    async with SharedStreamManager() as manager, manager.subscribe(source_of(play), max_buffer_size=2) as stream:
        await until(lambda: seen and idle(manager))
        with pytest.raises(SubscriberOverflow):
            stream.receive_nowait()
    assert seen == [anyio.get_cancelled_exc_class()]


class WithoutThrow:
    """An awaitable whose iterator has no `throw` and no `close`."""

    def __init__(self, awaitable: Awaitable[Any]) -> None:
        self._inner = awaitable.__await__()
        self.send = self._inner.send

    def __await__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return next(self._inner)


class WithoutSend(WithoutThrow):
    """An awaitable whose iterator has nothing but `__next__`."""

    def __init__(self, awaitable: Awaitable[Any]) -> None:
        super().__init__(awaitable)
        del self.send


class Counting:
    """An iterator over numbers whose steps are awaitables of a given kind."""

    def __init__(self, kind: Callable[[Awaitable[Any]], Any]) -> None:
        self._kind = kind
        self._next = 0

    def __aiter__(self) -> Any:
        return self

    def __anext__(self) -> Any:
        return self._kind(self._step())

    async def _step(self) -> int:
        await checkpoint()
        self._next += 1
        return self._next


async def counts(kind: Any) -> None:
    async with SharedStreamManager() as manager:
        async with manager.subscribe(source_of(lambda: Counting(kind))) as stream:
            assert [await stream.receive() for _ in range(5)] == [1, 2, 3, 4, 5]
        assert idle(manager)


async def test_awaitables_without_throw_are_driven_and_cancelled() -> None:
    await counts(WithoutThrow)


@pytest.mark.parametrize("anyio_backend", BACKENDS[:2], indirect=True)
async def test_awaitables_without_send_are_driven_and_cancelled() -> None:
    await counts(WithoutSend)


# Joining and stopping.


class Joining:
    """A source that, between two of its yields, does something in one go: before it suspends, so unpublished events exist."""

    def __init__(self, manager: SharedStreamManager, act: Callable[[Joining], Awaitable[None]]) -> None:
        self.manager = manager
        self.source = source_of(self._play)
        self.joined: Subscription[int] | None = None
        self._act = act

    async def _play(self) -> AsyncGenerator[int, None]:
        yield 1
        yield 2
        await self._act(self)
        yield 3
        await anyio.sleep_forever()

    async def join(self) -> None:
        assert self.joined is None
        self.joined = await self.manager.subscribe(self.source).__aenter__()

    async def stop(self) -> None:
        await self.manager.stop("edge")


async def test_a_joiner_starts_after_what_was_gathered_before_it() -> None:
    async with SharedStreamManager() as manager:
        joining = Joining(manager, Joining.join)
        async with manager.subscribe(joining.source) as first:
            assert [await first.receive() for _ in range(3)] == [1, 2, 3]
            assert joining.joined is not None
            assert await joining.joined.receive() == 3
            joining.joined.close()


async def test_a_joiner_whose_coming_overflows_the_last_of_the_others_starts_afresh() -> None:
    joined: list[Subscription[int]] = []

    async def play() -> AsyncGenerator[int, None]:
        yield 1
        await checkpoint()  # publishes it
        yield 2
        if not joined:
            joined.append(await manager.subscribe(source).__aenter__())  # publishes that: one more than fits
        await anyio.sleep_forever()

    source = source_of(play)
    async with SharedStreamManager() as manager, manager.subscribe(source, max_buffer_size=1) as first:
        await until(lambda: joined)
        with pytest.raises(SubscriberOverflow):
            await first.receive()
        assert [await joined[0].receive(), await joined[0].receive()] == [1, 2]
        joined[0].close()


async def test_a_stopped_subscriber_still_gets_what_was_gathered() -> None:
    async with SharedStreamManager() as manager:
        async with manager.subscribe(Joining(manager, Joining.stop).source) as stream:
            assert [event async for event in stream] == [1, 2]
        await until(lambda: idle(manager))


# Receiving.


@pytest.mark.parametrize(
    "receive",
    [
        Subscription.receive,
        Subscription.__anext__,
        lambda stream: stream.receive_batch(1),
        lambda stream: anext(stream.batches(1)),
    ],
)
async def test_a_reader_counts_as_receiving_until_it_has_resumed(receive: Any) -> None:
    refusals: list[str] = []
    taken: list[Any] = []
    begin = anyio.Event()

    async def read() -> None:
        taken.append(await receive(stream))

    async def play() -> AsyncGenerator[int, None]:
        await begin.wait()
        await refuse("parked")
        yield 1
        async with manager.subscribe(source):  # joining publishes, which wakes the reader
            assert stream.statistics().current_buffer_used == 1
            await refuse("woken")
        await anyio.sleep_forever()

    async def refuse(when: str) -> None:
        for other in (Subscription.receive, Subscription.__anext__, lambda stream: stream.receive_batch(1)):
            with pytest.raises(anyio.BusyResourceError):
                await other(stream)
        with pytest.raises(anyio.BusyResourceError):
            stream.receive_nowait()
        refusals.append(when)

    source = source_of(play)
    async with SharedStreamManager() as manager, manager.subscribe(source) as stream, anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await settle()
        begin.set()
        await until(lambda: taken)
        with pytest.raises(anyio.WouldBlock):
            stream.receive_nowait()
    assert refusals == ["parked", "woken"]
    assert taken in ([1], [(1,)])


async def test_a_reader_in_the_turn_it_gives_to_others_counts_as_receiving() -> None:
    feed = Feed()
    refused: list[int] = []

    async def watch() -> None:
        while not refused:
            try:
                stream.receive_nowait()
            except anyio.BusyResourceError:
                refused.append(1)
            await checkpoint()

    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream:
        feed.emit(*range(640))
        await until(lambda: stream.statistics().current_buffer_used == 640)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            while not refused:
                await stream.receive()


# Leaving.


async def test_entering_receiving_what_is_ready_and_leaving_as_not_the_last_are_no_checkpoints() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as other:
        feed.emit(1, 2, 3, 4)
        await until(lambda: other.statistics().current_buffer_used == 4)
        with anyio.CancelScope() as scope:
            scope.cancel()
            async with manager.subscribe(feed.source) as stream:
                assert await other.receive() == 1
                assert await other.receive_batch(1) == (2,)
                assert await anext(other) == 3
                assert await anext(other.batches(1)) == (4,)
            await stream.aclose()
            async with manager.subscribe(feed.source) as stream:
                await stream.aclose()
        assert not scope.cancelled_caught
        assert len(manager.statistics().groups["feed"].subscriptions) == 1


async def test_close_never_waits_and_leaving_last_waits_cancellably() -> None:
    feed = Feed()
    feed.clean_up = anyio.Event()
    async with SharedStreamManager() as manager:
        stream = await manager.subscribe(feed.source).__aenter__()
        await until(lambda: feed.opened)
        stream.close()
        assert not manager.statistics().groups
        for leave in (stream.aclose, lambda: stream.__aexit__(None, None, None)):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await leave()
            assert scope.cancelled_caught
        assert feed.open_now
        feed.clean_up.set()
    assert not feed.open_now


async def failed(_manager: SharedStreamManager, feed: Feed, _stream: Subscription[Any]) -> None:
    feed.fail(ValueError())


async def stopped(manager: SharedStreamManager, _feed: Feed, _stream: Subscription[Any]) -> None:
    await manager.stop_all()


async def overflowed(_manager: SharedStreamManager, feed: Feed, _stream: Subscription[Any]) -> None:
    feed.emit(*range(250))


async def closed(_manager: SharedStreamManager, _feed: Feed, stream: Subscription[Any]) -> None:
    stream.close()


@pytest.mark.parametrize("backlog", [1, 200])
@pytest.mark.parametrize("end", [failed, stopped, overflowed, closed])
async def test_an_abandoned_subscription_that_has_ended_leaves_nothing_to_be_closed(end: Any, backlog: int) -> None:
    feed = Feed()

    async def run() -> None:
        stream = await manager.subscribe(feed.source, max_buffer_size=200).__aenter__()
        feed.emit(*range(backlog))
        await until(lambda: stream.statistics().current_buffer_used == backlog)
        await end(manager, feed, stream)

    async with SharedStreamManager() as manager:
        await run()
        await until(lambda: idle(manager))
        gc.collect()  # an open memory stream would warn, and warnings are errors


async def test_nothing_is_opened_for_one_that_has_left_before_the_poll_task_runs() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager:
        with anyio.CancelScope() as scope:
            scope.cancel()
            async with manager.subscribe(feed.source) as stream:
                await stream.receive()
        assert scope.cancelled_caught
        await until(lambda: idle(manager))
        stream = await manager.subscribe(feed.source).__aenter__()
        stream.close()
        await stream.aclose()
    assert feed.opened == 0
