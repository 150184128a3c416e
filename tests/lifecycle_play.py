"""Plays a program on the library and on its model, `tests.lifecycle_model`, in virtual time, and compares what is seen of both.

A program is a list of scenes. What a scene does, it does in one tick; when the next one begins, nothing is on its way.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from anyio_sharedstream import DropOldest, Fold, GroupStatistics, Restart, SharedSource, SharedStreamManager, UpstreamSilent
from tests.lifecycle_model import BOUND, DELAY, MAX_DELAY, SLOW, WITHIN, Life, Terms, Wish
from tests.support import idle
from tests.sweep import noted, nothing_left

Action = tuple[Any, ...]  # the name of a method of `Play` and of `Life`, and its arguments
Scene = tuple[float, Sequence[Action]]  # when, and what

#: How long after a scene nothing is on its way any more: no time at all, but a clock moves only when nothing else does.
REST = 0.125
#: For how many seconds clean-ups that are held are held after the end of a program.
HELD_AT_EXIT = 7.0
POISON = "poison"
OPEN = ("waiting", "opening", "live", "lingering")  # where it is clear whether the upstream is open


class SourceError(Exception):
    """What the source raises."""


class StepError(Exception):
    """What the fold raises."""


def name_of(error: BaseException) -> str:
    return repr(error) if isinstance(error, SourceError) else type(error).__name__


def even(event: int) -> bool:
    return event % 2 == 0


def step(state: tuple[int, ...], event: Any) -> tuple[int, ...]:
    if event == POISON:
        raise StepError
    return (*state, event)


FOLD = Fold((), step)


class Upstream:
    """A source that does what it is told, if it is at work, and writes down when it was opened and closed."""

    def __init__(self, terms: Terms) -> None:
        self.opens: list[float] = []
        self.closes: list[tuple[float, int]] = []
        self.refusals = 0
        self.slow = False
        self.gate: anyio.Event | None = None
        self._orders: list[Any] | None = None
        self._news = anyio.Event()
        self._terms = terms
        self.source = SharedSource(key="key", open=self._connect if terms.apart else self._run, **self._policies())

    def _policies(self) -> dict[str, Any]:
        terms = self._terms
        on = UpstreamSilent if terms.picky else Exception
        delays: dict[str, Any] = {"initial_delay": DELAY, "max_delay": MAX_DELAY, "jitter": 0}
        restart = Restart(max_restarts=terms.most, within=WITHIN, on=on, **delays) if terms.restart else None
        return {
            "linger": terms.linger,
            "cohort_grace": terms.grace,
            "min_subscribers": terms.least,
            "restart": restart,
            "on_exhausted": terms.exhausted,
            "replay": terms.replay,
            "replay_max_age": terms.age,
            "fold": FOLD if terms.fold else None,
            "silence_timeout": terms.silence,
            "close_timeout": terms.close,
        }

    def tell(self, *orders: Any) -> bool:
        if self._orders is None:
            return False
        self._orders += orders
        self._news.set()
        return True

    @asynccontextmanager
    async def _opening(self) -> AsyncIterator[None]:
        number = len(self.opens)
        self.opens.append(anyio.current_time())
        gate = None
        try:
            if self.refusals:
                self.refusals -= 1
                raise SourceError("refused")
            if self.slow and self._terms.apart:
                await anyio.sleep(SLOW)
            try:
                yield
            finally:
                gate = self.gate
        finally:
            if gate is not None:
                with anyio.CancelScope(shield=True):
                    await gate.wait()
            self.closes.append((anyio.current_time(), number))

    async def _work(self) -> AsyncGenerator[Any, None]:
        orders: list[Any] = []
        self._orders = orders
        try:
            while True:
                for order in orders:
                    if order == "exhaust":
                        return
                    if isinstance(order, Exception):
                        raise order
                    yield order
                orders.clear()
                self._news = anyio.Event()
                await self._news.wait()
        finally:
            self._orders = None

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[AsyncIterator[Any]]:
        async with self._opening():
            yield self._work()

    async def _run(self) -> AsyncGenerator[Any, None]:
        async with self._opening(), aclosing(self._work()) as work:
            async for event in work:
                yield event


@dataclass(eq=False)
class Handle:
    """A subscription, and what it has given."""

    stream: Any
    reads: bool
    received: list[tuple[float, Any]] = field(default_factory=list)
    outcome: str | None = None

    def look(self) -> tuple[Any, ...]:
        return self.received, self.outcome, self.stream.epoch

    async def read(self) -> None:
        while self.outcome is None:
            try:
                item = await self.stream.receive()
            except Exception as exc:
                self.outcome = name_of(exc)
            else:
                self.received.append((anyio.current_time(), item))

    def take(self, limit: int) -> None:
        try:
            for _ in range(limit):
                self.received.append((anyio.current_time(), self.stream.receive_nowait()))
        except anyio.WouldBlock:
            pass
        except Exception as exc:
            self.outcome = self.outcome or name_of(exc)


class Orders:
    """Tells an upstream what to do."""

    def __init__(self, upstream: Upstream, terms: Terms) -> None:
        self.upstream = upstream
        self._folds = terms.fold
        self._emitted = self._failures = 0

    def emit(self, count: int) -> None:
        if self.upstream.tell(*range(self._emitted, self._emitted + count)):
            self._emitted += count

    def poison(self) -> None:
        if self._folds:
            self.upstream.tell(POISON)

    def fail(self) -> None:
        if self.upstream.tell(SourceError(self._failures + 1)):
            self._failures += 1

    def exhaust(self) -> None:
        self.upstream.tell("exhaust")

    def refuse(self, count: int) -> None:
        self.upstream.refusals = count

    def slow_down(self, slow: bool) -> None:
        self.upstream.slow = slow

    def hold(self) -> None:
        self.upstream.gate = self.upstream.gate or anyio.Event()

    def let_go(self) -> None:
        if self.upstream.gate is not None:
            self.upstream.gate.set()
            self.upstream.gate = None


class Play(Orders):
    """Plays actions. The public methods are those of `Life`."""

    def __init__(self, terms: Terms, manager: SharedStreamManager, tasks: TaskGroup) -> None:
        super().__init__(Upstream(terms), terms)
        self.handles: list[Handle] = []
        self.returns: list[tuple[str, float]] = []
        self._terms = terms
        self._manager = manager
        self._tasks = tasks

    def join(self, wish: Wish) -> None:
        wish = self._terms.grant(wish)
        asked: dict[str, Any] = {"gaps": wish.gaps, "snapshot": wish.snapshot, "where": even if wish.even else None}
        if wish.drops:
            asked |= {"overflow": DropOldest(), "max_buffer_size": BOUND}
        handle = Handle(self._manager.subscribe(self.upstream.source, **asked), wish.reads)
        with pytest.raises(StopIteration):
            handle.stream.__aenter__().send(None)  # it never waits
        self.handles.append(handle)
        if wish.reads:
            self._tasks.start_soon(handle.read)

    def leave(self, index: int) -> None:
        number = index % len(self.handles)
        stream = self.handles[number].stream
        stream.close()
        self._tasks.start_soon(self._wait, f"leave {number}", stream.aclose)

    async def stop(self) -> None:
        """The only one that waits, so it must be the last in its scene."""
        await self._wait("stop", self._manager.stop, "key")

    async def _wait(self, name: str, function: Callable[..., Awaitable[object]], *arguments: Any) -> None:
        await function(*arguments)
        self.returned(name)

    def returned(self, name: str) -> None:
        self.returns.append((name, anyio.current_time()))

    def take(self, index: int, limit: int = 1000) -> None:
        handle = self.handles[index % len(self.handles)]
        if not handle.reads:
            handle.take(limit)

    async def let_go_at(self, time: float) -> None:
        try:
            await anyio.sleep_until(time)
        finally:
            self.let_go()

    async def scenes(self, program: Sequence[Scene], match: Match, turns: int, early: bool) -> None:
        for scene in program if early else ():
            self._tasks.start_soon(self._scene, scene, turns)
        for scene in program:
            if not early:
                self._tasks.start_soon(self._scene, scene, turns)
            await anyio.sleep_until(scene[0] + REST)
            with noted(scene):
                match.do(*scene)
                match.compare(self.look())

    async def _scene(self, scene: Scene, turns: int) -> None:
        time, actions = scene
        await anyio.sleep_until(time)
        for _ in range(turns):
            await checkpoint()
        for name, *arguments in actions:
            waiting = getattr(self, name)(*arguments)
            if waiting is not None:
                await waiting

    def look(self) -> dict[str, Any]:
        statistics = self._manager.statistics()
        return {
            "opened": self.upstream.opens,
            "closed": sorted(self.upstream.closes),
            "returned": sorted(self.returns),
            "group": [look_at(group) for group in statistics.groups.values()],
            "closing": sorted(group.epoch for group in statistics.closing),
            "subscribers": [handle.look() for handle in self.handles],
        }


def look_at(group: GroupStatistics) -> tuple[Any, ...]:
    error = None if group.last_error is None else name_of(group.last_error)
    facts = (group.state, group.epoch, group.restarts, group.events_published, group.last_event_at, error)
    return *facts, group.opened_at if group.state in OPEN else None, len(group.subscriptions)


class Match:
    """The models that what was seen can be of; more than one only as long as it does not matter in which order two things have
    happened at one time: what a scene does may come "first" in its tick, "last", or "amid" what comes up in there.
    """

    def __init__(self, terms: Terms, orders: Sequence[str]) -> None:
        self.lives = {order: Life(terms) for order in orders}

    def do(self, time: float, actions: Sequence[Action]) -> None:
        for order, life in self.lives.items():
            life.advance(time, up_to=order == "first", amid=order == "amid")
            for action in actions:
                life.act(*action)
            life.settle()
            life.advance(time + REST)

    def compare(self, seen: dict[str, Any]) -> None:
        expected = {order: life.look() for order, life in self.lives.items()}
        assert seen in expected.values(), f"{seen} is not among {expected}"
        self.lives = {order: life for order, life in self.lives.items() if expected[order] == seen}


async def play(
    terms: Terms,
    program: Sequence[Scene],
    *,
    orders: Sequence[str] = ("last",),
    turns: int = 0,
    early: bool = False,
    crowd: int = 0,
) -> set[str]:
    """Play a program, then leave the manager; returns in which orders things can have happened.

    :param turns: for how many turns of the event loop a scene waits in its tick
    :param early: whether scenes begin to wait for their times before anything else does
    :param crowd: how many others wait for the same times
    """
    match = Match(terms, orders)
    end = program[-1][0] + 1
    manager = SharedStreamManager()
    async with nothing_left(), anyio.create_task_group() as tasks:
        playing = Play(terms, manager, tasks)
        for time, _ in program:
            for _ in range(crowd):
                tasks.start_soon(anyio.sleep_until, time)
        async with manager:
            try:
                await playing.scenes(program, match, turns, early)
            finally:
                tasks.start_soon(playing.let_go_at, end + HELD_AT_EXIT)
            await anyio.sleep_until(end)
        playing.returned("exit")
        await anyio.sleep_until(end + HELD_AT_EXIT + 1)
        assert idle(manager)
        for index in range(len(playing.handles)):
            playing.take(index)
        match.do(end, [("exit",)])
        match.do(end + HELD_AT_EXIT, [("let_go",)])
        match.do(end + HELD_AT_EXIT + 1, [("take", index) for index in range(len(playing.handles))])
        match.compare(playing.look())
    return set(match.lives)
