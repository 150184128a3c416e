"""Delivery with acknowledgement: this library's with and without, and the peer's that has it; and what else it costs."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from time import process_time
from typing import Any

import anyio
from anyio.lowlevel import checkpoint

from anyio_sharedstream import AckSource, AckSubscription, AdvanceItem, Pending, SharedStreamManager, SharedStreamProducer
from benchmarks.competitors import ROOM, Competitor, Reader, Source, Unread, iterate, iterate_over_batches, shared
from benchmarks.work import BURST, WOKEN, Play, delivery, settle


async def iterate_and_suspend(stream: Any) -> None:
    async for _ in stream:
        await checkpoint()


class Producer(SharedStreamProducer[Any, int]):
    """Numbers what a source yields, and counts what comes back."""

    def __init__(self, open_: Source, lanes: int = 1) -> None:
        self.advanced = 0
        self._open = open_
        self._lanes = lanes

    async def open_stream(self) -> AsyncIterator[tuple[Any, int]]:
        number = 0
        async for event in self._open():
            yield event, number
            number += 1

    async def advance(self, batch: Sequence[AdvanceItem[int]]) -> None:
        self.advanced += len(batch)

    def get_advance_lane(self, broker_payload: int) -> int:
        return broker_payload % self._lanes


def acknowledged(read: Reader) -> Competitor:
    """This library, with a producer."""

    @asynccontextmanager
    async def compete(open_: Source, subscribers: int) -> AsyncGenerator[Unread, None]:
        producer = Producer(open_)
        source = AckSource("benchmark", lambda: producer, max_in_flight=ROOM)
        streams: list[AckSubscription[Any]] = []

        async def subscribe() -> None:
            async with manager.subscribe(source, max_buffer_size=ROOM) as stream:
                streams.append(stream)
                await read(stream)

        async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:
            for _ in range(subscribers):
                tasks.start_soon(subscribe)
            yield lambda: sum(
                group.acknowledgement.in_flight for group in manager.statistics().groups.values() if group.acknowledgement
            )
            tasks.cancel_scope.cancel()
        assert producer.advanced, "nothing was advanced"

    return compete


@asynccontextmanager
async def airflow(open_: Source, subscribers: int) -> AsyncGenerator[Unread, None]:
    """Apache Airflow's acknowledged mode, with a producer that does as little."""
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
        def create_shared_stream_producer(cls, kwargs: dict[str, Any]) -> Producer:
            return Producer(open_)

    manager = AirflowManager(max_subscriber_queue=ROOM)

    async def read(number: int) -> None:
        async for _ in manager.subscribe(trigger_id=number, trigger=Trigger(), key="benchmark"):
            pass

    async with anyio.create_task_group() as tasks:
        for number in range(subscribers):
            tasks.start_soon(read, number)
        yield lambda: sum(len(group._outstanding) for group in manager._groups.values())
        tasks.cancel_scope.cancel()
    await manager.stop_all()


#: Reading one by one, in batches, and by a consumer that suspends at every event; each with and without acknowledgement.
COMPETITORS: dict[str, Competitor] = {
    "acknowledged": acknowledged(iterate),
    "shared stream": shared(iterate),
    "acknowledged, in batches": acknowledged(iterate_over_batches),
    "shared stream, in batches": shared(iterate_over_batches),
    "acknowledged, suspending": acknowledged(iterate_and_suspend),
    "shared stream, suspending": shared(iterate_and_suspend),
    "Airflow, acknowledged": airflow,
}


async def deliveries(name: str, loop: str, scale: float) -> dict[str, float]:
    suspending = name.endswith("suspending")
    amount = int(scale * (600_000 if suspending else 3_000_000))
    return {
        "woken": await delivery(COMPETITORS[name], 1000, WOKEN, int(scale * 150_000), 6),
        "bursts of 64": await delivery(COMPETITORS[name], 1000, BURST, amount, 140 if suspending else 6),
    }


async def counting() -> AsyncIterator[int]:
    number = 0
    while True:
        yield number
        number += 1


async def resolving(outstanding: int, lanes: int, times: int) -> float:
    """Microseconds of CPU time to take and resolve an event, and to advance it, with so many others outstanding, in so many
    lanes."""
    producer = Producer(counting, lanes)
    source = AckSource("benchmark", lambda: producer, max_in_flight=outstanding)
    async with SharedStreamManager(max_buffer_size=ROOM) as manager, manager.subscribe(source) as stream:
        while stream.statistics().current_buffer_used < outstanding:
            await checkpoint()
        gc.collect()
        began = process_time()
        for _ in range(times):
            await stream.receive()
            await checkpoint()
        took = process_time() - began
        assert producer.advanced > times // 2, "too little was advanced"
    return took / times * 1e6


async def published_by(play: Play) -> None:
    await settle()
    play.started.set()
    await play.ended.wait()
    await settle(20)


async def leaving(subscribers: int, events: int) -> float:
    """Milliseconds of CPU time for all of so many subscribers to leave with so many events that they have not taken."""
    play = Play([1] * events, checkpoint)
    producer = Producer(play.source)
    source = AckSource("benchmark", lambda: producer, max_in_flight=ROOM)
    async with SharedStreamManager(max_buffer_size=ROOM) as manager, manager.subscribe(source) as stream:
        others = [manager.subscribe(source) for _ in range(subscribers)]
        for other in others:
            await other.__aenter__()
        await published_by(play)
        gc.collect()
        began = process_time()
        for other in others:
            other.close()
        took = process_time() - began
        assert len(await stream.receive_batch(events)) == events
    assert producer.advanced == events
    return took * 1e3


async def memory_outstanding(subscribers: int, bursts: list[int]) -> float:
    """Bytes per subscriber and event that all have yet to take."""
    play = Play(bursts)
    async with acknowledged(lag)(play.source, subscribers):
        await settle(10)
        gc.collect()
        tracemalloc.start()
        await published_by(play)
        gc.collect()
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    return size / (subscribers * sum(bursts))


async def lag(_: object) -> None:
    await anyio.sleep_forever()


async def memory_pending(events: int) -> float:
    """Bytes per `Pending`, with all that is kept for it."""
    play = Play([1] * events, checkpoint)
    source = AckSource("benchmark", lambda: Producer(play.source), max_in_flight=ROOM)
    pendings: list[Pending | None] = [None] * events
    async with SharedStreamManager(max_buffer_size=ROOM) as manager, manager.subscribe(source) as stream:
        await published_by(play)
        gc.collect()
        tracemalloc.start()
        for number in range(events):
            await stream.receive()
            pendings[number] = stream.defer()
            await checkpoint()
        await settle(20)
        gc.collect()
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        for pending in pendings:
            assert pending is not None
            pending.ack()
    return size / events


async def costs(name: str, loop: str, scale: float) -> dict[str, float]:
    times = int(20_000 * scale)
    return {
        "resolution, 1 lane": await resolving(8000, 1, times),
        "resolution, 4,000 lanes": await resolving(8000, 4000, times),
        "resolution, 10 outstanding": await resolving(10, 1, times),
        "resolution, 50,000 outstanding": await resolving(50_000, 1, times),
        "1,000 leavers, 4,000 outstanding (ms)": await leaving(1000, 4000),
        "bytes per subscriber and event, one by one": await memory_outstanding(1000, [1] * 1000),
        "bytes per subscriber and event, in bursts": await memory_outstanding(1000, [64] * 15),
        "bytes per Pending": await memory_pending(10_000),
    }
