"""Triggers of an acknowledged stream: leaving the runner, policies, restarts, producers by shape, and what a filter is given."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from anyio_sharedstream import AckSubscription, DropOldest, Restart, SharedStreamManager
from anyio_sharedstream._trigger_confirm import ConfirmedStream
from anyio_sharedstream.triggers import (
    BaseEventTrigger,
    TriggerEvent,
    TriggerFailed,
    TriggerFinished,
    TriggerFired,
    TriggerRunner,
)
from tests.ack_support import ACKED, FAILED, RELEASED, Broker, acknowledgement
from tests.support import Feed, idle, settle, until
from tests.sweep import Cut, Reader, managed, nothing_left, sweep
from tests.test_trigger_confirm import Confirmed, confirm
from tests.trigger_support import Events, Shared, every, failure, fired, raising, rest, take
from tests.virtual_time import in_virtual_time

IN_A_SECOND = Restart(initial_delay=1, jitter=0)


async def two(stream: Any) -> Events:
    """Fires for two events, then finishes with a third, of which it fires nothing."""
    for _ in range(2):
        yield TriggerEvent(await stream.receive())
    await stream.receive()


# Leaving the runner.


@in_virtual_time
async def test_leaving_waits_for_what_was_not_confirmed_but_no_longer_than_the_drain_timeout() -> None:
    broker = Broker()
    async with TriggerRunner() as runner:
        runner.start("a", Confirmed(broker, drain_timeout=5))
        broker.emit(0, 1, 2)
        await settle()
        confirm((await take(runner, 2))[1:])  # one is read, one is unread, and the one between waits for both
    assert anyio.current_time() == 5
    assert broker.advanced == []
    assert broker.log == ["stream closed", "closed"]
    unread = await rest(runner)
    assert unread == fired("a", 2)
    confirm(unread)


@in_virtual_time
async def test_leaving_does_not_wait_where_nothing_is_to_be_confirmed() -> None:
    broker = Broker()
    async with TriggerRunner(max_outcomes=1) as runner:
        runner.start("a", Confirmed(broker))
        broker.emit(0, 1, 2)
        await settle()
        confirm(await take(runner, 1))
        await settle()
        confirm(await take(runner, 1))  # now 2 is held back no longer, but its trigger has not gone on
    assert anyio.current_time() == 0
    assert broker.outcomes == {0: ACKED, 1: ACKED, 2: FAILED}


@in_virtual_time
@pytest.mark.parametrize("given", [False, True])
async def test_what_is_confirmed_while_the_runner_is_left_still_counts(given: bool) -> None:
    broker = Broker()

    async def read_late() -> None:
        await anyio.sleep(3)
        confirm(await rest(runner) if given else await take(runner, 3))

    async with managed() as manager, anyio.create_task_group() as tasks, TriggerRunner(manager if given else None) as runner:
        runner.start("a", Confirmed(broker, drain_timeout=5))
        broker.emit(0, 1, 2)
        await settle()
        tasks.start_soon(read_late)
    assert anyio.current_time() == 3
    assert broker.outcomes == {0: ACKED, 1: ACKED, 2: ACKED}


@in_virtual_time
async def test_leaving_under_a_given_manager_leaves_the_wait_to_that() -> None:
    broker = Broker()
    async with SharedStreamManager() as manager:
        async with TriggerRunner(manager) as runner:
            runner.start("a", Confirmed(broker, drain_timeout=5))
            broker.emit(0)
            assert await take(runner, 1) == fired("a", 0)
            await settle()
        assert anyio.current_time() == 0
        assert manager.statistics().groups["broker"].state == "draining"
        await anyio.sleep(4.999)
        assert not idle(manager)
        await anyio.sleep(0.002)
        assert idle(manager)
    assert broker.advanced == []


@in_virtual_time
@pytest.mark.parametrize("joins", ["before", "after"])
async def test_what_a_left_runner_has_not_got_confirmed_does_not_hold_up_the_other_subscribers_for_ever(joins: str) -> None:
    broker = Broker()
    source = broker.source(ack_timeout=10, drain_timeout=5, max_in_flight=2)
    async with SharedStreamManager() as manager:
        other = manager.subscribe(source)
        if joins == "before":
            await other.__aenter__()
        async with TriggerRunner(manager) as runner:
            runner.start("a", Confirmed(broker, ack_timeout=10, drain_timeout=5, max_in_flight=2))
            broker.emit(0, 1)
            assert await take(runner, 2) == fired("a", 0, 1)
            await settle()
        if joins == "after":
            await other.__aenter__()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(Reader(other).run)
            broker.emit(2, 3)
            await anyio.sleep(10.001)
            others = 1 if joins == "before" else 0
            assert [broker.outcomes.get(event) for event in range(4)] == [(others, 1, 0, 0)] * 2 + [ACKED] * 2
            tasks.cancel_scope.cancel()
        await other.aclose()


@in_virtual_time
async def test_the_reader_may_stop_a_trigger_before_it_confirms_what_that_has_fired() -> None:
    broker = Broker()
    async with SharedStreamManager() as manager, TriggerRunner(manager) as runner:
        runner.start("a", Confirmed(broker))
        broker.emit(0, 1)
        outcomes = await take(runner, 2)
        await settle()
        await runner.stop("a")
        assert anyio.current_time() == 0
        confirm(outcomes)
        await until(lambda: idle(manager))
    assert broker.outcomes == {0: ACKED, 1: ACKED}


@in_virtual_time
async def test_a_cancelled_program_ends_within_the_drain_timeout() -> None:
    broker = Broker()
    with anyio.move_on_after(1):
        async with TriggerRunner() as runner:
            runner.start("a", Confirmed(broker, drain_timeout=5))
            broker.emit(0)
            assert await take(runner, 1) == fired("a", 0)
            await anyio.sleep_forever()
    assert anyio.current_time() == 6
    assert broker.log == ["stream closed", "closed"]


# Policies.


async def test_events_that_are_not_confirmed_hold_the_upstream_back() -> None:
    broker = Broker()
    async with SharedStreamManager() as manager, TriggerRunner(manager) as runner:
        runner.start("a", Confirmed(broker, max_in_flight=2))
        broker.emit(*range(6))
        await settle()
        statistics = acknowledgement(manager)
        assert (statistics.in_flight, statistics.max_in_flight, statistics.deferred, statistics.waiting) == (2, 2, 2, True)
        for event in range(6):
            outcomes = await take(runner, 1)
            assert outcomes == fired("a", event)
            assert acknowledgement(manager).in_flight <= 2
            confirm(outcomes)
        await until(lambda: broker.outcomes == dict.fromkeys(range(6), ACKED))


@pytest.mark.parametrize("policy", [{"replay": 5}, {"max_in_flight": 0}, {"ack_timeout": -1}])
async def test_policies_that_make_no_sense_are_the_triggers_failure(policy: dict[str, Any]) -> None:
    async with managed() as manager, TriggerRunner(manager) as runner:
        runner.start("a", Confirmed(Broker(), **policy))
        with pytest.raises(ValueError, match=next(iter(policy))):
            raise await failure(runner)
        assert idle(manager)


async def test_a_lossy_subscription_and_a_key_of_the_other_kind_are_the_triggers_failure() -> None:
    broker = Broker()

    class Lossy(Confirmed):
        def subscription_options(self) -> dict[str, Any]:
            return {"overflow": DropOldest()}

    async with managed() as manager, TriggerRunner(manager) as runner:
        runner.start("a", Confirmed(broker))
        for trigger in (Lossy(broker), Shared(Feed("broker"))):
            runner.start("b", trigger)
            assert isinstance(await failure(runner), ValueError)
        broker.emit(1)
        confirm(await take(runner, 1))
        await until(lambda: broker.outcomes == {1: ACKED})


async def test_what_the_options_refuse_counts_as_acknowledged() -> None:
    broker = Broker()

    class Even(Confirmed):
        def subscription_options(self) -> dict[str, Any]:
            return {"where": lambda event: event % 2 == 0}

    async with TriggerRunner() as runner:
        runner.start("a", Even(broker))
        broker.emit(1, 2, 3)
        outcomes = await take(runner, 1)
        await until(lambda: broker.advanced == [1])
        assert outcomes == fired("a", 2)
        confirm(outcomes)
        await until(lambda: broker.outcomes == {1: ACKED, 2: ACKED, 3: ACKED})


# Restarts.


@in_virtual_time
async def test_after_a_restart_only_what_was_fired_since_counts() -> None:
    broker = Broker()
    async with TriggerRunner() as runner:
        runner.start("a", Confirmed(broker, ack_timeout=10, restart=IN_A_SECOND))
        broker.emit(0, 1)
        before = await take(runner, 2)
        confirm(before[1:])
        await anyio.sleep(5)
        broker.fail(OSError("gone"))
        await anyio.sleep(2)
        broker.emit(0, 1)  # the broker delivers again
        since = await take(runner, 2)
        confirm(before)
        await settle()
        assert broker.advanced == []
        await anyio.sleep(5)
        assert anyio.current_time() > 10  # too late for those before, but not for these
        confirm(since)
        await settle()
        assert broker.outcomes == {0: ACKED, 1: ACKED}
        assert broker.opened == 2


@in_virtual_time
@pytest.mark.parametrize("events", [every, two])
async def test_what_a_failed_upstream_has_left_unconfirmed_is_no_reason_for_a_trigger_to_fail(events: Any) -> None:
    broker = Broker()
    async with TriggerRunner() as runner:
        runner.start("a", Confirmed(broker, events, max_in_flight=2, restart=IN_A_SECOND))
        broker.emit(0)
        stale = await take(runner, 1)
        broker.fail(OSError("gone"))
        await anyio.sleep(2)
        broker.emit(0, 1)
        since = await take(runner, 2)
        assert anyio.current_time() == 2
        assert since == [*fired("a", 0), fired("a", 1)[0] if events is every else TriggerFinished("a")]
        confirm(stale)
        confirm(since[: 2 if events is every else 1])
        await settle()
        assert broker.outcomes == {0: ACKED, 1: ACKED}


@in_virtual_time
async def test_an_event_that_is_taken_before_a_restart_and_fired_after_it_is_not_advanced() -> None:
    broker, may_fire = Broker(), anyio.Event()

    async def events(stream: Any) -> Events:
        async for event in stream:
            await may_fire.wait()
            yield TriggerEvent(event)

    async with TriggerRunner() as runner:
        runner.start("a", Confirmed(broker, events, restart=IN_A_SECOND))
        broker.emit("x")
        await settle()
        broker.fail(OSError("gone"))
        await anyio.sleep(2)
        may_fire.set()
        confirm(await take(runner, 1))
        await settle()
        assert broker.advanced == []
        broker.emit("x")
        confirm(await take(runner, 1))
        await settle()
        assert broker.outcomes == {"x": ACKED}


# Producers by shape.


class Log:
    """A producer by shape, as Kafka's in Airflow: a cumulative commit per lane, that holds at the first that is not clean."""

    def __init__(self, records: Sequence[tuple[str, int]]) -> None:
        self.records = records
        self.committed: dict[str, int] = {}
        self.held: list[tuple[str, int]] = []
        self.closed = 0

    async def open_stream(self) -> Any:
        for partition, offset in self.records:
            yield f"{partition}{offset}", {"partition": partition, "offset": offset}
        await anyio.sleep_forever()

    def get_advance_lane(self, broker_payload: Any) -> str:
        lane: str = broker_payload["partition"]
        return lane

    async def advance(self, batch: Any) -> None:
        await checkpoint()
        for payload, outcome in batch:
            partition, offset = payload["partition"], payload["offset"]
            if outcome.is_clean and partition not in dict(self.held):
                self.committed[partition] = offset
            else:
                self.held.append((partition, offset))

    async def aclose(self) -> None:
        self.closed += 1


def airflow() -> type[Any]:
    """Shaped like Airflow's: nothing of ours, but of the same name."""

    class BaseEventTrigger:
        def __init__(self, log: Log) -> None:
            self.log = log

        def serialize(self) -> tuple[str, dict[str, Any]]:
            return "airflow", {"log": self.log}

        def shared_stream_key(self) -> str:
            return "log"

        @classmethod
        async def open_shared_stream(cls, kwargs: dict[str, Any]) -> Any:
            async for event, _ in kwargs["log"].open_stream():
                yield event

        @classmethod
        def create_shared_stream_producer(cls, kwargs: dict[str, Any]) -> Any:
            raise NotImplementedError

        def filter_shared_stream(self, shared_stream: Any) -> Events:
            return every(shared_stream)

    return BaseEventTrigger


async def test_a_class_and_a_producer_shaped_as_in_airflow_work_as_they_are() -> None:
    log = Log([("a", 0), ("b", 0), ("a", 1), ("b", 1)])

    class Kafka(airflow()):  # type: ignore[misc]
        @classmethod
        def create_shared_stream_producer(cls, kwargs: dict[str, Any]) -> Any:
            return kwargs["log"]

    class Orders(Kafka):
        async def filter_shared_stream(self, shared_stream: Any) -> Events:
            async for event in shared_stream:
                if event == "b0":
                    shared_stream.reject()
                else:
                    yield TriggerEvent(event)

    async with TriggerRunner() as runner:
        runner.start("kafka", Orders(log))
        outcomes = await take(runner, 3)
        assert outcomes == fired("kafka", "a0", "a1", "b1")
        await until(lambda: log.held == [("b", 0)])
        confirm(outcomes[1:])
        await until(lambda: log.held == [("b", 0), ("b", 1)])
        assert log.committed == {}
        confirm(outcomes[:1])
        await until(lambda: log.committed == {"a": 1})
    assert log.closed == 1


async def test_a_base_class_as_in_airflow_that_only_says_how_producers_are_created_changes_nothing() -> None:
    log = Log([("a", 0)])
    trigger = type("Shared", (airflow(),), {})(log)
    for base in (trigger, BaseEventTrigger):
        with pytest.raises(NotImplementedError):
            base.create_shared_stream_producer({})
    async with SharedStreamManager() as manager, TriggerRunner(manager) as runner:
        runner.start("a", trigger)
        assert await take(runner, 1) == fired("a", "a0")
        assert manager.statistics().groups["log"].acknowledgement is None


async def test_a_trigger_by_shape_needs_no_more_than_the_methods_that_are_called() -> None:
    advanced: list[tuple[Any, bool]] = []

    class Producer:
        async def open_stream(self) -> Any:
            yield "event", "payload"
            await anyio.sleep_forever()

        async def advance(self, batch: Any) -> None:
            advanced.extend((payload, outcome.is_clean) for payload, outcome in batch)

    class Duck:
        def serialize(self) -> tuple[str, dict[str, Any]]:
            return "Duck", {"producer": Producer()}

        def shared_stream_key(self) -> str:
            return "ducks"

        @staticmethod
        def create_shared_stream_producer(kwargs: dict[str, Any]) -> Any:
            return kwargs["producer"]

        def filter_shared_stream(self, shared_stream: Any) -> Events:
            return every(shared_stream)

    duck: Any = Duck()
    async with TriggerRunner() as runner:
        runner.start("duck", duck)
        confirm(await take(runner, 1))
        await until(lambda: advanced == [("payload", True)])


async def test_what_creating_a_producer_raises_is_every_triggers_outcome() -> None:
    class Broken(Confirmed):
        @classmethod
        def create_shared_stream_producer(cls, kwargs: dict[str, Any]) -> Any:
            raise LookupError("no broker")

    broker = Broker()
    async with managed() as manager, TriggerRunner(manager) as runner:
        for trigger_id in ("a", "b"):
            runner.start(trigger_id, Broken(broker))
        for _ in range(2):
            assert repr(await failure(runner)) == repr(LookupError("no broker"))
        await until(lambda: idle(manager))


# What a filter is given.


def public(cls: type[Any]) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_")}


def test_the_stream_of_a_filter_has_all_of_the_methods_of_a_subscription() -> None:
    assert public(ConfirmedStream) == public(AckSubscription)
    for name in public(AckSubscription):
        ours, theirs = getattr(ConfirmedStream, name), getattr(AckSubscription, name)
        assert isinstance(ours, property) == isinstance(theirs, property)
        if not isinstance(ours, property):
            assert [*inspect.signature(ours).parameters] == [*inspect.signature(theirs).parameters]
            assert inspect.iscoroutinefunction(ours) == inspect.iscoroutinefunction(theirs)


async def test_the_stream_of_a_filter_does_what_a_subscription_does() -> None:
    broker = Broker()

    async def events(stream: Any) -> Events:
        yield TriggerEvent("ready")
        await settle()
        assert (stream.key, repr(stream.subscriber_id), stream.epoch) == ("broker", "<trigger 'a'>", 1)
        assert stream.receive_nowait() == 0
        assert await stream.receive() == 1
        assert await anext(stream) == 2
        assert aiter(stream) is stream
        assert await stream.receive_batch(2) == (3, 4)
        batches = stream.batches(2)
        assert await anext(aiter(batches)) == (5, 6)
        assert stream.statistics().events_current == 2
        with pytest.raises(anyio.WouldBlock):
            stream.receive_nowait()
        assert stream.statistics().events_current == 0
        stream.close()
        with pytest.raises(anyio.ClosedResourceError):
            await stream.receive()
        await stream.aclose()
        yield TriggerEvent("closed")

    async with TriggerRunner() as runner:
        runner.start("a", Confirmed(broker, events))
        broker.emit(*range(7))
        assert await take(runner, 3) == [*fired("a", "ready", "closed"), TriggerFinished("a")]
        await until(lambda: broker.outcomes == dict.fromkeys(range(7), ACKED))


@pytest.mark.parametrize("error", [None, ValueError()])
async def test_the_stream_of_a_filter_may_be_left_and_that_speaks_for_what_is_current(error: Exception | None) -> None:
    broker = Broker()
    leave = list if error is None else raising(error)

    async def events(stream: Any) -> Events:
        async with stream:
            yield TriggerEvent(await stream.receive())
            await stream.receive()
            leave()

    async with TriggerRunner() as runner:
        runner.start("a", Confirmed(broker, events))
        broker.emit(0, 1, 2)
        confirm(await take(runner, 1))
        [ending] = await take(runner, 1)
        assert ending == (TriggerFinished("a") if error is None else TriggerFailed("a", error))
        await until(lambda: broker.outcomes == {0: ACKED, 1: ACKED if error is None else FAILED, 2: RELEASED})


async def test_batches_end_with_the_stream() -> None:
    broker = Broker()

    async def events(stream: Any) -> Events:
        async for batch in stream.batches(5):
            yield TriggerEvent(batch)
        yield TriggerEvent("end")

    async with SharedStreamManager() as manager, TriggerRunner(manager) as runner, anyio.create_task_group() as tasks:
        runner.start("a", Confirmed(broker, events))
        broker.emit(0, 1)
        outcomes = await take(runner, 1)
        tasks.start_soon(manager.stop, "broker")
        assert await take(runner, 2) == [*fired("a", "end"), TriggerFinished("a")]
        assert outcomes == fired("a", (0, 1))
        confirm(outcomes)
    assert broker.outcomes == {0: ACKED, 1: ACKED}


@pytest.mark.parametrize("method", ["receive_batch", "batches"])
async def test_a_bad_size_is_an_error_at_once_and_acknowledges_nothing(method: str) -> None:
    broker = Broker()

    async def events(stream: Any) -> Events:
        yield TriggerEvent(await stream.receive())
        with pytest.raises(ValueError, match="max_size"):
            await getattr(stream, method)(0)
        await anyio.sleep_forever()

    async with TriggerRunner() as runner:
        runner.start("a", Confirmed(broker, events))
        broker.emit(0)
        confirm(await take(runner, 1))
        await settle()
        assert broker.advanced == []
        await runner.stop("a")
        assert broker.outcomes == {0: FAILED}


# A reader that is cancelled.


async def read(runner: TriggerRunner, taken: list[TriggerFired], done: list[TriggerFired], total: int) -> None:
    while len(taken) < total:
        outcome = await runner.outcomes.receive()
        assert isinstance(outcome, TriggerFired)
        taken.append(outcome)
        await checkpoint()
        outcome.confirm()
        done.append(outcome)
        await checkpoint()


@pytest.mark.parametrize("max_outcomes", [1, 2, 1024])
async def test_a_reader_that_is_cancelled_anywhere_loses_nothing_and_confirms_nothing_that_it_has_not(max_outcomes: int) -> None:
    async def trial(cut: Cut) -> None:
        broker = Broker()
        taken: list[TriggerFired] = []
        done: list[TriggerFired] = []
        async with managed() as manager, TriggerRunner(manager, max_outcomes=max_outcomes) as runner:
            runner.start("a", Confirmed(broker))
            broker.emit(*range(3))
            await cut.run(read(runner, taken, done, 3))
            unconfirmed = [outcome for outcome in taken if outcome not in done]
            assert len(unconfirmed) <= 1
            await until(lambda: broker.advanced == [outcome.event.payload for outcome in done])
            broker.emit(3)
            await read(runner, taken, done, 4)
            await settle()
            if unconfirmed:
                assert broker.advanced == [outcome.event.payload for outcome in taken[: taken.index(unconfirmed[0])]]
            confirm(unconfirmed)
            await until(lambda: broker.outcomes == dict.fromkeys(range(4), ACKED))
            assert broker.advanced == list(range(4))
            assert taken == fired("a", *range(4))

    assert await sweep(trial) >= 6


@in_virtual_time
async def test_a_whole_program_that_is_cancelled_anywhere_has_advanced_clean_what_was_confirmed_and_gone_on_from() -> None:
    async def trial(cut: Cut) -> None:
        broker = Broker()
        taken: list[TriggerFired] = []
        done: list[TriggerFired] = []
        gone_on: list[Any] = []

        async def events(stream: Any) -> Events:
            async for event in stream:
                yield TriggerEvent(event)
                gone_on.append(event)

        async def program() -> None:
            async with TriggerRunner() as runner:
                runner.start("a", Confirmed(broker, events, drain_timeout=5))
                broker.emit(*range(3))
                await read(runner, taken, done, 3)

        started = anyio.current_time()
        async with nothing_left():
            await cut.run(program())
        assert anyio.current_time() - started in (0, 5)
        confirmed = [outcome.event.payload for outcome in done]
        assert [event for event in broker.advanced if broker.clean[event]] == [each for each in confirmed if each in gone_on]
        assert broker.log.count("closed") == broker.opened

    assert await sweep(trial) >= 6


@in_virtual_time
async def test_what_is_fired_of_an_event_whose_upstream_has_gone_since_is_fired_all_the_same() -> None:
    broker = Broker()

    async def twice(stream: Any) -> Events:
        assert repr(stream) == "<AckSubscription <trigger 'a'> of 'broker'>"
        event = await stream.receive()
        yield TriggerEvent(event)
        await anyio.sleep(5)
        yield TriggerEvent(event)
        await stream.receive()

    async with TriggerRunner() as runner:
        runner.start("a", Confirmed(broker, twice, restart=IN_A_SECOND))
        broker.emit(1)
        first = await take(runner, 1)
        broker.fail(ConnectionError())
        await anyio.sleep(6)
        second = await take(runner, 1)
        assert first == second == fired("a", 1)
        confirm([*first, *second])
        broker.emit(1)
        assert await take(runner, 1) == [TriggerFinished("a")]
    assert broker.outcomes == {1: ACKED}
