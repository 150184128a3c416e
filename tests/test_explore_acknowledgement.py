"""The lessons about acknowledgement, each under many orders of its tasks."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, Literal

import anyio
import pytest
from anyio import CancelScope, Event, create_task_group

from anyio_sharedstream import AckTimeout, AdvanceItem, Pending, Restart, SubscriberOverflow
from tests.ack_support import Broker, acknowledgement, finish
from tests.explore_support import Gate, Scenario, at_once, cancel_soon, dawdle, holds, subscribed
from tests.support import until
from tests.sweep import managed

pytestmark = pytest.mark.usefixtures("unlogged")

EVENTS = 6


class SlowBroker(Broker):
    """A broker to which and from which everything takes a while."""

    async def advance(self, batch: Sequence[AdvanceItem[Any]]) -> None:
        await dawdle()
        await super().advance(batch)

    async def deliver(self) -> None:
        """Hand over all events, by and by."""
        for event in range(EVENTS):
            self.emit(event)
            await dawdle()

    @property
    def complete(self) -> bool:
        """Whether all events were advanced, once each and in the order of their lanes."""
        lanes: dict[Any, list[int]] = {}
        for lane, events in self.batches:
            lanes.setdefault(lane, []).extend(events)
        assert all(first < second for events in lanes.values() for first, second in pairwise(events))
        return sum(map(len, lanes.values())) == EVENTS


async def handle_all(stream: Any, most: int = 3) -> None:
    for event in range(EVENTS):
        assert await stream.receive() == event
        await dawdle(most)
    finish(stream)


async def take(stream: Any, in_hand: list[int]) -> None:
    """Take the next event. Whoever asks for it has done with the one before."""
    in_hand.clear()
    in_hand.append(await stream.receive())


def spoilt(broker: Broker, in_hand: list[int]) -> None:
    """Somebody has failed with what it had in hand, and with nothing else."""
    assert [event for event, counts in broker.outcomes.items() if counts[1]] == in_hand
    assert [event for event in range(EVENTS) if not broker.clean[event]] == in_hand


async def lesson_22_a_consumer_that_crashes_in_the_middle_of_an_event_has_not_acknowledged_it() -> None:
    broker = SlowBroker()
    in_hand: list[int] = []
    way = random.choice(["crash", "cancelled", "closed"])

    async def crash(scope: CancelScope) -> None:
        with scope, suppress(ZeroDivisionError):
            async with manager.subscribe(broker.source()) as stream:
                joined.come()
                for _ in range(random.randrange(1, EVENTS)):
                    await dawdle()
                    await take(stream, in_hand)
                await dawdle()
                if way == "crash":
                    raise ZeroDivisionError
                if way == "closed":
                    stream.close()
                await anyio.sleep_forever()

    joined = Gate(1)
    async with managed() as manager, create_task_group() as tasks, manager.subscribe(broker.source()) as other:
        scope = CancelScope()
        tasks.start_soon(crash, scope)
        await joined.wait()
        tasks.start_soon(broker.deliver)
        tasks.start_soon(handle_all, other)
        if way != "crash":
            tasks.start_soon(cancel_soon, scope)
        await until(lambda: broker.complete)
    spoilt(broker, in_hand)


async def lesson_23_an_overflow_does_not_touch_what_was_handled_before() -> None:
    broker = SlowBroker()
    in_hand: list[int] = []

    async def fall_behind() -> None:
        async with manager.subscribe(broker.source(), max_buffer_size=1) as stream:
            joined.come()
            with suppress(SubscriberOverflow):
                while in_hand != [EVENTS - 1] and subscribed(manager, stream):
                    await take(stream, in_hand)
                    await dawdle(20)
            if subscribed(manager, stream):
                finish(stream)  # it has kept up
                in_hand.clear()
            await until(lambda: broker.complete)

    joined = Gate(1)
    async with managed() as manager, create_task_group() as tasks, manager.subscribe(broker.source()) as other:
        tasks.start_soon(fall_behind)
        await joined.wait()
        tasks.start_soon(broker.deliver)
        await handle_all(other)
        await until(lambda: broker.complete)
    spoilt(broker, in_hand)


async def lesson_23_nor_does_a_timeout() -> None:
    broker = SlowBroker()
    in_hand: list[int] = []
    hangs_at = random.randrange(EVENTS)

    async def hang() -> None:
        async with manager.subscribe(broker.source(ack_timeout=10)) as stream:
            joined.come()
            with suppress(AckTimeout):
                while True:
                    await take(stream, in_hand)
                    await anyio.sleep(100 if in_hand == [hangs_at] else random.randrange(10))

    joined = Gate(1)
    async with managed() as manager, create_task_group() as tasks, manager.subscribe(broker.source(ack_timeout=10)) as other:
        tasks.start_soon(hang)
        await joined.wait()
        tasks.start_soon(broker.deliver)
        await handle_all(other)
        await anyio.sleep(200)
        assert broker.complete
    spoilt(broker, [hangs_at])


async def lesson_24_who_takes_one_event_and_leaves_gets_it_committed_before_the_group_stops() -> None:
    broker = SlowBroker()
    broker.emit(0)

    async def visit() -> None:
        async with manager.subscribe(broker.source()):
            await dawdle()

    async with managed() as manager:
        async with create_task_group() as tasks:
            tasks.start_soon(at_once, 2, visit)
            async with manager.subscribe(broker.source()) as stream:
                assert await stream.receive() == 0
                await dawdle()
        await until(lambda: broker.log)
        assert broker.advanced == [0]
        assert broker.clean == {0: True}


async def lesson_25_who_takes_batches_or_looks_ahead_is_not_done_with_what_it_has_in_hand() -> None:
    class Careful(SlowBroker):
        async def advance(self, batch: Sequence[AdvanceItem[Any]]) -> None:
            assert {item.broker_payload[1] for item in batch} <= done
            await super().advance(batch)

    broker = Careful()
    done: set[int] = set()

    async def work(events: tuple[int, ...], pending: Pending) -> None:
        await dawdle(8)
        done.update(events)
        pending.ack()

    async with managed() as manager, create_task_group() as tasks, manager.subscribe(broker.source()) as stream:
        tasks.start_soon(broker.deliver)
        taken = 0
        while taken < EVENTS:
            batch = await stream.receive_batch(3)
            taken += len(batch)
            tasks.start_soon(work, batch, stream.defer())
            await dawdle()
        await until(lambda: broker.complete)


async def lesson_26_what_a_leaver_never_took_does_not_spoil_what_others_have_handled() -> None:
    broker = SlowBroker()

    async def leave() -> None:
        with suppress(ZeroDivisionError):
            async with manager.subscribe(broker.source()):
                joined.come()
                await dawdle(20)
                raise ZeroDivisionError

    joined = Gate(2)
    async with managed() as manager, create_task_group() as tasks:
        tasks.start_soon(at_once, 2, leave)
        async with manager.subscribe(broker.source()) as stream:
            await joined.wait()
            tasks.start_soon(broker.deliver)
            await handle_all(stream)
            await until(lambda: broker.complete)
    spoilt(broker, [])


async def lesson_27_a_steady_consumer_with_a_queue_is_not_late() -> None:
    broker = SlowBroker()
    broker.emit(*range(EVENTS))

    async def subscribe() -> None:
        async with manager.subscribe(broker.source(ack_timeout=10)) as stream:
            for event in range(EVENTS):
                assert await stream.receive() == event
                await anyio.sleep(random.randrange(10))
            finish(stream)
            handled.come()
            await until(lambda: broker.complete)

    handled = Gate(1)
    async with managed() as manager:
        await subscribe()
    spoilt(broker, [])


async def lesson_28_a_slow_or_failing_or_hung_commit_stops_no_other_partition() -> None:
    broker = SlowBroker(lane=lambda event: event % 3)
    broker.blocked[0] = Event()
    broker.refusing[1] = ConnectionError()
    source = broker.source(advance_retry=Restart(initial_delay=1, max_delay=1, max_restarts=None, jitter=0))
    async with managed() as manager, create_task_group() as tasks, manager.subscribe(source) as stream:
        tasks.start_soon(broker.deliver)
        await handle_all(stream)
        await until(lambda: broker.advanced == [2, 5])
        broker.blocked[0].set()
        await until(lambda: sorted(broker.advanced) == [0, 2, 3, 5])
        broker.refusing.clear()
        await anyio.sleep(2)
        assert broker.complete
    spoilt(broker, [])


async def lesson_29_behind_a_hung_commit_there_is_never_more_than_the_bound() -> None:
    broker = SlowBroker()
    broker.blocked[None] = Event()

    async def watch() -> None:
        while True:
            assert acknowledgement(manager).in_flight <= 2
            await anyio.lowlevel.checkpoint()

    async with managed() as manager, create_task_group() as tasks, manager.subscribe(broker.source(max_in_flight=2)) as stream:
        tasks.start_soon(watch)
        tasks.start_soon(broker.deliver)
        assert [await stream.receive(), await stream.receive()] == [0, 1]
        finish(stream)
        await dawdle(20)
        assert broker.pulled <= 3  # one may be fetched, and wait
        assert not broker.advanced
        broker.blocked[None].set()
        for event in range(2, EVENTS):
            assert await stream.receive() == event
        finish(stream)
        await until(lambda: broker.complete)
        tasks.cancel_scope.cancel()


async def lesson_30_a_cumulative_commit_can_hold_at_the_first_failure() -> None:
    class Cumulative(SlowBroker):
        async def advance(self, batch: Sequence[AdvanceItem[Any]]) -> None:
            await super().advance(batch)
            for item in batch:
                if item.outcome.is_clean and len(committed) == item.broker_payload[1]:
                    committed.append(item.broker_payload[1])

    broker = Cumulative()
    committed: list[int] = []
    bad = random.randrange(EVENTS)

    async def work(event: int, pending: Pending) -> None:
        await dawdle(8)
        if event == bad:
            pending.fail()
        else:
            pending.ack()

    async with managed() as manager, create_task_group() as tasks, manager.subscribe(broker.source()) as stream:
        tasks.start_soon(broker.deliver)
        for event in range(EVENTS):
            assert await stream.receive() == event
            tasks.start_soon(work, event, stream.defer())
        await until(lambda: broker.complete)
    assert committed == [*range(bad)]


async def lesson_31_a_word_is_about_the_subscriptions_event_whoever_pulled_it() -> None:
    broker = SlowBroker()
    said: dict[int, str] = {}

    async def in_another_task(function: Callable[[], Any]) -> Any:
        results: list[Any] = []

        async def call() -> None:
            await dawdle()
            result = function()
            results.append(await result if hasattr(result, "__await__") else result)

        await at_once(1, call)
        return results[0]

    async with (
        managed() as manager,
        create_task_group() as tasks,
        manager.subscribe(broker.source()) as stream,
        manager.subscribe(broker.source()) as other,
    ):
        tasks.start_soon(broker.deliver)
        tasks.start_soon(handle_all, other)
        for event in range(EVENTS):
            assert await in_another_task(stream.receive) == event
            said[event] = random.choice(["fail", "reject"])
            await in_another_task(getattr(stream, said[event]))
        await until(lambda: broker.complete)
    assert broker.outcomes == {event: (1, said[event] == "fail", said[event] == "reject", 0) for event in range(EVENTS)}


SCENARIOS: list[Scenario] = [
    lesson_22_a_consumer_that_crashes_in_the_middle_of_an_event_has_not_acknowledged_it,
    lesson_23_an_overflow_does_not_touch_what_was_handled_before,
    lesson_23_nor_does_a_timeout,
    lesson_24_who_takes_one_event_and_leaves_gets_it_committed_before_the_group_stops,
    lesson_25_who_takes_batches_or_looks_ahead_is_not_done_with_what_it_has_in_hand,
    lesson_26_what_a_leaver_never_took_does_not_spoil_what_others_have_handled,
    lesson_27_a_steady_consumer_with_a_queue_is_not_late,
    lesson_28_a_slow_or_failing_or_hung_commit_stops_no_other_partition,
    lesson_29_behind_a_hung_commit_there_is_never_more_than_the_bound,
    lesson_30_a_cumulative_commit_can_hold_at_the_first_failure,
    lesson_31_a_word_is_about_the_subscriptions_event_whoever_pulled_it,
]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_lesson_holds_in_any_order(scenario: Scenario, backend: Literal["asyncio", "trio"]) -> None:
    holds(scenario, backend)
