"""One subscriber's buffer: what publication writes and reception reads. Nothing here waits.

Relies on `_parking` for the waiter of a parked reader. Events come in *chunks*, tuples that all subscribers share. What a
subscriber has not taken lies in two places, read in this order::

    _chunk[_index:]      the chunk being read
    _backlog             an anyio memory object stream of further chunks; _queued events in _backlogged chunks

and these always hold:

- the backlog is used only while the chunk is unread: a subscriber that has taken everything is *caught up*, and the next
  chunk goes straight into ``_chunk``, without a stream operation;
- a parked reader (``_waiter`` that is not done) is caught up, and not ended;
- once ended (``_terminal``) or closed, nothing is added, and there is no open memory stream: what an ended subscription has
  yet to give moves from the stream to ``_remaining``.

The reader is given nothing through its wake-up. It looks into the mailbox when it runs, so a reader that is cancelled after
it was woken leaves its events where the next call finds them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, Generic, TypeVar

from anyio import BusyResourceError, ClosedResourceError, WouldBlock, create_memory_object_stream
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from anyio_sharedstream._exceptions import Terminal
from anyio_sharedstream._parking import BUSY, Backend, Waiter
from anyio_sharedstream._statistics import SubscriptionStatistics

__all__ = ["TURN", "Mailbox", "deliver"]

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")

#: The longest run of events that passes without the event loop getting a turn: a source's, and a reader's.
TURN = 64


class Mailbox(Generic[T_co]):
    """The synchronous half of a subscription.

    Its names are private because the subscription, which is public, inherits them; the group is in the know.
    """

    __slots__ = (
        "_backend",
        "_backlog",
        "_backlogged",
        "_chunk",
        "_closed",
        "_feed",
        "_index",
        "_max_buffer_size",
        "_peak",
        "_queued",
        "_received",
        "_remaining",
        "_subscriber_id",
        "_taken_at_yield",
        "_terminal",
        "_waiter",
    )

    def __init__(self, subscriber_id: Hashable, max_buffer_size: float) -> None:
        self._subscriber_id = subscriber_id
        self._max_buffer_size = max_buffer_size
        self._backend: Backend | None = None
        self._chunk: tuple[T_co, ...] = ()
        self._index = 0
        self._feed: MemoryObjectSendStream[tuple[T_co, ...]] | None = None
        self._backlog: MemoryObjectReceiveStream[tuple[T_co, ...]] | None = None
        self._remaining: list[tuple[T_co, ...]] = []  # the backlog of an ended subscription, last chunk first
        self._backlogged = 0
        self._queued = 0
        self._received = 0  # events in the chunks before `_chunk`
        self._taken_at_yield = 0  # events taken when the reader is known to have let others run
        self._peak = 0
        self._waiter: Waiter | None = None  # from the moment a reader waits until it has resumed
        self._terminal: Terminal | None = None
        self._closed = False

    # Publishing.

    def _accept(self, chunk: tuple[Any, ...]) -> bool:
        """Take a chunk for a reader that is not parked; False if that is more than the subscriber may be behind."""
        size = len(chunk)
        untaken = self._untaken()
        if untaken == 0:
            # Whatever the bound is: it counts what a subscriber was too slow for, and this one has had no chance yet.
            self._received += len(self._chunk)
            self._chunk = chunk
            self._index = 0
        elif untaken + size > self._max_buffer_size:
            return False
        else:
            if self._feed is None:
                # Every chunk holds an event at least, so a stream of as many chunks as there may be events never fills.
                streams = create_memory_object_stream[tuple[T_co, ...]](self._max_buffer_size)
                self._feed, self._backlog = streams
            self._feed.send_nowait(chunk)
            self._backlogged += 1
            self._queued += size
            self._taken_at_yield = self._received + self._index
        if untaken + size > self._peak:
            self._peak = untaken + size
        return True

    def _end(self, terminal: Terminal) -> None:
        """Let the reader have what is buffered, then the terminal."""
        if self._backlog is not None:
            # Out of the stream, so that it can be closed now: nobody need close a subscription that has ended.
            self._remaining = [self._backlog.receive_nowait() for _ in range(self._backlogged)][::-1]
            self._close_backlog()
        self._terminal = terminal
        self._wake()

    def _fail(self, terminal: Terminal) -> None:
        """Drop what is buffered, for it is stale, and give the reader the terminal at once."""
        self._drop()
        self._terminal = terminal
        self._wake()

    # Receiving.

    def _load(self, wait: bool) -> Waiter | None:
        """Make the chunk hold an untaken event, or say what to wait for, or raise how the subscription has ended.

        The waiter takes the reader's place in the mailbox; whoever gets it awaits it at once and then clears the place.
        Without *wait* there is none, and nothing to receive is `anyio.WouldBlock`.
        """
        if self._waiter is not None:
            raise BusyResourceError("receiving from")
        if self._index < len(self._chunk):
            return None
        if self._closed:
            raise ClosedResourceError
        self._received += len(self._chunk)
        self._chunk = ()
        self._index = 0
        if self._backlogged:
            self._chunk = self._remaining.pop() if self._backlog is None else self._backlog.receive_nowait()
            self._backlogged -= 1
            self._queued -= len(self._chunk)
            if wait and self._received + len(self._chunk) - self._taken_at_yield > TURN:
                self._taken_at_yield = self._received
                self._waiter = BUSY
            return self._waiter
        if self._terminal is not None:
            raise self._terminal.exception()
        if self._backend is None:
            raise RuntimeError("this subscription has not been entered: use `async with manager.subscribe(...) as stream`")
        if not wait:
            raise WouldBlock
        self._waiter = waiter = self._backend.create_waiter()
        return waiter

    def _take(self, limit: int) -> tuple[T_co, ...]:
        """Take up to *limit* of what is buffered, across chunks; there is something."""
        if self._index == 0 and not self._backlogged and len(self._chunk) <= limit:
            # The usual case of a reader that keeps up: the very tuple that all subscribers share.
            self._index = len(self._chunk)
            return self._chunk
        batch: list[T_co] = []
        while (room := limit - len(batch)) > 0:
            part = self._chunk[self._index : self._index + room]
            batch += part
            self._index += len(part)
            if self._index < len(self._chunk) or not self._backlogged:
                break
            self._load(False)
        return tuple(batch)

    # Closing.

    def _shut(self) -> None:
        """Drop everything; a waiting reader is told."""
        self._drop()
        self._closed = True
        self._wake()

    def _drop(self) -> None:
        self._received += self._index
        self._chunk = ()
        self._index = 0
        self._queued = 0
        self._backlogged = 0
        self._remaining = []
        self._close_backlog()

    def _close_backlog(self) -> None:
        if self._feed is not None and self._backlog is not None:
            self._feed.close()
            self._backlog.close()
            self._feed = self._backlog = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # Looking.

    def _untaken(self) -> int:
        return len(self._chunk) - self._index + self._queued

    def _statistics(self) -> SubscriptionStatistics:
        return SubscriptionStatistics(
            subscriber_id=self._subscriber_id,
            current_buffer_used=self._untaken(),
            peak_buffer_used=self._peak,
            max_buffer_size=self._max_buffer_size,
            events_received=self._received + self._index,
        )


def deliver(chunk: tuple[T, ...], mailboxes: Iterable[Mailbox[T]]) -> list[Mailbox[T]]:
    """Put *chunk* into every mailbox, wake the parked readers, and return the mailboxes that have no room for it.

    No foreign code runs in here: nobody can join or leave while the loop is under way.
    """
    refused: list[Mailbox[T]] = []
    size = len(chunk)
    for mailbox in mailboxes:
        waiter = mailbox._waiter
        if waiter is not None and not waiter.done():
            mailbox._chunk = chunk
            waiter.set_result(None)
            if size > mailbox._peak:
                mailbox._peak = size
        elif not mailbox._accept(chunk):
            refused.append(mailbox)
    return refused
