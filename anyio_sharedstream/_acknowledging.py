"""Receiving with a say: the subscription of an acknowledged upstream.

Relies on `_answering` for every change of state; what is here is what consumers call, and awaits around that.
"""

from __future__ import annotations

from types import TracebackType
from typing import TypeVar

from anyio import EndOfStream

from anyio_sharedstream._answering import Answering
from anyio_sharedstream._pending import Pending
from anyio_sharedstream._subscription import Batches, check_batch_size

__all__ = ["AckSubscription"]

T_co = TypeVar("T_co", covariant=True)


class AckSubscription(Answering[T_co]):
    """A `Subscription` whose events go back to the broker when everybody is done with them; consumers need not know.

    What was received last is *current*: one event, or the batch. Asking for more, in any way, acknowledges it, also if that call
    then waits, is cancelled, or finds nothing. So does leaving the ``async with`` without an exception; leaving it with one (a
    cancellation too), `close` and `aclose` fail it. What was never taken is released, and spoils nobody's acknowledgement.

    Once it has been busy with an event for the source's ``ack_timeout``, it fails with `AckTimeout`, alone.
    """

    __slots__ = ()

    def reject(self, reason: object = None) -> None:
        """Say of what is current that nobody will ever be able to use it; a producer may put it aside.

        :param reason: is logged
        :raises RuntimeError: nothing is current
        """
        self._judge("rejected", reason)

    def fail(self, reason: object = None) -> None:
        """Say of what is current that it has not been handled; a producer may have it delivered again.

        :param reason: is logged
        :raises RuntimeError: nothing is current
        """
        self._judge("failed", reason)

    def defer(self) -> Pending:
        """Take what is current out of these rules, and say later what became of it, through the `Pending`.

        While it is pending, no timeout counts for it, and its place among ``max_in_flight`` stays taken.

        :raises RuntimeError: nothing is current, or this subscriber would have deferred more than ``max_in_flight`` events
        """
        return self._put_off()

    async def receive(self) -> T_co:
        """Acknowledge what is current, and return the next event; else as `Subscription.receive`.

        :raises AckTimeout: this subscriber was busy with an event for too long, or held everybody up
        """
        for event in self._ready:
            return event
        if not self._acknowledge_late():
            self._acknowledge()
        await self._fill()
        event = self._begin()
        self._began_single()
        return event

    def receive_nowait(self) -> T_co:
        """Acknowledge what is current, and return the next event if there is one; else as `Subscription.receive_nowait`."""
        for event in self._ready:
            return event
        self._acknowledge()
        self._load(wait=False)
        event = self._begin()
        self._began_single()
        return event

    async def receive_batch(self, max_size: int) -> tuple[T_co, ...]:
        """Acknowledge what is current, and return everything that is ready, which is then current as a whole."""
        check_batch_size(max_size)
        self._acknowledge()
        batch = await self._batch(max_size)
        self._began_batch()
        return batch

    def batches(self, max_size: int) -> Batches[T_co]:
        """Iterate over batches, as `receive_batch` gives them."""
        return _AckBatches(self, max_size)

    async def __anext__(self) -> T_co:
        for event in self._ready:
            return event
        # Written out, as in `Receiver.__anext__` and for the same reason.
        chunk = self._chunk
        if len(chunk) > 1 and not self._reading and self._acknowledge_late():
            return self._begin_several(chunk)
        create_waiter = self._create_waiter
        try:
            if create_waiter is None or self._chunk or self._backlogged or self._reading:
                self._acknowledge()
                await self._fill()
            else:
                received = self._received
                if received != self._finished:
                    if self._telling is None:
                        self._acknowledge()
                    else:
                        self._telling.finish(received - self._finished)
                        self._finished = received
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
            self._taken_last = 1
            self._taken_at = self._now()
            if not self._timing:
                self._time()
            return chunk[0]
        event = self._begin()
        self._began_single()
        return event

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        """Leave as `aclose` does; without an exception, what is current is acknowledged."""
        if exc_val is None:
            self._finish(self._taken() - self._finished)
        await super().__aexit__(exc_type, exc_val, exc_tb)


class _AckBatches(Batches[T_co]):
    __slots__ = ()

    _stream: AckSubscription[T_co]

    async def __anext__(self) -> tuple[T_co, ...]:
        self._stream._acknowledge()
        batch = await super().__anext__()
        self._stream._began_batch()
        return batch
