"""What a subscriber may ask for when it falls behind, and how it is told of what it has missed.

Relies on nothing but the checks of `_lifecycle`. Policies are values without behaviour: what they mean is done by the mailbox
that is made for them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from anyio_sharedstream._lifecycle import check_function, check_seconds

__all__ = [
    "FAIL",
    "Block",
    "Conflate",
    "DropNewest",
    "DropOldest",
    "Fail",
    "Gap",
    "GapCause",
    "Latest",
    "Lossless",
    "Lossy",
    "OverflowPolicy",
    "Snapshot",
]

S_co = TypeVar("S_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Fail:
    """Fail with `SubscriberOverflow`, alone, when more than ``max_buffer_size`` events behind: nothing is lost silently."""


@dataclass(frozen=True, slots=True)
class Block:
    """Hold the upstream until there is room, and fail with `SubscriberOverflow` if that takes longer than *up_to* seconds.

    The only policy that costs the others something: they wait as well, once they have received what is published.

    :raises ValueError: *up_to* is not a positive number of seconds; `math.inf` allowed
    """

    up_to: float
    """seconds"""

    def __post_init__(self) -> None:
        check_seconds("up_to", self.up_to, infinite=True)


@dataclass(frozen=True, slots=True)
class DropOldest:
    """Forget the oldest unread events, so that at most ``max_buffer_size`` are left."""


@dataclass(frozen=True, slots=True)
class DropNewest:
    """Do not accept events for which there is no room."""


@dataclass(frozen=True, slots=True)
class Latest:
    """Keep the newest event alone, whatever ``max_buffer_size`` is."""


@dataclass(frozen=True, slots=True)
class Conflate:
    """Keep one unread event per ``by(event)``: a newer one takes the place of the older, or ``merge(older, newer)`` does.

    ``max_buffer_size`` bounds the number of different ``by(event)``; more of them are an overflow, as with `Fail`. What *by* or
    *merge* raises fails this subscriber, after what is in its buffer.

    :raises TypeError: *by* or *merge* cannot be called, or must be awaited
    """

    by: Callable[[Any], Hashable]
    """gives the key under which an event is kept; called at publication"""
    merge: Callable[[Any, Any], Any] | None = None
    """makes one event of an unread one and a newer one; without it the newer one is kept, and the older counts as missed"""

    def __post_init__(self) -> None:
        check_function("by", self.by, "a function")
        if self.merge is not None:
            check_function("merge", self.merge, "a function")


#: The default, once for all.
FAIL = Fail()

Lossless: TypeAlias = Fail | Block
Lossy: TypeAlias = DropOldest | DropNewest | Latest | Conflate
OverflowPolicy: TypeAlias = Lossless | Lossy

GapCause = Literal["overflow", "restart"]
"""Why events are missing: the subscriber was too slow for them, or the upstream failed and was opened again."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Stands where events are missing, in a stream that was asked for with ``gaps=True``."""

    missed: int | None
    """how many; None where nobody can know"""
    cause: GapCause
    """why"""


@dataclass(frozen=True, slots=True)
class Snapshot(Generic[S_co]):
    """Stands where a subscriber that asked for ``snapshot=True`` begins, and where it goes on after it has missed something."""

    state: S_co
    """the state that the source's `Fold` has made of all events before; the very object, which is everybody's"""
