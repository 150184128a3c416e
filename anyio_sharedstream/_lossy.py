"""The buffers of subscribers that drop events rather than fail, and of those that then begin anew with a state.

Relies on `_entries`. What a subscriber is left with depends on its own policy, bound and reading, and on nothing else.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, TypeVar

from anyio_sharedstream._entries import Entries, Mark
from anyio_sharedstream._policies import DropNewest, DropOldest, Gap, GapCause, Latest, Snapshot

__all__ = ["Dropping", "Resyncing"]

T_co = TypeVar("T_co", covariant=True)


class _Bounded(Entries[T_co]):
    """Something is given up when there are more events than so many."""

    def __init__(
        self, subscriber_id: Hashable, max_buffer_size: float, policy: DropOldest | DropNewest | Latest, *, gaps: bool
    ) -> None:
        super().__init__(subscriber_id, max_buffer_size, gaps=gaps)
        self._oldest = not isinstance(policy, DropNewest)
        self._newest_only = isinstance(policy, Latest)
        self._bound = 1 if self._newest_only else max_buffer_size
        self._ahead: dict[GapCause, int | None] = {}  # what is missing before all that is buffered, in order

    def _excess(self, events: tuple[Any, ...], turn: int) -> int:
        """How many events too many there would be."""
        excess = self._unread() + len(events) - self._bound
        # Whoever has taken everything accepts a whole turn of the source; but who wants the newest alone does not want that.
        exempt = self._exempt(turn) and not self._newest_only
        return 0 if exempt or excess <= 0 else int(excess)

    def _miss(self, missed: int | None, cause: GapCause) -> None:
        """Something is missing before all that is buffered."""
        before = self._ahead.get(cause)
        self._ahead[cause] = missed if before is None or missed is None else before + missed

    def _drop(self) -> None:
        super()._drop()
        self._ahead.clear()


class Dropping(_Bounded[T_co]):
    """`DropOldest`, `DropNewest` and `Latest`.

    The first and the last lose events before all that are buffered. `DropNewest` loses them behind, so a gap stands in the
    stream, and after it come only events that were accepted later.
    """

    def __init__(
        self, subscriber_id: Hashable, max_buffer_size: float, policy: DropOldest | DropNewest | Latest, *, gaps: bool
    ) -> None:
        super().__init__(subscriber_id, max_buffer_size, policy, gaps=gaps)
        # Whether nobody need be told that it misses events: gaps tell, and whoever wants the newest alone knows.
        self._told = gaps or self._newest_only
        self._first: list[Any] = []  # the oldest event, once taken out of the stream to see that it is no mark

    def _publish(self, events: tuple[Any, ...], turn: int) -> bool:
        excess = self._excess(events, turn)
        if self._queued == 0:
            self._told = self._gaps or self._newest_only
        turned_away = 0
        if excess:
            self._unreported = not self._told
            self._told = True
            if self._oldest:
                events = self._make_room(events, excess)
            else:
                turned_away = min(excess, len(events))
        for event in events[: len(events) - turned_away]:
            self._store(event)
        if turned_away:
            self._turn_away(turned_away)
        self._published()
        return True

    def _make_room(self, events: tuple[Any, ...], excess: int) -> tuple[Any, ...]:
        """Drop the oldest; returns what is left of *events*. What was replayed is older than all that counts."""
        excess += self._replay_left()
        stored = min(excess, self._queued)
        # Kept until all is done: an event's finaliser is foreign code, and may close this very stream.
        dropped: list[Any] = []
        events_left = self._queued - stored
        # Marks directly behind what is dropped are before all that is buffered, too: a gap there would come after a later one.
        while self._queued > events_left or self._marks:
            dropped.append(entry := self._take_entry())
            if isinstance(entry, Mark):
                self._backlogged -= 1
                self._mark_taken(entry)
                self._put_ahead(None, "restart")
            elif self._queued > events_left:
                self._backlogged -= 1
                self._queued -= 1
                self._put_ahead(1, "overflow")
            else:
                self._first.append(entry)
                break
        self._replayed = 0
        if excess > stored:
            self._put_ahead(excess - stored, "overflow")
        self._missed += excess
        del dropped
        return events[excess - stored :]

    def _take_entry(self) -> Any:
        return self._first.pop() if self._first else super()._take_entry()

    def _stored(self) -> int:
        return super()._stored() - len(self._first)

    def _drop(self) -> None:
        super()._drop()
        self._first.clear()

    def _put_ahead(self, missed: int | None, cause: GapCause) -> None:
        if self._gaps:
            self._backlogged += cause not in self._ahead
            self._miss(missed, cause)

    def _turn_away(self, missed: int) -> None:
        """Leave a gap behind what is buffered, or make the one there larger."""
        self._missed += missed
        if self._gaps:
            gap = self._tail.get("overflow")
            before = gap.item.missed if gap is not None and isinstance(gap.item, Gap) else 0
            self._mark("overflow", Gap((before or 0) + missed, "overflow"))

    def _prefill(self, events: tuple[Any, ...]) -> None:
        super()._prefill(events[-1:] if self._newest_only else events)
        if self._newest_only:
            self._replayed = 0  # it counts: the next event takes its place

    def _begin(self) -> Any:
        if self._ahead:
            self._backlogged -= 1
            cause = next(iter(self._ahead))
            return Gap(self._ahead.pop(cause), cause)
        return super()._begin()


class Resyncing(_Bounded[T_co]):
    """The same policies, for a subscriber that asked for snapshots.

    It need not go on with what is left of its buffer: whatever it has missed is in the state. So it drops everything, counts what
    it misses until it is read again, and then gives the gaps and the state of that moment. From there on it misses nothing.
    """

    def __init__(
        self, subscriber_id: Hashable, max_buffer_size: float, policy: DropOldest | DropNewest | Latest, *, gaps: bool
    ) -> None:
        super().__init__(subscriber_id, max_buffer_size, policy, gaps=gaps)
        self._lost = False  # whether everything was dropped, and the state has yet to be given
        self._owed = False  # whether the gaps were given, and there was no state to go with them
        self._synchronised_at = -1

    def _publish(self, events: tuple[Any, ...], turn: int) -> bool:
        if self._history.publications == self._synchronised_at:
            return True  # it took the state in the middle of this publication, and these are in it
        if self._lost:
            self._lose(len(events))
        elif self._excess(events, turn):
            self._lost = True
            self._unreported = not self._gaps
            self._drop_everything()
            if self._closed:
                return True  # by a finaliser of what was dropped
            self._lose(len(events))
            self._recount()
        else:
            for event in events:
                self._store(event)
        self._published()
        return True

    def _lose(self, events: int) -> None:
        self._missed += events
        self._miss(events, "overflow")

    def _drop_everything(self) -> None:
        # Kept until all is done: an event's finaliser is foreign code, and may close this very stream.
        dropped = [self._take_entry() for _ in range(self._stored())]
        self._queued = self._marks = 0
        self._tail.clear()
        for entry in dropped:
            if not isinstance(entry, Mark):
                self._lose(1)
            elif isinstance(entry.item, Gap):
                self._miss(entry.item.missed, entry.item.cause)
        del dropped

    def _recount(self) -> None:
        self._backlogged = (len(self._ahead) if self._gaps else 0) + self._history.running

    def _synchronise(self) -> None:
        """Make entries of what is missing and of the state."""
        if self._lost:
            self._backlogged = 0
        self._lost = False
        for cause, missed in self._ahead.items():
            if self._gaps:
                self._mark(cause, Gap(missed, cause))
        self._ahead.clear()
        self._owed = not self._history.running
        if not self._owed:
            self._mark("snapshot", Snapshot(self._history.state))
            self._synchronised_at = self._history.publications

    def _interrupted(self) -> None:
        if not self._lost:
            super()._interrupted()
        else:
            self._miss(None, "restart")
            self._recount()
            self._published()

    def _state_ends(self) -> None:
        if self._lost:
            self._recount()

    def _state_begins(self) -> None:
        self._owed = False
        if not self._lost:
            super()._state_begins()
        else:
            if self._waiter is None:
                self._recount()
            else:
                self._synchronise()  # somebody is receiving, though it has yet to run
            self._published()

    def _begin(self) -> T_co:
        if self._lost:
            self._synchronise()
        return super()._begin()

    def _seal(self) -> None:
        if self._lost or (self._owed and self._history.running):
            self._synchronise()
        super()._seal()

    def _drop(self) -> None:
        super()._drop()
        self._lost = False
