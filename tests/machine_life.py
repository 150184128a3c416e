"""One key of several, in plain lists and without a loop: what must be seen of it at any moment.

Relies on `tests.lifecycle_model` for the life of an upstream, on `tests.machine_model` for its subscribers. Here is what these
leave out: sources that are held back for a subscriber, and subscribers that fail.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import Any

from tests import lifecycle_model
from tests.lifecycle_model import SILENCE
from tests.machine_contract import BLOCK, TURN, Contract
from tests.machine_model import Member

POISON = "StepError"


@dataclass(frozen=True)
class Terms(lifecycle_model.Terms):
    """The policies of a source; `timeless` if there is no virtual time, so that nothing that has to be waited for comes about."""

    routed: bool = False
    timeless: bool = False

    def admit(self, contract: Contract) -> Contract:
        """What can be asked for under these terms."""
        return replace(contract, snapshot=contract.snapshot and self.fold, routes=contract.routes if self.routed else None)


class Group(lifecycle_model.Group):
    """A group whose upstream has a list of things to do, and waits for subscribers that have no room."""

    subs: list[Member]  # type: ignore[assignment]
    life: Life

    def __init__(self, life: Life, earlier: lifecycle_model.Group | None) -> None:
        super().__init__(life, earlier)
        self.orders: list[Any] = []
        """what the source was told and has not done: events, by number, and endings"""
        self.everybody: list[Member] = []
        self._delay = 0.0 if life.terms.timeless else self._delay

    def open(self) -> None:
        self.orders = []
        super().open()

    def join(self, sub: Member) -> None:  # type: ignore[override]
        self.everybody.append(sub)
        super().join(sub)  # type: ignore[arg-type]
        self._expel()

    def publish(self, events: list[int]) -> None:
        super().publish(events)
        self._expel()

    def _expel(self) -> None:
        """Those who cannot go on leave, all at once."""
        failed = [sub for sub in self.subs if sub.failure is not None]
        for sub in failed:
            assert sub.failure is not None
            sub.end(sub.failure, self.folded)
        for sub in failed:
            self.leave(sub)  # type: ignore[arg-type]

    def _holders(self) -> list[Member]:
        """For whom the upstream waits."""
        return [sub for sub in self.subs if sub.room() <= 0] if self.at_work() else []

    def drive(self) -> bool:
        """Let the source run until it has to give the others a turn; false if it has nothing to do."""
        if not self.orders or not self.at_work() or self._holders():
            return False
        room = min([TURN, *(sub.room() for sub in self.subs)])
        events: list[int] = []
        while len(events) < room and self.orders and isinstance(self.orders[0], int):
            events.append(self.orders.pop(0))
        if events:
            self.publish(events)
        if len(events) < room and self.orders and self.at_work():
            ending = self.orders.pop(0)
            self.ends(ending, final=ending == POISON)
        return True

    def watch(self) -> None:
        """See for whom the upstream waits, since when, and for how long at most."""
        now, holders = self.life.now, self._holders()
        released = False
        for sub in self.everybody:
            if sub in holders and sub.held_since is None:
                sub.held_since = now
            elif sub not in holders and sub.held_since is not None:
                sub.held += now - sub.held_since
                sub.held_since = None
                released = not holders
        if holders:
            ends = [now if sub.held_since is None else sub.held_since + self._patience(sub) for sub in holders]
            self.deadlines["impatient"] = min(ends)
            self.deadlines.pop("silent", None)
        else:
            self.deadlines.pop("impatient", None)
        if released and self.terms.silence is not None and self.state in ("live", "lingering"):
            self.deadlines["silent"] = max(self.deadlines.get("silent", 0), now + SILENCE)

    def _patience(self, sub: Member) -> float:
        return BLOCK if sub.wish.policy == "block" else inf

    def impatient(self) -> None:
        for sub in self._holders():
            assert sub.held_since is not None
            if sub.held_since + self._patience(sub) == self.life.now:
                sub.overflow()
        self._expel()


class Life(lifecycle_model.Life):
    """A key whose events are not acknowledged. Its public methods up to `exhaust` are actions."""

    terms: Terms
    groups: list[Group]  # type: ignore[assignment]
    accepting: Group | None
    subs: list[tuple[Member, Group]]  # type: ignore[assignment]

    def __init__(self, terms: Terms) -> None:
        super().__init__(terms)
        self.exited = False

    def settle(self) -> None:
        busy = True
        while busy:
            super().settle()
            for sub, group in self.subs:
                sub.read(self.now, group.folded)
            for group in self.groups:
                group.watch()
            busy = sum(group.drive() for group in self.groups) > 0  # not only the first that does anything

    def join(self, contract: Contract) -> None:  # type: ignore[override]
        if self.exited:
            return
        if self.accepting is None:
            openers = [group for group in self.groups if group.runs and not group.released]
            self.accepting = Group(self, openers[-1] if openers else None)
            self.groups.append(self.accepting)
        group, sub = self.accepting, Member(self.terms.admit(contract))
        self.subs.append((sub, group))
        group.join(sub)

    def twin(self, index: int) -> None:
        """Somebody asks for an id that is taken, in vain."""

    def leave(self, index: int, how: str) -> None:  # type: ignore[override]
        super().leave(index)

    def take(self, index: int, limit: int, way: str) -> None:  # type: ignore[override]
        """Take up to so many, one by one or as a batch; *way* can wait, so it is for events alone unless it is receive_nowait."""
        _, sub, group = self._sub(index)
        if sub.busy:
            return
        state = group.folded
        if way == "receive_nowait" and sub.take(self.now, state, limit) < limit:
            sub.outcome = sub.ending or sub.outcome
        while way != "receive_nowait" and limit and sub.events():
            batch = limit if way == "receive_batch" else 1
            sub.take(self.now, state, batch)
            limit -= batch

    def wait(self, index: int, limit: int) -> None:
        """Have a task receive once."""
        _, sub, _ = self._sub(index)
        if not sub.busy:
            sub.waiting = limit

    def cancel(self, index: int) -> None:
        """Cancel that task."""
        self._sub(index)[1].waiting = 0

    def _sub(self, index: int) -> tuple[int, Member, Group]:  # type: ignore[override]
        number = index % len(self.subs)
        return number, *self.subs[number]

    def tell(self, order: Any) -> None:
        group = self.accepting
        if group is not None and group.at_work():
            group.orders.append(order)

    def emit(self, count: int) -> None:
        if self._at_work():
            for number in range(self.emitted, self.emitted + count):
                self.tell(number)
            self.emitted += count

    def poison(self) -> None:
        if self.terms.fold:
            self.tell(POISON)

    def fail(self) -> None:
        if self._at_work():
            self.failures += 1
            self.tell(f"SourceError({self.failures})")

    def exhaust(self) -> None:
        self.tell("PollTerminated")

    def finish(self) -> None:
        """Whoever plays is about to end: nothing is held any more, and everybody takes everything and leaves."""
        self.let_go()
        self.settle()
        for index in range(len(self.subs)):
            self.cancel(index)
            self.take(index, 1000, "receive_nowait")

    def stop_all(self, name: str) -> None:
        self._end(name, lambda group: group.released)

    def exit(self) -> None:
        self.exited = True
        super().exit()

    def look(self) -> dict[str, Any]:
        members = self.accepting.subs if self.accepting is not None else []
        everybody = [sub for sub, _ in self.subs]
        return super().look() | {
            "subscribers": [sub.look(self.now) for sub in everybody],
            "members": [everybody.index(sub) for sub in members],
        }
