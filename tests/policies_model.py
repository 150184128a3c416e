"""What a policy promises its subscriber, in a plain list and without a loop: the reference that `test_policies` compares it with.

One subscriber, who is offered one event after the other, and told of the turns of the source. What is offered counts as buffered
at once, though the library publishes it later in the turn: nobody takes anything in between, so nobody can tell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from anyio_sharedstream import Conflate, DropNewest, DropOldest, Fail, Gap, Latest, SubscriberOverflow, SubscriptionStatistics

Event = tuple[int, ...]  # a symbol, and the number of the event; of all events, if several were merged
Policy = Fail | DropOldest | DropNewest | Latest | Conflate
Predicate = Callable[[Event], bool]
Seen = tuple[int, int, int, int, int]

POISON = -1


class PoisonError(Exception):
    """What the functions of a subscriber raise for an event whose symbol is `POISON`."""


def symbol(event: Event) -> int:
    if event[0] == POISON:
        raise PoisonError(*event)
    return event[0]


def even(event: Event) -> bool:
    return symbol(event) % 2 == 0


def both(old: Event, new: Event) -> Event:
    return old + new[1:]


POLICIES: list[Policy] = [Fail(), DropOldest(), DropNewest(), Latest(), Conflate(symbol), Conflate(symbol, both)]


@dataclass(eq=False)
class Expected:
    """One subscriber: what it has yet to receive, what it has lost, and how it ends."""

    policy: Policy
    bound: int
    where: Predicate | None = None
    gaps: bool = False
    buffer: list[Event | Gap] = field(default_factory=list)
    peak: int = 0
    received: int = 0
    missed: int = 0
    refused: int = 0
    ending: BaseException | None = None
    _turn: int = -1
    _late: bool = False

    def events(self) -> list[Any]:
        return [item for item in self.buffer if not isinstance(item, Gap)]

    def seen(self) -> Seen:
        return len(self.events()), self.peak, self.received, self.missed, self.refused

    def take(self, limit: int) -> list[Event | Gap]:
        """The reader takes what there is, up to *limit*."""
        items, self.buffer = self.buffer[:limit], self.buffer[limit:]
        self.received += sum(not isinstance(item, Gap) for item in items)
        return items

    def end(self, ending: BaseException, *, drop: bool = False) -> None:
        if self.ending is None:
            self.ending = ending
        if drop:
            self.buffer.clear()

    def publish(self, events: list[Event], turn: int) -> None:
        """The source has yielded these, in a turn that has this number."""
        if self.ending is not None or not events:
            return
        if turn != self._turn:
            # The bound counts what a subscriber was too slow for: who has taken everything before is not late in this turn.
            self._turn = turn
            self._late = bool(self.events())
        chosen, error = self._choose(events)
        if isinstance(self.policy, Fail) and self._late and chosen and len(self.buffer) + len(chosen) > self.bound:
            self._overflow()
        for event in chosen:
            if self.ending is None:
                try:
                    self._accept(event)
                except PoisonError as exc:
                    self.end(exc)
                self.peak = max(self.peak, len(self.events()))
        if error is not None:
            self.end(error)

    def _choose(self, events: list[Event]) -> tuple[list[Event], PoisonError | None]:
        chosen: list[Event] = []
        for event in events:
            try:
                wanted = self.where is None or self.where(event)
            except PoisonError as exc:
                return chosen, exc
            if wanted:
                chosen.append(event)
            self.refused += not wanted
        return chosen, None

    def _overflow(self) -> None:
        self.end(SubscriberOverflow("feed", None, self.bound), drop=True)

    def _accept(self, event: Event) -> None:
        full = self._late and len(self.events()) >= self.bound
        match self.policy:
            case Conflate():
                self._conflate(event, self.policy, full)
            case Latest():
                self.buffer.append(event)
                self._lose_oldest(1)
            case DropOldest() if full:
                self.buffer.append(event)
                self._lose_oldest(self.bound)
            case DropNewest() if full:
                self._lose(1, -1)
            case _:
                self.buffer.append(event)

    def _conflate(self, event: Event, policy: Conflate, full: bool) -> None:
        key = policy.by(event)
        places = [place for place, old in enumerate(self.events()) if old[0] == key]
        if not places and full:
            self._overflow()
        elif not places:
            self.buffer.append(event)
        elif policy.merge is None:
            self.missed += 1
            self.buffer[places[0]] = event
        else:
            self.buffer[places[0]] = policy.merge(self.buffer[places[0]], event)

    def _lose_oldest(self, left: int) -> None:
        """The oldest go, and a gap takes their place, before everything else."""
        events = self.events()
        excess = len(events) - left
        if excess > 0:
            self.buffer = self.buffer[: len(self.buffer) - len(events)] + events[excess:]
            self._lose(excess, 0)

    def _lose(self, count: int, end: int) -> None:
        """So many events are missing at this end of the buffer."""
        self.missed += count
        neighbour = self.buffer[end] if self.buffer else None
        if not self.gaps:
            return
        if isinstance(neighbour, Gap):
            assert neighbour.missed is not None
            self.buffer[end] = Gap(neighbour.missed + count, "overflow")
        else:
            self.buffer.insert(0 if end == 0 else len(self.buffer), Gap(count, "overflow"))


def seen(statistics: SubscriptionStatistics) -> Seen:
    return (
        statistics.current_buffer_used,
        statistics.peak_buffer_used,
        statistics.events_received,
        statistics.events_missed,
        statistics.events_refused,
    )
