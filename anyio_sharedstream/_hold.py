"""Holding a source back for subscribers with the policy `Block`: who is waited for, since when, and for how long at most.

Relies on `_entries`. The poll task awaits; what it awaits, and who fails when that takes too long, is decided here. Nothing
looks at all subscribers at an event: each reports its own room as that changes, and they are counted by how much they have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from anyio import Event, current_time

from anyio_sharedstream._buffer import TURN
from anyio_sharedstream._entries import Blocking

__all__ = ["Hold"]


class Hold:
    """Says when a source must wait before its next step.

    :param expired: ends subscribers that were waited for too long
    """

    def __init__(self, expired: Callable[[list[Blocking[Any]]], None]) -> None:
        self.blocking: dict[Blocking[Any], int] = {}
        """the subscribers that may have the source wait, each with its room, of which no more than a turn matters"""
        self.active = False
        """whether the source waits at the moment"""
        self.ended_at = 0.0
        """when it last went on, in the event loop's seconds"""
        self._expired = expired
        self._counts = [0] * (TURN + 1)  # how many have so much room
        self._occupied = 0  # the same as bits: of those that are set, the lowest is the least room of all
        self._full: dict[Blocking[Any], int] = {}  # those without room, each with its number in `_waited_for`, or -1
        # Those that the source waits for, and the times for which, the next one last. By number, for whoever leaves in the middle
        # of a hold is not to be kept by its deadline.
        self._waited_for: dict[int, Blocking[Any]] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._over = False
        self._news: Event | None = None

    # What subscribers report.

    def add(self, mailbox: Blocking[Any]) -> None:
        self.blocking[mailbox] = room = _counted(mailbox)
        self._count(room, 1)
        mailbox._report = self._moved

    def discard(self, mailbox: Blocking[Any]) -> None:
        self._count(self.blocking.pop(mailbox), -1)
        mailbox._report = None
        self._has_room(mailbox)

    def _moved(self, mailbox: Blocking[Any]) -> None:
        before = self.blocking[mailbox]
        room = _counted(mailbox)
        if room == before:
            return
        self.blocking[mailbox] = room
        self._count(before, -1)
        self._count(room, 1)
        if room == 0:
            self._full[mailbox] = -1
        elif before == 0:
            self._has_room(mailbox)

    def _count(self, room: int, change: int) -> None:
        self._counts[room] += change
        if self._counts[room]:
            self._occupied |= 1 << room
        else:
            self._occupied &= ~(1 << room)

    def _has_room(self, mailbox: Blocking[Any]) -> None:
        if mailbox in self._full:
            self._waited_for.pop(self._full.pop(mailbox), None)
            mailbox._wait_ended()
            if not self._full:
                self._release()

    # What the poll task asks.

    def room(self) -> float:
        """How many events the source may yield before it must be asked to wait."""
        return (self._occupied & -self._occupied).bit_length() - 1 if self._occupied else math.inf

    def begin(self) -> bool:
        """Begin to wait for those without room; false if there are none, or there is no use in it any more."""
        if self._over or not self._full:
            return False
        self.active = True
        now = current_time()
        for number, mailbox in enumerate(self._full):
            mailbox._held_since = now
            self._full[mailbox] = number
            self._waited_for[number] = mailbox
        # If the source itself breaks off a hold, the next one goes on where that was.
        deadlines = [(now + mailbox.up_to - mailbox._waited, number) for mailbox, number in self._full.items()]
        self._deadlines = sorted(deadlines, reverse=True)
        return True

    def deadline(self) -> float | None:
        """When the next subscriber has been waited for long enough; None if nobody is waited for any more."""
        while self._deadlines and self._deadlines[-1][1] not in self._waited_for:
            self._deadlines.pop()
        return None if self._over or not self._deadlines else self._deadlines[-1][0]

    def news(self) -> Event:
        """An event that is set when it is worth asking again."""
        self._news = Event()
        return self._news

    def expire(self) -> None:
        """Fail those who have asked for less time than it has been."""
        now = current_time()
        late: list[Blocking[Any]] = []
        while self._deadlines and self._deadlines[-1][0] <= now:
            mailbox = self._waited_for.get(self._deadlines.pop()[1])
            if mailbox is not None:
                late.append(mailbox)
        if late:
            self._expired(late)

    def finish(self) -> None:
        """The source goes on, also if some still have no room."""
        self.active = False
        self.ended_at = current_time()
        self._deadlines.clear()
        self._waited_for.clear()
        for mailbox in self._full:
            mailbox._pause_wait()

    def end(self) -> None:
        """From now on nobody is waited for."""
        self._over = True
        self._release()

    def _release(self) -> None:
        if self._news is not None:
            self._news.set()


def _counted(mailbox: Blocking[Any]) -> int:
    return int(max(0, min(TURN, mailbox._room())))
