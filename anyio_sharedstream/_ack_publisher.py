"""What an acknowledged upstream yields, on its way to the subscribers: with what the broker knows each event by.

Relies on `_publisher`, and on `_advancing` for what is on its way back. While there is nobody to publish for, what was gathered
stays gathered: an event that nobody was given could never be acknowledged.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from anyio import Event

from anyio_sharedstream._advancing import Advancing
from anyio_sharedstream._answering import Answering
from anyio_sharedstream._audience import Failed
from anyio_sharedstream._exceptions import AckTimeout, Terminal
from anyio_sharedstream._mailbox import Mailbox
from anyio_sharedstream._parking import Backend
from anyio_sharedstream._publisher import Owner, Publisher
from anyio_sharedstream._source import SharedSource

__all__ = ["AckPublisher"]


class AckPublisher(Publisher):
    """The subscribers of one key, what they are sent, and what they have to say of it."""

    acks: Advancing
    """of the present opening"""

    def __init__(self, source: SharedSource[Any], owner: Owner, backend: Backend) -> None:
        super().__init__(source, owner, backend)
        self.window = self
        self._payloads: list[Any] = []
        self._send = self._send_to_acknowledge

    def begin(self, acks: Advancing) -> None:
        """The upstream is to be opened, for the first time or again."""
        self.acks = acks
        for mailbox in self._answering():
            mailbox._open_account(acks)

    def abandon(self) -> None:
        """What was published by the upstream that is gone will come again: nobody need take it any more."""
        self.acks.abandon()
        self._forget_gathered()
        for mailbox in self._answering():
            mailbox._disown()

    def _answering(self) -> list[Answering[Any]]:
        return [mailbox for mailbox in self.members.values() if isinstance(mailbox, Answering)]

    def add(self, mailbox: Mailbox[Any]) -> None:
        super().add(mailbox)
        if isinstance(mailbox, Answering) and not self.acks.dead:
            mailbox._open_account(self.acks)
        self.acks.room_changed()

    # Publishing.

    def room(self) -> float:
        """How many events may be gathered before the source must wait."""
        return self.acks.room() - len(self._gathered) if self.members else 0

    @property
    def held(self) -> bool:
        return super().held or self.acks.waiting

    @property
    def held_until(self) -> float:
        return max(super().held_until, self.acks.waited_until)

    def begin_to_wait(self) -> Event:
        return self.acks.begin_to_wait()

    def waited(self) -> None:
        self.acks.waited()

    def gather(self, item: Any) -> int:
        """Take an event with its payload; raises `TypeError` if it is something else."""
        if self.acks.draining or self.acks.dead:
            return 0  # it comes too late, and will come again
        try:
            event, payload = item
        except (TypeError, ValueError):
            raise TypeError(f"open_stream() of {self.key!r} must yield pairs (event, broker_payload), not {item!r}") from None
        gathered = super().gather(event)
        self._payloads.append(payload)
        return gathered

    def flush(self, turn_ends: bool = True) -> bool:
        if self.acks.draining or self.acks.dead:
            self._forget_gathered()
        return False if self._gathered and not self.members else super().flush(turn_ends)

    def _forget_gathered(self) -> None:
        self._gathered.clear()
        self._gathered_routes.clear()
        self._payloads.clear()

    def _send_to_acknowledge(self, events: tuple[Any, ...], routes: Sequence[Hashable], turn: int, earlier: int) -> list[Failed]:
        payloads, self._payloads = self._payloads, []
        ledger = self.acks.ledger
        chunk = self.acks.publish(payloads, len(self.members))
        failed = self._audience.publish(events, routes, turn, earlier, chunk)
        ledger.published()
        return failed

    # Those who take too long.

    def time_out(self, mailbox: Mailbox[Any], seconds: float) -> None:
        """End a subscriber that has not finished an event in time, which is nobody else's concern."""
        registered = self.remove(mailbox)
        if registered:
            mailbox._ended_in = self._owner.epoch
        mailbox._fail(Terminal(AckTimeout(self.key, mailbox._subscriber_id, seconds)))
        if registered and not self.members:
            self._owner.deserted()
        lines = self._owner.lines
        lines.add("warning", "subscriber timed out", subscriber=mailbox._subscriber_id, seconds=seconds)
        lines.write()

    def time_out_the_first(self, seconds: float) -> bool:
        """End those at the oldest event, for whom everybody waits; false if there are none."""
        first = [mailbox for mailbox in self._answering() if mailbox._stands_first()]
        for mailbox in first:
            self.time_out(mailbox, seconds)
        return bool(first)
