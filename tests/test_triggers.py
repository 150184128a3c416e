"""`anyio_sharedstream.triggers`: its names, what triggers share, how they end, and their ids."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from anyio_sharedstream import PollTerminated, SharedStreamManager, Subscription, triggers
from anyio_sharedstream.triggers import (
    BaseEventTrigger,
    EventTrigger,
    TriggerEvent,
    TriggerFailed,
    TriggerFinished,
    TriggerFired,
    TriggerRunner,
)
from tests.support import Feed, idle, settle, until
from tests.trigger_support import (
    Closable,
    Events,
    Plain,
    Shared,
    Waits,
    alone,
    every,
    failure,
    fired,
    raising,
    rest,
    take,
    yields,
)

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
