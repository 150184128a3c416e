"""What the scenarios that are explored share: a source that counts, ways to dawdle, and what it means that a scenario holds.

A scenario asserts what must hold in any order. Whatever it draws from the module `random` is drawn anew for each schedule.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from itertools import count
from typing import Any, Literal, TypeAlias

import anyio
from anyio import CancelScope, Event, create_task_group
from anyio.lowlevel import checkpoint

from anyio_sharedstream import SharedSource, SharedStreamManager, Subscription
from anyio_sharedstream.testing import explore
from tests.effort import SCHEDULES
from tests.support import Feed

Scenario: TypeAlias = Callable[[], Coroutine[Any, Any, None]]


async def dawdle(most: int = 3) -> None:
    """Let others run, for a while that is drawn."""
    for _ in range(random.randrange(most + 1)):
        await checkpoint()


class Ticker(Feed):
    """A source that counts: pairs of the number of the opening and the event, from 0. Closing it takes a while."""

    def __init__(self, key: str = "ticker", *, events: int | None = None, fails: bool = False) -> None:
        super().__init__(key)
        self.iterated = 0
        """how many of the openings have nothing more to give"""
        self._count = events
        self._fails = fails

    @property
    def source(self) -> SharedSource[Any]:
        return SharedSource(key=self.key, open=self._connect)

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[AsyncGenerator[Any, None]]:
        self.opened += 1
        self.most_open = max(self.most_open, self.open_now)
        try:
            yield self._tick(self.opened)
        finally:
            with CancelScope(shield=True):
                await dawdle()
            self.closed += 1

    async def _tick(self, run: int) -> AsyncGenerator[Any, None]:
        try:
            for n in count() if self._count is None else range(self._count):
                yield run, n
                await anyio.sleep(random.randrange(2))
            if self._fails:
                raise ValueError("end")
        finally:
            self.iterated += 1


def published(manager: SharedStreamManager, stream: Subscription[Any]) -> int:
    """How many events the group has published, which is the number of the next."""
    return manager.statistics().groups[stream.key].events_published


def subscribed(manager: SharedStreamManager, stream: Subscription[Any]) -> bool:
    """Whether the manager knows of a subscription."""
    groups = manager.statistics().groups.values()
    return any(one.subscriber_id == stream.subscriber_id for group in groups for one in group.subscriptions)


async def follow(manager: SharedStreamManager, stream: Subscription[Any], number: int) -> None:
    """Take so many events of a ticker: those that follow at once, all of one opening."""
    first = published(manager, stream)
    got = [await stream.receive() for _ in range(number)]
    assert [n for _, n in got] == list(range(first, first + number))
    assert len({run for run, _ in got}) <= 1


async def at_once(number: int, function: Callable[[], Awaitable[object]]) -> None:
    """Call a function in so many tasks, and wait for all of them."""

    async def later() -> None:
        await dawdle()
        await function()

    async with create_task_group() as tasks:
        for _ in range(number):
            tasks.start_soon(later)


class Gate:
    """Opens when so many have come."""

    def __init__(self, number: int) -> None:
        self._missing = number
        self._open = Event()

    def come(self) -> None:
        self._missing -= 1
        if not self._missing:
            self._open.set()

    async def wait(self) -> None:
        await self._open.wait()


async def cancel_soon(scope: CancelScope) -> None:
    await dawdle(8)
    scope.cancel()


def holds(scenario: Scenario, backend: Literal["asyncio", "trio"]) -> None:
    found = explore(scenario, schedules=SCHEDULES, backend=backend)
    assert found.orders[backend] > SCHEDULES / 2  # else there would be little to it
