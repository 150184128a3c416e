"""How the library leaves its own task groups: what leaves them is what was raised, and not a group around it.

Relies on `_exceptions`. Neither the manager's tasks nor a runner's ever raise: what is fatal is told to their owner, who cancels
the task group and raises it here.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from types import TracebackType

from anyio import current_effective_deadline, get_cancelled_exc_class

from anyio_sharedstream._exceptions import SharedStreamError, without

__all__ = ["Exit", "being_cancelled", "leave"]

Exit = Callable[[type[BaseException] | None, BaseException | None, TracebackType | None], Awaitable[bool | None]]


def being_cancelled() -> bool:
    """Whether a scope around the running code has been cancelled, and nothing shields from it."""
    return current_effective_deadline() == -math.inf


async def leave(exit_: Exit, body_error: BaseException | None, fatal: Callable[[], BaseException | None]) -> None:
    """Call the ``__aexit__`` of a task group, or of a stack with one in it, and raise what *fatal* then gives.

    :param body_error: what is leaving the body; the caller's ``async with`` goes on raising it
    """
    # The task group is told of a cancellation only, for that may be its own scope's. Anything else it would wrap.
    cancelled = body_error if isinstance(body_error, get_cancelled_exc_class()) else None
    swallowed = False
    interrupt: BaseException | None = None
    try:
        swallowed = bool(await exit_(type(cancelled) if cancelled else None, cancelled, None))
    except get_cancelled_exc_class():
        # A cancellation that comes while this waits must not take the place of an error that is on its way out.
        if body_error is None and fatal() is None:
            raise
    except BaseExceptionGroup as group:
        interrupt = _sole(group)  # a KeyboardInterrupt of the waiting task, which trio puts into a group
    error = fatal() or interrupt
    if error is not None:
        raise error
    if cancelled is not None and swallowed:
        # On asyncio, a task that is natively cancelled before its first step never runs, and takes the task group with it.
        raise SharedStreamError("everything was cancelled, for a task of the library was, by `Task.cancel()`") from cancelled


def _sole(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    error = without(group, get_cancelled_exc_class())
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
