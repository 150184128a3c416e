"""Virtual time on asyncio: an event loop whose selector lets the time pass instead of waiting.

Relies on `_deadlock` for what happens when there is nothing to wait for. What any loop of virtual time needs is a function here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from math import inf
from selectors import DefaultSelector
from threading import active_count
from typing import Any

import anyio

from anyio_sharedstream.testing._deadlock import PATIENCE, Deadlock, Watch
from anyio_sharedstream.testing._waiting import WaitingTask, threads_under_way, where

__all__ = ["run_on_asyncio", "set_timer", "waiting_tasks"]


def waiting_tasks(loop: asyncio.AbstractEventLoop) -> list[WaitingTask]:
    """Give all tasks of a loop in which none is ready: by their names, and so by age if they have none of their own."""
    tasks = sorted(asyncio.all_tasks(loop), key=lambda task: (len(task.get_name()), task.get_name()))
    return [WaitingTask(task.get_name(), where(task.get_coro())) for task in tasks]


def set_timer(  # the types of the arguments are handed through
    call_at: Callable[..., asyncio.TimerHandle],
    loop: asyncio.AbstractEventLoop,
    when: float,
    callback: Callable[..., object],
    args: tuple[Any, ...],
    context: Any,
) -> asyncio.TimerHandle:
    """Call *call_at*, but not for what never comes: `anyio.sleep_forever` sets a timer, and the time would pass for ever."""
    if when < inf:
        return call_at(when, callback, *args, context=context)
    return asyncio.TimerHandle(when, callback, args, loop, context)


class _Selector(DefaultSelector):
    loop: _Loop
    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if self.loop.waits_for_threads():
            # What a thread has done reaches the loop through a socket, so this ends as soon as it can.
            ready = super().select(PATIENCE)
            if not ready:
                self.loop.stuck(thread=True)
        elif timeout is None:
            self.loop.stuck()
        else:
            self.now += timeout
        return ready


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self, watch: Watch) -> None:
        self._virtual = _Selector()
        self._virtual.loop = self
        self._watch = watch
        self._jobs: set[object] = set()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now

    def call_at(  # type: ignore[override]  # the types of the arguments are handed through
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        return set_timer(super().call_at, self, when, callback, args, context)

    def waits_for_threads(self) -> bool:
        if active_count() == 1 and not self._jobs:
            return False
        coroutines = [task.get_coro() for task in asyncio.all_tasks(self)]
        return bool(self._jobs) or threads_under_way(coroutines) > 0

    def stuck(self, *, thread: bool = False) -> None:
        self._watch.stuck(Deadlock(waiting_tasks(self), self.time(), thread=thread))

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


def run_on_asyncio(name: str, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> Any:
    """Run *function* in a new event loop in virtual time; its task is called *name*."""
    watch = Watch()

    async def main() -> Any:
        task = asyncio.current_task()
        assert task is not None
        task.set_name(name)
        return await watch.run(function, args)

    return anyio.run(main, backend="asyncio", backend_options={"loop_factory": lambda: _Loop(watch)})
