"""What the library promises, in plain lists and without a loop: the reference that `test_model` compares it with.

The model is told of everything in the very step in which it happens: of a subscriber's doings by whoever does them, of an
upstream's by the source itself, just before it yields, suspends or ends. Between two suspensions nobody else can look. So
whatever order the event loop gives its tasks, the model knows exactly what must be seen at any moment; except that an upstream
which closes takes a few turns of the loop to do so, and that is what `open` and `gone` are for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from anyio import ClosedResourceError, EndOfStream

from anyio_sharedstream import GroupStatistics, PollTerminated, SubscriberOverflow, SubscriptionStatistics

TURN = 64

Event = tuple[int, int]  # the number of its opening, and its own number in there
Ending = tuple[type[BaseException], object]  # a type of exception, and the first of its arguments


Seen = tuple[object, ...]  # what statistics say of a group or a subscription


def seen_group(statistics: GroupStatistics) -> Seen:
    subscriptions = map(seen_subscription, statistics.subscriptions)
    return statistics.key, statistics.state, statistics.events_published, *subscriptions


def seen_subscription(statistics: SubscriptionStatistics) -> Seen:
    used, peak = statistics.current_buffer_used, statistics.peak_buffer_used
    return statistics.subscriber_id, used, peak, statistics.max_buffer_size, statistics.events_received


class SourceError(Exception):
    """What a source raises."""


@dataclass(eq=False)
class Opening:
    """One group: what its upstream has published, and to whom."""

    key: int
    number: int
    subs: list[Sub] = field(default_factory=list)
    """those who are registered, in the order in which they joined"""
    published: list[Event] = field(default_factory=list)
    gathered: list[Event] = field(default_factory=list)
    """what was yielded since, in the step under way"""
    in_turn: int = 0
    """how many events the source has yielded in the turn under way"""
    turn: int = 0
    """how many events had been published when that began"""
    opened: bool = False
    open: bool = False
    evicted: bool = False
    gone: bool = False
    """whether nothing of it runs any more, and everybody has been told how it ended"""

    def seen(self) -> Seen:
        state = "closing" if self.evicted else "live" if self.opened else "waiting"
        return self.key, state, len(self.published), *(sub.seen() for sub in self.subs)


@dataclass(eq=False)
class Sub:
    """A subscriber: what it has yet to take, and how it ends."""

    opening: Opening
    name: int
    bound: int
    start: int
    """how many events of the opening had been published when it registered"""
    buffer: list[Event] = field(default_factory=list)
    received: list[Event] = field(default_factory=list)
    peak: int = 0
    ending: Ending | None = None
    keeps_up: bool = False
    """whether a task is receiving that has had nothing left to take since it began"""

    @property
    def ended(self) -> bool:
        """Whether it must see its ending once it has taken everything. While it is still registered, it may."""
        return self.ending is not None and self not in self.opening.subs

    def take(self, events: list[Event], limit: int) -> None:
        """It has received these, and could have received as many as *limit*."""
        assert events
        assert events == self.buffer[:limit]
        del self.buffer[:limit]
        self.received += events

    def check(self) -> None:
        """What it receives is a contiguous run of one opening, which begins where it registered, and ends where that ends.

        An overflow drops the rest, and so does closing.
        """
        published = self.opening.published[self.start :]
        run = self.received + self.buffer
        dropped = self.ending is not None and self.ending[0] in (SubscriberOverflow, ClosedResourceError)
        assert run == (published[: len(run)] if dropped or self.ended else published)
        assert len(self.buffer) <= max(self.bound, TURN)

    def seen(self) -> Seen:
        return self.name, len(self.buffer), self.peak, self.bound, len(self.received)


class Model:
    """All keys: who is registered where, and what each of them must see."""

    def __init__(self) -> None:
        self.openings: list[Opening] = []
        self.accepting: dict[int, Opening] = {}

    def evicted(self) -> list[Opening]:
        """The groups that may still be on their way out."""
        return [opening for opening in self.openings if opening.evicted and not opening.gone]

    def open_upstreams(self, key: int) -> list[Opening]:
        return [opening for opening in self.openings if opening.key == key and opening.open]

    # What subscribers do.

    def enter(self, key: int, name: int, bound: int) -> Sub | None:
        """Register; None if the id belongs to somebody else."""
        if key in self.accepting:
            self._publish(self.accepting[key])  # a joiner starts after that, which may be the end of those who are there
        if key not in self.accepting:
            self.accepting[key] = Opening(key, len(self.openings))
            self.openings.append(self.accepting[key])
        opening = self.accepting[key]
        if any(sub.name == name for sub in opening.subs):
            return None
        sub = Sub(opening, name, bound, len(opening.published))
        opening.subs.append(sub)
        return sub

    def close(self, sub: Sub) -> bool:
        """Leave; True if that leaves nobody."""
        return self._end(sub, (ClosedResourceError, None), drop=True)

    def stop(self, *keys: int) -> None:
        for opening in [self.accepting[key] for key in keys if key in self.accepting]:
            self._publish(opening)
            for sub in list(opening.subs):
                self._end(sub, (EndOfStream, None))

    def _end(self, sub: Sub, ending: Ending, *, drop: bool = False) -> bool:
        sub.ending = ending
        if drop:
            sub.buffer.clear()
        opening = sub.opening
        if sub not in opening.subs:
            return False
        opening.subs.remove(sub)
        if not opening.subs:
            self._evict(opening)
        return not opening.subs

    def _evict(self, opening: Opening) -> None:
        if not opening.evicted:
            opening.evicted = True
            del self.accepting[opening.key]

    # What sources do.

    def opens(self, key: int) -> Opening:
        """For somebody, once in a group, and when no earlier upstream of the key is open."""
        opening = self.accepting[key]
        assert not opening.opened
        assert not self.open_upstreams(key)
        opening.opened = opening.open = True
        return opening

    def gather(self, opening: Opening) -> Event:
        """The source yields an event."""
        event = (opening.number, len(opening.published) + len(opening.gathered))
        opening.gathered.append(event)
        opening.in_turn += 1
        if opening.in_turn == TURN or opening.evicted:
            self.suspend(opening)
        return event

    def suspend(self, opening: Opening) -> None:
        """The source lets others run, or is made to."""
        self._publish(opening)
        opening.turn = len(opening.published)
        opening.in_turn = 0

    def _publish(self, opening: Opening) -> None:
        chunk = opening.gathered
        opening.gathered = []
        opening.published += chunk
        for sub in list(opening.subs) if chunk else ():
            # The bound counts what a subscriber was too slow for, and there is no such thing in the turn under way.
            late = bool(sub.buffer) and sub.buffer[0][1] < opening.turn
            if late and len(sub.buffer) + len(chunk) > sub.bound:
                assert not sub.keeps_up
                self._end(sub, (SubscriberOverflow, opening.key), drop=True)
            else:
                sub.buffer += chunk
                sub.peak = max(sub.peak, len(sub.buffer))

    def ends(self, opening: Opening, how: BaseException | None) -> None:
        """The source gives nothing more. Whoever is still there will be told how it ended, but the key is free already."""
        self.suspend(opening)
        self._evict(opening)
        for sub in opening.subs:
            sub.ending = (PollTerminated, opening.key) if how is None else (type(how), *how.args)[:2]

    def told(self, opening: Opening) -> None:
        """Nothing of the group runs any more, and those who were there know."""
        opening.gone = True
        opening.subs.clear()
