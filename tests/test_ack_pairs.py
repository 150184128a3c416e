"""Joining, leaving, stopping, failing and saying things, all of one acknowledged stream and at once, in every order."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import permutations
from typing import Any

import anyio
import pytest
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from anyio_sharedstream import AckSource, AckSubscription, AckTimeout, Pending, PollTerminated, Restart, SharedStreamManager
from tests.ack_support import Broker
from tests.support import idle, settle
from tests.sweep import managed, noted
from tests.virtual_time import in_virtual_time

DRAIN = 20
DUE = 10


class Table:
    """Three subscribers of one broker. Each has taken the first of four events; the third has deferred it and taken another.

    At second `DUE` all of them are late.
    """

    def __init__(self, manager: SharedStreamManager, broker: Broker, tasks: TaskGroup, source: AckSource[int]) -> None:
        self.manager = manager
        self.broker = broker
        self.tasks = tasks
        self.source = source
        self.streams: list[AckSubscription[int]] = []
        self.pending: list[Pending] = []
        self.emitted = 0
        self.acknowledged: set[int] = set()
        self.spoilt: set[int] = set()

    async def set(self) -> None:
        for _ in range(3):
            await self.join()
        self.emit(4)
        await settle(4)
        for stream in self.streams:
            assert await stream.receive() == 0
        self.pending.append(self.streams[2].defer())
        assert await self.streams[2].receive() == 1

    def emit(self, count: int) -> None:
        self.broker.emit(*range(self.emitted, self.emitted + count))
        self.emitted += count

    # What happens.

    async def join(self) -> None:
        stream = self.manager.subscribe(self.source)
        await stream.__aenter__()
        self.streams.append(stream)

    async def leave(self) -> None:
        self.tasks.start_soon(self.streams[0].__aexit__, None, None, None)

    async def crash(self) -> None:
        self.streams[1].close()

    async def leave_all(self) -> None:
        for stream in self.streams:
            stream.close()

    async def stop(self) -> None:
        self.tasks.start_soon(self.manager.stop, self.broker.key)

    async def publish(self) -> None:
        self.emit(2)

    async def fail_stream(self) -> None:
        self.broker.fail(ConnectionError("stream"))

    async def end_stream(self) -> None:
        self.broker.end()

    async def fail_advance(self) -> None:
        self.broker.refusing[None] = ConnectionError("advance")

    async def hang_advance(self) -> None:
        self.broker.blocked[None] = anyio.Event()

    async def ack_by_asking(self) -> None:
        self.try_on(self.streams[1], lambda stream: stream.receive_nowait())

    async def ack_all_by_asking(self) -> None:
        for stream in self.streams:
            self.try_on(stream, lambda stream: stream.receive_nowait())

    async def reject(self) -> None:
        self.try_on(self.streams[0], lambda stream: stream.reject())

    async def defer_and_ack(self) -> None:
        self.try_on(self.streams[1], lambda stream: stream.defer().ack())

    async def defer(self) -> None:
        self.try_on(self.streams[0], lambda stream: self.pending.append(stream.defer()))

    async def resolve(self) -> None:
        while self.pending:
            self.pending.pop().ack()

    def try_on(self, stream: AckSubscription[int], say: Callable[[Any], object]) -> None:
        """Some of what happens may have ended it before."""
        if stream.statistics().events_current:
            with suppress(*ENDINGS):
                say(stream)

    # The end.

    async def end(self) -> None:
        await settle()
        self.check()
        await self.resolve()
        await self.leave_all()
        self.broker.refusing.clear()
        began = anyio.current_time()
        await settle()
        if not self.broker.blocked:
            # Nothing is left to wait for but a retry.
            await anyio.sleep(1)
            assert idle(self.manager), self.manager.statistics()
        await anyio.sleep_until(began + DRAIN + 1)  # the one second for those that linger first
        await settle()
        assert idle(self.manager), self.manager.statistics()
        self.check()

    def check(self) -> None:
        broker = self.broker
        assert broker.advanced == sorted(set(broker.advanced)), "repeated, or out of order"
        for event, (acked, failed, rejected, released) in broker.outcomes.items():
            assert min(acked, failed, rejected, released) >= 0
            assert 1 <= acked + failed + rejected + released <= len(self.streams), event
        for group in self.manager.statistics().groups.values():
            assert group.acknowledgement is not None
            assert 0 <= group.acknowledgement.in_flight <= self.source.max_in_flight
            assert group.acknowledgement.deferred >= 0


ENDINGS = (anyio.EndOfStream, anyio.ClosedResourceError, anyio.WouldBlock, ConnectionError, PollTerminated, AckTimeout)

Happening = Callable[[Table], Awaitable[None]]
HAPPENINGS: list[Happening] = [
    Table.join, Table.leave, Table.crash, Table.leave_all, Table.stop, Table.publish, Table.fail_stream, Table.end_stream,
    Table.fail_advance, Table.hang_advance, Table.ack_by_asking, Table.ack_all_by_asking, Table.reject, Table.defer_and_ack,
    Table.defer, Table.resolve,
]  # fmt: skip
POLICIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "restarting": {"restart": Restart(initial_delay=0.5, max_delay=0.5, jitter=0), "on_exhausted": "restart"},
    "ending": {"on_exhausted": "end", "advance_retry": None},
    "lingering": {"linger": 0.5},
    "full": {"max_in_flight": 2},
}


async def play(order: tuple[Happening, ...], policies: dict[str, Any], at_second: float, rests: int) -> None:
    broker = Broker()
    retry = Restart(initial_delay=0.25, factor=1, max_delay=0.25, jitter=0, max_restarts=2)
    source = broker.source(**{"ack_timeout": DUE, "drain_timeout": DRAIN, "advance_retry": retry} | policies)
    async with managed() as manager, anyio.create_task_group() as tasks:
        table = Table(manager, broker, tasks, source)
        await table.set()
        await anyio.sleep_until(at_second)
        for happening in order:
            await happening(table)
            for _ in range(rests):
                await checkpoint()
        await table.end()
    assert broker.log.count("closed") == broker.opened


@pytest.mark.parametrize("policies", POLICIES)
@pytest.mark.parametrize("at_second", [1, DUE])
@pytest.mark.parametrize("rests", [0, 1])
@in_virtual_time
async def test_each_after_each(policies: str, at_second: float, rests: int) -> None:
    for order in permutations(HAPPENINGS, 2):
        with noted(", ".join(getattr(happening, "__name__", "?") for happening in order)):
            began = anyio.current_time()
            await play(order, POLICIES[policies], began + at_second, rests)


@pytest.mark.parametrize("policies", ["plain", "restarting"])
@in_virtual_time
async def test_a_joining_among_two_others_of_which_one_ends_something(policies: str) -> None:
    for order in permutations(HAPPENINGS, 3):
        if Table.join in order and (Table.leave_all in order or Table.fail_stream in order or Table.stop in order):
            with noted(", ".join(getattr(happening, "__name__", "?") for happening in order)):
                await play(order, POLICIES[policies], anyio.current_time() + 1, 0)
