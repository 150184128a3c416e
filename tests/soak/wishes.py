"""What consumers ask for, and which events that means.

Relies on `openings` for what was yielded.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from random import Random
from typing import Any

from anyio_sharedstream import Block, Conflate, DropNewest, DropOldest, Fail, Latest
from anyio_sharedstream._policies import OverflowPolicy
from tests.soak.openings import Event, Place, Record

#: After so many events what the consumers choose by repeats itself.
CYCLE = 12


class Sieve:
    """Which events a consumer has asked for: by their routes, and by a predicate that may raise.

    :param routes: None for all
    :param rests: the predicate lets pass whose number leaves one of these, divided by four; None for no predicate
    :param last: how often the predicate is asked before it raises
    """

    def __init__(self, routes: str | None = None, rests: frozenset[int] | None = None, last: float = inf) -> None:
        self.routes = routes
        self.where = None if rests is None else self._ask
        self.raised: Place | None = None
        self._left = last
        numbers = [rest for rest in range(CYCLE) if routes is None or "abc"[rest % 3] in routes]
        self._passing = frozenset(rest for rest in numbers if rests is None or rest % 4 in rests)
        self._below = [sum(rest < limit for rest in self._passing) for limit in range(CYCLE)]

    def __repr__(self) -> str:
        return f"<{self.routes!r}, {sorted(self._passing)}, raised at {self.raised}>"

    def _ask(self, event: Event) -> bool:
        self._left -= 1
        if self._left < 0:
            self.raised = event.opening.number, event.number
            event.opening.blamed[event.number] += 1
            raise ZeroDivisionError("predicate")
        return self.passes(event.number)

    def passes(self, number: int) -> bool:
        return number % CYCLE in self._passing

    def below(self, number: int) -> int:
        """How many events of an opening pass that come before the one of this number."""
        return number // CYCLE * len(self._passing) + self._below[number % CYCLE]

    def passed(self, record: Record, start: Place, end: Place) -> int:
        """How many events of a key pass that lie between two places."""
        (first, before), (last, after) = start, end
        count = self.below(after) - self.below(before)
        return count + sum(self.below(opening.published) for opening in record.openings[first - 1 : last - 1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a consumer asks for."""

    sieve: Sieve
    policy: OverflowPolicy
    bound: int
    gaps: bool
    snapshot: bool

    @property
    def lossless(self) -> bool:
        return isinstance(self.policy, Fail | Block)

    def options(self) -> dict[str, Any]:
        """The arguments of `subscribe`."""
        return {
            "overflow": self.policy,
            "max_buffer_size": self.bound,
            "where": self.sieve.where,
            # And a route of its own, which is in nobody's way, but for what it leaves behind.
            "routes": self.sieve.routes and [*self.sieve.routes, object()],
            "gaps": self.gaps,
            "snapshot": self.snapshot,
        }


def random_wish(record: Record, dice: Random) -> Wish:
    """What a consumer asks for, of what its source can give."""
    policies: list[OverflowPolicy] = [Fail(), Fail(), Block(dice.choice([0.5, 10]))]
    if not record.acknowledged:
        policies += [DropOldest(), DropNewest(), Latest(), Conflate(conflated_by, dice.choice([None, merged]))]
    routes = dice.choice([None, "a", "bc"]) if record.policies["route_by"] else None
    rests = dice.choice([None, None, frozenset({1}), frozenset({0, 2, 3})])
    return Wish(
        sieve=Sieve(routes, rests, dice.choice([inf, inf, 50])),
        policy=dice.choice(policies),
        bound=dice.choice([1, 3, 16, 1024]),
        gaps=dice.random() < 0.5,
        snapshot="fold" in record.policies and dice.random() < 0.5,
    )


def conflated_by(event: Event) -> int:
    return event.number % 5


def merged(older: Event, newer: Event) -> Event:
    return newer._replace(weight=older.weight + newer.weight)
