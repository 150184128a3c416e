"""One test for each way in which acknowledgement has really lost or repeated work elsewhere; the names say which."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from anyio_sharedstream import AckSource, AckTimeout, Pending, Restart, SharedStreamManager, SubscriberOverflow
from tests.ack_support import Broker, acknowledgement, finish, take
from tests.conftest import on_asyncio
from tests.support import idle, settle, until
from tests.sweep import managed, nothing_left
from tests.virtual_time import in_virtual_time

CLEAN = (1, 0, 0, 0)


@pytest.mark.parametrize("way", ["crash", "cancelled", "closed", "closed from outside"])
async def test_22_a_consumer_that_crashes_in_the_middle_of_an_event_has_not_acknowledged_it(way: str) -> None:
    broker = Broker()

    async def consume(scope: anyio.CancelScope) -> None:
        with scope:
            async with manager.subscribe(broker.source()) as stream:
                streams.append(stream)
                await take(stream, 2)
                if way == "crash":
                    raise ZeroDivisionError
                if way == "closed":
                    await stream.aclose()
                await anyio.sleep_forever()

    streams: list[Any] = []
    async with managed() as manager:
        async with manager.subscribe(broker.source()) as other:
            scope = anyio.CancelScope()
            with pytest.raises(ExceptionGroup) if way == "crash" else anyio.CancelScope():
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(consume, scope)
                    await settle()
                    broker.emit(0, 1, 2)
                    await settle()
                    if way == "closed from outside":
                        streams[0].close()
                    scope.cancel()
            await take(other, 3)
        assert broker.outcomes == {0: (2, 0, 0, 0), 1: (1, 1, 0, 0), 2: (1, 0, 0, 1)}
        assert [broker.clean[event] for event in range(3)] == [True, False, True]


@in_virtual_time
async def test_23_a_timeout_does_not_touch_what_was_handled_before() -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source(ack_timeout=10)) as other:
        late = await manager.subscribe(broker.source(ack_timeout=10)).__aenter__()
        broker.emit(*range(6))
        await take(late, 4)
        await anyio.sleep(5)
        assert broker.advanced == []  # for the other has yet to come
        await anyio.sleep(5)
        await settle()
        await take(other, 6)
        finish(other)
        await settle()
        assert [broker.outcomes[event] for event in range(6)] == [(2, 0, 0, 0)] * 3 + [(1, 1, 0, 0)] + [(1, 0, 0, 1)] * 2
        with pytest.raises(AckTimeout):
            await late.receive()


async def test_23_an_overflow_does_not_touch_what_was_handled_before() -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source()) as other:
        slow = await manager.subscribe(broker.source(), max_buffer_size=4).__aenter__()
        broker.emit(*range(6))
        await take(slow, 4)
        for event in range(6, 9):
            await take(other, 6 if event == 6 else 1)
            broker.emit(event)
            await settle()
        with pytest.raises(SubscriberOverflow):
            await slow.receive()
        await take(other, 1)
        finish(other)
        await settle()
        assert [broker.outcomes[event] for event in range(6)] == [(2, 0, 0, 0)] * 3 + [(1, 1, 0, 0)] + [(1, 0, 0, 1)] * 2
        assert all(broker.clean[event] for event in (6, 7, 8))


@pytest.mark.parametrize("rests", [0, 1, 5])
async def test_24_who_takes_one_event_and_leaves_gets_it_committed_before_the_group_stops(rests: int) -> None:
    broker = Broker()
    broker.emit(0)
    async with managed() as manager:
        async with manager.subscribe(broker.source()) as stream:
            assert await stream.receive() == 0
            await settle(rests)
        # Not some time later: the last leaver has waited for it.
        assert broker.outcomes == {0: CLEAN}
        assert broker.log == ["stream closed", "closed"]


async def test_25_who_takes_batches_or_looks_ahead_is_not_done_with_what_it_has_in_hand() -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source()) as stream:
        broker.emit(*range(10))
        assert await stream.receive_batch(4) == (0, 1, 2, 3)
        await settle()
        assert broker.advanced == []
        ahead: list[tuple[tuple[int, ...], Pending]] = []
        while len(ahead) < 3:
            batch = await stream.receive_batch(2)
            ahead.append((batch, stream.defer()))
        await settle()
        assert broker.advanced == [0, 1, 2, 3]
        for batch, pending in ahead:
            pending.ack()
            await settle()
            assert broker.batches[-1] == (None, [*batch])


async def test_26_what_a_leaver_never_took_does_not_spoil_what_others_have_handled() -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source()) as other:
        leaver = await manager.subscribe(broker.source()).__aenter__()
        broker.emit(*range(100))
        await take(other, 100)
        await leaver.__aexit__(ZeroDivisionError, ZeroDivisionError(), None)
        finish(other)
        await settle()
        assert set(broker.outcomes.values()) == {(1, 0, 0, 1)}
        assert all(broker.clean.values())


@in_virtual_time
async def test_27_a_steady_consumer_with_a_queue_is_not_late() -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source(ack_timeout=10)) as stream:
        broker.emit(*range(100))
        for event in range(100):
            assert await stream.receive() == event
            await anyio.sleep(9)
        assert anyio.current_time() == 900
        finish(stream)
        await settle()
        assert set(broker.outcomes.values()) == {CLEAN}


@in_virtual_time
async def test_28_a_slow_or_failing_or_hung_commit_stops_no_other_partition_and_no_shutdown() -> None:
    broker = Broker(lane=lambda event: event % 4)
    broker.blocked[0] = anyio.Event()
    broker.refusing[1] = ConnectionError()
    source = broker.source(drain_timeout=20, advance_retry=Restart(initial_delay=1, max_delay=1, jitter=0))
    async with managed() as manager:
        async with manager.subscribe(source) as stream:
            for event in range(40):
                broker.emit(event)
                await stream.receive()
                finish(stream)
                await settle()
                assert broker.advanced == [done for done in range(event + 1) if done % 4 > 1]
            assert anyio.current_time() == 0
            await anyio.sleep(5)
            assert broker.attempts > 20
        assert anyio.current_time() == 25
        assert idle(manager)


async def test_28_a_cancelled_commit_kills_nobody_silently() -> None:
    broker = Broker()

    class Producer:
        cancelled = 0

        def open_stream(self) -> Any:
            return broker.play()

        async def advance(self, batch: Any) -> None:
            if not Producer.cancelled:
                with anyio.CancelScope() as scope:  # a client with a timeout of its own
                    scope.cancel()
                    try:
                        await anyio.sleep_forever()
                    finally:
                        Producer.cancelled += 1
                raise TimeoutError
            await broker.advance(batch)

    create: Any = Producer
    source: AckSource[int] = AckSource("broker", create, advance_retry=Restart(initial_delay=0))
    async with managed() as manager, manager.subscribe(source) as stream:
        broker.emit(0, 1)
        await take(stream, 2)
        finish(stream)
        await until(lambda: broker.advanced == [0, 1])


@in_virtual_time
async def test_29_behind_a_hung_commit_there_is_never_more_than_the_bound() -> None:
    broker = Broker()
    broker.blocked[None] = anyio.Event()
    async with managed() as manager, manager.subscribe(broker.source(max_in_flight=100, drain_timeout=1)) as stream:
        broker.emit(*range(50_000))
        while stream.statistics().events_received < 100:
            await stream.receive_batch(1000)
        finish(stream)
        await anyio.sleep(1000)
        assert broker.pulled == acknowledgement(manager).in_flight == 100


async def test_29_a_thousand_leavers_with_thousands_outstanding_do_not_block_the_loop() -> None:
    broker = Broker()
    source = broker.source(max_in_flight=5000)
    async with managed() as manager, manager.subscribe(source) as other:
        streams = [await manager.subscribe(source, max_buffer_size=5000).__aenter__() for _ in range(1000)]
        broker.emit(*range(1000))
        await until(lambda: broker.pulled == 1000)
        await settle()
        began = time.process_time()
        for stream in streams:
            stream.close()
        # Scanning a thousand events for each would take seconds.
        assert time.process_time() - began < 0.5
        await take(other, 1000)
        finish(other)
        await until(lambda: len(broker.advanced) == 1000)
        assert set(broker.outcomes.values()) == {(1, 0, 0, 1000)}


async def test_30_a_cumulative_commit_can_hold_at_the_first_failure() -> None:
    committed: list[int] = []
    broker = Broker()

    class Producer:
        """As for Kafka: a commit says how far everything has been handled."""

        held = False

        def open_stream(self) -> Any:
            return broker.play()

        async def advance(self, batch: Any) -> None:
            await broker.advance(batch)
            for item in batch:
                self.held = self.held or not item.outcome.is_clean
                if not self.held:
                    committed.append(item.broker_payload[1])

    create: Any = Producer
    source: AckSource[int] = AckSource("broker", create)
    async with managed() as manager, manager.subscribe(source) as stream:
        broker.emit(*range(6))
        pending = []
        for _ in range(6):
            await stream.receive()
            pending.append(stream.defer())
        for event in (5, 1, 0):
            pending[event].ack()
            await settle()
        assert committed == [0, 1]
        pending[3].ack()
        pending[2].fail()
        pending[4].ack()
        await settle()
        # All in order, and nothing overtook the failure.
        assert broker.advanced == list(range(6))
        assert committed == [0, 1]


async def pulled_in_another_task(stream: Any, speak: Callable[[Any], None]) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream.receive)
    speak(stream)


async def spoken_in_another_task(stream: Any, speak: Callable[[Any], None]) -> None:
    async def say() -> None:
        speak(stream)

    await stream.receive()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(say)


@pytest.mark.parametrize("way", [pulled_in_another_task, spoken_in_another_task])
async def test_31_a_reject_is_about_the_subscriptions_event_whoever_pulled_it(way: Any) -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source()) as stream, manager.subscribe(broker.source()) as other:
        broker.emit(0, 1)
        await way(stream, lambda it: it.reject("poison"))
        await way(stream, lambda it: it.fail())
        await take(other, 2)
        finish(other)
        await settle()
        assert broker.outcomes == {0: (1, 0, 1, 0), 1: (1, 1, 0, 0)}


@on_asyncio
async def test_31_a_reject_works_where_wait_for_has_pulled_in_a_task_of_its_own() -> None:
    broker = Broker()
    async with nothing_left(), SharedStreamManager() as manager, manager.subscribe(broker.source()) as stream:
        broker.emit(0)
        await asyncio.wait_for(asyncio.create_task(stream.receive()), 10)
        stream.reject()
        await settle()
        assert broker.outcomes == {0: (0, 0, 1, 0)}
