"""Stopping a trigger, and leaving a runner: both wait for clean-ups, and for nothing else."""

from __future__ import annotations

import gc
import logging
from contextlib import suppress
from typing import Any

import anyio
import pytest
from anyio import CancelScope, get_cancelled_exc_class, sleep_forever

from anyio_sharedstream import SharedStreamManager, Subscription
from anyio_sharedstream.triggers import (
    TriggerEvent,
    TriggerFinished,
    TriggerRunner,
)
from tests.support import Feed, idle, settle
from tests.trigger_support import (
    Events,
    Peculiar,
    Shared,
    Waits,
    alone,
    fired,
    raising,
    rest,
    take,
    yields,
)

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
