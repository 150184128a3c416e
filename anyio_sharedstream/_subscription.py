"""A subscriber's end: the awaiting half of receiving, and entering and leaving.

Relies on `_mailbox` for every change of state; what is here awaits around those changes. It holds no cancel scope and no task
group, so it may be held over a ``yield``, be closed from another task, or be left to an exit stack.
"""

from __future__ import annotations

from collections.abc import Hashable
from operator import length_hint
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from anyio import EndOfStream, Event, get_cancelled_exc_class
from anyio.abc import ObjectReceiveStream, UnreliableObjectReceiveStream
from anyio.lowlevel import checkpoint_if_cancelled

from anyio_sharedstream._mailbox import Mailbox
from anyio_sharedstream._statistics import SubscriptionStatistics

__all__ = ["Batches", "Host", "LossySubscription", "Receiver", "Registry", "Subscription"]

T_co = TypeVar("T_co", covariant=True)


class Host(Protocol):
    """What a subscription knows of its group."""

    released: Event
    epoch: int

    def leave(self, subscription: Receiver[Any], /) -> bool:
        """Unregister; True if nobody else is left and the upstream is on its way out."""


class Registry(Protocol):
    """What a subscription knows of its manager."""

    def join(self, subscription: Receiver[Any], source: Any, /) -> Host:
        """Register with the group of the source's key; starts one if there is none."""


class Receiver(Mailbox[T_co]):
    """What every subscription can do, whatever its policy."""

    __slots__ = ("_host", "_key", "_last_of", "_registry", "_source")

    def _belong_to(self, registry: Registry, source: Any, key: Hashable) -> None:
        """Say where to register: the rest of making a subscription, for a policy's ``__init__`` is none of its business."""
        self._registry: Registry | None = registry
        self._source = source
        self._key = key
        self._host: Host | None = None
        self._last_of: Host | None = None

    @property
    def key(self) -> Hashable:
        """The key of the shared upstream."""
        return self._key

    @property
    def subscriber_id(self) -> Hashable:
        """The id given to `SharedStreamManager.subscribe`, or a generated one that equals no other."""
        return self._subscriber_id

    @property
    def epoch(self) -> int:
        """How often the upstream has been opened, up to now or until this subscription has ended; 0 before the first time."""
        now = 0 if self._host is None else self._host.epoch
        return now if self._ended_in is None else self._ended_in

    def statistics(self) -> SubscriptionStatistics:
        """Return a snapshot of this subscriber's buffer."""
        return self._statistics()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._subscriber_id!r} of {self._key!r}>"

    async def receive(self) -> T_co:
        """Return the next event, waiting for one if there is none.

        With events ready it may return without yielding to the event loop, but yields at least once in 64 events. If a
        cancellation is raised here, a scope's or a native one, no event was taken.

        :raises ~anyio.EndOfStream: the upstream was stopped, or returned with ``on_exhausted="end"``, and everything before has
            been received
        :raises ~anyio.ClosedResourceError: this subscription was closed
        :raises ~anyio.BusyResourceError: another task is receiving
        :raises PollTerminated: the upstream stopped without an error of its own
        :raises SubscriberOverflow: this subscriber fell too far behind
        :raises Exception: whatever ended the upstream, as a copy of this subscriber's own; or what a function of this subscriber
            has raised, and `SharedStreamError` in place of what a stream would say of itself
        :raises RuntimeError: the subscription has not been entered
        """
        for event in self._ready:
            return event
        await self._fill()
        return self._begin()

    def receive_nowait(self) -> T_co:
        """Return the next event if there is one.

        :raises ~anyio.WouldBlock: there is nothing to receive yet; else as `receive`
        """
        for event in self._ready:
            return event
        self._load(wait=False)
        return self._begin()

    async def receive_batch(self, max_size: int) -> tuple[T_co, ...]:
        """Return everything that is ready, at least one event and at most *max_size*, waiting if there is nothing.

        Cheaper than `receive` where events come in bursts. Raises and is cancelled as `receive`.

        :raises ValueError: *max_size* is not a positive integer
        """
        check_batch_size(max_size)
        return await self._batch(max_size)

    async def _batch(self, max_size: int) -> tuple[T_co, ...]:
        if self._backlogged and not self._reading:
            turn = self._turn_before(max_size)
            if turn is not None:
                try:
                    await turn
                finally:
                    self._reading = False
        if not length_hint(self._ready):
            await self._fill()
        return self._take(max_size)

    async def _fill(self) -> None:
        while True:
            if self._terminal is not None:
                # It may have come together with a cancellation, for leaving the manager ends its subscribers.
                await checkpoint_if_cancelled()
            waiting = self._load(wait=True)
            if waiting is None:
                return
            try:
                await waiting
            finally:
                self._reading = False
                self._waiter = None

    def batches(self, max_size: int) -> Batches[T_co]:
        """Iterate over batches: ``async for batch in stream.batches(100)``; see `receive_batch`.

        The iterator is no generator, so leaving the loop early leaves nothing to be closed.
        """
        return Batches(self, max_size)

    def close(self) -> None:
        """Leave at once, without waiting: unregister, drop what is buffered, and stop the upstream if nobody else is left.

        May be called from any task, more than once. A task that is receiving gets `anyio.ClosedResourceError`.
        """
        self._registry = None
        if not self._closed:
            self._shut()
            host, self._host = self._host, None  # with all that it remembers
            if host is not None:
                if self._ended_in is None:
                    self._ended_in = host.epoch
                if host.leave(self):
                    self._last_of = host

    async def aclose(self) -> None:
        """Leave as `close` does; whoever leaves last then waits until the upstream has closed, or for its ``close_timeout``.

        If the wait is cancelled, the upstream goes on closing and the manager waits. Not being the last is no checkpoint.
        """
        self.close()
        if self._last_of is not None:
            await self._last_of.released.wait()
            self._last_of = None

    async def __aenter__(self) -> Self:
        """Register without yielding to the event loop; from here on, nothing that is published is missed.

        :raises RuntimeError: the manager is not running, this was entered or closed before, or the id is taken in the key
        :raises ValueError: the key is open with other policies, as `SharedSource` has them
        """
        registry, self._registry = self._registry, None
        if registry is None:
            raise RuntimeError(f"{self!r} was entered or closed before: call subscribe() again for another one")
        try:
            self._host = host = registry.join(self, self._source)
        except BaseException:
            self._registry = registry
            # A source that subscribes to another while the manager is being left is told of its own cancellation, and no more.
            await checkpoint_if_cancelled()
            raise
        if self._closed:  # by its own predicate, which was asked about what it is to be given first
            self._last_of = host if host.leave(self) else None
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        """Leave as `aclose` does. An exception on its way out is not replaced by a cancellation of the wait."""
        try:
            await self.aclose()
        except get_cancelled_exc_class():
            if exc_val is None:
                raise

    async def __anext__(self) -> T_co:
        for event in self._ready:
            return event
        # A reader that keeps up parks here, as by `_load` and `_fill`, but written out: each call more would show in the cost of
        # waking it, and this is the library's hottest path.
        create_waiter = self._create_waiter
        try:
            if create_waiter is None or self._chunk or self._backlogged or self._reading:
                await self._fill()
            else:
                waiter = create_waiter()
                self._reading = True
                self._waiter = waiter
                try:
                    await (waiter if self._suspend is None else self._suspend(waiter))
                finally:
                    self._reading = False
                    self._waiter = None
                if not self._chunk:
                    await self._fill()
        except EndOfStream:
            raise StopAsyncIteration from None
        chunk = self._chunk
        if len(chunk) == 1:
            self._chunk = ()
            self._received += 1
            return chunk[0]
        return self._begin()


class Subscription(Receiver[T_co], ObjectReceiveStream[T_co]):
    """One subscriber's end of a shared upstream: an `anyio.abc.ObjectReceiveStream` with a bounded buffer of its own.

    Made by `SharedStreamManager.subscribe`, and registered from entering (``async with``) until leaving. Unless it or its source
    asks for something else (a filter, gaps, snapshots, a replay), it gives exactly the events published in between, in order.
    Then it gives exactly one terminal, which every later receive repeats: the upstream's own exception, `UpstreamSilent`,
    `PollTerminated`, `SubscriberOverflow`, what a function of its own has raised, or the end of the stream.
    """

    __slots__ = ()


class LossySubscription(Receiver[T_co], UnreliableObjectReceiveStream[T_co]):
    """As `Subscription`, for a subscriber that has asked for a policy that gives events up: `DropOldest`, `Conflate`, and so on.

    An `anyio.abc.UnreliableObjectReceiveStream`: what it gives is in order, but not everything. ``statistics().events_missed``
    counts what is missing, and ``gaps=True`` shows where.
    """

    __slots__ = ()


class Batches(Generic[T_co]):
    """The iterator of `Subscription.batches`."""

    __slots__ = ("_max_size", "_stream")

    def __init__(self, stream: Receiver[T_co], max_size: int) -> None:
        check_batch_size(max_size)
        self._stream = stream
        self._max_size = max_size

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[T_co, ...]:
        stream = self._stream
        try:
            # Written out for a reader that keeps up, as in `Receiver.__anext__`.
            create_waiter = stream._create_waiter
            if create_waiter is not None and not (
                stream._chunk or stream._backlogged or stream._reading or length_hint(stream._ready)
            ):
                waiter = create_waiter()
                stream._reading = True
                stream._waiter = waiter
                try:
                    await (waiter if stream._suspend is None else stream._suspend(waiter))
                finally:
                    stream._reading = False
                    stream._waiter = None
                if stream._chunk:
                    return stream._take(self._max_size)
            return await stream._batch(self._max_size)
        except EndOfStream:
            raise StopAsyncIteration from None


def check_batch_size(max_size: int) -> None:
    if not isinstance(max_size, int) or isinstance(max_size, bool) or max_size < 1:
        raise ValueError(f"max_size must be a positive number of events, not {max_size!r}")
