"""Virtual time on asyncio: an event loop whose selector lets the time pass instead of waiting.

Relies on `_deadlock` for what happens when there is nothing to wait for. The loop keeps its timers itself: asyncio looks a
nanosecond ahead to see what is due, which after half a year is less than its clock can tell, so nothing would ever be due.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf
from selectors import DefaultSelector
from threading import active_count
from typing import Any

import anyio

from anyio_sharedstream.testing._deadlock import PATIENCE, Deadlock, Watch
from anyio_sharedstream.testing._waiting import WaitingTask, threads_under_way, where

__all__ = ["run_on_asyncio", "waiting_tasks"]


#: So many timers may be kept, cancelled ones included.
_FEW = 100


def waiting_tasks(loop: asyncio.AbstractEventLoop) -> list[WaitingTask]:
    """Give all tasks of a loop in which none is ready: by their names, and so by age if they have none of their own."""
    tasks = sorted(asyncio.all_tasks(loop), key=lambda task: (len(task.get_name()), task.get_name()))
    return [WaitingTask(task.get_name(), where(task.get_coro())) for task in tasks]


class _Selector(DefaultSelector):
    loop: _Loop
    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        self.loop.watch.turn()
        due = self.loop.call_what_is_due(self.now)
        ready = super().select(0)
        if due or ready or timeout is not None:  # asyncio knows of no timers: it gives a timeout only if something can run
            return ready
        if self.loop.waits_for_threads():
            # What a thread has done reaches the loop through a socket, so this ends as soon as it can.
            ready = super().select(PATIENCE)
            if not ready:
                self.loop.stuck(thread=True)
        elif (when := self.loop.next_timer()) < inf:
            self.now = when
            self.loop.call_what_is_due(when)
        else:
            self.loop.stuck()
        return ready


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.watch = Watch(lambda: asyncio.all_tasks(self))
        self._virtual = _Selector()
        self._virtual.loop = self
        self._jobs: set[object] = set()
        self._timers: list[tuple[float, int, asyncio.TimerHandle, Callable[..., object], tuple[Any, ...], Any]] = []
        self._numbers = count()
        self._many = _FEW
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now

    def call_at(  # type: ignore[override]  # the types of the arguments are handed through
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        if context is None:
            context = copy_context()
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        if when < inf:  # else it never comes: `anyio.sleep_forever` sets a timer
            heappush(self._timers, (when, next(self._numbers), timer, callback, args, context))
            if len(self._timers) > self._many:
                self._forget_the_cancelled()
        return timer

    def _forget_the_cancelled(self) -> None:
        # Not only when their time comes: a timeout of a day for each of a million events would keep all of them.
        self._timers = [each for each in self._timers if not each[2].cancelled()]
        heapify(self._timers)
        self._many = max(_FEW, 2 * len(self._timers))

    def next_timer(self) -> float:
        """When the next timer is due; infinity if there is none."""
        while self._timers and self._timers[0][2].cancelled():
            heappop(self._timers)
        return self._timers[0][0] if self._timers else inf

    def call_what_is_due(self, now: float) -> bool:
        """Have the timers called that are due; false if there are none."""
        due = False
        while self.next_timer() <= now:
            due = True
            _, _, timer, callback, args, context = heappop(self._timers)
            self.call_soon(_unless_cancelled, timer, callback, args, context=context)
        return due

    def waits_for_threads(self) -> bool:
        if active_count() == 1 and not self._jobs:
            return False
        coroutines = [task.get_coro() for task in asyncio.all_tasks(self)]
        return bool(self._jobs) or threads_under_way(coroutines) > 0

    def stuck(self, *, thread: bool = False) -> None:
        self.watch.stuck(Deadlock(waiting_tasks(self), self.time(), thread=thread))

    def run_in_executor(  # type: ignore[override]  # the types of the arguments are handed through
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        job: asyncio.Future[Any] = super().run_in_executor(executor, func, *args)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return job

    async def shutdown_default_executor(self, *args: Any, **kwargs: Any) -> None:
        # A thread of its own waits for the executor's, and time must not pass for either.
        job = object()
        self._jobs.add(job)
        try:
            await super().shutdown_default_executor(*args, **kwargs)
        finally:
            self._jobs.discard(job)


def _unless_cancelled(timer: asyncio.TimerHandle, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
    if not timer.cancelled():  # by another that was due at the same time
        callback(*args)


def run_on_asyncio(name: str, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> Any:
    """Run *function* in a new event loop in virtual time; its task is called *name*."""

    async def main() -> Any:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        assert isinstance(loop, _Loop)
        task.set_name(name)
        return await loop.watch.run(function, args)

    return anyio.run(main, backend="asyncio", backend_options={"loop_factory": _Loop})
