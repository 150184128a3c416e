"""What becomes of a deadlock in virtual time: the report, and the way out.

Relies on `_waiting` for the tasks of the report. The backends' clocks notice the deadlock and call in here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NoReturn

from anyio import CancelScope

from anyio_sharedstream.testing._waiting import WaitingTask, keep

__all__ = ["PATIENCE", "Deadlock", "Watch"]

#: For how many seconds of real time a worker thread may be under way, while virtual time stands still.
PATIENCE = 30.0

#: How many turns of the event loop are left for the clean-ups after a deadlock. A task that swallows its cancellation whenever it
#: comes would take turns for ever.
_TURNS = 100_000


class Deadlock(AssertionError):  # noqa: N818  # the name says what happened
    """Nothing can ever run again: no task is ready, and none waits for a time to come. The message lists the waiting tasks."""

    waiting: tuple[WaitingTask, ...]
    """the tasks that waited, each with its name and the line"""
    time: float
    """the virtual time in seconds"""

    def __init__(self, waiting: Iterable[WaitingTask], time: float, *, thread: bool = False) -> None:
        self.waiting = tuple(waiting)
        self.time = time
        lines = "".join(f"\n  {task}" for task in self.waiting)
        why = "nothing can run, and there is no deadline"
        if thread:
            why = f"a worker thread has been under way for {PATIENCE} s of real time; meanwhile virtual time stands still"
        super().__init__(f"deadlock after {time} s: {why}. These tasks wait:{lines}")


class Watch:
    """Runs the main task, and ends it when there is a deadlock: first by cancelling everything, then by force."""

    def __init__(self, tasks: Callable[[], Iterable[object]]) -> None:
        """:param tasks: gives all tasks of the event loop"""
        self.deadlock: Deadlock | None = None
        self._tasks = tasks
        self._scope: CancelScope | None = None  # around the main task, while that runs
        self._turns = 0

    async def run(self, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> Any:
        """Call *function*; raises the `Deadlock`, if there was one, whatever the function made of being cancelled."""
        result = None
        try:
            with CancelScope() as self._scope:
                result = await function(*args)
        except Exception as exc:
            if self.deadlock is not None:
                raise self.deadlock from exc
            raise
        finally:
            self._scope = None
        if self.deadlock is not None:
            raise self.deadlock
        return result

    def turn(self) -> None:
        """A turn of the event loop begins. Raises the deadlock if there was one and its clean-ups do not end."""
        if self.deadlock is not None:
            self._turns += 1
            if self._turns > _TURNS:
                self._end_by_force(self.deadlock)

    def stuck(self, deadlock: Deadlock) -> None:
        """There is a deadlock. Raises it if cancelling everything has not helped, or cannot any more."""
        if self.deadlock is None:
            self.deadlock = deadlock
            if self._scope is not None:
                self._scope.cancel()
                return
        self._end_by_force(self.deadlock)

    def _end_by_force(self, deadlock: Deadlock) -> NoReturn:
        keep(self._tasks())
        raise deadlock
