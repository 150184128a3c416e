"""One opening of a group's upstream: how far it got, and how it ended.

Relies on `_exceptions`. An upstream ends twice: its iteration ends, and then, when everything is closed, it has been left. What
subscribers are told is what finally leaves it, for a context manager around the iteration may know the reason, or translate it;
and what the iteration ended with, if all that leaves it is the cancellation of its clean-up.
"""

from __future__ import annotations

from collections.abc import Hashable

from anyio import CancelScope, get_cancelled_exc_class

from anyio_sharedstream._exceptions import STREAM_SIGNALS, PollTerminated, consists_of, without

__all__ = ["Epoch", "is_cancellation"]


class Epoch:
    """What the poll task and the group know of one opening."""

    def __init__(self, number: int, *, watched: bool) -> None:
        self.number = number
        self.scope = CancelScope() if watched else None
        """what is cancelled to break it off, if there may be a reason for that"""
        self.opened = False
        """whether ``open`` has been called"""
        self.live_at: float | None = None
        """since when it has been driven, in the event loop's seconds"""
        self.ended_at: float | None = None
        """when it ended, apart from its clean-up"""
        self.failed = False
        """whether it ended by itself, and so that it might have been opened again"""
        self.over = False
        """whether nothing that it yields is wanted any more"""
        self.reason: BaseException | None = None
        """what the iteration has raised"""
        self.decided = False
        """whether it is known what is wrong with it"""
        self.returned = False
        """whether that is nothing, but that it is exhausted"""
        self.failure: BaseException | None = None
        """what is wrong with it, cancellations aside"""
        self.delay: float | None = None
        """after how many seconds it is to be opened again, if it is"""
        self.left = False
        """whether it has closed, and its end has yet to be dealt with or has been"""
        self.settled = False
        """whether its end has been dealt with, though it may not have closed yet"""
        self.broken_off = False
        """whether it was closed for a reason that is none of its iteration's"""
        self._concluded = False  # the iteration has ended for a reason of its own
        self._error: BaseException | None = None

    @property
    def closing(self) -> bool:
        """Whether nothing is expected of it any more but that it closes; asked once it is `over`."""
        return self.opened and not self.left and not self.settled

    def conclude(self, reason: BaseException | None) -> None:
        """The iteration has ended: with this exception, or it is exhausted."""
        self.over = True
        if not self.broken_off and not self.settled:
            self._concluded = not is_cancellation(reason)
            self.reason = reason

    def break_off(self, error: BaseException) -> None:
        """It cannot go on, for this reason: whatever it says from now on is clean-up."""
        self.over = self.broken_off = self._concluded = True
        self.reason = error
        assert self.scope is not None
        self.scope.cancel()

    def end(self, error: BaseException | None) -> None:
        """What is wrong with it is *error*, or nothing if that is None."""
        self.decided = True
        self._error = error = self._of_its_own(error)
        self.returned = error is None
        self.failure = without(error, get_cancelled_exc_class())

    def nothing_wrong(self, error: BaseException | None) -> bool:
        """Whether *error* says no more than that it was cancelled."""
        return without(self._of_its_own(error), get_cancelled_exc_class()) is None

    def _of_its_own(self, error: BaseException | None) -> BaseException | None:
        # If all that is left is a cancellation, only the clean-up was cut short.
        return self.reason if self.broken_off or (self._concluded and is_cancellation(error)) else error

    def terminal(self, key: Hashable) -> Exception:
        """What subscribers are told of it."""
        failure = self.failure
        if isinstance(failure, Exception) and not isinstance(failure, STREAM_SIGNALS):
            return failure
        if self.returned:
            reason = "it returned, and a source runs until it is cancelled"
        elif failure is None:
            reason = "it was cancelled, and nobody had asked for that"
        else:
            reason = f"it raised {type(failure).__name__}"
        terminated = PollTerminated(key, reason)
        terminated.__cause__ = self.reason if self._error is None else self._error
        return terminated

    def forget(self) -> None:
        """Let go of the exceptions: with their tracebacks they keep alive whatever the source had in hand."""
        self.reason = self.failure = self._error = None


def is_cancellation(error: BaseException | None) -> bool:
    return consists_of(error, get_cancelled_exc_class())
