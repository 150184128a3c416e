"""The buffers of subscribers that take what comes one by one: with a policy of their own, or with marks between the events.

Relies on `_mailbox`, whose chunks and direct hand-over are for those who take everything; here the memory object stream holds
*entries*: events, and *marks*, which are received like events but are none (a `Gap`, a `Snapshot`) and take no room.
``_backlogged`` counts what can be received, ``_queued`` the events in the stream, ``_marks`` the marks in it. Everything is
synchronous, and nothing here depends on another subscriber.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import replace
from typing import Any, TypeVar

from anyio import BusyResourceError, current_time

from anyio_sharedstream._buffer import TURN
from anyio_sharedstream._history import History
from anyio_sharedstream._mailbox import Mailbox
from anyio_sharedstream._policies import Block, Gap, Snapshot
from anyio_sharedstream._statistics import SubscriptionStatistics

__all__ = ["Blocking", "Entries", "Failing", "Mark"]

T_co = TypeVar("T_co", covariant=True)

_NO_HISTORY = History(0, None, None)


class Mark:
    """An entry that is no event: a gap, by its cause, or a snapshot."""

    __slots__ = ("item", "kind", "void")

    def __init__(self, kind: str, item: Gap | Snapshot[Any]) -> None:
        self.kind = kind
        self.item = item
        self.void = False
        """whether it is not to be received after all"""


class Entries(Mailbox[T_co]):
    """What the policies have in common: storing entries, and taking them."""

    def __init__(self, subscriber_id: Hashable, max_buffer_size: float, *, gaps: bool = False) -> None:
        super().__init__(subscriber_id, max_buffer_size)
        self._gaps = gaps
        self._snapshot = False  # whether it is to be given the states
        self._history = _NO_HISTORY
        self._marks = 0
        self._tail: dict[str, Mark] = {}  # the marks behind the last event, by kind: of each there is but one
        self._unreported = False  # whether it has begun to miss events, and nobody knows

    # Storing.

    def _store(self, event: Any) -> None:
        if self._put(event):
            self._queued += 1
            self._tail.clear()

    def _put(self, entry: Any) -> bool:
        if self._over:
            return False  # by a function of the policy's, in the middle of a publication
        feed = self._feed or self._open_backlog()
        if self._closed:
            return False
        feed.send_nowait(entry)
        self._backlogged += 1
        return True

    def _mark(self, kind: str, item: Gap | Snapshot[Any]) -> None:
        """Put a mark behind what is buffered, or change the one of its kind that is there."""
        mark = self._tail.get(kind)
        if mark is not None:
            mark.item = item
            self._backlogged += mark.void
            mark.void = False
        else:
            self._tail[kind] = mark = Mark(kind, item)
            self._marks += self._put(mark)

    def _interrupted(self) -> None:
        """The upstream has failed, and will be opened again: a state that nobody has seen is nobody's state any more."""
        snapshot = self._tail.get("snapshot")
        if snapshot is not None and not snapshot.void:
            snapshot.void = True
            self._backlogged -= 1
        if self._gaps:
            if "restart" not in self._tail:
                self._tail.pop("snapshot", None)  # the next one comes behind the gap
            self._mark("restart", Gap(None, "restart"))
        self._published()

    def _state_ends(self) -> None:
        """The upstream has failed, and may be opened again: there is no state until then."""

    def _state_begins(self) -> None:
        """The upstream is being opened, and there is a state again."""
        if self._snapshot:
            self._mark("snapshot", Snapshot(self._history.state))
            self._published()

    def _prefill(self, events: tuple[Any, ...]) -> None:
        for event in events:
            self._store(event)
        self._replayed = self._queued
        self._published()

    def _capacity(self) -> float:
        return math.inf  # what is stored is bounded here, and marks take no room

    def _unread(self) -> int:
        """How many events count against the bound."""
        return self._queued - self._replay_left()

    def _exempt(self, turn: int) -> bool:
        """Whether it had taken everything when this turn of the source began, and so has room for whatever the turn brings.

        Decided once in a turn: that a turn is published in several parts is the doing of somebody else.
        """
        if self._turn_number != turn:
            self._turn_number = turn
            self._accepted = int(self._unread() == 0)
        return bool(self._accepted)

    def _take_entry(self) -> Any:
        return self._remaining.pop() if self._backlog is None else self._backlog.receive_nowait()

    def _published(self) -> None:
        """Everything of a publication is stored: let a parked reader look."""
        self._taken_at_yield = self._received
        self._peak = max(self._peak, self._queued)
        if self._backlogged:
            self._wake_reader()

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
        entry = self._take_entry()
        while isinstance(entry, Mark):
            self._mark_taken(entry)
            if not entry.void:
                return entry.item  # type: ignore[return-value]
            entry = self._take_entry()
        self._queued -= 1
        self._received += 1
        return entry  # type: ignore[no-any-return]

    def _mark_taken(self, mark: Mark) -> None:
        self._marks -= 1
        if self._tail.get(mark.kind) is mark:
            del self._tail[mark.kind]

    def _take(self, limit: int) -> tuple[T_co, ...]:
        return tuple(self._begin() for _ in range(min(limit, self._backlogged)))

    def _stored(self) -> int:
        return self._queued + self._marks

    def _drop(self) -> None:
        super()._drop()
        self._marks = self._replayed = 0
        self._tail.clear()


class Failing(Entries[T_co]):
    """`Fail`, for a subscriber that wants marks: the bound is that of `Mailbox`, event for event."""

    def _publish(self, events: tuple[Any, ...], turn: int) -> bool:
        earlier = self._accepted_in(turn)
        self._accept_in(turn, len(events))
        unread = self._unread()
        if unread > earlier and unread + len(events) > self._max_buffer_size:
            return False
        for event in events:
            self._store(event)
        self._published()
        return True


class Blocking(Entries[T_co]):
    """`Block`: takes everything, and says when it has no room for more."""

    def __init__(self, subscriber_id: Hashable, max_buffer_size: float, policy: Block, *, gaps: bool) -> None:
        super().__init__(subscriber_id, max_buffer_size, gaps=gaps)
        self.up_to = policy.up_to
        self._report: Callable[[Blocking[Any]], object] | None = None  # tells that there is more room, or less
        self._waited = 0.0  # for how long the source was held before, for want of the room that there still is not
        self._held_since: float | None = None  # when the hold began that is under way

    def _room(self) -> float:
        """How many events may be published before the upstream must be held."""
        return self._max_buffer_size - self._unread()

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

    def _empty(self) -> None:
        super()._empty()
        assert self._report is not None
        self._report(self)

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
        except RuntimeError:  # no event loop runs here: somebody asks from a thread
            return statistics
        return replace(statistics, held_seconds=self._held + now - self._held_since)
