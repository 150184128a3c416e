"""Back-pressure by what is not yet advanced, and the time that a subscriber has for an event."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from anyio_sharedstream import AckSource, AckTimeout, SharedStreamProducer, Subscription
from tests.ack_support import Broker, acknowledgement, finish, take
from tests.support import settle
from tests.sweep import Reader, drain, managed
from tests.virtual_time import in_virtual_time


@pytest.mark.parametrize("room", [1, 2, 3, 63, 64, 65, 100])
async def test_of_a_burst_no_more_is_pulled_than_there_is_room_for(room: int) -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source(max_in_flight=room)) as stream:
        broker.emit(*range(250))
        for taken in range(1, 251):
            await stream.receive()
            await settle(6)
            # One is current, and so not yet advanced.
            assert broker.pulled == min(250, taken - 1 + room)
            assert acknowledgement(manager).in_flight <= room
        await settle()
        assert broker.pulled == 250
        finish(stream)
        await settle()
        assert broker.advanced == list(range(250))
        assert acknowledgement(manager).in_flight == 0


@pytest.mark.parametrize("room", [1, 2, 5])
async def test_what_there_is_room_for_is_published_before_the_wait_for_more(room: int) -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source(max_in_flight=room)) as stream:
        broker.emit(*range(20))
        await settle()
        assert stream.statistics().current_buffer_used == broker.pulled == room
        assert acknowledgement(manager).waiting
        assert acknowledgement(manager).max_in_flight == acknowledgement(manager).in_flight == room
        await take(stream, 20)
        assert not acknowledgement(manager).waiting


async def test_an_event_is_in_flight_until_it_is_advanced_and_not_only_until_it_is_resolved() -> None:
    broker = Broker()
    broker.blocked[None] = anyio.Event()
    async with managed() as manager, manager.subscribe(broker.source(max_in_flight=4)) as stream:
        broker.emit(*range(100))
        await take(stream, 4)
        finish(stream)
        await settle()
        assert broker.pulled == acknowledgement(manager).in_flight == 4
        broker.blocked.pop(None).set()
        assert await take(stream, 96) == list(range(4, 100))


async def test_the_bound_is_strict_too_where_somebody_joins_in_the_middle_of_a_burst() -> None:
    broker = Broker()
    late: list[Subscription[int]] = []

    class Producer:
        async def open_stream(self) -> AsyncIterator[tuple[int, int]]:
            for number in range(40):
                yield number, number
                if number % 3 == 1:
                    late.append(await manager.subscribe(source).__aenter__())
                assert acknowledgement(manager).in_flight <= 5
            await anyio.sleep_forever()

        async def advance(self, batch: Any) -> None:
            broker.batches.append((None, [item.broker_payload for item in batch]))

    source: AckSource[int] = AckSource("broker", Producer, max_in_flight=5, drain_timeout=0.5)
    async with managed() as manager, anyio.create_task_group() as tasks:
        stream = await manager.subscribe(source).__aenter__()
        tasks.start_soon(Reader(stream).run)
        read = 0
        while len(broker.advanced) < 40:
            await settle(2)
            assert acknowledgement(manager).in_flight <= 5
            for each in late[read:]:
                tasks.start_soon(Reader(each).run)
            read = len(late)
        assert broker.advanced == list(range(40))
        assert len(late) == 13
        await manager.stop_all()


async def test_a_subscriber_that_comes_to_a_full_window_is_not_waited_for_with_what_is_in_it() -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source(max_in_flight=3)) as stream:
        broker.emit(*range(9))
        assert await take(stream, 3) == [0, 1, 2]
        async with manager.subscribe(broker.source(max_in_flight=3)) as other:
            finish(stream)
            await settle()
            assert broker.advanced == [0, 1, 2]
            assert await take(other, 3) == await take(stream, 3) == [3, 4, 5]
            finish(other)
            await settle()
            # The one that is waited for is now the first: it is busy with the last of these.
            assert broker.advanced == [0, 1, 2, 3, 4]
        assert broker.outcomes[4] == (2, 0, 0, 0)


class Plain:
    """A producer whose stream is no generator, and cannot be thrown into."""

    def __init__(self, events: list[int]) -> None:
        self.events = events
        self.advanced: list[int] = []
        self.closed = False

    def open_stream(self) -> Plain:
        return self

    def __aiter__(self) -> Plain:
        return self

    async def __anext__(self) -> tuple[int, int]:
        return self.events[0], self.events.pop(0)

    async def advance(self, batch: Any) -> None:
        self.advanced += [item.broker_payload for item in batch]

    async def aclose(self) -> None:
        self.closed = True


async def test_a_stream_that_is_no_generator_is_held_back_and_stopped_as_well() -> None:
    producer = Plain(list(range(10)))
    source: AckSource[int] = AckSource("plain", lambda: producer, max_in_flight=2)
    async with managed() as manager, manager.subscribe(source) as stream:
        await settle()
        assert producer.events == list(range(2, 10))
        assert await take(stream, 3) == [0, 1, 2]
        await settle()
    assert producer.closed
    assert producer.advanced == [0, 1, 2, 3][: len(producer.advanced)]
    assert producer.advanced[:3] == [0, 1, 2]


@in_virtual_time
async def test_while_an_upstream_lingers_nothing_is_pulled_and_its_next_subscriber_misses_nothing() -> None:
    broker = Broker()
    async with managed() as manager:
        async with manager.subscribe(broker.source(linger=100)) as stream:
            broker.emit(0)
            await stream.receive()
        await settle()
        assert broker.advanced == [0]
        broker.emit(*range(1, 50))
        await anyio.sleep(99)
        assert broker.pulled <= 2  # one that it was waiting for
        assert manager.statistics().groups["broker"].events_published == 1
        assert acknowledgement(manager).in_flight == 0
        async with manager.subscribe(broker.source(linger=100)) as stream:
            assert await take(stream, 49) == list(range(1, 50))
        await settle()
        assert broker.advanced == list(range(50))
        assert broker.opened == 1
        broker.emit(50)
        await anyio.sleep(99.9)
        assert manager.statistics().groups
        await anyio.sleep(0.2)
        assert broker.advanced == list(range(50))
        assert broker.log == ["stream closed", "closed"]


async def test_an_upstream_whose_only_subscriber_leaves_while_it_opens_is_not_pulled() -> None:
    class Leaving(Broker):
        def _create(self) -> SharedStreamProducer[Any, Any]:
            stream.close()
            return super()._create()

    broker = Leaving()
    broker.emit(0, 1)
    source = broker.source(linger=100)
    async with managed() as manager:
        stream = await manager.subscribe(source).__aenter__()
        await settle()
        assert (broker.opened, broker.pulled) == (1, 0)
        async with manager.subscribe(source) as other:
            assert await take(other, 2) == [0, 1]


# Time.


async def timed(stream: Subscription[Any]) -> tuple[list[Any], float]:
    """Receive until `AckTimeout`; returns what there was before, and when it came."""
    reader = Reader(stream)
    await reader.run()
    assert isinstance(reader.terminal, AckTimeout)
    assert reader.terminal.subscriber_id == stream.subscriber_id
    assert reader.terminal.key == "broker"
    return reader.got, anyio.current_time()


@pytest.mark.parametrize("began", [0, 1.3, 1e6 + 1 / 3])
@pytest.mark.parametrize("timeout", [0.1, 0.7, 5, 1e5])
@in_virtual_time
async def test_who_is_busy_for_too_long_fails_alone_at_that_second(began: float, timeout: float) -> None:
    broker = Broker()
    async with (
        managed() as manager,
        manager.subscribe(broker.source(ack_timeout=timeout)) as healthy,
        manager.subscribe(broker.source(ack_timeout=timeout)) as busy,
    ):
        broker.emit(0, 1)
        # That they wait in the buffer counts for nothing.
        await anyio.sleep_until(began)
        await take(healthy, 2)
        finish(healthy)
        assert await take(busy, 1) == [0]
        await anyio.sleep_until(began + timeout - 0.01)
        assert busy.statistics().events_current == 1
        assert broker.advanced == []
        await anyio.sleep_until(began + timeout)
        await settle()
        assert drain(busy)[0] == []
        assert isinstance(drain(busy)[1], AckTimeout)
        assert broker.outcomes == {0: (1, 1, 0, 0), 1: (1, 0, 0, 1)}
        assert drain(healthy) == ([], None)
        broker.emit(2)
        assert await healthy.receive() == 2


@in_virtual_time
async def test_the_time_counts_anew_for_each_event_that_is_taken() -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source(ack_timeout=10)) as stream:
        broker.emit(*range(20))
        for number in range(20):
            assert await stream.receive() == number
            await anyio.sleep(9)
            assert broker.advanced == list(range(number))
        finish(stream)
        await anyio.sleep(5)
        # Taken one second before it would have been too late for an older one.
        broker.emit(20, 21)
        await stream.receive()
        began = anyio.current_time()
        await anyio.sleep(9.9)
        assert await stream.receive() == 21
        await anyio.sleep_until(began + 19.8)
        assert stream.statistics().events_current == 1
        await anyio.sleep_until(began + 20)
        assert await timed(stream) == ([], began + 20)
        assert broker.outcomes[20] == (1, 0, 0, 0)
        assert broker.outcomes[21] == (0, 1, 0, 0)


@in_virtual_time
async def test_a_batch_is_late_as_a_whole_and_what_follows_it_is_released() -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source(ack_timeout=10)) as stream:
        broker.emit(*range(9))
        await stream.receive_batch(3)
        await anyio.sleep(9)
        await stream.receive_batch(4)
        await anyio.sleep_until(18.9)
        assert broker.advanced == [0, 1, 2]
        await anyio.sleep_until(19.1)
        assert drain(stream)[0] == []
        assert [broker.outcomes[number] for number in range(9)] == [(1, 0, 0, 0)] * 3 + [(0, 1, 0, 0)] * 4 + [(0, 0, 0, 1)] * 2


@in_virtual_time
async def test_an_idle_consumer_is_never_late_however_it_waits() -> None:
    broker = Broker()
    async with managed() as manager, anyio.create_task_group() as tasks:
        streams = [await manager.subscribe(broker.source(ack_timeout=1)).__aenter__() for _ in range(6)]
        readers = [Reader(stream) for stream in streams[:2]]
        for reader in readers:
            tasks.start_soon(reader.run)
        broker.emit(0)
        for stream in streams[2:]:
            assert await stream.receive() == 0
        finish(streams[2])
        streams[3].reject()
        pending = streams[4].defer()
        with anyio.move_on_after(0):
            await streams[5].receive()
        await anyio.sleep(1000)
        pending.ack()
        await settle()
        assert broker.outcomes == {0: (5, 0, 1, 0)}
        broker.emit(1)
        assert [await stream.receive() for stream in streams[2:]] == [1] * 4
        await settle()
        assert [reader.got for reader in readers] == [[0, 1]] * 2
        tasks.cancel_scope.cancel()
        await manager.stop_all()
