"""Timers: synchronous functions that are called when their time has come, all by one task.

Relies on anyio's clock, so on the event loop's, which in tests may be virtual. A group has several timers and most of them never
fire; a task for each would cost more than all they do. Setting one again and again, as every page reload does with a grace
period, costs no more than an assignment: a timer that is moved into the future stays where it is in the heap and is put back
when it comes up.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import count

from anyio import CancelScope, Event, current_time

__all__ = ["Clock", "Timer"]

#: Below this many entries nobody minds those that nobody waits for any more.
_SMALL = 64


class Timer:
    """Calls a function at its *deadline*, unless that is moved or taken back before.

    :param seconds: what `start` adds; None makes a timer that does not start
    """

    __slots__ = ("_callback", "_clock", "_seconds", "deadline", "scheduled")

    def __init__(self, clock: Clock, callback: Callable[[], object], seconds: float | None = None) -> None:
        self.deadline: float | None = None
        """when to call, in the event loop's seconds; None if not"""
        self.scheduled: float | None = None
        """the time of its entry in the clock, if it has one; never later than the deadline"""
        self._clock = clock
        self._seconds = seconds
        self._callback: Callable[[], object] | None = callback

    def start(self, since: float) -> None:
        """Call so long after that time."""
        if self._seconds is not None:
            self.start_at(since + self._seconds)

    def start_at(self, deadline: float) -> None:
        """Call at this time, and not when it was to be called before."""
        self._clock.wanted += self.deadline is None
        self.deadline = deadline
        if self.scheduled is None or deadline < self.scheduled:
            self._clock.schedule(self, deadline)

    def stop(self) -> None:
        """Do not call."""
        if self.deadline is not None:
            self.deadline = None
            self._clock.unwanted()

    def close(self) -> None:
        """Never call again, and keep nothing alive."""
        self.stop()
        self._callback = None

    def fire(self) -> None:
        self.stop()
        if self._callback is not None:
            self._callback()


class Clock:
    """A heap of timers, and the task that sleeps until the first of them.

    :param start: starts a task that calls `run`
    """

    def __init__(self, start: Callable[[], object]) -> None:
        self.wanted = 0
        """how many timers have a deadline"""
        self._heap: list[tuple[float, int, Timer]] = []
        self._numbers = count()
        self._start = start
        self._running = False
        self._changed: Event | None = None

    def schedule(self, timer: Timer, when: float) -> None:
        heappush(self._heap, (when, next(self._numbers), timer))
        timer.scheduled = when
        if not self._running:
            self._running = True
            self._start()
        elif self._heap[0][2] is timer:
            self._wake()

    def unwanted(self) -> None:
        """One of the timers has no deadline any more."""
        self.wanted -= 1
        if not self.wanted:
            self._wake()
        elif len(self._heap) > max(_SMALL, 2 * self.wanted):
            self._clear(keep=True)

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.set()

    def _clear(self, *, keep: bool) -> None:
        """Forget all entries, or those that nobody waits for."""
        entries, self._heap = self._heap, []
        for entry in entries:
            when, _, timer = entry
            if timer.scheduled == when:
                if keep and timer.deadline is not None:
                    self._heap.append(entry)
                else:
                    timer.scheduled = None
        heapify(self._heap)

    async def run(self) -> None:
        """Fire what is due; returns when no timer has a deadline."""
        try:
            while self.wanted:
                when, _, timer = self._heap[0]
                if when > current_time():
                    self._changed = Event()
                    # Shielded, for while everything is being cancelled clean-ups are still to be given their time, and no more.
                    with CancelScope(deadline=when, shield=True):
                        await self._changed.wait()
                    continue
                heappop(self._heap)
                if timer.scheduled != when:
                    continue  # it was moved forward since, and this is where it was
                timer.scheduled = None
                if timer.deadline is not None and timer.deadline > when:
                    self.schedule(timer, timer.deadline)
                elif timer.deadline is not None:
                    timer.fire()
        finally:
            self._running = False
            self._clear(keep=False)
