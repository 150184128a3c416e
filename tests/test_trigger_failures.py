"""What nobody asked for: stray cancellations, what is no `Exception`, and what both leave behind."""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
import structlog
from anyio import get_cancelled_exc_class, sleep_forever
from structlog.testing import LogCapture

from anyio_sharedstream import SharedStreamError, SharedStreamManager, Subscription
from anyio_sharedstream.triggers import (
    TriggerEvent,
    TriggerFinished,
    TriggerFired,
    TriggerRunner,
)
from tests.conftest import on_asyncio
from tests.support import Feed, idle, settle
from tests.trigger_support import (
    Closable,
    Events,
    Peculiar,
    Plain,
    Shared,
    Waits,
    alone,
    cancellation,
    failure,
    fired,
    raising,
    rest,
    take,
    yields,
)


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


@on_asyncio
async def test_a_natively_cancelled_inner_task() -> None:
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


@on_asyncio
async def test_a_natively_cancelled_trigger() -> None:
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


@on_asyncio
async def test_a_natively_cancelled_trigger_that_nothing_can_be_thrown_into() -> None:
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
@on_asyncio
async def test_natively_cancelled_before_its_first_step() -> None:
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


# Groups of exceptions.


class Underivable(ExceptionGroup[Exception]):
    derive = None  # type: ignore[assignment]


async def test_an_exception_group_that_cannot_be_split_fails_its_trigger_alone() -> None:
    error = Underivable("underivable", [ValueError()])
    feed = Feed()
    async with TriggerRunner() as runner:
        runner.start("unrelated", Shared(feed))
        runner.start("a", alone(raising(error)))
        assert await failure(runner) is error
        feed.emit(1)
        assert await take(runner, 1) == fired("unrelated", 1)


async def test_a_trigger_may_be_started_from_within_the_start_of_another() -> None:
    refused: list[str] = []

    class Nested(Shared):
        def shared_stream_key(self) -> Any:
            with pytest.raises(RuntimeError, match="is live"):
                runner.start("a", yields(1))
            refused.append("")
            runner.start("b", yields(2))
            return super().shared_stream_key()

    feed = Feed()
    async with TriggerRunner() as runner:
        runner.start("a", Nested(feed))
        feed.emit(1)
        assert {outcome.trigger_id for outcome in await take(runner, 3)} == {"a", "b"}
    assert refused


async def test_what_a_failed_clean_up_says_goes_to_the_logger_that_was_given() -> None:
    lines = LogCapture()

    async def fire(stream: Subscription[Any]) -> Events:
        try:
            yield TriggerEvent(await anext(stream))
        finally:
            raise ValueError("clean-up")

    async with TriggerRunner(logger=structlog.wrap_logger(None, processors=[lines])) as runner:
        runner.start("a", Shared(Feed(), fire))
        await settle()
        await runner.stop("a")
    (line,) = [line for line in lines.entries if "trigger" in line]
    assert (line["event"], line["trigger"], line["log_level"]) == ("clean-up failed", "a", "error")
    assert isinstance(line["exc_info"], ValueError)


@on_asyncio
@pytest.mark.filterwarnings("ignore:coroutine 'Run.run' was never awaited:RuntimeWarning")  # which is what this is about
async def test_a_runner_that_lost_everything_to_a_native_cancellation_says_so() -> None:
    async def run() -> None:
        async with TriggerRunner() as runner:
            runner.start("a", yields(1))
            [task] = [task for task in asyncio.all_tasks() if task.get_name() == "trigger 'a'"]
            task.cancel()
            await sleep_forever()

    with pytest.raises(SharedStreamError, match=r"Task\.cancel"):
        await run()
