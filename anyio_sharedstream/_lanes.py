"""The way back: events that everybody is done with, in order within their lanes, and the lanes side by side.

Relies on `_ledger` for what has passed, and on `_restarts` for when to try again. Synchronous; the tasks that await the producer
are in `_advancing`. Nothing looks at all lanes: those with something to advance stand in a queue, and an empty one is forgotten.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable

from anyio_sharedstream._ledger import Record
from anyio_sharedstream._restarts import Restarts

__all__ = ["Lane", "Lanes"]


class Lane:
    """Events of one order, oldest first."""

    __slots__ = ("busy", "key", "records", "retries")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.records: deque[Record] = deque()
        self.busy = False
        """whether it is in the queue of those that are ready, is being advanced, or waits until that is tried again"""
        self.retries: Restarts | None = None
        """what has failed since it was advanced last; None if nothing has"""


class Lanes:
    """Which lanes there are, and which of them have something to advance.

    :param wake: called when there is something to advance
    """

    def __init__(self, wake: Callable[[], object]) -> None:
        self._lanes: dict[Hashable, Lane] = {}
        self._ready: deque[Lane] = deque()
        self._wake = wake

    def add(self, record: Record, key: Hashable) -> None:
        """An event has passed. Raises what hashing and comparing its lane raises."""
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(key)
        record.lane = lane
        lane.records.append(record)
        self._look(lane)

    def resolved(self, record: Record) -> None:
        """Nobody has to say anything more of an event that has passed."""
        self._look(record.lane)

    def _look(self, lane: Lane) -> None:
        if not lane.busy and lane.records and not lane.records[0].unresolved:
            lane.busy = True
            self._queue(lane)

    def _queue(self, lane: Lane) -> None:
        if not self._ready:
            self._wake()
        self._ready.append(lane)

    def __len__(self) -> int:
        return len(self._lanes)

    @property
    def ready(self) -> int:
        """How many lanes wait for somebody who advances them."""
        return len(self._ready)

    def take(self) -> tuple[Lane, list[Record]]:
        """Take the resolved events of the lane that has been ready longest; there is one."""
        lane = self._ready.popleft()
        batch: list[Record] = []
        while lane.records and not lane.records[0].unresolved:
            batch.append(lane.records.popleft())
        return lane, batch

    def advanced(self, lane: Lane) -> None:
        """What was taken from it has been advanced."""
        lane.busy = False
        lane.retries = None
        if lane.records:
            self._look(lane)
        else:
            del self._lanes[lane.key]

    def put_back(self, lane: Lane, batch: list[Record]) -> None:
        """What was taken from it could not be advanced, and will be tried `again`."""
        lane.records.extendleft(reversed(batch))

    def again(self, lane: Lane) -> None:
        """The time has come to try once more."""
        self._queue(lane)
