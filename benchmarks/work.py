"""What is measured: each function is one kind of work, done with one competitor in a process of its own, and gives a figure."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from itertools import cycle, islice
from statistics import median, quantiles
from time import perf_counter, process_time

import anyio
from anyio.lowlevel import checkpoint

from anyio_sharedstream import SharedSource, SharedStreamManager
from benchmarks.competitors import Competitor

#: Sizes of bursts, over and over: how events come in each kind of work.
WOKEN = [1]
BURST = [64]
MIX = [1, 1, 1, 4, 1, 1, 16, 1, 1, 1, 64, 1, 2, 1, 8]


async def settle(turns: int = 4) -> None:
    """Let every task that was woken run, take what there is, and wait again."""
    for _ in range(turns):
        await checkpoint()


class Play:
    """A source that yields bursts, lets every subscriber finish between them, and knows when it started and ended."""

    def __init__(self, bursts: list[int], after_each: Callable[[], Awaitable[None]] = settle) -> None:
        self._bursts = bursts
        self._after_each = after_each
        self.started = anyio.Event()
        self.ended = anyio.Event()

    async def source(self) -> AsyncIterator[int]:
        await self.started.wait()
        for number, size in enumerate(self._bursts):
            for _ in range(size):
                yield number
            await self._after_each()
        self.ended.set()
        await anyio.sleep_forever()


async def delivery(competitor: Competitor, subscribers: int, sizes: list[int], deliveries: int, turns: int) -> float:
    """Microseconds of CPU time per event and subscriber, the source's own pauses of so many turns included."""
    rounds = max(deliveries // subscribers * len(sizes) // sum(sizes), 3)
    bursts = list(islice(cycle(sizes), rounds))
    play = Play(bursts, partial(settle, turns))
    async with competitor(play.source, subscribers) as unread:
        await settle(10)
        gc.collect()
        began = process_time()
        play.started.set()
        await play.ended.wait()
        took = process_time() - began
        assert unread() == 0, "not everything was delivered"
    return took / (subscribers * sum(bursts)) * 1e6


async def latency(competitor: Callable[[Callable[[], None]], Competitor], subscribers: int, events: int) -> dict[str, float]:
    """Microseconds from publication until the last of so many subscribers has the event: median and 99th percentile."""
    published = arrived = 0.0
    times: list[float] = []

    def arrive() -> None:
        nonlocal arrived
        arrived = perf_counter()

    async def pause() -> None:
        nonlocal published
        await settle()
        times.append((arrived - published) * 1e6)
        published = perf_counter()

    play = Play([1] * events, pause)
    async with competitor(arrive)(play.source, subscribers):
        await settle(10)
        gc.collect()
        published = perf_counter()
        play.started.set()
        await play.ended.wait()
    del times[0]  # that one was published by the start of it all
    return {"median": median(times), "99th percentile": quantiles(times, n=100)[98]}


async def idle_source() -> AsyncIterator[int]:
    await anyio.sleep_forever()
    yield 0


async def joining(subscribers: int, times: int) -> float:
    """Microseconds of CPU time to join and leave a live group with so many other subscribers."""
    source = SharedSource(key="benchmark", open=idle_source)
    async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:

        async def subscribe() -> None:
            async with manager.subscribe(source) as stream:
                await stream.receive()

        for _ in range(subscribers):
            tasks.start_soon(subscribe)
        await settle(10)
        gc.collect()
        began = process_time()
        for _ in range(times):
            async with manager.subscribe(source):
                pass
        took = process_time() - began
        tasks.cancel_scope.cancel()
    return took / times * 1e6


async def starting(times: int) -> float:
    """Microseconds of CPU time to start a group and to stop it, its first subscriber being its last."""
    async with SharedStreamManager() as manager:
        began = process_time()
        for number in range(times):
            async with manager.subscribe(SharedSource(key=number, open=idle_source)):
                await settle(3)
        return (process_time() - began) / times * 1e6


async def many_keys(keys: int) -> float:
    """Microseconds of CPU time per key: all are opened, each gives one event to its one subscriber, and all are stopped."""
    received = 0

    async def one_event() -> AsyncIterator[int]:
        yield 1
        await anyio.sleep_forever()

    async def follow(number: int) -> None:
        nonlocal received
        async with manager.subscribe(SharedSource(key=number, open=one_event)) as stream:
            async for event in stream:
                received += event

    began = process_time()
    async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:
        for number in range(keys):
            tasks.start_soon(follow, number)
        while received < keys:
            await checkpoint()
        await manager.stop_all()
    return (process_time() - began) / keys * 1e6


async def memory_idle(competitor: Competitor, subscribers: int) -> float:
    """Bytes per subscriber that waits, its task included."""
    play = Play([])
    tracemalloc.start()
    async with competitor(play.source, subscribers):
        await settle(10)
        gc.collect()
        size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return size / subscribers


async def memory_lagging(competitor: Competitor, subscribers: int, bursts: int) -> float:
    """Bytes per subscriber and event that it has yet to take, when all lag equally and events come in bursts of 64."""
    play = Play([64] * bursts)
    async with competitor(play.source, subscribers):
        await settle(10)
        gc.collect()
        tracemalloc.start()
        play.started.set()
        await play.ended.wait()
        gc.collect()
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    return size / (subscribers * bursts * 64)


async def routed(subscribers: int, routes: int, events: int) -> float:
    """Microseconds of CPU time per event, with so many subscribers spread over so many routes; with 0, everyone hears all."""
    numbers = cycle(range(max(routes, 1)))
    play = Play([1] * events)
    source = SharedSource(key="benchmark", open=play.source, route_by=(lambda _: next(numbers)) if routes else None)
    async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:

        async def follow(number: int) -> None:
            async with manager.subscribe(source, routes={number % routes} if routes else None) as stream:
                async for _ in stream:
                    pass

        for number in range(subscribers):
            tasks.start_soon(follow, number)
        await settle(10)
        gc.collect()
        began = process_time()
        play.started.set()
        await play.ended.wait()
        took = process_time() - began
        tasks.cancel_scope.cancel()
    return took / events * 1e6
