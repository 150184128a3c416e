"""What the tests of `Block` share: sources of every kind that count their steps, and subscribers that are held in hand."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Self

import anyio
from anyio.lowlevel import checkpoint

from anyio_sharedstream import SharedSource, SharedStreamManager


class Steps:
    """An endless source of 0, 1, 2, ..., that counts what is asked of it.

    :param rests: after how many steps it suspends, never if 0
    :param opened_by: makes of it what the library opens
    """

    def __init__(self, opened_by: Callable[[Steps], Any], rests: int = 0) -> None:
        self.begun = 0
        """steps that the library has asked for"""
        self.opened = 0
        self.closed = 0
        self.failure = anyio.Event()
        """makes a source fail that runs a task of its own"""
        self.source: SharedSource[int] = SharedSource(key="steps", open=lambda: opened_by(self))
        self._rests = rests

    async def next(self) -> int:
        number = self.begun
        self.begun += 1
        if self._rests and self.begun % self._rests == 0:
            await checkpoint()
        return number

    def have_begun(self, number: int) -> bool:
        return self.begun >= number

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        self.opened += 1
        try:
            yield
        finally:
            self.closed += 1

    async def watch(self) -> None:
        await self.failure.wait()
        raise ConnectionError("lost")


async def generator(steps: Steps) -> AsyncGenerator[int, None]:
    async with steps.open():
        while True:
            yield await steps.next()


async def generator_in_tasks(steps: Steps) -> AsyncGenerator[int, None]:
    """Holds a task group over its yields, so that it can fail while it rests."""
    async with steps.open(), anyio.create_task_group() as tasks:
        tasks.start_soon(steps.watch)
        while True:
            yield await steps.next()


class Iterator:
    """Is no generator: nothing can be thrown into it."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> int:
        return await self._steps.next()


@asynccontextmanager
async def manager_of_generator(steps: Steps) -> AsyncIterator[AsyncGenerator[int, None]]:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(steps.watch)
        yield generator(steps)


@asynccontextmanager
async def manager_of_iterator(steps: Steps) -> AsyncIterator[Iterator]:
    async with steps.open(), anyio.create_task_group() as tasks:
        tasks.start_soon(steps.watch)
        yield Iterator(steps)


KINDS: list[Callable[[Steps], Any]] = [generator, generator_in_tasks, Iterator, manager_of_generator, manager_of_iterator]


def published(manager: SharedStreamManager) -> int:
    """How many events the only group has published."""
    (group,) = manager.statistics().groups.values()
    return group.events_published
