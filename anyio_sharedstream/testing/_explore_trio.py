"""One schedule on trio; imported only where it is run, and relies on trio's public interfaces alone to drive tasks.

trio runs all ready tasks in a batch, and at most reverses it. Here a task that trio runs is only noted as ready, and waits again:
every coroutine is driven by hand. When trio has nothing left to run, it asks its clock how long to sleep, and this clock lets one
of those that are ready take its step, drawn at random; with none, time passes. So what trio does with a batch does not matter.
"""

from __future__ import annotations

import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from functools import partial
from itertools import count
from math import inf
from random import Random
from typing import Any

import trio
from trio.lowlevel import Abort, Task, add_instrument, current_statistics, current_task, reschedule, wait_task_rescheduled

from anyio_sharedstream.testing._deadlock import Deadlock
from anyio_sharedstream.testing._explore_schedule import MAX_STEPS, Livelock, Schedule
from anyio_sharedstream.testing._virtual_trio import waiting_tasks
from anyio_sharedstream.testing._waiting import driven_by_hand, keep, name_of

__all__ = ["run_schedule"]

_Coroutine = Coroutine[Any, Any, Any]

#: How often a scenario that is stuck is told to end; and how many steps it may take when it has been cancelled, and between being
#: told and being told again.
_PATIENCE = 100
_LAST_STEPS = 10_000
_STEPS_BETWEEN = 100


def run_schedule(scenario: Callable[[], Awaitable[object]], seed: int) -> Schedule:
    """Run *scenario* once, its tasks in an order drawn from *seed*."""
    scheduler = _Scheduler(seed)
    error: BaseException | None = None
    try:
        trio.run(scheduler.run, scenario, clock=scheduler)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as exc:
        error = exc
    scheduler.check()
    return Schedule(order=scheduler.order, error=scheduler.stuck or error)


class _Scheduler(trio.abc.Clock, trio.abc.Instrument):
    def __init__(self, seed: int) -> None:
        self.order = 0
        self.stuck: AssertionError | None = None
        """why the scenario can never end"""
        self._walk = Random(seed)
        self._now = 0.0
        self._steps = 0
        self._numbers = count()
        self._ready: dict[int, Task] = {}
        self._unstarted: set[int] = set()
        self._tasks: dict[int, Task] = {}
        self._everything = trio.CancelScope()
        self._waits: dict[int, Any] = {}  # what each coroutine has last told trio to wait for
        self._told = 0
        self._last_step = 0

    async def run(self, scenario: Callable[[], Awaitable[object]]) -> None:
        async def main() -> None:
            await scenario()

        current_task().name = name_of(scenario)
        add_instrument(self)
        with self._everything:
            await self._stepwise(current_task(), main())

    def check(self) -> None:
        """Raise what is wrong with trio."""
        if self._unstarted:
            raise RuntimeError(f"trio {trio.__version__} does not run `Task.coro`, by which tasks are driven here")

    # As an instrument.

    def task_spawned(self, task: Task) -> None:
        coroutine: Any = self._stepwise(task, task.coro)
        task.coro = coroutine

    # As a clock.

    def start_clock(self) -> None: ...

    def current_time(self) -> float:
        return self._now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        if self._ready:
            self._step()
        elif not current_statistics().run_sync_soon_queue_size:  # what finalisers have put there is no task yet
            if deadline < inf:
                self._now = max(deadline, self._now)
            else:
                self._give_up(Deadlock(waiting_tasks(), self._now))
        return 0

    # Stepping.

    def _stepwise(self, task: Task, coroutine: _Coroutine) -> _Coroutine:
        number = next(self._numbers)
        self._unstarted.add(number)
        self._tasks[number] = task
        # A coroutine and not a generator, for trio looks at its frame.
        return self._drive_to_end(number, task, coroutine)

    async def _drive_to_end(self, number: int, task: Task, coroutine: _Coroutine) -> Any:
        self._unstarted.discard(number)
        try:
            return await self._drive(number, task, coroutine)
        finally:
            del self._tasks[number]

    @types.coroutine
    def _drive(self, number: int, task: Task, coroutine: _Coroutine) -> Generator[Any, Any, Any]:
        resume: Callable[[], Any] = partial(coroutine.send, None)
        while True:
            self._ready[number] = task
            yield from _wait().__await__()
            if self._told:
                resume = partial(coroutine.throw, _Abandoned())
            try:
                message = resume()
            except StopIteration as done:
                return done.value
            self._waits[number] = message
            try:
                resume = partial(coroutine.send, (yield message))
            except BaseException as exc:
                resume = partial(coroutine.throw, exc)

    def _step(self) -> None:
        self._steps += 1
        if self._steps == MAX_STEPS:
            self._give_up(Livelock())
        if self.stuck is not None and self._steps > self._last_step:
            self._last_step = self._steps + _STEPS_BETWEEN
            self._give_up(self.stuck)  # it swallows its cancellation, or shields itself
        # By age and not in the order in which they became ready: an event wakes its tasks in the order of a set.
        number = self._walk.choice(sorted(self._ready))
        self.order = hash((self.order, number))
        reschedule(self._ready.pop(number))

    # Ending what would not end.

    def _give_up(self, reason: AssertionError) -> None:
        if self.stuck is None:
            self.stuck = reason
            self._last_step = self._steps + _LAST_STEPS
            self._everything.cancel()
            return
        self._told += 1
        if self._told > _PATIENCE:
            keep(task.coro for task in self._tasks.values())
            raise self.stuck  # ends trio at once, as an internal error
        for number, task in self._tasks.items():
            # A task that waits for others in a nursery goes on when they have ended, and must not before.
            if number in self._ready or any(nursery.child_tasks for nursery in task.child_nurseries):
                continue
            if self._waits[number].abort_func(_abandon) is Abort.SUCCEEDED:
                reschedule(task)


driven_by_hand(_Scheduler._drive.__code__, "coroutine")


class _Abandoned(BaseException):
    """Ends a task that shields itself from being cancelled, where it waits for ever."""


async def _wait() -> None:
    await wait_task_rescheduled(_not_now)


def _abandon() -> None:
    raise _Abandoned


def _not_now(_raise_cancel: object) -> Abort:
    return Abort.FAILED  # as for any task that is ready: it meets the cancellation at its next checkpoint
