"""The ways to give every subscriber every event of one source, each written as its users write it.

A competitor drives the source that it is given and runs so many readers, each in a task of its own. It is a context manager:
inside of it all of this runs, and it gives a function that says how many events nobody has taken yet.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.util import find_spec
from typing import Any

import anyio

from anyio_sharedstream import SharedSource, SharedStreamManager, Subscription

Source = Callable[[], AsyncIterator[Any]]
Unread = Callable[[], int]
Reader = Callable[[Any], Coroutine[Any, Any, None]]
Competitor = Callable[[Source, int], AbstractAsyncContextManager[Unread]]

#: More than any work publishes at once: what is measured is delivery, not how a competitor fails.
ROOM = 100_000


# What a reader does; a benchmark that wants to know more gives another.


async def iterate(stream: Any) -> None:
    async for _ in stream:
        pass


async def iterate_over_batches(stream: Any) -> None:
    async for _ in stream.batches(1000):
        pass


async def get(queue: asyncio.Queue[Any]) -> None:
    while True:
        await queue.get()


def shared(read: Reader, tight: int = 0) -> Competitor:
    """This library; *tight* subscribers more have a bound of one event."""

    @asynccontextmanager
    async def compete(open_: Source, subscribers: int) -> AsyncGenerator[Unread, None]:
        source = SharedSource(key="benchmark", open=open_)
        streams: list[Subscription[Any]] = []

        async def subscribe(bound: float) -> None:
            async with manager.subscribe(source, max_buffer_size=bound) as stream:
                streams.append(stream)
                await read(stream)

        async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:
            for _ in range(subscribers):
                tasks.start_soon(subscribe, ROOM)
            for _ in range(tight):
                tasks.start_soon(subscribe, 1)
            yield lambda: sum(stream.statistics().current_buffer_used for stream in streams)
            tasks.cancel_scope.cancel()

    return compete


def queues(read: Reader) -> Competitor:
    """A loop over one `asyncio.Queue` per subscriber, as it is written by hand."""

    @asynccontextmanager
    async def compete(open_: Source, subscribers: int) -> AsyncGenerator[Unread, None]:
        queues: list[asyncio.Queue[Any]] = [asyncio.Queue(ROOM) for _ in range(subscribers)]

        async def publish() -> None:
            async for event in open_():
                for queue in queues:
                    queue.put_nowait(event)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(publish)
            for queue in queues:
                tasks.start_soon(read, queue)
            yield lambda: sum(queue.qsize() for queue in queues)
            tasks.cancel_scope.cancel()

    return compete


def memory_streams(read: Reader) -> Competitor:
    """A loop over one memory object stream per subscriber, with nothing added."""

    @asynccontextmanager
    async def compete(open_: Source, subscribers: int) -> AsyncGenerator[Unread, None]:
        pairs = [anyio.create_memory_object_stream[Any](ROOM) for _ in range(subscribers)]

        async def publish() -> None:
            async for event in open_():
                for send_stream, _ in pairs:
                    send_stream.send_nowait(event)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(publish)
            for _, stream in pairs:
                tasks.start_soon(read, stream)
            yield lambda: sum(stream.statistics().current_buffer_used for _, stream in pairs)
            tasks.cancel_scope.cancel()
        for send_stream, stream in pairs:
            send_stream.close()
            stream.close()

    return compete


@asynccontextmanager
async def limit(
    open_: Source,
    subscribers: int,
    waiters: list[Any],
    read: Callable[[], Coroutine[Any, Any, None]],
    wake: Callable[..., object],
    *given: object,
) -> AsyncGenerator[Unread, None]:
    """Nothing but the wake-up: each reader puts a waiter into the list and waits; no event is handed over."""

    async def publish() -> None:
        async for _ in open_():
            woken = waiters.copy()
            waiters.clear()
            for waiter in woken:
                wake(waiter, *given)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(publish)
        for _ in range(subscribers):
            tasks.start_soon(read)
        yield lambda: subscribers - len(waiters)
        tasks.cancel_scope.cancel()


def asyncio_limit(open_: Source, subscribers: int) -> AbstractAsyncContextManager[Unread]:
    """A future per subscriber and event."""
    create_future = asyncio.get_running_loop().create_future
    waiters: list[asyncio.Future[None]] = []

    async def read() -> None:
        while True:
            waiter = create_future()
            waiters.append(waiter)
            await waiter

    return limit(open_, subscribers, waiters, read, asyncio.Future.set_result, None)


def trio_limit(open_: Source, subscribers: int) -> AbstractAsyncContextManager[Unread]:
    """A task rescheduled per subscriber and event."""
    from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

    waiters: list[Task] = []

    def abort(_: object) -> Abort:
        return Abort.SUCCEEDED

    async def read() -> None:
        task = current_task()
        while True:
            waiters.append(task)
            await wait_task_rescheduled(abort)

    return limit(open_, subscribers, waiters, read, reschedule)


@asynccontextmanager
async def airflow(open_: Source, subscribers: int) -> AsyncGenerator[Unread, None]:
    """Apache Airflow's manager of shared streams, as its triggerer uses it."""
    from airflow.triggers.base import BaseEventTrigger
    from airflow.triggers.shared_stream import SharedStreamManager as AirflowManager

    class Trigger(BaseEventTrigger):  # type: ignore[misc]
        def serialize(self) -> tuple[str, dict[str, Any]]:
            return "benchmark", {}

        async def run(self) -> AsyncIterator[Any]:
            yield

        def shared_stream_key(self) -> str:
            return "benchmark"

        @classmethod
        def open_shared_stream(cls, kwargs: dict[str, Any]) -> AsyncIterator[Any]:
            return open_()

    manager = AirflowManager(max_subscriber_queue=ROOM)

    async def read(number: int) -> None:
        async for _ in manager.subscribe(trigger_id=number, trigger=Trigger(), key="benchmark"):
            pass

    async with anyio.create_task_group() as tasks:
        for number in range(subscribers):
            tasks.start_soon(read, number)
        yield lambda: sum(queue.qsize() for group in manager._groups.values() for queue in group._subscribers.values())
        tasks.cancel_scope.cancel()
    await manager.stop_all()


@asynccontextmanager
async def reactivex(open_: Source, subscribers: int) -> AsyncGenerator[Unread, None]:
    """``share`` calls observers back; each puts what it is given into a queue, for a task to take."""
    from reactivex import Subject
    from reactivex.operators import share

    subject: Any = Subject()
    stream = subject.pipe(share())
    queues: list[asyncio.Queue[Any]] = [asyncio.Queue(ROOM) for _ in range(subscribers)]

    async def publish() -> None:
        async for event in open_():
            subject.on_next(event)

    async def read(queue: asyncio.Queue[Any]) -> None:
        with stream.subscribe(queue.put_nowait):
            await get(queue)

    async with anyio.create_task_group() as tasks:
        for queue in queues:
            tasks.start_soon(read, queue)
        tasks.start_soon(publish)
        yield lambda: sum(queue.qsize() for queue in queues)
        tasks.cancel_scope.cancel()


ON_EVERY_LOOP: dict[str, Competitor] = {
    "shared stream": shared(iterate),
    "shared stream, in batches": shared(iterate_over_batches),
    "memory streams": memory_streams(iterate),
}
ON_ASYNCIO: dict[str, Competitor] = ON_EVERY_LOOP | {
    "asyncio queues": queues(get),
    "limit": asyncio_limit,
    "Airflow": airflow,
    "reactivex": reactivex,
}
ON_TRIO: dict[str, Competitor] = ON_EVERY_LOOP | {"limit": trio_limit}

#: What a competitor needs that is not installed with this library.
NEEDS = {
    "Airflow": "airflow.triggers.shared_stream",
    "Airflow, acknowledged": "airflow.triggers.shared_stream",
    "reactivex": "reactivex",
}


def missing(name: str) -> str | None:
    """The module that a competitor needs and that is not installed."""
    module = NEEDS.get(name)
    try:
        return None if module is None or find_spec(module) else module
    except ImportError:
        return module
