"""The subscribers of a group, and which of them an event concerns.

Relies on `_mailbox` and `_entries` to take what they are given. Most subscribers want every event and have no policy of their
own: for them there is one loop, `deliver`, which is the hottest of the library. The others cost what they ask for: a predicate is
called once per event, however many share it, and an event that is routed touches those who asked for its route and nobody else.
"""

from __future__ import annotations

from asyncio import InvalidStateError
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from anyio_sharedstream._accounts import Choosy
from anyio_sharedstream._answering import Answering
from anyio_sharedstream._entries import Entries
from anyio_sharedstream._ledger import Chunk
from anyio_sharedstream._mailbox import Mailbox

__all__ = ["Audience", "Failed", "deliver"]

T = TypeVar("T")
Predicate = Callable[[Any], object]
#: A mailbox that can take no more, and what one of its own functions has raised; None if it is too far behind.
Failed = tuple[Mailbox[Any], BaseException | None]
#: What a predicate has chosen, and at which places; how many events it has refused; at which places, the first being the one at
#: which it has raised, it could say nothing; and what it has raised.
Choice = tuple[tuple[Any, ...], Sequence[int], int, Sequence[int], BaseException | None]


class Audience:
    """Who is subscribed, by id, by route, and by what an event costs them."""

    def __init__(self, wake: Callable[[Any, None], object]) -> None:
        self.members: dict[Hashable, Mailbox[Any]] = {}
        self._plain: dict[Mailbox[Any], None] = {}  # take every event, as it comes
        self._choosy: dict[Mailbox[Any], None] = {}  # are offered every event
        self._routes: dict[Hashable, dict[Mailbox[Any], None]] = {}
        self._places: dict[Mailbox[Any], dict[Hashable, dict[Mailbox[Any], None]]] = {}  # where each of them is listed, by route
        self._wake = wake
        self.missing: list[Mailbox[Any]] = []
        """those that have begun to miss events, until somebody has reported it"""

    def add(self, mailbox: Mailbox[Any]) -> None:
        places: dict[Hashable, dict[Mailbox[Any], None]]
        if mailbox._routes is None:
            places = {self: self._choosy if mailbox._choosy else self._plain}  # under a key that is nobody's route
        else:
            # Looked up before anything is changed, and never again: routes are foreign, and may change their minds.
            places = {route: self._routes.get(route, {}) for route in mailbox._routes}
            self._routes.update(places)
        self.members[mailbox._subscriber_id] = mailbox
        self._places[mailbox] = places
        for place in places.values():
            place[mailbox] = None

    def discard(self, mailbox: Mailbox[Any]) -> bool:
        """Remove *mailbox* if it is here. The mailbox itself decides, not its id: the id may be somebody else's by now."""
        if self.members.get(mailbox._subscriber_id) is not mailbox:
            return False
        del self.members[mailbox._subscriber_id]
        for route, place in self._places.pop(mailbox).items():
            del place[mailbox]
            if not place:
                with suppress(Exception):
                    self._routes.pop(route, None)
        return True

    def check_route(self, route: Hashable) -> None:
        """Raise what looking a route up raises: hashing and comparing are foreign code."""
        self._routes.get(route)

    def publish(
        self, events: tuple[Any, ...], routes: Sequence[Hashable], turn: int, earlier: int, chunk: Chunk | None = None
    ) -> list[Failed]:
        """Give everyone what concerns them; returns who cannot go on.

        :param routes: those of the events, or nothing if the source has none
        :param turn: the number of the source's turn
        :param earlier: how many events were published in the same turn
        :param chunk: where it is noted who is given what, if the events are to be acknowledged
        """
        # All lists are made first, each at one stroke: predicates and finalisers are foreign code, and may join and leave.
        everyone = list(self._plain)
        offers: list[tuple[Mailbox[Any], Sequence[int] | None]] = [(mailbox, None) for mailbox in list(self._choosy)]
        if self._routes:
            offers += self._routed(routes)
        failed: list[Failed] = [(mailbox, None) for mailbox in deliver(events, everyone, self._wake, earlier)]
        if offers:
            offer = _Offer(events, turn, self.missing) if chunk is None else _AckOffer(events, turn, self.missing, chunk)
            failed += [failure for mailbox, places in offers if (failure := offer.to(mailbox, places)) is not None]
        return failed

    def replay(self, mailbox: Mailbox[Any], events: tuple[Any, ...], routes: Sequence[Hashable], turn: int) -> Failed | None:
        """Give one subscriber what was published before it came; says if that is the end of it."""
        wanted = mailbox._routes
        try:
            places = None if wanted is None else [place for place, route in enumerate(routes) if route in wanted]
        except BaseException as exc:  # comparing routes is foreign code
            return mailbox, exc
        return _Offer(events, turn, self.missing).to(mailbox, places, replayed=True)

    def _routed(self, routes: Sequence[Hashable]) -> list[tuple[Mailbox[Any], Sequence[int] | None]]:
        places: dict[Mailbox[Any], list[int]] = {}
        for place, route in enumerate(routes):
            for mailbox in list(self._routes.get(route, ())):
                places.setdefault(mailbox, []).append(place)
        return list(places.items())


class _Offer:
    """One publication, for those who choose: remembers what each predicate has said of each event."""

    def __init__(self, events: tuple[Any, ...], turn: int, missing: list[Mailbox[Any]]) -> None:
        self._events = events
        self._all = range(len(events))
        self._turn = turn
        self._missing = missing
        self._verdicts: dict[int, dict[int, bool | BaseException]] = {}
        self._chosen: dict[int, Choice] = {}

    def to(self, mailbox: Mailbox[Any], places: Sequence[int] | None, *, replayed: bool = False) -> Failed | None:
        """Offer the events at these places (all, if None); says if that is the end of the subscriber."""
        choice: Choice | None = None if mailbox._over else self._choose(mailbox._where, places)
        if choice is None or mailbox._over:
            self._missed(mailbox, places)
            return None  # by its own predicate, or another's
        events, chosen, refused, unsaid, error = choice
        mailbox._refused += refused
        self._given(mailbox, chosen, unsaid)
        try:
            if events and replayed:
                mailbox._prefill(events)
            elif events and not mailbox._publish(events, self._turn):
                return mailbox, None
        except BaseException as exc:  # of a function of the policy's
            error = exc
        if isinstance(mailbox, Entries) and mailbox._unreported:
            mailbox._unreported = False
            self._missing.append(mailbox)
        return None if error is None else (mailbox, error)

    def _given(self, mailbox: Mailbox[Any], chosen: Sequence[int], unsaid: Sequence[int]) -> None:
        """It is given the events at the chosen places, and for want of a predicate that works, none at the last ones."""

    def _missed(self, mailbox: Mailbox[Any], places: Sequence[int] | None) -> None:
        """It has gone before the events at these places could be offered."""

    def _choose(self, where: Predicate | None, places: Sequence[int] | None) -> Choice:
        if where is None:
            if places is None:
                return self._events, self._all, 0, (), None
            return self._at(places), places, 0, (), None
        if places is not None:
            return self._ask(where, places)
        if id(where) not in self._chosen:
            self._chosen[id(where)] = self._ask(where, self._all)
        return self._chosen[id(where)]

    def _ask(self, where: Predicate, places: Sequence[int]) -> Choice:
        verdicts = self._verdicts.setdefault(id(where), {})
        chosen: list[int] = []
        refused = 0
        for asked, place in enumerate(places):
            if place not in verdicts:
                try:
                    verdicts[place] = bool(where(self._events[place]))
                except BaseException as exc:  # whatever it is, the others are to have their events
                    verdicts[place] = exc
            verdict = verdicts[place]
            if isinstance(verdict, BaseException):
                return self._at(chosen), chosen, refused, places[asked:], verdict
            if verdict:
                chosen.append(place)
            else:
                refused += 1
        return self._at(chosen), chosen, refused, (), None

    def _at(self, places: Sequence[int]) -> tuple[Any, ...]:
        return tuple(self._events[place] for place in places)


class _AckOffer(_Offer):
    """The same, for events that are to be acknowledged: who chooses is counted for what it is given, and for nothing else."""

    def __init__(self, events: tuple[Any, ...], turn: int, missing: list[Mailbox[Any]], chunk: Chunk) -> None:
        super().__init__(events, turn, missing)
        self._chunk = chunk

    def _given(self, mailbox: Mailbox[Any], chosen: Sequence[int], unsaid: Sequence[int]) -> None:
        account = mailbox._account if isinstance(mailbox, Answering) else None
        if not isinstance(account, Choosy):
            return
        if chosen:
            account.give(self._chunk, chosen)
        if unsaid:
            self._chunk.record(unsaid[0]).failed += 1
            self._release(unsaid[1:])

    def _missed(self, mailbox: Mailbox[Any], places: Sequence[int] | None) -> None:
        if mailbox._where is not None or mailbox._routes is not None:
            self._release(self._all if places is None else places)

    def _release(self, places: Sequence[int]) -> None:
        for place in places:
            self._chunk.record(place).released += 1


def deliver(
    chunk: tuple[T, ...], mailboxes: Sequence[Mailbox[T]], wake: Callable[[Any, None], object], earlier: int
) -> list[Mailbox[T]]:
    """Put *chunk* into every mailbox, wake the parked readers, and return the mailboxes that have no room for it.

    *earlier* events were published in the same turn. No foreign code runs in here, except for finalisers: *mailboxes* must be a
    sequence of its own, and some may be closed on the way.
    """
    refused: list[Mailbox[T]] = []
    size = len(chunk)
    for mailbox in mailboxes:
        waiter = mailbox._waiter
        if waiter is not None:
            mailbox._waiter = None
            mailbox._chunk = chunk
            if size > mailbox._peak:
                mailbox._peak = size
            try:
                wake(waiter, None)
            except InvalidStateError:
                continue  # on its way out of a cancellation; the next call finds the chunk
        elif not mailbox._accept(chunk, earlier):
            refused.append(mailbox)
    return refused
