"""Triggers of an acknowledged stream: its events are acknowledged when the runner's reader has confirmed what came of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import nullcontext, suppress
from functools import partial
from itertools import permutations
from math import inf
from typing import Any

import anyio
import pytest
import structlog
from anyio import get_cancelled_exc_class
from anyio.lowlevel import checkpoint
from structlog.testing import LogCapture

from anyio_sharedstream import AckSubscription, AckTimeout, Pending, SharedStreamManager
from anyio_sharedstream.triggers import (
    BaseEventTrigger,
    TriggerEvent,
    TriggerFailed,
    TriggerFinished,
    TriggerFired,
    TriggerOutcome,
    TriggerRunner,
)
from tests.ack_support import ACKED, FAILED, REJECTED, RELEASED, Broker, acknowledgement
from tests.support import Feed, idle, settle, until
from tests.trigger_support import Events, Shared, every, failure, fired, take, yields
from tests.virtual_time import in_virtual_time


class Confirmed(BaseEventTrigger):
    """Shares a broker; fires as its filter says."""

    def __init__(self, broker: Broker, events: Callable[[Any], Events] = every, **policies: Any) -> None:
        self.broker = broker
        self.events = events
        self.policies = policies

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return "tests.test_trigger_confirm.Confirmed", {"broker": self.broker}

    def shared_stream_key(self) -> Any:
        return self.broker.key

    @classmethod
    def create_shared_stream_producer(cls, kwargs: dict[str, Any]) -> Any:
        return kwargs["broker"].source().open()

    def filter_shared_stream(self, shared_stream: Any) -> Events:
        return self.events(shared_stream)

    def shared_stream_policies(self) -> dict[str, Any]:
        return self.policies


def confirm(outcomes: Iterable[TriggerOutcome]) -> None:
    for outcome in outcomes:
        assert isinstance(outcome, TriggerFired)
        outcome.confirm()


async def receiving(stream: Any) -> AsyncIterator[tuple[Any, ...]]:
    while True:
        yield (await stream.receive(),)


async def iterating(stream: Any) -> AsyncIterator[tuple[Any, ...]]:
    async for event in stream:
        yield (event,)


async def polling(stream: Any) -> AsyncIterator[tuple[Any, ...]]:
    while True:
        try:
            yield (stream.receive_nowait(),)
        except anyio.WouldBlock:
            await checkpoint()


async def batching(stream: Any) -> AsyncIterator[tuple[Any, ...]]:
    while True:
        yield await stream.receive_batch(9)


def iterating_batches(stream: Any) -> Any:
    return stream.batches(9)


# When an event is acknowledged.


async def test_a_class_that_creates_a_producer_is_acknowledged_when_what_it_fired_is_confirmed_and_not_when_it_is_read() -> None:
    broker = Broker()
    async with SharedStreamManager() as manager, TriggerRunner(manager) as runner:
        runner.start("a", Confirmed(broker))
        broker.emit(1)
        outcomes = await take(runner, 1)
        assert outcomes == fired("a", 1)
        await settle()
        assert broker.advanced == []
        assert acknowledgement(manager).deferred == 1
        confirm(outcomes)
        await until(lambda: broker.outcomes == {1: ACKED})
        assert acknowledgement(manager).in_flight == acknowledgement(manager).deferred == 0
    assert broker.log == ["stream closed", "closed"]


@pytest.mark.parametrize("take_next", [receiving, iterating, polling, batching, iterating_batches])
@pytest.mark.parametrize("count", range(4))
async def test_all_that_was_fired_must_be_confirmed_and_the_filter_gone_on_in_whatever_order(count: int, take_next: Any) -> None:
    for order in permutations(range(count + 1)):
        broker, may_go_on = Broker(), anyio.Event()

        async def events(stream: Any, may_go_on: anyio.Event = may_go_on) -> Events:
            async for batch in take_next(stream):
                for part in range(count):
                    yield TriggerEvent((*batch, part))
                await may_go_on.wait()

        async with TriggerRunner() as runner:
            runner.start("a", Confirmed(broker, events))
            broker.emit("raw")
            outcomes = await take(runner, count)
            assert outcomes == fired("a", *(("raw", part) for part in range(count)))
            for step in order:
                await settle()
                assert broker.advanced == []
                if step < count:
                    confirm(outcomes[step : step + 1])
                else:
                    may_go_on.set()
            await until(lambda broker=broker: broker.outcomes == {"raw": ACKED})  # type: ignore[misc]


async def test_a_batch_is_acknowledged_as_a_whole() -> None:
    broker = Broker()

    async def events(stream: Any) -> Events:
        async for batch in stream.batches(3):
            for event in batch:
                yield TriggerEvent(event)

    async with TriggerRunner() as runner:
        runner.start("a", Confirmed(broker, events))
        broker.emit(*range(5))
        outcomes = await take(runner, 5)
        confirm(outcomes[1:])
        await settle()
        assert broker.advanced == []  # the second batch must wait for the first
        confirm(outcomes[:1])
        await until(lambda: broker.outcomes == dict.fromkeys(range(5), ACKED))


async def test_events_of_which_nothing_is_fired_need_nobody_and_wait_only_for_those_before_them() -> None:
    broker = Broker()

    async def threes(stream: Any) -> Events:
        async for event in stream:
            if event % 3 == 0:
                yield TriggerEvent(event)

    async with TriggerRunner() as runner:
        runner.start("a", Confirmed(broker, threes))
        broker.emit(1, 2)
        await until(lambda: broker.outcomes == {1: ACKED, 2: ACKED})
        broker.emit(3, 4, 5, 6, 7)
        outcomes = await take(runner, 2)
        await settle()
        assert broker.advanced == [1, 2]
        confirm(outcomes[:1])
        await until(lambda: broker.advanced == [1, 2, 3, 4, 5])
        confirm(outcomes[1:])
        await until(lambda: broker.outcomes == dict.fromkeys(range(1, 8), ACKED))


async def test_to_confirm_twice_is_to_confirm_once() -> None:
    broker = Broker()

    async def twice(stream: Any) -> Events:
        async for event in stream:
            yield TriggerEvent(event)
            yield TriggerEvent(event)

    async with TriggerRunner() as runner:
        runner.start("a", Confirmed(broker, twice))
        broker.emit(1, 2)
        first, second, *others = await take(runner, 4)
        confirm([first, first, first])
        await settle()
        assert broker.advanced == []
        confirm([second, second, first])
        await until(lambda: broker.advanced == [1])
        confirm([*others, *others, first])
        await until(lambda: broker.outcomes == {1: ACKED, 2: ACKED})


async def test_what_is_fired_of_no_event_can_be_confirmed_and_that_means_nothing() -> None:
    broker = Broker()

    async def events(stream: Any) -> Events:
        yield TriggerEvent("ready")
        async for _ in stream:
            pass

    async with TriggerRunner() as runner:
        runner.start("a", Confirmed(broker, events))
        outcomes = await take(runner, 1)
        broker.emit(1)
        await until(lambda: broker.outcomes == {1: ACKED})
        confirm(outcomes)


async def test_where_nothing_is_acknowledged_confirming_does_nothing() -> None:
    feed = Feed()
    confirm(fired("by hand", 1))
    async with TriggerRunner() as runner:
        runner.start("shared", Shared(feed))
        feed.emit(1)
        outcomes = await take(runner, 1)
        runner.start("alone", yields(2))
        outcomes += await take(runner, 1)
        confirm(outcomes * 2)
        assert outcomes == [*fired("shared", 1), *fired("alone", 2)]


async def test_what_confirms_is_no_part_of_the_outcomes_value() -> None:
    broker = Broker()
    async with TriggerRunner() as runner:
        runner.start("a", Confirmed(broker))
        broker.emit(1)
        outcomes = await take(runner, 1)
        assert outcomes == fired("a", 1)
        assert hash(outcomes[0]) == hash(fired("a", 1)[0])
        assert repr(outcomes) == repr(fired("a", 1))
        confirm(outcomes)


# What the filter says itself.


@pytest.mark.parametrize("verb", ["reject", "fail"])
@pytest.mark.parametrize("when", ["before", "after", "after confirmed"])
async def test_what_the_filter_says_of_an_event_counts_at_once_whether_or_not_it_has_fired(verb: str, when: str) -> None:
    broker, may_speak = Broker(), anyio.Event()

    async def events(stream: AckSubscription[Any]) -> Events:
        event = await stream.receive()
        if when != "before":
            yield TriggerEvent(event)
            await may_speak.wait()
        getattr(stream, verb)("not for us")
        for method in (stream.reject, stream.fail, stream.defer):
            with pytest.raises(RuntimeError, match="no current event"):
                method()
        yield TriggerEvent(event)
        await stream.receive()

    async with TriggerRunner() as runner:
        runner.start("a", Confirmed(broker, events))
        broker.emit(0)
        outcomes = await take(runner, 1)
        if when == "after confirmed":
            confirm(outcomes)
        await settle()
        may_speak.set()
        await until(lambda: broker.outcomes == {0: REJECTED if verb == "reject" else FAILED})
        confirm(outcomes)
        await settle()
        assert broker.attempts == 1


async def test_what_the_filter_defers_before_it_fires_is_its_own_affair() -> None:
    broker = Broker()
    pending: list[Pending] = []

    async def events(stream: AckSubscription[Any]) -> Events:
        async for event in stream:
            pending.append(stream.defer())
            yield TriggerEvent(event)
            with pytest.raises(RuntimeError, match="no current event"):
                stream.reject()

    async with TriggerRunner() as runner:
        runner.start("a", Confirmed(broker, events))
        broker.emit(0, 1)
        confirm(await take(runner, 2))
        await settle()
        assert broker.advanced == []
        pending[1].reject()
        pending[0].ack()
        await until(lambda: broker.outcomes == {0: ACKED, 1: REJECTED})


async def test_what_has_fired_cannot_be_deferred_as_well() -> None:
    broker = Broker()

    async def events(stream: AckSubscription[Any]) -> Events:
        async for event in stream:
            yield TriggerEvent(event)
            with pytest.raises(RuntimeError, match="no current event"):
                stream.defer()

    async with TriggerRunner() as runner:
        runner.start("a", Confirmed(broker, events))
        broker.emit(0)
        outcomes = await take(runner, 1)
        await settle()
        assert broker.advanced == []
        confirm(outcomes)
        await until(lambda: broker.outcomes == {0: ACKED})


# Time.


@in_virtual_time
async def test_what_is_not_confirmed_in_time_has_failed_and_confirming_it_later_does_nothing() -> None:
    broker = Broker()
    async with TriggerRunner() as runner:
        runner.start("a", Confirmed(broker, ack_timeout=10))
        for start in (1, 100):  # the clock has ended in between
            await anyio.sleep_until(start)
            broker.emit(start, start + 1, start + 2)
            unread_until_now = await take(runner, 3)
            await anyio.sleep_until(start + 5)
            confirm(unread_until_now[1:2])
            broker.emit(start + 3)
            await anyio.sleep_until(start + 9.999)
            assert start not in broker.outcomes
            await anyio.sleep_until(start + 10.001)
            assert [broker.outcomes[start + offset] for offset in range(3)] == [FAILED, ACKED, FAILED]
            confirm(unread_until_now)
            confirm(await take(runner, 1))
            await settle()
            assert broker.outcomes[start + 3] == ACKED
    assert broker.advanced == [1, 2, 3, 4, 100, 101, 102, 103]


@in_virtual_time
async def test_the_time_counts_from_the_first_that_was_fired_read_or_not_and_until_the_filter_goes_on() -> None:
    broker = Broker()

    async def slowly(stream: Any) -> Events:
        while True:
            event = await stream.receive()
            await anyio.sleep(3)
            yield TriggerEvent(event)
            await anyio.sleep(4)
            yield TriggerEvent(event)
            await anyio.sleep(5)

    async with TriggerRunner() as runner:
        runner.start("a", Confirmed(broker, slowly, ack_timeout=8))
        broker.emit(1, 2)
        await anyio.sleep(10.999)
        assert broker.advanced == []
        await anyio.sleep(0.002)
        assert broker.outcomes == {1: FAILED}
        confirm(await take(runner, 2))
        # It is not the trigger that is late: it goes on, from 12 on.
        assert await take(runner, 2) == fired("a", 2, 2)
        assert anyio.current_time() == 19
        await anyio.sleep_until(22.999)
        assert broker.advanced == [1]
        await anyio.sleep(0.002)
        assert broker.outcomes == {1: FAILED, 2: FAILED}


@in_virtual_time
async def test_of_two_triggers_the_one_that_is_not_confirmed_fails_alone() -> None:
    broker = Broker()
    async with TriggerRunner() as runner:
        runner.start("confirmed", Confirmed(broker, ack_timeout=10))
        runner.start("not", Confirmed(broker, ack_timeout=10))
        broker.emit(1, 2)
        outcomes = await take(runner, 4)
        await anyio.sleep(1)
        broker.emit(3)
        outcomes += await take(runner, 2)
        confirm(outcome for outcome in outcomes if outcome.trigger_id == "confirmed")
        await anyio.sleep(8.999)
        assert broker.advanced == []
        await anyio.sleep(0.002)
        assert broker.outcomes == {1: (1, 1, 0, 0), 2: (1, 1, 0, 0)}
        confirm(outcomes)
        await settle()
        assert broker.outcomes[3] == (2, 0, 0, 0)


@in_virtual_time
async def test_a_filter_that_takes_too_long_before_it_fires_fails_alone() -> None:
    broker = Broker()

    async def slowly(stream: Any) -> Events:
        async for event in stream:
            await anyio.sleep(11)
            yield TriggerEvent(event)

    async with TriggerRunner() as runner:
        runner.start("slow", Confirmed(broker, slowly, ack_timeout=10))
        runner.start("a", Confirmed(broker, ack_timeout=10))
        broker.emit(1)
        confirm(await take(runner, 1))
        assert await take(runner, 1) == fired("slow", 1)
        assert broker.outcomes == {1: (1, 1, 0, 0)}
        assert isinstance(await failure(runner), AckTimeout)
        assert anyio.current_time() == 11


@in_virtual_time
async def test_a_trigger_that_full_outcomes_hold_back_is_not_late_but_what_it_fires_is_not_confirmed_in_time() -> None:
    broker = Broker()
    async with TriggerRunner(max_outcomes=1) as runner:
        runner.start("a", Confirmed(broker, ack_timeout=10))
        broker.emit(1, 2, 3)
        await anyio.sleep(9)
        assert broker.advanced == []
        await anyio.sleep(1.001)  # 1 is unread, 2 is held back, 3 has not been taken
        assert broker.outcomes == {1: FAILED, 2: FAILED}
        confirm(await take(runner, 3))
        await settle()
        assert broker.outcomes == {1: FAILED, 2: FAILED, 3: ACKED}


@in_virtual_time
async def test_when_the_reader_has_closed_outcomes_everything_that_is_fired_fails_in_time_and_triggers_go_on() -> None:
    broker = Broker()
    async with TriggerRunner(max_outcomes=1) as runner:
        runner.start("a", Confirmed(broker, ack_timeout=10, max_in_flight=3))
        broker.emit(*range(6))
        await settle()
        await runner.outcomes.aclose()
        await anyio.sleep(9.999)
        assert broker.advanced == []
        await anyio.sleep(0.002)
        assert broker.outcomes == dict.fromkeys(range(3), FAILED)
        await anyio.sleep(10)
        assert broker.outcomes == dict.fromkeys(range(6), FAILED)


@in_virtual_time
async def test_without_a_timeout_confirming_may_take_for_ever() -> None:
    broker = Broker()
    async with TriggerRunner() as runner:
        runner.start("a", Confirmed(broker, ack_timeout=inf))
        broker.emit(0)
        outcomes = await take(runner, 1)
        await anyio.sleep(80_000)
        assert broker.advanced == []
        confirm(outcomes)
        await settle()
        assert broker.outcomes == {0: ACKED}


@in_virtual_time
async def test_what_the_filter_says_of_what_was_not_confirmed_in_time_comes_too_late() -> None:
    broker = Broker()

    async def events(stream: Any) -> Events:
        for say in (stream.reject, stream.fail):
            yield TriggerEvent(await stream.receive())
            await anyio.sleep(11)
            say()
        await anyio.sleep_forever()

    async with TriggerRunner() as runner:
        runner.start("a", Confirmed(broker, events, ack_timeout=10))
        broker.emit(0, 1)
        await anyio.sleep(30)
        assert broker.outcomes == {0: FAILED, 1: FAILED}
        assert broker.attempts == 2
        confirm(await take(runner, 2))


# How a trigger ends.


@pytest.mark.parametrize("reader", ["unread", "read", "confirmed"])
@pytest.mark.parametrize("end", ["fails", "stopped", "finishes"])
@pytest.mark.parametrize("gone_on", [False, True])
async def test_an_end_fails_what_the_trigger_was_at_unless_it_is_a_good_one_and_leaves_the_rest_to_the_reader(
    reader: str, end: str, gone_on: bool
) -> None:
    broker, may_end = Broker(), anyio.Event()

    async def events(stream: Any) -> Events:
        yield TriggerEvent(await stream.receive())
        if gone_on:
            await stream.receive()
        await may_end.wait()
        if end == "fails":
            raise ValueError

    async with TriggerRunner() as runner:
        runner.start("a", Confirmed(broker, events))
        broker.emit(0, *[1] * gone_on)
        await settle()
        outcomes = [] if reader == "unread" else await take(runner, 1)
        confirm(outcomes if reader == "confirmed" else [])
        if end == "stopped":
            await runner.stop("a")  # which does not wait for whoever has called it to confirm something
        else:
            may_end.set()
            await settle()
        spoilt = not gone_on and end != "finishes"
        await settle()
        assert (0 in broker.outcomes) == (spoilt or reader == "confirmed")
        confirm(outcomes or await take(runner, 1))
        at_the_end = ACKED if end == "finishes" else FAILED
        expected = {0: ACKED, 1: at_the_end} if gone_on else {0: at_the_end}
        await until(lambda: broker.outcomes == expected)
        kinds: dict[str, list[type]] = {"fails": [TriggerFailed], "stopped": [], "finishes": [TriggerFinished]}
        endings = kinds[end]
        assert [type(outcome) for outcome in await take(runner, len(endings))] == endings


@in_virtual_time
async def test_after_a_trigger_has_finished_the_time_for_confirming_runs_on_and_the_log_says_when_it_has_passed() -> None:
    broker, lines = Broker(), LogCapture()

    async def once(stream: Any) -> Events:
        yield TriggerEvent(await stream.receive())

    async with TriggerRunner(logger=structlog.wrap_logger(None, processors=[lines])) as runner:
        for confirmed in (True, False):
            runner.start("a", Confirmed(broker, once, ack_timeout=10))
            broker.emit(confirmed)
            outcomes = await take(runner, 2)
            assert outcomes == [*fired("a", confirmed), TriggerFinished("a")]
            await anyio.sleep(9.999)
            assert confirmed not in broker.outcomes
            confirm(outcomes[:confirmed])
            await anyio.sleep(0.002)
            assert broker.outcomes[confirmed] == (ACKED if confirmed else FAILED)
    failed = [line["reason"] for line in lines.entries if line["event"] == "events failed"]
    assert failed == ["not confirmed within 10 seconds"]
    assert broker.log == ["stream closed", "closed"] * 2


async def rests(stream: Any, swallows: bool) -> Events:
    with suppress(get_cancelled_exc_class()) if swallows else nullcontext():
        while True:
            yield TriggerEvent(await stream.receive())


async def is_busy(stream: Any, swallows: bool) -> Events:
    with suppress(get_cancelled_exc_class()) if swallows else nullcontext():
        await stream.receive()
        await anyio.sleep_forever()
    yield TriggerEvent("stopped")


@in_virtual_time
@pytest.mark.parametrize("events", [rests, is_busy])
@pytest.mark.parametrize("swallows", [False, True])
@pytest.mark.parametrize("end", ["stopped", "all is cancelled"])
async def test_a_trigger_that_is_stopped_has_failed_what_it_was_at_held_back_or_busy_and_whatever_it_does_about_it(
    events: Any, swallows: bool, end: str
) -> None:
    broker = Broker()
    with anyio.CancelScope() as scope:
        async with TriggerRunner(max_outcomes=1) as runner:
            runner.start("filler", yields("full"))
            await settle()
            runner.start("a", Confirmed(broker, partial(events, swallows=swallows)))
            broker.emit(0, 1)
            await settle()
            if end == "stopped":
                await runner.stop("a")
            scope.cancel()
            with anyio.CancelScope(shield=True):  # so that the trigger is told before the runner is left
                await settle()
    assert anyio.current_time() == 0
    assert broker.outcomes == {0: FAILED, 1: RELEASED}


async def test_after_a_failure_of_the_stream_and_after_a_stop_of_its_key_what_was_fired_can_be_confirmed() -> None:
    for end in ("failure", "stop"):
        broker = Broker()
        async with SharedStreamManager() as manager, TriggerRunner(manager) as runner, anyio.create_task_group() as tasks:
            runner.start("a", Confirmed(broker))
            broker.emit(0, 1)
            outcomes = await take(runner, 1)
            if end == "failure":
                broker.fail(OSError("gone"))
            else:
                tasks.start_soon(manager.stop, "broker")
            outcomes += await take(runner, 1)
            [ending] = await take(runner, 1)
            assert isinstance(ending, TriggerFailed if end == "failure" else TriggerFinished)
            await settle()
            assert broker.log == (["stream closed"] if end == "failure" else [])
            confirm(outcomes)
            await until(lambda manager=manager: idle(manager))  # type: ignore[misc]
            assert broker.outcomes == {0: ACKED, 1: ACKED}
            assert broker.log == ["stream closed", "closed"]
