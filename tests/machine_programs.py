"""Programs for `tests.machine_play` that nobody thought of: several keys with random policies, and what is done to them.

Relies on nothing but a random generator, so a number is enough to write the same program again.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from random import Random
from typing import TypeVar

from tests import ack_model
from tests.ack_model import ACK, DRAIN, LONG_DRAIN, Wish
from tests.lifecycle_model import CLOSE, GRACE, LINGER, SILENCE
from tests.machine_contract import POLICIES, Contract, Route, brittle, even
from tests.machine_life import Terms
from tests.machine_world import Action, AnyTerms, Scene

T = TypeVar("T")
Phrase = list[list[Action]]  # what is done in a few scenes, one after the other

HOWS = ("well", "badly", "close")
#: What a subscriber that receives nothing, and then everything, receives.
EVERYTHING = 1000


class Writer:
    """Writes a program; the same for the same number."""

    def __init__(self, number: int, *, steps: int, timeless: bool = False) -> None:
        self._random = Random(number)
        self._timeless = timeless
        self.terms: list[AnyTerms] = [
            self._plain() if self._random.random() < 0.7 else self._acked() for _ in range(self._of(1, 2, 2, 3))
        ]
        self.scenes: list[Scene] = []
        self._time = 0.0
        for place in range(len(self.terms)):
            self._add(place, [[self._join(place)]])
        while len(self.scenes) < steps:
            place = self._random.randrange(len(self.terms))
            if self._chance(0.01):
                self._add(None, [[self._of(("stop_all",), ("stop_all",), ("stop_all",), ("exit",))]])
            elif isinstance(self.terms[place], Terms):
                self._add(place, self._plain_phrase(place))
            else:
                self._add(place, self._ack_phrase(place))

    def _add(self, place: int | None, phrase: Phrase) -> None:
        for actions in phrase:
            self._time += self._of(0.25, 0.25, 0.25, 0.5, 0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 10.0)
            self.scenes.append((self._time, place, actions))

    def _of(self, *choices: T) -> T:
        return self._random.choice(choices)

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def _index(self) -> int:
        """Mostly somebody who came not long ago, for the others have left."""
        return self._of(-1, -1, -1, -2, -2, -3, -4, 0)

    # Policies: most are there in every other program; those that keep things from happening, less often.

    def _plain(self) -> Terms:
        terms = Terms(
            apart=self._chance(0.5),
            linger=self._of(0.0, LINGER),
            grace=GRACE if self._chance(0.15) else None,
            least=2 if self._chance(0.15) else 1,
            restart=self._chance(0.6),
            most=3 if self._chance(0.25) else None,
            picky=self._chance(0.15),
            exhausted=self._of("fail", "end", "restart"),
            replay=self._of(0, 1, 4),
            age=self._of(None, None, 3.0),
            fold=self._chance(0.5),
            silence=self._of(None, None, SILENCE),
            close=self._of(None, CLOSE),
            routed=self._chance(0.5),
        )
        return terms.consistent()  # type: ignore[return-value]

    def _acked(self) -> ack_model.Terms:
        restart = self._chance(0.5)
        return ack_model.Terms(
            window=self._of(1, 2, 3, 6),
            workers=self._of(1, 2, 8),
            lanes=self._of(1, 2, 3),
            patience=self._of(inf, ACK, ACK),
            drain=self._of(DRAIN, LONG_DRAIN),
            retries=None if self._timeless else self._of(None, 2, 2),
            restart=restart,
            exhausted=self._of("fail", "end", "restart") if restart else self._of("fail", "end"),
            linger=self._of(0.0, 0.0, ack_model.LINGER),
        )

    # Subscribers.

    def _join(self, place: int, *, reads: bool = True) -> Action:
        if not isinstance(self.terms[place], Terms):
            even_, bounded = self._chance(0.3), self._chance(0.25)
            return ("join", Wish(reads and not even_ and not bounded and self._chance(0.3), even_, bounded))
        contract = Contract(
            policy=self._of(*POLICIES),
            bound=self._of(1, 2, 2, 3, 3, 3, 8, 64),
            where=self._of(None, None, None, even, brittle),
            routes=self._of(None, None, frozenset({Route(0)}), frozenset({Route(1), Route(2)})),
            gaps=self._chance(0.5),
            snapshot=self._chance(0.5),
            way=self._of(None, None, None, "receive", "for", 2, 100) if reads else None,
        )
        return ("join", contract)

    def _leave(self) -> Action:
        return ("leave", self._index(), self._of(*HOWS))

    def _emit(self) -> Action:
        return ("emit", self._of(1, 1, 1, 2, 2, 3, 5, 5, 12, 64, 65, 150))

    def _take(self) -> Action:
        ways = ("receive_nowait", "receive_nowait", "receive", "__anext__", "receive_batch")
        return ("take", self._index(), self._of(1, 1, 2, 7, EVERYTHING), self._of(*ways))

    def _end(self) -> Action:
        return self._of(("fail",), ("fail",), ("exhaust",), ("poison",))

    def _everybody_leaves(self) -> Phrase:
        return [[("leave", index, self._of(*HOWS))] for index in range(-5, 0)]

    def _plain_phrase(self, place: int) -> Phrase:
        join = self._join(place)
        # Somebody who leaves may let the source go on. Whether a task that begins to read is faster, is nobody's business.
        crowd = [self._of(self._join(place, reads=False), ("leave", self._index(), "close")) for _ in range(3)]
        phrases: Sequence[tuple[int, Phrase]] = (
            (5, [[join]]),
            (2, [crowd]),
            (3, [[self._leave()]]),
            (8, [[self._emit()]]),
            (6, [[self._take()]]),
            (3, [[("wait", self._index(), self._of(1, 1, 3, 100))]]),
            (1, [[("cancel", self._index())]]),
            (2, [[("wait", -1, 2)], [self._emit(), ("cancel", -1)], [("take", -1, EVERYTHING, "receive_nowait")]]),
            (2, [[self._end()]]),
            (2, [[self._emit(), self._end(), self._emit()]]),
            (2, [[("emit", 1)], [("emit", self._of(1, 2, 4))], [("take", self._index(), 1, "receive_batch")], [("emit", 2)]]),
            (2, [[("emit", 1)], [("fail",)], [], [("emit", 1)], [("emit", 3)]]),
            (1, [*self._everybody_leaves(), [join], [], [self._emit()]]),
            (1, [[("hold",)], [self._of(("stop",), ("fail",), self._leave())], [join], [], [("let_go",)]]),
            (1, [[("refuse", self._of(1, 2, 3))]]),
            (1, [[("stop",)]]),
            (1, [[("twin", self._index())]]),
            (0 if self._timeless else 1, [[("slow_down", self._chance(0.5))]]),
        )
        return self._random.choices([phrase for _, phrase in phrases], [weight for weight, _ in phrases])[0]

    def _ack_phrase(self, place: int) -> Phrase:
        lane, index = self._random.randrange(3), self._index()
        everybody_takes: Phrase = [[("take", index, self._of(1, 1, 2, EVERYTHING))] for index in range(-4, 0)]
        emit: Action = ("emit", self._of(1, 2, 3, 5))
        hung: Phrase = [[("block", lane)], [emit], *everybody_takes]
        # It is busy with what it took last.
        busy: Phrase = [[emit], [self._of(("take", index, 1), ("take", index, 2), ("batch", index, 2), ("batch", index, 5))]]
        resolve: Action = ("resolve", self._index(), self._of("acked", "acked", "failed", "rejected"))
        phrases: Sequence[tuple[int, Phrase]] = (
            (6, [[self._join(place)]]),
            (1, [[self._leave()]]),
            (3, [[emit]]),
            (3, busy),
            (2, [[("take", index, EVERYTHING)]]),
            (2, [*busy, [("leave", index, self._of(*HOWS))]]),
            (2, [*busy, [("leave", index, "badly")], *everybody_takes]),
            (2, [*busy, [("say", index, self._of("failed", "rejected"))]]),
            (4, [*busy, [("defer", index)]]),
            (3, [[resolve]]),
            (1, [*busy, [("defer", index)], *self._everybody_leaves(), [self._of(resolve, self._join(place))], [resolve]]),
            (2, [[("wait", index)]]),
            (1, [[("cancel", index)]]),
            (1, [[("wait", index)], [emit, ("cancel", index)], [("take", index, 1)]]),
            (2, everybody_takes),
            (2, [[("take", index, EVERYTHING)] for index in range(-5, 0)]),
            (1, [*hung, [("unblock", lane)]]),
            (1, [*hung, [emit], *everybody_takes, [("refuse", lane)], [("unblock", lane)], [("accept", lane)]]),
            (1, [[("refuse", lane)], [emit], *everybody_takes, [emit], *everybody_takes, [("accept", lane)]]),
            (1, [[self._of(("block", lane), ("refuse", lane))]]),
            (1, [[("unblock", lane)], [("accept", lane)]]),
            (1, [[self._of(("fail",), ("fail",), ("exhaust",))], [], [self._join(place)]]),
            (1, [[("stop",)], [self._join(place)]]),
            (1, [[("twin", index)]]),
        )
        return self._random.choices([phrase for _, phrase in phrases], [weight for weight, _ in phrases])[0]
