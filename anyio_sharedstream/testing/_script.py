"""`ScriptedSource`: a source that plays a script, and remembers what was done with it.

Relies on the public names of the package alone: what it gives is a `SharedSource` like any other.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, AsyncIterator, Hashable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Unpack

import anyio

from anyio_sharedstream import SharedSource
from anyio_sharedstream._lifecycle import SourcePolicies

__all__ = ["End", "Gate", "Pause", "Raise", "ScriptedSource", "Steps"]


class Gate(Protocol):
    """What a `Pause` can wait for: an `anyio.Event`, or anything else with such a method."""

    async def wait(self) -> object:
        """Return when the gate is open."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait: for so many seconds, or until a gate is opened, for instance an `anyio.Event` set."""

    until: float | Gate
    """seconds, or a gate"""

    def __post_init__(self) -> None:
        """Raise what is wrong with it here, for in an upstream it would look like one that has failed."""
        if isinstance(self.until, int | float):
            if not self.until >= 0:
                raise ValueError(f"a pause is at least 0 seconds long, not {self.until!r}")
        elif isinstance(self.until, type | threading.Event) or not hasattr(self.until, "wait"):
            raise TypeError(
                f"a pause is a number of seconds, or waits for something with an asynchronous wait(), not for {self.until!r}"
            )


@dataclass(frozen=True, slots=True)
class Raise:
    """Fail with this exception."""

    error: BaseException
    """the instance that is raised, each time without the traceback of the time before"""

    def __post_init__(self) -> None:
        """Raise what is wrong with it here, and not in an upstream."""
        if not isinstance(self.error, BaseException):
            raise TypeError(f"Raise takes an instance of an exception, not {self.error!r}")


@dataclass(frozen=True, slots=True)
class End:
    """Return: the upstream is exhausted."""


#: What is done while an upstream opens or closes: pauses and errors, one or several.
Steps = Pause | Raise | Sequence[Pause | Raise]


@dataclass(frozen=True, slots=True)
class _Script:
    events: tuple[Any, ...]
    opening: Steps
    closing: Steps


class ScriptedSource:
    """A source that plays a script, and remembers how often it was opened and closed.

    A script is a sequence of events and of `Pause`, `Raise` and `End`; whatever is none of these three is an event. When it is
    over, the upstream stays open without another event, until it is cancelled. Events that no pause stands between are yielded
    without giving the event loop a turn.

    The first opening plays the script that is given here, each further one the next of those added with `then`; when there are
    none left, the last is played again.

    :param events: the script of the first opening
    :param opening: what is done before the upstream is open: pauses and errors
    :param closing: what is done while it closes. This cannot be cancelled (it is shielded), as a clean-up that takes its time.
        The upstream counts as closed afterwards, also if it raises
    :param key: the key of the source; None for one that no other source has
    :raises TypeError: there is something other than pauses and errors in *opening* or *closing*, or a class for a step
    """

    def __init__(self, *events: Any, opening: Steps = (), closing: Steps = (), key: Hashable | None = None) -> None:
        self.key: Hashable = self if key is None else key
        """the key of the source"""
        self.opened: int = 0
        """how often it was opened; failed openings count"""
        self.closed: int = 0
        """how often it was closed; failed openings and failed closings count"""
        self.most_open: int = 0
        """how many were open at once, at most"""
        self.yielded: int = 0
        """how many events it has given"""
        self._scripts: list[_Script] = []
        self.then(*events, opening=opening, closing=closing)

    def then(self, *events: Any, opening: Steps = (), closing: Steps = ()) -> ScriptedSource:
        """Add the script of the next opening; returns the source itself, so that calls can be chained."""
        for event in events:
            if isinstance(event, type) and issubclass(event, Pause | Raise | End):
                raise TypeError(f"{event.__name__} is a class, and no step of a script: write {event.__name__}(...)")
        self._scripts.append(_Script(events, _checked(opening), _checked(closing)))
        return self

    @property
    def open_now(self) -> int:
        """how many are open now"""
        return self.opened - self.closed

    def source(self, **policies: Unpack[SourcePolicies]) -> SharedSource[Any]:
        """Give the source to subscribe to, with policies as `SharedSource` takes them."""
        return SharedSource(key=self.key, open=self._open, **policies)

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[AsyncIterator[Any]]:
        script = self._scripts[min(self.opened, len(self._scripts) - 1)]
        self.opened += 1
        self.most_open = max(self.most_open, self.open_now)
        try:
            await _take(script.opening)
            try:
                async with aclosing(self._play(script)) as events:
                    yield events
            finally:
                with anyio.CancelScope(shield=True):
                    await _take(script.closing)
        finally:
            self.closed += 1

    async def _play(self, script: _Script) -> AsyncGenerator[Any, None]:
        for step in script.events:
            if isinstance(step, End):
                return
            if isinstance(step, Pause | Raise):
                await _take(step)
            else:
                self.yielded += 1
                yield step
        await anyio.sleep_forever()


def _checked(steps: Steps) -> Steps:
    given = _sequence(steps)
    for step in given if isinstance(given, Sequence) else [given]:
        if not isinstance(step, Pause | Raise):
            raise TypeError(f"opening and closing are made of Pause and Raise, not of {step!r}")
    return steps


def _sequence(steps: Steps) -> Sequence[Pause | Raise]:
    return (steps,) if isinstance(steps, Pause | Raise) else steps


async def _take(steps: Steps) -> None:
    for step in _sequence(steps):
        if isinstance(step, Raise):
            raise step.error.with_traceback(None)
        if isinstance(step.until, int | float):
            await anyio.sleep(step.until)
        else:
            await step.until.wait()
