"""The ways in which libraries of this kind have failed that depend on who runs first: each under many orders of its tasks.

A scenario asserts what must hold in any order. That one can fail is shown in `test_explore_planted`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from itertools import count
from typing import Any, Literal

import anyio
import pytest
from anyio import CancelScope, EndOfStream, Event, create_task_group

from anyio_sharedstream import PollTerminated, SharedSource, SubscriberOverflow, Subscription
from tests.explore_support import Gate, Scenario, Ticker, at_once, cancel_soon, dawdle, follow, holds, published, subscribed
from tests.support import Busy, Feed, idle, until
from tests.sweep import Reader, managed

pytestmark = pytest.mark.usefixtures("unlogged")


async def lesson_01_first_join_race() -> None:
    feed = Feed()
    joined = Gate(4)

    async def subscribe() -> None:
        async with manager.subscribe(feed.source) as stream:
            joined.come()
            assert await stream.receive() == 1

    async def emit() -> None:
        await joined.wait()
        assert len(manager.statistics().groups["feed"].subscriptions) == 4
        feed.emit(1)

    async with managed(feed) as manager, create_task_group() as tasks:
        tasks.start_soon(emit)
        await at_once(4, subscribe)
    assert feed.opened == 1


async def lesson_02_last_leave_against_new_join() -> None:
    ticker = Ticker()
    names = count()

    async def visit() -> None:
        name = next(names)
        old = manager.subscribe(ticker.source)
        for _ in range(2):
            async with manager.subscribe(ticker.source, subscriber_id=name) as stream:
                await follow(manager, stream, random.randrange(2))
                await old.aclose()  # once more, late, and under the same name
                await stream.receive()
            old = stream
            await dawdle()

    async with managed(ticker) as manager:
        await at_once(3, visit)


async def lesson_03_leave_during_join() -> None:
    ticker = Ticker()
    gone = Gate(3)

    async def come_and_go() -> None:
        stream = await manager.subscribe(ticker.source).__aenter__()
        await dawdle()
        stream.close()
        gone.come()
        await stream.aclose()

    async def stay() -> None:
        async with manager.subscribe(ticker.source) as stream:
            await follow(manager, stream, 2)
            await gone.wait()
            assert [one.subscriber_id for one in manager.statistics().groups["ticker"].subscriptions] == [stream.subscriber_id]
            await stream.receive()

    async with managed(ticker) as manager, create_task_group() as tasks:
        tasks.start_soon(at_once, 1, stay)
        await at_once(3, come_and_go)


async def lesson_04_joining_at_the_instant_of_the_terminal() -> None:
    fails = random.random() < 0.5
    ticker = Ticker(events=2, fails=fails)

    async def visit() -> None:
        runs: list[int] = []
        for _ in range(2):
            async with manager.subscribe(ticker.source) as stream:
                first = published(manager, stream)
                assert ticker.iterated < ticker.opened or first == 0
                reader = Reader(stream)
                await reader.run()
                assert [n for _, n in reader.got] == list(range(first, 2))
                assert isinstance(reader.terminal, ValueError if fails else PollTerminated)
                runs += sorted({run for run, _ in reader.got})
            await dawdle()
        assert sorted(set(runs)) == runs

    async with managed(ticker) as manager:
        await at_once(3, visit)


async def stray_cancellation() -> None:
    """Raise a cancellation that nobody asked for: one that has left its scope."""
    stray: list[BaseException] = []
    with CancelScope() as scope:
        scope.cancel()
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class() as exc:
            stray.append(exc)
    raise stray[0]


async def lesson_05_dead_upstream() -> None:
    async def play() -> AsyncGenerator[int, None]:
        yield 1
        await dawdle()
        end = random.randrange(5)
        if end == 0:
            await stray_cancellation()
        elif end < 4:
            raise (EndOfStream, ValueError, KeyError)[end - 1]

    async def subscribe() -> None:
        async with manager.subscribe(SharedSource(key="dead", open=play)) as stream:
            reader = Reader(stream)
            await reader.run()
            assert isinstance(reader.terminal, (PollTerminated, ValueError, KeyError)), reader.terminal
            assert reader.got in ([1], [])
            assert not subscribed(manager, stream)

    async with managed() as manager:
        await at_once(3, subscribe)


async def lesson_07_no_consumer_owns_the_upstream() -> None:
    ticker = Ticker()
    started = Gate(1)
    joined = Gate(2)
    cancelled = Gate(1)

    async def own() -> None:
        async with manager.subscribe(ticker.source) as stream:
            started.come()
            while True:
                await stream.receive()

    async def subscribe() -> None:
        await started.wait()
        async with manager.subscribe(ticker.source) as stream:
            joined.come()
            await follow(manager, stream, 2)
            await cancelled.wait()
            await stream.receive()

    async def cancel() -> None:
        await joined.wait()
        await dawdle()
        owners.cancel_scope.cancel()
        cancelled.come()

    async with managed(ticker) as manager, create_task_group() as tasks:
        tasks.start_soon(cancel)
        tasks.start_soon(at_once, 2, subscribe)
        async with create_task_group() as owners:
            owners.start_soon(own)
    assert ticker.opened == 1


async def lesson_08_leaving_never_blocks() -> None:
    feed = Feed()
    feed.clean_up = Event()

    async def visit() -> None:
        async with create_task_group() as tasks:
            with CancelScope() as scope:
                tasks.start_soon(cancel_soon, scope)
                async with manager.subscribe(feed.source, max_buffer_size=1) as stream:
                    feed.emit(1)
                    await dawdle()
                    stream.close()
                    assert not subscribed(manager, stream)

    async with managed(feed) as manager:
        await at_once(3, visit)  # which ends although the clean-up does not
        feed.clean_up.set()
        await manager.stop_all()


async def lesson_10_keys_that_nobody_holds_are_forgotten() -> None:
    tickers = [Ticker("one"), Ticker("other")]

    async def visit() -> None:
        for _ in range(2):
            async with manager.subscribe(random.choice(tickers).source) as stream:
                await follow(manager, stream, random.randrange(2))

    async with managed(*tickers) as manager:
        await at_once(3, visit)


async def lesson_11_registered_means_registered() -> None:
    ticker = Ticker()

    async def visit() -> None:
        async with manager.subscribe(ticker.source) as stream:
            await follow(manager, stream, 3)

    async with managed(ticker) as manager, manager.subscribe(ticker.source) as first:
        await first.receive()
        await at_once(3, visit)
    assert ticker.opened == 1


async def lesson_15_a_source_that_never_waits_starves_nobody() -> None:
    """The bound is larger than it would have to be by itself: here, whoever is ready may be left waiting for a few turns."""

    async def play() -> AsyncGenerator[int, None]:
        n = 0
        while True:
            yield n
            n += 1

    async def subscribe() -> None:
        async with manager.subscribe(source, max_buffer_size=2_000) as stream:
            first = published(manager, stream)
            assert [await stream.receive() for _ in range(100)] == list(range(first, first + 100))

    source = SharedSource(key="endless", open=play)
    async with managed() as manager:
        await at_once(2, subscribe)


async def lesson_16_a_dead_subscriber_does_not_keep_the_upstream_busy() -> None:
    busy = Busy()

    async def fall_behind() -> None:
        async with manager.subscribe(busy.source, max_buffer_size=2) as stream:
            await until(lambda: not subscribed(manager, stream))
            with pytest.raises(SubscriberOverflow):
                await stream.receive()

    async with managed() as manager:
        await at_once(3, fall_behind)
        await until(lambda: idle(manager))
    # Whoever comes late, and there are three, sees three events more; so does whoever finds it closing.
    assert busy.reads <= 12


async def lesson_17_a_cancellation_of_the_one_who_leaves_is_not_swallowed() -> None:
    ticker = Ticker()

    async def visit() -> None:
        async with create_task_group() as tasks:
            with CancelScope() as scope:
                tasks.start_soon(cancel_soon, scope)
                async with manager.subscribe(ticker.source):
                    await dawdle()
                if scope.cancel_called:
                    await anyio.sleep_forever()

    async with managed(ticker) as manager:
        await at_once(3, visit)
        await manager.stop_all()


async def lesson_17_nor_is_a_native_one() -> None:
    ticker = Ticker()

    async def visit(started: Gate) -> None:
        async with manager.subscribe(ticker.source):
            started.come()
            await dawdle()

    async def visit_and_cancel() -> None:
        started = Gate(1)
        task = asyncio.get_running_loop().create_task(visit(started))
        await started.wait()
        await dawdle(8)
        requested = task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() is requested

    async with managed(ticker) as manager:
        await at_once(2, visit_and_cancel)
        await manager.stop_all()


async def lesson_18_two_upstreams_of_a_key_never_overlap() -> None:
    ticker = Ticker(events=3, fails=True)

    async def visit() -> None:
        for _ in range(2):
            async with manager.subscribe(ticker.source) as stream:
                reader = Reader(stream)
                with anyio.move_on_after(random.randrange(4)):
                    await reader.run()
                assert isinstance(reader.terminal, (ValueError, EndOfStream, type(None)))

    async def stop() -> None:
        await manager.stop("ticker")

    async with managed(ticker) as manager, create_task_group() as tasks:
        tasks.start_soon(at_once, 1, stop)
        await at_once(3, visit)


async def lesson_19_a_failure_does_not_overtake_data() -> None:
    feed = Feed()
    joined = Gate(3)

    async def subscribe() -> None:
        async with manager.subscribe(feed.source) as stream:
            joined.come()
            await dawdle()
            reader = Reader(stream)
            await reader.run()
            assert reader.got == [0, 1, 2, 3]
            assert isinstance(reader.terminal, ValueError)

    async def play() -> None:
        await joined.wait()
        for n in range(4):
            feed.emit(n)
            await dawdle(1)
        feed.fail(ValueError("end"))

    async with managed(feed) as manager, create_task_group() as tasks:
        tasks.start_soon(play)
        await at_once(3, subscribe)


async def read_into(taken: list[Any], stream: Subscription[Any], started: Gate) -> None:
    started.come()
    while True:
        taken.append(await stream.receive())


def all_of_them(taken: list[Any]) -> bool:
    return [n for _, n in taken] == list(range(len(taken)))


async def lesson_20_an_event_is_not_lost_with_the_task_that_was_woken_for_it() -> None:
    ticker = Ticker()
    taken: list[Any] = []
    async with managed(ticker) as manager, manager.subscribe(ticker.source) as stream:
        for _ in range(4):
            async with create_task_group() as tasks:
                tasks.start_soon(read_into, taken, stream, Gate(1))
                await dawdle(6)
                tasks.cancel_scope.cancel()
        taken.append(await stream.receive())
        assert all_of_them(taken)


async def lesson_20_nor_with_one_that_is_cancelled_natively() -> None:
    ticker = Ticker()
    taken: list[Any] = []
    async with managed(ticker) as manager, manager.subscribe(ticker.source) as stream:
        for _ in range(4):
            started = Gate(1)
            task = asyncio.get_running_loop().create_task(read_into(taken, stream, started))
            await started.wait()
            await dawdle(6)
            task.cancel()
            await asyncio.wait([task])
        taken.append(await stream.receive())
        assert all_of_them(taken)


ON_BOTH: list[Scenario] = [
    lesson_01_first_join_race,
    lesson_02_last_leave_against_new_join,
    lesson_03_leave_during_join,
    lesson_04_joining_at_the_instant_of_the_terminal,
    lesson_05_dead_upstream,
    lesson_07_no_consumer_owns_the_upstream,
    lesson_08_leaving_never_blocks,
    lesson_10_keys_that_nobody_holds_are_forgotten,
    lesson_11_registered_means_registered,
    lesson_15_a_source_that_never_waits_starves_nobody,
    lesson_16_a_dead_subscriber_does_not_keep_the_upstream_busy,
    lesson_17_a_cancellation_of_the_one_who_leaves_is_not_swallowed,
    lesson_18_two_upstreams_of_a_key_never_overlap,
    lesson_19_a_failure_does_not_overtake_data,
    lesson_20_an_event_is_not_lost_with_the_task_that_was_woken_for_it,
]

#: With the cancellation of a single task, which trio does not have.
ON_ASYNCIO: list[Scenario] = [
    lesson_17_nor_is_a_native_one,
    lesson_20_nor_with_one_that_is_cancelled_natively,
]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("scenario", ON_BOTH)
def test_a_lesson_holds_in_any_order(scenario: Scenario, backend: Literal["asyncio", "trio"]) -> None:
    holds(scenario, backend)


@pytest.mark.parametrize("scenario", ON_ASYNCIO)
def test_a_lesson_about_native_cancellation_holds_in_any_order(scenario: Scenario) -> None:
    holds(scenario, "asyncio")
