"""What was deferred: events of which somebody will say later what became of them.

Relies on nothing but its opening (`_advancing`), which is told. A `Pending` may be resolved by any task, also when the subscriber
has left long ago, and may be forgotten; then nobody knows what became of its events, which is a failure like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal, Protocol

__all__ = ["Pending", "Said"]

#: What may be said of events, as the records call it.
Said = Literal["acked", "failed", "rejected"]

_VERBS: dict[Said, str] = {"acked": "acknowledged", "failed": "failed", "rejected": "rejected"}


class Deferrer(Protocol):
    """What a `Pending` knows of its subscriber."""

    _deferred: int

    def _log_said(self, said: Said, events: int, reason: object, *, late: bool) -> None:
        """Write down what was said."""


class Opening(Protocol):
    """What a `Pending` knows of the opening that its events are of."""

    dead: bool
    deferred: int
    call_soon: Callable[[Callable[[], object]], object]

    def said(self, records: Sequence[Any], /) -> None:
        """Somebody who had deferred these events has said what became of them."""


class Pending:
    """Events that were deferred; made by `AckSubscription.defer`. Exactly one of its methods is to be called, once.

    They are synchronous, and may be called from any task of the event loop, also after the subscriber has left. After the
    upstream has failed they mean nothing any more, for the broker delivers again, and do no harm. A `Pending` that nobody holds
    any more counts as failed, and a warning is logged.
    """

    __slots__ = ("_acks", "_deferrer", "_late", "_records", "_said")

    def __init__(self, deferrer: Deferrer, acks: Opening, records: Sequence[Any], *, late: bool) -> None:
        self._deferrer = deferrer
        self._acks = acks
        self._late = late
        self._records: Sequence[Any] = records
        self._said: Said | None = None
        deferrer._deferred += len(records)
        if not late:
            acks.deferred += len(records)
            for record in records:
                record.unresolved += 1

    def ack(self) -> None:
        """Say that the events have been handled.

        :raises RuntimeError: something was said of them before
        """
        self._resolve("acked", None)

    def reject(self, reason: object = None) -> None:
        """Say that nobody will ever be able to use the events; a producer may put them aside.

        :param reason: is logged
        :raises RuntimeError: something was said of them before
        """
        self._resolve("rejected", reason)

    def fail(self, reason: object = None) -> None:
        """Say that the events have not been handled; a producer may have them delivered again.

        :param reason: is logged
        :raises RuntimeError: something was said of them before
        """
        self._resolve("failed", reason)

    def _resolve(self, said: Said, reason: object) -> None:
        if self._said is not None:
            raise RuntimeError(f"this Pending was {_VERBS[self._said]} before: it cannot be {_VERBS[said]} now")
        self._said = said
        records, self._records = self._records, ()
        _resolved(self._deferrer, None if self._late else self._acks, records, said, reason)

    def __repr__(self) -> str:
        return f"<Pending of {self._deferrer!r}: {'unresolved' if self._said is None else _VERBS[self._said]}>"

    def __del__(self) -> None:
        # This may run on any thread, and in the middle of any change of state: it must do no more than have something done later.
        if getattr(self, "_records", ()):
            acks = None if self._late else self._acks
            forgotten = partial(_resolved, self._deferrer, acks, self._records, "failed", "its Pending was forgotten")
            with suppress(RuntimeError):  # the event loop has ended, and with it all that could be told
                self._acks.call_soon(forgotten)


def _resolved(deferrer: Deferrer, acks: Opening | None, records: Sequence[Any], said: Said, reason: object) -> None:
    deferrer._deferred -= len(records)
    late = acks is None or acks.dead
    if acks is not None and not acks.dead:
        if said != "acked":
            for record in records:
                setattr(record, said, getattr(record, said) + 1)
        acks.said(records)
    deferrer._log_said(said, len(records), reason, late=late)
