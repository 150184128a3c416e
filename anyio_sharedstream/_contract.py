"""What a subscriber asks for, checked, and made into the subscription that does it.

Relies on `_subscription` and `_entries`, whose classes it combines: how to receive, and what to do with events.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

from anyio_sharedstream._entries import Blocking, Conflating, Dropping
from anyio_sharedstream._policies import Block, Conflate, DropNewest, DropOldest, Fail, Latest, OverflowPolicy
from anyio_sharedstream._subscription import LossySubscription, Receiver, Subscription

__all__ = ["check_buffer_size", "make_subscription"]

T_co = TypeVar("T_co", covariant=True)


class BlockingSubscription(Blocking[T_co], Subscription[T_co]):
    """A subscription with the policy `Block`."""


class DroppingSubscription(Dropping[T_co], LossySubscription[T_co]):
    """A subscription with the policy `DropOldest`, `DropNewest` or `Latest`."""


class ConflatingSubscription(Conflating[T_co], LossySubscription[T_co]):
    """A subscription with the policy `Conflate`."""


def make_subscription(
    subscriber_id: Hashable,
    max_buffer_size: float,
    overflow: OverflowPolicy,
    where: Callable[[Any], object] | None,
    routes: Iterable[Hashable] | None,
    gaps: bool,
) -> Receiver[Any]:
    """Make what `SharedStreamManager.subscribe` describes; raises as that says."""
    if where is not None and (not callable(where) or inspect.iscoroutinefunction(where)):
        raise TypeError(f"where must be a function of an event, not {where!r}")
    if not isinstance(gaps, bool):
        raise TypeError(f"gaps must be True or False, not {gaps!r}")
    stream = _with_policy(subscriber_id, max_buffer_size, overflow, gaps)
    stream._policy = overflow
    stream._where = where
    stream._routes = None if routes is None else _routes(routes)
    stream._choosy = where is not None or not isinstance(overflow, Fail)
    return stream


def _with_policy(subscriber_id: Hashable, max_buffer_size: float, overflow: OverflowPolicy, gaps: bool) -> Receiver[Any]:
    match overflow:
        case Fail():
            return Subscription(subscriber_id, max_buffer_size)
        case Block():
            return BlockingSubscription(subscriber_id, max_buffer_size, overflow)
        case DropOldest() | DropNewest() | Latest():
            return DroppingSubscription(subscriber_id, max_buffer_size, overflow, gaps)
        case Conflate():
            return ConflatingSubscription(subscriber_id, max_buffer_size, overflow)
        case _:
            raise TypeError(f"overflow must be a policy, such as DropOldest(), not {overflow!r}")


def _routes(routes: Iterable[Hashable]) -> frozenset[Hashable]:
    if isinstance(routes, str | bytes):
        raise TypeError(f"routes must be a collection of routes, not {routes!r}; for a single one, {{{routes!r}}}")
    try:
        found = frozenset(routes)
    except TypeError as exc:
        raise TypeError(f"routes must be a collection of hashable routes, and {routes!r} is not ({exc})") from None
    if not found:
        raise ValueError("routes must name at least one route; None asks for all events")
    return found


def check_buffer_size(size: float) -> float:
    """Return *size* if it is a bound for a buffer."""
    valid = size == math.inf if isinstance(size, float) else isinstance(size, int) and not isinstance(size, bool) and size > 0
    if not valid:
        raise ValueError(f"max_buffer_size must be a positive number of events or math.inf, not {size!r}")
    return size
