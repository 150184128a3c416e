"""One measurement in a process of its own: ``python -m benchmarks.measure WORK COMPETITOR LOOP SCALE`` prints it as JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from benchmarks import acknowledged, competitors, work
from benchmarks.competitors import Competitor, Reader

QUICK = 0.2
SIZES = [1, 10, 100, 1000, 10_000]
Figures = dict[str, float]


def arrival(read: Callable[[Callable[[], None]], Reader], compete: Callable[[Reader], Competitor]) -> Any:
    return lambda arrive: compete(read(arrive))


def iterate_and(arrive: Callable[[], None]) -> Reader:
    async def read(stream: Any) -> None:
        async for _ in stream:
            arrive()

    return read


def get_and(arrive: Callable[[], None]) -> Reader:
    async def read(queue: asyncio.Queue[Any]) -> None:
        while True:
            await queue.get()
            arrive()

    return read


async def lag(_: object) -> None:
    await anyio.sleep_forever()


#: How to make a competitor out of what its readers do, and what they do to say that an event has arrived.
KINDS: dict[str, tuple[Callable[[Reader], Competitor], Callable[[Callable[[], None]], Reader]]] = {
    "shared stream": (competitors.shared, iterate_and),
    "asyncio queues": (competitors.queues, get_and),
    "memory streams": (competitors.memory_streams, iterate_and),
}


async def deliveries(name: str, loop: str, scale: float, sizes: list[int], amount: int) -> Figures:
    competitor = (competitors.ON_TRIO if loop == "trio" else competitors.ON_ASYNCIO)[name]
    affordable = [n for n in SIZES if n * max(sizes) <= 100_000 or name.startswith("shared stream")]
    if scale < QUICK:
        affordable = [n for n in affordable if n < 10_000]
    turns = 4
    if name == "memory streams":
        # These take an event in two turns of the event loop, however many are ready; and so long that they are given less to do.
        turns, scale = 2 * max(sizes) + 4, scale / 5
    return {str(n): await work.delivery(competitor, n, sizes, int(amount * scale), turns) for n in affordable}


async def tight(name: str, loop: str, scale: float) -> Figures:
    competitor = competitors.shared(competitors.iterate, tight=name == "one more with a bound of 1")
    return {"100": await work.delivery(competitor, 100, work.BURST, int(400_000 * scale), 4)}


async def latency(name: str, loop: str, scale: float) -> Figures:
    compete, read = KINDS[name]
    return await work.latency(lambda arrive: compete(read(arrive)), 1000, max(int(200 * scale), 100))


async def memory(name: str, loop: str, scale: float) -> Figures:
    named = (competitors.ON_TRIO if loop == "trio" else competitors.ON_ASYNCIO)[name]
    figures = {"idle": await work.memory_idle(named, 1000)}
    if name in KINDS:
        figures["lagging"] = await work.memory_lagging(KINDS[name][0](lag), 1000, 15)
    return figures


async def lifetimes(name: str, loop: str, scale: float) -> Figures:
    times = int(4000 * scale)
    return {
        "join and leave, alone": await work.joining(1, times),
        "join and leave, 1000 others": await work.joining(1000, times),
        "start and stop": await work.starting(times // 4),
        "10,000 keys": await work.many_keys(10_000 if scale >= 1 else 1000),
    }


async def routing(name: str, loop: str, scale: float) -> Figures:
    events = max(int(1000 * scale), 200)
    return {
        "10,000 on 1,000 routes": await work.routed(10_000, 1000, events),
        "10 alone": await work.routed(10, 0, events),
        "10,000 without routes": await work.routed(10_000, 0, max(events // 50, 5)),
    }


async def woken(name: str, loop: str, scale: float) -> Figures:
    return await deliveries(name, loop, scale, work.WOKEN, 60_000)


async def burst(name: str, loop: str, scale: float) -> Figures:
    return await deliveries(name, loop, scale, work.BURST, 300_000)


async def mix(name: str, loop: str, scale: float) -> Figures:
    return await deliveries(name, loop, scale, work.MIX, 120_000)


WORK: dict[str, Callable[[str, str, float], Awaitable[Figures]]] = {
    "woken": woken,
    "burst": burst,
    "mix": mix,
    "tight": tight,
    "latency": latency,
    "memory": memory,
    "lifetimes": lifetimes,
    "routing": routing,
    "acknowledged": acknowledged.deliveries,
    "resolving": acknowledged.costs,
}


def main(kind: str, name: str, loop: str, scale: str) -> None:
    if loop == "trio":
        figures = anyio.run(WORK[kind], name, loop, float(scale), backend="trio")
    else:
        options = {"use_uvloop": loop == "uvloop"}
        figures = anyio.run(WORK[kind], name, loop, float(scale), backend="asyncio", backend_options=options)
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
