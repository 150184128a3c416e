"""`anyio_sharedstream.triggers`: what each trigger's fate is, and that it is nobody else's."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from anyio import CancelScope, get_cancelled_exc_class, sleep_forever
from anyio.lowlevel import checkpoint

from anyio_sharedstream import PollTerminated, SharedStreamError, SharedStreamManager, SubscriberOverflow, Subscription, triggers
from anyio_sharedstream.triggers import (
    BaseEventTrigger,
    EventTrigger,
    TriggerEvent,
    TriggerFailed,
    TriggerFinished,
    TriggerFired,
    TriggerOutcome,
    TriggerRunner,
)
from tests.support import Feed, idle, settle, until

Events = AsyncIterator[TriggerEvent]


async def every(stream: AsyncIterable[Any]) -> Events:
    async for event in stream:
        yield TriggerEvent(event)


class Shared(BaseEventTrigger):
    """Shares a feed; fires as its filter says."""

    def __init__(self, feed: Feed, events: Callable[[Subscription[Any]], Events] = every) -> None:
        self.feed = feed
        self.events = events

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return "tests.test_triggers.Shared", {"feed": self.feed, "trigger": self}

    def shared_stream_key(self) -> Any:
        return self.feed.key

    @classmethod
    def open_shared_stream(cls, kwargs: dict[str, Any]) -> Any:
        return kwargs["feed"].source.open()

    def filter_shared_stream(self, shared_stream: Subscription[Any]) -> Events:
        return self.events(shared_stream)


def alone(run: Callable[[], object]) -> Any:
    """A trigger without a key, written against nothing but what the runner calls."""
    return SimpleNamespace(shared_stream_key=lambda: None, run=run)


def yields(*payloads: Any) -> Any:
    """A trigger that fires with each of these, then finishes."""

    async def run() -> Events:
        for payload in payloads:
            yield TriggerEvent(payload)

    return alone(run)


class Waits:
    """A trigger's own loop that waits to be woken, and records its clean-up; *clean_up* is awaited, shielded, before that."""

    def __init__(self, clean_up: Callable[[], Any] = checkpoint) -> None:
        self.clean_up = clean_up
        self.wake = anyio.Event()
        self.started = 0
        self.cleaned_up = 0

    async def __call__(self) -> Events:
        self.started += 1
        try:
            await self.wake.wait()
            yield TriggerEvent("awake")
        finally:
            with CancelScope(shield=True):
                await self.clean_up()
            self.cleaned_up += 1


def fired(trigger_id: Any, *payloads: Any) -> list[TriggerOutcome]:
    return [TriggerFired(trigger_id, TriggerEvent(payload)) for payload in payloads]


async def take(runner: TriggerRunner, count: int) -> list[TriggerOutcome]:
    return [await runner.outcomes.receive() for _ in range(count)]


async def rest(runner: TriggerRunner) -> list[TriggerOutcome]:
    """What can still be read once the runner has been left."""
    return [outcome async for outcome in runner.outcomes]


async def failure(runner: TriggerRunner) -> Exception:
    outcome = await runner.outcomes.receive()
    assert isinstance(outcome, TriggerFailed)
    return outcome.error


async def cancellation() -> BaseException:
    """A cancellation that has lost its scope."""
    with CancelScope() as scope:
        scope.cancel()
        try:
            await checkpoint()
        except get_cancelled_exc_class() as exc:
            stray = exc
            raise
    return stray


# What the names are.


def test_public_names() -> None:
    for name in triggers.__all__:
        assert hasattr(triggers, name)
    for public in (BaseEventTrigger, EventTrigger, TriggerEvent, TriggerFired, TriggerFailed, TriggerFinished, TriggerRunner):
        assert public.__doc__
        assert public.__name__ in triggers.__all__


def test_values() -> None:
    assert TriggerFired("a", TriggerEvent(1)) == TriggerFired("a", TriggerEvent(1)) != TriggerFired("a", TriggerEvent(2))
    assert TriggerFinished("a") == TriggerFinished("a") != TriggerFinished("b")
    error = ValueError()
    assert TriggerFailed("a", error) == TriggerFailed("a", error)
    with pytest.raises(AttributeError):
        TriggerEvent(1).payload = 2  # type: ignore[misc]


def test_the_protocol_needs_no_base_class() -> None:
    assert isinstance(Shared(Feed()), EventTrigger)
    assert not isinstance(object(), EventTrigger)
    with pytest.raises(TypeError, match="serialize"):
        BaseEventTrigger()  # type: ignore[abstract]


@pytest.mark.parametrize("bound", [0, -1, True, 1.5, math.nan, "1", None])
def test_bad_bound(bound: Any) -> None:
    with pytest.raises(ValueError, match=f"max_outcomes .*not {bound!r}"):
        TriggerRunner(max_outcomes=bound)


# Sharing.


async def test_many_triggers_share_one_scan() -> None:
    feed = Feed()
    async with TriggerRunner() as runner:
        for number in range(50):
            runner.start(number, Shared(feed))
        feed.emit("x")
        assert {outcome.trigger_id for outcome in await take(runner, 50)} == set(range(50))
        assert feed.opened == 1
    assert feed.closed == 1
    assert await rest(runner) == []


async def test_the_first_trigger_opens_the_stream() -> None:
    feed = Feed()
    opened: list[Any] = []

    class Recorded(Shared):
        @classmethod
        def open_shared_stream(cls, kwargs: dict[str, Any]) -> Any:
            opened.append(kwargs["trigger"])
            return super().open_shared_stream(kwargs)

    first, second = Recorded(feed), Recorded(feed)
    async with TriggerRunner() as runner:
        runner.start("first", first)
        runner.start("second", second)
        await settle()
        assert opened == [first]


@pytest.mark.parametrize("attempt", range(5))
async def test_nothing_is_missed_from_start_on(attempt: int) -> None:
    feed = Feed()
    async with TriggerRunner() as runner:
        runner.start("a", Shared(feed))
        await settle()
        runner.start("b", Shared(feed))
        feed.emit(attempt)
        outcomes = await take(runner, 2)
        assert sorted(str(outcome.trigger_id) for outcome in outcomes) == ["a", "b"]


async def test_each_filter_sees_everything_and_fires_for_its_own() -> None:
    feed = Feed()

    def only(wanted: int) -> Callable[[Subscription[Any]], Events]:
        async def events(stream: Subscription[Any]) -> Events:
            async for event in stream:
                if event == wanted:
                    yield TriggerEvent(event)
                    return

        return events

    async with TriggerRunner() as runner:
        for number in (1, 2):
            runner.start(number, Shared(feed, only(number)))
        feed.emit(0, 2, 1)
        outcomes = await take(runner, 4)
        for number in (1, 2):
            assert [outcome for outcome in outcomes if outcome.trigger_id == number] == [
                *fired(number, number),
                TriggerFinished(number),
            ]
        runner.start("never", Shared(feed, only(3)))
        await settle()
        await runner.stop("never")


async def test_duck_typed_and_shared() -> None:
    feed = Feed()

    class Duck:
        def serialize(self) -> tuple[str, dict[str, Any]]:
            return "Duck", {"feed": feed}

        def shared_stream_key(self) -> str:
            return "ducks"

        @staticmethod
        def open_shared_stream(kwargs: dict[str, Any]) -> Any:
            return kwargs["feed"].source.open()

        def filter_shared_stream(self, shared_stream: Any) -> Events:
            return every(shared_stream)

    duck: Any = Duck()  # without `run`, which nobody calls
    async with TriggerRunner() as runner:
        runner.start("duck", duck)
        feed.emit(1)
        assert await take(runner, 1) == fired("duck", 1)


async def test_two_runners_share_one_manager() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager:
        async with (
            TriggerRunner(manager) as one,
            TriggerRunner(manager) as two,
            manager.subscribe(feed.source, subscriber_id="a"),
        ):
            one.start("a", Shared(feed))
            two.start("a", Shared(feed))
            feed.emit(1)
            assert await take(one, 1) == await take(two, 1) == fired("a", 1)
            assert feed.opened == 1
            await one.stop("a")
            feed.emit(2)
            assert await take(two, 1) == fired("a", 2)
            ids = [subscription.subscriber_id for subscription in manager.statistics().groups["feed"].subscriptions]
            assert [repr(subscriber_id) for subscriber_id in ids] == ["'a'", "<trigger 'a'>"]
        assert idle(manager)
        async with manager.subscribe(feed.source):
            pass  # it was not closed by the runners


async def test_leaving_waits_for_the_streams_of_a_given_manager() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager:
        async with TriggerRunner(manager) as runner:
            runner.start("a", Shared(feed))
            runner.start("b", Shared(feed))
            await settle()
        assert feed.closed == 1
        assert idle(manager)


async def test_a_given_manager_that_is_not_running_fails_the_trigger() -> None:
    async with TriggerRunner(SharedStreamManager()) as runner:
        runner.start("a", Shared(Feed()))
        assert isinstance(await failure(runner), RuntimeError)


# Ends.


async def test_its_own_loop() -> None:
    waits = Waits()
    async with TriggerRunner() as runner:
        runner.start("a", yields(1, 2))
        assert await take(runner, 3) == [*fired("a", 1, 2), TriggerFinished("a")]
        runner.start("b", alone(waits))
        await settle()
        waits.wake.set()
        assert await take(runner, 2) == [*fired("b", "awake"), TriggerFinished("b")]


async def test_failure_is_nobody_elses_problem() -> None:
    feed = Feed()

    async def bad(stream: Subscription[Any]) -> Events:
        yield TriggerEvent(await stream.receive())
        raise ValueError("bad")

    async def bad_alone() -> Events:
        yield TriggerEvent(1)
        raise LookupError

    async with TriggerRunner() as runner:
        runner.start("bad", Shared(feed, bad))
        runner.start("good", Shared(feed))
        feed.emit(1)
        outcomes = await take(runner, 3)
        [failed] = [outcome for outcome in outcomes if isinstance(outcome, TriggerFailed)]
        assert failed.trigger_id == "bad"
        assert str(failed.error) == "bad"
        feed.emit(2)
        assert await take(runner, 1) == fired("good", 2)
        runner.start("bad", alone(bad_alone))
        assert await take(runner, 1) == fired("bad", 1)
        assert isinstance(await failure(runner), LookupError)


async def test_upstream_failure_reaches_each_as_its_own_after_what_had_fired() -> None:
    feed = Feed()
    async with TriggerRunner() as runner:
        runner.start("a", Shared(feed))
        runner.start("b", Shared(feed))
        feed.emit(1, 2)
        feed.fail(OSError(5, "gone"))
        outcomes = await take(runner, 6)
        errors = []
        for trigger_id in ("a", "b"):
            *events, failed = [outcome for outcome in outcomes if outcome.trigger_id == trigger_id]
            assert events == fired(trigger_id, 1, 2)
            assert isinstance(failed, TriggerFailed)
            errors.append(failed.error)
        assert [repr(error) for error in errors] == [repr(OSError(5, "gone"))] * 2
        assert errors[0] is not errors[1]


async def test_upstream_that_returns_is_a_failure() -> None:
    feed = Feed()
    async with TriggerRunner() as runner:
        runner.start("a", Shared(feed))
        feed.end()
        assert isinstance(await failure(runner), PollTerminated)


async def test_a_stopped_stream_finishes_its_triggers() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, TriggerRunner(manager) as runner:
        runner.start("a", Shared(feed))
        feed.emit(1)
        await settle()
        await manager.stop("feed")
        assert await take(runner, 2) == [*fired("a", 1), TriggerFinished("a")]


async def test_an_outcome_does_not_wait_for_the_upstream_to_close() -> None:
    feed = Feed()
    feed.clean_up = anyio.Event()

    async def once(stream: Subscription[Any]) -> Events:
        yield TriggerEvent(await stream.receive())

    async with TriggerRunner() as runner:
        runner.start("a", Shared(feed, once))
        feed.emit(1)
        assert await take(runner, 2) == [*fired("a", 1), TriggerFinished("a")]
        assert feed.closed == 0
        feed.clean_up.set()
    assert feed.closed == 1


def raising(error: BaseException) -> Callable[..., Any]:
    def method(*_: object) -> Any:
        raise error

    return method


@pytest.mark.parametrize("method", ["shared_stream_key", "serialize", "filter_shared_stream", "open_shared_stream"])
async def test_what_its_methods_raise_is_its_outcome(method: str) -> None:
    error = ValueError(method)
    broken = type("Broken", (Shared,), {method: raising(error)})(Feed())
    async with SharedStreamManager() as manager, TriggerRunner(manager) as runner:
        runner.start("a", broken)
        seen = await failure(runner)
        assert repr(seen) == repr(error)
        await until(lambda: idle(manager))
        runner.start("a", yields())
        assert await take(runner, 1) == [TriggerFinished("a")]


async def test_what_its_loop_raises_when_called_is_its_outcome() -> None:
    error = ValueError()
    async with TriggerRunner() as runner:
        runner.start("a", alone(raising(error)))
        assert await failure(runner) is error


@pytest.mark.parametrize("missing", ["serialize", "shared_stream_key", "filter_shared_stream", "run"])
async def test_what_is_no_trigger(missing: str) -> None:
    methods = {"shared_stream_key": lambda: None if missing == "run" else "key", "serialize": dict, "filter_shared_stream": every}
    methods.pop(missing, None)
    impostor: Any = type("Impostor", (), {"open_shared_stream": every})()
    vars(impostor).update(methods)
    async with SharedStreamManager() as manager, TriggerRunner(manager) as runner:
        runner.start("a", impostor)
        error = await failure(runner)
        assert isinstance(error, AttributeError)
        assert error.name == missing
        assert idle(manager)


async def test_unhashable_key() -> None:
    async with TriggerRunner() as runner:
        runner.start("a", Shared(Feed([])))  # type: ignore[arg-type]
        assert isinstance(await failure(runner), TypeError)


async def test_methods_left_out() -> None:
    class Alone(BaseEventTrigger):
        def serialize(self) -> tuple[str, dict[str, Any]]:
            return "Alone", {}

    class Keyed(Alone):
        def shared_stream_key(self) -> str:
            return "key"

    class Filtered(Keyed):
        def filter_shared_stream(self, shared_stream: Subscription[Any]) -> Events:
            return every(shared_stream)

    async with TriggerRunner() as runner:
        for trigger, method in ((Alone(), "run"), (Keyed(), "filter_shared_stream"), (Filtered(), "open_shared_stream")):
            runner.start("a", trigger)
            with pytest.raises(NotImplementedError, match=f"{type(trigger).__name__} .*{method}"):
                raise await failure(runner)


async def test_a_coroutine_function_without_yield() -> None:
    async def run() -> None: ...

    async with TriggerRunner() as runner:
        runner.start("a", alone(run))
        with pytest.raises(TypeError, match=r"async iterable .*not <coroutine"):
            raise await failure(runner)
        runner.start("a", alone(lambda: [1]))
        with pytest.raises(TypeError, match=r"not \[1\]"):
            raise await failure(runner)


class Plain:
    """An async iterator that is no generator."""

    def __init__(self, *steps: Any) -> None:
        self.steps = list(steps)

    def __aiter__(self) -> Plain:
        return self

    async def __anext__(self) -> TriggerEvent:
        if not self.steps:
            raise StopAsyncIteration
        step = self.steps.pop(0)
        if isinstance(step, BaseException):
            raise step
        return TriggerEvent(step)


class Closable(Plain):
    """The same, with something to close; *error* is what that raises."""

    error: BaseException | None = None
    closed = 0

    async def aclose(self) -> None:
        self.closed += 1
        if self.error is not None:
            raise self.error


async def test_iterators_that_are_no_generators() -> None:
    closable = Closable(1)
    async with TriggerRunner() as runner:
        for iterator in (Plain(1), closable):
            runner.start("a", alone(lambda iterator=iterator: iterator))  # type: ignore[misc]
            assert await take(runner, 2) == [*fired("a", 1), TriggerFinished("a")]
    assert closable.closed == 1


async def test_an_iterator_that_is_held_is_closed_when_it_is_stopped() -> None:
    closable = Closable(1, 2)
    async with TriggerRunner(max_outcomes=1) as runner:
        runner.start("a", alone(lambda: closable))
        await settle()
        await runner.stop("a")
        assert closable.closed == 1
    assert await rest(runner) == fired("a", 1)


async def test_closing_fails(caplog: pytest.LogCaptureFixture) -> None:
    async with TriggerRunner() as runner:
        closable = Closable()
        closable.error = OSError("on closing")
        runner.start("a", alone(lambda: closable))
        assert await failure(runner) is closable.error
        assert not caplog.records
        # It does not take the place of why the trigger failed, but is not lost either.
        error = ValueError()
        closable.steps = [error]
        runner.start("a", alone(lambda: closable))
        assert await failure(runner) is error
        [record] = caplog.records
        assert record.exc_info is not None
        assert record.exc_info[1] is closable.error


# Ids.


async def test_a_live_id_and_an_unknown_one() -> None:
    async with TriggerRunner() as runner:
        runner.start("a", alone(Waits()))
        with pytest.raises(RuntimeError, match="'a' is live"):
            runner.start("a", yields())
        for unknown in ("b", ["b"]):
            with pytest.raises((KeyError, TypeError), match="b"):
                await runner.stop(unknown)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"\['b'\]"):
            runner.start(["b"], yields())  # type: ignore[arg-type]


async def test_an_id_is_free_when_its_ending_can_be_seen() -> None:
    async with TriggerRunner() as runner:
        runner.start("a", yields())
        for number in range(5):
            assert await take(runner, 1) == [TriggerFinished("a")]
            with pytest.raises(KeyError):
                await runner.stop("a")
            runner.start("a", yields(number))
            assert await take(runner, 1) == fired("a", number)
        assert await take(runner, 1) == [TriggerFinished("a")]


async def test_a_trigger_that_starts_its_successor() -> None:
    async with TriggerRunner() as runner:

        async def run() -> Events:
            runner.start("b", yields(2))
            yield TriggerEvent(1)

        runner.start("a", alone(run))
        outcomes = await take(runner, 4)
        assert [outcome for outcome in outcomes if outcome.trigger_id == "b"] == [*fired("b", 2), TriggerFinished("b")]


async def test_a_runner_that_does_not_run() -> None:
    runner = TriggerRunner()
    with pytest.raises(RuntimeError, match=r"not been entered.*'a'"):
        runner.start("a", yields())
    async with runner:
        with pytest.raises(RuntimeError, match="once"):
            await runner.__aenter__()
    with pytest.raises(RuntimeError, match="stopped or left"):
        runner.start("a", yields())
    with pytest.raises(KeyError):
        await runner.stop("a")
    with pytest.raises(RuntimeError, match="once"):
        await runner.__aenter__()


async def test_starting_while_the_runner_is_left() -> None:
    async def start() -> None:
        with pytest.raises(RuntimeError, match="stopped or left"):
            runner.start("b", yields())

    async with TriggerRunner() as runner:
        runner.start("a", alone(Waits(clean_up=start)))
        await settle()
    assert await rest(runner) == []


# Stopping.


@pytest.mark.parametrize("steps", range(25))
async def test_stop_at_every_step(steps: int) -> None:
    """However far it has come, stopping it leaves nothing of it and does not touch its sibling."""
    feed = Feed()
    log: list[str] = []

    async def events(stream: Subscription[Any]) -> Events:
        log.append("open")
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(sleep_forever)
                while True:
                    yield TriggerEvent(await stream.receive())
        finally:
            log.append("close")

    async with SharedStreamManager() as manager, TriggerRunner(manager, max_outcomes=2) as runner:
        runner.start("sibling", Shared(feed))
        await settle()
        runner.start("a", Shared(feed, events))
        feed.emit(1, 2, 3)
        await settle(steps)
        await runner.stop("a")
        assert log.count("open") == log.count("close")
        outcomes = []
        with anyio.fail_after(5):
            while fired("sibling", 3)[0] not in outcomes:
                outcomes += await take(runner, 1)
        assert [outcome for outcome in outcomes if outcome.trigger_id == "sibling"] == fired("sibling", 1, 2, 3)
        assert len(manager.statistics().groups["feed"].subscriptions) == 1
        others = [outcome for outcome in outcomes if outcome.trigger_id == "a"]
        assert others == fired("a", 1, 2, 3)[: len(others)]
        runner.start("a", yields(4))
        assert await take(runner, 2) == [*fired("a", 4), TriggerFinished("a")]
    assert await rest(runner) == []


async def test_stop_before_it_ran_calls_nothing() -> None:
    waits = Waits()
    feed = Feed()
    async with TriggerRunner() as runner:
        for trigger in (alone(waits), Shared(feed, raising(AssertionError()))):
            runner.start("a", trigger)
            await runner.stop("a")
    assert waits.started == 0
    assert feed.closed == feed.opened
    assert await rest(runner) == []


async def test_stop_waits_for_the_clean_up_however_often_it_is_called() -> None:
    may_end = anyio.Event()
    waits = Waits(clean_up=lambda: may_end.wait())
    stopped: list[int] = []

    async with TriggerRunner() as runner:

        async def stop() -> None:
            await runner.stop("a")
            stopped.append(waits.cleaned_up)

        runner.start("a", alone(waits))
        await settle()
        with CancelScope() as scope:
            scope.cancel()
            await runner.stop("a")
        assert scope.cancelled_caught
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stop)
            tasks.start_soon(stop)
            await settle()
            assert stopped == []
            with pytest.raises(RuntimeError, match="live"):
                runner.start("a", yields())
            may_end.set()
        assert stopped == [1, 1]
        runner.start("a", yields())
        assert await take(runner, 1) == [TriggerFinished("a")]


async def test_stop_of_the_last_waits_for_the_shared_stream() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, TriggerRunner(manager) as runner:
        for trigger_id in ("a", "b"):
            runner.start(trigger_id, Shared(feed))
        await settle()
        await runner.stop("a")
        assert feed.closed == 0
        await runner.stop("b")
        assert feed.closed == 1
        assert idle(manager)


async def test_the_reader_may_stop_what_waits_for_it() -> None:
    async def endless() -> Events:
        number = 0
        while True:
            number += 1
            yield TriggerEvent(number)

    async with TriggerRunner(max_outcomes=1) as runner:
        runner.start("a", alone(endless))
        await settle()
        assert await take(runner, 1) == fired("a", 1)  # which gave room to the next
        await settle()
        await runner.stop("a")
        runner.start("b", yields())
        assert await take(runner, 2) == [*fired("a", 2), TriggerFinished("b")]


async def test_what_waits_for_room_is_dropped_by_a_stop() -> None:
    async with TriggerRunner(max_outcomes=1) as runner:
        runner.start("a", yields(1, 2))
        runner.start("b", alone(Waits()))
        await settle()
        await runner.stop("a")
        assert await take(runner, 1) == fired("a", 1)
        await settle()
    assert await rest(runner) == []


async def test_a_trigger_that_stops_itself() -> None:
    async with TriggerRunner() as runner:

        async def run() -> Events:
            yield TriggerEvent(1)
            await runner.stop("a")

        runner.start("a", alone(run))
        assert await take(runner, 1) == fired("a", 1)
        await settle()
        with pytest.raises(KeyError):
            await runner.stop("a")
    assert await rest(runner) == []


async def test_stopped_at_a_yield_inside_a_task_group(caplog: pytest.LogCaptureFixture) -> None:
    """The cancellation is raised at the yield, so that the task group there sees an ordinary cancellation."""
    seen: list[BaseException] = []

    async def run() -> Events:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(sleep_forever)
            try:
                yield TriggerEvent(1)
                yield TriggerEvent(2)
            except BaseException as exc:
                seen.append(exc)
                raise

    async with TriggerRunner(max_outcomes=1) as runner:
        runner.start("a", alone(run))
        await settle()
        await runner.stop("a")
        assert [type(exc) for exc in seen] == [get_cancelled_exc_class()]
    assert not caplog.records


async def test_a_generator_that_swallows_the_cancellation_and_yields_again(caplog: pytest.LogCaptureFixture) -> None:
    closed: list[type[BaseException]] = []

    async def run() -> Events:
        async with anyio.create_task_group():
            with suppress(get_cancelled_exc_class()):
                while True:
                    yield TriggerEvent("early")
            try:
                yield TriggerEvent("late")
            except BaseException as exc:
                closed.append(type(exc))
                raise

    async with TriggerRunner(max_outcomes=1) as runner:
        runner.start("a", alone(run))
        await settle()
        await runner.stop("a")
        assert closed == [GeneratorExit]
    assert await rest(runner) == fired("a", "early")
    assert not caplog.records


async def test_a_generator_that_shields_its_yield() -> None:
    closed: list[int] = []

    async def run() -> Events:
        with CancelScope(shield=True):
            try:
                while True:
                    yield TriggerEvent(0)
            finally:
                closed.append(1)

    async with TriggerRunner(max_outcomes=1) as runner:
        runner.start("a", alone(run))
        await settle()
        await runner.stop("a")
        assert closed == [1]
    assert await rest(runner) == fired("a", 0)


async def test_what_is_yielded_after_the_stop_is_no_outcome() -> None:
    go_on = anyio.Event()
    seen: list[type[BaseException]] = []

    async def run() -> Events:
        with CancelScope(shield=True):
            await go_on.wait()
        try:
            yield TriggerEvent("late")
        except BaseException as exc:
            seen.append(type(exc))
            raise

    async with TriggerRunner() as runner:
        runner.start("a", alone(run))
        await settle()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(runner.stop, "a")
            await settle()
            go_on.set()
    assert seen == [get_cancelled_exc_class()]
    assert await rest(runner) == []


@pytest.mark.parametrize("leave", [False, True])
async def test_a_stopped_trigger_whose_clean_up_fails(leave: bool, caplog: pytest.LogCaptureFixture) -> None:
    error = OSError("clean-up")

    async def fail() -> None:
        raise error

    async with TriggerRunner() as runner:
        runner.start("a", alone(Waits(clean_up=fail)))
        await settle()
        if not leave:
            await runner.stop("a")
    assert await rest(runner) == []
    [record] = caplog.records
    assert record.name == "anyio_sharedstream"
    assert record.levelno == logging.ERROR
    assert "'a'" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[1] is error


# The bound of the outcomes.


async def test_a_full_stream_holds_back_only_what_fires() -> None:
    progress: list[int] = []

    async def fires() -> Events:
        for number in range(4):
            progress.append(number)
            yield TriggerEvent(number)

    async with TriggerRunner(max_outcomes=2) as runner:
        runner.start("a", alone(fires))
        await settle()
        assert progress == [0, 1, 2]
        runner.start("finishes", yields())
        runner.start("fails", Shared(Feed(), raising(ValueError())))
        runner.start("waits", alone(Waits()))
        await settle()
        outcomes = await take(runner, 4)
        assert [outcome.trigger_id for outcome in outcomes[:2]] == ["a", "a"]
        assert {outcome.trigger_id for outcome in outcomes[2:]} == {"finishes", "fails"}
        assert [*await take(runner, 3)] == [*fired("a", 2, 3), TriggerFinished("a")]


async def test_room_is_given_in_turn() -> None:
    async with TriggerRunner(max_outcomes=1) as runner:
        for number in range(20):
            runner.start(number, yields(number))
            await settle()
        assert [outcome for outcome in await take(runner, 40) if isinstance(outcome, TriggerFired)] == [
            fired(number, number)[0] for number in range(20)
        ]


async def test_one_that_is_held_back_may_fall_behind_its_stream() -> None:
    feed = Feed()
    async with (
        SharedStreamManager(max_buffer_size=2) as manager,
        TriggerRunner(manager, max_outcomes=1) as runner,
        manager.subscribe(feed.source) as sibling,
    ):
        runner.start("a", Shared(feed))
        for number in range(6):
            feed.emit(number)
            assert await sibling.receive() == number
            await settle()
        assert await take(runner, 2) == fired("a", 0, 1)
        error = await failure(runner)
        assert isinstance(error, SubscriberOverflow)
        assert "<trigger 'a'>" in str(error)


async def test_unbounded() -> None:
    async with TriggerRunner(max_outcomes=math.inf) as runner:
        runner.start("a", yields(*range(3000)))
        assert await take(runner, 3001) == [*fired("a", *range(3000)), TriggerFinished("a")]


async def test_a_trigger_that_never_awaits_does_not_starve_the_loop() -> None:
    async def endless() -> Events:
        while True:
            yield TriggerEvent(0)

    with anyio.fail_after(5):
        async with TriggerRunner(max_outcomes=math.inf) as runner:
            runner.start("a", alone(endless))
            runner.start("b", yields())
            while TriggerFinished("b") not in await take(runner, 1):
                pass


async def test_failing_while_it_is_held_back_loses_nothing_that_had_fired() -> None:
    fail = anyio.Event()

    async def run() -> Events:
        async def child() -> None:
            await fail.wait()
            raise ValueError("child")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child)
            yield TriggerEvent(0)
            yield TriggerEvent(1)

    async with TriggerRunner(max_outcomes=1) as runner:
        runner.start("a", alone(run))
        await settle()
        fail.set()
        await settle()
        assert await take(runner, 2) == fired("a", 0, 1)
        error = await failure(runner)
        assert isinstance(error, ExceptionGroup)
        assert [repr(member) for member in error.exceptions] == ["ValueError('child')"]


async def test_its_own_scope_over_a_yield() -> None:
    scopes: list[CancelScope] = []

    async def run() -> Events:
        for number in range(4):
            with CancelScope() as scope:
                scopes.append(scope)
                yield TriggerEvent(number)

    async with TriggerRunner(max_outcomes=1) as runner:
        runner.start("a", alone(run))
        for _ in range(3):
            await settle()
            scopes[-1].cancel()
        await settle()
        assert await take(runner, 5) == [*fired("a", 0, 1, 2, 3), TriggerFinished("a")]
        assert [scope.cancelled_caught for scope in scopes] == [False, True, True, True]


class Wrapped:
    """An async iterator that hides a generator: nothing can be thrown into it."""

    def __init__(self, generator: Events) -> None:
        self.generator = generator

    def __aiter__(self) -> Wrapped:
        return self

    async def __anext__(self) -> TriggerEvent:
        return await anext(self.generator)


async def test_its_own_scope_over_a_hidden_yield() -> None:
    scopes: list[CancelScope] = []

    async def run() -> Events:
        with CancelScope() as scope:
            scopes.append(scope)
            yield TriggerEvent(1)
            yield TriggerEvent(2)
            await checkpoint()
        yield TriggerEvent(3)

    async with TriggerRunner(max_outcomes=1) as runner:
        runner.start("a", alone(lambda: Wrapped(run())))
        await settle()
        scopes[0].cancel()
        await settle()
        assert await take(runner, 4) == [*fired("a", 1, 2, 3), TriggerFinished("a")]
        assert scopes[0].cancelled_caught


# Reading.


async def test_a_cancelled_reader_loses_nothing() -> None:
    payloads = iter(range(1000))
    news = anyio.Event()

    async def run() -> Events:
        nonlocal news
        while True:
            await news.wait()
            news = anyio.Event()
            yield TriggerEvent(next(payloads))

    received: list[TriggerOutcome] = []

    async def read(scope: CancelScope) -> None:
        with scope:
            received.append(await runner.outcomes.receive())

    async with TriggerRunner() as runner:
        runner.start("a", alone(run))
        await settle()
        for steps in range(20):
            async with anyio.create_task_group() as tasks:
                scope = CancelScope()
                tasks.start_soon(read, scope)
                await settle(3)
                news.set()
                await settle(steps)
                scope.cancel()
    received += await rest(runner)
    assert received == fired("a", *range(next(payloads)))
    assert len(received) == 20


async def test_a_natively_cancelled_reader_loses_nothing(backend_name: str) -> None:
    if backend_name == "trio":
        pytest.skip("trio has no native cancellation of a task")
    async with TriggerRunner() as runner:
        received: list[TriggerOutcome] = []
        for number in range(8):
            task = asyncio.create_task(runner.outcomes.receive())
            await settle(3)
            runner.start("a", yields(number))
            await settle(number)
            task.cancel()
            with suppress(asyncio.CancelledError):
                received.append(await task)
            await settle()
            received += await take(runner, 2 * number + 2 - len(received))
        assert received == [outcome for number in range(8) for outcome in (*fired("a", number), TriggerFinished("a"))]


async def test_several_readers() -> None:
    received: list[TriggerOutcome] = []

    async def read() -> None:
        async for outcome in runner.outcomes:
            received.append(outcome)  # noqa: PERF401 - what was received counts, also if the loop fails

    async with anyio.create_task_group() as tasks, TriggerRunner() as runner:
        for _ in range(3):
            tasks.start_soon(read)
        await settle()
        runner.start("a", yields(*range(10)))
        await until(lambda: len(received) == 11)
    assert received[:10] == fired("a", *range(10))


async def test_a_reader_that_waits_while_the_runner_is_left() -> None:
    async def read() -> None:
        with pytest.raises(anyio.EndOfStream):
            await runner.outcomes.receive()

    async with anyio.create_task_group() as tasks, TriggerRunner() as runner:
        tasks.start_soon(read)
        await settle()


async def test_closing_the_outcomes_holds_nothing_back() -> None:
    done: list[int] = []

    async def fires() -> Events:
        for number in range(5):
            yield TriggerEvent(number)
        done.append(1)

    async def read() -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await take(runner, 10)

    async with TriggerRunner(max_outcomes=1) as runner, anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await settle()
        async with runner.outcomes:
            runner.start("a", alone(fires))
        await until(lambda: done)
        runner.start("b", alone(fires))
        await until(lambda: len(done) == 2)
        with pytest.raises(anyio.ClosedResourceError):
            await runner.outcomes.receive()


async def test_closing_the_outcomes_frees_what_is_held() -> None:
    done: list[int] = []

    async def fires() -> Events:
        yield TriggerEvent(1)
        yield TriggerEvent(2)
        done.append(1)

    async with TriggerRunner(max_outcomes=1) as runner:
        runner.start("a", alone(fires))
        await settle()
        assert not done
        await runner.outcomes.aclose()
        await until(lambda: done)
        with pytest.raises(anyio.ClosedResourceError):
            await runner.outcomes.receive()


# Leaving.


async def test_leaving_stops_what_runs_and_leaves_what_is_buffered() -> None:
    feed = Feed()
    waits = Waits(clean_up=settle)
    async with TriggerRunner(max_outcomes=1) as runner:
        runner.start("shared", Shared(feed))
        runner.start("alone", alone(waits))
        runner.start("ends", yields())
        feed.emit(1, 2, 3)
        await settle()
        runner.start("not yet", alone(waits))
    assert waits.cleaned_up == waits.started == 1
    assert feed.closed == 1
    outcomes = await rest(runner)
    assert sorted(outcomes, key=repr) == [TriggerFinished("ends"), *fired("shared", 1)]
    for _ in range(2):
        with pytest.raises(anyio.EndOfStream):
            await runner.outcomes.receive()


async def test_leaving_a_runner_that_was_never_read_warns_of_nothing() -> None:
    async with TriggerRunner() as runner:
        runner.start("a", yields(1))
        await settle()
    del runner
    gc.collect()


class Peculiar(BaseException):
    """No Exception, and no group would be."""


@pytest.mark.parametrize("error", [ValueError(), Peculiar(), KeyboardInterrupt()])
async def test_what_leaves_the_body_leaves_as_itself(error: BaseException) -> None:
    waits = Waits(clean_up=settle)

    async def work() -> None:
        async with TriggerRunner() as runner:
            runner.start("a", alone(waits))
            await settle()
            raise error

    with pytest.raises(type(error)) as caught:
        await work()
    assert caught.value is error
    assert waits.cleaned_up == 1


async def test_an_error_is_not_replaced_by_a_cancellation_that_comes_while_leaving() -> None:
    may_end = anyio.Event()
    waits = Waits(clean_up=lambda: may_end.wait())
    caught: list[BaseException] = []

    async def leave(scope: CancelScope) -> None:
        with scope:
            try:
                async with TriggerRunner() as runner:
                    runner.start("a", alone(waits))
                    await settle()
                    raise ValueError
            except BaseException as exc:
                caught.append(exc)

    scope = CancelScope()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(leave, scope)
        await settle(40)
        scope.cancel()
        await settle()
        assert not caught
        may_end.set()
    assert [type(exc) for exc in caught] == [ValueError]
    assert waits.cleaned_up == 1


@pytest.mark.parametrize("while_leaving", [False, True])
async def test_a_cancellation_from_around_the_runner(while_leaving: bool) -> None:
    """It ends everything inside, and no trigger has failed because of that."""
    may_end = anyio.Event()
    if not while_leaving:
        may_end.set()
    waits = Waits(clean_up=lambda: may_end.wait())
    runner = TriggerRunner(max_outcomes=1)

    async def work(scope: CancelScope) -> None:
        with scope:
            async with runner:
                runner.start("a", alone(waits))
                runner.start("fires", yields(1, 2, 3))
                if not while_leaving:
                    await sleep_forever()
                await settle()

    scope = CancelScope()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(work, scope)
        await settle(40)
        scope.cancel()
        await settle()
        may_end.set()
    assert waits.cleaned_up == 1
    # The second was held back. Whether it was withdrawn depends on which task the cancellation reaches first.
    assert await rest(runner) in (fired("fires", 1), fired("fires", 1, 2))


# What nobody asked for.


async def test_a_cancellation_that_nobody_asked_for() -> None:
    async def run() -> Events:
        yield TriggerEvent(1)
        raise await cancellation()

    async with TriggerRunner() as runner:
        runner.start("sibling", alone(Waits()))
        runner.start("a", alone(run))
        assert await take(runner, 1) == fired("a", 1)
        error = await failure(runner)
        assert isinstance(error, SharedStreamError)
        assert "'a'" in str(error)
        assert isinstance(error.__cause__, get_cancelled_exc_class())
        runner.start("a", yields(2))
        assert await take(runner, 2) == [*fired("a", 2), TriggerFinished("a")]
        await runner.stop("sibling")


async def test_a_generator_exit_that_nobody_asked_for() -> None:
    async with TriggerRunner() as runner:
        runner.start("a", alone(lambda: Plain(GeneratorExit())))
        assert isinstance((await failure(runner)).__cause__, GeneratorExit)


async def test_a_natively_cancelled_inner_task(backend_name: str) -> None:
    if backend_name == "trio":
        pytest.skip("trio has no native cancellation of a task")

    async def run() -> Events:
        yield TriggerEvent(1)
        task = asyncio.create_task(asyncio.sleep(60))
        asyncio.get_running_loop().call_soon(task.cancel)
        await task

    async with TriggerRunner() as runner:
        runner.start("a", alone(run))
        assert await take(runner, 1) == fired("a", 1)
        assert isinstance(await failure(runner), SharedStreamError)
        runner.start("a", yields())
        assert await take(runner, 1) == [TriggerFinished("a")]


async def test_a_natively_cancelled_trigger(backend_name: str) -> None:
    if backend_name == "trio":
        pytest.skip("trio has no native cancellation of a task")
    tasks: list[asyncio.Task[Any]] = []

    async def run() -> Events:
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        yield TriggerEvent(1)
        yield TriggerEvent(2)

    async with TriggerRunner(max_outcomes=1) as runner:
        runner.start("a", alone(run))
        await settle()
        tasks[0].cancel()
        await settle()
        assert await take(runner, 2) == fired("a", 1, 2)
        assert isinstance(await failure(runner), SharedStreamError)
        runner.start("a", yields())
        assert await take(runner, 1) == [TriggerFinished("a")]


async def test_a_natively_cancelled_trigger_that_nothing_can_be_thrown_into(backend_name: str) -> None:
    if backend_name == "trio":
        pytest.skip("trio has no native cancellation of a task")
    async with TriggerRunner(max_outcomes=1) as runner:
        runner.start("a", alone(lambda: Plain(1, 2, 3)))
        await settle()
        [task] = [task for task in asyncio.all_tasks() if task.get_name() == "trigger 'a'"]
        task.cancel()
        await settle()
        assert await take(runner, 2) == fired("a", 1, 2)
        assert isinstance(await failure(runner), SharedStreamError)


async def test_the_task_that_ran_the_runner_is_not_left_cancelled(backend_name: str) -> None:
    async def work() -> None:
        async with TriggerRunner() as runner:
            runner.start("a", alone(lambda: Plain(KeyboardInterrupt())))
            try:
                await sleep_forever()
            finally:
                with pytest.raises(RuntimeError, match="stopped or left"):
                    runner.start("b", yields())

    with pytest.raises(KeyboardInterrupt):
        await work()
    await settle()
    if backend_name == "asyncio":
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0


@pytest.mark.filterwarnings("ignore:coroutine 'Run.run' was never awaited:RuntimeWarning")  # which is what this is about
async def test_natively_cancelled_before_its_first_step(backend_name: str) -> None:
    if backend_name == "trio":
        pytest.skip("trio has no native cancellation of a task")
    feed = Feed()
    async with SharedStreamManager() as manager:
        async with TriggerRunner(manager) as runner:
            runner.start("a", Shared(feed))
            [task] = [task for task in asyncio.all_tasks() if task.get_name() == "trigger 'a'"]
            task.cancel()
        assert idle(manager)
    assert await rest(runner) == []
    with pytest.raises(KeyError):
        await runner.stop("a")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), Peculiar()])
@pytest.mark.parametrize("place", ["loop", "filter", "clean-up"])
async def test_what_is_no_exception_stops_the_runner(error: BaseException, place: str) -> None:
    sibling = Waits()

    async def fail() -> None:
        raise error

    async def events(stream: Subscription[Any]) -> Events:
        yield TriggerEvent(1)
        raise error

    triggers = {"loop": alone(lambda: Plain(error)), "filter": Shared(Feed(), events), "clean-up": alone(Waits(clean_up=fail))}
    runner = TriggerRunner()

    async def work() -> None:
        async with runner:
            runner.start("sibling", alone(sibling))
            await settle()
            runner.start("a", triggers[place])
            if place == "clean-up":
                await settle()
                await runner.stop("a")
            else:
                await sleep_forever()

    with pytest.raises(type(error)) as caught:
        await work()
    assert caught.value is error
    assert sibling.cleaned_up == 1
    assert [outcome for outcome in await rest(runner) if not isinstance(outcome, TriggerFired)] == []


async def test_the_first_of_several_leaves() -> None:
    first, second = KeyboardInterrupt("first"), KeyboardInterrupt("second")

    async def fail() -> None:
        raise second

    async def work() -> None:
        async with TriggerRunner() as runner:
            runner.start("a", alone(Waits(clean_up=fail)))
            await settle()
            runner.start("b", alone(lambda: Plain(first)))
            await sleep_forever()

    with pytest.raises(KeyboardInterrupt) as caught:
        await work()
    assert caught.value is first


async def test_what_is_no_exception_from_a_shared_stream() -> None:
    feed = Feed()

    async def work() -> None:
        async with TriggerRunner() as runner:
            runner.start("a", Shared(feed))
            feed.fail(KeyboardInterrupt())
            await sleep_forever()

    with pytest.raises(KeyboardInterrupt):
        await work()
    assert feed.closed == 1


async def test_what_is_no_exception_beside_what_is(caplog: pytest.LogCaptureFixture) -> None:
    closable = Closable(KeyboardInterrupt())
    closable.error = OSError()

    async def work() -> None:
        async with TriggerRunner() as runner:
            runner.start("a", alone(lambda: closable))
            await sleep_forever()

    with pytest.raises(KeyboardInterrupt):
        await work()
    [record] = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[1] is closable.error


async def test_raised_into_start() -> None:
    """It is the caller's stack, so the caller gets it; and nothing was started."""
    async with TriggerRunner() as runner:
        interrupted: Any = SimpleNamespace(shared_stream_key=raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            runner.start("a", interrupted)
        with pytest.raises(KeyError):
            await runner.stop("a")


async def test_an_exception_group_less_its_cancellations() -> None:
    async def run() -> Events:
        yield TriggerEvent(1)
        raise BaseExceptionGroup("several", [await cancellation(), ValueError()])

    async with TriggerRunner() as runner:
        runner.start("a", alone(run))
        await take(runner, 1)
        error = await failure(runner)
        assert isinstance(error, ExceptionGroup)
        assert [type(member) for member in error.exceptions] == [ValueError]


async def test_a_failed_trigger_leaves_no_garbage() -> None:
    """A traceback refers to the frames it passed; if one of those refers back, only a collection frees what they hold."""
    gc.collect()
    gc.disable()
    try:
        async with TriggerRunner() as runner:
            runner.start("a", alone(raising(ValueError())))
            outcome: Any = await runner.outcomes.receive()
            frames = outcome.error.__traceback__
            assert frames.tb_frame.f_locals["errors"] == []
    finally:
        gc.enable()


@pytest.mark.parametrize("count", [1000])
async def test_churn_leaves_nothing(count: int) -> None:
    feed = Feed()
    async with SharedStreamManager() as manager:
        async with TriggerRunner(manager) as runner:
            for number in range(count):
                runner.start(number, Shared(feed))
            feed.emit("x")
            assert len({outcome.trigger_id for outcome in await take(runner, count)}) == count
            async with anyio.create_task_group() as tasks:
                for number in range(count):
                    tasks.start_soon(runner.stop, number)
            assert idle(manager)
        assert feed.opened == feed.closed == 1
    assert await rest(runner) == []
