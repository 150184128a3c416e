"""`TriggerRunner.outcomes`: what its bound holds back, and that its readers lose nothing."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from typing import Any

import anyio
import pytest
from anyio import CancelScope
from anyio.lowlevel import checkpoint

from anyio_sharedstream import DropOldest, Restart, SharedStreamManager, SubscriberOverflow
from anyio_sharedstream.triggers import (
    TriggerEvent,
    TriggerFinished,
    TriggerFired,
    TriggerOutcome,
    TriggerRunner,
)
from tests.conftest import on_asyncio
from tests.support import Feed, settle, until
from tests.trigger_support import (
    Events,
    Shared,
    Waits,
    Wrapped,
    alone,
    failure,
    fired,
    raising,
    rest,
    take,
    yields,
)

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


@on_asyncio
async def test_a_natively_cancelled_reader_loses_nothing() -> None:
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


# What a trigger asks of its stream.


class Choosy(Shared):
    def subscription_options(self) -> dict[str, Any]:
        return {"where": lambda number: number % 2, "overflow": DropOldest(), "max_buffer_size": 2}


async def test_a_trigger_may_state_its_policy_and_its_filter() -> None:
    feed = Feed()
    async with TriggerRunner() as runner:
        runner.start("all", Shared(feed))
        runner.start("odd", Choosy(feed))
        feed.emit(1, 2, 3)
        outcomes = await take(runner, 5)
        assert [outcome for outcome in outcomes if outcome.trigger_id == "odd"] == fired("odd", 1, 3)
        assert [outcome for outcome in outcomes if outcome.trigger_id == "all"] == fired("all", 1, 2, 3)


class Persistent(Shared):
    def shared_stream_policies(self) -> dict[str, Any]:
        return {"restart": Restart(initial_delay=0)}


async def test_a_trigger_may_state_how_its_stream_lives() -> None:
    feed = Feed()
    async with TriggerRunner() as runner:
        runner.start("a", Persistent(feed))
        feed.emit(1)
        feed.fail(ConnectionError("lost"))
        assert await take(runner, 1) == fired("a", 1)
        await until(lambda: feed.opened == 2)
        feed.emit(2)
        assert await take(runner, 1) == fired("a", 2)
