"""One opening of a source under examination: a task that can be cancelled, watched, and abandoned.

Relies on `_watchdog` for the time that a step takes. The task is driven by hand, so that every step is seen; it belongs to no
task group, so that nobody has to wait for a source that does not end.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import anyio

from anyio_sharedstream import SharedSource
from anyio_sharedstream._source import iterate, open_source
from anyio_sharedstream.testing._waiting import driven_by_hand, keep, where
from anyio_sharedstream.testing._watchdog import Watchdog

__all__ = ["Abandoned", "InjectedFailureError", "Life"]

#: A source that is cancelled again at every turn of the event loop, and still there after so many, will never go.
_MOST_CANCELLATIONS = 100


class InjectedFailureError(Exception):
    """Thrown into a source, as if what it iterates over had failed."""


class Abandoned(BaseException):
    """Thrown into a source that does not end, to end it."""


class _Driven(Awaitable[None]):
    """Drives a coroutine step by step."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], watchdog: Watchdog) -> None:
        self.coroutine = coroutine
        self.steps = 0
        self.cancellations = 0
        self.abandoned = False
        self.stubborn = False
        """whether it was abandoned because it goes on after it was cancelled again and again"""
        self.unending = False
        """whether it has refused to be closed"""
        self.signal: Any = None
        self._watchdog = watchdog
        self._cancelled = anyio.get_cancelled_exc_class()

    def __await__(self) -> Generator[Any, Any, None]:
        coroutine = self.coroutine
        resume: Callable[[], Any] = partial(coroutine.send, None)
        try:
            while not self.abandoned:
                self.steps += 1
                try:
                    self.signal = self._watchdog.step(resume)
                except StopIteration:
                    return
                try:
                    sent = yield self.signal
                except BaseException as exc:
                    self._resumed_with(exc)
                    resume = partial(coroutine.throw, exc)
                else:
                    self._resumed_with(getattr(sent, "error", None))  # trio sends what it would have raised
                    resume = partial(coroutine.send, sent)
        finally:
            del resume
            self._dispose()

    def _resumed_with(self, exc: BaseException | None) -> None:
        if isinstance(exc, self._cancelled) and not self.abandoned:
            self.cancellations += 1
            self.abandoned = self.stubborn = self.cancellations > _MOST_CANCELLATIONS

    def _dispose(self) -> None:
        """End what was not driven to its end, if it lets that be done."""
        if inspect.getcoroutinestate(self.coroutine) == inspect.CORO_CLOSED:
            return
        for _ in range(10):
            try:
                # Not `close`, which goes past async generators: their ``finally`` would be left to the garbage collector.
                self._watchdog.step(partial(self.coroutine.throw, Abandoned()))
            except BaseException:
                return  # it has ended
        self.unending = True  # it has awaited something each time


driven_by_hand(_Driven.__await__.__code__, "coroutine")


class Life:
    """Opens a source, takes its events until it has *wanted* or for ever, and is then cancelled or made to fail."""

    def __init__(self, source: SharedSource[Any], watchdog: Watchdog, *, wanted: int, fail: bool, max_ready: int) -> None:
        self.opened: object = None
        """what ``open`` returned"""
        self.open = False
        """whether it came to be iterated"""
        self.events = 0
        self.ended = False
        """whether it ended without being asked to"""
        self.error: BaseException | None = None
        """what left it"""
        self.cancelling = False
        self.failed = False
        """whether a failure was thrown into it"""
        self.yielded_on = False
        """whether it gave an event after it had been cancelled"""
        self.rushed = False
        """whether it gave too many events without a suspension"""
        self.where = "nowhere: it was not started"
        """where it was when it was abandoned"""
        self.enough = anyio.Event()
        self.done = anyio.Event()
        self._source = source
        self._wanted = wanted
        self._fail = fail
        self._max_ready = max_ready
        self._iterator: object = None
        self._ready = 0
        self._step_of_event = -1
        self._scope = anyio.CancelScope()
        self.driven = _Driven(self._live(), watchdog)
        self.task: Any = None

    def start(self) -> None:
        """Start the task, outside of any task group."""
        if self.on_asyncio:
            self.task = asyncio.get_running_loop().create_task(self._run(), name="check_source")
        else:
            import trio

            self.task = trio.lowlevel.spawn_system_task(self._run, name="check_source")

    @property
    def on_asyncio(self) -> bool:
        """Whether the event loop is one of asyncio's."""
        return anyio.get_cancelled_exc_class() is asyncio.CancelledError

    def cancel(self) -> None:
        """Cancel it, as the library does."""
        self.cancelling = True
        self._scope.cancel()

    def abandon(self) -> None:
        """Stop driving it, from its next suspension on."""
        self.where = where(self.driven.coroutine)
        self.driven.abandoned = True

    def wake(self) -> None:
        """Wake the abandoned task, which waits for something that does not come, be that shielded."""
        if self.on_asyncio:
            self.task.cancel()
        else:
            from anyio_sharedstream.testing._life_trio import wake

            wake(self.task, self.driven.signal)

    async def _run(self) -> None:
        try:
            with self._scope:
                await self.driven
        except BaseException as exc:
            self.error = exc
        finally:
            if self.driven.unending:
                keep([self])
            self.enough.set()
            self.done.set()

    async def _live(self) -> None:
        self.opened = opened = open_source(self._source)
        if isinstance(opened, AbstractAsyncContextManager):
            async with opened as iterable:
                await self._iterate(iterable, close=inspect.isasyncgen(iterable))
        else:
            await self._iterate(opened, close=True)

    async def _iterate(self, iterable: AsyncIterable[Any], *, close: bool) -> None:
        self._iterator = iterator = iterate(iterable, self._source.key)
        self.open = True
        try:
            async for _ in iterator:
                self._received()
                if self.rushed or self.yielded_on:
                    return
                if self._fail:
                    self.failed = True
                    self.enough.set()
                    if isinstance(iterator, AsyncGenerator):
                        try:
                            await iterator.athrow(InjectedFailureError("the upstream has failed, for a test"))
                        except StopAsyncIteration:
                            return  # which it takes for its end
                    raise InjectedFailureError("the upstream has failed, for a test")
            self.ended = True
        finally:
            for each in (iterator, iterable) if close or iterator is not iterable else ():
                if hasattr(each, "aclose"):
                    await each.aclose()

    def _received(self) -> None:
        self.events += 1
        self._ready = self._ready + 1 if self._step_of_event == self.driven.steps else 1
        self._step_of_event = self.driven.steps
        self.rushed = self._ready > self._max_ready
        # Only if it has been told: what was ready when it was cancelled may still come.
        self.yielded_on = self.cancelling and self.driven.cancellations > 0
        if self.events >= self._wanted:
            self.enough.set()
