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

__all__ = ["Hold", "deadline"]


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
        return min((mailbox._room() for mailbox in list(self.blocking)), default=math.inf)

    def begin(self, now: float) -> list[Blocking[Any]]:
        """Return the subscribers for which the source has to wait; none if there is no use in it any more."""
        blocked = [] if self._over else [mailbox for mailbox in list(self.blocking) if mailbox._room() < 1]
        for mailbox in blocked:
            mailbox._on_room = self.release
            mailbox._holding_since = now
            # If the source itself breaks off a hold, the next one goes on where that was.
            mailbox._full_since = now if mailbox._full_since is None else mailbox._full_since
        return blocked

    def news(self) -> Event:
        """An event that is set when it is worth asking again."""
        self._news = Event()
        return self._news

    def finish(self, blocked: list[Blocking[Any]], now: float) -> None:
        """The source has waited until *now*: fail those who asked for less."""
        for mailbox in blocked:
            assert mailbox._holding_since is not None
            mailbox._held += now - mailbox._holding_since
            mailbox._holding_since = None
        late: list[Failed] = [(mailbox, None) for mailbox in blocked if now >= deadline(mailbox) and mailbox in self.blocking]
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


def deadline(mailbox: Blocking[Any]) -> float:
    """When the source will have waited long enough for this subscriber; never, if it has room."""
    return math.inf if mailbox._full_since is None else mailbox._full_since + mailbox.up_to
