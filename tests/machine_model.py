"""What a subscriber with any contract receives, in a plain list and without a loop: the reference for `tests.machine_play`.

Relies on `tests.machine_contract`. A subscriber is offered one chunk after the other, each of which is a turn of the source, and
told when the upstream is opened, fails and ends; `tests.machine_life` does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from math import inf
from typing import Any

from anyio_sharedstream import Gap, Snapshot
from tests.machine_contract import RESTARTED, BrittleError, Contract, Event, Item, both, is_event, route, symbol


@dataclass(eq=False)
class Member:
    """A subscriber: what it has yet to take, what it has taken and when, what it has missed, and how it ends."""

    wish: Contract
    epoch: int = 0
    unread: list[Item] = field(default_factory=list)
    received: list[tuple[float, Item]] = field(default_factory=list)
    ending: str | None = None
    outcome: str | None = None
    """what it has seen of the ending"""
    failure: str | None = None
    """what is wrong with itself"""
    last: bool = False
    """whether nobody was left when it left"""
    waiting: int = 0
    """how many items a task waits for, at most"""
    lost: dict[str, int | None] | None = None
    """what it has missed since it has dropped everything, in order; there is nothing else then"""
    owed: bool = False
    """whether it was told what it has lost, when there was no state to go on with"""
    replayed: int = 0
    """how many of its first events were published before it came"""
    taken: int = 0
    peak: int = 0
    missed: int = 0
    refused: int = 0
    held: float = 0.0
    held_since: float | None = None

    def events(self) -> int:
        """How many it has yet to take."""
        return sum(map(is_event, self.unread))

    def _replay_left(self) -> int:
        return max(0, self.replayed - self.taken)

    def behind(self) -> int:
        """How many of these count: what was replayed takes no room."""
        return self.events() - self._replay_left()

    def room(self) -> float:
        """How many the source may yield before it has to wait for this one."""
        return self.wish.bound - self.behind() if self.wish.policy in ("block", "patient") else inf

    def _marks(self) -> list[Item]:
        """Whatever stands behind the last event, last first."""
        return [*takewhile(lambda item: not is_event(item), reversed(self.unread))]

    # Publishing.

    def give(self, events: Sequence[int]) -> None:
        chosen = self._choose(events)
        if self.lost is not None:
            self._lose(chosen)
        elif chosen:
            self._accept(chosen)
        self.peak = max(self.peak, self.events())

    def welcome(self, state: Any, replayed: Sequence[int]) -> None:
        """It comes when there is an upstream."""
        if self.wish.snapshot:
            self.state_begins(state)
            return
        chosen = self._choose(replayed)
        if self.wish.policy in ("conflate", "merge"):
            for event in chosen:
                self._conflate(event, exempt=True)
        else:
            self.unread += chosen[-1:] if self.wish.policy == "latest" else chosen
        self.replayed = 0 if self.wish.policy == "latest" else self.events()
        self.peak = self.events()

    def _choose(self, events: Sequence[int]) -> list[int]:
        chosen: list[int] = []
        wanted = self.wish.routes
        for event in [event for event in events if wanted is None or route(event) in wanted]:
            try:
                accepted = self.wish.where is None or self.wish.where(event)
            except BrittleError:
                self.failure = "BrittleError"
                break
            if accepted:
                chosen.append(event)
            self.refused += not accepted
        return chosen

    def _accept(self, chosen: list[int]) -> None:
        # Who had taken everything before is not late, and accepts a whole turn of the source; but one wants the newest alone.
        policy, bound = self.wish.policy, 1 if self.wish.policy == "latest" else self.wish.bound
        exempt = self.behind() <= 0 and policy != "latest"
        excess = 0 if exempt else max(0, self.behind() + len(chosen) - bound)
        if self.wish.resyncs and excess:
            self.lost = {}
            self._lose([*self.unread, *chosen])
            self.unread = []
        elif policy == "fail" and excess:
            self.overflow()
        elif policy in ("conflate", "merge"):
            for event in chosen:
                if self.failure != "SubscriberOverflow":
                    self._conflate(event, exempt=exempt)
        elif policy == "newest" and excess:
            kept = max(0, len(chosen) - excess)
            self.unread += chosen[:kept]
            self._turn_away(len(chosen) - kept)
        else:
            self.unread += chosen
            if policy in ("oldest", "latest") and excess:
                self._drop_oldest(excess + self._replay_left())

    def overflow(self) -> None:
        self.peak = max(self.peak, self.events())
        self.failure = "SubscriberOverflow"
        self.unread = []

    def _drop_oldest(self, count: int) -> None:
        """The oldest go, and gaps take their place; of those that nothing stands between, there is one for each cause."""
        gone: dict[str, int | None] = {}
        self.missed += count
        self.replayed = 0
        while count or isinstance(self.unread[0], Gap):
            item = self.unread.pop(0)
            count -= is_event(item)
            _add(gone, item)
        if self.wish.gaps:
            self.unread = [*_gaps(gone), *self.unread]

    def _turn_away(self, count: int) -> None:
        """The newest are not accepted, and a gap is in their place."""
        self.missed += count
        if self.wish.gaps:
            marks = [place for place in range(-len(self._marks()), 0) if _cause(self.unread[place]) == "overflow"]
            if marks:
                self.unread[marks[0]] = Gap(count + (self.unread[marks[0]].missed or 0), "overflow")  # type: ignore[union-attr]
            else:
                self.unread.append(Gap(count, "overflow"))

    def _conflate(self, event: int, *, exempt: bool) -> None:
        """A newer event takes the place of an older one, or goes behind the gaps and states that have come since."""
        behind_marks = len(self.unread) - next((n for n, item in enumerate(reversed(self.unread)) if not is_event(item)), inf)
        places = [n for n, item in enumerate(self.unread) if is_event(item) and symbol(item) == symbol(event)]  # type: ignore[arg-type]
        new: Event = event
        if not places and not exempt and self.behind() >= self.wish.bound:
            self.overflow()
        elif not places:
            self.unread.append(event)
        else:
            apart = places[0] < behind_marks
            if self.wish.policy == "merge" and not (apart and self.wish.snapshot):
                new = both(self.unread[places[0]], event)  # type: ignore[arg-type]
            else:
                self.missed += 1
            self.unread[places[0]] = new
            if apart:
                self.unread.append(self.unread.pop(places[0]))
                self._join_marks()

    def _join_marks(self) -> None:
        """Of gaps that nothing stands between, one is left; of states, the newest."""
        joined: list[Item] = []
        for item in self.unread:
            if not is_event(item):
                marks = [*takewhile(lambda old: not is_event(old), reversed(joined))][::-1]
                joined[len(joined) - len(marks) :] = [old for old in marks if _cause(old) != _cause(item)]
            joined.append(item)
        self.unread = joined

    def _lose(self, items: Sequence[Item]) -> None:
        assert self.lost is not None
        self.missed += sum(map(is_event, items))
        for item in items:
            _add(self.lost, item)

    # The upstream.

    def state_begins(self, state: Any) -> None:
        if self.wish.snapshot and self.lost is None:
            self.owed = False
            self.unread.append(Snapshot(state))

    def interrupted(self) -> None:
        """The upstream will be opened again. A state that it has not seen is not worth seeing any more."""
        if self.lost is not None:
            self.lost["restart"] = None
            return
        if self.unread and isinstance(self.unread[-1], Snapshot):
            self.unread.pop()
        if self.wish.gaps and RESTARTED not in self._marks():
            self.unread.append(RESTARTED)

    def end(self, ending: str, state: Any) -> None:
        self._resume(state)
        if self.owed and state is not None:
            self.state_begins(state)
        self.lost = None
        self.ending = ending

    # The reader.

    def _resume(self, state: Any) -> None:
        """Go on with what there is instead of the events, if there is anything."""
        if self.lost is not None and (self.wish.gaps or state is not None):
            self.unread = _gaps(self.lost) if self.wish.gaps else []
            self.lost = None
            self.owed = state is None
            if state is not None:
                self.unread.append(Snapshot(state))

    def take(self, now: float, state: Any, limit: int = 1000) -> int:
        """Take what there is, up to a limit; returns how much that was."""
        self._resume(state)
        items, self.unread = self.unread[:limit], self.unread[limit:]
        self.received += [(now, item) for item in items]
        self.taken += sum(map(is_event, items))
        return len(items)

    def read(self, now: float, state: Any) -> None:
        """The task that receives goes on, if there is one: one that reads, or one that waits for a single reception."""
        if self.wish.way is not None and self.outcome is None:
            self.take(now, state)
            self.outcome = self.ending
        elif self.waiting:
            if self.take(now, state, self.waiting):
                self.waiting = 0
            elif self.ending:
                self.waiting, self.outcome = 0, self.ending

    @property
    def busy(self) -> bool:
        """Whether a task receives."""
        return bool(self.waiting) or (self.wish.way is not None and self.outcome is None)

    def close(self) -> None:
        self.unread, self.lost, self.owed = [], None, False
        self.ending = "ClosedResourceError"

    def look(self, now: float = 0.0) -> tuple[Any, ...]:
        held = self.held if self.held_since is None else self.held + now - self.held_since
        counts = self.events(), self.peak, self.taken, self.missed, self.refused, held
        return self.received, self.outcome, self.epoch, counts


def _cause(item: Item) -> str | None:
    return item.cause if isinstance(item, Gap) else "snapshot" if isinstance(item, Snapshot) else None


def _add(gone: dict[str, int | None], item: Item) -> None:
    if isinstance(item, Gap):
        gone[item.cause] = item.missed and (gone.get(item.cause) or 0) + item.missed
    elif is_event(item):
        gone["overflow"] = (gone.get("overflow") or 0) + 1


def _gaps(gone: dict[str, int | None]) -> list[Item]:
    return [Gap(missed, cause) for cause, missed in gone.items()]  # type: ignore[arg-type]
