"""Cancel a scenario before its k-th step, for every k and in every way; and what such trials have in common.

A step is what a scenario does between two suspensions. The scenario is driven by hand inside a real task, so that it is known
when it is about to suspend and about to go on, and a cancellation can be placed exactly there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from functools import partial
from itertools import count
from typing import Any

import anyio

from anyio_sharedstream import SharedStreamManager, Subscription
from tests.support import Feed, idle

SCOPE = "its scope, as it suspends"
SCOPE_WOKEN = "its scope, as it goes on"
NATIVE = "its task natively, while suspended"
NATIVE_WOKEN = "its task natively, after its wake-up"


class Cut:
    """One run of a scenario, cancelled before the given step if it gets that far."""

    def __init__(self, way: str, step: int) -> None:
        self.way = way
        self.step = step
        self.steps = 0
        """steps that the scenario has begun"""
        self.reached = False
        """whether the cancellation has been requested"""
        self.completed = False
        """whether the scenario ran to its end"""

    async def run(self, scenario: Coroutine[Any, Any, object]) -> None:
        """Run the scenario to its end or its cancellation."""
        if self.way in (NATIVE, NATIVE_WOKEN):
            self._task = asyncio.get_running_loop().create_task(self._watch(scenario))
            await asyncio.wait([self._task])
            if not self._task.cancelled():
                self._task.result()
        else:
            with anyio.CancelScope() as self._scope:
                await self._watch(scenario)

    async def _watch(self, scenario: Coroutine[Any, Any, object]) -> None:
        await _Driven(self, scenario)
        self.completed = True

    def suspends(self, signal: Any) -> None:
        """The scenario is about to suspend (or to start)."""
        if self.steps + 1 != self.step or self.way == SCOPE_WOKEN:
            return
        self.reached = True
        if self.way == SCOPE:
            self._scope.cancel()
        elif self.steps == 0:
            self._task.cancel()
        elif self.way == NATIVE_WOKEN and signal is not None:
            # Added before the task's own callback, so that this runs between its wake-up and its next step.
            signal.add_done_callback(lambda _: self._task.cancel())
        else:
            asyncio.get_running_loop().call_soon(self._task.cancel)

    def goes_on(self) -> None:
        """The scenario is about to take a step."""
        self.steps += 1
        if self.steps == self.step and self.way == SCOPE_WOKEN:
            self.reached = True
            self._scope.cancel()


class _Driven:
    def __init__(self, cut: Cut, scenario: Coroutine[Any, Any, object]) -> None:
        self._cut = cut
        self._scenario = scenario

    def __await__(self) -> Generator[Any, Any, None]:
        resume: Callable[[], Any] = partial(self._scenario.send, None)
        signal = None
        while True:
            if self._cut.steps == 0:
                self._cut.suspends(None)
            self._cut.goes_on()
            try:
                signal = resume()
            except StopIteration:
                return
            self._cut.suspends(signal)
            try:
                resume = partial(self._scenario.send, (yield signal))
            except BaseException as exc:
                resume = partial(self._scenario.throw, exc)


async def sweep(trial: Callable[[Cut], Awaitable[object]], *, woken: bool = True) -> int:
    """Call *trial* for each way to cancel and each step, until the scenario it gives to `Cut.run` completes uncancelled.

    Returns the smallest number of steps that a completed scenario took, so that a test can show that it has swept something.
    """
    ways = [SCOPE, SCOPE_WOKEN] if woken else [SCOPE]
    if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
        ways += [NATIVE, NATIVE_WOKEN] if woken else [NATIVE]
    return min([await _sweep(trial, way) for way in ways])


async def _sweep(trial: Callable[[Cut], Awaitable[object]], way: str) -> int:
    steps = count(1)
    while (cut := await _try(trial, Cut(way, next(steps)))).reached:
        pass
    return cut.steps


async def _try(trial: Callable[[Cut], Awaitable[object]], cut: Cut) -> Cut:
    with noted(f"cancelled before step {cut.step}: {cut.way}"):
        await trial(cut)
    return cut


@contextmanager
def noted(note: object) -> Iterator[None]:
    """Say with a failure which of many trials it was."""
    try:
        yield
    except BaseException as exc:
        exc.add_note(str(note))
        raise


class RunFeed(Feed):
    """A feed whose events say which opening of it they come from: pairs of the number of the run and the event."""

    async def _play(self) -> AsyncGenerator[Any, None]:
        run = self.opened + 1
        async with aclosing(super()._play()) as events:
            async for event in events:
                yield run, event


class Reader:
    """Takes everything that a subscription gives, in a task of its own, and keeps it with the terminal."""

    def __init__(self, stream: Subscription[Any], then: Callable[[Any], None] = lambda event: None) -> None:
        self.stream = stream
        self.got: list[Any] = []
        self.terminal: BaseException | None = None
        self._then = then

    async def run(self) -> None:
        while self.terminal is None:
            try:
                self.got.append(await self.stream.receive())
            except Exception as exc:
                self.terminal = exc
            else:
                self._then(self.got[-1])


def drain(stream: Subscription[Any]) -> tuple[list[Any], BaseException | None]:
    """Take what is ready, and the terminal if it has come."""
    events: list[Any] = []
    while True:
        try:
            events.append(stream.receive_nowait())
        except anyio.WouldBlock:
            return events, None
        except Exception as exc:
            return events, exc


@asynccontextmanager
async def nothing_left(*feeds: Feed) -> AsyncIterator[None]:
    """After the block no task runs that did not run before, and every feed is closed as often as it was opened."""
    before = {task.id for task in anyio.get_running_tasks()}
    yield
    left = [task for task in anyio.get_running_tasks() if task.id not in before]
    assert not left
    for feed in feeds:
        assert feed.opened == feed.closed
        assert feed.most_open <= 1


@asynccontextmanager
async def managed(*feeds: Feed) -> AsyncIterator[SharedStreamManager]:
    """A manager that must be idle when the block is over and nobody was left in it, and leave nothing."""
    async with nothing_left(*feeds):
        async with SharedStreamManager() as manager:
            yield manager
        assert idle(manager)
