"""What a source may ask for beyond being opened and closed: the values, checked when they are made.

Relies on nothing. What they mean is done elsewhere: by the upstream's side of a group (`_upstream`, `_timers`, `_restarts`), and
by what it remembers (`_history`).
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypedDict

__all__ = ["Fold", "OnExhausted", "Restart", "SourcePolicies", "check_count", "check_function", "check_policies", "check_seconds"]

OnExhausted: TypeAlias = Literal["fail", "end", "restart"]
"""What an upstream that returns means: `PollTerminated`, the end of the stream, or that it is to be opened again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """Open a failed upstream again, after a delay that grows; subscribers stay meanwhile.

    The first delay is *initial_delay*, each further one *factor* times longer, up to *max_delay*. An upstream that was live for
    longer than *max_delay* was healthy, and the delays begin anew. The scheme is that of Pekko's ``RestartSource``.

    :raises ValueError: a number is out of range
    :raises TypeError: *on* is neither a type of exception, nor a tuple of them, nor a function
    """

    initial_delay: float = 0.1
    """seconds before the upstream is opened again for the first time"""
    max_delay: float = 30.0
    """seconds that no delay exceeds"""
    factor: float = 2.0
    """by how much each delay is longer than the one before"""
    jitter: float = 0.1
    """By which part a delay may be shorter, at random, between 0 and 1: what failed together does not come back together."""
    max_restarts: int | None = None
    """how many restarts there may be *within* so many seconds; the error after that is final. None for as many as it takes"""
    within: float = 60.0
    """seconds; `math.inf` allowed"""
    on: type[BaseException] | tuple[type[BaseException], ...] | Callable[[Exception], object] = Exception
    """Which errors to restart after: types, or a function of the error. A group of exceptions is of a type if all its members
    are. What is no `Exception` is always final, and so is what ``route_by`` and a fold's functions raise."""

    def __post_init__(self) -> None:
        check_seconds("initial_delay", self.initial_delay, zero=True)
        check_seconds("max_delay", self.max_delay, zero=True)
        check_seconds("within", self.within, infinite=True)
        if self.initial_delay > self.max_delay:
            raise ValueError(f"initial_delay={self.initial_delay!r} must not be longer than max_delay={self.max_delay!r}")
        if not _is_number(self.factor) or not 1 <= self.factor <= sys.float_info.max:
            raise ValueError(f"factor must be a number of at least 1, not {self.factor!r}")
        if not _is_number(self.jitter) or not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter must be a number between 0 and 1, not {self.jitter!r}")
        if self.max_restarts is not None:
            check_count("max_restarts", self.max_restarts, least=0)
        if not _are_exceptions(self.on):
            wanted = "an exception type, a tuple of them, or a function of an exception"
            if isinstance(self.on, type):
                raise TypeError(f"on must be {wanted}, not {self.on!r}")
            check_function("on", self.on, wanted)


@dataclass(frozen=True, slots=True)
class Fold:
    """A state that the group keeps: *initial*, and then ``step(state, event)`` of every event.

    A joiner that asks for ``snapshot=True`` receives the state first. The library hands states around as they are: it neither
    changes nor copies them, so *step* should return a new one, or every holder of a `Snapshot` sees it change.

    :raises TypeError: *step* cannot be called, or *step* or *initial* must be awaited
    """

    initial: Any
    """the state before the first event; if it can be called, what it returns, called at every opening of the upstream"""
    step: Callable[[Any, Any], Any]
    """makes the next state; what it raises is a failure of the upstream, and final"""

    def __post_init__(self) -> None:
        check_function("step", self.step, "a function of a state and an event")
        if must_be_awaited(self.initial):
            raise TypeError(f"initial must be a state or a function that returns one, not {self.initial!r}")


class SourcePolicies(TypedDict, total=False):
    """The policies of a source, as `SharedSource` takes and describes them."""

    route_by: Callable[[Any], Hashable] | None
    linger: float
    cohort_grace: float | None
    min_subscribers: int
    restart: Restart | None
    on_exhausted: OnExhausted
    replay: int
    replay_max_age: float | None
    fold: Fold | None
    silence_timeout: float | None
    close_timeout: float | None


def check_policies(policies: Mapping[str, Any]) -> None:
    """Raise what is wrong with policies, each and together; all of them must be given."""
    if policies["route_by"] is not None:
        check_function("route_by", policies["route_by"], "a function of an event")
    check_seconds("linger", policies["linger"], zero=True, infinite=True)
    check_count("min_subscribers", policies["min_subscribers"], least=1)
    check_count("replay", policies["replay"], least=0, most=sys.maxsize)
    for name, zero in (("cohort_grace", True), ("close_timeout", True), ("replay_max_age", False), ("silence_timeout", False)):
        if policies[name] is not None:
            check_seconds(name, policies[name], zero=zero)
    for name, kind in (("restart", Restart), ("fold", Fold)):
        if not isinstance(policies[name], kind | None):
            raise TypeError(f"{name} must be a {kind.__name__}, not {policies[name]!r}")
    _check_together(policies)


def _check_together(policies: Mapping[str, Any]) -> None:
    if policies["on_exhausted"] not in ("fail", "end", "restart"):
        raise ValueError(f'on_exhausted must be "fail", "end" or "restart", not {policies["on_exhausted"]!r}')
    if policies["on_exhausted"] == "restart" and policies["restart"] is None:
        raise ValueError('on_exhausted="restart" needs restart=Restart(), which says how')
    if policies["replay_max_age"] is not None and not policies["replay"]:
        raise ValueError(f"replay_max_age={policies['replay_max_age']!r} needs replay=, the number of events")


def check_seconds(name: str, value: Any, *, zero: bool = False, infinite: bool = False) -> None:
    """Raise what is wrong with a time."""
    fits = _is_number(value) and (value > 0 or (zero and value == 0))
    # No clock can add an integer to its time that is larger than any float.
    if not fits or (value > sys.float_info.max and not (infinite and value == math.inf)):
        wanted = "a number of seconds, zero or more" if zero else "a positive number of seconds"
        raise ValueError(f"{name} must be {wanted}{' or math.inf' if infinite else ''}, not {value!r}")


def check_count(name: str, value: object, *, least: int, most: float = math.inf) -> None:
    """Raise what is wrong with a number of things."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")


def check_function(name: str, value: object, wanted: str) -> None:
    """Raise what is wrong with a function that is called where nobody can wait."""
    if not callable(value) or must_be_awaited(value):
        raise TypeError(f"{name} must be {wanted}, not {value!r}")


def must_be_awaited(value: object) -> bool:
    """Whether it is an asynchronous function, or an object that is called like one."""
    functions = (value, getattr(type(value), "__call__", None))  # noqa: B004  # not whether, but what
    return any(inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function) for function in functions)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_exceptions(value: object) -> bool:
    kinds = value if isinstance(value, tuple) else (value,)
    return bool(kinds) and all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds)
