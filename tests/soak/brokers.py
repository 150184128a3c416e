"""Sources whose events are acknowledged: what is behind them checks everything that it is told.

Relies on `sources` for what their streams are like, and on `openings` for who has taken what. An event goes to the lane that its
number, divided by the number of lanes, leaves; so within a lane each event has exactly one successor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from math import inf

from anyio import current_time, sleep

from anyio_sharedstream import AckSource, AdvanceItem, AdvanceOutcome, Restart, SharedStreamProducer
from tests.soak.openings import Event, Opening, Record
from tests.soak.sources import Character, random_policies
from tests.soak.world import World, expovariate


class AdvanceError(Exception):
    """What the broker raises when it is told."""


def ack_record(world: World, key: str) -> Record:
    """A key whose events go back to a broker."""
    record = Record(world, key)
    dice = record.dice
    record.acknowledged = True
    record.policies = random_policies(dice) | {
        "ack_timeout": 20,
        "max_in_flight": dice.choice([5, 40, 1000]),
        "max_concurrent_advances": dice.choice([1, 2, 8]),
        "drain_timeout": 90,
        "advance_retry": dice.choice([None, Restart(initial_delay=0.5, max_delay=4, max_restarts=3)]),
    }
    broker = Broker(record)
    record.source = AckSource(key, broker.create, **record.policies)
    world.done["keys: acknowledged"] += 1
    return record


class Broker:
    """What is behind all producers of one key."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.character = Character(record)
        self.lanes = record.dice.choice([1, 3, 10])
        self.frailty = record.dice.choice([0.0, 0.0, 0.1, 0.6])  # the probability that it cannot be told
        self.hesitation = record.dice.choice([0.0, 0.0, 0.2, 2.0])  # seconds for which it is told something, on average

    def create(self) -> Producer:
        return Producer(self, self.character.opens())


class Producer(SharedStreamProducer[Event, int]):
    """One opening of an acknowledged upstream."""

    def __init__(self, broker: Broker, opening: Opening) -> None:
        self._broker = broker
        self._world = broker.record.world
        self._opening = opening
        self._next: Counter[int] = Counter()  # by lane, how many events have been advanced
        self._busy: set[int] = set()

    async def open_stream(self) -> AsyncGenerator[tuple[Event, int], None]:
        character, opening = self._broker.character, self._opening
        most = self._broker.record.policies["max_in_flight"]
        try:
            async with aclosing(character.bare(opening)) as events:
                async for event in events:
                    in_flight = opening.yielded - len(opening.advanced)
                    self._world.check(in_flight <= most, "no more in flight than asked for", opening)
                    yield event, event.number
        finally:
            opening.begins_to_close()
            await character.clean(opening)

    def get_advance_lane(self, broker_payload: int) -> int:
        return broker_payload % self._broker.lanes

    async def advance(self, batch: Sequence[AdvanceItem[int]]) -> None:
        world, broker = self._world, self._broker
        lane = self.get_advance_lane(batch[0].broker_payload)
        world.check(lane not in self._busy, "one batch of a lane after the other", lane)
        self._busy.add(lane)
        most = broker.record.policies["max_concurrent_advances"]
        world.check(len(self._busy) <= most, "no more lanes at once than asked for", self._busy)
        world.check(not self._opening.closed, "advanced while the upstream is open", self._opening)
        due = self._next[lane] * broker.lanes + lane
        numbers = [item.broker_payload for item in batch]
        expected = [*range(due, due + len(batch) * broker.lanes, broker.lanes)]
        world.check(numbers == expected, "advanced in lane order, once per opening", numbers, expected)
        for item in batch:
            self._check_outcome(item.broker_payload, item.outcome)
        try:
            await sleep(expovariate(broker.record.dice, broker.hesitation, 10) if broker.hesitation else 0)
            if broker.record.dice.random() < broker.frailty:
                world.faults["advance: fails"] += 1
                self._opening.disturbed = True
                raise AdvanceError
            self._done(lane, batch)
        finally:
            self._busy.discard(lane)

    def _check_outcome(self, number: int, outcome: AdvanceOutcome) -> None:
        world, opening = self._world, self._opening
        said = Counter(taker.says for taker in opening.takers.get(number, ()))
        said["failed"] += opening.blamed[number]
        details = opening, number, said, outcome
        unsaid = said["nothing"] or said["deferred"]
        world.check(not unsaid, "an event is advanced when all who took it have spoken", *details)
        spoiled = said["failed"] or said["rejected"] or said["unconfirmed"]
        world.check(not (outcome.is_clean and spoiled), "clean only if all who took it have acknowledged it", *details)
        world.check(said["rejected"] == outcome.rejected, "an outcome counts who rejected", *details)
        unsure = said["unconfirmed"] + said["confirmed"]
        counted = said["failed"] <= outcome.failed <= said["failed"] + unsure
        world.check(counted, "an outcome counts who failed", *details)
        world.check(said["acked"] <= outcome.acked, "an outcome counts who acknowledged", *details)

    def _done(self, lane: int, batch: Sequence[AdvanceItem[int]]) -> None:
        self._next[lane] += len(batch)
        self._opening.advanced.update(item.broker_payload for item in batch)
        self._world.done["events advanced"] += len(batch)
        for item in batch:
            self._world.done["events advanced clean"] += item.outcome.is_clean
            self._opening.takers.pop(item.broker_payload, None)

    async def aclose(self) -> None:
        opening, world = self._opening, self._world
        drained_out = world.logged_of["events not advanced", opening.record.key]
        patience = self._broker.record.policies["silence_timeout"] or inf
        silent = current_time() - opening.yielded_at >= patience - 1e-3
        excused = drained_out or silent or opening.disturbed or opening.ending is not None or world.interrupted
        world.check(excused or not opening.takers, "what was taken is advanced before the end", opening, list(opening.takers))
        opening.takers.clear()
        self._opening.close()
