"""The clock of a manager: timers are called at their time, in order, and those that nobody waits for cost nothing."""

from __future__ import annotations

import gc
import math
import random
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import pytest
import structlog
from anyio import current_time, sleep, sleep_until
from anyio.lowlevel import checkpoint
from structlog.testing import LogCapture

from anyio_sharedstream import SharedStreamManager
from anyio_sharedstream._clock import Clock, Timer
from tests.support import Feed, settle
from tests.virtual_time import in_virtual_time


class Watch:
    """A clock, and what its timers did: pairs of the time and the name of the timer."""

    def __init__(self, tasks: anyio.abc.TaskGroup) -> None:
        self.clock = Clock(self._start)
        self.tasks = tasks
        self.fired: list[tuple[float, Any]] = []
        self.running = 0
        self.started = 0
        self.scope = anyio.CancelScope()
        """around the task that runs the clock"""

    def timer(self, name: Any, then: Callable[[], object] = lambda: None) -> Timer:
        def fire() -> None:
            self.fired.append((current_time(), name))
            then()

        return Timer(self.clock, fire)

    def _start(self) -> None:
        self.started += 1
        self.scope = anyio.CancelScope()
        self.tasks.start_soon(self._run, self.scope)

    async def _run(self, scope: anyio.CancelScope) -> None:
        self.running += 1
        with scope:
            await self.clock.run()
        self.running -= 1


@asynccontextmanager
async def watch() -> AsyncIterator[Watch]:
    """The clock's task must have ended by itself when the block is over, or the test never ends."""
    async with anyio.create_task_group() as tasks:
        watch = Watch(tasks)
        yield watch
    assert (watch.running, watch.clock.wanted) == (0, 0)


@in_virtual_time
async def test_a_timer_is_called_once_at_its_time() -> None:
    async with watch() as w:
        timer = w.timer("it")
        timer.start_at(5)
        assert timer.deadline == 5
        await sleep_until(4.875)
        assert w.fired == []
        await sleep(10)
        assert w.fired == [(5, "it")]
        assert timer.deadline is None


@pytest.mark.parametrize("deadline", [0, 1, 2])
@in_virtual_time
async def test_a_time_that_is_over_is_now(deadline: float) -> None:
    async with watch() as w:
        await sleep(2)
        w.timer("late").start_at(deadline)
        assert w.fired == []  # never from within the call
        await settle()
        assert w.fired == [(2, "late")]


@pytest.mark.parametrize(
    ("deadlines", "fires"),
    [
        ((5, 9), 9),
        ((9, 5), 5),
        ((5, 9, 7), 7),
        ((9, 5, 7), 7),
        ((9, 5, 9), 9),
        ((5, 9, 5), 5),
        ((5, 5), 5),
        ((5, math.inf, 8), 8),
        ((math.inf, 5), 5),
        (tuple(range(10, 1000)), 999),
        (tuple(range(1000, 10, -1)), 11),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("pause", [False, True])
@pytest.mark.parametrize("stop", [False, True])
@in_virtual_time
async def test_only_the_last_word_counts(deadlines: tuple[float, ...], fires: float, pause: bool, stop: bool) -> None:
    async with watch() as w:
        timer = w.timer("it")
        for deadline in deadlines:
            timer.start_at(deadline)
            await settle(2 * pause)
            if stop:
                timer.stop()
                await settle(2 * pause)
                timer.start_at(deadline)
        await sleep(2000)
        assert w.fired == [(fires, "it")]


@in_virtual_time
async def test_a_timer_that_is_moved_while_time_passes_fires_at_the_end() -> None:
    async with watch() as w:
        timer, other = w.timer("it"), w.timer("other")
        other.start_at(103)
        for second in range(100):
            timer.start_at(second + 10)
            await sleep(1)
        await sleep(100)
        assert w.fired == [(103, "other"), (109, "it")]
        assert w.started == 1


@in_virtual_time
async def test_timers_fire_in_the_order_of_their_times_and_at_one_time_in_the_order_in_which_they_were_started() -> None:
    async with watch() as w:
        for number in range(300):
            w.timer(number).start_at(number * 7 % 3 + 1)
        await sleep(1.5)
        assert w.fired == [(1, number) for number in range(0, 300, 3)]
        await sleep(10)
        assert [time for time, _ in w.fired] == [1] * 100 + [2] * 100 + [3] * 100
        assert [number for _, number in w.fired[100:200]] == list(range(1, 300, 3))


# The task.


@in_virtual_time
async def test_there_is_a_task_only_while_something_is_waited_for() -> None:
    async with watch() as w:
        timers = [w.timer(number) for number in range(3)]
        for round_ in range(1, 4):
            await settle()
            assert w.running == 0
            for timer in timers:
                timer.start_at(current_time() + 10)
            await sleep(1)
            assert (w.running, w.started, w.clock.wanted) == (1, 2 * round_ - 1, 3)
            for timer in timers:
                assert w.running == 1
                timer.stop()
            await settle()
            assert w.running == 0
            timers[0].start_at(current_time() + 1)
            await sleep(2)
            assert (w.running, w.started) == (0, 2 * round_)
        assert [name for _, name in w.fired] == [0, 0, 0]


@pytest.mark.parametrize("pauses", range(6))
@in_virtual_time
async def test_stopping_the_last_and_starting_another_at_once_is_no_end(pauses: int) -> None:
    async with watch() as w:
        one, two = w.timer("one"), w.timer("two")
        one.start_at(5)
        await settle(pauses)
        one.stop()
        two.start_at(7)
        await settle(pauses)
        two.stop()
        one.start_at(6)
        await sleep(1)
        assert w.running == 1
        await sleep(10)
        assert w.fired == [(6, "one")]


@in_virtual_time
async def test_a_timer_that_never_comes_holds_up_nobody() -> None:
    async with watch() as w:
        never = w.timer("never")
        never.start_at(math.inf)
        for number in range(10):
            w.timer(number).start_at(10 - number)
        await sleep(1000)
        assert w.fired == [(number, 10 - number) for number in range(1, 11)]
        assert w.running == 1
        never.stop()


# Callbacks.


@in_virtual_time
async def test_a_callback_may_stop_others_that_are_due_as_well() -> None:
    async with watch() as w:

        def stop() -> None:
            due.stop()
            later.stop()

        w.timer("first", stop).start_at(5)
        due, later, other = w.timer("due"), w.timer("later"), w.timer("other")
        due.start_at(5)
        later.start_at(6)
        other.start_at(5)
        await sleep(10)
        assert w.fired == [(5, "first"), (5, "other")]


@in_virtual_time
async def test_a_callback_may_stop_all_and_itself() -> None:
    async with watch() as w:
        timers: list[Timer] = []

        def stop() -> None:
            for timer in timers:
                timer.stop()

        timers += [w.timer(number, stop) for number in range(5)]
        for timer in timers:
            timer.start_at(5)
        await sleep(10)
        assert w.fired == [(5, 0)]
        assert w.running == 0


@in_virtual_time
async def test_a_callback_may_start_others_and_move_them() -> None:
    async with watch() as w:

        def start() -> None:
            now.start_at(current_time())
            past.start_at(0)
            future.start_at(9)
            moved_away.start_at(8)
            moved_forward.start_at(6)

        now, past, future = w.timer("now"), w.timer("past"), w.timer("future")
        moved_away, moved_forward = w.timer("moved away"), w.timer("moved forward")
        w.timer("first", start).start_at(5)
        moved_away.start_at(5)
        moved_forward.start_at(100)
        await sleep(200)
        assert sorted(w.fired[1:3]) == [(5, "now"), (5, "past")]
        assert [w.fired[0], *w.fired[3:]] == [(5, "first"), (6, "moved forward"), (8, "moved away"), (9, "future")]
        assert w.started == 1


@in_virtual_time
async def test_a_callback_may_start_its_own_timer_again() -> None:
    async with watch() as w:

        def again() -> None:
            if len(w.fired) < 5:
                timer.start_at(current_time() + 2)

        timer = w.timer("it", again)
        timer.start_at(2)
        await sleep(100)
        assert w.fired == [(2, "it"), (4, "it"), (6, "it"), (8, "it"), (10, "it")]


@in_virtual_time
async def test_the_last_callback_may_start_another_timer() -> None:
    async with watch() as w:
        another = w.timer("another")
        w.timer("first", lambda: another.start_at(7)).start_at(5)
        await sleep(10)
        assert w.fired == [(5, "first"), (7, "another")]
        assert w.running == 0


# What nobody waits for any more.


@in_virtual_time
async def test_a_closed_timer_is_never_called_and_keeps_nothing_alive() -> None:
    async with watch() as w:
        callback = partial(w.fired.append, (0, "closed"))
        gone = weakref.ref(callback)
        timer = Timer(w.clock, callback)
        timer.start_at(5)
        await settle()
        timer.close()
        del callback
        gc.collect()
        assert gone() is None
        assert w.clock.wanted == 0
        timer.close()
        timer.start_at(6)
        await sleep(10)
        assert timer.deadline is None
        assert w.fired == []


@pytest.mark.parametrize("kept", [1, 50, 500])
@in_virtual_time
async def test_timers_that_were_stopped_do_not_pile_up_while_others_are_waited_for(kept: int) -> None:
    async with watch() as w:
        alive: weakref.WeakSet[Any] = weakref.WeakSet()
        rest = [w.timer(number) for number in range(kept)]
        for timer in rest:
            timer.start_at(1000)
        for number in range(5000):
            callback = partial(w.fired.append, (0.0, number))
            alive.add(callback)
            timer = Timer(w.clock, callback)
            timer.start_at(10 + number % 100)
            timer.stop()
            del timer, callback
        gc.collect()
        assert len(alive) <= max(64, 2 * kept)
        await sleep(2000)
        assert w.fired == [(1000, number) for number in range(kept)]
    gc.collect()
    assert len(alive) == 0


@in_virtual_time
async def test_moving_a_timer_away_again_and_again_leaves_nothing_behind() -> None:
    async with watch() as w:
        timer, other = w.timer("it"), w.timer("other")
        other.start_at(10_000)
        timer.start_at(10)
        before = len(gc.get_referrers(timer))
        for number in range(5000):
            timer.start_at(11 + number)
        assert len(gc.get_referrers(timer)) == before
        await sleep(20_000)
        assert w.fired == [(5010, "it"), (10_000, "other")]


@in_virtual_time
async def test_what_moving_forward_leaves_behind_goes_when_another_is_stopped() -> None:
    async with watch() as w:
        timer, other = w.timer("it"), w.timer("other")
        other.start_at(20_000)
        for number in range(5000):
            timer.start_at(10_000 - number)
        other.stop()
        assert len(gc.get_referrers(timer)) < 10
        await sleep(20_000)
        assert w.fired == [(5001, "it")]


@pytest.mark.parametrize("seed", range(30))
@in_virtual_time
async def test_any_timeline_gives_what_a_simple_list_would_give(seed: int) -> None:
    """Of many timers, hundreds are started, moved and stopped at random, and time passes."""
    randomly = random.Random(seed)
    async with watch() as w:
        timers = [w.timer(number) for number in range(200)]
        deadlines: dict[int, float] = {}
        expected: list[tuple[float, int]] = []
        for _ in range(2000):
            number = randomly.randrange(200)
            if randomly.random() < 0.3:
                timers[number].stop()
                deadlines.pop(number, None)
            else:
                deadlines[number] = current_time() + randomly.randint(1, 20)
                timers[number].start_at(deadlines[number])
            if randomly.random() < 0.05:
                await sleep(randomly.randint(0, 8))
                await settle()
                due = {name: time for name, time in deadlines.items() if time <= current_time()}
                expected += sorted((time, name) for name, time in due.items())
                deadlines = {name: time for name, time in deadlines.items() if name not in due}
                assert sorted(w.fired) == sorted(expected)
                assert [time for time, _ in w.fired] == [time for time, _ in expected]
                assert w.clock.wanted == len(deadlines)
        for timer in timers:
            timer.stop()


# A cancellation. The clock's task is one of the manager's, and what is around that may be cancelled long before all is closed.


@in_virtual_time
async def test_after_a_cancellation_timers_old_and_new_fire_all_the_same() -> None:
    async with watch() as w:
        one, two, three = w.timer("one"), w.timer("two"), w.timer("three")
        one.start_at(10)
        two.start_at(20)
        await sleep(1)
        w.scope.cancel()
        await settle()
        three.start_at(1)
        await settle()
        assert w.fired == [(1, "three")]
        one.start_at(12)
        two.stop()
        two.start_at(15)
        await sleep(30)
        assert w.fired == [(1, "three"), (12, "one"), (15, "two")]


def hanging(key: str, clean_up: anyio.Event, **policies: Any) -> Any:
    feed = Feed(key)
    feed.clean_up = clean_up
    return feed.asking_for(**policies)


@in_virtual_time
async def test_a_cancellation_around_the_manager_leaves_it_as_itself_also_when_an_upstream_has_no_time_to_close() -> None:
    late, later = anyio.Event(), anyio.Event()
    with anyio.CancelScope() as scope:
        async with (
            SharedStreamManager() as manager,
            manager.subscribe(hanging("late", late, close_timeout=0)),
            manager.subscribe(hanging("later", later, silence_timeout=100)),
        ):
            await settle()
            scope.cancel()
            with anyio.CancelScope(shield=True):
                for event in (late, later):
                    await settle()
                    event.set()
    assert scope.cancelled_caught


@in_virtual_time
async def test_a_close_timeout_counts_also_after_a_cancellation_around_the_manager() -> None:
    clean_up = anyio.Event()
    with anyio.CancelScope() as scope:
        async with SharedStreamManager() as manager, manager.subscribe(hanging("feed", clean_up, close_timeout=5)):
            await settle()
            scope.cancel()
            with anyio.move_on_after(100, shield=True):
                await manager.stop_all()
            stopped = current_time()
            clean_up.set()
    assert stopped == 5


@in_virtual_time
async def test_a_clean_up_that_hangs_is_told_also_when_all_around_the_manager_is_cancelled() -> None:
    lines, clean_up = LogCapture(), anyio.Event()
    logger = structlog.wrap_logger(None, processors=[lines])

    async def set_free() -> None:
        with anyio.CancelScope(shield=True):
            await sleep_until(50)
        clean_up.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(set_free)
        async with (
            SharedStreamManager(logger=logger) as manager,
            manager.subscribe(hanging("feed", clean_up, close_timeout=5)),
        ):
            await settle()
            tasks.cancel_scope.cancel()
            await checkpoint()
    assert current_time() == 50
    assert [line["event"] for line in lines.entries].count("clean-up takes too long") == 1
