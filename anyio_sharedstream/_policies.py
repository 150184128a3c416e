"""What a subscriber may ask for when it falls behind, and how it is told of what it has missed.

Relies on nothing. Policies are values without behaviour: what they mean is done by the mailbox that is made for them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

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
]


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
        number = isinstance(self.up_to, int | float) and not isinstance(self.up_to, bool)
        # No clock can add an integer to its time that is larger than any float.
        if not number or not self.up_to > 0 or (isinstance(self.up_to, int) and self.up_to > sys.float_info.max):
            raise ValueError(f"up_to must be a positive number of seconds or math.inf, not {self.up_to!r}")


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

    :raises TypeError: *by* or *merge* cannot be called
    """

    by: Callable[[Any], Hashable]
    """gives the key under which an event is kept; called at publication"""
    merge: Callable[[Any, Any], Any] | None = None
    """makes one event of an unread one and a newer one; without it the newer one is kept, and the older counts as missed"""

    def __post_init__(self) -> None:
        for name, function in (("by", self.by), ("merge", self.merge)):
            absent = name == "merge" and function is None
            if not absent and (not callable(function) or inspect.iscoroutinefunction(function)):
                raise TypeError(f"{name} must be a function, not {function!r}")


#: The default, once for all.
FAIL = Fail()

Lossless: TypeAlias = Fail | Block
Lossy: TypeAlias = DropOldest | DropNewest | Latest | Conflate
OverflowPolicy: TypeAlias = Lossless | Lossy

GapCause = Literal["overflow"]
"""Why events are missing: the subscriber was too slow for them."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Stands where events are missing, in a stream that was asked for with ``gaps=True``."""

    missed: int | None
    """how many; None where nobody can know"""
    cause: GapCause
    """why"""
