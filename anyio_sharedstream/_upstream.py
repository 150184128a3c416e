"""The upstream's side of a group: its openings, its ends, and what follows from them. No awaiting.

Relies on `_states` for which states there are and what may follow which, on `_publisher` for the subscribers and what they are
sent, and on `_epoch` for what became of an opening. The poll task (`_poll`) drives the upstream and calls in here; so do timers.

*Closing* and *evicted* are the same moment: the key is free, and its next subscriber starts another group, which waits until this
one has closed. Three things evict: a stop, the last subscriber gone (if nothing lingers), an end that no restart follows. The
first two are requests, and cancel the group's scope; after the third, subscribers stay until the upstream has closed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import Any, Protocol

from anyio import CancelScope, EndOfStream, Event, get_cancelled_exc_class

from anyio_sharedstream._clock import Clock
from anyio_sharedstream._epoch import Epoch, is_cancellation
from anyio_sharedstream._exceptions import UpstreamSilent, bare, without
from anyio_sharedstream._logging import Level, Lines, Log
from anyio_sharedstream._parking import Backend
from anyio_sharedstream._publisher import Publisher
from anyio_sharedstream._restarts import Restarts
from anyio_sharedstream._source import SharedSource
from anyio_sharedstream._states import Move, State, Stateful
from anyio_sharedstream._timers import make_timers

__all__ = ["RUNNING", "Owner", "Upstream"]

#: Where there is an upstream, and somebody for whom it runs.
RUNNING = {State.OPENING, State.LIVE}


class Owner(Protocol):
    """What a group knows of its manager."""

    log: Log
    clock: Clock

    def evicted(self, group: Any, /) -> None:
        """The group's key is free from now on."""

    def closed(self, group: Any, /) -> None:
        """The group's upstream has closed, and nothing of the group runs any more."""

    def abort(self, error: BaseException, /) -> None:
        """Stop everything, and let *error* leave the manager as itself."""


class Upstream(Stateful, ABC):
    """What a group is without its subscribers."""

    @abstractmethod
    def deserted(self) -> None:
        """Nobody is left."""

    @abstractmethod
    def lingered(self) -> None:
        """Nobody has come back in time."""

    def __init__(self, source: SharedSource[Any], owner: Owner, backend: Backend, earlier: Upstream | None) -> None:
        super().__init__(Lines(owner.log, source.key))
        self.key: Hashable = source.key
        self.source = source
        self.backend = backend
        self.earlier = earlier
        """the group of the same key that must close before this one opens"""
        self.stillborn = False
        """whether it was evicted while it waited, and so will never open"""
        self.scope = CancelScope()
        self.released = Event()
        """its upstream has closed, or has taken too long for that"""
        self._owner = owner
        self.publisher = self._make_publisher()
        self.current = self._make_epoch(1)
        self.hung: list[Epoch] = []
        """earlier openings that have yet to close, though another followed"""
        self.epoch = 0
        """how often the upstream has been opened: the current number or one less, but every leave asks for it"""
        self.reopen: Callable[[Epoch, float], object] | None = None
        """starts a poll task for another opening, after so many seconds"""
        self._restarts = None if source.restart is None else Restarts(source.restart, source.on_exhausted)
        self._last_error: BaseException | None = None
        self._left_with: BaseException | None = None  # what left the upstream, until that has been dealt with
        self._requested = False  # evicted by a request: what the upstream says afterwards is clean-up
        self.timers = make_timers(self, owner.clock)

    def _make_publisher(self) -> Publisher:
        return Publisher(self.source, self, self.backend)

    def _make_epoch(self, number: int) -> Epoch:
        return Epoch(number, watched=self.source.silence_timeout is not None)

    # Opening.

    def opening(self, epoch: Epoch) -> None:
        """The upstream is about to be opened, unless a logger ends it. Raises what the fold's ``initial`` raises."""
        self._go(Move.OPEN)
        epoch.opened = True
        self.epoch = epoch.number
        self.timers.opening()
        self.publisher.begin_history()
        self.lines.write()

    def live(self, epoch: Epoch) -> None:
        """The upstream can be driven, unless the group was evicted on the way."""
        if not epoch.over:
            epoch.live_at = self.backend.clock()
            self._go(Move.OPENED)
            self.lines.write()

    # Ending.

    def _evict(self) -> None:
        if self.evicted:
            return
        self.stillborn = self.state is State.WAITING
        if self.state is State.FAILING:
            self.publisher.history.running = True  # no other follows, so it is still of this upstream
        self._go(Move.END)
        self.current.over = True
        self.publisher.hold.end()
        self.timers.closing(self.current)
        self._owner.evicted(self)

    def iteration_ended(self, epoch: Epoch, reason: BaseException | None, *, final: bool) -> None:
        """Nothing more will come. What was gathered is published, and the key is free before the clean-up begins.

        Unless the upstream is to be opened again. That depends on what leaves it, so if there is something around the iteration
        that has a say in that (it is not *final*), the group stays meanwhile.
        """
        if epoch is self.current:
            self.publisher.flush()
        told = epoch.over
        epoch.ended_at = self.backend.clock()
        epoch.conclude(reason)
        if not told:
            if final and not is_cancellation(reason):
                self._decide(epoch, reason)
            self._begin_to_close(epoch)
            self.lines.write()

    def silent(self, epoch: Epoch) -> None:
        """Nothing has come for too long."""
        assert self.source.silence_timeout is not None
        epoch.ended_at = self.backend.clock()
        epoch.break_off(UpstreamSilent(self.key, self.source.silence_timeout))
        self._decide(epoch, None)
        self._begin_to_close(epoch)
        self.lines.write()

    def closing_late(self) -> None:
        """The upstream takes too long to close: whoever waits for that goes on."""
        epoch = self.current
        self.lines.add("warning", "clean-up takes too long", seconds=self.source.close_timeout)
        self.hung.append(epoch)
        self.timers.closed()
        if epoch.settled:
            self.released.set()
        else:
            self._settle(epoch, epoch.reason, surroundings_cancelled=False)
        self.lines.write()

    def upstream_closed(self, epoch: Epoch, error: BaseException | None, *, cancelled: bool) -> None:
        """The opened source has been left, with *error* if any.

        An end that is final is dealt with by `finish`, at the moment when nothing of the group runs any more; unless something
        does that takes too long to close.

        :param cancelled: whether all around is cancelled, which may be the reason. From in there, the group's own tasks look like
            everything around them.
        """
        if epoch.settled:
            if epoch in self.hung:
                self.hung.remove(epoch)
            self.clean_up_failed(None if error is epoch.reason else error)
            epoch.forget()
        else:
            self.publisher.flush()
            self.timers.closed()
            epoch.over = epoch.left = True
            if not epoch.decided and not cancelled:  # else it cannot be opened again
                self._decide(epoch, error)
            if self.hung or (epoch.delay is not None and not self.evicted):
                self._settle(epoch, error, surroundings_cancelled=cancelled)
            else:
                self._left_with = error
                self._evict()
        self.lines.write()

    def finish(self, *, surroundings_cancelled: bool) -> None:
        """Nothing of the group runs any more."""
        epoch = self.current
        if not epoch.settled:
            # If its poll task never had a first step, somebody has cancelled that by its name.
            error = self._left_with if epoch.left else get_cancelled_exc_class()()
            self._left_with = None
            self._settle(epoch, error, surroundings_cancelled=surroundings_cancelled)
        self.reopen = None
        self.lines.write()

    def _decide(self, epoch: Epoch, error: BaseException | None) -> None:
        """Find what is wrong with the upstream, and whether that means to open it again."""
        epoch.end(error)
        final = self.evicted or self._requested or self.publisher.unfit or not self.publisher.members
        if self._restarts is not None and epoch.opened and not final:
            self._restarts.consider(epoch, self.key, self.backend.clock())

    def _begin_to_close(self, epoch: Epoch) -> None:
        """Nothing is wanted of the upstream any more: free the key, unless the upstream is to be opened again, or may be."""
        undecided = self._restarts is not None and not epoch.decided and not self.publisher.unfit
        if self.state in RUNNING and (undecided or epoch.delay is not None):
            self._fail_over(epoch)
        else:
            self._evict()

    def _fail_over(self, epoch: Epoch) -> None:
        self._go(Move.FAIL)
        epoch.failed = True
        self.publisher.end_history()
        self.timers.closing(epoch)

    def _settle(self, epoch: Epoch, error: BaseException | None, *, surroundings_cancelled: bool) -> None:
        """Go by the end of the upstream: open it again, or tell those who are still here."""
        epoch.over = epoch.settled = True
        if surroundings_cancelled and epoch.nothing_wrong(error):
            self._requested = True  # what surrounds the manager ends everything in it
            epoch.failed = False  # it was to be seen whether it had
        if not epoch.decided:
            self._decide(epoch, error)
        if self._requested:
            self._evict()
            self.publisher.dismiss(EndOfStream())
            if epoch.failed:
                self._poll_failed(epoch, "warning")  # which was its own doing, before it was stopped
            else:
                self.clean_up_failed(epoch.failure)
        elif epoch.delay is not None and not self.evicted:
            self._restart(epoch, epoch.delay)
        else:
            self._conclude(epoch)
        if epoch.broken_off and error is not epoch.reason:
            self.clean_up_failed(error)
        if self.evicted and self.hung:
            self.released.set()
        if epoch not in self.hung:
            epoch.forget()

    def _restart(self, epoch: Epoch, delay: float) -> None:
        """Open the upstream again, in a while."""
        assert self.reopen is not None
        if self.state is not State.FAILING:
            self._fail_over(epoch)
        self._go(Move.BACK_OFF)
        self.publisher.interrupt()
        self._poll_failed(epoch, "warning", restart_in=delay)
        self.current = self._make_epoch(epoch.number + 1)
        self.reopen(self.current, delay)

    def _conclude(self, epoch: Epoch) -> None:
        """Tell everyone that this is the end."""
        self._evict()
        if epoch.returned and self.source.on_exhausted == "end":
            self.publisher.dismiss(EndOfStream())
            return
        self.publisher.dismiss(self._poll_failed(epoch, "error"))
        if epoch.failure is not None and not isinstance(epoch.failure, Exception):
            self.abort(epoch.failure)

    def _poll_failed(self, epoch: Epoch, level: Level, **values: object) -> Exception:
        terminal = epoch.terminal(self.key)
        self._last_error = bare(terminal)
        self.lines.add(level, "poll failed", exc_info=terminal, **values)
        return terminal

    def clean_up_failed(self, error: BaseException | None) -> None:
        """Report what was raised while the upstream was being closed, cancellations aside."""
        # A generator that was closed while it held a task group over its yield leaves its GeneratorExit in a group.
        failure = without(error, get_cancelled_exc_class(), GeneratorExit)
        if isinstance(failure, Exception):
            self.lines.add("error", "clean-up failed", exc_info=failure)
        elif failure is not None:
            self.abort(failure)

    def close(self) -> None:
        """Nothing of the group runs any more: later groups of the key may open, if they have not yet."""
        self.timers.close()
        self.released.set()
        self._owner.closed(self)
        self.lines.add("info", "group stopped")
        self.lines.write()

    def abort(self, error: BaseException) -> None:
        self._owner.abort(error)
