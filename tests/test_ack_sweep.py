"""A consumer cancelled before whichever of its steps: what it had finished is advanced clean, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from anyio_sharedstream import AckSubscription, Pending, SharedStreamManager
from tests.ack_support import Broker
from tests.support import idle, settle, until
from tests.sweep import Cut, Reader, managed, nothing_left, sweep

Stream = AckSubscription[int]


class Work:
    """What a consumer has taken, and what it has finished."""

    def __init__(self) -> None:
        self.got: list[int] = []
        self.done: list[int] = []

    async def do(self, *events: int) -> None:
        self.got += events
        await checkpoint()
        self.done += events


async def one_by_one(stream: Stream, work: Work, total: int) -> None:
    while len(work.got) < total:
        await work.do(await stream.receive())


async def iterated(stream: Stream, work: Work, total: int) -> None:
    async for event in stream:
        await work.do(event)
        if len(work.got) == total:
            break


async def in_batches(stream: Stream, work: Work, total: int) -> None:
    while len(work.got) < total:
        await work.do(*await stream.receive_batch(2))


async def in_iterated_batches(stream: Stream, work: Work, total: int) -> None:
    async for batch in stream.batches(2):
        await work.do(*batch)
        if len(work.got) == total:
            break


async def polling(stream: Stream, work: Work, total: int) -> None:
    while len(work.got) < total:
        try:
            event = stream.receive_nowait()
        except anyio.WouldBlock:
            await checkpoint()
        else:
            await work.do(event)


Consume = Callable[[Stream, Work, int], Coroutine[Any, Any, None]]
consuming = pytest.mark.parametrize("consume", [one_by_one, iterated, in_batches, in_iterated_batches, polling])


async def live(manager: SharedStreamManager, broker: Broker, consume: Consume, work: Work, **options: Any) -> None:
    async with manager.subscribe(broker.source(), **options) as stream:
        broker.emit(0, 1, 2)
        await consume(stream, work, 3)
        broker.emit(3)
        await consume(stream, work, 4)
        broker.emit(*range(4, 9))
        await consume(stream, work, 9)


@consuming
@pytest.mark.parametrize("where", [None, lambda event: True], ids=["all", "choosy"])
async def test_alone_it_has_everything_that_it_finished_advanced_clean_and_the_rest_not(consume: Consume, where: Any) -> None:
    async def trial(cut: Cut) -> None:
        broker, work = Broker(), Work()
        async with managed() as manager:
            await cut.run(live(manager, broker, consume, work, where=where))
            await until(lambda: idle(manager))
        assert broker.advanced == list(range(len(broker.advanced)))
        assert {*work.got} <= {*broker.advanced}
        for event in broker.advanced:
            expected = (1, 0, 0, 0) if event in work.done else (0, 1, 0, 0) if event in work.got else (0, 0, 0, 1)
            assert broker.outcomes[event] == expected
        assert broker.log.count("closed") == broker.opened <= 1

    assert await sweep(trial) >= 8


@consuming
async def test_as_one_of_two_it_spoils_nothing_but_what_it_was_busy_with(consume: Consume) -> None:
    async def trial(cut: Cut) -> None:
        broker, work = Broker(), Work()
        async with managed() as manager, anyio.create_task_group() as tasks, manager.subscribe(broker.source()) as other:
            reader = Reader(other)
            tasks.start_soon(reader.run)
            await settle(5)
            await cut.run(live(manager, broker, consume, work))
            await settle(5)
            broker.emit(100)
            await until(lambda: broker.advanced[-1:] == [100])
            assert broker.advanced == reader.got
            for event in reader.got:
                if event in work.done:
                    assert broker.outcomes[event] == (2, 0, 0, 0)
                elif event in work.got:
                    assert broker.outcomes[event] == (1, 1, 0, 0)
                else:
                    assert broker.outcomes[event] in [(1, 0, 0, 0), (1, 0, 0, 1)]
            tasks.cancel_scope.cancel()

    assert await sweep(trial) >= 7


@pytest.mark.parametrize("verb", ["ack", "reject", "fail"])
async def test_what_it_has_deferred_is_not_spoilt_by_its_end(verb: str) -> None:
    async def trial(cut: Cut) -> None:
        broker = Broker()
        pending: dict[int, Pending] = {}

        async def life() -> None:
            async with manager.subscribe(broker.source()) as stream:
                for event in range(5):
                    broker.emit(event)
                    assert await stream.receive() == event
                    pending[event] = stream.defer()
                    await checkpoint()

        async with managed() as manager:
            await cut.run(life())
            await settle()
            # Whoever leaves last does not wait for these.
            states = [group.state for group in manager.statistics().groups.values()]
            assert states == (["draining"] if pending else [])
            for each in pending.values():
                getattr(each, verb)()
            await until(lambda: idle(manager))
        expected = {"ack": (1, 0, 0, 0), "reject": (0, 0, 1, 0), "fail": (0, 1, 0, 0)}[verb]
        assert {*pending} <= {*broker.advanced}
        assert {broker.outcomes[event] for event in pending} <= {expected}
        assert {broker.outcomes[event] for event in broker.advanced if event not in pending} <= {(0, 0, 0, 1)}

    assert await sweep(trial) >= 10


async def test_a_stop_that_is_cancelled_anywhere_changes_nothing_about_what_is_said_after_it() -> None:
    async def trial(cut: Cut) -> None:
        broker = Broker()
        async with managed() as manager:
            stream = await manager.subscribe(broker.source()).__aenter__()
            broker.emit(0, 1, 2)
            assert await stream.receive() == 0

            async def stop() -> None:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(manager.stop, "broker")
                    await settle(5)
                    assert await stream.receive() == 1
                    assert await stream.receive() == 2
                    with pytest.raises(anyio.EndOfStream):
                        await stream.receive()

            await cut.run(stop())
            await stream.__aexit__(None, None, None)
            await manager.stop("broker")
            assert broker.advanced == [0, 1, 2]
            assert broker.outcomes[0] == (1, 0, 0, 0)
            assert {*broker.outcomes.values()} <= {(1, 0, 0, 0), (0, 0, 0, 1)}
            assert broker.log == ["stream closed", "closed"]

    assert await sweep(trial) >= 5


async def test_a_whole_program_that_is_cancelled_anywhere_leaves_nothing_and_repeats_nothing() -> None:
    async def trial(cut: Cut) -> None:
        broker, work = Broker(), Work()

        async def program() -> None:
            async with SharedStreamManager() as manager:
                await live(manager, broker, one_by_one, work)
                await checkpoint()

        async with nothing_left():
            await cut.run(program())
        # Also while everything is being cancelled: what was finished is said, and what was not is not.
        assert broker.advanced == list(range(len(broker.advanced)))
        assert {*work.got} <= {*broker.advanced}
        for event in broker.advanced:
            assert broker.clean[event] == (event in work.done)
        assert broker.log.count("closed") == broker.opened

    assert await sweep(trial) >= 8


async def test_a_joiner_that_adopts_a_draining_upstream_may_be_cancelled_anywhere() -> None:
    async def trial(cut: Cut) -> None:
        broker, work = Broker(), Work()
        async with managed() as manager:
            async with manager.subscribe(broker.source()) as stream:
                broker.emit(-1)
                assert await stream.receive() == -1
                pending = stream.defer()
            await cut.run(live(manager, broker, one_by_one, work))
            await settle()
            assert manager.statistics().groups["broker"].state == "draining"
            assert broker.advanced == []
            pending.ack()
            await until(lambda: idle(manager))
        assert broker.opened == 1
        assert [event for event in broker.advanced if broker.clean[event]] == [-1, *work.done]

    assert await sweep(trial) >= 8
