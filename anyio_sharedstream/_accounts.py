"""Where each reader of an acknowledged stream stands in the ledger.

Relies on `_ledger`. Finishing, leaving and being looked at are synchronous, and cost the same however much is outstanding; only
those who choose their events pay for what they were given and have not taken, when they leave.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from anyio_sharedstream._ledger import Chunk, Ledger, Record

__all__ = ["Account", "Choosy", "Reader"]


class Reader:
    """Where a reader of every event stands: behind `last`, the newest chunk that it has finished, and `offset` events more."""

    __slots__ = ("_dirty", "_ledger", "_settled", "last", "offset")

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.last = ledger.tail
        self.offset = 0
        self._settled = 0  # at which place of its chunk it is counted
        self._dirty = False
        ledger.caught_up += 1

    def finish(self, events: int) -> None:
        """It has finished so many events more."""
        chunk = self.last.next
        if chunk is not None and chunk.size == events and chunk.stops is None and chunk.next is None:
            # The usual case of a reader that keeps up, as the loop below does it, but written out: every event comes by here.
            chunk.count = count = chunk.count - 1
            self.last = chunk
            ledger = self._ledger
            ledger.caught_up += 1
            if not count and chunk is ledger.head:
                ledger.advance()
            return
        offset = self.offset + events
        while chunk is not None and offset >= chunk.size:
            offset -= chunk.size
            settled, self._settled = self._settled, 0
            self._finish_chunk(chunk, settled)
            chunk = chunk.next
        self.offset = offset
        if offset and not self._dirty:
            self._dirty = True
            self._ledger.unsettled(self)

    def _finish_chunk(self, chunk: Chunk, settled: int) -> None:
        ledger = self._ledger
        last = chunk.leave(settled)
        self.last = chunk
        following = chunk.next
        if following is None:
            ledger.caught_up += 1
        else:
            following.enter()
        if last and chunk is ledger.head:
            ledger.advance()

    def catch_up(self, events: int) -> None:
        """It has finished so many events more, and is to be counted where it stands at once."""
        chunk = self.last.next
        offset = self.offset + events
        if chunk is not None and offset < chunk.size:
            self.offset = offset  # the usual case
            before, self._settled = self._settled, offset
            if chunk.move(before, offset) and chunk is self._ledger.head:
                self._ledger.advance()
            return
        self._dirty = True
        self.finish(events)
        self._settle()

    def _settle(self) -> None:
        """Be counted where it stands."""
        self._dirty = False
        chunk = self.last.next
        if chunk is None or self._settled == self.offset:
            return
        before, self._settled = self._settled, self.offset
        if chunk.move(before, self._settled) and chunk is self._ledger.head:
            self._ledger.advance()

    def records(self, events: int) -> list[Record]:
        """Those of its next events, to say something of each before they are finished."""
        found: list[Record] = []
        chunk, place = self.last.next, self.offset
        while chunk is not None and len(found) < events:
            if place == chunk.size:
                chunk, place = chunk.next, 0
                continue
            found.append(chunk.record(place))
            place += 1
        return found

    def stands_first(self) -> bool:
        """Whether it is one of those for whom the oldest event waits."""
        head = self._ledger.head
        return head is not None and self.last.next is head and self._settled == head.first_stop()

    def leave(self) -> None:
        """It takes nothing more: what it has not finished is released."""
        ledger = self._ledger
        chunk = self.last.next
        if chunk is None:
            ledger.caught_up -= 1
            return
        ledger.release(chunk, self.offset)
        chunk.leave(self._settled)
        self.last = ledger.tail
        self.offset = self._settled = 0
        if chunk is ledger.head:
            ledger.advance()


class Choosy:
    """Where a reader stands that is given some of the events: at the first of those that it was given and has not finished."""

    __slots__ = ("_at", "_dirty", "_given", "_ledger", "_settled")

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._given: deque[tuple[Chunk, Sequence[int]]] = deque()
        self._at = 0  # which of the first of these is its next event
        self._settled = 0
        self._dirty = False

    def give(self, chunk: Chunk, places: Sequence[int]) -> None:
        """It is given the events at these places of a chunk that is being published; there is one."""
        self._given.append((chunk, places))
        if len(self._given) == 1:
            self._enter(chunk)

    def _enter(self, chunk: Chunk) -> None:
        chunk.enter()
        self._settled = 0
        self._unsettle()

    def _unsettle(self) -> None:
        if not self._dirty:
            self._dirty = True
            self._ledger.unsettled(self)

    def finish(self, events: int) -> None:
        """It has finished so many events more."""
        self._at += events
        while self._given and self._at >= len(self._given[0][1]):
            chunk, places = self._given.popleft()
            self._at -= len(places)
            chunk.leave(self._settled)
            if self._given:
                self._enter(self._given[0][0])
            if chunk is self._ledger.head:
                self._ledger.advance()
        if self._given:
            self._unsettle()

    def catch_up(self, events: int) -> None:
        """It has finished so many events more, and is to be counted where it stands at once."""
        self._dirty = True
        self.finish(events)
        self._settle()

    def _settle(self) -> None:
        """Be counted where it stands."""
        self._dirty = False
        if not self._given:
            return
        chunk, places = self._given[0]
        place = places[self._at]
        if place != self._settled:
            before, self._settled = self._settled, place
            if chunk.move(before, place) and chunk is self._ledger.head:
                self._ledger.advance()

    def records(self, events: int) -> list[Record]:
        """Those of its next events, to say something of each before they are finished."""
        found: list[Record] = []
        at = self._at
        for chunk, places in self._given:
            found += [chunk.record(place) for place in places[at : at + events - len(found)]]
            at = 0
            if len(found) == events:
                break
        return found

    def stands_first(self) -> bool:
        """Whether it is one of those for whom the oldest event waits."""
        head = self._ledger.head
        return bool(self._given) and self._given[0][0] is head and self._settled == head.first_stop()

    def leave(self) -> None:
        """It takes nothing more: what it has not finished is released."""
        if not self._given:
            return
        chunk = self._given[0][0]
        at, self._at = self._at, 0
        for later, places in self._given:
            for place in places[at:]:
                later.record(place).released += 1
            at = 0
        self._given.clear()
        chunk.leave(self._settled)
        if chunk is self._ledger.head:
            self._ledger.advance()


Account = Reader | Choosy
