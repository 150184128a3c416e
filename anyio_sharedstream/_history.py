"""What a group remembers of the events of its upstream, for those who come later: the latest of them, and a state.

Relies on `_lifecycle` for what was asked for. Everything here belongs to one opening of the upstream: the next one begins anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from itertools import repeat
from typing import Any

from anyio_sharedstream._lifecycle import Fold

__all__ = ["History"]


class History:
    """The last *replay* events that are not older than *max_age* seconds, and the state of *fold*."""

    def __init__(self, replay: int, max_age: float | None, fold: Fold | None) -> None:
        self.running = False
        """whether there is an upstream that the history is of"""
        self.state: Any = None
        """what has been published comes to this"""
        self.publications = 0
        """how often the state has been moved on"""
        self._fold = fold
        self._next_state: Any = None  # with what the source has yielded, and nobody has received yet
        self._max_age = max_age
        self._latest: deque[tuple[Any, Hashable, float]] = deque(maxlen=replay)

    def begin(self) -> None:
        """The upstream is being opened. Raises what a fold's ``initial`` raises."""
        self._latest.clear()
        if self._fold is not None:
            initial = self._fold.initial
            self.state = self._next_state = initial() if callable(initial) else initial
        self.running = True

    def step(self, event: Any) -> None:
        """Take an event that is going to be published into the state. Raises what a fold's ``step`` raises."""
        if self._fold is not None:
            self._next_state = self._fold.step(self._next_state, event)

    def publish(self) -> None:
        """What was yielded is being published."""
        self.state = self._next_state
        self.publications += 1

    def remember(self, events: tuple[Any, ...], routes: Sequence[Hashable], now: float) -> None:
        self._latest.extend(zip(events, routes or repeat(None), repeat(now)))

    def latest(self, now: float) -> tuple[tuple[Any, ...], list[Hashable]]:
        """The events to replay, and their routes."""
        if self._max_age is not None:
            while self._latest and now - self._latest[0][2] > self._max_age:
                self._latest.popleft()
        return tuple(event for event, _, _ in self._latest), [route for _, route, _ in self._latest]
