"""A window that stays full: who is to blame for it fails after the timeout, and nobody else does."""

from __future__ import annotations

import math
from typing import Any

import anyio
import pytest
import structlog
from structlog.testing import LogCapture

from anyio_sharedstream import AckTimeout, SharedStreamManager, SubscriberOverflow
from tests.ack_support import Broker, acknowledgement, finish, take
from tests.support import settle
from tests.sweep import Reader, drain, managed
from tests.virtual_time import in_virtual_time


@in_virtual_time
async def test_who_never_takes_anything_fails_once_the_window_has_been_full_for_the_timeout() -> None:
    broker = Broker()
    source = broker.source(ack_timeout=10, max_in_flight=4)
    async with managed() as manager, anyio.create_task_group() as tasks, manager.subscribe(source) as dead:
        reader = Reader(await manager.subscribe(source).__aenter__())
        tasks.start_soon(reader.run)
        broker.emit(0, 1, 2)
        await anyio.sleep_until(50)  # there is room: it may be as slow as it likes
        assert dead.statistics().current_buffer_used == 3
        broker.emit(*range(3, 10))
        await anyio.sleep_until(59.9)
        assert reader.got == [0, 1, 2, 3]
        assert acknowledgement(manager).waiting
        await anyio.sleep_until(60)
        await settle()
        assert reader.got == list(range(10))
        assert isinstance(drain(dead)[1], AckTimeout)
        assert broker.outcomes == {number: (1, 0, 0, 1 if number < 4 else 0) for number in range(10)}
        reader.stream.close()
        await settle()


@in_virtual_time
async def test_a_full_window_that_moves_is_nobodys_fault() -> None:
    broker = Broker()
    source = broker.source(ack_timeout=10, max_in_flight=3)
    async with managed() as manager, manager.subscribe(source) as slow:
        broker.emit(*range(30))
        for number in range(30):
            assert await slow.receive() == number
            await anyio.sleep(9.9)
        finish(slow)
        await settle()
        assert broker.advanced == list(range(30))


@in_virtual_time
async def test_of_several_only_those_at_the_oldest_event_fail() -> None:
    broker = Broker()
    source = broker.source(ack_timeout=10, max_in_flight=4)
    async with (
        managed() as manager,
        manager.subscribe(source) as first,
        manager.subscribe(source, where=lambda event: True) as choosy,
        manager.subscribe(source) as second,
    ):
        broker.emit(*range(8))
        await take(second, 1)
        second.reject()
        await anyio.sleep_until(9.9)
        assert acknowledgement(manager).in_flight == 4
        await anyio.sleep_until(10.1)
        assert isinstance(drain(first)[1], AckTimeout)
        assert isinstance(drain(choosy)[1], AckTimeout)
        assert broker.outcomes == {0: (0, 0, 1, 2)}
        # Now it is this one's turn to hold the others up, and its time begins.
        assert acknowledgement(manager).in_flight == 4
        await anyio.sleep_until(19.9)
        assert await take(second, 2) == [1, 2]
        await anyio.sleep_until(29.8)
        assert await second.receive() == 3
        await anyio.sleep_until(39.7)
        assert drain(second) == ([4, 5, 6], None)
        await settle()
        assert drain(second) == ([7], None)


@in_virtual_time
async def test_who_chooses_and_stands_behind_the_oldest_event_or_was_given_nothing_holds_nobody_up() -> None:
    broker = Broker()
    broker.blocked[None] = anyio.Event()
    source = broker.source(ack_timeout=10, max_in_flight=4)
    async with (
        managed() as manager,
        manager.subscribe(source) as first,
        manager.subscribe(source, where=lambda event: event > 1) as behind,
        manager.subscribe(source, where=lambda event: False) as without,
    ):
        for events in ((0, 1), (2, 3)):  # two publications
            broker.emit(*events)
            await settle()
        await anyio.sleep_until(11)
        assert isinstance(drain(first)[1], AckTimeout)
        assert drain(behind) == ([2, 3], None)
        # Now everybody is done with everything, and it is the commits that fill the window.
        await anyio.sleep_until(35)
        assert drain(behind) == drain(without) == ([], None)
        broker.blocked.pop(None).set()
        await settle()
        assert broker.outcomes == dict.fromkeys(range(4), (2, 0, 0, 1))


@in_virtual_time
async def test_a_window_that_is_full_of_hung_commits_is_no_subscribers_fault_and_is_told_of() -> None:
    lines = LogCapture()
    broker = Broker()
    broker.blocked[None] = anyio.Event()
    logger: Any = structlog.wrap_logger(None, processors=[lines])
    async with SharedStreamManager(logger=logger) as manager:
        async with manager.subscribe(broker.source(ack_timeout=10, max_in_flight=4)) as stream:
            broker.emit(*range(8))
            await take(stream, 4)
            finish(stream)
            await anyio.sleep_until(35)
            assert drain(stream) == ([], None)
            told = [line for line in lines.entries if line["event"] == "no room for events"]
            assert [(line["in_flight"], line["deferred"], line["log_level"]) for line in told] == [(4, 0, "warning")] * 3
            broker.blocked.pop(None).set()
            assert await take(stream, 4) == [4, 5, 6, 7]
        assert broker.advanced == list(range(8))


@in_virtual_time
async def test_a_window_that_is_full_of_deferred_events_waits_for_them_for_ever() -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source(ack_timeout=10, max_in_flight=4)) as stream:
        broker.emit(*range(8))
        pending = []
        for _ in range(4):
            await stream.receive()
            pending.append(stream.defer())
        await anyio.sleep(1000)
        assert drain(stream) == ([], None)
        assert acknowledgement(manager).deferred == 4
        pending[1].ack()
        await settle()
        assert broker.pulled == 4  # the first holds the lane
        pending[0].ack()
        assert await take(stream, 2) == [4, 5]
        for each in pending[2:]:
            each.ack()


@in_virtual_time
async def test_a_subscriber_that_stands_at_the_oldest_event_fails_though_another_has_deferred_it() -> None:
    broker = Broker()
    source = broker.source(ack_timeout=10, max_in_flight=1)
    async with managed() as manager, manager.subscribe(source) as dead, manager.subscribe(source) as stream:
        broker.emit(0, 1)
        await stream.receive()
        pending = stream.defer()
        await anyio.sleep_until(9.9)
        assert drain(stream) == ([], None)
        await anyio.sleep_until(30)
        assert isinstance(drain(dead)[1], AckTimeout)
        assert drain(stream) == ([], None)
        pending.ack()
        assert await stream.receive() == 1
        assert broker.outcomes == {0: (1, 0, 0, 1)}


@in_virtual_time
async def test_without_a_timeout_a_subscriber_may_hold_everybody_for_ever() -> None:
    broker = Broker()
    source = broker.source(ack_timeout=math.inf, max_in_flight=1)
    async with managed() as manager, manager.subscribe(source) as dead, manager.subscribe(source) as busy:
        broker.emit(0, 1)
        await busy.receive()
        await anyio.sleep(8e4)
        assert dead.statistics().current_buffer_used == busy.statistics().events_current == 1


@in_virtual_time
async def test_with_nobody_left_after_a_timeout_the_upstream_closes_at_once() -> None:
    broker = Broker()
    async with managed() as manager:
        stream = await manager.subscribe(broker.source(ack_timeout=10)).__aenter__()
        broker.emit(0, 1)
        await stream.receive()
        await anyio.sleep_until(10)
        await settle()
        assert not manager.statistics().groups
        assert broker.log == ["stream closed", "closed"]
        assert broker.outcomes == {0: (0, 1, 0, 0), 1: (0, 0, 0, 1)}
        with pytest.raises(AckTimeout):
            await stream.receive()
        await stream.aclose()


@in_virtual_time
async def test_who_has_been_told_of_the_end_may_still_be_late() -> None:
    broker = Broker()
    async with managed() as manager:
        stream = await manager.subscribe(broker.source(ack_timeout=10, drain_timeout=100)).__aenter__()
        broker.emit(0, 1, 2)
        await take(stream, 2)
        await manager_stops(manager, 10)
        assert broker.outcomes == {0: (1, 0, 0, 0), 1: (0, 1, 0, 0), 2: (0, 0, 0, 1)}
        with pytest.raises(AckTimeout):
            await stream.receive()
        await stream.aclose()


async def manager_stops(manager: SharedStreamManager, seconds: float) -> None:
    """Stop everything, which must take exactly so long."""
    began = anyio.current_time()
    await manager.stop_all()
    assert anyio.current_time() == began + seconds


async def test_overflow_fails_the_one_event_and_releases_the_rest() -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source()) as healthy:
        async with manager.subscribe(broker.source(), max_buffer_size=3) as stream:
            broker.emit(*range(6))
            assert await take(stream, 3) == [0, 1, 2]
            assert await take(healthy, 6) == list(range(6))
            await settle()
            for number in range(6, 8):
                broker.emit(number)
                assert await healthy.receive() == number
                await settle()
            with pytest.raises(SubscriberOverflow):
                await stream.receive()
        finish(healthy)
        await settle()
        outcomes = [broker.outcomes[number] for number in range(8)]
        assert outcomes == [(2, 0, 0, 0)] * 2 + [(1, 1, 0, 0)] + [(1, 0, 0, 1)] * 4 + [outcomes[7]]
        assert broker.clean[7]
