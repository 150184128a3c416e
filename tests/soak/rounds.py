"""How a round goes: a manager, and waves of crowds in it that come and go, each of which ends in a quiet moment.

Relies on everything else in here. One consumer stays through all waves, so that its group must not keep anything of the others.
The last wave ends in one of four ways: everybody goes, everything is stopped, the manager is left with everybody in it, or an
upstream raises what ends the manager.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import Random

from anyio import create_task_group, current_time, move_on_after, sleep

from anyio_sharedstream import SharedStreamManager
from tests.soak.ackers import AckLife
from tests.soak.brokers import ack_record
from tests.soak.consumers import Life, Resident
from tests.soak.openings import Record
from tests.soak.quiet import Quiet
from tests.soak.sources import plain_record, steady_record
from tests.soak.triggered import Triggers
from tests.soak.world import SOON, Fatal, Size, World, expovariate


class Round:
    """One round, which depends on nothing but the name and the size of its world."""

    resident: Resident

    def __init__(self, world: World, size: Size) -> None:
        self.world = world
        self.size = size
        self.wave = 0
        self.last = False  # whether this wave is the last
        self.records: dict[str, Record] = {}
        self.steady = steady_record(world)

    async def run(self) -> None:
        """Play it, up to the first promise that is broken."""
        world = self.world
        world.manager = SharedStreamManager(logger=world.logger())
        with world.everything:
            async with create_task_group() as world.helpers:
                world.helpers.start_soon(world.watch)
                await sleep(1)
                quiet = Quiet(world)
                await self._live_with_a_manager()
                del self.resident  # it has a subscription, and nothing of the library's is to be left
                world.manager = SharedStreamManager(logger=world.logger())
                await self._settle(quiet)
                world.helpers.cancel_scope.cancel()
        world.done["rounds"] += 1

    async def _live_with_a_manager(self) -> None:
        world = self.world
        end = world.dice("end").choice([self._go, self._stop_all, self._leave, self._doom])
        world.done[f"rounds that end: {end.__name__[1:]}"] += 1
        try:
            async with SharedStreamManager(logger=world.logger()) as world.manager:
                self.resident = Resident(world, self.steady, world.dice("resident"))
                world.start(self.resident.run)
                await sleep(60)
                quiet = Quiet(world)
                for wave in range(1, self.size.waves):
                    self.wave = wave
                    await self._play_wave(self._go)
                    await self._settle(quiet)
                self.wave, self.last = self.size.waves, True
                await self._play_wave(end)
                self._write_down_the_stop()
        except (Fatal, BaseExceptionGroup) as exc:
            fatal = exc if isinstance(exc, Fatal) else exc.split(Fatal)[1] is None
            world.check(world.interrupted and fatal, "what is fatal leaves the manager as itself", exc)

    async def _play_wave(self, end: Callable[[], Awaitable[None]]) -> None:
        world, size = self.world, self.size
        world.done["waves"] += 1
        world.ending = False
        triggers = Triggers(world, self.wave)
        async with triggers.runner:
            world.start(triggers.read)
            for number in range(size.actors):
                world.start(self._act, world.dice("actor", self.wave, number))
            for number in range(size.triggers):
                world.start(self._trigger, triggers, world.dice("trigger", self.wave, number))
            world.start(self._sabotage, world.dice("saboteur", self.wave))
            await sleep(size.seconds)
            world.ending = end != self._doom
            await end()
            triggers.left = True

    async def _settle(self, quiet: Quiet) -> None:
        self.world.ending = True
        await quiet.arrive()
        self.records.clear()
        self.world.logged_of.clear()
        quiet.look()

    # The ways in which a wave ends.

    async def _go(self) -> None:
        if self.last:
            self.resident.scope.cancel()
            await self.world.until(lambda: not self.world.open_now, "everybody goes")

    async def _leave(self) -> None:
        pass

    async def _doom(self) -> None:
        self.world.doomed = True
        await self.world.until(lambda: False, "an upstream raises what ends the manager")

    async def _stop_all(self) -> None:
        self._write_down_the_stop()
        with self.world.within(SOON, "stop_all"):
            await self.world.manager.stop_all()

    def _write_down_the_stop(self) -> None:
        for record in (self.steady, *self.records.values()):
            record.stop()

    # Who lives there.

    def record(self, index: int) -> Record:
        """The key that is at this place now; keys come and go, but for the first."""
        world = self.world
        if index == 0:
            return self.steady
        key = f"{self.wave}.{index}.{int(current_time() / 200 + index * 0.37)}"
        if key not in self.records:
            base = self.record(index + 1) if index % 8 == 0 else None
            self.records[key] = ack_record(world, key) if index % 4 == 2 else plain_record(world, key, base)
        return self.records[key]

    def _some(self, dice: Random) -> Record:
        """Some key: a few are popular, the steady one most of all."""
        return self.steady if dice.random() < 0.2 else self.record(int(self.size.keys * dice.random() ** 2))

    async def _act(self, dice: Random) -> None:
        await sleep(dice.random() * 30)
        while not self.world.ending:
            record = self._some(dice)
            life = AckLife if record.acknowledged else Life
            await life(self.world, record, dice).run()
            await sleep(expovariate(dice, 5))

    async def _trigger(self, triggers: Triggers, dice: Random) -> None:
        while not self.world.ending:
            await triggers.live(self._some(dice), dice)
            await sleep(expovariate(dice, 5))

    async def _sabotage(self, dice: Random) -> None:
        world = self.world
        while not world.ending:
            await sleep(expovariate(dice, 3))
            record = self._some(dice)
            with move_on_after(dice.choice([0, 1, SOON])):
                if self.last and dice.random() < 0.15:
                    world.faults["stop_all"] += 1
                    await self._stop_all()
                elif self.last or record is not self.steady:
                    world.faults["stop"] += 1
                    record.stop()
                    with world.within(SOON, "stop"):
                        await world.manager.stop(record.key)
