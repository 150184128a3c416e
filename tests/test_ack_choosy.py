"""Acknowledgement by those who choose: with `where` and `routes`, with a policy, and with marks between their events."""

from __future__ import annotations

import math
from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest

from anyio_sharedstream import AckSubscription, Block, Gap, Restart, SharedStreamManager, SubscriberOverflow
from tests.ack_support import ACKED, REJECTED, Broker
from tests.contract_support import drain, even
from tests.support import settle, until
from tests.sweep import managed
from tests.virtual_time import in_virtual_time

AT_ONCE = Restart(initial_delay=0, jitter=0)


def tens(number: int) -> int:
    return number // 10


def yes(event: object) -> bool:
    return True


# What is refused.


async def test_what_a_predicate_refuses_counts_as_acknowledged_and_is_not_waited_for() -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source(), where=even) as stream:
        broker.emit(1, 3, 5)
        await settle()
        assert broker.outcomes == {1: ACKED, 3: ACKED, 5: ACKED}
        assert all(broker.clean.values())
        broker.emit(6, 7, 8, 9)
        assert await stream.receive() == 6
        await settle()
        assert broker.advanced == [1, 3, 5]
        stream.reject()
        await settle()
        assert broker.outcomes[6] == REJECTED
        assert broker.advanced == [1, 3, 5, 6, 7]
        assert await stream.receive() == 8
        assert stream.statistics().events_refused == 5
    assert broker.outcomes == {**dict.fromkeys((1, 3, 5, 7, 8, 9), ACKED), 6: REJECTED}


async def test_an_event_waits_for_those_who_asked_for_its_route_and_counts_as_acknowledged_by_the_others() -> None:
    broker = Broker()
    source = broker.source(route_by=tens)
    async with (
        managed() as manager,
        manager.subscribe(source, routes={0}) as zero,
        manager.subscribe(source, routes={1}) as one,
        manager.subscribe(source, routes={0, 1}, where=even) as evens,
    ):
        broker.emit(0, 10, 1, 20, 11)
        await settle()
        assert not broker.outcomes  # of one lane, and the first waits for two
        assert await zero.receive() == await evens.receive() == 0
        zero.fail()
        assert await evens.receive() == 10
        assert await one.receive_batch(9) == (10, 11)
        await settle()
        assert broker.outcomes == {0: (2, 1, 0, 0)}
        one.reject()
        with pytest.raises(anyio.WouldBlock):
            evens.receive_nowait()
        await settle()
        assert broker.outcomes == {0: (2, 1, 0, 0), 10: (2, 0, 1, 0)}
        assert await zero.receive() == 1
        with pytest.raises(anyio.WouldBlock):
            zero.receive_nowait()
        await settle()
        assert broker.outcomes == {0: (2, 1, 0, 0), 10: (2, 0, 1, 0), 1: (3, 0, 0, 0), 20: (3, 0, 0, 0), 11: (2, 0, 1, 0)}
        broker.emit(30)
        await settle()
        assert broker.outcomes[30] == (3, 0, 0, 0)


@pytest.mark.parametrize("taken", range(4))
async def test_a_leaver_that_chose_releases_what_it_was_given_and_has_not_taken_and_nothing_else(taken: int) -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source()) as stays:
        async with manager.subscribe(broker.source(), where=even) as stream:
            for start in (0, 3):  # two publications
                broker.emit(*range(start, start + 3))
                await settle()
            assert await stays.receive_batch(9) == tuple(range(6))
            stays.defer().ack()
            assert [await stream.receive() for _ in range(taken)] == [0, 2, 4][:taken]
            await settle()
            assert broker.advanced == [*range(6)][: max(0, 2 * taken - 2)]
        await settle()
        released = dict.fromkeys([0, 2, 4][taken:], (1, 0, 0, 1))
        assert broker.outcomes == {**dict.fromkeys(range(6), (2, 0, 0, 0)), **released}


async def test_those_who_choose_and_those_who_take_everything_are_counted_alike_in_every_publication() -> None:
    broker = Broker()
    divisors = [1, 2, 3, 4]
    async with managed() as manager, AsyncExitStack() as stack:

        async def join(divisor: int) -> AckSubscription[Any]:
            return await stack.enter_async_context(
                manager.subscribe(broker.source(), where=None if divisor == 1 else lambda event: event % divisor == 0)
            )

        streams = [await join(divisor) for divisor in divisors]
        for size in (1, 7, 64, 100):
            first = broker.pulled
            broker.emit(*range(first, first + size))
            await until(lambda first=first, size=size: broker.pulled == first + size)  # type: ignore[misc]
            await settle()
            for stream, divisor in zip(streams, divisors, strict=True):
                assert drain(stream) == [event for event in range(first, first + size) if event % divisor == 0]
            await settle()
            assert broker.advanced == [*range(first + size)]
        assert set(broker.outcomes.values()) == {(4, 0, 0, 0)}


# Policies, and marks.


@pytest.mark.parametrize("options", [{}, {"where": even}], ids=["", "where"])
async def test_who_blocks_holds_the_upstream_by_its_buffer_and_acknowledges_like_everybody(options: Any) -> None:
    broker = Broker()
    async with (
        managed() as manager,
        manager.subscribe(broker.source(), overflow=Block(math.inf), max_buffer_size=2, **options) as stream,
        manager.subscribe(broker.source()) as other,
    ):
        broker.emit(*range(0, 20, 2))
        await settle()
        assert broker.pulled == 2
        got = []
        for taken in range(1, 9):
            got.append(await stream.receive())
            await settle()
            assert broker.pulled == taken + 2
            assert drain(other) == ([0, 2, 4] if taken == 1 else [2 * taken + 2])
            await settle()
            assert broker.advanced == got[:-1]
        stream.fail()
        assert await stream.receive_batch(9) == (16, 18)
        stream.reject()
        await settle()
    assert broker.outcomes == {
        **dict.fromkeys(range(0, 14, 2), (2, 0, 0, 0)),
        14: (1, 1, 0, 0),
        16: (1, 0, 1, 0),
        18: (1, 0, 1, 0),
    }


@in_virtual_time
async def test_who_blocks_for_too_long_fails_what_it_was_at_and_releases_the_rest() -> None:
    broker = Broker()
    async with (
        managed() as manager,
        manager.subscribe(broker.source(), overflow=Block(5), max_buffer_size=2) as stream,
        manager.subscribe(broker.source()) as other,
    ):
        broker.emit(*range(6))
        await settle()
        assert [await stream.receive() for _ in range(2)] == [0, 1]
        await settle()
        assert drain(other) == [0, 1, 2, 3]
        await anyio.sleep(5.001)
        with pytest.raises(SubscriberOverflow):
            await stream.receive()
        assert drain(other) == [4, 5]
        await settle()
        expected = {0: (2, 0, 0, 0), 1: (1, 1, 0, 0), 2: (1, 0, 0, 1), 3: (1, 0, 0, 1), 4: ACKED, 5: ACKED}
        assert broker.outcomes == expected


@pytest.mark.parametrize("options", [{}, {"overflow": Block(1)}, {"where": yes}], ids=["", "block", "where"])
async def test_gaps_are_no_events_there_is_nothing_to_say_of_them_and_they_acknowledge_what_came_before(options: Any) -> None:
    broker = Broker()
    source = broker.source(restart=AT_ONCE)
    async with managed() as manager, manager.subscribe(source, gaps=True, **options) as stream:
        broker.emit(1, 2, 3)
        assert await stream.receive() == 1
        assert await stream.receive() == 2
        await settle()
        assert broker.outcomes == {1: ACKED}
        broker.fail(OSError("lost"))
        await until(lambda: broker.opened == 2)
        broker.emit(2, 3, 4)
        await settle()
        assert await stream.receive() == Gap(None, "restart")
        assert stream.statistics().events_current == 0
        for speak in (stream.fail, stream.reject, stream.defer):
            with pytest.raises(RuntimeError, match="no current event"):
                speak()
        assert await stream.receive() == 2
        broker.fail(OSError("lost"))
        await until(lambda: broker.opened == 3)
        broker.emit(2, 3, 4)
        await settle()
        assert await stream.receive_batch(3) == (Gap(None, "restart"), 2, 3)
        assert stream.statistics().events_current == 2
        stream.reject()
        assert await stream.receive_batch(3) == (4,)
    assert broker.outcomes == {1: ACKED, 2: REJECTED, 3: REJECTED, 4: ACKED}
    assert broker.advanced == [1, 2, 3, 4]


async def test_a_gap_is_given_behind_what_was_taken_and_nothing_of_what_was_buffered_follows_it() -> None:
    broker = Broker()
    async with SharedStreamManager() as manager, manager.subscribe(broker.source(restart=AT_ONCE), gaps=True) as stream:
        broker.emit(1, 2, 3)
        assert await stream.receive_batch(2) == (1, 2)
        for opened in (2, 3, 4):  # several in a row are one gap
            broker.fail(OSError("lost"))
            await until(lambda opened=opened: broker.opened == opened)  # type: ignore[misc]
            broker.emit(opened)
            await settle()
        assert drain(stream) == [Gap(None, "restart"), 4]
        await settle()
        assert broker.outcomes == {4: ACKED}


async def test_what_is_said_of_a_batch_from_two_publications_is_said_of_nothing_behind_it() -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source(), where=yes) as stream:
        for events in ((1,), (2, 3, 4, 5)):
            broker.emit(*events)
            await settle()
        assert await stream.receive_batch(3) == (1, 2, 3)
        stream.reject()
        assert await stream.receive_batch(3) == (4, 5)
    assert broker.outcomes == {**dict.fromkeys((1, 2, 3), REJECTED), 4: ACKED, 5: ACKED}


async def test_who_chooses_and_takes_nothing_turn_after_turn_fails_at_its_bound() -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source()) as other:
        async with manager.subscribe(broker.source(), where=yes, max_buffer_size=2) as stream:
            for number in range(3):
                broker.emit(number)
                await settle()
            with pytest.raises(SubscriberOverflow):
                await stream.receive()
        assert await other.receive_batch(3) == (0, 1, 2)
    assert broker.outcomes == dict.fromkeys(range(3), (1, 0, 0, 1))
