"""The waiter of `_parking` for trio; imported only where trio runs."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

__all__ = ["TrioWaiter"]


class TrioWaiter:
    """A task of trio's, parked until it is rescheduled once."""

    __slots__ = ("_task",)

    def __init__(self) -> None:
        self._task: Task | None = current_task()

    def done(self) -> bool:
        return self._task is None

    def set_result(self, _result: None, /) -> None:
        task, self._task = self._task, None
        assert task is not None
        reschedule(task)

    def _abort(self, _raise_cancel: object) -> Abort:
        # Trio wakes the task itself now, and a second wake-up would be an error.
        self._task = None
        return Abort.SUCCEEDED

    def __await__(self) -> Generator[Any, Any, None]:
        return wait_task_rescheduled(self._abort).__await__()
