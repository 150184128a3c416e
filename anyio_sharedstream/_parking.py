"""One waiting task and its wake-up, for asyncio and trio.

Relies on the running backend alone. A task parks on the cheapest thing that its backend has: a bare future on asyncio, a
descheduled task on trio. The wake-up carries no value on purpose: what a task is woken *for* lies where the task will look, so
that a task cancelled between its wake-up and its next step has lost nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from anyio import get_cancelled_exc_class
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint

__all__ = ["Backend", "current_backend"]


@dataclass(frozen=True, slots=True)
class Backend:
    """What differs between the event loops, as far as this library is concerned.

    To park, a task puts a waiter of ``create_waiter()`` where others find it, awaits ``suspend(waiter)`` at once (the waiter, if
    that is None), and then takes the waiter away. To wake it, another takes the waiter away first, so that it is woken once.
    """

    create_waiter: Callable[[], Any]
    suspend: Callable[[Any], Awaitable[object]] | None
    wake: Callable[[Any, None], object]
    """Wake the task of a waiter. If a cancellation came first and the task has not run since, this does nothing on trio, and
    raises `asyncio.InvalidStateError` on asyncio: asking beforehand would cost something at every wake-up."""
    clock: Callable[[], float]
    """the event loop's time in seconds, as `anyio.current_time` gives it, for where that would cost too much"""
    call_soon: Callable[[Callable[[], object]], object]
    """Have a function called by the event loop; from any thread, and from finalisers. Raises `RuntimeError` if that has ended."""
    reorders: bool
    """whether tasks that are ready together run in any order, so that one checkpoint does not see all of them run"""

    async def let_woken_run(self) -> None:
        """Return after every task that was woken before this call has run, and a turn more; may raise a cancellation.

        Trio may run this task before those that were woken with it. For asyncio, see `Publisher.before_suspension`.
        """
        await checkpoint()
        await cancel_shielded_checkpoint()


def current_backend() -> Backend:
    """Describe the event loop that runs the current task."""
    if get_cancelled_exc_class() is not asyncio.CancelledError:
        # Imported here, and from a module of its own, because trio is an extra and takes a while to import.
        from anyio_sharedstream._parking_trio import create_waiter, current_call_soon, current_time, suspend, wake

        return Backend(create_waiter, suspend, wake, current_time, current_call_soon(), reorders=True)
    loop = asyncio.get_running_loop()
    create_future = loop.create_future
    # The unbound method, which is written in C: a function around it would cost as much again.
    return Backend(create_future, None, type(create_future()).set_result, loop.time, loop.call_soon_threadsafe, reorders=False)
