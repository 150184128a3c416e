"""One consumer of a group, while it is connected: what it has been given, and what becomes of that.

Relies on `_redis_group`. An event is *held* from the moment the server has given it until everybody is done with it. What is
held is kept from looking idle, so nobody else claims it, and is never given out a second time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from anyio import current_time, move_on_after, sleep
from coredis.exceptions import RedisError
from structlog.typing import BindableLogger

from anyio_sharedstream import AdvanceItem
from anyio_sharedstream._lifecycle import check_count, check_seconds
from anyio_sharedstream._logging import Log
from anyio_sharedstream.adapters._redis_group import BEGINNING, Group, Page, RedisStreamEvent

__all__ = ["Consumer", "Terms"]

#: How many times what is held is said to be so before it would look idle: one of them may come late, and one more be lost.
BEATS = 3

#: For how many seconds, at the end, what was fetched and not given out is handed back.
FAREWELL = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Options of a producer, which are described there.

    :raises ValueError: a number is out of range
    """

    count: int
    block: float
    min_idle_time: float
    claim_interval: float | None
    max_deliveries: int | None
    dead_letter: str

    def __post_init__(self) -> None:
        check_count("count", self.count, least=1)
        check_seconds("block", self.block)
        check_seconds("min_idle_time", self.min_idle_time)
        if self.claim_interval is not None:
            check_seconds("claim_interval", self.claim_interval)
        if self.max_deliveries is not None:
            check_count("max_deliveries", self.max_deliveries, least=1)


class Consumer:
    """What its methods raise is what coredis raises."""

    def __init__(self, group: Group, terms: Terms, logger: BindableLogger | None) -> None:
        self._group = group
        self._terms = terms
        self._claim_interval = terms.min_idle_time / 2 if terms.claim_interval is None else terms.claim_interval
        self._max_deliveries = math.inf if terms.max_deliveries is None else terms.max_deliveries
        self._log = Log(logger, self._fail)
        self._held: dict[str, RedisStreamEvent] = {}
        self._fetched: deque[RedisStreamEvent] = deque()
        self._cursor = BEGINNING
        self._claim_at = current_time()
        self._failure: BaseException | None = None

    def next_event(self) -> RedisStreamEvent | None:
        """Give out what was fetched."""
        return self._fetched.popleft() if self._fetched else None

    async def begin(self, start: str) -> None:
        """Create the group if it is not there, and fetch what a consumer of this name has left."""
        await self._group.create(start)
        cursor = BEGINNING
        while True:
            page = await self._group.claim_own(cursor, self._terms.count)
            await self._admit_claimed(page)
            if page.cursor == BEGINNING:
                break
            cursor = page.cursor

    async def fetch(self) -> None:
        """Fetch what others have left, if it is time to look for that, and what is new; it may be that there is nothing yet."""
        if self._failure is not None:
            raise self._failure
        if current_time() >= self._claim_at:
            await self._claim()
        wait = 0.0 if self._fetched else min(self._terms.block, self._claim_at - current_time())
        self._admit(await self._group.read(self._terms.count, wait))

    async def _claim(self) -> None:
        await self._touch_held()  # or it would be claimed, too
        page = await self._group.claim(self._cursor, self._terms.count, self._terms.min_idle_time)
        self._cursor = page.cursor
        if page.cursor == BEGINNING:  # otherwise there is more, and only what is new comes between
            self._claim_at = current_time() + self._claim_interval
        await self._admit_claimed(page)

    async def _admit_claimed(self, page: Page) -> None:
        worn = [event for event in page.events if event.deliveries > self._max_deliveries]
        self._admit(event for event in page.events if event.deliveries <= self._max_deliveries)
        if page.deleted:
            self._log.write("warning", "entries were deleted from the stream before they were handled", entries=page.deleted)
        for event in worn:  # by consumers that died of it, or were killed, and could say nothing
            await self._bury(event, "abandoned")

    def _admit(self, events: Iterable[RedisStreamEvent]) -> None:
        for event in events:
            # What is held looks idle if this process could not say otherwise in time.
            if event.id not in self._held:
                self._held[event.id] = event
                self._fetched.append(event)

    async def keep(self) -> None:
        """Keep what is held from looking idle, until cancelled; a failure is raised by the next `fetch`."""
        try:
            while True:
                await sleep(self._terms.min_idle_time / BEATS)
                await self._touch_held()
        except Exception as exc:
            self._fail(exc)

    async def _touch_held(self) -> None:
        await self._group.touch({event.id: event.deliveries for event in self._held.values()})

    def _fail(self, error: BaseException) -> None:
        self._failure = error

    async def settle(self, batch: Sequence[AdvanceItem[RedisStreamEvent]]) -> None:
        """Do with what everybody is done with as its outcome says; all of it may be done again."""
        events = [(item.broker_payload, item.outcome) for item in batch]
        await self._group.acknowledge([event.id for event, outcome in events if outcome.is_clean])
        for event, outcome in events:
            if outcome.rejected:
                await self._bury(event, "rejected")
            elif outcome.failed and event.deliveries >= self._max_deliveries:
                await self._bury(event, "failed")
        await self._hand_back(event for event, outcome in events if not (outcome.acked or outcome.failed or outcome.rejected))
        for event, _ in events:  # what has failed grows idle from here on, until somebody claims it
            self._held.pop(event.id, None)

    async def _bury(self, event: RedisStreamEvent, reason: str) -> None:
        await self._group.bury(event, reason, self._terms.dead_letter)
        self._log.write("warning", "moved to the dead-letter stream", entry=event.id, reason=reason, deliveries=event.deliveries)

    async def _hand_back(self, events: Iterable[RedisStreamEvent]) -> None:
        # Idle for long enough, so that any consumer may claim them at once, and as often delivered as before.
        await self._group.touch({event.id: event.deliveries - 1 for event in events}, self._terms.min_idle_time)

    async def leave(self) -> None:
        """Hand back what was not given out; for a moment, even if cancelled. Without it, that would come back in time."""
        with move_on_after(FAREWELL, shield=True), suppress(RedisError, TimeoutError):
            await self._hand_back(self._fetched)
            await self._group.leave()
