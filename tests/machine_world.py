"""Several keys of one manager, in plain lists and without a loop: what must be seen of all of them at any moment.

Relies on `tests.machine_life`, and on `tests.ack_model` for keys whose events are acknowledged. Keys have nothing to do with each
other but that somebody may stop them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import Any

from tests import ack_model
from tests.machine_life import Life, Terms

AnyTerms = Terms | ack_model.Terms
Action = tuple[Any, ...]  # the name of a method of a life, and its arguments
Scene = tuple[float, int | None, Sequence[Action]]  # when, for which key (None: the manager), and what

#: How long after a scene nothing is on its way any more: no time at all, but a clock moves only when nothing else does.
REST = 0.125


class AckLife(ack_model.Life):
    """A key whose events are acknowledged."""

    def __init__(self, terms: ack_model.Terms, *, timeless: bool) -> None:
        super().__init__(terms)
        self.exited = False
        self._timeless = timeless

    def settle(self) -> None:
        super().settle()
        group = self.group
        if self._timeless and group is not None and group.reopen_at < inf:
            group.open()
            self.settle()

    def join(self, wish: ack_model.Wish) -> None:
        if not self.exited:
            super().join(wish)

    def twin(self, index: int) -> None:
        """As in `Life`."""

    def fail(self) -> None:
        """The upstream fails, if anybody is there. Else the end would follow an event that has waited for somebody, and whether
        that can be advanced before the end is nobody's business."""
        if self.group is not None and self.group.members:
            super().fail()

    def exhaust(self) -> None:
        if self.group is not None and self.group.members:
            super().exhaust()

    def stop_all(self, name: str) -> None:
        self.stop(name)

    def exit(self) -> None:
        self.exited = True
        self.stop("exit")

    def finish(self) -> None:
        for lane in range(self.terms.lanes):
            self.accept(lane)
        for lane in range(self.terms.lanes):
            self.unblock(lane)
        for index in range(len(self.subs)):
            self.cancel(index)
            self.take(index, 1000)
            self.settle()
            self.leave(index, "well")
        for place in range(len(self.pendings)):
            self.resolve(place, "acked")

    def look(self) -> dict[str, Any]:
        members = self.group.members if self.group is not None else []
        return super().look() | {"members": [self.subs.index(sub) for sub in members]}


class World:
    """All keys, and the manager."""

    def __init__(self, terms: Sequence[AnyTerms], *, timeless: bool) -> None:
        self.lives: list[Life | AckLife] = [
            Life(replace(one, timeless=timeless)) if isinstance(one, Terms) else AckLife(one, timeless=timeless) for one in terms
        ]
        self._timeless = timeless
        self._stops = 0

    def do(self, scene: Scene) -> None:
        time, place, actions = scene
        time = 0.0 if self._timeless else time
        for life in self.lives:
            life.advance(time)
        for name, *arguments in actions:
            if place is None:
                getattr(self, name)(*arguments)
            else:
                getattr(self.lives[place], name)(*arguments)
        for life in self.lives:
            life.settle()
            life.advance(time if self._timeless else time + REST)

    def stop_all(self) -> None:
        self._stops += 1
        for life in self.lives:
            life.stop_all(f"all {self._stops}")

    def exit(self) -> None:
        for life in self.lives:
            if not life.exited:
                life.exit()

    def finish(self) -> None:
        for life in self.lives:
            life.finish()

    def look(self) -> dict[str, Any]:
        """Everything that can be seen from outside. Who waits for all keys waits for the last of them."""
        seen: dict[str, Any] = {}
        returned: dict[str, list[float]] = {}
        for place, life in enumerate(self.lives):
            looks = life.look()
            for name, time in looks["returned"]:
                if name == "exit" or name.startswith("all"):
                    returned.setdefault(name, []).append(time)
            looks["returned"] = [(name, time) for name, time in looks["returned"] if name not in returned]
            seen |= {f"{place} {name}": value for name, value in looks.items()}
        everywhere = [(name, max(times)) for name, times in returned.items() if len(times) == len(self.lives)]
        return seen | {"returned": sorted(everywhere)}
