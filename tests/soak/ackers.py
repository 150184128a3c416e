"""Consumers whose events are acknowledged: what they say of what they have taken, and when.

Relies on `consumers` for their lives. What each one has said is written down with the event's opening, where the broker looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anyio import sleep

from anyio_sharedstream import AckSubscription, Gap, Pending
from tests.soak.consumers import Life
from tests.soak.openings import Event
from tests.soak.world import expovariate


class Taken:
    """An event that somebody has taken, until the broker is told of it."""

    def __init__(self, stream: AckSubscription[Any]) -> None:
        self._stream = stream
        self.said = "nothing"

    @property
    def says(self) -> str:
        if self.said == "nothing" and not self._stream.statistics().events_current:
            return "failed"  # because it took too long
        return self.said


class AckLife(Life):
    """One consumer that is asked what became of its events."""

    stream: AckSubscription[Any]
    _current: tuple[Taken, ...] = ()

    async def ask(self) -> Sequence[Any]:
        self._say("acked")
        items = await super().ask()
        events = [item for item in items if not isinstance(item, Gap)]
        self._current = tuple(self._take(event) for event in events)
        return items

    def _take(self, event: Event) -> Taken:
        taken = Taken(self.stream)
        event.opening.take(event, taken)
        return taken

    def _say(self, said: str) -> None:
        """Say something of what is current, if it still is."""
        word = said if self.stream.statistics().events_current else "failed"
        for taken in self._current:
            taken.said = word
        self._current = ()

    async def handle(self, items: Sequence[Any]) -> None:
        ways = [self.fail_it, self.reject_it, self.dawdle]
        deferred = self.stream.statistics().events_deferred + len(self._current)
        ways += [self.defer_it] * (deferred <= self.record.policies["max_in_flight"])
        if self._current and self.dice.random() < 0.1:
            await self.dice.choice(ways)()

    async def fail_it(self) -> None:
        self.world.faults["acknowledging: fails an event"] += 1
        self._say("failed")
        self.stream.fail("soak")

    async def reject_it(self) -> None:
        self.world.faults["acknowledging: rejects an event"] += 1
        self._say("rejected")
        self.stream.reject("soak")

    async def dawdle(self) -> None:
        """Perhaps for too long."""
        self.world.faults["acknowledging: dawdles"] += 1
        await sleep(expovariate(self.dice, 20, 40))

    async def defer_it(self) -> None:
        pending = self.stream.defer()
        deferred, self._current = self._current, ()
        for taken in deferred:
            taken.said = "deferred"
        self.world.start(self._resolve, [pending], deferred)  # in a list, where it can be forgotten

    async def _resolve(self, pending: list[Pending], taken: Sequence[Taken]) -> None:
        """Say later what became of it, or forget it."""
        await sleep(expovariate(self.dice, 3, 20))
        said = self.dice.choice(["acked", "acked", "acked", "rejected", "failed", "forgotten"])
        self.world.faults["acknowledging: forgets what it has deferred"] += said == "forgotten"
        for each in taken:
            each.said = "failed" if said == "forgotten" else said
        resolve = {"acked": pending[0].ack, "rejected": pending[0].reject, "failed": pending[0].fail}.get(said, pending.clear)
        resolve()

    # Leaving.

    def leaves(self) -> None:
        self._say("acked")

    def leaves_badly(self) -> None:
        self._say("failed")
