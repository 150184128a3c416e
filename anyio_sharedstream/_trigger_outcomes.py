"""What becomes of triggers, and the stream that a runner's reader takes it from.

Relies on nothing else in the package. Every change of state is synchronous; what awaits, awaits around those changes.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from anyio import ClosedResourceError, EndOfStream, Event
from anyio.abc import ObjectReceiveStream
from anyio.lowlevel import checkpoint

__all__ = ["Outcomes", "TriggerEvent", "TriggerFailed", "TriggerFinished", "TriggerFired", "TriggerOutcome"]


@dataclass(frozen=True, slots=True)
class TriggerEvent:
    """What a trigger yields when it fires."""

    payload: Any
    """what the trigger has to say; opaque to the runner"""


@dataclass(frozen=True, slots=True)
class TriggerFired:
    """A trigger has yielded an event, and goes on."""

    trigger_id: Hashable
    """the id that the trigger was started with"""
    event: TriggerEvent
    """what it yielded"""
    _confirm: Callable[[], object] | None = field(default=None, repr=False, compare=False)

    def confirm(self) -> None:
        """Say that this outcome has been dealt with, and need not come again.

        It matters where the trigger's shared stream is an acknowledged one: its event is acknowledged when all that was fired
        because of it has been confirmed. What is not confirmed within the source's ``ack_timeout``, counted from the first that
        was fired, has failed. Anywhere else, and more than once, it does nothing.
        """
        if self._confirm is not None:
            self._confirm()


@dataclass(frozen=True, slots=True)
class TriggerFailed:
    """A trigger has ended with an error; its id is free."""

    trigger_id: Hashable
    """the id that the trigger was started with"""
    error: Exception
    """what its methods or its shared stream raised; `SharedStreamError` for a cancellation that nobody asked for"""


@dataclass(frozen=True, slots=True)
class TriggerFinished:
    """A trigger has ended without an error, of itself or because its shared stream was stopped; its id is free."""

    trigger_id: Hashable
    """the id that the trigger was started with"""


TriggerOutcome: TypeAlias = TriggerFired | TriggerFailed | TriggerFinished


class Outcomes(ObjectReceiveStream[TriggerOutcome]):
    """The stream of `TriggerRunner.outcomes`: bounded for fired events, which wait for room in turn, and open to endings.

    Nothing is handed to a waiting reader: it looks into the buffer when it runs. So a reader that is cancelled has lost
    nothing, and any number of tasks may read. Whenever an event is held, there is no room for it.
    """

    def __init__(self, max_fired: float) -> None:
        self._max_fired = max_fired
        self._fired = 0  # fired events in the buffer
        self._buffer: deque[TriggerOutcome] = deque()
        self._held: OrderedDict[object, tuple[TriggerFired, Event]] = OrderedDict()  # ordered: popping a dict's first is O(n)
        self._news: Event | None = None
        self._ended = False
        self._closed = False

    # Putting.

    def put(self, outcome: TriggerOutcome) -> None:
        """Put at once, whatever the bound."""
        if not self._closed:
            self._buffer.append(outcome)
            self._fired += isinstance(outcome, TriggerFired)
            self._wake()

    async def fire(self, holder: object, outcome: TriggerFired) -> None:
        """Put as soon as there is room. A checkpoint in any case, for a trigger may yield without ever awaiting."""
        if self._closed or self._fired < self._max_fired:
            self.put(outcome)
        else:
            await self._hold(holder, outcome)
        await checkpoint()

    async def _hold(self, holder: object, outcome: TriggerFired) -> None:
        room = Event()
        self._held[holder] = outcome, room
        try:
            await room.wait()
        except BaseException:
            # Not a stop, which withdraws it, but a cancellation from inside the trigger or from around the runner. Neither undoes
            # what was yielded before.
            if self._held.pop(holder, None) is not None:
                self.put(outcome)
            raise

    def withdraw(self, holder: object) -> None:
        """Drop what the holder waits with, if it does."""
        if holder in self._held:
            _, room = self._held.pop(holder)
            room.set()  # a generator that shields its yield is not reached by a cancellation

    def end(self) -> None:
        """Nothing will be put any more: let readers have what is buffered, then the end."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._news is not None:
            self._news.set()
            self._news = None

    # Receiving.

    async def receive(self) -> TriggerOutcome:
        """Return the next outcome, waiting for one if there is none. If a cancellation is raised here, none was taken.

        :raises ~anyio.EndOfStream: the runner has been left, and everything has been received
        :raises ~anyio.ClosedResourceError: this stream was closed
        """
        await checkpoint()
        while not self._buffer:
            if self._closed:
                raise ClosedResourceError
            if self._ended:
                raise EndOfStream
            self._news = self._news or Event()
            await self._news.wait()
        outcome = self._buffer.popleft()
        if isinstance(outcome, TriggerFired):
            self._fired -= 1
            if self._held and self._fired < self._max_fired:
                _, (held, room) = self._held.popitem(last=False)
                self.put(held)
                room.set()
        return outcome

    async def aclose(self) -> None:
        """Close: nobody will read, so outcomes are dropped from now on and no trigger waits. Not a checkpoint."""
        self._closed = True
        self._buffer.clear()
        for holder in list(self._held):
            self.withdraw(holder)
        self._wake()
