"""Bugs to plant in the library, for tests which show that the proof finds them. Each looks as a plausible change would.

Relies on the library's private names, which is how a bug gets in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
from anyio import EndOfStream, get_cancelled_exc_class
from anyio.lowlevel import checkpoint

from anyio_sharedstream import AckSubscription, _exceptions, _poll
from anyio_sharedstream._audience import Audience
from anyio_sharedstream._exceptions import Terminal
from anyio_sharedstream._group import Group
from anyio_sharedstream._mailbox import Mailbox
from anyio_sharedstream._publisher import Publisher
from anyio_sharedstream._subscription import Batches, Receiver

Plant: TypeAlias = Callable[[pytest.MonkeyPatch], None]


def later(registry: Any, function: Callable[[], object]) -> None:
    """Call a function after an await, in another task."""

    async def call() -> None:
        await checkpoint()
        function()

    registry._tasks.start_soon(call)


def evict_after_an_await(patch: pytest.MonkeyPatch) -> None:
    def cancel_and_evict_later(self: Group) -> None:
        self.scope.cancel()
        self._requested = True
        later(self._owner, self._evict)

    patch.setattr(Group, "_cancel", cancel_and_evict_later)


def hand_events_over_as_the_value_of_the_wake_up(patch: pytest.MonkeyPatch) -> None:
    """A reader that is cancelled after it was woken loses what it was woken with, as the result of a future would be lost."""
    fill = Receiver._fill

    async def wait_for_the_value(self: Receiver[Any]) -> None:
        try:
            await fill(self)
        except get_cancelled_exc_class():
            self._received += len(self._chunk)
            self._chunk = ()
            raise

    async def receive_next(self: Receiver[Any]) -> Any:
        try:
            return await self.receive()
        except EndOfStream:
            raise StopAsyncIteration from None

    async def receive_next_batch(self: Batches[Any]) -> Any:
        try:
            return await self._stream.receive_batch(self._max_size)
        except EndOfStream:
            raise StopAsyncIteration from None

    patch.setattr(Receiver, "_fill", wait_for_the_value)
    patch.setattr(Receiver, "__anext__", receive_next)  # which else have a way of their own
    patch.setattr(Batches, "__anext__", receive_next_batch)


def forget_the_wake_up_on_overflow(patch: pytest.MonkeyPatch) -> None:
    def fail(self: Mailbox[Any], terminal: Terminal) -> None:
        self._drop()
        self._terminal = terminal

    patch.setattr(Mailbox, "_fail", fail)


def raise_one_shared_exception_object(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_exceptions, "private_copy", lambda exception: exception)


def open_before_the_old_one_has_closed(patch: pytest.MonkeyPatch) -> None:
    async def wait_for_nobody(group: Any) -> None: ...

    patch.setattr(_poll, "_wait_for_others", wait_for_nobody)


def count_a_crash_as_an_acknowledgement(patch: pytest.MonkeyPatch) -> None:
    leave = AckSubscription.__aexit__
    patch.setattr(AckSubscription, "__aexit__", lambda self, *error: leave(self, None, None, None))


def drop_the_flush_before_a_suspension(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Publisher, "before_suspension", lambda self: False)


def leave_a_route_in_the_index(patch: pytest.MonkeyPatch) -> None:
    def discard(self: Audience, mailbox: Mailbox[Any]) -> bool:
        if self.members.get(mailbox._subscriber_id) is not mailbox:
            return False
        del self.members[mailbox._subscriber_id]
        for place in self._places.pop(mailbox).values():
            del place[mailbox]
        return True

    patch.setattr(Audience, "discard", discard)
