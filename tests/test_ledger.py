"""The ledger against a plain model: what has passed, in which order and how soon, and what was said of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from anyio_sharedstream._accounts import Account, Choosy, Reader
from anyio_sharedstream._ledger import Ledger, Record

Action = tuple[Any, ...]  # the name of a method of `Bookkeeping`, and its arguments

SAID = ("acked", "failed", "rejected", "released", "unresolved")


class Bookkeeping:
    """Does everything twice: to a ledger, and to lists of what each reader has said of each event."""

    def __init__(self) -> None:
        self.ledger = Ledger(self._wake)
        self._passed: list[Record] = []
        self._woken = False
        self._events: list[dict[int, str]] = []  # by reader: "open", or what it has said
        self._open: dict[int, list[int]] = {}  # by reader that has not left: the events that it has yet to finish, in order
        self._accounts: list[Account] = []
        self._pendings: list[tuple[Record, int, int]] = []

    def _wake(self) -> None:
        self._woken = True

    def join(self, chooses: bool) -> None:
        self._open[len(self._accounts)] = []
        self._accounts.append(Choosy(self.ledger) if chooses else Reader(self.ledger))

    def publish(self, size: int, choice: int) -> None:
        first = len(self._events)
        chunk = self.ledger.publish(range(first, first + size), len(self._open))
        self._events += [{} for _ in range(size)]
        for reader, unfinished in self._open.items():
            account = self._accounts[reader]
            places: Sequence[int] = range(size)
            if isinstance(account, Choosy):
                places = [place for place in places if choice >> (place + reader) % 4 & 1]
                if places:
                    account.give(chunk, places)
            for place in range(size):
                self._events[first + place][reader] = "open" if place in places else "acked"
            unfinished += [first + place for place in places]
        self.ledger.published()

    def _reader(self, index: int) -> int:
        return [*self._open][index % len(self._open)]

    def _say(self, reader: int, said: str, limit: int) -> int:
        """Say something of some of its next events, and let the caller tell the account that they are finished."""
        numbers, self._open[reader] = self._open[reader][:limit], self._open[reader][limit:]
        if said != "acked":
            records = self._accounts[reader].records(len(numbers))
            assert [record.payload for record in records] == numbers
            for record in records:
                setattr(record, said, getattr(record, said) + 1)
            if said == "unresolved":
                self._pendings += [(record, record.payload, reader) for record in records]
        for number in numbers:
            self._events[number][reader] = said
        return len(numbers)

    def finish(self, index: int, said: str, limit: int, at_once: bool) -> None:
        if self._open:
            reader = self._reader(index)
            if at_once:
                self.turn()
                self._accounts[reader].catch_up(self._say(reader, said, limit))
                assert len(self.look()) == self.expected()
            else:
                self._accounts[reader].finish(self._say(reader, said, limit))

    def leave(self, index: int, failed: int) -> None:
        if self._open:
            reader = self._reader(index)
            self._accounts[reader].finish(self._say(reader, "failed", failed))
            for number in self._open.pop(reader):
                self._events[number][reader] = "released"
            self._accounts[reader].leave()

    def resolve(self, index: int, said: str) -> None:
        if self._pendings:
            record, number, reader = self._pendings.pop(index % len(self._pendings))
            record.unresolved -= 1
            if said != "acked":
                setattr(record, said, getattr(record, said) + 1)
            self._events[number][reader] = said

    def turn(self) -> None:
        """All tasks have had their turn: what can have passed has, and somebody was told so."""
        self.ledger.settle()
        seen = len(self._passed)
        self._passed = self.look()
        self.ledger.passed.clear()
        assert len(self._passed) == self.expected()
        assert self._woken or len(self._passed) == seen
        self._woken = False
        for reader, unfinished in self._open.items():
            assert self._accounts[reader].stands_first() == (unfinished[:1] == [len(self._passed)])

    def look(self) -> list[Record]:
        """What has passed did so in order, and not too early; and what was said of it is what is known of it."""
        passed = [*self._passed, *self.ledger.passed]
        assert len(passed) <= self.expected()
        assert [record.payload for record in passed] == [*range(len(passed))]
        for record, event in zip(passed, self._events, strict=False):
            said = [*event.values()]
            assert {name: getattr(record, name) for name in SAID} == {name: said.count(name) for name in SAID}, event
        return passed

    def expected(self) -> int:
        """How many events nobody has to finish any more, of those before which there is no other."""
        return next((number for number, event in enumerate(self._events) if "open" in event.values()), len(self._events))

    def end(self) -> None:
        while self._open:
            self.leave(0, 0)
        assert len(self.look()) == self.expected() == len(self._events)
        assert self.ledger.head is None
        assert not self.ledger.caught_up


indices = st.integers(0, 4)
spoken = st.sampled_from(["acked", "acked", "failed", "rejected"])
finishes = st.tuples(st.just("finish"), indices, spoken | st.just("unresolved"), st.integers(1, 6), st.booleans())
publications = st.tuples(st.just("publish"), st.integers(1, 4), st.integers(0, 15))
joins = st.tuples(st.just("join"), st.booleans())
turns = st.tuples(st.just("turn"))
actions = st.one_of(
    *(finishes, finishes, finishes, publications, turns, turns, joins),
    st.tuples(st.just("leave"), indices, st.integers(0, 2)),
    st.tuples(st.just("resolve"), st.integers(0, 9), spoken),
)
NOBODY: list[Action] = [("finish", 0, "acked", 1, False), ("leave", 0, 0), ("resolve", 0, "acked"), ("publish", 2, 0)]
DEFERRED: list[Action] = [("join", False), ("publish", 3, 0), ("finish", 0, "unresolved", 3, True), ("resolve", 1, "rejected")]
# One stands at the second event when the other finishes both.
OVERTAKEN: list[Action] = [
    *(("join", False), ("join", False), ("publish", 2, 0), ("finish", 0, "acked", 1, False), ("turn",)),
    *(("finish", 1, "acked", 2, False), ("turn",)),
]


@settings(derandomize=True, database=None, deadline=None, max_examples=1000)
@given(joining=st.lists(joins, min_size=1, max_size=4), program=st.lists(actions, min_size=5, max_size=60))
@example(joining=[], program=NOBODY)
@example(joining=[], program=DEFERRED)
@example(joining=[], program=OVERTAKEN)
def test_events_pass_in_order_at_once_and_with_what_everybody_who_was_there_has_said(
    joining: list[Action], program: list[Action]
) -> None:
    books = Bookkeeping()
    for name, *arguments in joining + program:
        getattr(books, name)(*arguments)
        books.look()
    books.turn()
    books.end()
