"""Cancellations and what is no ordinary exception: each gets out as itself, after what was finished has been advanced."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from anyio_sharedstream import AckSource, PollTerminated, SharedStreamManager
from tests.ack_support import Broker, finish, take
from tests.conftest import on_asyncio
from tests.support import idle, settle, until
from tests.sweep import managed, nothing_left
from tests.virtual_time import in_virtual_time


@in_virtual_time
async def test_what_surrounds_the_manager_may_be_cancelled_and_what_was_finished_is_advanced() -> None:
    broker = Broker()
    async with nothing_left():
        with anyio.CancelScope() as scope:
            async with SharedStreamManager() as manager, manager.subscribe(broker.source(drain_timeout=30)) as stream:
                broker.emit(0, 1, 2)
                await take(stream, 2)
                scope.cancel()
                await anyio.sleep(1)
        assert scope.cancelled_caught
        assert anyio.current_time() == 0
        assert broker.outcomes == {0: (1, 0, 0, 0), 1: (0, 1, 0, 0), 2: (0, 0, 0, 1)}
        assert broker.log == ["stream closed", "closed"]


@in_virtual_time
async def test_a_last_leaver_that_is_cancelled_leaves_the_rest_to_the_manager() -> None:
    broker = Broker()
    broker.blocked[None] = anyio.Event()
    async with managed() as manager:
        with anyio.move_on_after(2) as scope:
            async with manager.subscribe(broker.source(drain_timeout=30)) as stream:
                broker.emit(0)
                await take(stream, 1)
        assert scope.cancelled_caught
        assert anyio.current_time() == 2
        assert [group.state for group in manager.statistics().closing] == ["closing"]
        await anyio.sleep_until(5)
        broker.blocked.pop(None).set()
        await until(lambda: idle(manager))
        assert broker.outcomes == {0: (1, 0, 0, 0)}


async def leave_by_raising(manager: SharedStreamManager, broker: Broker) -> None:
    async with manager.subscribe(broker.source()) as stream:
        broker.emit(0)
        await take(stream, 1)
        raise ValueError("the body's own")


@in_virtual_time
async def test_a_body_that_raises_is_left_with_its_exception_though_the_wait_for_the_upstream_is_cancelled() -> None:
    broker = Broker()
    broker.blocked[None] = anyio.Event()
    async with managed() as manager:
        with anyio.move_on_after(2) as scope, pytest.raises(ValueError, match="the body's own"):
            await leave_by_raising(manager, broker)
        assert anyio.current_time() == 2
        assert not scope.cancelled_caught
        broker.blocked.pop(None).set()


class Halt(KeyboardInterrupt):
    """So that the test is not interrupted itself."""


async def busy(broker: Broker) -> None:
    """A program whose consumer asks for more, and then goes on with something else."""
    async with SharedStreamManager() as manager, manager.subscribe(broker.source()) as stream:
        broker.emit(0, 1)
        await take(stream, 2)
        finish(stream)
        await settle()
        broker.fail(Halt())
        await anyio.sleep_forever()


async def leaving(broker: Broker) -> None:
    """A program whose only consumer leaves before its event is advanced."""
    async with SharedStreamManager() as manager, manager.subscribe(broker.source()) as stream:
        broker.emit(0)
        await take(stream, 1)


@pytest.mark.parametrize(("program", "refusing", "advanced"), [(busy, False, [0, 1]), (busy, True, []), (leaving, True, [])])
async def test_what_is_no_exception_leaves_the_manager_as_itself(program: Any, refusing: bool, advanced: list[int]) -> None:
    broker = Broker()
    broker.refusing |= {None: Halt()} if refusing else {}
    async with nothing_left():
        with pytest.raises(Halt):
            await program(broker)
    assert broker.advanced == advanced
    assert broker.attempts == 1
    assert broker.log == ["stream closed", "closed"]


async def test_who_asks_for_more_when_advance_raises_what_is_no_exception_is_told_that_the_upstream_has_ended() -> None:
    broker = Broker()
    broker.refusing[None] = Halt()
    stream: Any = None

    async def consume() -> None:
        nonlocal stream
        async with SharedStreamManager() as manager:
            stream = await manager.subscribe(broker.source()).__aenter__()
            broker.emit(0)
            await take(stream, 1)
            finish(stream)
            await anyio.sleep_forever()

    with pytest.raises(Halt):
        await consume()
    with pytest.raises(PollTerminated):
        stream.receive_nowait()


@on_asyncio
async def test_a_native_cancellation_of_the_managers_task_ends_everything_in_order() -> None:
    broker = Broker()

    async def live() -> None:
        async with SharedStreamManager() as manager, manager.subscribe(broker.source()) as stream:
            broker.emit(0, 1, 2)
            await take(stream, 2)
            await anyio.sleep_forever()

    async with nothing_left():
        task = asyncio.create_task(live())
        await until(lambda: broker.advanced)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert broker.outcomes == {0: (1, 0, 0, 0), 1: (0, 1, 0, 0), 2: (0, 0, 0, 1)}
    assert broker.log == ["stream closed", "closed"]


@on_asyncio
async def test_a_native_cancellation_of_a_consumer_fails_what_it_was_busy_with_and_harms_nobody() -> None:
    broker = Broker()

    async def consume() -> None:
        async with manager.subscribe(broker.source()) as stream:
            await take(stream, 2)
            await anyio.sleep_forever()

    async with managed() as manager, manager.subscribe(broker.source()) as other:
        task = asyncio.create_task(consume())
        await settle()
        broker.emit(0, 1, 2)
        await take(other, 3)
        finish(other)
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await settle()
        assert broker.outcomes == {0: (2, 0, 0, 0), 1: (1, 1, 0, 0), 2: (1, 0, 0, 1)}


@on_asyncio
async def test_a_native_cancellation_of_the_last_leaver_leaves_the_rest_to_the_manager() -> None:
    broker = Broker()
    broker.blocked[None] = anyio.Event()

    async def consume() -> None:
        async with manager.subscribe(broker.source()) as stream:
            await take(stream, 1)

    async with managed() as manager:
        task = asyncio.create_task(consume())
        await settle()
        broker.emit(0)
        await until(lambda: broker.attempts)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert broker.advanced == []
        broker.blocked.pop(None).set()
        await until(lambda: idle(manager))
        assert broker.outcomes == {0: (1, 0, 0, 0)}


@on_asyncio
async def test_a_native_cancellation_of_whatever_advances_is_not_mistaken_for_success() -> None:
    broker = Broker()
    tasks: list[Any] = []

    class Producer:
        def open_stream(self) -> AsyncIterator[Any]:
            return broker.play()

        async def advance(self, batch: Any) -> None:
            tasks.append(asyncio.current_task())
            await anyio.sleep_forever()

    create: Any = Producer
    source: AckSource[int] = AckSource("broker", create)
    async with managed() as manager, manager.subscribe(source) as stream:
        broker.emit(0, 1)
        await take(stream, 2)
        await until(lambda: tasks)
        tasks[0].cancel()
        with pytest.raises(PollTerminated):
            await stream.receive()
        assert broker.advanced == []


@in_virtual_time
async def test_a_cancelled_stop_goes_on_draining_and_so_does_a_second_one() -> None:
    broker = Broker()
    async with managed() as manager:
        stream = await manager.subscribe(broker.source(drain_timeout=30)).__aenter__()
        broker.emit(0)
        await take(stream, 1)
        with anyio.move_on_after(5):
            await manager.stop("broker")
        await anyio.sleep_until(10)
        with anyio.move_on_after(5):
            await manager.stop_all()
        # The time for draining counts from the first.
        await manager.stop("broker")
        assert anyio.current_time() == 30
        assert broker.log == ["stream closed", "closed"]
        stream.close()


@in_virtual_time
async def test_a_body_that_raises_while_a_commit_hangs_gets_its_exception_out_in_time() -> None:
    broker = Broker()
    broker.blocked[None] = anyio.Event()

    async def fail() -> None:
        async with SharedStreamManager() as manager, manager.subscribe(broker.source(drain_timeout=30)) as stream:
            broker.emit(0, 1)
            await take(stream, 2)
            await settle()
            raise ZeroDivisionError

    async with nothing_left():
        with pytest.raises(ZeroDivisionError):
            await fail()
        assert anyio.current_time() == 30
        assert broker.log == ["stream closed", "closed"]


async def test_what_is_no_exception_leaves_the_manager_as_itself_from_a_clean_up() -> None:
    broker = Broker()

    class Producer:
        def open_stream(self) -> AsyncIterator[Any]:
            return broker.play()

        async def advance(self, batch: Any) -> None:
            await broker.advance(batch)

        async def aclose(self) -> None:
            raise Halt

    create: Any = Producer
    source: AckSource[int] = AckSource("broker", create)

    async def halt() -> None:
        async with SharedStreamManager() as manager, manager.subscribe(source) as stream:
            broker.emit(0)
            await take(stream, 1)

    async with nothing_left():
        with pytest.raises(Halt):
            await halt()
    assert broker.outcomes == {0: (1, 0, 0, 0)}
