"""The key table: which group of a key accepts subscribers, which have yet to close, and the task group that runs them all.

Relies on `_group`, `_poll` and `_clock`. Joining, evicting and aborting are synchronous; only `Registry.stop` and
`Registry.close` await, and only for what has already been decided.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextvars import Context, copy_context
from functools import partial
from itertools import chain, count
from typing import Any

from anyio.abc import TaskGroup
from structlog.typing import BindableLogger

from anyio_sharedstream._ack_group import AckGroup
from anyio_sharedstream._clock import Clock
from anyio_sharedstream._group import Group
from anyio_sharedstream._leaving import leave
from anyio_sharedstream._logging import Log
from anyio_sharedstream._parking import Backend, current_backend
from anyio_sharedstream._poll import host
from anyio_sharedstream._producer import AckSource
from anyio_sharedstream._source import SharedSource
from anyio_sharedstream._subscription import Receiver
from anyio_sharedstream._upstream import Upstream

__all__ = ["Registry"]


class _GeneratedId:
    """An id that equals nothing but itself, whatever a caller calls its subscribers."""

    __slots__ = ("_number",)

    def __init__(self, number: int) -> None:
        self._number = number

    def __repr__(self) -> str:
        return f"<subscriber {self._number}>"


class Registry:
    """The key table: the one place that says which group of a key accepts subscribers, and which have yet to close."""

    def __init__(self, logger: BindableLogger | None) -> None:
        self.log = Log(logger, self.abort)
        self.groups: dict[Hashable, Group] = {}
        self.closing: dict[Hashable, dict[Group, None]] = {}
        self.ids = map(_GeneratedId, count(1))
        self.clock = Clock(self._start_clock)
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

    def join(self, subscription: Receiver[Any], source: SharedSource[Any]) -> Group:
        self.check_usable()
        if not self._running:
            raise RuntimeError("the SharedStreamManager is being left: subscribe inside its `async with` block")
        group = self.groups.get(source.key)
        if group is not None:
            # A joiner starts after what was gathered before it. Publishing that may fail the last of the others, and say so to a
            # logger, which may subscribe in its turn.
            group.publisher.flush(turn_ends=False)
            group = self.groups.get(source.key)
        if group is None:
            group = self._start(source, subscription)
        else:
            group.join(subscription, source)
        return group

    def _start(self, source: SharedSource[Any], first: Receiver[Any]) -> Group:
        assert self._tasks is not None
        name = f"shared stream {source.key!r}"  # first of all, for a key's repr is foreign code and may raise
        kind = AckGroup if isinstance(source, AckSource) else Group
        group = kind(source, self, self._backend, self._last_to_open(source.key))
        group.join(first, source)
        # In the manager's context: the first subscriber's (a request id, a trace) must not be the upstream's for life.
        # A copy, for a context can be entered only once, and a source may subscribe to another.
        self._context.copy().run(partial(self._tasks.start_soon, host, group, name=name))
        self.groups[source.key] = group
        return group

    def _start_clock(self) -> None:
        assert self._tasks is not None
        self._context.copy().run(partial(self._tasks.start_soon, self.clock.run, name="shared streams' clock"))

    def _last_to_open(self, key: Hashable) -> Upstream | None:
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
            await group.released.wait()

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
