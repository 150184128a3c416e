"""A group whose events go back to a broker: how it ends when something is still on its way.

Relies on `_group`. The order of an end is: what was taken is resolved, the key is free, nothing more is pulled, what is on its
way is advanced, the producer's stream is closed, the producer is closed. So the end of a stream that its subscribers (or nobody)
asked for waits: not for its subscribers, who are told at once, but for what they still have to say, and not for longer than the
source's ``drain_timeout``. Only what its own failure ends is never advanced if it is opened again, for then the broker repeats
it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from anyio_sharedstream._ack_publisher import AckPublisher
from anyio_sharedstream._advancing import Advancing
from anyio_sharedstream._epoch import Epoch
from anyio_sharedstream._group import Group
from anyio_sharedstream._mailbox import Mailbox
from anyio_sharedstream._publisher import Publisher
from anyio_sharedstream._source import SharedSource
from anyio_sharedstream._states import Move, State
from anyio_sharedstream._statistics import GroupStatistics

__all__ = ["AckEpoch", "AckGroup"]


class AckEpoch(Epoch):
    """One opening of an acknowledged upstream."""

    def __init__(self, number: int, group: AckGroup, acks: Advancing) -> None:
        super().__init__(number, watched=True)
        self.group = group
        self.acks = acks
        self.brought_home = False
        """whether nothing keeps the stream open any more"""

    @property
    def closing(self) -> bool:
        # While something is on its way the upstream is kept open, and that is not for want of haste.
        return self.opened and not self.left and self.acks.over.is_set()


class AckGroup(Group):
    """The upstream of one key, its subscribers, and what these have to say of what they were given."""

    publisher: AckPublisher
    current: AckEpoch

    def _make_publisher(self) -> Publisher:
        return AckPublisher(self.source, self, self.backend)

    def _make_epoch(self, number: int) -> Epoch:
        acks = Advancing(self, self._owner.clock)
        self.publisher.begin(acks)
        return AckEpoch(number, self, acks)

    # Subscribers.

    def join(self, mailbox: Mailbox[Any], source: SharedSource[Any]) -> None:
        super().join(mailbox, source)
        self.current.acks.go_on()

    def deserted(self) -> None:
        if self.state is State.LIVE and not self.source.linger and self.current.acks.deferred:
            self._wait_for_resolutions()
        else:
            super().deserted()

    def lingered(self) -> None:
        if self.state is State.LINGERING and self.current.acks.deferred:
            self._wait_for_resolutions()
        else:
            super().lingered()

    def _wait_for_resolutions(self) -> None:
        self._go(Move.DRAIN)
        self.current.acks.wait_for_the_rest()
        self.lines.write()

    # What comes of what they say.

    def all_said(self, acks: Advancing) -> None:
        """Nobody has to say anything more of what was deferred."""
        if acks is self.current.acks and self.state is State.DRAINING:
            self._cancel()
            self.lines.write()

    def late(self, subscription: Any) -> None:
        """It has been busy with an event for too long."""
        self.publisher.time_out(subscription, self.current.acks.source.ack_timeout)

    def stuck(self, acks: Advancing) -> None:
        """There has been no room for ``ack_timeout``, and the oldest event is where it was."""
        if acks.ledger.passed:  # in this very moment, for who held it up is late
            acks.still_stuck()
        elif not self.publisher.time_out_the_first(acks.source.ack_timeout):
            self.lines.add("warning", "no room for events", in_flight=acks.in_flight, deferred=acks.deferred)
            self.lines.write()
            acks.still_stuck()

    def advance_failed(self, acks: Advancing, error: BaseException) -> None:
        """The producer cannot be told any more: that is a failure of the upstream, unless it is on its way out."""
        epoch = self.current
        if epoch.over:
            self.lines.add("error", "advance failed", exc_info=error, events=acks.in_flight)
            acks.abandon()
            acks.look()
            if not isinstance(error, Exception):
                self.abort(error)
        else:
            epoch.ended_at = self.backend.clock()
            epoch.break_off(error)
            self._decide(epoch, None)
            self._begin_to_close(epoch)
            acks.abandon()
        self.lines.write()

    # The end.

    def _fail_over(self, epoch: Epoch) -> None:
        self.publisher.abandon()
        super()._fail_over(epoch)

    def _cancel(self) -> None:
        epoch = self.current
        if not epoch.opened or epoch.left or epoch.acks.dead:
            super()._cancel()
            if epoch.opened and epoch.scope is not None:
                epoch.scope.cancel()
        else:
            self._requested = self._requested or not self.evicted
            self._evict()
            epoch.acks.drain()

    def drained(self, acks: Advancing) -> None:
        """Nothing is on its way any more, or that was waited for long enough: close."""
        epoch = self.current
        if not self.evicted:
            self._requested = True
            self._evict()
        epoch.brought_home = True
        acks.abandon()
        self.timers.closing(epoch)
        self.lines.write()

    def stream_ended(self, epoch: AckEpoch, error: BaseException | None) -> None:
        """The producer's stream is closed; *error* is what it has raised of its own, if anything.

        If that is the end, subscribers are told, and not only when all that they have in their buffers has been advanced.
        """
        if epoch.acks.dead or self._requested:
            return
        if not epoch.decided:
            self._decide(epoch, error)
        self._settle(epoch, error, surroundings_cancelled=False)
        epoch.acks.drain()
        self.lines.write()

    def statistics(self) -> GroupStatistics:
        return replace(super().statistics(), acknowledgement=self.current.acks.statistics())
