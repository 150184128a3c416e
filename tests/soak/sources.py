"""Sources of every kind: how they are opened, what they yield and when, how they fail, and what their clean-up does.

Relies on `openings` to write all of it down. What a source is like follows from its key: restarts and later groups get the same.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

from anyio import CancelScope, EndOfStream, create_memory_object_stream, create_task_group, get_cancelled_exc_class, sleep

from anyio_sharedstream import Fold, Restart, SharedSource
from tests.soak.openings import Event, Opening, Record, UpstreamError
from tests.soak.world import Fatal, World, expovariate
from tests.trigger_support import cancellation

Play = AsyncGenerator[Event, None]
#: What an upstream yields without letting go; None at its end.
Burst = Iterable[Event] | None

#: The names of the methods of `Character` that open a source.
KINDS = ["generator", "generator", "manager", "iterator", "grouped"]


def plain_record(world: World, key: str, base: Record | None) -> Record:
    """A key with a source that lives as chance has it; if *base* is given, it may receive from that."""
    record = Record(world, key)
    dice = record.dice
    replays: list[dict[str, Any]] = [{}, {}, {"replay": 5}, {"replay": 100}, {"replay": 20, "replay_max_age": 10}]
    folds: list[dict[str, Any]] = [{}, {"fold": Fold(record.initial, Record.step)}]
    record.policies = random_policies(dice) | dice.choice(replays) | dice.choice(folds)
    kind = dice.choice(KINDS if base is None else [*KINDS, "relay"])
    record.source = SharedSource(key=key, open=getattr(Character(record, base), kind), **record.policies)
    world.done[f"keys: {kind}"] += 1
    return record


def steady_record(world: World) -> Record:
    """A key whose upstream lives as long as anybody is there."""
    record = Record(world, "steady")
    record.policies = {"route_by": Record.route, "replay": 5, "fold": Fold(record.initial, Record.step), "silence_timeout": None}
    character = Character(record)
    character.pause, character.burst, character.frailty, character.swallows = 4.0, 3, 0.0, False
    record.source = SharedSource(key=record.key, open=character.generator, **record.policies)
    return record


def random_policies(dice: Random) -> dict[str, Any]:
    """How an upstream lives, with or without acknowledgement."""
    restart = Restart(initial_delay=0.5, max_delay=8, max_restarts=dice.choice([None, 2]), within=120)
    policies: dict[str, Any] = {
        "linger": dice.choice([0, 0, 4, 30]),
        "silence_timeout": dice.choice([None, 60]),
        "close_timeout": dice.choice([None, None, 10]),
        "route_by": dice.choice([None, Record.route]),
    }
    endings: list[dict[str, Any]] = [
        {"restart": restart},
        {"restart": restart, "on_exhausted": "restart"},
        {"on_exhausted": "end"},
        {},
    ]
    cohorts: list[dict[str, Any]] = [{}, {}, {"cohort_grace": 3, "min_subscribers": 2}]
    return policies | dice.choice(endings) | dice.choice(cohorts)


class Character:
    """How the upstream of a key plays."""

    def __init__(self, record: Record, base: Record | None = None) -> None:
        dice = record.dice
        self.record = record
        self.world = record.world
        self.dice = dice
        self.base = base
        self.pause = dice.choice([0.5, 4.0, 4.0, 15.0])  # seconds between bursts, on average
        self.burst = dice.choice([1, 1, 3, 30, 150])  # events that are yielded at once, at most
        self.frailty = dice.choice([0.0, 0.01, 0.1])  # the probability of a fault, per burst
        self.swallows = dice.random() < 0.2
        self.clean_up = dice.choice(["at once", "at once", "slow", "shielded", "fails", "hangs"])
        self.faults = ["fails", "leaks EndOfStream", "is cancelled", "returns", "falls silent"]
        self.faults += ["the fold fails"] * ("fold" in record.policies)

    # The ways to be opened.

    def opens(self) -> Opening:
        opening = Opening(self.record)
        if self.dice.random() < self.frailty:
            opening.begins_to_close()
            opening.close()
            raise opening.fault("cannot be opened")
        return opening

    def generator(self) -> Play:
        return self._generate(self.opens())

    async def _generate(self, opening: Opening) -> Play:
        try:
            while (events := await self.next_burst(opening)) is not None:
                for event in events:
                    yield event
        except get_cancelled_exc_class():
            if self.swallows and opening.ending is None:
                self.world.faults["upstream: swallows a cancellation"] += 1
                yield Event(opening, opening.yielded, kind="late")
            raise
        finally:
            await self.close(opening)

    @asynccontextmanager
    async def manager(self) -> AsyncIterator[Play]:
        opening = self.opens()
        try:
            await self.rest()
            yield self.bare(opening)
        finally:
            await self.close(opening)

    async def bare(self, opening: Opening) -> Play:
        while (events := await self.next_burst(opening)) is not None:
            for event in events:
                yield event

    def iterator(self) -> Steps:
        return Steps(self, self.opens())

    async def grouped(self) -> Play:
        """Holds a task group over its yields, and receives from a task in it."""
        opening = self.opens()
        send, receive = create_memory_object_stream[None]()

        async def tick() -> None:
            while True:
                await self.rest()
                await send.send(None)

        try:
            with send, receive:
                async with create_task_group() as tasks:
                    tasks.start_soon(tick)
                    while True:
                        await receive.receive()
                        if (events := await self.next_burst(opening)) is None:
                            break
                        for event in events:
                            yield event
                    tasks.cancel_scope.cancel()
        finally:
            await self.close(opening)

    async def relay(self) -> Play:
        """Yields something for each event of another shared source."""
        assert self.base is not None
        opening = self.opens()
        try:
            async with self.world.manager.subscribe(self.base.source) as inner:
                async for _ in inner:
                    yield opening.event()
            opening.ends("returns")
        except Exception as exc:
            raise opening.fault(f"relays {type(exc).__name__}") from exc
        finally:
            await self.close(opening)

    # What happens in the course of time.

    async def rest(self) -> None:
        await sleep(expovariate(self.dice, self.pause, 25))  # never near the silence timeout

    async def next_burst(self, opening: Opening) -> Burst:
        await self.rest()
        if self.world.doomed:
            self.world.doomed = False
            self.world.interrupted = self.world.ending = True
            opening.ends("raises no Exception")
            raise Fatal
        if self.dice.random() < self.frailty:
            fault = self.dice.choice(self.faults)
            opening.ends(fault)
            match fault:
                case "fails":
                    raise UpstreamError(opening.number, fault)
                case "leaks EndOfStream":
                    raise EndOfStream
                case "is cancelled":
                    raise await cancellation()
                case "returns":
                    return None
                case "the fold fails":
                    return [Event(opening, opening.yielded, kind="poison")]
            opening.ending = None  # it is silent for so long that this may be its end, or not
            await sleep(90)
        return (opening.event() for _ in range(self.dice.randint(1, self.burst)))

    # The clean-up.

    async def close(self, opening: Opening) -> None:
        opening.begins_to_close()
        try:
            await self.clean(opening)
        finally:
            opening.close()

    async def clean(self, opening: Opening) -> None:
        self.world.faults[f"clean-up: {self.clean_up}"] += 1
        if self.world.interrupted:
            return  # what fails here would take the place of what ends the manager
        match self.clean_up:
            case "slow":
                await sleep(2)
            case "shielded" | "hangs":
                with CancelScope(shield=True):
                    await sleep(90 if self.clean_up == "hangs" else expovariate(self.dice, 3, 20))
            case "fails":
                raise UpstreamError(opening.number, "clean-up fails")


class Steps:
    """An upstream that is no generator."""

    def __init__(self, character: Character, opening: Opening) -> None:
        self._character = character
        self._opening = opening
        self._events: Iterator[Event] = iter(())

    def __aiter__(self) -> Steps:
        return self

    async def __anext__(self) -> Event:
        for event in self._events:
            return event
        events = await self._character.next_burst(self._opening)
        if events is None:
            raise StopAsyncIteration
        self._events = iter(events)
        return await anext(self)

    async def aclose(self) -> None:
        await self._character.close(self._opening)
