"""One subscriber's buffer: what publication writes and reception reads. Nothing here waits.

Relies on `_parking` to wake a parked reader. Events come in *chunks*, tuples that all subscribers share. What a subscriber has
not taken lies in three places, read in this order::

    _ready      an iterator over the chunk being read; only the reader touches it
    _chunk      the next chunk, put here directly when everything before had been taken
    _backlog    an anyio memory object stream of further chunks; _queued events in _backlogged chunks

and these always hold:

- the backlog is used only while there is something before it: a subscriber that has taken everything is *caught up*, and gets
  its next chunk without a stream operation;
- a parked reader (``_waiter``) is caught up, and not ended;
- ``_ready`` is exhausted while a task is in `receive` (``_reading``), until that task has resumed: a second one finds nothing to
  take, and then finds the mark;
- since the last publication into the backlog the reader has taken ``_taken() - _taken_at_yield`` events: another task was
  running then, so whatever the reader has taken without letting others run, it has taken since;
- once ended (``_terminal``) or closed, nothing is added, and there is no open memory stream: what an ended subscription has
  yet to give moves from the stream to ``_remaining``.

The reader is given nothing through its wake-up. It looks into the mailbox when it runs, so a reader that is cancelled after
it was woken leaves its events where the next call finds them.
"""

from __future__ import annotations

from asyncio import InvalidStateError
from collections.abc import Awaitable, Callable, Hashable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from operator import length_hint
from typing import Any, Generic, TypeVar

from anyio import BusyResourceError, ClosedResourceError, WouldBlock, create_memory_object_stream
from anyio.lowlevel import checkpoint
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from anyio_sharedstream._exceptions import Terminal
from anyio_sharedstream._parking import Backend
from anyio_sharedstream._statistics import SubscriptionStatistics

__all__ = ["TURN", "Mailbox", "deliver"]

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")

#: The longest run of events that passes without the event loop getting a turn: a source's, and a reader's.
TURN = 64

_EXHAUSTED: Iterator[Any] = iter(())


class Mailbox(Generic[T_co]):
    """The synchronous half of a subscription.

    Its names are private because the subscription, which is public, inherits them; the group is in the know.
    """

    # fmt: off
    __slots__ = (
        "_backlog", "_backlogged", "_chunk", "_closed", "_create_waiter", "_feed", "_max_buffer_size", "_peak",
        "_queued", "_reading", "_ready", "_received", "_remaining", "_subscriber_id", "_suspend", "_taken_at_yield",
        "_terminal", "_waiter", "_wake_waiter",
    )
    # fmt: on

    def __init__(self, subscriber_id: Hashable, max_buffer_size: float) -> None:
        self._subscriber_id = subscriber_id
        self._max_buffer_size = max_buffer_size
        self._wake_waiter: Callable[[Any, None], object]
        self._create_waiter: Callable[[], Any] | None = None  # there is one while a reader may park
        self._suspend: Callable[[Any], Awaitable[object]] | None = None
        self._ready: Iterator[T_co] = _EXHAUSTED
        self._chunk: tuple[T_co, ...] = ()
        self._feed: MemoryObjectSendStream[tuple[T_co, ...]] | None = None
        self._backlog: MemoryObjectReceiveStream[tuple[T_co, ...]] | None = None
        self._remaining: list[tuple[T_co, ...]] = []  # the backlog of an ended subscription, last chunk first
        self._backlogged = 0
        self._queued = 0
        self._received = 0  # events in the chunks that the reader has begun, `_ready` included
        self._taken_at_yield = 0
        self._peak = 0
        self._waiter: Any = None
        self._reading = False
        self._terminal: Terminal | None = None
        self._closed = False

    def _register(self, backend: Backend) -> None:
        """From now on a reader may park."""
        self._create_waiter = backend.create_waiter
        self._suspend = backend.suspend
        self._wake_waiter = backend.wake

    # Publishing.

    def _accept(self, chunk: tuple[Any, ...], earlier: int) -> bool:
        """Take a chunk for a reader that is not parked; False if that is more than the subscriber may be behind.

        *earlier* events were published in the same turn. Whatever the bound is, they do not count, and nor does the chunk, if
        there is nothing else: the bound counts what a subscriber was too slow for, and this one has had no chance yet.
        """
        if self._closed:
            return True  # by a finaliser that ran during this very publication
        size = len(chunk)
        untaken = self._untaken()
        if untaken == 0:
            self._chunk = chunk
        elif untaken > earlier and untaken + size > self._max_buffer_size:
            return False
        else:
            feed = self._feed or self._open_backlog()
            self._backlogged += 1
            self._queued += size
            self._taken_at_yield = self._taken()
            try:
                feed.send_nowait(chunk)
            except ClosedResourceError:
                self._drop()  # a finaliser has closed it since
        if untaken + size > self._peak:
            self._peak = untaken + size
        return True

    def _open_backlog(self) -> MemoryObjectSendStream[tuple[T_co, ...]]:
        # Every chunk holds an event at least, so a stream of as many chunks as there may be events never fills.
        feed, self._backlog = create_memory_object_stream[tuple[T_co, ...]](max(self._max_buffer_size, TURN))
        self._feed = feed
        if self._closed:
            self._close_backlog()  # closed by a finaliser, which making the streams may have set off
        return feed

    def _end(self, terminal: Terminal) -> None:
        """Let the reader have what is buffered, then the terminal."""
        if self._backlog is not None:
            # Out of the stream, so that it can be closed now: nobody need close a subscription that has ended.
            self._remaining = [self._backlog.receive_nowait() for _ in range(self._backlogged)][::-1]
            self._close_backlog()
        self._terminal = terminal
        self._dismiss_reader()

    def _fail(self, terminal: Terminal) -> None:
        """Drop what is buffered, for it is stale, and give the reader the terminal at once."""
        self._drop()
        self._terminal = terminal
        self._dismiss_reader()

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
            self._chunk = chunk = self._remaining.pop() if self._backlog is None else self._backlog.receive_nowait()
            self._backlogged -= 1
            self._queued -= len(chunk)
            return self._turn() if wait and self._received + len(chunk) - self._taken_at_yield > TURN else None
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
        # Where a second reader does not find it: see the invariant on `_ready`.
        rest = tuple(self._ready)
        self._received -= len(rest)
        self._chunk = rest + self._chunk
        return self._turn()

    def _begin(self) -> T_co:
        """Begin the next chunk, and take its first event."""
        chunk = self._chunk
        self._chunk = ()
        self._received += len(chunk)
        if len(chunk) > 1:
            self._ready = iter(chunk)
            return next(self._ready)
        return chunk[0]

    def _take(self, limit: int) -> tuple[T_co, ...]:
        """Take up to *limit* of what is buffered, across chunks; there is something."""
        chunk = self._chunk
        if len(chunk) <= limit and not self._backlogged and not length_hint(self._ready):
            # The usual case of a reader that keeps up: the very tuple that all subscribers share.
            self._chunk = ()
            self._received += len(chunk)
            return chunk
        batch = tuple(islice(self._ready, limit))
        while len(batch) < limit and (self._chunk or self._backlogged):
            self._load(wait=False)
            chunk = self._chunk
            self._chunk = ()
            self._received += len(chunk)
            if len(batch) + len(chunk) <= limit:
                batch += chunk
            else:
                self._ready = iter(chunk)
                batch += tuple(islice(self._ready, limit - len(batch)))
        return batch

    # Closing.

    def _shut(self) -> None:
        """Drop everything; a waiting reader is told."""
        self._drop()
        self._closed = True
        self._dismiss_reader()

    def _drop(self) -> None:
        self._received = self._taken()
        self._ready = _EXHAUSTED
        self._chunk = ()
        self._queued = 0
        self._backlogged = 0
        self._remaining = []
        self._close_backlog()

    def _close_backlog(self) -> None:
        if self._feed is not None and self._backlog is not None:
            self._feed.close()
            self._backlog.close()
            self._feed = self._backlog = None

    def _dismiss_reader(self) -> None:
        """Let a parked reader look again, and let no reader park any more."""
        self._create_waiter = None
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            with suppress(InvalidStateError):
                self._wake_waiter(waiter, None)

    # Looking.

    def _untaken(self) -> int:
        return length_hint(self._ready) + len(self._chunk) + self._queued

    def _taken(self) -> int:
        return self._received - length_hint(self._ready)

    def _statistics(self) -> SubscriptionStatistics:
        return SubscriptionStatistics(
            subscriber_id=self._subscriber_id,
            current_buffer_used=self._untaken(),
            peak_buffer_used=self._peak,
            max_buffer_size=self._max_buffer_size,
            events_received=self._taken(),
        )


def deliver(
    chunk: tuple[T, ...], mailboxes: Iterable[Mailbox[T]], wake: Callable[[Any, None], object], earlier: int
) -> list[Mailbox[T]]:
    """Put *chunk* into every mailbox, wake the parked readers, and return the mailboxes that have no room for it.

    *earlier* events were published in the same turn. No foreign code runs in here, except for finalisers: *mailboxes* must be a
    sequence of its own, and some may be closed on the way.
    """
    refused: list[Mailbox[T]] = []
    size = len(chunk)
    for mailbox in mailboxes:
        waiter = mailbox._waiter
        if waiter is not None:
            mailbox._waiter = None
            mailbox._chunk = chunk
            if size > mailbox._peak:
                mailbox._peak = size
            try:
                wake(waiter, None)
            except InvalidStateError:
                continue  # on its way out of a cancellation; the next call finds the chunk
        elif not mailbox._accept(chunk, earlier):
            refused.append(mailbox)
    return refused
