"""Consumers: how they receive, and in which ways they leave.

Relies on `wishes` for what they ask for, and on `checker` for what they may receive.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from math import inf
from random import Random
from typing import Any

import anyio
from anyio import CancelScope, WouldBlock, get_cancelled_exc_class, move_on_after, sleep

from anyio_sharedstream import Fail
from anyio_sharedstream._subscription import Receiver
from tests.soak.checker import attempt, make_checker
from tests.soak.openings import Record
from tests.soak.wishes import Sieve, Wish, random_wish
from tests.soak.world import SOON, CrashError, World, expovariate

#: Seconds that a consumer stays at most.
LONG = 120.0


# The ways to receive, each of which gives some items.


async def single(stream: Any, _dice: Random) -> Sequence[Any]:
    return (await stream.receive(),)


async def iterated(stream: Any, _dice: Random) -> Sequence[Any]:
    try:
        return (await anext(stream),)
    except StopAsyncIteration:
        raise anyio.EndOfStream from None


async def batched(stream: Any, dice: Random) -> Sequence[Any]:
    batch: Sequence[Any] = await stream.receive_batch(dice.choice([1, 7, 1000]))
    return batch


async def polled(stream: Any, dice: Random) -> Sequence[Any]:
    item = attempt(stream.receive_nowait)
    if isinstance(item, WouldBlock):
        return await impatient(stream, dice)
    if isinstance(item, Exception):
        raise item
    return (item,)


async def impatient(stream: Any, dice: Random) -> Sequence[Any]:
    """A cancellation of this has taken nothing."""
    with move_on_after(dice.random() * 5):
        return await dice.choice([single, batched])(stream, dice)
    return ()


WAYS_TO_RECEIVE: list[Callable[[Any, Random], Awaitable[Sequence[Any]]]] = [single, iterated, batched, polled, impatient]


class Somebody:
    """Wants something of a key, and has what it receives checked."""

    def __init__(self, world: World, record: Record, dice: Random) -> None:
        self.world = world
        self.record = record
        self.dice = dice
        self.wish = random_wish(record, dice)
        self.checker = make_checker(record, self.wish)


class Life(Somebody):
    """One consumer, from its subscription to its leaving."""

    def __init__(self, world: World, record: Record, dice: Random) -> None:
        super().__init__(world, record, dice)
        self.receive = dice.choice(WAYS_TO_RECEIVE)
        self.pace = dice.choice([0.0, 0.0, 0.1, 3.0])  # seconds for which it is busy with something, on average
        self.patience = expovariate(dice, LONG / 4, LONG)  # seconds that it stays
        self.stream: Receiver[Any]

    async def run(self) -> None:
        """Live, in some way."""
        world = self.world
        ways = [self.leave, self.leave, self.fail, self.be_cancelled, self.be_closed, self.leave_at_once, self.oversleep]
        if get_cancelled_exc_class() is asyncio.CancelledError:
            ways.append(self.be_cancelled_natively)
        way = self.dice.choice(ways)
        world.done[f"lives: {type(self).__name__}, {way.__name__.replace('_', ' ')}"] += 1
        with world.within(LONG + SOON, f"a life: {way.__name__}"):
            await self.live(way)

    async def live(self, way: Callable[[], Awaitable[None]]) -> None:
        world = self.world
        world.done["subscriptions"] += 1
        self.stream = world.manager.subscribe(self.record.source, **self.wish.options())
        try:
            await way()
        except CrashError:
            pass
        finally:
            world.readers.pop(self.checker, None)
        self.stream.close()

    # Ways to live.

    async def leave(self) -> None:
        async with self.stream:
            self.enters()
            await self.stay()
            self.leaves()

    async def fail(self) -> None:
        self.world.faults["consumer: raises"] += 1
        async with self.stream:
            self.enters()
            await self.stay()
            self.leaves_badly()
            raise CrashError

    async def be_cancelled(self) -> None:
        self.world.faults["consumer: is cancelled"] += 1
        with move_on_after(self.patience):
            await self.stay_until_cancelled()

    async def be_cancelled_natively(self) -> None:
        self.world.faults["consumer: is cancelled natively"] += 1
        task = asyncio.get_running_loop().create_task(self.stay_until_cancelled())
        try:
            await asyncio.wait([task], timeout=self.patience)
        finally:
            task.cancel()
            await asyncio.wait([task])
        if not task.cancelled():
            task.result()

    async def stay_until_cancelled(self) -> None:
        async with self.stream:
            self.enters()
            try:
                await self.consume()
            except get_cancelled_exc_class():
                self.leaves_badly()
                raise

    async def be_closed(self) -> None:
        """By somebody else; and then leave it once more."""
        self.world.faults["consumer: is closed by another task"] += 1

        async def close() -> None:
            await sleep(self.patience)
            self.leaves_badly()
            self.stream.close()

        await self.stream.__aenter__()
        self.enters()
        self.world.start(close)
        await self.consume()
        await self.stream.aclose()
        await self.stream.aclose()

    async def leave_at_once(self) -> None:
        async with self.stream:
            self.enters()

    async def oversleep(self) -> None:
        """Receive nothing at all, until it is late."""
        self.world.faults["consumer: sleeps"] += 1
        async with self.stream:
            self.enters()
            await sleep(self.patience)
            await self.stay()
            self.leaves()

    # What they have in common.

    def enters(self) -> None:
        self.checker.joined(self.stream)
        self.world.readers[self.checker] = None

    def leaves_badly(self) -> None:
        """What it is at has failed."""

    async def stay(self) -> None:
        with move_on_after(self.patience):
            await self.consume()

    def leaves(self) -> None:
        """What it is at has been finished."""

    async def consume(self) -> None:
        """Receive until this ends by itself."""
        try:
            while True:
                items = await self.ask()
                for item in items:
                    self.checker.item(item)
                await self.handle(items)
                if self.pace:
                    await sleep(expovariate(self.dice, self.pace, 20))
        except Exception as exc:
            self.checker.terminal(exc)

    async def ask(self) -> Sequence[Any]:
        self.checker.calls += 1
        self.checker.receiving = True
        try:
            return await self.receive(self.stream, self.dice)
        finally:
            self.checker.receiving = False

    async def handle(self, _items: Sequence[Any]) -> None:
        """Be done with what was received."""


class Resident(Life):
    """One that stays, and wants everything."""

    def __init__(self, world: World, record: Record, dice: Random) -> None:
        super().__init__(world, record, dice)
        self.wish = Wish(sieve=Sieve(), policy=Fail(), bound=1024, gaps=False, snapshot=True)
        self.checker = make_checker(record, self.wish)
        self.receive, self.pace, self.patience = single, 0.0, inf
        self.scope = CancelScope()

    async def run(self) -> None:
        """Live until *scope* is cancelled."""
        with self.scope:
            await self.live(self.stay_until_cancelled)
