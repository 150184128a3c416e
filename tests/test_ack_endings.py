"""How an acknowledged upstream ends: what is on its way is brought home first, but not at any price."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest
import structlog
from structlog.testing import LogCapture

from anyio_sharedstream import AckSource, SharedStreamManager
from tests.ack_support import Broker, take
from tests.support import settle
from tests.sweep import drain, managed
from tests.virtual_time import in_virtual_time


@in_virtual_time
async def test_the_last_leaver_does_not_wait_for_what_was_deferred_and_the_group_drains() -> None:
    broker = Broker()
    async with managed() as manager:
        async with manager.subscribe(broker.source(drain_timeout=30)) as stream:
            broker.emit(0, 1)
            await stream.receive()
            pending = stream.defer()
            await stream.receive()
        assert anyio.current_time() == 0
        assert manager.statistics().groups["broker"].state == "draining"
        await anyio.sleep_until(29)
        assert broker.advanced == []
        assert broker.log == []
        pending.ack()
        await settle()
        assert broker.batches == [(None, [0, 1])]
        assert broker.log == ["stream closed", "closed"]
        assert not manager.statistics().groups
        assert anyio.current_time() == 29


@in_virtual_time
async def test_who_comes_while_it_drains_adopts_the_upstream_and_its_time_begins_anew_when_they_leave() -> None:
    broker = Broker()
    async with managed() as manager:
        async with manager.subscribe(broker.source(drain_timeout=30)) as stream:
            broker.emit(0)
            await stream.receive()
            pending = stream.defer()
        await anyio.sleep_until(29)
        broker.emit(1)
        async with manager.subscribe(broker.source(drain_timeout=30)) as stream:
            assert manager.statistics().groups["broker"].state == "live"
            assert await stream.receive() == 1
            await anyio.sleep_until(200)
        assert manager.statistics().groups["broker"].state == "draining"
        await anyio.sleep_until(229)
        assert broker.opened == 1
        pending.reject()
        await settle()
        assert broker.outcomes == {0: (0, 0, 1, 0), 1: (1, 0, 0, 0)}
        assert broker.log == ["stream closed", "closed"]


@in_virtual_time
async def test_resolving_all_while_an_adopter_is_there_ends_nothing() -> None:
    broker = Broker()
    async with managed() as manager:
        async with manager.subscribe(broker.source()) as stream:
            broker.emit(0)
            await stream.receive()
            pending = stream.defer()
        async with manager.subscribe(broker.source()) as stream:
            pending.ack()
            await anyio.sleep(100)
            assert broker.advanced == [0]
            broker.emit(1)
            assert await stream.receive() == 1
        assert (broker.opened, broker.advanced) == (1, [0, 1])


@in_virtual_time
async def test_what_was_not_resolved_in_time_is_given_up_and_counted_in_the_log() -> None:
    lines = LogCapture()
    logger: Any = structlog.wrap_logger(None, processors=[lines])
    broker = Broker()
    async with SharedStreamManager(logger=logger) as manager:
        async with manager.subscribe(broker.source(drain_timeout=30)) as stream:
            broker.emit(0, 1, 2)
            await stream.receive()
            pending = stream.defer()
            await take(stream, 2)
        await anyio.sleep_until(29.9)
        assert broker.log == []
        await anyio.sleep_until(30)
        await settle()
        assert broker.log == ["stream closed", "closed"]
        assert not manager.statistics().groups
        (line,) = [line for line in lines.entries if line["event"] == "events not advanced"]
        assert (line["events"], line["seconds"], line["log_level"]) == (3, 30, "warning")
        pending.ack()  # too late, and no harm
        assert broker.advanced == []
        assert [line["said"] for line in lines.entries if line["event"] == "too late to say"] == ["acked"]


@in_virtual_time
async def test_with_linger_the_upstream_lingers_first_and_drains_after_that() -> None:
    broker = Broker()
    async with managed() as manager:
        async with manager.subscribe(broker.source(linger=10, drain_timeout=30)) as stream:
            broker.emit(0)
            await stream.receive()
            pending = stream.defer()
        await anyio.sleep_until(9.9)
        assert manager.statistics().groups["broker"].state == "lingering"
        await anyio.sleep_until(10.1)
        assert manager.statistics().groups["broker"].state == "draining"
        await anyio.sleep_until(39.9)
        assert manager.statistics().groups["broker"].state == "draining"
        pending.ack()
        await settle()
        assert broker.advanced == [0]
        assert not manager.statistics().groups


class Connected:
    """A broker whose connection lives inside `open_stream`, and without which nothing can be advanced."""

    def __init__(self) -> None:
        self.connected = False
        self.log: list[str] = []

    def source(self, **policies: Any) -> AckSource[int]:
        producer: Any = self
        return AckSource("connected", lambda: producer, **policies)

    async def open_stream(self) -> AsyncIterator[tuple[int, int]]:
        self.connected = True
        async with anyio.create_task_group():
            try:
                for number in range(5):
                    yield number, number
                await anyio.sleep_forever()
            finally:
                self.connected = False
                self.log.append("disconnected")

    async def advance(self, batch: Any) -> None:
        await settle(5)
        assert self.connected
        self.log.append(f"advanced {[item.broker_payload for item in batch]}")

    async def aclose(self) -> None:
        await settle(5)
        self.log.append("closed")


async def leave(manager: SharedStreamManager, stream: Any) -> None:
    await stream.__aexit__(None, None, None)


async def stop(manager: SharedStreamManager, stream: Any) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(manager.stop, "connected")
        await settle()
        await stream.__aexit__(None, None, None)


async def stop_all(manager: SharedStreamManager, stream: Any) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(manager.stop_all)
        await settle()
        await stream.__aexit__(None, None, None)


async def stop_early(manager: SharedStreamManager, stream: Any) -> None:
    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(manager.stop, "connected")
        await leave(manager, stream)


@pytest.mark.parametrize("end", [leave, stop, stop_all, stop_early])
async def test_the_order_of_an_end(end: Callable[[SharedStreamManager, Any], Awaitable[None]]) -> None:
    broker = Connected()
    async with managed() as manager:
        stream = await manager.subscribe(broker.source()).__aenter__()
        assert await take(stream, 5) == list(range(5))
        await end(manager, stream)
        *advances, disconnected, closed = broker.log
        assert (disconnected, closed) == ("disconnected", "closed")
        assert eval("+".join(line.removeprefix("advanced ") for line in advances)) == list(range(5))


@in_virtual_time
async def test_after_a_stop_subscribers_finish_what_is_in_their_buffers_and_it_is_advanced() -> None:
    broker = Broker()
    async with managed() as manager, anyio.create_task_group() as tasks:
        stream = await manager.subscribe(broker.source(drain_timeout=30)).__aenter__()
        other = await manager.subscribe(broker.source(drain_timeout=30)).__aenter__()
        broker.emit(0, 1, 2)
        await take(stream, 1)
        await take(other, 3)
        tasks.start_soon(manager.stop, "broker")
        await settle()
        assert not manager.statistics().groups
        broker.emit(3)
        await anyio.sleep_until(20)
        assert await take(stream, 2) == [1, 2]
        with pytest.raises(anyio.EndOfStream):
            await other.receive()
        assert broker.log == []
        with pytest.raises(anyio.EndOfStream):
            await stream.receive()
        await settle()
        assert broker.advanced == [0, 1, 2]
        assert set(broker.outcomes.values()) == {(2, 0, 0, 0)}
        assert broker.log == ["stream closed", "closed"]
        await stream.aclose()
        await other.aclose()


@in_virtual_time
async def test_a_stop_waits_for_a_subscriber_that_says_nothing_for_as_long_as_draining_may_take() -> None:
    broker = Broker()
    async with managed() as manager:
        stream = await manager.subscribe(broker.source(drain_timeout=30)).__aenter__()
        broker.emit(0, 1, 2)
        await take(stream, 2)
        await anyio.sleep_until(5)
        await manager.stop("broker")
        assert anyio.current_time() == 35
        assert broker.advanced == [0]
        assert broker.log == ["stream closed", "closed"]
        # It was told before, and is told as before: the rest of the buffer, then the end.
        assert drain(stream)[0] == [2]
        stream.close()


@in_virtual_time
async def test_the_manager_can_be_left_while_others_hold_events_and_waits_for_what_they_say() -> None:
    broker = Broker()
    finished: list[float] = []

    async def consume() -> None:
        async with manager.subscribe(broker.source(drain_timeout=30)) as stream:
            async for _ in stream:
                await anyio.sleep(5)
                finished.append(anyio.current_time())

    async with anyio.create_task_group() as tasks:
        async with SharedStreamManager() as manager:
            tasks.start_soon(consume)
            await settle()
            broker.emit(0, 1, 2)
            await anyio.sleep_until(1)
        assert anyio.current_time() == 15
        assert broker.advanced == [0, 1, 2]
    assert finished == [5, 10, 15]


@in_virtual_time
async def test_a_manager_left_inside_a_subscription_waits_no_longer_than_draining_may_take() -> None:
    broker = Broker()
    manager = SharedStreamManager()
    async with manager:
        stream = await manager.subscribe(broker.source(drain_timeout=30)).__aenter__()
        broker.emit(0, 1)
        await stream.receive()
    assert anyio.current_time() == 30
    assert broker.advanced == []
    assert drain(stream)[0] == [1]
    await stream.aclose()


@in_virtual_time
async def test_without_a_drain_timeout_to_speak_of_nothing_is_waited_for() -> None:
    broker = Broker()
    async with managed() as manager:
        async with manager.subscribe(broker.source(drain_timeout=0)) as stream:
            broker.emit(0)
            await stream.receive()
            stream.defer().ack()
            await settle()
            broker.emit(1)
            await stream.receive()
            pending = stream.defer()
        await settle()
        assert broker.log == ["stream closed", "closed"]
        pending.ack()
        assert broker.advanced == [0]
        assert anyio.current_time() == 0
