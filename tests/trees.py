"""Sources made of shared sources, with task groups and cancel scopes over their yields."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Hashable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any

import anyio
import pytest
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint
from anyio.streams.memory import MemoryObjectSendStream

from anyio_sharedstream import SharedStreamManager, Subscription
from tests.support import Feed, settle, until
from tests.sweep import Reader, drain, managed


class Held(Feed):
    """A feed that holds a cancel scope and a task group over its yields, and gives them away. Its events say where they were."""

    tree: Tree
    scope: anyio.CancelScope
    tasks: TaskGroup
    bound: int | None = None
    pace: Callable[[], Awaitable[object]] = staticmethod(checkpoint)

    def __init__(self, key: Hashable, *inner: Held) -> None:
        super().__init__(key)
        self.inner = inner
        self.left_with: list[BaseException] = []

    def rests_on(self, feed: Held) -> bool:
        return self is feed or any(inner.rests_on(feed) for inner in self.inner)

    @asynccontextmanager
    async def holding(self) -> AsyncIterator[None]:
        with self.recorded(), anyio.fail_after(None) as self.scope:
            async with anyio.create_task_group() as self.tasks:
                self.tasks.start_soon(anyio.sleep_forever)
                yield
                self.tasks.cancel_scope.cancel()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        try:
            yield
        except BaseException as exc:
            self.left_with.append(exc)
            raise

    @contextmanager
    def counted(self) -> Iterator[None]:
        self.opened += 1
        self.most_open = max(self.most_open, self.open_now)
        try:
            yield
        finally:
            self.closed += 1

    async def _play(self) -> AsyncGenerator[Any, None]:
        async with self.holding(), aclosing(super()._play()) as events:
            async for event in events:
                yield self.key, event


class Relay(Held):
    """Passes on what another shared source gives."""

    async def _play(self) -> AsyncGenerator[Any, None]:
        with self.counted():
            async with self.holding(), self.tree.manager.subscribe(self.inner[0].source, max_buffer_size=self.bound) as stream:
                async for event in stream:
                    await self.pace()
                    yield self.key, *event


class Merge(Held):
    """Subscribes to other shared sources in tasks of its own, and ends with the first of them."""

    async def _play(self) -> AsyncGenerator[Any, None]:
        send, receive = anyio.create_memory_object_stream[Any](math.inf)
        with self.counted(), send, receive:
            async with self.holding():
                for inner in self.inner:
                    self.tasks.start_soon(self.pump, inner, send)
                async for event in receive:
                    yield event

    async def pump(self, inner: Feed, send: MemoryObjectSendStream[Any]) -> None:
        async with self.tree.manager.subscribe(inner.source) as stream:
            async for event in stream:
                send.send_nowait(event)
        self.tasks.cancel_scope.cancel()


class Tree:
    """A source at the top, and all that it is made of."""

    manager: SharedStreamManager

    def __init__(self, *feeds: Held) -> None:
        self.feeds = feeds
        self.top = feeds[-1]
        self.below = feeds[:-1]
        self.leaves = [feed for feed in feeds if not feed.inner]
        self.paths = len(self.top.inner)
        self.emitted: list[int] = []
        for feed in feeds:
            feed.tree = self

    @asynccontextmanager
    async def managed(self, *others: Feed) -> AsyncIterator[SharedStreamManager]:
        async with managed(*self.feeds, *others) as self.manager:
            yield self.manager

    def connected(self, others: int = 0) -> bool:
        """Whether every source has been opened and has its subscribers, of which *others* are not in the tree."""
        groups = self.manager.statistics().groups
        if any(feed.key not in groups or groups[feed.key].state != "live" for feed in self.feeds):
            return False
        wanted = sum(len(feed.inner) for feed in self.feeds) + others
        return sum(len(groups[feed.key].subscriptions) for feed in self.below) == wanted

    def emit(self, event: int) -> None:
        self.emitted.append(event)
        for leaf in self.leaves:
            leaf.emit(event)

    async def take(self, stream: Subscription[Any], *events: int) -> None:
        """Emit events one by one, each of which must arrive by every path."""
        for event in events:
            self.emit(event)
            runs = by_path([await stream.receive() for _ in range(self.paths)])
            assert list(runs.values()) == [[event]] * self.paths

    async def plays(self) -> None:
        """Subscribe afresh, once whatever went before has closed."""
        async with self.manager.subscribe(self.top.source) as stream:
            await until(self.connected)
            await settle()
            drain(stream)  # what was emitted for an earlier life, and not played
            await self.take(stream, 98, 99)

    def ended_ordinarily(self) -> bool:
        """Whether no source was left by anything but a plain cancellation."""
        return all(type(error) is anyio.get_cancelled_exc_class() for feed in self.feeds for error in feed.left_with)


def by_path(events: list[tuple[Any, ...]]) -> dict[tuple[Any, ...], list[int]]:
    runs: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for *path, event in events:
        runs[tuple(path)].append(event)
    return runs


def reached(reader: Reader, count: int) -> bool:
    return len(reader.got) == count


def one_level() -> Tree:
    base = Held("base")
    return Tree(base, Relay("top", base))


def two_levels() -> Tree:
    base = Held("base")
    middle = Relay("middle", base)
    return Tree(base, middle, Relay("top", middle))


def merged() -> Tree:
    left, right = Held("left"), Held("right")
    return Tree(left, right, Merge("top", left, right))


def diamond() -> Tree:
    base = Held("base")
    left, right = Relay("left", base), Relay("right", base)
    return Tree(base, left, right, Merge("top", left, right))


Shape = Callable[[], Tree]
SHAPES: list[Shape] = [one_level, two_levels, merged, diamond]
shapes = pytest.mark.parametrize("shape", SHAPES)
