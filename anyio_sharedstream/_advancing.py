"""Everything on its way back from one opening of an upstream to its broker: how much that is, and how it comes to an end.

Relies on `_ledger` for what has passed, and on `_lanes` for the order. What is decided here is synchronous; what is awaited is
the producer, by a few tasks that live in the poll task's task group, so none of them can outlive the upstream or be forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any, Protocol

from anyio import Event

from anyio_sharedstream._clock import Clock, Timer
from anyio_sharedstream._lanes import Lane, Lanes
from anyio_sharedstream._ledger import Chunk, Ledger, Record
from anyio_sharedstream._logging import Lines
from anyio_sharedstream._parking import Backend
from anyio_sharedstream._producer import AckSource
from anyio_sharedstream._source import discard
from anyio_sharedstream._statistics import AckStatistics

__all__ = ["Advancing"]


class Owner(Protocol):
    """What this knows of its group."""

    source: Any
    backend: Backend
    lines: Lines

    def advance_failed(self, acks: Any, error: BaseException, /) -> None:
        """The producer cannot be told any more."""

    def clean_up_failed(self, error: BaseException, /) -> None:
        """Something was raised while the upstream was being closed."""

    def all_said(self, acks: Any, /) -> None:
        """Nobody has to say anything more of what was deferred."""

    def drained(self, acks: Any, /) -> None:
        """Nothing is on its way any more, or that was waited for long enough."""

    def late(self, subscription: Any, /) -> None:
        """It has been busy with an event for too long."""

    def stuck(self, acks: Any, /) -> None:
        """There has been no room for ``ack_timeout``, and the oldest event is where it was."""


class Timed(Protocol):
    """What this knows of a subscriber."""

    def _stop_timing(self) -> None:
        """Whatever it does, it is not late any more."""


class Advancing:
    """The events of one opening that were published and have not been advanced, and the producer that is told of them."""

    def __init__(self, owner: Owner, clock: Clock) -> None:
        self.source: AckSource[Any] = owner.source
        self.clock = clock
        self.now = owner.backend.clock
        self.call_soon = owner.backend.call_soon
        self.late = owner.late
        self.ledger = Ledger(self._wake)
        self.lines = owner.lines
        self.in_flight = 0
        """events that were published and have not been advanced"""
        self.deferred = 0
        """how often somebody has still to say what became of an event"""
        self.dead = False
        """whether the upstream is gone, and the broker will deliver again what was on its way"""
        self.draining = False
        """whether nothing more is published"""
        self.turn = 0.0
        """when those who had stopped in the middle of a chunk were looked at last"""
        self.over = Event()
        """set when there is nothing left to do"""
        self.producer: Any = None
        self.subscribers: dict[Timed, None] = {}
        """those that may have something to say, also if they are no members any more"""
        self._owner = owner
        self.lanes = Lanes(self._wake)
        self.news = Event()
        """set when there is something to settle, to sort or to advance"""
        self._room = Event()
        self.waiting = False
        """whether the upstream waits, for room or for a subscriber"""
        self.waited_until = 0.0
        """when it last went on after that, in the event loop's seconds"""
        self.advancing = 0  # lanes
        self.retries: dict[Lane, Timer] = {}
        """lanes that could not be advanced, until they are tried again"""
        self.timers: dict[Timer, None] = {}
        """those of others that end with this opening"""
        self._advanced = 0
        self._stuck = Timer(clock, lambda: owner.stuck(self), finite(self.source.ack_timeout))
        self._drain_timer = Timer(clock, self._give_up, self.source.drain_timeout)

    def open(self) -> Any:
        """Create the producer. Raises what is wrong with it."""
        producer = self.source.open()
        if not callable(getattr(producer, "open_stream", None)) or not callable(getattr(producer, "advance", None)):
            discard(producer)
            raise TypeError(
                f"create_producer() of {self.source.key!r} must return an object with open_stream() and advance(), "
                f"not {producer!r}"
            )
        self.producer = producer
        return producer

    # Publishing.

    def publish(self, payloads: Sequence[Any], readers: int) -> Chunk:
        self.in_flight += len(payloads)
        return self.ledger.publish(payloads, readers)

    def room(self) -> int:
        """How many events more may be on their way."""
        return 0 if self.draining else self.source.max_in_flight - self.in_flight

    def begin_to_wait(self) -> Event:
        """The upstream waits; gives an event that is set when it is worth asking for `room` again."""
        if not self.waiting:
            self.waiting = True
            self._watch()
        self._room = Event()
        return self._room

    def waited(self) -> None:
        """The upstream goes on."""
        if self.waiting:
            self.waiting = False
            self.waited_until = self.now()
        self._stuck.stop()

    def _watch(self) -> None:
        """From now on the oldest event holds the others up, if there is no room."""
        if self.waiting and not self.draining and not self.dead and self.in_flight >= self.source.max_in_flight:
            self._stuck.start(self.now())

    def room_changed(self) -> None:
        """There is more room, or somebody to publish for."""
        self._room.set()

    # Ending.

    def drain(self) -> None:
        """Nothing more is published: bring what is on its way to its end, but not for longer than ``drain_timeout``."""
        self.draining = True
        self._stuck.stop()
        self.wait_for_the_rest()
        self.look()

    def wait_for_the_rest(self) -> None:
        """The time for what is on its way begins, unless it has begun before."""
        if self._drain_timer.deadline is None:
            self._drain_timer.start(self.now())

    def still_stuck(self) -> None:
        """It was nobody's fault who could be ended."""
        self._watch()

    def go_on(self) -> None:
        """There are subscribers again."""
        self._drain_timer.stop()

    def look(self) -> None:
        """Look whether there is nothing left to do."""
        if self.draining and (self.dead or not self.in_flight):
            self._finish()

    def abandon(self) -> None:
        """The upstream is gone: nothing is advanced any more."""
        self.dead = True
        for timer in (self._stuck, self._drain_timer, *self.retries.values(), *self.timers):
            timer.close()
        self.retries.clear()
        self.timers.clear()
        for subscriber in list(self.subscribers):
            subscriber._stop_timing()
        self.over.set()

    def _give_up(self) -> None:
        self.draining = True
        self.lines.add("warning", "events not advanced", events=self.in_flight, seconds=self.source.drain_timeout)
        self._finish()
        self.lines.write()

    def _finish(self) -> None:
        self.over.set()
        self._owner.drained(self)

    # What becomes of events that somebody had deferred.

    def said(self, records: Sequence[Record]) -> None:
        """Somebody who had deferred these events has said what became of them."""
        for record in records:
            record.unresolved -= 1
            if record.lane is not None and not record.unresolved:
                self.lanes.resolved(record)
        self.deferred -= len(records)
        if not self.deferred:
            self._owner.all_said(self)

    def _wake(self) -> None:
        self.news.set()

    def advanced(self, events: int) -> None:
        """The producer was told of so many events."""
        self.in_flight -= events
        self._advanced += events
        self.room_changed()
        self.look()

    def sorting(self) -> None:
        """Something has passed: another event is the oldest."""
        self._watch()

    def failed(self, error: BaseException) -> None:
        """The producer cannot be told any more."""
        self._owner.advance_failed(self, error)

    def failed_late(self, error: BaseException) -> None:
        """The producer has raised something when nothing was expected of it any more."""
        self._owner.clean_up_failed(error)
        self.lines.write()

    def statistics(self) -> AckStatistics:
        return AckStatistics(
            in_flight=self.in_flight,
            max_in_flight=self.source.max_in_flight,
            waiting=self.waiting,
            deferred=self.deferred,
            lanes=len(self.lanes),
            advancing=self.advancing,
            retrying=len(self.retries),
            events_advanced=self._advanced,
        )


def finite(seconds: float) -> float | None:
    """As a timer takes it: one that is infinite does not start."""
    return seconds if seconds < inf else None
