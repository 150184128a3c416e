"""What a subscriber of an acknowledged upstream has taken, and what it has said of that. Nothing here waits.

Relies on `_subscription`, and on `_accounts` and `_pending` for what is said. An event is *current* from the moment it was taken
until the next call that receives, which acknowledges it.

To take an event that is ready costs nothing more than it does elsewhere: nothing is written down. What has been finished follows
from what has been taken, and is told to the account when the reader begins another chunk, says something, or has stopped in the
middle of one when all tasks have had their turn (`_settle`). Then what it has yet to take is put back, so that the next call
comes by here. While anything is ``_ready``, single events are being received; a batch leaves nothing ready.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from math import inf
from operator import length_hint
from typing import Any, TypeVar

from anyio import BusyResourceError

from anyio_sharedstream._accounts import Account, Choosy, Reader
from anyio_sharedstream._advancing import Advancing
from anyio_sharedstream._clock import Timer
from anyio_sharedstream._exceptions import Terminal
from anyio_sharedstream._ledger import Record
from anyio_sharedstream._pending import Pending, Said
from anyio_sharedstream._statistics import SubscriptionStatistics
from anyio_sharedstream._subscription import Subscription

__all__ = ["Answering"]

T_co = TypeVar("T_co", covariant=True)


class Answering(Subscription[T_co]):
    """The synchronous half of an `AckSubscription`."""

    __slots__ = (
        "_account",
        "_acks",
        "_deadline",
        "_deferred",
        "_finished",
        "_late_by",
        "_now",
        "_taken_at",
        "_taken_last",
        "_telling",
        "_timing",
        "_unsettled",
    )

    def __init__(self, subscriber_id: Hashable, max_buffer_size: float, **options: Any) -> None:
        super().__init__(subscriber_id, max_buffer_size, **options)
        self._acks: Advancing | None = None  # of the opening that it was given events of last
        self._account: Account | None = None  # of that opening
        self._telling: Account | None = None  # the same, unless what it has taken and not finished is of an earlier opening
        self._finished = 0  # events that it has taken, and of which something was said
        self._taken_last = 1  # how many of the others are current: the newest; it is done with those before
        self._late_by = 0  # events at which it was when it failed
        self._deferred = 0  # events of which it has still to say something
        self._unsettled: Callable[[Answering[Any]], object]
        self._now: Callable[[], float] = _never
        self._taken_at = 0.0
        self._timing = True  # whether somebody will look whether it is late, or nobody need
        self._deadline: Timer | None = None

    # What the group does.

    def _open_account(self, acks: Advancing) -> None:
        """From now on its events are those of this opening of the upstream."""
        self._acks = acks
        acks.subscribers[self] = None
        self._unsettled = acks.ledger.unsettled
        self._account = Choosy(acks.ledger) if self._where is not None or self._routes is not None else Reader(acks.ledger)
        self._telling = None if self._taken() > self._finished else self._account
        timeout = acks.source.ack_timeout
        if timeout < inf:
            self._deadline = Timer(acks.clock, self._check_lateness, timeout)
            self._timing = False
            self._now = acks.now

    def _disown(self) -> None:
        """The upstream is gone: what it has published and nobody has taken will come again, from the next."""
        self._empty()
        self._account = self._telling = None
        self._stop_timing()

    def _close_account(self) -> None:
        """Nothing more will be taken: what is current has failed, and the rest is released."""
        account = self._account
        if account is not None:
            self._say("failed", self._current())
            self._account = self._telling = None
            account.leave()
        self._stop_timing()

    def _stop_timing(self) -> None:
        """Whatever it does, it is not late any more."""
        if self._acks is not None:
            self._acks.subscribers.pop(self, None)
        if self._deadline is not None:
            self._deadline.close()
            self._deadline = None
        self._timing = True
        self._now = _never

    def _fail(self, terminal: Terminal) -> None:
        self._late_by = self._current()
        self._close_account()
        self._finished = self._taken()
        super()._fail(terminal)

    def _shut(self) -> None:
        self._close_account()
        self._finished = self._taken()
        super()._shut()

    def _stands_first(self) -> bool:
        """Whether the oldest event waits for it."""
        return self._account is not None and self._account.stands_first()

    def _settle(self) -> None:
        """It was receiving single events when all other tasks had had their turn."""
        rest = tuple(self._ready)
        if rest:  # as `_put_back` does it
            self._received -= len(rest)
            self._chunk = rest + self._chunk
        others = self._received - self._finished - self._taken_last
        if others > 0 and self._telling is not None:
            self._finished += others
            self._telling.catch_up(others)
        assert self._acks is not None
        self._taken_at = self._acks.turn

    def _check_lateness(self) -> None:
        """The time has come that it may be late, unless it has taken something since, or has nothing to do."""
        deadline, acks = self._deadline, self._acks
        self._timing = False
        if deadline is not None and acks is not None and self._current() and self._telling is not None:
            due = self._taken_at + acks.source.ack_timeout
            if due > acks.now():
                self._timing = True
                deadline.start_at(due)
            else:
                acks.late(self)

    # What the subscriber says.

    def _current(self) -> int:
        return min(self._taken() - self._finished, self._taken_last)

    def _finish(self, events: int) -> None:
        """It is done with so many events more."""
        self._finished += events
        if self._telling is not None and events:
            self._telling.finish(events)

    def _finish_before(self, current: int) -> None:
        """It is done with what it has taken before what is current."""
        self._finish(self._taken() - self._finished - current)

    def _acknowledge(self) -> None:
        """It is done with all that it has taken."""
        if self._reading:
            raise BusyResourceError("receiving from")
        taken = self._taken()
        events = taken - self._finished
        if events:
            self._finished = taken
            if self._telling is not None:
                self._telling.finish(events)
            else:
                self._spoke(late=True)
                self._log_said("acked", events, None, late=True)

    def _acknowledge_late(self) -> bool:
        """Whether what it has taken is told at the end of this turn, together with what it takes now."""
        return len(self._chunk) > 1 and self._terminal is None and self._telling is not None

    def _spoke(self, *, late: bool) -> None:
        """Something was said of all that it has taken: what it takes from now on is of the present opening."""
        if late:
            self._telling = self._account

    def _say(self, said: Said, current: int) -> None:
        self._finish_before(current)
        if self._telling is not None:
            for record in self._telling.records(current):
                setattr(record, said, getattr(record, said) + 1)
        self._finish(current)

    def _log_said(self, said: Said, events: int, reason: object, *, late: bool) -> None:
        """Write down what was said, for whoever reads the log."""
        assert self._acks is not None  # it was given something
        lines = self._acks.lines
        if late:
            lines.add("debug", "too late to say", subscriber=self._subscriber_id, events=events, said=said)
        elif said != "acked":
            lines.add("warning", f"events {said}", subscriber=self._subscriber_id, events=events, reason=reason)
        lines.write()

    def _some_current(self) -> int:
        if self._late_by:  # it has failed, but may be at its last event still, and say something of that
            self._finished -= self._late_by
            self._late_by = 0
        current = self._current()
        if not current:
            raise RuntimeError(f"{self!r} has no current event: speak of an event once, and before asking for the next")
        return current

    def _judge(self, said: Said, reason: object) -> None:
        current = self._some_current()
        late = self._late()
        self._say(said, current)
        self._spoke(late=late)
        self._log_said(said, current, reason, late=late)

    def _late(self) -> bool:
        """Whether what it says now makes no difference, for the upstream is gone."""
        return self._telling is None or self._acks is None or self._acks.dead

    def _put_off(self) -> Pending:
        current = self._some_current()
        assert self._acks is not None
        bound = self._acks.source.max_in_flight
        if self._deferred + current > bound:
            raise RuntimeError(
                f"{self!r} has deferred {self._deferred} events, and with {current} more exceeds max_in_flight={bound}: "
                "resolve some of them first"
            )
        late = self._late()
        self._finish_before(current)
        # Of events that have gone, there is nothing that could be noted anywhere.
        records = [Record(None)] * current if late or self._telling is None else self._telling.records(current)
        pending = Pending(self, self._acks, tuple(records), late=late)
        self._finish(current)
        self._spoke(late=late)
        return pending

    # What it takes.

    def _began(self) -> None:
        """It has taken something, and is busy with it."""
        self._taken_at = self._now()
        if not self._timing:
            self._time()

    def _time(self) -> None:
        assert self._deadline is not None
        self._timing = True
        self._deadline.start(self._taken_at)

    def _began_single(self) -> None:
        self._taken_last = 1
        self._began()
        if length_hint(self._ready):
            self._unsettled(self)

    def _begin_several(self, chunk: tuple[T_co, ...]) -> T_co:
        """Begin a chunk that is ready, of several events, and take the first; what it took before is told with that."""
        self._chunk = ()
        self._received += len(chunk)
        self._ready = ready = iter(chunk)
        self._taken_last = 1
        self._taken_at = self._now()
        if not self._timing:
            self._time()
        self._unsettled(self)
        return next(ready)

    def _began_batch(self) -> None:
        if length_hint(self._ready):
            self._put_back()
        self._taken_last = self._taken() - self._finished
        self._began()

    def _statistics(self) -> SubscriptionStatistics:
        return replace(super()._statistics(), events_current=self._current(), events_deferred=self._deferred)


def _never() -> float:
    return 0.0
