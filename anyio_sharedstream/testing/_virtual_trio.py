"""Virtual time on trio: a clock that goes to the next deadline instead of waiting; imported only where trio runs.

Relies on `_deadlock` for what happens when there is nothing to wait for. It is not trio's ``MockClock``, for that spins without
end on a deadlock.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from math import inf
from time import monotonic
from typing import Any

import trio
from trio.testing import active_thread_count

from anyio_sharedstream.testing._deadlock import PATIENCE, Deadlock, Watch
from anyio_sharedstream.testing._waiting import WaitingTask, threads_under_way, where

__all__ = ["run_on_trio", "waiting_tasks"]


def waiting_tasks() -> list[WaitingTask]:
    """Give all tasks of a loop in which none is ready; the outer ones first."""
    return [WaitingTask(task.name, where(task.coro)) for task in _tasks()]


class _Clock(trio.abc.Clock):
    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._now = 0.0
        self._patience_ends: float | None = None

    def start_clock(self) -> None: ...

    def current_time(self) -> float:
        self._watch.turn()  # trio asks once in each turn, and others may
        return self._now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        # Trio asks when no task is ready. What finalisers have put into its queue is no task yet.
        if trio.lowlevel.current_statistics().run_sync_soon_queue_size:
            return 0
        if _waiting_for_idle():
            return 1  # trio cuts that short, wakes them, and asks again
        if active_thread_count() and threads_under_way(task.coro for task in _tasks()) > 0:
            return self._be_patient()
        self._patience_ends = None
        if deadline < inf:
            self._now = max(self._now, deadline)  # one that was set in the past is due, and time does not go back
        else:
            self._stuck()
        return 0

    def _be_patient(self) -> float:
        """Wait in real time; a thread that is done ends that."""
        now = monotonic()
        if self._patience_ends is None:
            self._patience_ends = now + PATIENCE
        if now >= self._patience_ends:
            self._stuck(thread=True)
        return self._patience_ends - now

    def _stuck(self, *, thread: bool = False) -> None:
        self._watch.stuck(Deadlock(waiting_tasks(), self._now, thread=thread))


def _waiting_for_idle() -> bool:
    # The one private name of trio's in here: its own MockClock is told of such tasks, and another clock cannot be. If trio moves
    # it, this says that there are none, and `wait_all_tasks_blocked` is a deadlock.
    from trio._core import _run

    runner = getattr(_run.GLOBAL_RUN_CONTEXT, "runner", None)
    return bool(getattr(runner, "waiting_for_idle", None))


def _tasks() -> Iterator[trio.lowlevel.Task]:
    """Give all tasks but those of trio's own, whose names are in angle brackets; the outer ones first."""
    root = trio.lowlevel.current_root_task()
    tasks = [] if root is None else [root]
    for task in tasks:
        tasks += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return (task for task in tasks if not task.name.startswith("<"))


def run_on_trio(name: str, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> Any:
    """Run *function* in a new event loop in virtual time; its task is called *name*."""
    watch = Watch(lambda: [task.coro for task in _tasks()])

    async def main() -> Any:
        trio.lowlevel.current_task().name = name
        return await watch.run(function, args)

    try:
        return trio.run(main, clock=_Clock(watch))
    except trio.TrioInternalError as exc:
        # What the clock raises ends trio at once, which then says so.
        raise (watch.deadlock or exc) from None
