"""Plays a program on one manager and on `tests.machine_world` at once, and compares everything that is seen of both.

Relies on `tests.machine_sides` and `tests.machine_ack_side` for what is done to a key. The time is virtual, unless a program is
`timeless`.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio
from anyio.abc import TaskGroup

from anyio_sharedstream import LossySubscription, SharedStreamManager, Subscription
from tests.machine_ack_side import AckSide
from tests.machine_contract import Route
from tests.machine_life import Terms
from tests.machine_sides import Side
from tests.machine_world import REST, AnyTerms, Scene, World
from tests.support import idle, settle
from tests.sweep import noted, nothing_left

#: How long everything may take that is still on its way at the end.
AT_LAST = 30.0

PACKAGE = SharedStreamManager.__module__.partition(".")[0]


class Play:
    """All keys, and the manager. The public methods up to `exit` are those of `World`."""

    def __init__(self, terms: Sequence[AnyTerms], manager: SharedStreamManager, tasks: TaskGroup, *, timeless: bool) -> None:
        self.sides: list[Side | AckSide] = [
            Side(key, one, manager, tasks) if isinstance(one, Terms) else AckSide(key, one, manager, tasks, timeless=timeless)
            for key, one in enumerate(terms)
        ]
        self._manager = manager
        self._tasks = tasks
        self._timeless = timeless
        self._returns: list[tuple[str, float]] = []
        self._stops = 0
        self._entered, self._leave = anyio.Event(), anyio.Event()

    async def start(self) -> None:
        self._tasks.start_soon(self._run)
        await self._entered.wait()

    async def _run(self) -> None:
        async with self._manager:
            self._entered.set()
            await self._leave.wait()
        self._returned("exit")

    def _returned(self, name: str) -> None:
        self._returns.append((name, 0.0 if self._timeless else anyio.current_time()))

    async def _wait(self, name: str, function: Callable[[], Awaitable[object]]) -> None:
        await function()
        self._returned(name)

    def stop_all(self) -> None:
        self._stops += 1
        self._tasks.start_soon(self._wait, f"all {self._stops}", self._manager.stop_all)

    def exit(self) -> None:
        self._leave.set()
        for side in self.sides:
            side.exited = True

    async def finish(self) -> None:
        for side in self.sides:
            await side.finish()

    async def do(self, scene: Scene) -> None:
        time, place, actions = scene
        if not self._timeless:
            await anyio.sleep_until(time)
        for name, *arguments in actions:
            waiting = getattr(self if place is None else self.sides[place], name)(*arguments)
            if waiting is not None:
                await waiting
        await (self._rest() if self._timeless else anyio.sleep_until(time + REST))

    async def _rest(self) -> None:
        """Let everything come about that is on its way."""
        before = None
        while before != (before := repr(self.look())):
            await settle(50)

    def ghosts(self) -> list[Any]:
        """What the manager still leads to of subscribers that are gone: themselves, and the routes that they asked for."""
        statistics = self._manager.statistics()
        groups = [*statistics.groups.values(), *statistics.closing]
        there = {(group.key, one.subscriber_id) for group in groups for one in group.subscriptions}
        # While an acknowledged upstream drains, it waits for what some of its former subscribers have to say.
        draining = {group.key for group in statistics.closing if group.acknowledgement is not None}
        gone: list[Any] = []
        routes: set[Route] = set()
        wanted: set[int] = set()
        for one in reachable(self._manager):
            if isinstance(one, Route):
                routes.add(one)
            elif (one.key, one.subscriber_id) not in there:
                gone += [one] if one.key not in draining else []
            elif isinstance(side := self.sides[one.key], Side):
                wanted |= side.handles[one.subscriber_id].contract.routes or set()
        return gone + sorted(routes - wanted)

    def look(self) -> dict[str, Any]:
        seen = {f"{key} {name}": value for key, side in enumerate(self.sides) for name, value in side.look().items()}
        return seen | {"returned": sorted(self._returns)}


def reachable(manager: SharedStreamManager) -> list[Any]:
    """The subscriptions and routes that a manager leads to, through objects of the library and containers alone."""
    found: list[Any] = []
    seen: set[int] = set()
    left: list[Any] = [manager]
    while left:
        thing = left.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Subscription | LossySubscription | Route):
            found.append(thing)
        else:
            kinds = (dict, list, set, frozenset, tuple, deque, Route)
            left += [one for one in gc.get_referents(thing) if isinstance(one, kinds) or type(one).__module__.startswith(PACKAGE)]
    return found


def compare(playing: Play, world: World, scene: Scene) -> None:
    with noted(scene):
        seen, expected = playing.look(), world.look()
        assert seen == expected, [
            f"{name} is {seen[name]} instead of {expected[name]}" for name in expected if seen[name] != expected[name]
        ]
        assert playing.ghosts() == []


async def play(terms: Sequence[AnyTerms], program: Sequence[Scene], *, timeless: bool = False) -> None:
    """Play a program, then leave the manager if that has not been done, and only then leave the subscriptions."""
    world = World(terms, timeless=timeless)
    end = program[-1][0] + 1
    manager = SharedStreamManager()
    async with nothing_left(), anyio.create_task_group() as tasks:
        playing = Play([life.terms for life in world.lives], manager, tasks, timeless=timeless)
        await playing.start()
        try:
            for scene in [*program, (end, None, [("exit",)]), (end + 1, None, [("finish",)])]:
                await playing.do(scene)
                world.do(scene)
                compare(playing, world, scene)
            if not timeless:
                await playing.do((end + AT_LAST, None, []))
                world.do((end + AT_LAST, None, []))
            compare(playing, world, (end + AT_LAST, None, []))
            assert idle(manager)
        except BaseException:
            for side in playing.sides:
                side.let_go()  # what is held is shielded, and would go on for ever
            tasks.cancel_scope.cancel()
            raise
