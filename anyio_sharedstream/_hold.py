"""Holding a source back for subscribers with the policy `Block`: who is waited for, since when, and for how long at most.

Relies on `_audience`. The poll task awaits; what it awaits, and who fails when that takes too long, is decided here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from anyio import Event

from anyio_sharedstream._audience import Audience, Failed
from anyio_sharedstream._entries import Blocking

__all__ = ["Hold"]


class Hold:
    """Says when a source must wait before its next step.

    :param fail: ends subscribers that were waited for too long
    """

    def __init__(self, audience: Audience, fail: Callable[[list[Failed]], None]) -> None:
        self.blocking = audience.blocking
        """the subscribers that may have the source wait"""
        self._fail = fail
        self._over = False
        self._news: Event | None = None

    def room(self) -> float:
        """How many events the source may yield before it must be asked to wait."""
        return min((mailbox._room() for mailbox in self.blocking), default=math.inf)

    def blocked(self) -> list[Blocking[Any]]:
        """The subscribers for which the source has to wait; none if there is no use in it any more."""
        return [] if self._over else [mailbox for mailbox in self.blocking if mailbox._room() < 1]

    def news(self) -> Event:
        """An event that is set when it is worth asking again."""
        self._news = Event()
        for mailbox in self.blocking:
            mailbox._on_room = self.release
        return self._news

    def waited(self, mailboxes: list[Blocking[Any]], seconds: float, total: float) -> None:
        """The source has waited for them *seconds* more, *total* by now: fail those who asked for less."""
        for mailbox in mailboxes:
            mailbox._held += seconds
        late: list[Failed] = [(mailbox, None) for mailbox in self.blocked() if total >= mailbox.up_to]
        if late:
            self._fail(late)

    def release(self) -> None:
        """Something has changed: there is room, or somebody has gone."""
        if self._news is not None:
            self._news.set()

    def end(self) -> None:
        """From now on nobody is waited for."""
        self._over = True
        self.release()
