"""An `advance` that hangs in the end: it is cancelled before the stream is closed, whatever the two share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import anyio
import pytest

from anyio_sharedstream import AckSource, AckTimeout, PollTerminated, Restart, SharedStreamManager
from tests.ack_support import Broker
from tests.conftest import on_asyncio
from tests.support import idle, settle, until
from tests.virtual_time import in_virtual_time


class Locked:
    """A producer whose `advance` hangs with what its stream needs to say goodbye."""

    def __init__(self) -> None:
        self.lock = anyio.Lock()
        self.ends: list[str] = []

    async def open_stream(self) -> AsyncIterator[tuple[int, int]]:
        try:
            yield 1, 1
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                async with self.lock:
                    self.ends.append("stream closed")

    async def advance(self, batch: Any) -> None:
        async with self.lock:
            try:
                await anyio.sleep_forever()
            finally:
                self.ends.append("advance cancelled")

    async def aclose(self) -> None:
        self.ends.append("closed")


@pytest.mark.parametrize("how", ["leave", "stop"])
@in_virtual_time
async def test_it_is_cancelled_and_gone_before_the_stream_is_closed(how: str) -> None:
    producer = Locked()
    async with SharedStreamManager() as manager:
        async with manager.subscribe(AckSource("locked", lambda: producer, drain_timeout=2)) as stream:
            assert await stream.receive() == 1
            with anyio.move_on_after(1):
                await stream.receive()
            if how == "stop":
                await manager.stop("locked")
        assert anyio.current_time() == 3
        assert idle(manager)
    assert producer.ends == ["advance cancelled", "stream closed", "closed"]


@on_asyncio
async def test_a_stray_cancellation_out_of_the_stream_is_told_at_once_and_what_is_said_still_counts() -> None:
    broker = Broker()
    async with SharedStreamManager() as manager, manager.subscribe(broker.source()) as stream:
        broker.emit(1)
        assert await stream.receive() == 1
        broker.fail(asyncio.CancelledError())
        await settle()
        with pytest.raises(PollTerminated):
            await stream.receive()
        await until(lambda: idle(manager))
    assert broker.clean == {1: True}


@in_virtual_time
async def test_who_held_an_event_when_its_upstream_failed_may_ask_for_more_with_nothing_there() -> None:
    broker = Broker()
    got: list[int] = []
    async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:
        stream = await manager.subscribe(broker.source(restart=Restart(initial_delay=1, jitter=0))).__aenter__()

        async def consume() -> None:
            with suppress(anyio.ClosedResourceError):
                async for event in stream:
                    got.append(event)
                    await anyio.sleep(5)

        tasks.start_soon(consume)
        broker.emit(1)
        await settle()
        broker.fail(ConnectionError())
        await anyio.sleep(6)
        broker.emit(2)
        await anyio.sleep(6)
        await stream.aclose()
    assert got == [1, 2]
    assert broker.outcomes == {2: (1, 0, 0, 0)}


def test_the_timeout_says_what_to_do() -> None:
    assert str(AckTimeout("orders", "packer", 5)) == (
        "subscriber 'packer' of 'orders' has not finished an event within 5 seconds; "
        "finish faster, defer() what takes long, or raise ack_timeout"
    )
