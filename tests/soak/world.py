"""What is shared by everybody in a soak: its dice, what was counted, what is watched, and the first promise that was broken.

Relies on anyio's clock, which is virtual. A broken promise is recorded and ends the soak: raised where it is found, it might be
taken for the failure of a source, which is the library's business to deal with.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from random import Random
from typing import Any

import anyio
import structlog
from anyio import current_time
from anyio.abc import TaskGroup

from anyio_sharedstream import SharedStreamManager

#: Seconds between two looks at what is watched.
LOOK = 20.0
#: Seconds in which whatever waits for an upstream to close must have come back: the longest clean-ups, one behind the other.
SOON = 600.0


class BrokenPromiseError(AssertionError):
    """What was promised is not so; says when that was found."""


class CrashError(Exception):
    """What a consumer's body raises."""


class Fatal(BaseException):
    """What an upstream raises that is no `Exception`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much there is in a round."""

    keys: int  # at once
    actors: int  # consumers at once, each of which is followed by another
    triggers: int  # at once
    seconds: float  # for how long a wave comes in
    waves: int


@dataclass(slots=True)
class Tally:
    """What was counted in all rounds."""

    done: Counter[str] = field(default_factory=Counter)  # what was done, by kind
    faults: Counter[str] = field(default_factory=Counter)  # what went wrong on purpose, by kind
    checked: Counter[str] = field(default_factory=Counter)  # how often each promise was checked
    logged: Counter[str] = field(default_factory=Counter)  # the library's log lines, by what they say
    seconds: float = 0.0  # of virtual time
    most: int = 0  # subscribers at once

    def __str__(self) -> str:
        lines = [f"{self.seconds / 3600:.2f} virtual hours, up to {self.most:,} subscribers at once"]
        for title in ("done", "faults", "checked", "logged"):
            counted = getattr(self, title)
            lines += [f"  {title}:", *(f"    {counted[name]:>12,} {name}" for name in sorted(counted))]
        return "\n".join(lines)


class World:
    """What one round is played in."""

    manager: SharedStreamManager
    helpers: TaskGroup  # outlives the manager

    def __init__(self, tally: Tally, name: str) -> None:
        self.name = name
        self.tally = tally
        self.done, self.faults, self.checked = tally.done, tally.faults, tally.checked
        self.logged_of: Counter[tuple[str, object]] = Counter()  # the log lines of this wave, by what they say and the key
        self.broken: BrokenPromiseError | None = None
        self.everything = anyio.CancelScope()
        self.open_now = 0  # upstreams that are open
        self.ending = False  # whether nobody begins anything new
        self.interrupted = False
        """whether an upstream has raised what ends all others as well, at no time that anybody could tell"""
        self.doomed = False  # whether the next upstream that has something to yield raises what is no `Exception`
        self.lives = 0  # how many are there
        self.readers: dict[Any, None] = {}  # checkers of those who are there; each says so if it has been forgotten
        self._operations: dict[object, tuple[str, float]] = {}

    def dice(self, *name: object) -> Random:
        """Random numbers that depend on nothing but the seed, the round and the name."""
        return Random(f"{self.name} {name}")

    def start(self, function: Callable[..., Awaitable[object]], *args: object) -> None:
        """Have something done that must be over before it can be quiet."""

        async def live() -> None:
            try:
                await function(*args)
            finally:
                self.lives -= 1

        self.lives += 1
        self.helpers.start_soon(live)

    # Promises.

    def check(self, kept: object, promise: str, *details: object) -> None:
        """Count that a promise was checked, and end the soak if it is broken."""
        self.checked[promise] += 1
        if not kept and self.broken is None:
            where = f"{self.name}, at {current_time():.3f} seconds"
            self.broken = BrokenPromiseError(f"{promise} ({where}): {', '.join(map(repr, details))}")
            self.ending = True
            self.everything.cancel()

    @contextmanager
    def within(self, seconds: float, what: str) -> Iterator[None]:
        """What is done in here must be over in time."""
        operation, deadline = object(), current_time() + seconds
        self._operations[operation] = what, deadline
        try:
            yield
        finally:
            del self._operations[operation]
            self.check(current_time() <= deadline, "every operation ends in time", what, deadline)

    async def watch(self) -> None:
        """Look again and again whether anything takes too long, or was forgotten."""
        while True:
            await anyio.sleep(LOOK)
            self._look()

    def _look(self) -> None:
        gc.collect(1)  # here and not whenever Python likes: finalisers are to run at the same time in every run of a seed
        for what, deadline in self._operations.values():
            self.check(current_time() <= deadline, "every operation ends in time", what, deadline)
        members: dict[Hashable, set[Hashable]] = {}
        statistics = self.manager.statistics()
        for group in (*statistics.groups.values(), *statistics.closing):
            members.setdefault(group.key, set()).update(known.subscriber_id for known in group.subscriptions)
        self.tally.most = max(self.tally.most, sum(map(len, members.values())))
        for reader in list(self.readers):
            reader.look(members)

    async def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for something that must come about soon."""
        with self.within(SOON, what):
            while not condition():  # noqa: ASYNC110 (whoever brings it about is not to know)
                await anyio.sleep(1)

    def logger(self) -> Any:
        """A logger that counts lines, and formats them as far as anybody could ask for."""

        def count(_logger: Any, method: str, event: Any) -> Any:
            self.tally.logged[f"{method}: {event['event']}"] += 1
            self.logged_of[event["event"], event.get("key")] += 1
            assert repr(event)
            raise structlog.DropEvent

        return structlog.wrap_logger(None, processors=[count], wrapper_class=structlog.BoundLogger)


def expovariate(dice: Random, mean: float, most: float = inf) -> float:
    """So many seconds on average, and at most."""
    return min(most, dice.expovariate(1 / mean))
