"""The way back: in order within a lane, lanes side by side, and what becomes of an `advance` that waits or fails."""

from __future__ import annotations

import math

import anyio
import pytest

from anyio_sharedstream import Restart
from tests.ack_support import Broker, acknowledgement, finish, take
from tests.support import settle, until
from tests.sweep import managed
from tests.virtual_time import in_virtual_time


def by_letter(event: str) -> str:
    return event[0]


def lettered() -> Broker:
    """A broker whose lanes are the first letters of its events."""
    return Broker(lane=by_letter)


async def test_each_lane_is_advanced_in_the_order_of_publication_whoever_finishes_first() -> None:
    broker = lettered()
    events = [f"{letter}{number}" for number in range(20) for letter in "abc"]
    async with managed() as manager, manager.subscribe(broker.source()) as one, manager.subscribe(broker.source()) as other:
        for start in range(0, 60, 7):
            broker.emit(*events[start : start + 7])
            await settle()
        pending = []
        for _ in events:
            await one.receive()
            pending.append(one.defer())
        await take(other, 60)
        finish(other)
        # Resolved in a wild order: a step of 37 goes through all sixty.
        for place in range(60):
            pending[place * 37 % 60].ack()
            await settle(3)
            for letter in "abc":
                assert [event for event in broker.advanced if event[0] == letter] == [
                    f"{letter}{number}" for number in range(sum(event[0] == letter for event in broker.advanced))
                ]
        await until(lambda: len(broker.advanced) == 60)
        assert set(broker.outcomes.values()) == {(2, 0, 0, 0)}


async def test_a_batch_is_what_is_resolved_up_to_the_first_event_that_is_not() -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source()) as stream:
        broker.emit(*range(7))
        pending = []
        for _ in range(7):
            await stream.receive()
            pending.append(stream.defer())
        for place in (1, 2, 4):
            pending[place].ack()
        await settle()
        assert broker.batches == []
        pending[0].ack()
        await settle()
        assert broker.batches == [(None, [0, 1, 2])]
        pending[5].ack()
        await settle()
        assert broker.batches == [(None, [0, 1, 2])]
        pending[3].reject()
        await settle()
        assert broker.batches == [(None, [0, 1, 2]), (None, [3, 4, 5])]
        assert [broker.clean[event] for event in range(6)] == [True, True, True, False, True, True]
        pending[6].ack()


async def test_lanes_are_advanced_side_by_side_up_to_the_bound_and_each_once_at_a_time() -> None:
    broker = lettered()
    broker.blocked = {letter: anyio.Event() for letter in "abcde"}
    async with managed() as manager, manager.subscribe(broker.source(max_concurrent_advances=3)) as stream:
        broker.emit("a1", "b1", "c1", "d1", "e1")
        await take(stream, 5)
        finish(stream)
        await until(lambda: broker.attempts == 3)
        broker.emit("a2", "b2", "a3")
        await take(stream, 3)
        finish(stream)
        await settle()
        assert broker.attempts == 3
        assert (acknowledgement(manager).advancing, acknowledgement(manager).lanes) == (3, 5)
        broker.blocked.pop("a").set()
        await until(lambda: broker.attempts == 4)
        await settle()
        assert broker.batches == [("a", ["a1"])]
        assert broker.attempts == 4
        for letter in "bcde":
            broker.blocked.pop(letter).set()
        await until(lambda: len(broker.advanced) == 8)
        assert ("a", ["a2", "a3"]) in broker.batches
        assert acknowledgement(manager).lanes == acknowledgement(manager).advancing == acknowledgement(manager).in_flight == 0
        assert acknowledgement(manager).events_advanced == 8


async def test_a_hung_lane_holds_no_other_up_while_somebody_is_free() -> None:
    broker = lettered()
    broker.blocked["a"] = anyio.Event()
    async with managed() as manager, manager.subscribe(broker.source(max_concurrent_advances=2)) as stream:
        broker.emit("a1")
        await take(stream, 1)
        finish(stream)
        await settle()
        for number in range(50):
            event = f"{'bcdefgh'[number % 7]}{number}"
            broker.emit(event, f"a{number + 2}")
            await take(stream, 2)
            finish(stream)
            await settle()
            assert broker.advanced[-1] == event
        broker.blocked["a"].set()
        await until(lambda: len(broker.advanced) == 101)
        assert [event for event in broker.advanced if event[0] == "a"] == [f"a{number}" for number in range(1, 52)]


async def test_a_lane_that_waits_for_a_resolution_holds_no_other_up_and_occupies_nobody() -> None:
    broker = lettered()
    async with managed() as manager, manager.subscribe(broker.source(max_concurrent_advances=1)) as stream:
        broker.emit("a1", "a2", "b1")
        await stream.receive()
        pending = stream.defer()
        await take(stream, 2)
        finish(stream)
        await settle()
        assert broker.batches == [("b", ["b1"])]
        assert acknowledgement(manager).in_flight == 2
        pending.ack()
        await settle()
        assert broker.batches == [("b", ["b1"]), ("a", ["a1", "a2"])]


@in_virtual_time
async def test_a_lane_that_is_tried_again_holds_no_other_up_even_with_one_worker() -> None:
    broker = lettered()
    broker.refusing["a"] = ConnectionError("lost")
    retry = Restart(initial_delay=1, factor=2, max_delay=4, jitter=0)
    source = broker.source(max_concurrent_advances=1, advance_retry=retry)
    async with managed() as manager, manager.subscribe(source) as stream:
        tried: list[tuple[float, int]] = []
        broker.emit("a1", "a2")
        await take(stream, 2)
        finish(stream)
        # At 0, 1, 3, 7, 11 and 15.
        for now in range(13):
            await anyio.sleep_until(now + 0.5)
            tried.append((now, broker.attempts))
            broker.emit(f"b{now}")
            await stream.receive()
            finish(stream)
            await settle()
            assert broker.advanced[-1] == f"b{now}"
            assert acknowledgement(manager).retrying == 1
            broker.attempts -= 1
        assert [attempts for _, attempts in tried] == [1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5]
        broker.emit("a3")
        await stream.receive()
        finish(stream)
        del broker.refusing["a"]
        await anyio.sleep_until(14.9)
        assert [event for event in broker.advanced if event[0] == "a"] == []
        await anyio.sleep_until(15.1)
        # What has been resolved meanwhile goes with it.
        assert broker.batches[-1] == ("a", ["a1", "a2", "a3"])
        assert acknowledgement(manager).retrying == acknowledgement(manager).in_flight == 0


@in_virtual_time
async def test_the_delays_between_tries_grow_however_short_the_longest_is() -> None:
    broker = Broker()
    broker.refusing[None] = ConnectionError("lost")
    retry = Restart(initial_delay=0.125, max_delay=0.5, jitter=0)
    async with managed() as manager, manager.subscribe(broker.source(advance_retry=retry)) as stream:
        broker.emit(0)
        await stream.receive()
        finish(stream)
        # At 0, 1/8, 3/8, 7/8 and 11/8.
        await anyio.sleep(1.5)
        assert broker.attempts == 5
        del broker.refusing[None]


@in_virtual_time
async def test_a_success_lets_the_delays_and_the_count_of_tries_begin_anew() -> None:
    broker = Broker()
    retry = Restart(initial_delay=1, factor=10, max_delay=100, jitter=0, max_restarts=2, within=math.inf)
    async with managed() as manager, manager.subscribe(broker.source(advance_retry=retry)) as stream:
        for number in range(5):
            began = anyio.current_time()
            broker.refusing[None] = ConnectionError("lost")
            broker.emit(number)
            await stream.receive()
            finish(stream)
            await anyio.sleep_until(began + 1.5)
            assert broker.attempts == 2
            del broker.refusing[None]
            await anyio.sleep_until(began + 10.9)
            assert broker.advanced == list(range(number))
            await anyio.sleep_until(began + 11.1)
            assert broker.advanced == list(range(number + 1))
            broker.attempts = 0


@in_virtual_time
async def test_after_its_last_try_a_failure_of_advance_is_the_upstreams_failure_after_what_is_buffered() -> None:
    broker = Broker()
    broker.refusing[None] = error = ConnectionError("lost", 42)
    retry = Restart(initial_delay=1, factor=1, max_delay=1, jitter=0, max_restarts=2)
    async with managed() as manager:
        stream = await manager.subscribe(broker.source(advance_retry=retry)).__aenter__()
        broker.emit(*range(4))
        assert await take(stream, 2) == [0, 1]
        await anyio.sleep_until(1.9)
        assert broker.attempts == 2
        assert "broker" in manager.statistics().groups
        await anyio.sleep_until(2.1)
        assert broker.attempts == 3
        assert not manager.statistics().groups
        # Not drained: nobody could be told.
        assert broker.log == ["stream closed", "closed"]
        assert await take(stream, 2) == [2, 3]
        with pytest.raises(ConnectionError) as caught:
            await stream.receive()
        assert caught.value.args == error.args
        assert caught.value is not error
        await stream.aclose()
        assert broker.advanced == []
        assert broker.attempts == 3


@pytest.mark.parametrize(
    "retry",
    [None, Restart(max_restarts=0), Restart(on=KeyError), Restart(on=(KeyError, OSError)), Restart(on=lambda exc: False)],
    ids=["never", "no tries", "another type", "other types", "a function"],
)
async def test_what_is_not_to_be_tried_again_fails_at_once(retry: Restart | None) -> None:
    broker = Broker()
    broker.refusing[None] = ZeroDivisionError()
    async with managed() as manager, manager.subscribe(broker.source(advance_retry=retry)) as stream:
        broker.emit(0)
        await stream.receive()
        with pytest.raises(ZeroDivisionError):
            await stream.receive()
        assert broker.attempts == 1


async def test_a_policy_that_fails_is_the_upstreams_failure_with_what_it_was_asked_about_as_its_cause() -> None:
    broker = Broker()
    broker.refusing[None] = ConnectionError()

    def on(error: Exception) -> bool:
        raise ZeroDivisionError

    async with managed() as manager, manager.subscribe(broker.source(advance_retry=Restart(on=on))) as stream:
        broker.emit(0)
        await stream.receive()
        with pytest.raises(ZeroDivisionError) as caught:
            await stream.receive()
        assert isinstance(caught.value.__cause__, ConnectionError)


async def test_what_is_refused_with_another_outcome_stays_in_its_place() -> None:
    broker = lettered()
    async with managed() as manager, manager.subscribe(broker.source()) as stream:
        broker.emit("a1", "a2", "a3", "b1")
        await stream.receive()
        stream.reject("poison")
        await stream.receive()
        stream.fail("later")
        await take(stream, 2)
        finish(stream)
        await settle()
        # A producer that commits cumulatively must see the failure in its order, among the others.
        assert sorted(broker.batches) == [("a", ["a1", "a2", "a3"]), ("b", ["b1"])]
        assert [broker.outcomes[event] for event in ("a1", "a2", "a3")] == [(0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0)]
