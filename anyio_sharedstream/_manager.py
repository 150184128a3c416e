"""`SharedStreamManager`: what an application holds.

Relies on `_registry` for the groups and on `_contract` for the subscriptions; this is the face of both.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Self, TypeVar, overload

from anyio import create_task_group
from structlog.typing import BindableLogger

from anyio_sharedstream._acknowledging import AckSubscription
from anyio_sharedstream._contract import check_buffer_size, check_subscriber, make_subscription
from anyio_sharedstream._policies import FAIL, Gap, Lossless, Lossy, OverflowPolicy, Snapshot
from anyio_sharedstream._producer import AckSource
from anyio_sharedstream._registry import Registry
from anyio_sharedstream._source import SharedSource, check_key
from anyio_sharedstream._statistics import ManagerStatistics
from anyio_sharedstream._subscription import LossySubscription, Subscription

__all__ = ["DEFAULT_MAX_BUFFER_SIZE", "SharedStreamManager"]

T = TypeVar("T")

DEFAULT_MAX_BUFFER_SIZE = 1024
"""How many events a subscriber may be behind unless it says otherwise."""


class SharedStreamManager:
    """Opens each upstream once, for as long as it has subscribers, and owns every task that this takes.

    Entered once, with ``async with``. It holds a task group, so it belongs into ``main`` or an application's lifespan, never into
    a generator that is handed out per request. An exception that leaves its body leaves it as itself. Leaving stops all
    upstreams and takes as long as their clean-up does; if that wait is cancelled, so are the clean-ups.

    :param max_buffer_size: how many events a subscriber may be behind, unless `subscribe` is told otherwise; `math.inf` allowed
    :param logger: a structlog logger; without one, structlog's own if the application has configured structlog, else the
        standard library's logger ``anyio_sharedstream``
    :raises ValueError: *max_buffer_size* is not a positive integer or `math.inf`
    """

    def __init__(self, *, max_buffer_size: float = DEFAULT_MAX_BUFFER_SIZE, logger: BindableLogger | None = None) -> None:
        self._max_buffer_size = check_buffer_size(max_buffer_size)
        self._registry = Registry(logger)
        self._entered = False

    async def __aenter__(self) -> Self:
        if self._entered:
            raise RuntimeError("a SharedStreamManager can be entered only once: make another one")
        self._entered = True
        tasks = create_task_group()
        await tasks.__aenter__()
        self._registry.open(tasks)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        await self._registry.close(exc_val)

    @overload
    def subscribe(
        self,
        source: AckSource[T],
        *,
        subscriber_id: Hashable = ...,
        max_buffer_size: float | None = ...,
        overflow: Lossless = ...,
        where: Callable[[T], object] | None = ...,
        routes: Iterable[Hashable] | None = ...,
        gaps: Literal[False] = ...,
        snapshot: Literal[False] = ...,
    ) -> AckSubscription[T]: ...
    @overload
    def subscribe(
        self,
        source: AckSource[T],
        *,
        subscriber_id: Hashable = ...,
        max_buffer_size: float | None = ...,
        overflow: Lossless = ...,
        where: Callable[[T], object] | None = ...,
        routes: Iterable[Hashable] | None = ...,
        gaps: Literal[True],
        snapshot: Literal[False] = ...,
    ) -> AckSubscription[T | Gap]: ...
    @overload
    def subscribe(
        self,
        source: SharedSource[T],
        *,
        subscriber_id: Hashable = ...,
        max_buffer_size: float | None = ...,
        overflow: Lossless = ...,
        where: Callable[[T], object] | None = ...,
        routes: Iterable[Hashable] | None = ...,
        gaps: Literal[False] = ...,
        snapshot: Literal[False] = ...,
    ) -> Subscription[T]: ...
    @overload
    def subscribe(
        self,
        source: SharedSource[T],
        *,
        subscriber_id: Hashable = ...,
        max_buffer_size: float | None = ...,
        overflow: Lossless = ...,
        where: Callable[[T], object] | None = ...,
        routes: Iterable[Hashable] | None = ...,
        gaps: Literal[True],
        snapshot: Literal[False] = ...,
    ) -> Subscription[T | Gap]: ...
    @overload
    def subscribe(
        self,
        source: SharedSource[T],
        *,
        subscriber_id: Hashable = ...,
        max_buffer_size: float | None = ...,
        overflow: Lossless = ...,
        where: Callable[[T], object] | None = ...,
        routes: Iterable[Hashable] | None = ...,
        gaps: Literal[False] = ...,
        snapshot: Literal[True],
    ) -> Subscription[T | Snapshot[Any]]: ...
    @overload
    def subscribe(
        self,
        source: SharedSource[T],
        *,
        subscriber_id: Hashable = ...,
        max_buffer_size: float | None = ...,
        overflow: Lossless = ...,
        where: Callable[[T], object] | None = ...,
        routes: Iterable[Hashable] | None = ...,
        gaps: Literal[True],
        snapshot: Literal[True],
    ) -> Subscription[T | Gap | Snapshot[Any]]: ...
    @overload
    def subscribe(
        self,
        source: SharedSource[T],
        *,
        subscriber_id: Hashable = ...,
        max_buffer_size: float | None = ...,
        overflow: Lossy,
        where: Callable[[T], object] | None = ...,
        routes: Iterable[Hashable] | None = ...,
        gaps: Literal[False] = ...,
        snapshot: Literal[False] = ...,
    ) -> LossySubscription[T]: ...
    @overload
    def subscribe(
        self,
        source: SharedSource[T],
        *,
        subscriber_id: Hashable = ...,
        max_buffer_size: float | None = ...,
        overflow: Lossy,
        where: Callable[[T], object] | None = ...,
        routes: Iterable[Hashable] | None = ...,
        gaps: Literal[True],
        snapshot: Literal[False] = ...,
    ) -> LossySubscription[T | Gap]: ...
    @overload
    def subscribe(
        self,
        source: SharedSource[T],
        *,
        subscriber_id: Hashable = ...,
        max_buffer_size: float | None = ...,
        overflow: Lossy,
        where: Callable[[T], object] | None = ...,
        routes: Iterable[Hashable] | None = ...,
        gaps: Literal[False] = ...,
        snapshot: Literal[True],
    ) -> LossySubscription[T | Snapshot[Any]]: ...
    @overload
    def subscribe(
        self,
        source: SharedSource[T],
        *,
        subscriber_id: Hashable = ...,
        max_buffer_size: float | None = ...,
        overflow: Lossy,
        where: Callable[[T], object] | None = ...,
        routes: Iterable[Hashable] | None = ...,
        gaps: Literal[True],
        snapshot: Literal[True],
    ) -> LossySubscription[T | Gap | Snapshot[Any]]: ...
    def subscribe(
        self,
        source: SharedSource[Any],
        *,
        subscriber_id: Hashable = None,
        max_buffer_size: float | None = None,
        overflow: OverflowPolicy = FAIL,
        where: Callable[[Any], object] | None = None,
        routes: Iterable[Hashable] | None = None,
        gaps: bool = False,
        snapshot: bool = False,
    ) -> Subscription[Any] | LossySubscription[Any]:
        """Make a subscription, to be entered with ``async with``; entering registers it and opens the upstream if need be.

        :param subscriber_id: names the subscriber in statistics and logs; unique within the key; generated if None
        :param max_buffer_size: how many events this subscriber may be behind; the manager's bound if None
        :param overflow: what happens if it falls further behind; a policy that gives events up makes a `LossySubscription`
        :param where: a predicate, called at publication: what it refuses takes no room and wakes nobody. What it raises fails
            this subscriber, after what is in its buffer. One that several subscribers share is called once per event
        :param routes: receive only events of these routes, as ``route_by`` of the source gives them; None for all events
        :param gaps: give a `Gap` in the place of events that are missing, and where the upstream was opened again
        :param snapshot: give a `Snapshot` of the source's ``fold`` first of all, and wherever the subscriber has to begin anew
        :raises RuntimeError: the manager is not running: not entered yet, or left
        :raises TypeError: an argument is of the wrong kind: *source* no `SharedSource`, *subscriber_id* not hashable, and so on
        :raises ValueError: *max_buffer_size* is not a positive integer or `math.inf`, *routes* is empty, or the source has no
            ``route_by`` for them, or no ``fold`` for a *snapshot*
        """
        self._registry.check_usable()
        check_subscriber(source, subscriber_id)
        bound = self._max_buffer_size if max_buffer_size is None else check_buffer_size(max_buffer_size)
        name = next(self._registry.ids) if subscriber_id is None else subscriber_id
        stream: Any = make_subscription(
            source, name, bound, overflow=overflow, where=where, routes=routes, gaps=gaps, snapshot=snapshot
        )
        stream._belong_to(self._registry, source, source.key)
        return stream  # type: ignore[no-any-return]

    async def stop(self, key: Hashable) -> None:
        """Stop the upstream of *key* and wait until it, and any earlier one of the key, has closed.

        The wait for each is no longer than its source's ``close_timeout``.

        Its subscribers receive what is in their buffers, then the end of the stream; the manager stays usable, and a new
        subscriber opens the upstream anew. Does nothing if there is none. If the wait is cancelled, the upstream goes on closing.

        :raises ValueError: *key* is None
        :raises TypeError: *key* is not hashable
        """
        check_key(key)
        await self._registry.stop(self._registry.of_key(key))

    async def stop_all(self) -> None:
        """Stop every upstream, as `stop` does; they close side by side."""
        await self._registry.stop(self._registry.all())

    def statistics(self) -> ManagerStatistics:
        """Return a snapshot of all groups and their subscribers."""
        registry = self._registry
        return ManagerStatistics(
            groups=MappingProxyType({group.key: group.statistics() for group in list(registry.groups.values())}),
            closing=(
                *(group.statistics() for group in registry.all_closing()),
                *(hung for group in registry.all() for hung in group.hung_statistics()),
            ),
        )
