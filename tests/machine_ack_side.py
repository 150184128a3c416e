"""One key of several of a manager, whose events are acknowledged.

Relies on `tests.ack_play`. If there is no virtual time, nothing that has to be waited for comes about, for it takes years.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pytest
from anyio.abc import TaskGroup

from anyio_sharedstream import AckSource, SharedStreamManager
from tests import ack_model, ack_play
from tests.machine_sides import YEARS, in_no_time
from tests.support import settle


class AckSide(ack_play.Play):
    """Plays actions on a key whose events are acknowledged."""

    def __init__(
        self, key: int, terms: ack_model.Terms, manager: SharedStreamManager, tasks: TaskGroup, *, timeless: bool
    ) -> None:
        super().__init__(terms, manager, tasks)
        self.exited = False
        self.upstream.key = key
        self._timeless = timeless
        self._source = self._make_source(terms) if timeless else self.upstream.make_source()

    def _make_source(self, terms: ack_model.Terms) -> AckSource[Any]:
        return self.upstream.source(
            ack_timeout=terms.patience * YEARS,
            max_in_flight=terms.window,
            max_concurrent_advances=terms.workers,
            drain_timeout=terms.drain * YEARS,
            advance_retry=None,
            restart=in_no_time(None) if terms.restart else None,
            on_exhausted=terms.exhausted,
            linger=terms.linger * YEARS,
        )

    def join(self, wish: ack_model.Wish) -> None:
        if self.exited:
            with pytest.raises(RuntimeError, match="left"):
                super().join(wish)
        else:
            super().join(wish)

    def _present(self) -> list[Hashable]:
        """The ids of those who are there."""
        group = self._manager.statistics().groups.get(self.upstream.key)
        return [] if group is None else [one.subscriber_id for one in group.subscriptions]

    def fail(self) -> None:
        if self._present():
            super().fail()

    def exhaust(self) -> None:
        if self._present():
            super().exhaust()

    async def twin(self, index: int) -> None:
        name = self._handle(index).stream.subscriber_id
        if name in self._present():
            with pytest.raises(RuntimeError, match="already has a subscriber"):
                await self._manager.subscribe(self._source, subscriber_id=name).__aenter__()

    def stop(self) -> None:
        self._tasks.start_soon(self._wait, "stop", self._manager.stop, self.upstream.key)

    def let_go(self) -> None:
        """Nothing more is said by anybody: there is nothing to wait for."""
        for handle in self.handles:
            handle.stream.close()
        self._resolve_all()
        self._unblock_all()

    async def finish(self) -> None:
        self._unblock_all()
        for index in range(len(self.handles)):
            self.cancel(index)
            await settle()
            self.take(index, 1000)
            await settle()
            self.leave(index, "well")
            await settle()
        self._resolve_all()

    def _unblock_all(self) -> None:
        for lane in range(self.upstream.terms.lanes):
            self.accept(lane)
        for lane in range(self.upstream.terms.lanes):
            self.unblock(lane)

    def _resolve_all(self) -> None:
        for place in range(len(self.pendings)):
            self.resolve(place, "acked")

    def look(self) -> dict[str, Any]:
        statistics, key = self._manager.statistics(), self.upstream.key
        assert self.upstream.most <= self.upstream.terms.window
        groups = [group for name, group in statistics.groups.items() if name == key]
        ids = [handle.stream.subscriber_id for handle in self.handles]
        told = self.upstream.told
        return {
            "opened": self.upstream.opened,
            "log": self.upstream.log,
            "advanced": {lane: [(self._at(time), *rest) for time, *rest in entries] for lane, entries in told.items()},
            "returned": sorted((name, self._at(time)) for name, time in self.returns),
            "group": next((ack_play.look_at(group) for group in groups), None),
            "closing": [ack_play.look_back(group.acknowledgement) for group in statistics.closing if group.key == key],
            "subscribers": [self._look_at(handle.look()) for handle in self.handles],
            "members": [ids.index(name) for name in self._present()],
        }

    def _look_at(self, seen: tuple[Any, ...]) -> tuple[Any, ...]:
        received, *rest = seen
        return [(self._at(time), event) for time, event in received], *rest

    def _at(self, time: float) -> float:
        return 0.0 if self._timeless else time
