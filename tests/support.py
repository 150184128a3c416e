"""What the tests share: a source that is played by hand, and ways to wait that are no race against the clock."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Hashable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import anyio
from anyio.lowlevel import checkpoint

from anyio_sharedstream import SharedSource, SharedStreamManager


class Feed:
    """A source played by hand, which records what was done with it.

    `emit` hands over events; the generator yields those at hand without suspending, then waits for more. `fail` makes it raise,
    `end` makes it return. While `clean_up` is set to an event that is not set, the clean-up waits for it (shielded).
    """

    def __init__(self, key: Hashable = "feed") -> None:
        self.key = key
        self.opened = 0
        self.closed = 0
        self.most_open = 0
        self.clean_up: anyio.Event | None = None
        self._events: list[Any] = []
        self._end: BaseException | None = None
        self._news = anyio.Event()

    @property
    def open_now(self) -> int:
        return self.opened - self.closed

    @property
    def source(self) -> SharedSource[Any]:
        return SharedSource(key=self.key, open=self._play)

    def asking_for(self, **policies: Any) -> SharedSource[Any]:
        """The source, with policies."""
        return SharedSource(key=self.key, open=self._play, **policies)

    def closed_late(self, gate: anyio.Event) -> Callable[[], AbstractAsyncContextManager[AsyncIterable[Any]]]:
        """What opens the source in a context manager, which then waits for a gate before it has closed (shielded)."""

        @asynccontextmanager
        async def opened() -> AsyncIterator[AsyncIterable[Any]]:
            try:
                yield self._play()
            finally:
                with anyio.CancelScope(shield=True):
                    await gate.wait()

        return opened

    def emit(self, *events: Any) -> None:
        self._events += events
        self._news.set()

    def fail(self, error: BaseException) -> None:
        self._end = error
        self._news.set()

    def end(self) -> None:
        self.fail(StopAsyncIteration())

    async def _play(self) -> AsyncGenerator[Any, None]:
        self.opened += 1
        self.most_open = max(self.most_open, self.open_now)
        try:
            while True:
                while self._events:
                    yield self._events.pop(0)
                if self._end is not None:
                    error, self._end = self._end, None
                    if isinstance(error, StopAsyncIteration):
                        return
                    raise error
                self._news = anyio.Event()
                await self._news.wait()
        finally:
            if self.clean_up is not None:
                with anyio.CancelScope(shield=True):
                    await self.clean_up.wait()
            self.closed += 1


class Busy:
    """A source that has always something to yield: 0, 1, 2 and so on, with a turn of the event loop after each."""

    def __init__(self) -> None:
        self.reads = 0
        """how many events have been asked for, over all openings"""
        self.source: SharedSource[int] = SharedSource(key="busy", open=self._play)

    async def _play(self) -> AsyncGenerator[int, None]:
        n = 0
        while True:
            self.reads += 1
            yield n
            n += 1
            await checkpoint()


def failing_to_close(error: BaseException) -> SharedSource[str]:
    """A source that yields one event, and whose clean-up raises."""

    async def play() -> AsyncGenerator[str, None]:
        try:
            yield "event"
            await anyio.sleep_forever()
        finally:
            raise error

    return SharedSource(key="feed", open=play)


async def settle(rounds: int = 20) -> None:
    """Let everything that is ready run, and what that makes ready, and so on."""
    for _ in range(rounds):
        await checkpoint()


async def until(condition: Callable[[], object], rounds: int = 10_000) -> None:
    """Let others run until *condition* holds; fails if that does not come about."""
    while not condition():
        assert rounds, "this never came about"
        rounds -= 1
        await checkpoint()


def idle(manager: SharedStreamManager) -> bool:
    """Whether the manager runs nothing at all."""
    statistics = manager.statistics()
    return not statistics.groups and not statistics.closing
