"""One group: everything that exists for one key while its upstream lives, or may live again. Here is its subscribers' side.

Relies on `_upstream` for the upstream's side, and for the state. Subscribers call in here through the manager and their
subscriptions. Every method is synchronous, so whatever one of them decides is done before any other task can look.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from anyio import EndOfStream

from anyio_sharedstream._mailbox import Mailbox
from anyio_sharedstream._source import SharedSource, check_same_policies
from anyio_sharedstream._states import Move, State
from anyio_sharedstream._statistics import GroupState, GroupStatistics
from anyio_sharedstream._upstream import RUNNING, Upstream

__all__ = ["Group"]

_LINGERING = {State.LINGERING, State.LINGERING_OPENING, State.DRAINING}


class Group(Upstream):
    """The upstream of one key, its subscribers, and how it goes on or ends."""

    def join(self, mailbox: Mailbox[Any], source: SharedSource[Any]) -> None:
        if source is not self.source:
            check_same_policies(self.source, source)
        self.publisher.add(mailbox)
        if not self.source._plain:
            if self.state in _LINGERING:
                self._go(Move.ADOPT)
            self.timers.joined(len(self.publisher.members))
            self.publisher.welcome(mailbox)
            self.lines.write()

    def leave(self, mailbox: Mailbox[Any]) -> bool:
        """Unregister; True if that leaves nobody, and the upstream is on its way out."""
        if not self.publisher.remove(mailbox) or self.publisher.members:
            return False
        self.deserted()
        return self.evicted

    def deserted(self) -> None:
        if self.source.linger and self.state in RUNNING:
            self._go(Move.LINGER)
            self.timers.lingering()
        else:
            self._cancel()
        self.lines.write()

    def lingered(self) -> None:
        """Nobody has come back in time."""
        self._cancel()
        self.lines.write()

    def stop(self) -> None:
        """End on request: subscribers receive what was published, then the end of the stream, and the upstream is cancelled.

        A group that is closing because its upstream has failed still tells its subscribers so; its clean-up is cancelled.
        """
        self.publisher.flush(turn_ends=False)
        self._cancel()
        if self._requested:
            self.publisher.dismiss(EndOfStream())
        self.lines.write()

    def _cancel(self) -> None:
        self.scope.cancel()
        self._requested = self._requested or not self.evicted
        self._evict()

    def statistics(self) -> GroupStatistics:
        return GroupStatistics(
            key=self.key,
            state=self.state.public,
            epoch=self.epoch,
            restarts=self.current.number - 1,
            last_error=self._last_error,
            opened_at=self.current.live_at,
            last_event_at=self.publisher.last_event_at,
            events_published=self.publisher.published,
            subscriptions=self.publisher.statistics(),
        )

    def hung_statistics(self) -> list[GroupStatistics]:
        """Of earlier openings that have yet to close, apart from what `statistics` says."""
        closing: GroupState = "closing"
        return [
            replace(self.statistics(), state=closing, epoch=epoch.number, opened_at=epoch.live_at, subscriptions=())
            for epoch in self.hung
            if not self.evicted or epoch.number != self.epoch  # the latest is what the group itself is closing
        ]
