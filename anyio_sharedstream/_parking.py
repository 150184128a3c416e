"""One waiting task and its wake-up, for asyncio and trio.

Relies on the running backend alone. A waiter is shaped like an `asyncio.Future` that carries no value, for on asyncio it is
one: nothing written in Python is as cheap to wait for. It carries no value on purpose: what a task is woken *for* lies where
the task will look, so that a task cancelled between its wake-up and its next step has lost nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol

from anyio import get_cancelled_exc_class
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint

__all__ = ["BUSY", "Backend", "Waiter", "current_backend"]


class Waiter(Protocol):
    """One task waiting for one wake-up; awaited once, at once, by the task that made it."""

    def done(self) -> bool:
        """Whether the wake-up or a cancellation has come; the task need not have run since."""

    def set_result(self, result: None, /) -> None:
        """Wake the task; an error if it is done."""

    def __await__(self) -> Generator[Any, Any, None]:
        """Wait; a cancellation is raised here."""


@dataclass(frozen=True, slots=True)
class Backend:
    """What differs between the event loops, as far as this library is concerned."""

    create_waiter: Callable[[], Waiter]
    reorders: bool
    """whether tasks that are ready together run in any order, so that one checkpoint does not see all of them run"""

    async def let_woken_run(self) -> None:
        """Return after every task that was woken before this call has run; raises a cancellation, if there is one."""
        await checkpoint()
        if self.reorders:
            await cancel_shielded_checkpoint()


def current_backend() -> Backend:
    """Describe the event loop that runs the current task."""
    if get_cancelled_exc_class() is asyncio.CancelledError:
        return Backend(asyncio.get_running_loop().create_future, reorders=False)
    # Imported here, and from a module of its own, because trio is an extra and takes a while to import.
    from anyio_sharedstream._parking_trio import TrioWaiter

    return Backend(TrioWaiter, reorders=True)


class _Busy:
    """Stands in the waiter's place while a reader is not parked, but in a plain checkpoint: there is nothing to wake."""

    def done(self) -> bool:
        return True

    def set_result(self, _result: None, /) -> None:
        raise AssertionError("a reader in a checkpoint is not parked")

    def __await__(self) -> Generator[Any, Any, None]:
        return checkpoint().__await__()


BUSY: Waiter = _Busy()
