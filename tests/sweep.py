"""Cancel a scenario before its k-th step, for every k and in every way; and what such trials have in common.

The cuts are those of `anyio_sharedstream.testing.cancel_sweep`. A trial here makes them itself, so that it can say what is
cancelled in the midst of it, and looks at what has become of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from itertools import count
from typing import Any, Final

import anyio

from anyio_sharedstream import SharedStreamManager, Subscription
from anyio_sharedstream.testing._sweep import CancelWay
from anyio_sharedstream.testing._sweep import Cut as Cut
from tests.support import Feed, idle

SCOPE: Final = "scope"
SCOPE_WOKEN: Final = "scope-woken"
NATIVE: Final = "native"
NATIVE_WOKEN: Final = "native-woken"


async def sweep(trial: Callable[[Cut], Awaitable[object]], *, woken: bool = True) -> int:
    """Call *trial* for each way to cancel and each step, until the scenario it gives to `Cut.run` completes uncancelled.

    Returns the smallest number of steps that a completed scenario took, so that a test can show that it has swept something.
    """
    ways: list[CancelWay] = [SCOPE, SCOPE_WOKEN] if woken else [SCOPE]
    if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
        ways += [NATIVE, NATIVE_WOKEN] if woken else [NATIVE]
    return min([await _sweep(trial, way) for way in ways])


async def _sweep(trial: Callable[[Cut], Awaitable[object]], way: CancelWay) -> int:
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
