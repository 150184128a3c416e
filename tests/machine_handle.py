"""A subscription with any contract, and what it has given.

Relies on `tests.machine_contract`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import anyio

from anyio_sharedstream import SubscriberOverflow
from tests.lifecycle_play import name_of
from tests.machine_contract import POLICIES, Contract


@dataclass(eq=False)
class Handle:
    """A subscription, and what it has given."""

    number: int
    stream: Any
    contract: Contract
    clock: Callable[[], float]
    received: list[tuple[float, Any]] = field(default_factory=list)
    outcome: str | None = None
    error: BaseException | None = None
    scope: anyio.CancelScope | None = None
    """of the task that receives, if one does"""

    def look(self) -> tuple[Any, ...]:
        it = self.stream.statistics()
        assert (it.policy, it.max_buffer_size) == (POLICIES[self.contract.policy], self.contract.bound)
        held = it.held_seconds if self.clock() else 0.0
        counts = it.current_buffer_used, it.peak_buffer_used, it.events_received, it.events_missed, it.events_refused, held
        return self.received, self.outcome, self.stream.epoch, counts

    def got(self, *items: Any) -> None:
        assert items
        self.received += [(self.clock(), item) for item in items]

    def ended(self, error: Exception) -> None:
        if isinstance(error, SubscriberOverflow):
            asked = self.stream.key, self.number, self.contract.bound
            assert (error.key, error.subscriber_id, error.max_buffer_size) == asked
        self.error = error
        self.outcome = "EndOfStream" if isinstance(error, StopAsyncIteration) else name_of(error)

    async def read(self) -> None:
        """Read everything, in a task of its own."""
        try:
            if self.contract.way == "for":
                async for item in self.stream:
                    self.got(item)
                self.ended(StopAsyncIteration())
            elif isinstance(self.contract.way, int):
                async for batch in self.stream.batches(self.contract.way):
                    self.got(*batch)
                self.ended(StopAsyncIteration())
            while self.outcome is None:
                self.got(await self.stream.receive())
        except Exception as exc:
            self.ended(exc)

    async def wait(self, limit: int) -> None:
        """Receive once, in a task of its own."""
        with anyio.CancelScope() as self.scope:
            try:
                if limit > 1:
                    self.got(*(await self.stream.receive_batch(limit)))
                else:
                    self.got(await (anext(self.stream) if self.number % 2 else self.stream.receive()))
            except (Exception, StopAsyncIteration) as exc:
                self.ended(exc)
        self.scope = None

    @property
    def busy(self) -> bool:
        return self.scope is not None or (self.contract.way is not None and self.outcome is None)

    async def take(self, limit: int, way: str) -> None:
        receive = getattr(self.stream, way)
        try:
            if way == "receive_nowait":
                for _ in range(limit):
                    self.got(receive())
            elif way == "receive_batch" and self.stream.statistics().current_buffer_used:
                self.got(*(await receive(limit)))
            else:
                while limit and way != "receive_batch" and self.stream.statistics().current_buffer_used:
                    limit -= 1
                    self.got(await receive())
        except anyio.WouldBlock:
            pass
        except Exception as exc:
            self.ended(exc)
