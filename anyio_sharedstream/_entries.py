"""The buffers of subscribers that have a policy of their own: events one by one, so that single ones can go, or be replaced.

Relies on `_mailbox`, whose chunks and direct hand-over are for those who take everything; here the memory object stream holds
*entries*. ``_backlogged`` counts what can be received: the ``_queued`` entries, and the gaps. Everything is synchronous, and
nothing here depends on another subscriber.
"""

from __future__ import annotations

import math
from asyncio import InvalidStateError
from collections.abc import Awaitable, Callable, Hashable
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from anyio import BusyResourceError, NoEventLoopError, current_time

from anyio_sharedstream._buffer import TURN
from anyio_sharedstream._mailbox import Mailbox
from anyio_sharedstream._policies import Block, Conflate, DropNewest, DropOldest, Gap, Latest
from anyio_sharedstream._statistics import SubscriptionStatistics

__all__ = ["Blocking", "Conflating", "Dropping", "Entries"]

T_co = TypeVar("T_co", covariant=True)


class Entries(Mailbox[T_co]):
    """What the policies have in common: storing entries, and taking them."""

    def _store(self, entry: Any) -> None:
        if self._over:
            return  # by a function of the policy's, in the middle of a publication
        feed = self._feed or self._open_backlog()
        if not self._closed:
            feed.send_nowait(entry)
            self._queued += 1
            self._backlogged += 1

    def _capacity(self) -> float:
        return math.inf  # what is stored is bounded here, and holes take no room

    def _exempt(self, turn: int) -> bool:
        """Whether it had taken everything when this turn of the source began, and so has room for whatever the turn brings.

        Decided once in a turn: that a turn is published in several parts is the doing of somebody else.
        """
        if self._turn_number != turn:
            self._turn_number = turn
            self._accepted = int(self._queued == 0)
        return bool(self._accepted)

    def _take_entry(self) -> Any:
        return self._remaining.pop() if self._backlog is None else self._backlog.receive_nowait()

    def _published(self) -> None:
        """Everything of a publication is stored: let a parked reader look."""
        self._taken_at_yield = self._received
        self._peak = max(self._peak, self._queued)
        if self._backlogged and self._waiter is not None:
            waiter, self._waiter = self._waiter, None
            with suppress(InvalidStateError):  # on its way out of a cancellation; the next call finds the entries
                self._wake_waiter(waiter, None)

    # Receiving, in place of what `Mailbox` does with chunks.

    def _load(self, *, wait: bool) -> Awaitable[object] | None:
        if self._reading:
            raise BusyResourceError("receiving from")
        if not self._backlogged:
            return self._idle(wait)
        return self._turn() if wait and self._received - self._taken_at_yield >= TURN else None

    def _turn_before(self, limit: int) -> Awaitable[object] | None:
        since = self._received - self._taken_at_yield
        return self._turn() if since and since + min(limit, self._queued) > TURN else None

    def _begin(self) -> T_co:
        self._backlogged -= 1
        self._queued -= 1
        self._received += 1
        return self._take_entry()  # type: ignore[no-any-return]

    def _take(self, limit: int) -> tuple[T_co, ...]:
        return tuple(self._begin() for _ in range(min(limit, self._backlogged)))

    def _stored(self) -> int:
        return self._queued


class Blocking(Entries[T_co]):
    """`Block`: takes everything, and says when it has no room for more."""

    def __init__(self, subscriber_id: Hashable, max_buffer_size: float, policy: Block) -> None:
        super().__init__(subscriber_id, max_buffer_size)
        self.up_to = policy.up_to
        self._report: Callable[[Blocking[Any]], object] | None = None  # tells that there is more room, or less
        self._waited = 0.0  # for how long the source was held before, for want of the room that there still is not
        self._held_since: float | None = None  # when the hold began that is under way

    def _room(self) -> float:
        """How many events may be published before the upstream must be held."""
        return self._max_buffer_size - self._queued

    def _publish(self, events: tuple[Any, ...], turn: int) -> bool:
        for event in events:
            self._store(event)
        self._published()
        if self._report is not None:
            self._report(self)
        return True

    def _begin(self) -> T_co:
        event = super()._begin()
        if self._report is not None:
            self._report(self)
        return event

    def _pause_wait(self) -> None:
        """The source is not held any more, though there is no room yet."""
        if self._held_since is not None:
            waited = current_time() - self._held_since
            self._held_since = None
            self._waited += waited
            self._held += waited

    def _wait_ended(self) -> None:
        self._pause_wait()
        self._waited = 0.0

    def _overflow(self) -> str:
        return f"had no room in its buffer of {self._max_buffer_size} events for {self.up_to} seconds"

    def _statistics(self) -> SubscriptionStatistics:
        statistics = super()._statistics()
        if self._held_since is None:
            return statistics
        try:
            now = current_time()
        except NoEventLoopError:  # somebody asks from a thread
            return statistics
        return replace(statistics, held_seconds=self._held + now - self._held_since)


class _Hole:
    """How many events are missing at one place of a buffer; grows until it is received."""

    __slots__ = ("missed",)

    def __init__(self, missed: int) -> None:
        self.missed = missed


class Dropping(Entries[T_co]):
    """`DropOldest`, `DropNewest` and `Latest`.

    The first and the last lose events before all that are buffered: these are counted in ``_lost_ahead``. `DropNewest` loses
    them behind, so a hole stands in the stream, and after it come only events that were accepted later.
    """

    def __init__(
        self, subscriber_id: Hashable, max_buffer_size: float, policy: DropOldest | DropNewest | Latest, gaps: bool
    ) -> None:
        super().__init__(subscriber_id, max_buffer_size)
        self._oldest = not isinstance(policy, DropNewest)
        self._bound = 1 if isinstance(policy, Latest) else max_buffer_size
        # Whoever has taken everything accepts a whole turn of the source; but who wants the newest alone does not want that.
        self._accepts_turns = not isinstance(policy, Latest)
        self._gaps = gaps
        self._lost_ahead = 0
        self._hole: _Hole | None = None  # the last item of the stream, if that is one
        self._holes = 0
        # Whether it has begun to miss events and nobody knows: gaps tell, and whoever wants the newest alone need not be told.
        self._unreported = False
        self._behind = gaps or not self._accepts_turns

    def _publish(self, events: tuple[Any, ...], turn: int) -> bool:
        excess = self._queued + len(events) - self._bound
        exempt = self._exempt(turn) and self._accepts_turns
        if self._queued == 0:
            self._behind = self._gaps or not self._accepts_turns
        turned_away = 0
        if excess > 0 and not exempt:
            self._unreported = not self._behind
            self._behind = True
            if self._oldest:
                events = self._make_room(events, int(excess))
            else:
                turned_away = min(int(excess), len(events))
        for event in events[: len(events) - turned_away]:
            self._store(event)
            self._hole = None
        if turned_away:
            self._turn_away(turned_away)
        self._published()
        return True

    def _make_room(self, events: tuple[Any, ...], excess: int) -> tuple[Any, ...]:
        """Drop the oldest; returns what is left of *events*."""
        stored = min(excess, self._queued)
        self._queued -= stored
        self._backlogged -= stored
        # Kept until all is done: an event's finaliser is foreign code, and may close this very stream.
        dropped = [self._take_entry() for _ in range(stored)]
        if self._gaps and not self._lost_ahead:
            self._backlogged += 1
        self._lost_ahead += excess
        self._missed += excess
        del dropped
        return events[excess - stored :]

    def _turn_away(self, missed: int) -> None:
        """Leave a hole behind what is buffered, or make the one there larger."""
        self._missed += missed
        if self._gaps and self._hole is None:
            self._hole = _Hole(missed)
            self._store(self._hole)
            self._queued -= 1
            self._holes += 1
        elif self._hole is not None:
            self._hole.missed += missed

    def _begin(self) -> Any:
        if self._gaps and self._lost_ahead:
            missed, self._lost_ahead = self._lost_ahead, 0
            self._backlogged -= 1
            return Gap(missed, "overflow")
        item = super()._begin()
        if isinstance(item, _Hole):
            # It is no event, and took no room.
            self._queued += 1
            self._received -= 1
            self._holes -= 1
            self._hole = None if self._hole is item else self._hole
            return Gap(item.missed, "overflow")
        return item

    def _stored(self) -> int:
        return self._queued + self._holes

    def _drop(self) -> None:
        super()._drop()
        self._lost_ahead = self._holes = 0
        self._hole = None


class Conflating(Entries[T_co]):
    """`Conflate`: the stream holds the keys in the order of their first event, and a dictionary what is kept for each."""

    def __init__(self, subscriber_id: Hashable, max_buffer_size: float, policy: Conflate) -> None:
        super().__init__(subscriber_id, max_buffer_size)
        self._by = policy.by
        self._merge = policy.merge
        self._kept: dict[Hashable, Any] = {}

    def _publish(self, events: tuple[Any, ...], turn: int) -> bool:
        try:
            exempt = self._exempt(turn)
            return all(self._keep(event, exempt) for event in events)
        finally:
            self._published()

    def _keep(self, event: Any, exempt: bool) -> bool:
        key = self._by(event)
        if key in self._kept and self._merge is not None:
            event = self._merge(self._kept[key], event)
            if key in self._kept:  # it may have been received meanwhile, by `merge` itself
                self._kept[key] = event
                return True
        elif key in self._kept:
            self._missed += 1
            self._kept[key] = event
            return True
        if self._queued >= self._max_buffer_size and not exempt:
            return False
        self._store(key)
        self._kept[key] = event
        return True

    def _begin(self) -> T_co:
        return self._kept.pop(super()._begin())  # type: ignore[no-any-return]

    def _overflow(self) -> str:
        return f"had more than {self._max_buffer_size} unread entries"

    def _drop(self) -> None:
        super()._drop()
        self._kept.clear()
