"""A process that reads a Redis stream for two subscribers, each of which writes down what it has handled; made to be killed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio

from anyio_sharedstream import AckSource, SharedStreamManager
from anyio_sharedstream.adapters.redis_streams import RedisStreamEvent, redis_stream

SUBSCRIBERS = ["ledger", "mailer"]
GROUP = "group"


def live(
    backend: str,
    url: str,
    stream: str,
    consumer: str,
    directory: Path,
    until: Callable[[], Awaitable[object]] = anyio.sleep_forever,
) -> None:
    """A life: let all subscribers handle what there is, until so long."""
    anyio.run(consume, url, stream, consumer, directory, until, backend=backend)


async def consume(url: str, stream: str, consumer: str, directory: Path, until: Callable[[], Awaitable[object]]) -> None:
    source = redis_stream(
        url,
        stream,
        GROUP,
        consumer=consumer,
        min_idle_time=0.05,
        max_deliveries=None,  # to be killed is no fault of a message
        min_subscribers=len(SUBSCRIBERS),
    )
    async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:
        for name in SUBSCRIBERS:
            tasks.start_soon(handle, manager, source, directory / name)
        await until()
        tasks.cancel_scope.cancel()


async def handle(manager: SharedStreamManager, source: AckSource[RedisStreamEvent], records: Path) -> None:
    """Write each message down at the end of handling it, so that it survives whatever becomes of this process."""
    with records.open("ab", buffering=0) as file:
        async with manager.subscribe(source) as stream:
            async for event in stream:
                await anyio.sleep(0.001)  # in which it may be killed
                file.write(f"{event.id}\n".encode())
