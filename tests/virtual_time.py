"""Run a test in virtual time, on both backends: when nothing is left to run, the clock goes to the next deadline at once.

For what is about seconds and must be exact. A deadlock is noticed at the moment it comes about: if nothing can run and there is
no deadline, nothing ever will. Neither threads nor I/O from outside nor ``wait_all_tasks_blocked`` can be used in here.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from functools import partial, wraps
from math import inf
from selectors import DefaultSelector
from typing import Any

import anyio
import pytest
import trio

DEADLOCK = "deadlock: nothing can run, and there is no deadline"


class _Selector(DefaultSelector):
    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready:  # instead of waiting, let the time pass
            assert timeout is not None, DEADLOCK
            self.now += timeout
        return ready


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


class _Clock(trio.abc.Clock):
    # Not trio's MockClock: that one is final, and on a deadlock it spins without end.
    def __init__(self) -> None:
        self.now = 0.0
        self.everything = trio.CancelScope()

    def start_clock(self) -> None: ...

    def current_time(self) -> float:
        return self.now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        # trio asks when no task is ready. What finalisers have put into its queue is no task yet.
        queued = trio.lowlevel.current_statistics().run_sync_soon_queue_size
        if not queued and deadline < inf:
            self.now = deadline
        elif not queued:
            assert not self.everything.cancel_called, DEADLOCK  # shielded; this ends trio at once, as an internal error
            self.everything.cancel()
        return 0


def run(function: Callable[..., Awaitable[Any]], *args: Any, backend: str) -> Any:
    """Run an async function to its end in virtual time, which starts at 0; a deadlock is an `AssertionError`."""
    if backend == "asyncio":
        return anyio.run(function, *args, backend=backend, backend_options={"loop_factory": _Loop})
    clock = _Clock()

    async def watched() -> Any:
        with clock.everything:
            result = await function(*args)
        assert not clock.everything.cancel_called, DEADLOCK
        return result

    try:
        return trio.run(watched, clock=clock)
    except trio.TrioInternalError as exc:
        raise (exc.__cause__ or exc) from None


def in_virtual_time(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Make of an async test one that runs in virtual time, once on each backend."""

    @wraps(test)
    def virtual(backend: str, **arguments: Any) -> None:
        run(partial(test, **arguments), backend=backend)

    # pytest looks here for what to pass, and `wraps` has told it of the arguments of the test alone.
    parameters = [*inspect.signature(test).parameters.values(), inspect.Parameter("backend", inspect.Parameter.KEYWORD_ONLY)]
    vars(virtual)["__signature__"] = inspect.Signature(parameters)
    on_both: Callable[[Callable[..., None]], Callable[..., None]] = pytest.mark.parametrize("backend", ["asyncio", "trio"])
    return on_both(virtual)
