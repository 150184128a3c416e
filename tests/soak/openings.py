"""What was opened and yielded, written down by the sources themselves: what consumers may receive follows from that.

Relies on `world`. Events are numbered within each opening of an upstream, openings within a key. A place in what a key has
yielded is the number of an opening and the number of the event that comes next there.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple, Protocol

from anyio import current_time

from anyio_sharedstream import SharedSource
from tests.soak.world import World

Place = tuple[int, int]
#: Opening, number of events, sum of their numbers.
State = tuple[int, int, int]


class UpstreamError(Exception):
    """What an upstream raises: says of which opening."""

    def __init__(self, opening: int, what: str) -> None:
        super().__init__(opening, what)
        self.opening = opening


class Event(NamedTuple):
    """What sources yield."""

    opening: Opening
    number: int
    weight: int = 1  # how many events it stands for
    kind: str = "event"  # "late" if nobody is to receive anything any more; "poison" if the fold's step is to raise


class Taker(Protocol):
    """Somebody who has taken an event that is to be acknowledged."""

    @property
    def says(self) -> str:
        """What it has said of it."""


class Opening:
    """One opening of an upstream, from the call of `open` until it has closed."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.number = len(record.openings) + 1
        self.yielded = 0
        self.yielded_at = current_time()  # when it yielded something last, or was opened
        self.stopped: int | None = None  # how many events there were when it was stopped
        self.ending: str | None = None  # how it ended by itself
        self.disturbed = False  # whether its broker could not be told at some time
        self.closing_since: float | None = None
        self.closed = False
        self.takers: dict[int, list[Taker]] = {}  # of events that are to be acknowledged and have not been advanced
        self.advanced: set[int] = set()  # the numbers of events of which the broker has been told
        self.blamed: Counter[int] = Counter()  # how many failed at an event before they had taken it
        record.begin(self)

    @property
    def published(self) -> int:
        """How many events subscribers may and must receive."""
        return self.yielded if self.stopped is None else self.stopped

    def event(self) -> Event:
        """The next event, which is about to be yielded."""
        self.yielded += 1
        self.yielded_at = current_time()
        self.record.world.done["events"] += 1
        return Event(self, self.yielded - 1)

    def take(self, event: Event, taker: Taker) -> None:
        """Somebody has taken an event that is to be acknowledged."""
        self.record.world.check(event.number not in self.advanced, "nobody receives what was advanced", taker, event)
        self.takers.setdefault(event.number, []).append(taker)

    def ends(self, how: str) -> None:
        """It is about to end by itself."""
        self.ending = how
        self.record.world.faults[f"upstream: {how}"] += 1

    def fault(self, what: str) -> UpstreamError:
        """It is about to raise this."""
        self.ends(what)
        return UpstreamError(self.number, what)

    def begins_to_close(self) -> None:
        self.closing_since = current_time()

    def close(self) -> None:
        world = self.record.world
        world.check(not self.closed, "an upstream is closed once", self)
        self.closed = True
        world.open_now -= 1
        self.record.open_now.remove(self)

    def __repr__(self) -> str:
        return f"<opening {self.number} of {self.record.key!r}: {self.yielded} yielded, {self.ending}>"


class Record:
    """Everything about one key: how its source lives, and its openings, oldest first."""

    source: SharedSource[Any]  # what to subscribe to

    def __init__(self, world: World, key: str) -> None:
        self.world = world
        self.key = key
        self.dice = world.dice(key)
        self.openings: list[Opening] = []
        self.open_now: list[Opening] = []
        self.policies: dict[str, Any] = {}
        self.acknowledged = False

    def begin(self, opening: Opening) -> None:
        world = self.world
        patience = self.policies.get("close_timeout")
        for other in self.open_now:
            # The time counts from when nothing was wanted of it any more, which is no later than its clean-up.
            since = other.closing_since
            late = patience is not None and since is not None and current_time() - since >= patience - 1e-3
            world.check(late, "one upstream of a key at once", other, opening)
        world.checked["one upstream of a key at once"] += 1
        self.openings.append(opening)
        self.open_now.append(opening)
        world.open_now += 1
        world.done["openings"] += 1

    def stop(self) -> None:
        """Write down where the subscribers are to stop: everything is stopped in this very moment."""
        for opening in self.openings[-1:]:
            if opening.stopped is None:
                opening.stopped = opening.yielded

    # The fold, the routes.

    def initial(self) -> State:
        return len(self.openings) + 1, 0, 0

    @staticmethod
    def step(state: State, event: Event) -> State:
        if event.kind == "poison":
            raise UpstreamError(event.opening.number, "step")
        opening, number, total = state
        return opening, number + 1, total + event.number

    @staticmethod
    def route(event: Event) -> str:
        return "abc"[event.number % 3]
