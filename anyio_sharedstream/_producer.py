"""What acknowledgement is about: a producer, the payloads by which its broker knows an event, and what became of each.

Relies on `_source`. The vocabulary is that of the shared-stream producers of Apache Airflow, which work here as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar, Unpack

from anyio_sharedstream._lifecycle import Restart, SourcePolicies, check_count, check_function, check_seconds
from anyio_sharedstream._source import POLICIES, SharedSource

__all__ = ["AckPolicies", "AckSource", "AdvanceItem", "AdvanceOutcome", "SharedStreamProducer"]

T_co = TypeVar("T_co", covariant=True)
P = TypeVar("P")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvanceOutcome:
    """How many subscribers have said what of an event; those count that were there when it was published."""

    acked: int
    """have finished it, or had refused it with ``where`` or ``routes``"""
    failed: int
    """have failed: raised, timed out, or said so"""
    rejected: int
    """have said that nobody will ever be able to use it"""
    released: int
    """have left without taking it"""

    @property
    def is_clean(self) -> bool:
        """Whether somebody has acknowledged it, and nobody has failed or rejected it."""
        return self.acked > 0 and self.failed == 0 and self.rejected == 0


class AdvanceItem(NamedTuple, Generic[P]):
    """An event that everybody is done with."""

    broker_payload: P
    """by which the broker knows it, as `SharedStreamProducer.open_stream` gave it"""
    outcome: AdvanceOutcome
    """what became of it"""


class SharedStreamProducer(ABC, Generic[T_co, P]):
    """Reads from a broker, and tells it how far everybody has come. Any object with these methods will do."""

    @abstractmethod
    def open_stream(self) -> AsyncIterator[tuple[T_co, P]]:
        """Yield each event with what the broker knows it by: an offset, a message id; usually an async generator."""

    @abstractmethod
    async def advance(self, batch: Sequence[AdvanceItem[P]]) -> None:
        """Tell the broker of events that everybody is done with: a run in the order of publication within one lane.

        Called for one batch of a lane after the other, and for several lanes side by side. What it raises is tried again, as the
        source's ``advance_retry`` says, and in the end is a failure of the upstream.
        """

    def get_advance_lane(self, broker_payload: P) -> Hashable:
        """Return what the events of one order have in common, such as a partition; by default all are of one lane."""
        return None

    async def aclose(self) -> None:
        """Close what `open_stream` does not close by itself; called last of all."""


class Producer(Protocol[T_co]):
    """What a producer must have; `SharedStreamProducer` says what each method is for, and has two more that it may have."""

    def open_stream(self) -> AsyncIterable[tuple[T_co, Any]]:
        """See `SharedStreamProducer.open_stream`."""
        ...

    def advance(self, batch: Any, /) -> Awaitable[object]:
        """See `SharedStreamProducer.advance`."""
        ...


#: What `AckSource` does unless it is told otherwise: some tries, and then it is a failure.
ADVANCE_RETRY = Restart(initial_delay=0.1, max_delay=5.0, max_restarts=5)

#: What there is besides the policies of every source.
_OWN = ("ack_timeout", "max_in_flight", "max_concurrent_advances", "drain_timeout", "advance_retry")


class AckPolicies(SourcePolicies, total=False):
    """The policies of an acknowledged source, as `AckSource` takes and describes them."""

    ack_timeout: float
    max_in_flight: int
    max_concurrent_advances: int
    drain_timeout: float
    advance_retry: Restart | None


@dataclass(frozen=True, init=False, repr=False)
class AckSource(SharedSource[T_co]):
    """A source whose events go back to a broker when every subscriber is done with them; `subscribe` gives an `AckSubscription`.

    Takes the policies of `SharedSource`, but for ``replay``, ``replay_max_age`` and ``fold``: an event that is given again to
    somebody who came later could not be acknowledged twice. ``restart`` and ``on_exhausted`` open a new producer each time.

    :param create_producer: called without arguments, once per opening, in the manager's tasks and context; returns a
        `SharedStreamProducer`, or any object with its methods
    :param ack_timeout: for how many seconds a subscriber may be busy with an event that it has taken, or stand at the oldest
        event while there is no room for others, before it fails with `AckTimeout`; `math.inf` allowed
    :param max_in_flight: how many events may be published and not yet advanced; the upstream waits beyond that
    :param max_concurrent_advances: how many lanes may be advanced at once
    :param drain_timeout: for how many seconds, at the end, what is on its way is waited for
    :param advance_retry: whether and when ``advance`` is tried again; None for never
    :raises ValueError: the key is None, a number is out of range, or a policy makes no sense here
    :raises TypeError: the key is not hashable, *create_producer* cannot be called, or a policy is of the wrong kind
    """

    _policies: ClassVar[tuple[str, ...]] = (*POLICIES, *_OWN)

    ack_timeout: float
    """seconds that a subscriber may be busy with an event"""
    max_in_flight: int
    """how many events may be published and not yet advanced"""
    max_concurrent_advances: int
    """how many lanes may be advanced at once"""
    drain_timeout: float
    """seconds for which, at the end, what is on its way is waited for"""
    advance_retry: Restart | None
    """whether and when ``advance`` is tried again"""

    def __init__(
        self,
        key: Hashable,
        create_producer: Callable[[], Producer[T_co]],
        *,
        ack_timeout: float = 300.0,
        max_in_flight: int = 1024,
        max_concurrent_advances: int = 8,
        drain_timeout: float = 30.0,
        advance_retry: Restart | None = ADVANCE_RETRY,
        **policies: Unpack[SourcePolicies],
    ) -> None:
        for name in ("replay", "replay_max_age", "fold"):
            if policies.get(name):
                raise ValueError(f"an acknowledged source cannot have {name}={policies.get(name)!r}: each event is given once")
        check_function("create_producer", create_producer, "a function without arguments that returns a producer")
        check_seconds("ack_timeout", ack_timeout, infinite=True)
        check_count("max_in_flight", max_in_flight, least=1)
        check_count("max_concurrent_advances", max_concurrent_advances, least=1)
        check_seconds("drain_timeout", drain_timeout, zero=True)
        if not isinstance(advance_retry, Restart | None):
            raise TypeError(f"advance_retry must be a Restart, not {advance_retry!r}")
        producer: Any = create_producer
        super().__init__(key=key, open=producer, **policies)
        own = (ack_timeout, max_in_flight, max_concurrent_advances, drain_timeout, advance_retry)
        for name, value in (*zip(_OWN, own, strict=True), ("_plain", False)):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"AckSource({self.key!r}, {self.open!r})"
