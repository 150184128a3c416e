"""The times that a group keeps, as its source asks for: lingering, a cohort, silence, and closing for too long.

Relies on `_clock`, and on `_publisher` for when the latest event came. A timer that comes up says so to the group, which decides;
those that nobody asked for do not exist.
"""

from __future__ import annotations

from typing import Any, Protocol

from anyio import Event

from anyio_sharedstream._clock import Clock, Timer
from anyio_sharedstream._epoch import Epoch
from anyio_sharedstream._parking import Backend
from anyio_sharedstream._publisher import Publisher
from anyio_sharedstream._source import SharedSource

__all__ = ["make_timers"]


class Owner(Protocol):
    """What the timers know of their group."""

    source: SharedSource[Any]
    backend: Backend
    publisher: Publisher
    current: Epoch

    def lingered(self) -> None:
        """Nobody has come back in time."""

    def silent(self, epoch: Epoch, /) -> None:
        """Nothing has come for too long."""

    def closing_late(self) -> None:
        """The upstream has not closed in time."""


class NoTimers:
    """Those of a group that keeps no times."""

    cohort: Event | None = None
    """set when enough subscribers are there, or have been waited for; None if nobody asked for that"""

    def joined(self, subscribers: int) -> None:
        """Somebody has come, and so many are there now."""

    def lingering(self) -> None:
        """The upstream outlives its subscribers for a while, from now on."""

    def opening(self) -> None:
        """Silence counts from now on."""

    def closing(self, epoch: Epoch) -> None:
        """Nothing is expected of the upstream any more but that it closes."""

    def closed(self) -> None:
        """The upstream has closed, or nobody waits for that any more."""

    def close(self) -> None:
        """There are no times to keep any more."""


class Timers(NoTimers):
    """What a group waits for, apart from its upstream."""

    def __init__(self, group: Owner, clock: Clock) -> None:
        source = group.source
        self._group = group
        self._now = group.backend.clock
        self._silent_since = 0.0
        self._linger = Timer(clock, group.lingered, source.linger)
        self._silence = Timer(clock, self._check_silence, source.silence_timeout)
        self._closing = Timer(clock, group.closing_late, source.close_timeout)
        self._grace = Timer(clock, self._gathered, source.cohort_grace)
        if source.cohort_grace is not None or source.min_subscribers > 1:
            self.cohort = Event()

    def joined(self, subscribers: int) -> None:
        self._linger.stop()
        if self.cohort is None or self.cohort.is_set():
            return
        if subscribers >= self._group.source.min_subscribers > 1:
            self._gathered()
        elif self._grace.deadline is None:
            self._grace.start(self._now())

    def _gathered(self) -> None:
        assert self.cohort is not None
        self.cohort.set()
        self._grace.stop()

    def lingering(self) -> None:
        self._linger.start(self._now())

    def opening(self) -> None:
        self._silent_since = self._now()
        self._watch()

    def closing(self, epoch: Epoch) -> None:
        for timer in (self._linger, self._silence, self._grace):
            timer.stop()
        if epoch.closing and self._closing.deadline is None:
            self._closing.start(self._now())

    def closed(self) -> None:
        self._closing.stop()

    def close(self) -> None:
        for timer in (self._linger, self._silence, self._closing, self._grace):
            timer.close()

    def _watch(self) -> None:
        publisher = self._group.publisher
        self._silence.start(max(self._silent_since, publisher.last_event_at or 0.0, publisher.held_until))

    def _check_silence(self) -> None:
        """Look at the time of the latest event. Moving the deadline at every event instead would cost something at every one."""
        if self._group.publisher.held:
            self._silent_since = self._now()  # it is we who have it wait; that ends at the earliest now
        self._watch()
        if self._silence.deadline is not None and self._silence.deadline <= self._now():
            self._silence.stop()
            self._group.silent(self._group.current)


_NONE = NoTimers()


def make_timers(group: Owner, clock: Clock) -> NoTimers:
    """Make what the group's source asks for; most ask for nothing."""
    source = group.source
    asked = source.linger or source.min_subscribers > 1
    times = (source.cohort_grace, source.silence_timeout, source.close_timeout)
    return Timers(group, clock) if asked or any(time is not None for time in times) else _NONE
