"""The synchronous half of a subscription: its buffer, its reader, its end, and what publication does with all three.

Relies on `_buffer` to store, and on `_parking` to wake a parked reader. These always hold:

- a parked reader (``_waiter``) has taken everything before, and its subscription has not ended;
- nothing is ``_ready`` while a task is in `receive` (``_reading``), until that task has resumed: a second one finds nothing to
  take, and then finds the mark;
- once ended (``_terminal``) or closed, nothing is added, and no reader parks.

The reader is given nothing through its wake-up. It looks into the mailbox when it runs, so a reader that is cancelled after
it was woken leaves its events where the next call finds them.
"""

from __future__ import annotations

from asyncio import InvalidStateError
from collections.abc import Awaitable, Callable, Hashable
from contextlib import suppress
from typing import Any, TypeVar

from anyio import BusyResourceError, ClosedResourceError, WouldBlock
from anyio.lowlevel import checkpoint

from anyio_sharedstream._buffer import TURN, Buffer
from anyio_sharedstream._exceptions import Terminal
from anyio_sharedstream._parking import Backend
from anyio_sharedstream._policies import FAIL, OverflowPolicy
from anyio_sharedstream._statistics import SubscriptionStatistics

__all__ = ["Mailbox"]

T_co = TypeVar("T_co", covariant=True)


class Mailbox(Buffer[T_co]):
    """What a group knows of a subscriber, and what a subscription builds on."""

    __slots__ = (
        "_accepted",
        "_choosy",
        "_create_waiter",
        "_ended_in",
        "_held",
        "_missed",
        "_policy",
        "_reading",
        "_refused",
        "_routes",
        "_subscriber_id",
        "_suspend",
        "_terminal",
        "_turn_number",
        "_waiter",
        "_wake_waiter",
        "_where",
    )

    def __init__(self, subscriber_id: Hashable, max_buffer_size: float) -> None:
        super().__init__(max_buffer_size)
        self._subscriber_id = subscriber_id
        self._policy: OverflowPolicy = FAIL
        self._wake_waiter: Callable[[Any, None], object]
        self._create_waiter: Callable[[], Any] | None = None  # there is one while a reader may park
        self._suspend: Callable[[Any], Awaitable[object]] | None = None
        self._waiter: Any = None
        self._reading = False
        self._turn_number = -1  # the turn of the source in which it was last given events chosen for it
        self._accepted = 0  # how many that were
        self._where: Callable[[Any], object] | None = None
        self._routes: frozenset[Hashable] | None = None
        self._choosy = False  # whether it is not simply given every event
        self._missed = 0
        self._refused = 0
        self._held = 0.0
        self._terminal: Terminal | None = None
        self._ended_in: int | None = None  # in which opening of the upstream

    def _register(self, backend: Backend) -> None:
        """From now on a reader may park."""
        self._create_waiter = backend.create_waiter
        self._suspend = backend.suspend
        self._wake_waiter = backend.wake

    # Publishing.

    def _publish(self, events: tuple[Any, ...], turn: int) -> bool:
        """Take what was chosen for this subscriber alone; False if that is more than it may be behind."""
        earlier = self._accepted_in(turn)
        self._accept_in(turn, len(events))
        if self._waiter is None:
            return self._accept(events, earlier)
        self._chunk = events
        self._peak = max(self._peak, len(events))
        self._wake_reader()
        return True

    def _accepted_in(self, turn: int) -> int:
        return self._accepted if self._turn_number == turn else 0

    def _accept_in(self, turn: int, events: int) -> None:
        self._accepted = self._accepted_in(turn) + events
        self._turn_number = turn

    def _prefill(self, events: tuple[Any, ...]) -> None:
        """Take what was published before it came. That is no sign of being slow, and takes no room."""
        self._replayed = self._peak = len(events)
        self._chunk = events[:TURN]
        # Not in one piece: a reader lets others run between two chunks only.
        for start in range(TURN, len(events), TURN):
            self._store_chunk(events[start : start + TURN])

    def _end(self, terminal: Terminal) -> None:
        """Let the reader have what is buffered, then the terminal."""
        self._seal()
        self._terminal = terminal
        self._dismiss_reader()

    @property
    def _over(self) -> bool:
        return self._closed or self._terminal is not None

    def _fail(self, terminal: Terminal) -> None:
        """Drop what is buffered, for it is stale, and give the reader the terminal at once."""
        self._drop()
        self._terminal = terminal
        self._dismiss_reader()

    def _overflow(self) -> str:
        """What it was too slow for, for the error that says so."""
        return f"fell more than {self._max_buffer_size} events behind"

    # Receiving.

    def _load(self, *, wait: bool) -> Awaitable[object] | None:
        """With nothing ready, find the next chunk, or say what to wait for, or raise how the subscription has ended.

        Whoever gets something to wait for awaits it at once, then clears ``_reading``. Without *wait* there is no such thing, and
        nothing to receive is `anyio.WouldBlock`.
        """
        if self._reading:
            raise BusyResourceError("receiving from")
        if self._chunk:
            return None
        if self._backlogged:
            self._chunk = chunk = self._next_chunk()
            return self._turn() if wait and self._received + len(chunk) - self._taken_at_yield > TURN else None
        return self._idle(wait)

    def _idle(self, wait: bool) -> Awaitable[object]:
        """With nothing to receive, say what to wait for, or raise."""
        if self._closed:
            raise ClosedResourceError
        if self._terminal is not None:
            raise self._terminal.exception()
        if self._create_waiter is None:
            raise RuntimeError("this subscription has not been entered: use `async with manager.subscribe(...) as stream`")
        if not wait:
            raise WouldBlock
        waiter = self._create_waiter()
        self._reading = True
        self._waiter = waiter
        return waiter if self._suspend is None else self._suspend(waiter)

    def _turn(self) -> Awaitable[object]:
        self._taken_at_yield = self._received
        self._reading = True
        return checkpoint()

    def _turn_before(self, limit: int) -> Awaitable[object] | None:
        """What to await, as for `_load`, before up to *limit* events are taken by a reader that is behind."""
        since = self._taken() - self._taken_at_yield
        # Not sooner than need be: a whole turn of the source must be taken before that goes on.
        if since == 0 or since + min(limit, self._untaken()) <= TURN:
            return None
        self._put_back()  # where a second reader does not find it: see the invariant on `_ready`
        return self._turn()

    # Closing.

    def _shut(self) -> None:
        """Drop everything; a waiting reader is told."""
        self._drop()
        self._closed = True
        self._dismiss_reader()

    def _dismiss_reader(self) -> None:
        """Let a parked reader look again, and let no reader park any more."""
        self._create_waiter = None
        self._wake_reader()

    def _wake_reader(self) -> None:
        """Let a parked reader look again."""
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            with suppress(InvalidStateError):  # on its way out of a cancellation; the next call finds what there is
                self._wake_waiter(waiter, None)

    # Looking.

    def _statistics(self) -> SubscriptionStatistics:
        return SubscriptionStatistics(
            subscriber_id=self._subscriber_id,
            policy=self._policy,
            current_buffer_used=self._untaken(),
            peak_buffer_used=self._peak,
            max_buffer_size=self._max_buffer_size,
            events_received=self._taken(),
            events_missed=self._missed,
            events_refused=self._refused,
            held_seconds=self._held,
        )
