"""What a subscriber asks for, checked, and made into the subscription that does it.

Relies on `_subscription` for how to receive, and on `_entries`, `_lossy` and `_conflating` for what to do with events; it
combines their classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar, cast

from anyio_sharedstream._acknowledging import AckSubscription
from anyio_sharedstream._conflating import Conflating
from anyio_sharedstream._entries import Blocking, Entries, Failing
from anyio_sharedstream._lifecycle import check_function
from anyio_sharedstream._lossy import Dropping, Resyncing
from anyio_sharedstream._policies import Block, Conflate, DropNewest, DropOldest, Fail, Latest, OverflowPolicy
from anyio_sharedstream._producer import AckSource
from anyio_sharedstream._source import SharedSource
from anyio_sharedstream._subscription import LossySubscription, Receiver, Subscription

__all__ = ["check_buffer_size", "check_subscriber", "make_subscription"]

T_co = TypeVar("T_co", covariant=True)


class FailingSubscription(Failing[T_co], Subscription[T_co]):
    """A subscription with the policy `Fail`, and with marks between its events."""


class BlockingSubscription(Blocking[T_co], Subscription[T_co]):
    """A subscription with the policy `Block`."""


class FailingAckSubscription(Failing[T_co], AckSubscription[T_co]):
    """An acknowledging subscription with the policy `Fail`, and with marks between its events."""


class BlockingAckSubscription(Blocking[T_co], AckSubscription[T_co]):
    """An acknowledging subscription with the policy `Block`."""


class DroppingSubscription(Dropping[T_co], LossySubscription[T_co]):
    """A subscription with the policy `DropOldest`, `DropNewest` or `Latest`."""


class ResyncingSubscription(Resyncing[T_co], LossySubscription[T_co]):
    """The same, for a subscriber that goes on with a snapshot."""


class ConflatingSubscription(Conflating[T_co], LossySubscription[T_co]):
    """A subscription with the policy `Conflate`."""


def check_subscriber(source: object, subscriber_id: Hashable) -> None:
    """Raise what is wrong with what is asked for, and by whom."""
    if not isinstance(source, SharedSource):
        raise TypeError(f"source must be a SharedSource, not {source!r}; a @shared_source function must be called")
    try:
        hash(subscriber_id)
    except TypeError as exc:
        raise TypeError(f"subscriber_id must be hashable, and {subscriber_id!r} is not ({exc}); use a string") from None


def make_subscription(
    source: SharedSource[Any],
    subscriber_id: Hashable,
    max_buffer_size: float,
    *,
    overflow: OverflowPolicy,
    where: Callable[[Any], object] | None,
    routes: Iterable[Hashable] | None,
    gaps: bool,
    snapshot: bool,
) -> Receiver[Any]:
    """Make what `SharedStreamManager.subscribe` describes; raises as that says."""
    if where is not None:
        check_function("where", where, "a function of an event")
    if not isinstance(gaps, bool):
        raise TypeError(f"gaps must be True or False, not {gaps!r}")
    if not isinstance(snapshot, bool):
        raise TypeError(f"snapshot must be True or False, not {snapshot!r}")
    if routes is not None and source.route_by is None:
        raise ValueError(f"the source of {source.key!r} has no route_by, so routes={routes!r} means nothing")
    if snapshot and source.fold is None:
        raise ValueError(f"the source of {source.key!r} has no fold, so there is nothing to give a snapshot of")
    marked = snapshot or (gaps and source.restart is not None)
    make = _acknowledging if isinstance(source, AckSource) else _with_policy
    stream = make(subscriber_id, max_buffer_size, overflow, gaps=gaps, snapshot=snapshot, marked=marked)
    stream._policy = overflow
    stream._where = where
    stream._routes = None if routes is None else _routes(routes)
    stream._choosy = where is not None or isinstance(stream, Entries)
    return stream


def _with_policy(
    subscriber_id: Hashable, max_buffer_size: float, overflow: OverflowPolicy, *, gaps: bool, snapshot: bool, marked: bool
) -> Receiver[Any]:
    stream: Entries[Any]
    match overflow:
        case Fail() if not marked:
            return Subscription(subscriber_id, max_buffer_size)
        case Fail():
            stream = FailingSubscription(subscriber_id, max_buffer_size, gaps=gaps)
        case Block():
            stream = BlockingSubscription(subscriber_id, max_buffer_size, overflow, gaps=gaps)
        case DropOldest() | DropNewest() | Latest():
            made = ResyncingSubscription if snapshot else DroppingSubscription
            stream = made(subscriber_id, max_buffer_size, overflow, gaps=gaps)
        case Conflate():
            stream = ConflatingSubscription(subscriber_id, max_buffer_size, overflow, gaps=gaps)
        case _:
            raise TypeError(f"overflow must be a policy, such as DropOldest(), not {overflow!r}")
    stream._snapshot = snapshot
    return cast(Receiver[Any], stream)


def _acknowledging(
    subscriber_id: Hashable, max_buffer_size: float, overflow: OverflowPolicy, *, gaps: bool, snapshot: bool, marked: bool
) -> Receiver[Any]:
    match overflow:
        case Fail() if not marked:
            return AckSubscription(subscriber_id, max_buffer_size)
        case Fail():
            return FailingAckSubscription(subscriber_id, max_buffer_size, gaps=gaps)
        case Block():
            return BlockingAckSubscription(subscriber_id, max_buffer_size, overflow, gaps=gaps)
        case DropOldest() | DropNewest() | Latest() | Conflate():
            raise ValueError(f"an AckSource cannot be subscribed to with {overflow!r}: what is dropped could not be acknowledged")
        case _:
            raise TypeError(f"overflow must be a policy, such as Block(5), not {overflow!r}")


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
