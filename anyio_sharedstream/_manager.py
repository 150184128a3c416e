"""`SharedStreamManager`: which key has which group, and the task group that runs them all.

Relies on `_group` and `_poll`. Joining, evicting and stopping are synchronous; only `stop`, `stop_all` and leaving await, and
only for what has already been decided.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from contextvars import Context, copy_context
from functools import partial
from itertools import chain, count
from types import MappingProxyType, TracebackType
from typing import Any, Self, TypeVar

from anyio import create_task_group
from anyio.abc import TaskGroup
from structlog.typing import BindableLogger

from anyio_sharedstream._group import Group
from anyio_sharedstream._leaving import leave
from anyio_sharedstream._logging import Log
from anyio_sharedstream._parking import Backend, current_backend
from anyio_sharedstream._poll import host
from anyio_sharedstream._source import SharedSource, check_key
from anyio_sharedstream._statistics import ManagerStatistics
from anyio_sharedstream._subscription import Subscription

__all__ = ["DEFAULT_MAX_BUFFER_SIZE", "SharedStreamManager"]

T = TypeVar("T")

DEFAULT_MAX_BUFFER_SIZE = 1024
"""How many events a subscriber may be behind unless it says otherwise."""


class SharedStreamManager:
    """Opens each upstream once, for as long as it has subscribers, and owns every task that this takes.

    Entered once, with ``async with``. It holds a task group, so it belongs into ``main`` or an application's lifespan, never into
    a generator that is handed out per request. An exception that leaves its body leaves it as itself. Leaving stops all
    upstreams and takes as long as their clean-up does.

    :param max_buffer_size: how many events a subscriber may be behind, unless `subscribe` is told otherwise; `math.inf` allowed
    :param logger: a structlog logger; without one, structlog's own if the application has configured structlog, else the
        standard library's logger ``anyio_sharedstream``
    :raises ValueError: *max_buffer_size* is not a positive integer or `math.inf`
    """

    def __init__(self, *, max_buffer_size: float = DEFAULT_MAX_BUFFER_SIZE, logger: BindableLogger | None = None) -> None:
        self._max_buffer_size = _buffer_size(max_buffer_size)
        self._registry = _Registry(logger)
        self._entered = False

    async def __aenter__(self) -> Self:
        if self._entered:
            raise RuntimeError("a SharedStreamManager can be entered only once: make another one")
        self._entered = True
        tasks = create_task_group()
        await tasks.__aenter__()
        self._registry.open(tasks)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        await self._registry.close(exc_val)

    def subscribe(
        self, source: SharedSource[T], *, subscriber_id: Hashable = None, max_buffer_size: float | None = None
    ) -> Subscription[T]:
        """Make a subscription, to be entered with ``async with``; entering registers it and opens the upstream if need be.

        :param subscriber_id: names the subscriber in statistics and logs; unique within the key; generated if None
        :param max_buffer_size: how many events this subscriber may be behind; the manager's bound if None
        :raises RuntimeError: the manager is not running: not entered yet, or left
        :raises TypeError: *source* is not a `SharedSource`, or *subscriber_id* is not hashable
        :raises ValueError: *max_buffer_size* is not a positive integer or `math.inf`
        """
        if not isinstance(source, SharedSource):
            raise TypeError(f"source must be a SharedSource, not {source!r}; a @shared_source function must be called")
        self._registry.check_usable()
        try:
            hash(subscriber_id)
        except TypeError as exc:
            raise TypeError(f"subscriber_id must be hashable, and {subscriber_id!r} is not ({exc}); use a string") from None
        return Subscription(
            self._registry,
            source,
            source.key,
            next(self._registry.ids) if subscriber_id is None else subscriber_id,
            self._max_buffer_size if max_buffer_size is None else _buffer_size(max_buffer_size),
        )

    async def stop(self, key: Hashable) -> None:
        """Stop the upstream of *key* and wait until it, and any earlier one of the key, has closed.

        Its subscribers receive what is in their buffers, then the end of the stream; the manager stays usable, and a new
        subscriber opens the upstream anew. Does nothing if there is none. If the wait is cancelled, the upstream goes on closing.

        :raises ValueError: *key* is None
        :raises TypeError: *key* is not hashable
        """
        check_key(key)
        await self._registry.stop(self._registry.of_key(key))

    async def stop_all(self) -> None:
        """Stop every upstream, as `stop` does; they close side by side."""
        await self._registry.stop(self._registry.all())

    def statistics(self) -> ManagerStatistics:
        """Return a snapshot of all groups and their subscribers."""
        registry = self._registry
        return ManagerStatistics(
            groups=MappingProxyType({group.key: group.statistics() for group in list(registry.groups.values())}),
            closing=tuple(group.statistics() for group in registry.all_closing()),
        )


class _GeneratedId:
    """An id that equals nothing but itself, whatever a caller calls its subscribers."""

    __slots__ = ("_number",)

    def __init__(self, number: int) -> None:
        self._number = number

    def __repr__(self) -> str:
        return f"<subscriber {self._number}>"


class _Registry:
    """The key table: the one place that says which group of a key accepts subscribers, and which have yet to close."""

    def __init__(self, logger: BindableLogger | None) -> None:
        self.log = Log(logger, self.abort)
        self.groups: dict[Hashable, Group] = {}
        self.closing: dict[Hashable, dict[Group, None]] = {}
        self.ids = map(_GeneratedId, count(1))
        self._tasks: TaskGroup | None = None
        self._context: Context
        self._backend: Backend
        self._fatal: BaseException | None = None
        self._running = False
        self._left = False

    def open(self, tasks: TaskGroup) -> None:
        self._tasks = tasks
        self._context = copy_context()
        self._backend = current_backend()
        self._running = True

    def check_usable(self) -> None:
        """Raise what is wrong with making a subscription. Nothing is while the manager is being left: sources may make some."""
        if self._tasks is None or self._left:
            state = "has not been entered" if self._tasks is None else "has been left"
            raise RuntimeError(f"the SharedStreamManager {state}: subscribe inside its `async with` block")

    def join(self, subscription: Subscription[Any], source: SharedSource[Any]) -> Group:
        self.check_usable()
        if not self._running:
            raise RuntimeError("the SharedStreamManager is being left: subscribe inside its `async with` block")
        group = self.groups.get(source.key)
        if group is not None:
            # A joiner starts after what was gathered before it. Publishing that may fail the last of the others, and say so to a
            # logger, which may subscribe in its turn.
            group.flush(turn_ends=False)
            group = self.groups.get(source.key)
        if group is None:
            group = self._start(source, subscription)
        else:
            group.join(subscription)
        return group

    def _start(self, source: SharedSource[Any], first: Subscription[Any]) -> Group:
        assert self._tasks is not None
        name = f"shared stream {source.key!r}"  # first of all, for a key's repr is foreign code and may raise
        group = Group(source, self, self._backend, self._last_to_open(source.key))
        group.join(first)
        # In the manager's context: the first subscriber's (a request id, a trace) must not be the upstream's for life.
        # A copy, for a context can be entered only once, and a source may subscribe to another.
        self._context.copy().run(partial(self._tasks.start_soon, host, group, name=name))
        self.groups[source.key] = group
        return group

    def _last_to_open(self, key: Hashable) -> Group | None:
        """The one group that the next of *key* waits for: it has waited for those before it, and a stillborn one never opens."""
        latest = next(reversed(self.closing.get(key, {})), None)
        return latest.earlier if latest is not None and latest.stillborn else latest

    # What groups report.

    def evicted(self, group: Group) -> None:
        del self.groups[group.key]
        self.closing.setdefault(group.key, {})[group] = None

    def closed(self, group: Group) -> None:
        groups = self.closing[group.key]
        del groups[group]
        if not groups:
            del self.closing[group.key]

    def abort(self, error: BaseException) -> None:
        assert self._tasks is not None
        self._running = False
        if self._fatal is None:
            self._fatal = error
        self._tasks.cancel_scope.cancel()

    # The end.

    def of_key(self, key: Hashable) -> list[Group]:
        return [*filter(None, [self.groups.get(key)]), *self.closing.get(key, ())]

    def all_closing(self) -> list[Group]:
        return list(chain.from_iterable(self.closing.values()))

    def all(self) -> list[Group]:
        return [*self.groups.values(), *self.all_closing()]

    async def stop(self, groups: list[Group]) -> None:
        for group in groups:
            group.stop()
        for group in groups:
            await group.closed.wait()

    async def close(self, body_error: BaseException | None) -> None:
        """Stop everything and wait for it; raise what `abort` was given."""
        assert self._tasks is not None
        self._running = False
        try:
            for group in self.all():
                group.stop()
        except BaseException as exc:
            self.abort(exc)  # comparing keys is foreign code; whatever it raises, the task group must be left
        try:
            await leave(self._tasks.__aexit__, body_error, lambda: self._fatal)
        finally:
            self._left = True
            for group in self.all():
                group.close()  # asyncio never runs a task that is natively cancelled before its first step


def _buffer_size(size: float) -> float:
    valid = size == math.inf if isinstance(size, float) else isinstance(size, int) and not isinstance(size, bool) and size > 0
    if not valid:
        raise ValueError(f"max_buffer_size must be a positive number of events or math.inf, not {size!r}")
    return size
