"""Waking a trio task that nothing else will wake; imported only where trio runs, and relies on trio alone."""

from __future__ import annotations

from typing import Any, NoReturn

from trio.lowlevel import Abort, Task, reschedule

__all__ = ["wake"]


def wake(task: Task, signal: Any) -> None:
    """Do what trio does to deliver a cancellation, shielded or not: abort the wait, if that can be done, and resume the task.

    :param signal: what the task has yielded to the event loop; what trio calls its parts is not public, and without them this
        does nothing
    """
    abort = getattr(signal, "abort_func", None)
    if abort is not None and abort(_end) is Abort.SUCCEEDED:
        reschedule(task)


def _end() -> NoReturn:
    raise GeneratorExit
