"""One group: everything that exists for one key while its upstream lives. Its state, and no awaiting.

Relies on `_publisher` for the subscribers and what they are sent. The poll task (`_poll`) drives the upstream and calls in here;
subscribers call in here through the manager and their subscriptions. Every method is synchronous, so whatever one of them decides
is done before any other task can look. A group's states have exactly these ways on::

    waiting --> opening --> live --> closing
       |           |                  ^
       +-----------+------------------+

*Closing* and *evicted* are the same moment: the key is free, and the next subscriber of the key starts a group of its own, which
waits until this one has closed. Three things evict: the last subscriber leaves or fails, a stop, the end of the iteration. The
first two are requests, and also cancel the group's scope; after the third, subscribers stay until the upstream has closed, for
what they are told is what finally leaves it.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

from anyio import CancelScope, EndOfStream, Event, get_cancelled_exc_class

from anyio_sharedstream._exceptions import STREAM_SIGNALS, PollTerminated, consists_of, without
from anyio_sharedstream._logging import Level, Log
from anyio_sharedstream._mailbox import Mailbox
from anyio_sharedstream._parking import Backend
from anyio_sharedstream._publisher import Publisher
from anyio_sharedstream._source import SharedSource
from anyio_sharedstream._statistics import GroupState, GroupStatistics

__all__ = ["Group", "Owner"]


class Owner(Protocol):
    """What a group knows of its manager."""

    log: Log

    def evicted(self, group: Group, /) -> None:
        """The group's key is free from now on."""

    def closed(self, group: Group, /) -> None:
        """The group's upstream has closed, and nothing of the group runs any more."""

    def abort(self, error: BaseException, /) -> None:
        """Stop everything, and let *error* leave the manager as itself."""


class Group:
    """The subscribers of one key, what they are sent, and how it ends."""

    def __init__(self, source: SharedSource[Any], owner: Owner, backend: Backend, earlier: Group | None) -> None:
        self.key: Hashable = source.key
        self.source = source
        self.backend = backend
        self.earlier = earlier
        """the group of the same key that must close before this one opens"""
        self.stillborn = False
        """whether it was evicted while it waited, and so will never open"""
        self.state: GroupState = "waiting"
        self.scope = CancelScope()
        self.closed = Event()
        self.publisher = Publisher(source, self, backend)
        self._owner = owner
        self._requested = False  # evicted by a request: what the upstream says afterwards is clean-up
        self._concluded = False  # the iteration ended for a reason of its own, which is `_failure` if it raised
        self._failure: BaseException | None = None
        self._returned = False  # the upstream has closed without an error; else `_error` is what finally left it, if it ever ran
        self._error: BaseException | None = None

    # Subscribers.

    @property
    def evicted(self) -> bool:
        return self.state == "closing"

    def join(self, mailbox: Mailbox[Any]) -> None:
        self.publisher.add(mailbox)

    def leave(self, mailbox: Mailbox[Any]) -> bool:
        """Unregister; True if that leaves nobody, which cancels the upstream."""
        if not self.publisher.remove(mailbox) or self.publisher.members:
            return False
        self._cancel()
        return True

    def deserted(self) -> None:
        self._cancel()

    # Opening and ending.

    def advance(self, state: GroupState) -> None:
        """Go on to "opening" or "live", unless the group was evicted on the way."""
        if not self.evicted:
            self.state = state

    def stop(self) -> None:
        """End on request: subscribers receive what was published, then the end of the stream, and the upstream is cancelled.

        A group that is closing because its upstream has failed still tells its subscribers so; its clean-up is cancelled.
        """
        self.publisher.flush(turn_ends=False)
        self._cancel()
        if self._requested:
            self.publisher.dismiss(EndOfStream())

    def _cancel(self) -> None:
        self.scope.cancel()
        self._requested = self._requested or not self.evicted
        self._evict()

    def _evict(self) -> None:
        if not self.evicted:
            self.stillborn = self.state == "waiting"
            self.state = "closing"
            self.publisher.hold.end()
            self._owner.evicted(self)

    def iteration_ended(self, failure: BaseException | None) -> None:
        """Nothing more will come. What was gathered is published, and the key is free before the clean-up begins."""
        self.publisher.flush()
        self._concluded = not _is_cancellation(failure)
        self._failure = failure
        self._evict()

    def upstream_closed(self, error: BaseException | None) -> None:
        """The opened source has been left, with *error* if any."""
        self._returned = error is None
        self._error = error
        self.publisher.flush()
        self._evict()

    def finish(self, *, surroundings_cancelled: bool) -> None:
        """Nothing of the group runs any more: tell those who are still here."""
        self._evict()
        error = self._error
        if _is_cancellation(error) and self._concluded:
            error = self._failure  # only the clean-up was cut short
        failure = without(error, get_cancelled_exc_class())
        if failure is None and surroundings_cancelled:
            self._requested = True  # what surrounds the manager ends everything in it
        if self._requested:
            self.publisher.dismiss(EndOfStream())
            self.clean_up_failed(failure)
        else:
            terminal = self._terminal(error, failure)
            self.publisher.dismiss(terminal)
            self.log("error", "poll failed", exc_info=terminal)
            if failure is not None and not isinstance(failure, Exception):
                self.abort(failure)
        self._failure = self._error = None  # with their tracebacks they keep alive whatever the source had in hand

    def _terminal(self, error: BaseException | None, failure: BaseException | None) -> BaseException:
        if isinstance(failure, Exception) and not isinstance(failure, STREAM_SIGNALS):
            return failure
        if self._returned:
            reason = "it returned, and a source runs until it is cancelled"
        elif failure is None:
            reason = "it was cancelled, and nobody had asked for that"
        else:
            reason = f"it raised {type(failure).__name__}"
        terminated = PollTerminated(self.key, reason)
        terminated.__cause__ = self._failure if error is None else error
        return terminated

    def clean_up_failed(self, error: BaseException | None) -> None:
        """Report what was raised while the upstream was being closed, cancellations aside."""
        # A generator that was closed while it held a task group over its yield leaves its GeneratorExit in a group.
        failure = without(error, get_cancelled_exc_class(), GeneratorExit)
        if isinstance(failure, Exception):
            self.log("error", "clean-up failed", exc_info=failure)
        elif failure is not None:
            self.abort(failure)

    def started(self) -> None:
        self.log("info", "group started")

    def close(self) -> None:
        """Nothing of the group runs any more: later groups of the key may open."""
        self.closed.set()
        self._owner.closed(self)
        self.log("info", "group stopped")

    # Looking.

    def log(self, level: Level, event: str, /, **values: object) -> None:
        self._owner.log.write(level, event, key=self.key, **values)

    def abort(self, error: BaseException) -> None:
        self._owner.abort(error)

    def statistics(self) -> GroupStatistics:
        return GroupStatistics(
            key=self.key,
            state=self.state,
            events_published=self.publisher.published,
            subscriptions=self.publisher.statistics(),
        )


def _is_cancellation(error: BaseException | None) -> bool:
    return consists_of(error, get_cancelled_exc_class())
