"""Promise 9: a receive that is cancelled has taken nothing, and one that is not lets others run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

import anyio
import pytest
from anyio.lowlevel import checkpoint

from anyio_sharedstream import SharedSource, SharedStreamManager, Subscription
from tests.conftest import BACKENDS
from tests.support import Feed, settle, until

T = TypeVar("T")
Read = Callable[[Subscription[Any]], Awaitable[tuple[Any, ...]]]


async def receive(stream: Subscription[Any]) -> tuple[Any, ...]:
    return (await stream.receive(),)


async def iterate(stream: Subscription[Any]) -> tuple[Any, ...]:
    return (await anext(stream),)


async def batch(stream: Subscription[Any]) -> tuple[Any, ...]:
    return await stream.receive_batch(2)


async def wait_for(stream: Subscription[Any]) -> tuple[Any, ...]:
    return (await asyncio.wait_for(stream.receive(), 3600),)


READS = pytest.mark.parametrize("read", [receive, iterate, batch])
ASYNCIO_ONLY = pytest.mark.parametrize("anyio_backend", BACKENDS[:2], indirect=True)


class Reader:
    """Reads until it is cancelled; what it took is in `taken`."""

    def __init__(self, stream: Subscription[Any], read: Read) -> None:
        self.taken: list[Any] = []
        self._stream = stream
        self._read = read

    async def run(self) -> None:
        while True:
            self.taken += await self._read(self._stream)

    async def rest(self, last: Any) -> list[Any]:
        """All events up to *last*: those taken before the cancellation, then those that can still be received."""
        while last not in self.taken:
            self.taken += await self._read(self._stream)
        return self.taken


@asynccontextmanager
async def cancelled_natively(function: Callable[[], Any]) -> AsyncIterator[Callable[[], object]]:
    """Run *function* in a task that is cancelled with `Task.cancel` when the body is done, or calls what this gives."""
    task = asyncio.create_task(function())
    yield task.cancel
    while not task.done():
        task.cancel()  # `asyncio.wait_for` of Python 3.11 prefers a result to a cancellation
        await asyncio.wait([task], timeout=0)
    assert task.cancelled()


@asynccontextmanager
async def cancelled_by_scope(function: Callable[[], Any]) -> AsyncIterator[Callable[[], object]]:
    """Run *function* in a task whose cancel scope is cancelled when the body is done, or calls what this gives."""
    scope = anyio.CancelScope()

    async def run() -> None:
        with scope:
            await function()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        yield scope.cancel
        scope.cancel()


async def interrupt_at_each_step(cancelled: Any, read: Read, events: int) -> None:
    """Cancel a reader some steps of the event loop after some events were handed over; nothing may be missing."""
    for steps in range(6):
        feed = Feed()
        async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream:
            reader = Reader(stream, read)
            async with cancelled(reader.run):
                for n in range(events):
                    feed.emit(n)
                    await checkpoint()
                await settle(steps)
            feed.emit(*range(events, 10))
            assert await reader.rest(9) == list(range(10))
            assert stream.statistics().events_received == 10


@ASYNCIO_ONLY
@pytest.mark.parametrize("events", [0, 1, 2, 5])
@pytest.mark.parametrize("read", [receive, iterate, batch, wait_for])
async def test_a_native_cancellation_at_any_step_loses_nothing(read: Read, events: int) -> None:
    await interrupt_at_each_step(cancelled_natively, read, events)


@pytest.mark.parametrize("events", [0, 1, 2, 5])
@READS
async def test_a_cancelled_scope_at_any_step_loses_nothing(read: Read, events: int) -> None:
    await interrupt_at_each_step(cancelled_by_scope, read, events)


async def interrupt_after_wake_up(cancelled: Any, read: Read) -> None:
    """Cancel a parked reader after the publication that woke it and before it runs."""
    begin = anyio.Event()
    cancel: Callable[[], object]

    async def play() -> AsyncGenerator[int, None]:
        await begin.wait()
        yield 1
        async with manager.subscribe(source):  # joining publishes: now the reader has been woken, and has not run
            assert stream.statistics().current_buffer_used == 1
            cancel()
        yield 2
        await anyio.sleep_forever()

    source = SharedSource(key="woken", open=play)
    async with SharedStreamManager() as manager, manager.subscribe(source) as stream:
        reader = Reader(stream, read)
        async with cancelled(reader.run) as cancel:
            await settle()
            begin.set()
            await settle()
        assert await reader.rest(2) == [1, 2]


@ASYNCIO_ONLY
@pytest.mark.parametrize("read", [receive, iterate, batch, wait_for])
async def test_a_native_cancellation_after_the_wake_up_loses_nothing(read: Read) -> None:
    await interrupt_after_wake_up(cancelled_natively, read)


@READS
async def test_a_cancelled_scope_after_the_wake_up_loses_nothing(read: Read) -> None:
    await interrupt_after_wake_up(cancelled_by_scope, read)


@ASYNCIO_ONLY
async def test_a_reader_on_its_way_out_of_a_cancellation_keeps_nothing_from_those_behind_it() -> None:
    feed = Feed()
    source = feed.source
    async with SharedStreamManager() as manager, manager.subscribe(source) as first, manager.subscribe(source) as second:
        leaving, staying = asyncio.create_task(first.receive()), asyncio.create_task(second.receive())
        await until(lambda: feed.opened)
        await settle()
        feed.emit("event")
        leaving.cancel()  # the poll task runs before it does
        await until(staying.done)
        assert await staying == "event"
        assert leaving.cancelled()
        assert first.receive_nowait() == "event"


@ASYNCIO_ONLY
async def test_expired_wait_for_loses_nothing() -> None:
    feed = Feed()
    taken: list[int] = []
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream:
        for n in range(10):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(stream.receive(), 0)
            feed.emit(n)
            await settle()
            try:
                taken.append(await asyncio.wait_for(stream.receive(), 0))
            except TimeoutError:  # Python 3.11 cancels the receiving task before it has run
                taken.append(stream.receive_nowait())
    assert taken == list(range(10))


@READS
async def test_a_cancellation_in_the_turn_given_to_others_loses_nothing(read: Read) -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream:
        feed.emit(*range(200))
        await until(lambda: stream.statistics().current_buffer_used == 200)
        reader = Reader(stream, read)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await reader.run()
        assert scope.cancelled_caught
        assert 0 < len(reader.taken) <= 64
        assert await reader.rest(199) == list(range(200))


async def test_a_receive_under_a_cancelled_scope_raises_the_cancellation_if_nothing_is_ready() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream:
        for n in range(3):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await stream.receive()
            assert scope.cancelled_caught
            feed.emit(n)
            assert await stream.receive() == n


class Watched(Generic[T]):
    """An awaitable that knows whether it has suspended its task."""

    def __init__(self, awaitable: Awaitable[T]) -> None:
        self.suspended = False
        self._inner = awaitable.__await__()

    def __await__(self) -> Generator[Any, Any, T]:
        sent = None
        while True:
            try:
                signal = self._inner.send(sent)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            self.suspended = True
            sent = yield signal


async def one_at_a_time(stream: Subscription[Any]) -> tuple[Any, ...]:
    return await stream.receive_batch(1)


@pytest.mark.parametrize("chunk", [1, 40, 64])
@pytest.mark.parametrize("read", [receive, iterate, one_at_a_time])
async def test_a_reader_with_events_ready_yields_at_least_once_in_64(read: Read, chunk: int) -> None:
    async def play() -> AsyncGenerator[int, None]:
        for n in range(640):
            if n % chunk == 0:
                await checkpoint()  # publishes what went before
            yield n
        await anyio.sleep_forever()

    async with SharedStreamManager() as manager, manager.subscribe(SharedSource(key="chunks", open=play)) as stream:
        await until(lambda: stream.statistics().current_buffer_used == 640)
        runs = [0]
        for n in range(640):
            watched = Watched(read(stream))
            assert await watched == (n,)
            if watched.suspended:
                runs.append(0)
            runs[-1] += 1
        assert 32 <= max(runs) <= 64  # that it does not yield for every event matters as well


# A source that publishes in every turn of the event loop: asyncio's scopes cannot cancel a task whose future is done.


async def with_a_checkpoint() -> AsyncGenerator[int, None]:
    while True:
        yield 1
        await checkpoint()


async def without_a_checkpoint() -> AsyncGenerator[int, None]:
    while True:
        yield 1


async def with_some_checkpoints() -> AsyncGenerator[int, None]:
    while True:
        for _ in range(63):
            yield 1
        await checkpoint()


class Ready:
    def __aiter__(self) -> Ready:
        return self

    async def __anext__(self) -> int:
        return 1


BUSY = pytest.mark.parametrize("busy", [with_a_checkpoint, without_a_checkpoint, with_some_checkpoints, Ready])


@BUSY
@READS
@pytest.mark.parametrize("nested", [False, True], ids=["direct", "nested"])
@pytest.mark.parametrize("steps", range(4))
async def test_a_scope_cancels_a_subscriber_whose_source_publishes_in_every_turn(
    busy: Callable[[], Any], read: Read, nested: bool, steps: int
) -> None:
    inner = SharedSource(key="inner", open=busy)
    left: list[str] = []

    async def around() -> AsyncGenerator[int, None]:
        async with manager.subscribe(inner) as stream:
            while True:
                for event in await read(stream):
                    yield event

    async def follow(scope: anyio.CancelScope) -> None:
        with scope:
            async with manager.subscribe(SharedSource(key="outer", open=around) if nested else inner) as stream:
                while True:
                    await read(stream)
        left.append("")

    async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:
        scope = anyio.CancelScope()
        tasks.start_soon(follow, scope)
        await settle(20 + steps)
        scope.cancel()
        await until(lambda: left, rounds=1000)
