"""Triggers in a runner: they filter what other consumers receive as well, and a reader checks what becomes of them.

Relies on `checker` for what they may receive. The runner subscribes for a trigger, to what stands in for its manager.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import count
from random import Random
from typing import Any

import anyio
from anyio import move_on_after, sleep

from anyio_sharedstream._subscription import Receiver
from anyio_sharedstream.triggers import TriggerEvent, TriggerFailed, TriggerFinished, TriggerFired, TriggerRunner
from tests.soak.consumers import LONG, Somebody
from tests.soak.openings import Event, Record
from tests.soak.world import SOON, CrashError, World, expovariate


class Noted:
    """An event that a trigger has taken, until the broker is told of it."""

    def __init__(self) -> None:
        self.fired = 0  # how often the trigger has fired because of it, and that was not confirmed
        self.finished = False  # whether the trigger has gone on

    @property
    def says(self) -> str:
        # It takes part in more than one way, and the runner has a timeout of its own: it may have failed after all.
        return "confirmed" if self.finished and not self.fired else "unconfirmed"


class Watcher(Somebody):
    """A trigger that shares a stream."""

    def __init__(self, world: World, record: Record, dice: Random) -> None:
        super().__init__(world, record, dice)
        self.chattiness = dice.choice([0.0, 0.2, 1.0])  # the probability that it fires because of an event
        self.frailty = dice.choice([0.0, 0.02])  # the probability that it raises because of an event
        self.fired = 0
        self.read = 0  # how many of those the reader has received
        self.ending: object = None  # how it has ended by itself: the type of its outcome
        self.stopped = False
        self.over = anyio.Event()
        self.noted: list[Noted] = []  # by the number of what it has fired, because of which event

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return "tests.soak", {"record": self.record}

    def shared_stream_key(self) -> Any:
        return self.record.key

    @classmethod
    def open_shared_stream(cls, kwargs: dict[str, Any]) -> Any:
        return kwargs["record"].source.open()

    def shared_stream_policies(self) -> dict[str, Any]:
        return self.record.policies

    def subscription_options(self) -> dict[str, Any]:
        return self.wish.options()

    async def filter_shared_stream(self, stream: Any) -> AsyncIterator[TriggerEvent]:
        self.ending = TriggerFailed
        try:
            async for item in stream:
                self.checker.item(item)
                noted = Noted()
                if self.record.acknowledged and isinstance(item, Event):
                    item.opening.take(item, noted)
                if self.dice.random() < self.frailty:
                    self.world.faults["trigger: raises"] += 1
                    raise CrashError
                if self.dice.random() < self.chattiness:
                    self.fired += 1
                    noted.fired += 1
                    self.noted.append(noted)
                    yield TriggerEvent(self.fired)
                noted.finished = True  # for it asks for more
        except (CrashError, RuntimeError):
            raise  # the second is the runner's, when too much is unconfirmed of this and of earlier openings
        except Exception as exc:
            self.checker.terminal(exc)
            raise
        self.ending = TriggerFinished


class AckWatcher(Watcher):
    """A trigger that shares a stream whose events are acknowledged."""

    @classmethod
    def create_shared_stream_producer(cls, kwargs: dict[str, Any]) -> Any:
        return kwargs["record"].source.open()


class Triggers:
    """The triggers of a runner, and its reader."""

    def __init__(self, world: World, wave: int) -> None:
        self.world = world
        self.dice = world.dice("reader", wave)
        self.given: Receiver[Any]
        manager: Any = self
        self.runner = TriggerRunner(manager, max_outcomes=self.dice.choice([1, 10, 1000]), logger=world.logger())
        self.known: dict[int, Watcher] = {}
        self.names = count(1)
        self.left = False

    def subscribe(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the manager, to know what the runner is given."""
        self.given = self.world.manager.subscribe(*args, **kwargs)
        return self.given

    async def live(self, record: Record, dice: Random) -> None:
        """The life of one trigger."""
        world, name = self.world, next(self.names)
        kind = AckWatcher if record.acknowledged else Watcher
        self.known[name] = watcher = kind(world, record, dice)
        world.done[f"lives: {kind.__name__}"] += 1
        world.done["subscriptions"] += 1
        trigger: Any = watcher  # it shares a stream, and need not know how to run alone
        self.runner.start(name, trigger)
        watcher.checker.joined(self.given)
        with world.within(LONG + SOON, "the life of a trigger"):
            with move_on_after(expovariate(dice, LONG / 4, LONG)):
                await watcher.over.wait()
            await self._stop(name, watcher)

    async def _stop(self, name: int, watcher: Watcher) -> None:
        try:
            with self.world.within(SOON, "stopping a trigger"):
                stopping = self.runner.stop(name)
                watcher.stopped = not watcher.over.is_set()
                await stopping
        except KeyError:
            watcher.stopped = False
            self.world.check(watcher.ending or self.left, "a trigger that has not ended is live", watcher)

    async def read(self) -> None:
        """Check what becomes of them, more or less slowly."""
        dice = self.dice
        hesitation = dice.choice([0.0, 0.0, 0.01, 0.2])
        async for outcome in self.runner.outcomes:
            watcher = self.known[outcome.trigger_id]  # type: ignore[index]
            self.world.done[f"outcomes: {type(outcome).__name__}"] += 1
            if isinstance(outcome, TriggerFired):
                watcher.read += 1
                self.world.check(outcome.event.payload == watcher.read, "what a trigger fires, in order", watcher, outcome)
                self.world.start(self._confirm, outcome, watcher.noted[watcher.read - 1], dice.choice([0.0, 0.0, 3.0, 30.0]))
            else:
                self._ended(watcher, outcome)
            if hesitation:
                await sleep(expovariate(dice, hesitation, 1))

    async def _confirm(self, outcome: TriggerFired, noted: Noted, seconds: float) -> None:
        await sleep(seconds)
        noted.fired -= 1
        outcome.confirm()

    def _ended(self, watcher: Watcher, outcome: TriggerFailed | TriggerFinished) -> None:
        check, error = self.world.check, getattr(outcome, "error", None)
        check(not watcher.stopped and not watcher.over.is_set(), "one ending, unless it was stopped", watcher, outcome)
        known = not isinstance(error, RuntimeError) or (watcher.record.acknowledged and "max_in_flight" in str(error))
        check(type(outcome) is watcher.ending and known, "a trigger's ending", watcher, outcome)
        unsaid = isinstance(error, RuntimeError)
        check(watcher.read == watcher.fired - unsaid, "a trigger's ending comes after what it has fired", watcher, outcome)
        watcher.over.set()
