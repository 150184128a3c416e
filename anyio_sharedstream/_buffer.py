"""One subscriber's buffer: what was published for it and what it has not taken yet. Nothing here waits, or wakes.

Relies on anyio's memory object streams. Events come in *chunks*, tuples that all subscribers share. What a subscriber has not
taken lies in three places, read in this order::

    _ready      an iterator over the chunk being read; only the reader touches it
    _chunk      the next chunk, put here directly when everything before had been taken
    _backlog    an anyio memory object stream of further chunks; _queued events in _backlogged chunks

and these always hold:

- the backlog is used only while there is something before it: a subscriber that has taken everything is *caught up*, and gets
  its next chunk without a stream operation;
- since the last publication into the backlog the reader has taken ``_taken() - _taken_at_yield`` events: another task was
  running then, so whatever the reader has taken without letting others run, it has taken since;
- once closed, nothing is added; once closed or sealed, there is no open memory stream: what a sealed buffer has yet to give
  moves from the stream to ``_remaining``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from operator import length_hint
from typing import Any, Generic, TypeVar

from anyio import ClosedResourceError, create_memory_object_stream
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

__all__ = ["TURN", "Buffer"]

T_co = TypeVar("T_co", covariant=True)

#: The longest run of events that passes without the event loop getting a turn: a source's, and a reader's.
TURN = 64

_EXHAUSTED: Iterator[Any] = iter(())


class Buffer(Generic[T_co]):
    """Stores chunks, and gives events. Its names are private because the subscription, which is public, inherits them."""

    __slots__ = (
        "_backlog",
        "_backlogged",
        "_chunk",
        "_closed",
        "_feed",
        "_max_buffer_size",
        "_peak",
        "_queued",
        "_ready",
        "_received",
        "_remaining",
        "_replayed",
        "_taken_at_yield",
    )

    def __init__(self, max_buffer_size: float) -> None:
        self._max_buffer_size = max_buffer_size
        self._ready: Iterator[T_co] = _EXHAUSTED
        self._chunk: tuple[T_co, ...] = ()
        self._feed: MemoryObjectSendStream[tuple[T_co, ...]] | None = None
        self._backlog: MemoryObjectReceiveStream[tuple[T_co, ...]] | None = None
        self._remaining: list[tuple[T_co, ...]] = []  # the backlog of a sealed buffer, last chunk first
        self._backlogged = 0
        self._queued = 0
        self._replayed = 0  # of the first events, how many were published before it came
        self._received = 0  # events in the chunks that the reader has begun, `_ready` included
        self._taken_at_yield = 0
        self._peak = 0
        self._closed = False

    # Storing.

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
        elif untaken > earlier and untaken + size > self._max_buffer_size and self._is_behind(untaken, size, earlier):
            return False
        else:
            self._store_chunk(chunk)
        if untaken + size > self._peak:
            self._peak = untaken + size
        return True

    def _store_chunk(self, chunk: tuple[Any, ...]) -> None:
        feed = self._feed or self._open_backlog()
        self._backlogged += 1
        self._queued += len(chunk)
        self._taken_at_yield = self._taken()
        try:
            feed.send_nowait(chunk)
        except ClosedResourceError:
            self._drop()  # a finaliser has closed it since

    def _is_behind(self, untaken: int, size: int, earlier: int) -> bool:
        """Whether that is so also without what was replayed, which it takes first."""
        untaken -= self._replay_left()
        return untaken > earlier and untaken + size > self._max_buffer_size

    def _replay_left(self) -> int:
        """How many of the untaken events were published before it came, and so do not count. They are taken first."""
        return max(0, self._replayed - self._taken()) if self._replayed else 0

    def _open_backlog(self) -> MemoryObjectSendStream[tuple[T_co, ...]]:
        feed, self._backlog = create_memory_object_stream[tuple[T_co, ...]](self._capacity())
        self._feed = feed
        if self._closed:
            self._close_backlog()  # closed by a finaliser, which making the streams may have set off
        return feed

    # Taking.

    def _next_chunk(self) -> tuple[T_co, ...]:
        """Take the next chunk out of the backlog; there is one."""
        chunk = self._remaining.pop() if self._backlog is None else self._backlog.receive_nowait()
        self._backlogged -= 1
        self._queued -= len(chunk)
        return chunk

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
            chunk = self._chunk or self._next_chunk()
            self._chunk = ()
            self._received += len(chunk)
            if len(batch) + len(chunk) <= limit:
                batch += chunk
            else:
                self._ready = iter(chunk)
                batch += tuple(islice(self._ready, limit - len(batch)))
        return batch

    def _put_back(self) -> None:
        """Make of the chunk being read one that has yet to be begun."""
        rest = tuple(self._ready)
        self._received -= len(rest)
        self._chunk = rest + self._chunk

    # Ending.

    def _seal(self) -> None:
        """Nothing will be added: close the stream now, for nobody need close a subscription that has ended."""
        if self._backlog is not None:
            self._remaining = [self._backlog.receive_nowait() for _ in range(self._stored())][::-1]
            self._close_backlog()

    def _stored(self) -> int:
        """How many items are in the memory object stream."""
        return self._backlogged

    def _drop(self) -> None:
        self._received = self._taken()
        self._ready = _EXHAUSTED
        self._chunk = ()
        self._queued = 0
        self._backlogged = 0
        self._remaining = []
        self._close_backlog()

    def _empty(self) -> None:
        """Drop everything, and go on."""
        self._drop()

    def _capacity(self) -> float:
        # Every chunk holds an event at least, so a stream of as many chunks as there may be events never fills.
        return max(self._max_buffer_size, TURN) + self._replayed

    def _close_backlog(self) -> None:
        if self._feed is not None and self._backlog is not None:
            self._feed.close()
            self._backlog.close()
            self._feed = self._backlog = None

    # Looking.

    def _untaken(self) -> int:
        return length_hint(self._ready) + len(self._chunk) + self._queued

    def _taken(self) -> int:
        return self._received - length_hint(self._ready)
