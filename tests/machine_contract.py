"""What a subscriber may ask for, and what its functions do with events.

Relies on nothing but the public values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

from anyio_sharedstream import Block, Conflate, DropNewest, DropOldest, Fail, Gap, Latest, Snapshot

#: For how long the upstream is held for a subscriber that is not patient; see the times of `tests.lifecycle_model`.
BLOCK = 3 + 2**17 * 2.0**-28

#: The longest run of events that passes without the event loop getting a turn.
TURN = 64

Event = int | tuple[int, ...]  # its number; of all events, if several were merged
Item = Event | Gap | Snapshot[Any]
RESTARTED = Gap(None, "restart")


class Route(int):
    """One that was asked for, and not that of an event."""


class BrittleError(Exception):
    """What a predicate raises."""


def number(event: Event) -> int:
    """That of the newest, if several were merged."""
    return event[-1] if isinstance(event, tuple) else event


def even(event: int) -> bool:
    return event % 2 == 0


def brittle(event: int) -> bool:
    if event % 13 == 12:
        raise BrittleError
    return event % 3 != 0


def route(event: Any) -> int:
    return event % 3 if isinstance(event, int) else 0


def symbol(event: Event) -> int:
    return number(event) % 4


def both(old: Event, new: int) -> Event:
    return (*old, new) if isinstance(old, tuple) else (old, new)


POLICIES: dict[str, Any] = {
    "fail": Fail(),
    "block": Block(BLOCK),
    "patient": Block(inf),
    "oldest": DropOldest(),
    "newest": DropNewest(),
    "latest": Latest(),
    "conflate": Conflate(symbol),
    "merge": Conflate(symbol, both),
}


@dataclass(frozen=True)
class Contract:
    """What a subscriber asks for, and in which *way* a task of its own reads everything, if it has one."""

    reads: ClassVar[bool] = False  # `Life` leaves the reading to us

    policy: str = "fail"
    bound: int = 3
    where: Callable[[int], bool] | None = None
    routes: frozenset[int] | None = None
    gaps: bool = False
    snapshot: bool = False
    way: str | int | None = None
    """receive, for, or batches of a size"""

    @property
    def resyncs(self) -> bool:
        """Whether it goes on with a state once it has lost something."""
        return self.snapshot and self.policy in ("oldest", "newest", "latest")


def is_event(item: Item) -> bool:
    return not isinstance(item, Gap | Snapshot)
