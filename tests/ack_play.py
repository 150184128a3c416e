"""Plays a program on an acknowledged source and on its model, `tests.ack_model`, in virtual time, and compares the two.

A program is a list of scenes: a time, and what is done then. When the next one begins, nothing is on its way.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from contextlib import aclosing, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any

import anyio
import pytest
from anyio.abc import TaskGroup

from anyio_sharedstream import (
    AckSource,
    AckStatistics,
    AckSubscription,
    AdvanceItem,
    GroupStatistics,
    Pending,
    Restart,
    SharedStreamManager,
    SharedStreamProducer,
)
from tests.ack_model import BOUND, DELAY, RETRY, Life, Terms, Wish
from tests.ack_support import Broker
from tests.support import idle
from tests.sweep import noted, nothing_left

Action = tuple[Any, ...]  # the name of a method of `Play` and of `Life`, and its arguments
Scene = tuple[float, Action]  # when, and what

#: How long after a scene nothing is on its way any more: no time at all, but a clock moves only when nothing else does.
REST = 0.125


class BrokerError(Exception):
    """What the broker raises."""


def name_of(error: BaseException) -> str:
    return repr(error) if isinstance(error, BrokerError) else type(error).__name__


def even(event: int) -> bool:
    return event % 2 == 0


class Upstream(Broker):
    """A broker that knows which of its producers is told of what, and how much of it is on its way."""

    def __init__(self, terms: Terms) -> None:
        super().__init__("key", lambda event: event % terms.lanes)
        self.terms = terms
        self.told: dict[Hashable, list[tuple[float, int, Any, tuple[int, ...]]]] = {}
        self.most = 0
        """the largest number of events that a producer has yielded and not been told of"""

    def make_source(self) -> AckSource[Any]:
        terms = self.terms
        tries = None if terms.retries is None else terms.retries
        retry = (
            None if tries is None else Restart(initial_delay=RETRY, max_delay=4 * RETRY, jitter=0, max_restarts=tries, within=inf)
        )
        return self.source(
            ack_timeout=terms.patience,
            max_in_flight=terms.window,
            max_concurrent_advances=terms.workers,
            drain_timeout=terms.drain,
            advance_retry=retry,
            restart=Restart(initial_delay=DELAY, max_delay=DELAY, jitter=0) if terms.restart else None,
            on_exhausted=terms.exhausted,
            linger=terms.linger,
        )

    def _create(self) -> SharedStreamProducer[Any, Any]:
        self.opened += 1
        return _Producer(self, self.opened)


class _Producer(SharedStreamProducer[Any, Any]):
    def __init__(self, upstream: Upstream, number: int) -> None:
        self._upstream = upstream
        self._number = number
        self._on_its_way = 0

    async def open_stream(self) -> AsyncIterator[tuple[Any, Any]]:
        async with aclosing(self._upstream.play()) as stream:  # type: ignore[type-var]
            async for item in stream:
                self._on_its_way += 1
                self._upstream.most = max(self._upstream.most, self._on_its_way)
                yield item

    async def advance(self, batch: Sequence[AdvanceItem[Any]]) -> None:
        upstream = self._upstream
        await upstream.advance(batch)
        self._on_its_way -= len(batch)
        for (_, event), outcome in batch:
            counts = (outcome.acked, outcome.failed, outcome.rejected, outcome.released)
            clean = outcome.acked > 0 and not outcome.failed and not outcome.rejected
            assert outcome.is_clean == clean
            told = (anyio.current_time(), self._number, event, counts)
            upstream.told.setdefault(upstream.lane_of((0, event)), []).append(told)

    def get_advance_lane(self, broker_payload: Any) -> Hashable:
        return self._upstream.lane_of(broker_payload)

    async def aclose(self) -> None:
        self._upstream.log.append("closed")


@dataclass(eq=False)
class Handle:
    """A subscription, and what it has given."""

    number: int
    stream: AckSubscription[Any]
    reads: bool
    received: list[tuple[float, Any]] = field(default_factory=list)
    outcome: str | None = None
    waits: anyio.CancelScope | None = None
    left: bool = False

    def look(self) -> tuple[Any, ...]:
        it = self.stream.statistics()
        return self.received, self.outcome, it.events_current, it.events_deferred, it.current_buffer_used

    def got(self, *events: Any) -> None:
        self.received += [(anyio.current_time(), event) for event in events]

    async def read(self) -> None:
        """Read everything, in one of the ways in which that can be done."""
        try:
            if self.number % 3 == 1:
                async for event in self.stream:
                    self.got(event)
            elif self.number % 3 == 2:
                async for batch in self.stream.batches(2):
                    self.got(*batch)
        except Exception as exc:
            self.outcome = name_of(exc)
        while self.outcome is None:
            await self.receive()

    async def receive(self) -> None:
        try:
            self.got(await (anext(self.stream) if self.number % 2 else self.stream.receive()))
        except StopAsyncIteration:
            self.outcome = self.outcome or "EndOfStream"
        except Exception as exc:
            self.outcome = self.outcome or name_of(exc)

    async def wait(self) -> None:
        with anyio.CancelScope() as self.waits:
            await self.receive()
        self.waits = None

    def take(self, count: int) -> None:
        try:
            for _ in range(count):
                self.got(self.stream.receive_nowait())
        except anyio.WouldBlock:
            pass
        except Exception as exc:
            self.outcome = self.outcome or name_of(exc)


def leave(stream: Any, how: str) -> Callable[[], Awaitable[object]]:
    """Leave well, badly, or by closing; gives the rest of it, which may have to wait."""
    if how == "close":
        stream.close()
        return stream.aclose  # type: ignore[no-any-return]
    error = None if how == "well" else ValueError()
    return partial(stream.__aexit__, error and ValueError, error, None)


class Play:
    """Plays actions. The public methods, but for `look`, are those of `Life`."""

    def __init__(self, terms: Terms, manager: SharedStreamManager, tasks: TaskGroup) -> None:
        self.upstream = Upstream(terms)
        self.handles: list[Handle] = []
        self.returns: list[tuple[str, float]] = []
        self.pendings: list[Pending | None] = []
        self._source = self.upstream.make_source()
        self._manager = manager
        self._tasks = tasks
        self._emitted = 0

    def _handle(self, index: int) -> Handle:
        return self.handles[index % len(self.handles)]

    def join(self, wish: Wish) -> None:
        asked: dict[str, Any] = {"where": even if wish.even else None, "max_buffer_size": BOUND if wish.bounded else None}
        handle = Handle(len(self.handles), self._manager.subscribe(self._source, **asked), wish.reads)
        with pytest.raises(StopIteration):
            handle.stream.__aenter__().__await__().__next__()  # it never waits
        self.handles.append(handle)
        if wish.reads:
            self._tasks.start_soon(handle.read)

    def leave(self, index: int, how: str) -> None:
        handle = self._handle(index)
        if handle.left:
            return
        handle.left = True
        self._tasks.start_soon(self._wait, f"leave {handle.number}", leave(handle.stream, how))

    async def _wait(self, name: str, function: Callable[..., Awaitable[object]], *arguments: Any) -> None:
        await function(*arguments)
        self.returned(name)

    def returned(self, name: str) -> None:
        self.returns.append((name, anyio.current_time()))

    def take(self, index: int, count: int) -> None:
        handle = self._handle(index)
        if handle.waits or (handle.reads and handle.outcome is None):
            with pytest.raises(anyio.BusyResourceError):
                handle.stream.receive_nowait()
        else:
            handle.take(count)

    def batch(self, index: int, size: int) -> None:
        handle = self._handle(index)
        if handle.stream.statistics().current_buffer_used:
            with pytest.raises(StopIteration) as done:
                handle.stream.receive_batch(size).send(None)  # nor does this, here
            handle.got(*done.value.value)

    def wait(self, index: int) -> None:
        handle = self._handle(index)
        if not handle.reads and handle.waits is None:
            self._tasks.start_soon(handle.wait)

    def cancel(self, index: int) -> None:
        if (scope := self._handle(index).waits) is not None:
            scope.cancel()

    def say(self, index: int, said: str) -> None:
        stream = self._handle(index).stream
        say = stream.reject if said == "rejected" else stream.fail
        # One that has failed may be at its last event still. What it says of that is too late, and no mistake.
        with nullcontext() if stream.statistics().events_current else suppress(RuntimeError):
            say()
        with pytest.raises(RuntimeError, match="no current event"):
            say()

    def defer(self, index: int) -> None:
        stream = self._handle(index).stream
        it = stream.statistics()
        if it.events_current and it.events_current + it.events_deferred <= self.upstream.terms.window:
            self.pendings.append(stream.defer())
        else:
            with suppress(RuntimeError):
                stream.defer().ack()  # as in `say`
            with pytest.raises(RuntimeError, match=r"no current event|max_in_flight"):
                stream.defer()

    def resolve(self, index: int, said: str) -> None:
        if self.pendings:
            place = index % len(self.pendings)
            pending, self.pendings[place] = self.pendings[place], None
            if pending is not None and said != "forgotten":
                say = {"acked": pending.ack, "rejected": pending.reject, "failed": pending.fail}[said]
                say()
                with pytest.raises(RuntimeError, match="before"):
                    say()

    def emit(self, count: int) -> None:
        self.upstream.emit(*range(self._emitted, self._emitted + count))
        self._emitted += count

    def fail(self) -> None:
        self.upstream.fail(BrokerError("failed"))

    def exhaust(self) -> None:
        self.upstream.end()

    def _lane(self, lane: int) -> int:
        return lane % self.upstream.terms.lanes

    def block(self, lane: int) -> None:
        self.upstream.blocked.setdefault(self._lane(lane), anyio.Event())

    def unblock(self, lane: int) -> None:
        gate = self.upstream.blocked.pop(self._lane(lane), None)
        if gate is not None:
            gate.set()

    def refuse(self, lane: int) -> None:
        self.upstream.refusing[self._lane(lane)] = BrokerError("refused")

    def accept(self, lane: int) -> None:
        self.upstream.refusing.pop(self._lane(lane), None)

    def stop(self) -> None:
        self._tasks.start_soon(self._wait, "stop", self._manager.stop, "key")

    def look(self) -> dict[str, Any]:
        statistics = self._manager.statistics()
        assert self.upstream.most <= self.upstream.terms.window
        return {
            "opened": self.upstream.opened,
            "log": self.upstream.log,
            "advanced": self.upstream.told,
            "returned": sorted(self.returns),
            "group": next((look_at(group) for group in statistics.groups.values()), None),
            "closing": [look_back(group.acknowledgement) for group in statistics.closing],
            "subscribers": [handle.look() for handle in self.handles],
        }


def look_at(group: GroupStatistics) -> tuple[Any, ...]:
    acks = group.acknowledgement
    assert acks is not None
    facts = group.state, group.epoch, group.restarts, group.events_published, len(group.subscriptions), acks.waiting
    return (*facts, look_back(acks))


def look_back(acks: AckStatistics | None) -> tuple[int, ...]:
    assert acks is not None
    assert acks.in_flight <= acks.max_in_flight
    return acks.in_flight, acks.deferred, acks.advancing, acks.retrying, acks.events_advanced, acks.lanes


def compare(playing: Play, life: Life, scene: Scene) -> None:
    with noted(scene):
        life.settle()
        life.advance(scene[0] + REST)
        seen, expected = playing.look(), life.look()
        assert seen == expected, [
            f"{name} is {seen[name]} instead of {expected[name]}" for name in seen if seen[name] != expected[name]
        ]


async def act(playing: Play, life: Life, scene: Scene) -> None:
    time, (name, *arguments) = scene
    await anyio.sleep_until(time)
    life.advance(time)
    getattr(playing, name)(*arguments)
    getattr(life, name)(*("failed" if argument == "forgotten" else argument for argument in arguments))
    await anyio.sleep_until(time + REST)
    compare(playing, life, scene)


async def play(terms: Terms, program: Sequence[Scene]) -> None:
    """Play a program, then leave the manager, and only then leave the subscriptions."""
    life = Life(terms)
    end = program[-1][0] + 1
    manager = SharedStreamManager()
    async with nothing_left(), anyio.create_task_group() as tasks:
        playing = Play(terms, manager, tasks)
        async with manager:
            for scene in program:
                await act(playing, life, scene)
            await anyio.sleep_until(end)
        playing.returned("exit")
        assert anyio.current_time() <= end + terms.drain
        assert idle(manager)
        life.advance(end)
        life.stop("exit")
        await anyio.sleep_until(end + terms.drain + 1)
        compare(playing, life, (end + terms.drain + 1, ("exit",)))
        await finish(playing, life)


async def finish(playing: Play, life: Life) -> None:
    """What is still said after the end is of no consequence; and everybody is told of it after what was in the buffers."""
    for index in range(len(playing.handles)):
        for name, *arguments in (("cancel", index), ("take", index, 1000), ("leave", index, "badly")):
            now = anyio.current_time()
            await act(playing, life, (now, (name, *arguments)))
    for place in range(len(playing.pendings)):
        playing.resolve(place, "acked")
        life.resolve(place, "acked")
    compare(playing, life, (anyio.current_time(), ("end",)))
