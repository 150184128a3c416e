"""What acknowledges the events of a trigger's shared stream: that its reader has confirmed all that the trigger made of them.

Relies on the subscription of the stream, and on its opening (`_advancing`), which knows for how long anything may take. What a
trigger takes from the stream at once, and fires before it asks for more, belongs together. When the first of that fires, the
stream's event is deferred, and it is acknowledged when the trigger has gone on and all that it fired has been confirmed. What
fires nothing is acknowledged by the stream itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from math import inf
from types import TracebackType
from typing import Any, Self

from anyio import EndOfStream
from anyio.abc import ObjectReceiveStream

from anyio_sharedstream import AckSubscription, Pending, SubscriptionStatistics
from anyio_sharedstream._advancing import Advancing
from anyio_sharedstream._clock import Timer
from anyio_sharedstream._subscription import check_batch_size

__all__ = ["ConfirmedStream"]


class Fired:
    """What a trigger has fired of one event of its stream (or one batch), until that is resolved."""

    def __init__(self, pending: Pending, acks: Advancing, on_end: Callable[[Fired], object]) -> None:
        self._pending: Pending | None = pending
        self._acks = acks
        self._on_end = on_end
        self._unconfirmed = 0
        self._complete = False
        seconds = acks.source.ack_timeout
        # With the opening's own timers: the runner may be left before the time has come, and the opening may end before.
        self._timer = Timer(acks.clock, lambda: self.fail(f"not confirmed within {seconds} seconds"), seconds)
        if seconds < inf:
            acks.timers[self._timer] = None
            self._timer.start(acks.now())

    def one_more(self) -> Callable[[], None]:
        """The trigger fires; gives what confirms that."""
        self._unconfirmed += 1
        unconfirmed = True

        def confirm() -> None:
            nonlocal unconfirmed
            if unconfirmed:
                unconfirmed = False
                self._unconfirmed -= 1
                self._look()

        return confirm

    def complete(self) -> None:
        """The trigger asks for more: it fires nothing more of this event."""
        self._complete = True
        self._look()

    def _look(self) -> None:
        if self._complete and not self._unconfirmed and (pending := self._end()) is not None:
            pending.ack()

    def fail(self, reason: object) -> None:
        if (pending := self._end()) is not None:
            pending.fail(reason)

    def reject(self, reason: object) -> None:
        if (pending := self._end()) is not None:
            pending.reject(reason)

    def _end(self) -> Pending | None:
        self._timer.close()
        self._acks.timers.pop(self._timer, None)
        self._on_end(self)
        pending, self._pending = self._pending, None
        return pending


class ConfirmedStream(ObjectReceiveStream[Any]):
    """The subscription as a trigger's filter sees it: it can do the same, and notices when the trigger goes on."""

    def __init__(self, stream: AckSubscription[Any]) -> None:
        self._stream = stream
        self._fired: Fired | None = None  # of the event that the trigger is at
        self._open: dict[Fired, None] = {}  # everything of which something has still to be confirmed
        self._epoch = 0  # in which that was fired

    def __repr__(self) -> str:
        return repr(self._stream)

    # What the runner does.

    def _fire(self) -> Callable[[], None] | None:
        """The trigger fires; gives what confirms that, unless the trigger itself has spoken for the event."""
        self._forget_earlier_openings()
        if self._stream.statistics().events_current:
            acks = self._stream._acks
            assert acks is not None
            self._fired = fired = Fired(self._stream.defer(), acks, lambda fired: self._open.pop(fired, None))
            self._open[fired] = None
        return None if self._fired is None else self._fired.one_more()

    def _forget_earlier_openings(self) -> None:
        """What came from an upstream that is gone comes again: its confirmations mean nothing, and take no room."""
        if self._epoch != self._stream.epoch:
            self._epoch = self._stream.epoch
            for fired in list(self._open):
                if fired is not self._fired:
                    fired.fail("its upstream has gone")

    def _finish(self) -> None:
        """The trigger has ended well."""
        self._go_on()
        self._stream._acknowledge()

    def _break_off(self) -> None:
        """The trigger has ended otherwise, and nobody knows what it would still have fired."""
        fired, self._fired = self._fired, None
        if fired is not None:
            fired.fail("the trigger has ended")

    def _go_on(self) -> AckSubscription[Any]:
        fired, self._fired = self._fired, None
        if fired is not None:
            fired.complete()
        return self._stream

    # What the filter does.

    async def receive(self) -> Any:
        """See `AckSubscription.receive`."""
        return await self._go_on().receive()

    def receive_nowait(self) -> Any:
        """See `AckSubscription.receive_nowait`."""
        return self._go_on().receive_nowait()

    async def receive_batch(self, max_size: int) -> tuple[Any, ...]:
        """See `AckSubscription.receive_batch`."""
        check_batch_size(max_size)
        return await self._go_on().receive_batch(max_size)

    def batches(self, max_size: int) -> ConfirmedBatches:
        """See `AckSubscription.batches`."""
        check_batch_size(max_size)
        return ConfirmedBatches(self, max_size)

    async def __anext__(self) -> Any:
        return await self._go_on().__anext__()

    def reject(self, reason: object = None) -> None:
        """See `AckSubscription.reject`. It may also be said of an event of which something was fired."""
        fired, self._fired = self._fired, None
        if fired is None:
            self._stream.reject(reason)
        else:
            fired.reject(reason)

    def fail(self, reason: object = None) -> None:
        """See `AckSubscription.fail`. It may also be said of an event of which something was fired."""
        fired, self._fired = self._fired, None
        if fired is None:
            self._stream.fail(reason)
        else:
            fired.fail(reason)

    def defer(self) -> Pending:
        """See `AckSubscription.defer`."""
        return self._stream.defer()

    def close(self) -> None:
        """See `AckSubscription.close`."""
        self._stream.close()

    async def aclose(self) -> None:
        """See `AckSubscription.aclose`."""
        await self._stream.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        await self._stream.__aexit__(exc_type, exc_val, exc_tb)

    @property
    def key(self) -> Hashable:
        """See `Subscription.key`."""
        return self._stream.key

    @property
    def subscriber_id(self) -> Hashable:
        """See `Subscription.subscriber_id`."""
        return self._stream.subscriber_id

    @property
    def epoch(self) -> int:
        """See `Subscription.epoch`."""
        return self._stream.epoch

    def statistics(self) -> SubscriptionStatistics:
        """See `Subscription.statistics`."""
        return self._stream.statistics()


class ConfirmedBatches:
    """The iterator of `ConfirmedStream.batches`."""

    def __init__(self, stream: ConfirmedStream, max_size: int) -> None:
        self._stream = stream
        self._max_size = max_size

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[Any, ...]:
        try:
            return await self._stream.receive_batch(self._max_size)
        except EndOfStream:
            raise StopAsyncIteration from None
