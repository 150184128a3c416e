"""What has been published and not yet finished by all who were there: where everybody stands, and what comes of each event.

Relies on nothing but the language; synchronous, and nothing in it scans. Events lie in *chunks*, one per publication, linked from
the oldest to the newest. A reader (`_accounts`) is counted in exactly one chunk, the oldest that it has not finished, so
finishing a chunk is one decrement, and so is leaving. Readers of every event that have finished everything are counted together,
and all at once in the next chunk, when it is published. An event has *passed* when nobody stands at it or before it; events pass
in the order of their publication. Who stops in the middle of a chunk is looked at once per turn of the event loop
(`Ledger.settle`).

What somebody has to say of an event, other than that it is done with it, is noted in the event's `Record`. Those who have
acknowledged it need no note: they are the ones who are left when it passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

__all__ = ["Chunk", "Ledger", "Record", "Unsettled"]


class Record:
    """What the readers of one event have said of it."""

    __slots__ = ("failed", "lane", "payload", "readers", "rejected", "released", "unresolved")

    def __init__(self, payload: Any) -> None:
        self.payload = payload
        self.readers = 0
        """how many there were, once it has passed"""
        self.failed = 0
        self.rejected = 0
        self.released = 0
        self.unresolved = 0
        """how many have deferred it, and not yet said anything"""
        self.lane: Any = None
        """where it goes on, once it has passed and was sorted"""

    @property
    def acked(self) -> int:
        """How many are done with it, and have said nothing else."""
        return self.readers - self.failed - self.rejected - self.released - self.unresolved


class Chunk:
    """The events of one publication."""

    __slots__ = ("count", "next", "passed", "payloads", "readers", "records", "releases", "size", "stops")

    def __init__(self, payloads: Sequence[Any], readers: int, count: int) -> None:
        self.payloads = payloads
        self.size = len(payloads)
        self.readers = readers
        """how many were there when it was published"""
        self.count = count
        """how many stand in it"""
        self.passed = 0
        """how many of its events have passed"""
        self.next: Chunk | None = None
        self.stops: list[int] | None = None  # how many of those that count stand at each place; None if all at the first
        self.records: list[Record | None] | None = None  # by place, of the events of which somebody has said something
        self.releases: dict[int, int] | None = None  # how many leavers take nothing from a place on, less those who end there

    def first_stop(self) -> int:
        """The place of the first event that has not passed, as far as is known."""
        if not self.count:
            return self.size
        if self.stops is None:
            return 0
        place = self.passed
        while not self.stops[place]:
            place += 1
        return place

    def move(self, before: int, after: int) -> bool:
        """Somebody that stands in it has gone on; says whether that may let an event pass."""
        stops = self.stops
        if stops is None:
            self.stops = stops = [0] * self.size
            stops[0] = self.count
        stops[before] -= 1
        stops[after] += 1
        return before == self.passed and not stops[before]

    def enter(self) -> None:
        """Somebody stands in it from now on, at its first place."""
        self.count += 1
        if self.stops is not None:
            self.stops[0] += 1

    def leave(self, place: int) -> bool:
        """Somebody that stood at this place does so no more; says whether that may let an event pass."""
        self.count -= 1
        if self.stops is None:
            return not self.count
        self.stops[place] -= 1
        return place == self.passed and not self.stops[place]

    def record(self, place: int) -> Record:
        """The record of an event that has not passed."""
        if self.records is None:
            self.records = [None] * self.size
        found = self.records[place]
        if found is None:
            found = self.records[place] = Record(self.payloads[place])
        return found


class Unsettled(Protocol):
    """Who stops in the middle of a chunk."""

    def _settle(self) -> None:
        """Be counted where it stands."""


class Ledger:
    """The chunks between the oldest event that has not passed and the newest.

    :param wake: called when there is something to settle, or something has passed
    """

    def __init__(self, wake: Callable[[], object]) -> None:
        self.tail = Chunk((), 0, 0)
        self.head: Chunk | None = None
        """the oldest chunk that has not passed as a whole"""
        self.caught_up = 0
        """how many readers of every event have finished everything"""
        self.passed: deque[Record] = deque()
        """the events that have passed, until somebody takes them from here"""
        self._wake = wake
        self._unsettled: list[Unsettled] = []
        self._released = 0  # how many leavers do not take the next event to pass

    def publish(self, payloads: Sequence[Any], readers: int) -> Chunk:
        """Begin a publication: readers that choose are given their events of this chunk next, and then it is `published`."""
        chunk = Chunk(payloads, readers, self.caught_up + 1)  # one for the publication itself, for some may leave in its midst
        self.caught_up = 0
        self.tail.next = chunk
        self.tail = chunk
        if self.head is None:
            self.head = chunk
        return chunk

    def published(self) -> None:
        """Everybody has been given what is theirs; perhaps that is nothing."""
        self.tail.leave(0)
        self.advance()

    def unsettled(self, reader: Unsettled) -> None:
        """Look at it before this turn of the event loop is over."""
        if not self._unsettled:
            self._wake()
        self._unsettled.append(reader)

    def settle(self) -> None:
        """Look once at everyone that stopped in the middle of a chunk."""
        readers, self._unsettled = self._unsettled, []
        for reader in readers:
            reader._settle()

    def release(self, chunk: Chunk, place: int) -> None:
        """Somebody does not take the events from there up to the newest."""
        for where, at, change in ((chunk, place, 1), (self.tail, self.tail.size, -1)):
            if where.releases is None:
                where.releases = {}
            where.releases[at] = where.releases.get(at, 0) + change

    def advance(self) -> None:
        """Let pass what nobody stands at or before."""
        while (chunk := self.head) is not None:
            limit = chunk.first_stop()
            for place in range(chunk.passed, limit):
                self._pass(chunk, place)
            chunk.passed = max(limit, chunk.passed)
            if chunk.count:
                return
            if chunk.releases is not None:
                self._released += chunk.releases.get(chunk.size, 0)
            self.head = chunk.next
            chunk.payloads = ()
            chunk.records = chunk.releases = chunk.stops = None

    def _pass(self, chunk: Chunk, place: int) -> None:
        if chunk.releases is not None:
            self._released += chunk.releases.get(place, 0)
        record = chunk.records[place] if chunk.records is not None else None
        if record is None:
            record = Record(chunk.payloads[place])
        record.released += self._released
        record.readers = chunk.readers
        if not self.passed:
            self._wake()
        self.passed.append(record)
