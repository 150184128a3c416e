from __future__ import annotations

import anyio
import pytest

from anyio_sharedstream import PollTerminated, SharedStreamManager, SubscriberOverflow
from tests.support import Feed, idle, settle, until


async def test_two_share() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager:
        async with manager.subscribe(feed.source) as one, manager.subscribe(feed.source) as two:
            feed.emit(1, 2, 3)
            assert [await one.receive() for _ in range(3)] == [1, 2, 3]
            assert await two.receive_batch(10) == (1, 2, 3)
            async with anyio.create_task_group() as tasks:

                async def read() -> None:
                    assert await one.receive() == 4

                tasks.start_soon(read)
                await settle()
                feed.emit(4)
            assert two.receive_nowait() == 4
        assert idle(manager)
        assert feed.opened == feed.closed == 1


async def test_failure_after_data() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as one:
        feed.emit(1, 2)
        feed.fail(ValueError("x"))
        assert await one.receive() == 1
        assert await one.receive() == 2
        for _ in range(3):
            with pytest.raises(ValueError, match="x"):
                await one.receive()
        assert idle(manager) or not manager.statistics().groups


async def test_return() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as one:
        feed.end()
        with pytest.raises(PollTerminated, match="returned"):
            await one.receive()


async def test_overflow() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source, max_buffer_size=2) as one:
        for n in range(3):
            feed.emit(n)
            await settle()
        with pytest.raises(SubscriberOverflow):
            await one.receive()
        await until(lambda: idle(manager))


async def test_stop() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as one:
        feed.emit(1)
        await settle()
        await manager.stop_all()
        assert [event async for event in one] == [1]


async def test_burst() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source, max_buffer_size=1) as one:
        feed.emit(*range(1000))
        assert [await one.receive() for _ in range(1000)] == list(range(1000))
