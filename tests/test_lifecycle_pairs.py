"""Policies of a source together: every two of them in one story, every end in every state, and all that can meet in one tick."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import combinations
from math import inf
from typing import Any

import anyio
import pytest
from anyio.abc import TaskGroup

from anyio_sharedstream import Fold, Gap, Restart, SharedStreamManager, Snapshot
from tests.support import Feed
from tests.sweep import Reader, noted, nothing_left
from tests.virtual_time import in_virtual_time

POLICIES: dict[str, dict[str, Any]] = {
    "linger": {"linger": 4},
    "grace": {"cohort_grace": 2},
    "cohort": {"min_subscribers": 2},
    "restart": {"restart": Restart(initial_delay=1, factor=1, jitter=0)},
    "end": {"on_exhausted": "end"},
    "again": {"on_exhausted": "restart"},
    "replay": {"replay": 2},
    "age": {"replay_max_age": 1.5},
    "fold": {"fold": Fold((), lambda state, event: (*state, event))},
    "silence": {"silence_timeout": 10},
    "close": {"close_timeout": 5},
}
NEEDS = {"again": "restart", "age": "replay"}
On = frozenset[str]


def together(*names: str) -> On:
    return frozenset(names) | {NEEDS[name] for name in names if name in NEEDS}


STORIES: list[On] = [
    together(*names) for count in range(3) for names in combinations(POLICIES, count) if names != ("end", "again")
]
STORIES += [together(*POLICIES) - {"end"}, together(*POLICIES) - {"again"}]

#: The story: what happens when. A group of one that exists takes those who join; else they begin one.
SCRIPT: list[tuple[Any, ...]] = [
    (0, "join", "A"),
    (0.5, "look"),
    (1, "join", "B"),
    (3, "emit", 1, 2),
    (4, "emit", 3),
    (5, "join", "C", "D"),
    (6, "leave", "A", "B", "C", "D"),
    (7, "look"),
    (8, "join", "E", "F"),
    (11, "emit", 4),
    (12, "leave", "E", "F"),
    (13, "look"),
    (17, "look"),
    (20, "join", "G", "H"),
    (24, "emit", 5),
    (25, "fail"),
    (25.5, "look"),
    (26.5, "look"),
    (27, "join", "J", "K"),
    (30, "emit", 6),  # then there is silence
    (40.5, "look"),
    (45, "join", "P", "Q"),
    (48, "emit", 7),
    (49, "exhaust"),
    (49.5, "look"),
    (52, "join", "R", "S"),
    (55, "stop"),  # and the clean-up hangs
    (56, "join", "T", "U"),
    (57, "look"),
    (61, "look"),
    (66, "let_go"),
    (67, "emit", 8),
    (70, "look"),
]
JOINED = {name: time for time, what, *names in SCRIPT if what == "join" for name in names}
LEFT = {name: time for time, what, *names in SCRIPT if what == "leave" for name in names}
EMITTED = {event: time for time, what, *events in SCRIPT if what == "emit" for event in events}
#: One of every two asks for a snapshot, if there is a fold.
SNAPSHOTS = "BDFHKQSU"


def state_at(time: float, on: On) -> str | None:
    """The state of the group, and None if there is none."""
    restarting = "restarting" if "restart" in on else None
    states = {
        0.5: "waiting" if on & {"cohort", "grace"} else "live",
        7: "lingering" if "linger" in on else None,
        13: "lingering" if "linger" in on else None,
        17: None,
        25.5: restarting,
        26.5: "live" if "restart" in on else None,
        40.5: restarting if "silence" in on else "live",
        49.5: "restarting" if "again" in on else None,
        57: "waiting",
        61: "live" if "close" in on else "waiting",
        70: "live",
    }
    return states[time]


def after(time: float, on: On) -> float:
    """When a group opens that two have joined at once."""
    return time + 2 if "grace" in on and "cohort" not in on else time


def openings(on: On) -> list[float]:
    first = 1 if "cohort" in on else 2 if "grace" in on else 0
    again = [] if "linger" in on else [after(8, on)]
    failed = 26 if "restart" in on else after(27, on)
    silent = [] if "silence" not in on else [41] if "restart" in on else [after(45, on)]
    exhausted = 50 if "again" in on else after(52, on)
    return [first, *again, after(20, on), failed, *silent, exhausted, 60 if "close" in on else 66]


def closings(on: On) -> list[float]:
    return [*([16] if "linger" in on else [6, 12]), 25, *([40] if "silence" in on else []), 49, 66, 71]


def meaning(what: str, on: On) -> str | None:
    """What a subscriber is told of it: an ending, "restart", or nothing."""
    failure = {"fail": "ConnectionError", "silence": "UpstreamSilent" if "silence" in on else None}
    if what in failure:
        return "restart" if failure[what] and "restart" in on else failure[what]
    if what == "exhaust":
        return "EndOfStream" if "end" in on else "restart" if "again" in on else "PollTerminated"
    return "EndOfStream"


def welcome(joined: float, on: On, snapshot: bool) -> list[Any]:
    """What a joiner receives of what was before it."""
    before = {5: (1, 2, 3), 8: (1, 2, 3) if "linger" in on else (), 45: () if "silence" in on else (6,)}.get(int(joined), ())
    if snapshot:
        return [Snapshot(before)]
    youngest = joined - 1.5 if "age" in on else 0
    return [event for event in before[-2:] if "replay" in on and EMITTED[event] >= youngest]


def received(name: str, on: On) -> tuple[list[Any], str]:
    """All that a subscriber receives, and its ending."""
    joined, left = JOINED[name], LEFT.get(name, inf)
    snapshot = "fold" in on and name in SNAPSHOTS
    items = welcome(joined, on, snapshot)
    ends = {25: "fail", 40: "silence", 49: "exhaust", 55: "stop", 71: "exit"}
    for time, what in sorted([*ends.items(), *((time, event) for event, time in EMITTED.items())], key=lambda entry: entry[0]):
        if not joined <= time < left:
            continue
        if isinstance(what, int):
            items.append(what)
        elif (ending := meaning(what, on)) == "restart":
            items += [Gap(None, "restart"), *([Snapshot(())] if snapshot else [])]
        elif ending is not None:
            return items, ending
    return items, "ClosedResourceError"


class TimedFeed(Feed):
    """A feed that writes down when it was opened and closed."""

    def __init__(self) -> None:
        super().__init__()
        self.opened_at: list[float] = []
        self.closed_at: list[float] = []

    async def _play(self) -> AsyncGenerator[Any, None]:
        self.opened_at.append(anyio.current_time())
        try:
            async with aclosing(super()._play()) as events:
                async for event in events:
                    yield event
        finally:
            self.closed_at.append(anyio.current_time())


@dataclass(eq=False)
class Story:
    """Does what the script says, each of the methods one thing."""

    on: On
    manager: SharedStreamManager
    tasks: TaskGroup
    feed: TimedFeed = field(default_factory=TimedFeed)
    readers: dict[str, Reader] = field(default_factory=dict)
    stopped_at: float = inf

    async def join(self, *names: str) -> None:
        source = self.feed.asking_for(**{key: value for name in self.on for key, value in POLICIES[name].items()})
        for name in names:
            asked: Any = {"gaps": True, "snapshot": "fold" in self.on and name in SNAPSHOTS}
            self.readers[name] = Reader(await self.manager.subscribe(source, **asked).__aenter__())
            self.tasks.start_soon(self.readers[name].run)

    async def leave(self, *names: str) -> None:
        for name in names:
            self.readers[name].stream.close()

    async def emit(self, *events: int) -> None:
        self.feed.emit(*events)

    async def fail(self) -> None:
        self.feed.fail(ConnectionError("lost"))

    async def exhaust(self) -> None:
        self.feed.end()

    async def stop(self) -> None:
        self.feed.clean_up = anyio.Event()
        self.tasks.start_soon(self._stop)

    async def _stop(self) -> None:
        await self.manager.stop(self.feed.key)
        self.stopped_at = anyio.current_time()

    async def let_go(self) -> None:
        assert self.feed.clean_up is not None
        self.feed.clean_up.set()

    async def look(self) -> None:
        now = anyio.current_time()
        statistics = self.manager.statistics()
        group = statistics.groups.get(self.feed.key)
        assert (group and group.state) == state_at(now, self.on)
        assert len(statistics.closing) == (now in (57, 61))
        if group is not None and now == 40.5:
            restarts = ("restart" in self.on) + (self.on >= {"restart", "silence"})
            assert (group.restarts, group.epoch) == (restarts, 1 + ("restart" in self.on))


@pytest.mark.parametrize("on", STORIES, ids=lambda on: " and ".join(sorted(on)) or "none")
@in_virtual_time
async def test_every_two_policies_together_do_what_each_of_them_says(on: On) -> None:
    async with nothing_left(), anyio.create_task_group() as tasks, SharedStreamManager() as manager:
        story = Story(on, manager, tasks)
        for time, what, *arguments in SCRIPT:
            await anyio.sleep_until(time)
            with noted((time, what)):
                await getattr(story, what)(*arguments)
        await anyio.sleep_until(71)
    for name, reader in story.readers.items():
        assert (name, reader.got, type(reader.terminal).__name__) == (name, *received(name, on))
    assert story.feed.opened_at == openings(on)
    assert story.feed.closed_at == closings(on)
    assert story.stopped_at == (60 if "close" in on else 66)
