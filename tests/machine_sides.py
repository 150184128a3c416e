"""One key of several of a manager: a source that does as it is told, and subscriptions with any contract.

Relies on `tests.lifecycle_play` and `tests.ack_play` for the sources. What is done here is done to `tests.machine_life` as well,
by `tests.machine_play`. If there is no virtual time, nothing that has to be waited for comes about, for it takes years.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from math import inf
from typing import Any

import anyio
import pytest
from anyio.abc import TaskGroup

from anyio_sharedstream import (
    GroupStatistics,
    Restart,
    SharedSource,
    SharedStreamManager,
    UpstreamSilent,
)
from tests import lifecycle_play
from tests.ack_play import leave
from tests.machine_contract import POLICIES, Contract, route
from tests.machine_handle import Handle
from tests.machine_life import Terms
from tests.support import settle

#: As a factor of all times, makes them years.
YEARS = 1e9


class Upstream(lifecycle_play.Upstream):
    """One of several sources, with routes."""

    def __init__(self, key: int, terms: Terms) -> None:
        super().__init__(terms)
        self.source = SharedSource(key=key, open=self.source.open, **self._policies())

    def _policies(self) -> dict[str, Any]:
        terms = self._terms
        assert isinstance(terms, Terms)
        policies = super()._policies() | {"route_by": route if terms.routed else None}
        if terms.timeless:
            for name in ("linger", "cohort_grace", "replay_max_age", "silence_timeout", "close_timeout"):
                policies[name] = policies[name] and policies[name] * YEARS
            policies["restart"] = policies["restart"] and in_no_time(terms.most, UpstreamSilent if terms.picky else Exception)
        return policies


def in_no_time(most: int | None, on: type[Exception] = Exception) -> Restart:
    return Restart(initial_delay=0, max_delay=0, max_restarts=most, within=inf, on=on)


class Side(lifecycle_play.Orders):
    """Plays actions on a key whose events are not acknowledged. The public methods up to `exhaust` are those of `Life`."""

    def __init__(self, key: int, terms: Terms, manager: SharedStreamManager, tasks: TaskGroup) -> None:
        super().__init__(Upstream(key, terms), terms)
        self.handles: list[Handle] = []
        self.returns: list[tuple[str, float]] = []
        self.exited = False
        self._key = key
        self._terms = terms
        self._manager = manager
        self._tasks = tasks

    def clock(self) -> float:
        return 0.0 if self._terms.timeless else anyio.current_time()

    def _at(self, time: float | None) -> float | None:
        return 0.0 if time is not None and self._terms.timeless else time

    def _subscribe(self, name: int, contract: Contract) -> Any:
        asked: Any = {"where": contract.where, "routes": contract.routes, "gaps": contract.gaps, "snapshot": contract.snapshot}
        asked |= {"overflow": POLICIES[contract.policy], "max_buffer_size": contract.bound, "subscriber_id": name}
        return self._manager.subscribe(self.upstream.source, **asked)

    async def join(self, contract: Contract) -> None:
        contract = self._terms.admit(contract)
        name = len(self.handles)
        if self.exited:
            with pytest.raises(RuntimeError, match="left"):
                await self._subscribe(name, contract).__aenter__()
            return
        handle = Handle(name, self._subscribe(name, contract), contract, self.clock)
        with pytest.raises(StopIteration):
            handle.stream.__aenter__().send(None)  # it never waits
        self.handles.append(handle)
        if contract.way is not None:
            self._tasks.start_soon(handle.read)

    async def twin(self, index: int) -> None:
        handle = self._handle(index)
        group = self._manager.statistics().groups.get(self._key)
        if group is not None and handle.number in [one.subscriber_id for one in group.subscriptions] and not self.exited:
            with pytest.raises(RuntimeError, match="already has a subscriber"):
                await self._subscribe(handle.number, handle.contract).__aenter__()

    def _handle(self, index: int) -> Handle:
        return self.handles[index % len(self.handles)]

    def leave(self, index: int, how: str) -> None:
        handle = self._handle(index)
        self._tasks.start_soon(self._wait, f"leave {handle.number}", leave(handle.stream, how))

    async def _wait(self, name: str, function: Callable[..., Awaitable[object]], *arguments: Any) -> None:
        await function(*arguments)
        self.returns.append((name, self.clock()))

    def stop(self) -> None:
        self._tasks.start_soon(self._wait, "stop", self._manager.stop, self._key)

    async def take(self, index: int, limit: int, way: str) -> None:
        handle = self._handle(index)
        if not handle.busy:
            await handle.take(limit, way)
            return
        with pytest.raises(anyio.BusyResourceError):
            await (handle.stream.receive_batch(limit) if way == "receive_batch" else handle.stream.receive())

    def wait(self, index: int, limit: int) -> None:
        handle = self._handle(index)
        if not handle.busy:
            self._tasks.start_soon(handle.wait, limit)

    def cancel(self, index: int) -> None:
        handle = self._handle(index)
        if handle.scope is not None:
            handle.scope.cancel()

    async def finish(self) -> None:
        self.let_go()
        await settle()
        for index in range(len(self.handles)):
            self.cancel(index)
        await settle()
        for index in range(len(self.handles)):
            await self.take(index, 1000, "receive_nowait")

    def look(self) -> dict[str, Any]:
        statistics = self._manager.statistics()
        groups = [group for key, group in statistics.groups.items() if key == self._key]
        opens, closes = self.upstream.opens, self.upstream.closes
        assert self._terms.close is not None or len(opens) - len(closes) <= 1
        errors = [id(handle.error) for handle in self.handles if handle.error is not None]
        assert len(set(errors)) == len(errors)  # everybody has an exception of its own
        return {
            "opened": [self._at(time) for time in opens],
            "closed": sorted((self._at(time), number) for time, number in closes),
            "returned": sorted(self.returns),
            "group": [tuple(self._look_at(group)) for group in groups],
            "closing": sorted(group.epoch for group in statistics.closing if group.key == self._key),
            "subscribers": [handle.look() for handle in self.handles],
            "members": [one.subscriber_id for group in groups for one in group.subscriptions],
        }

    def _look_at(self, group: GroupStatistics) -> Iterator[object]:
        for place, fact in enumerate(lifecycle_play.look_at(group)):
            yield self._at(fact) if place in (4, 6) else fact
