"""What a group's upstream yields, on its way to the subscribers: gathered while the source runs, published when it lets go.

Relies on `_audience` for whom an event concerns and on `_hold` for whom the source must wait. Every method is synchronous, and
none that publishes raises: publishing happens inside the source's own suspensions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

from anyio import Event, get_cancelled_exc_class

from anyio_sharedstream._audience import Audience, Failed
from anyio_sharedstream._buffer import TURN
from anyio_sharedstream._entries import Blocking, Entries
from anyio_sharedstream._exceptions import SubscriberOverflow, Terminal, own_failure, without
from anyio_sharedstream._history import History
from anyio_sharedstream._hold import Hold
from anyio_sharedstream._logging import Lines
from anyio_sharedstream._mailbox import Mailbox
from anyio_sharedstream._parking import Backend
from anyio_sharedstream._source import SharedSource
from anyio_sharedstream._statistics import SubscriptionStatistics

__all__ = ["Publisher"]


class Owner(Protocol):
    """What a publisher knows of its group."""

    lines: Lines
    epoch: int

    def deserted(self) -> None:
        """Nobody is left to publish for."""

    def abort(self, error: BaseException, /) -> None:
        """Stop the manager, which *error* then leaves."""


class Window(Protocol):
    """Says when the source must wait, though no subscriber has it wait."""

    def room(self) -> float:
        """How many events more may be gathered."""

    def begin_to_wait(self) -> Event:
        """The source waits; gives an event that is set when it is worth asking for `room` again."""

    def waited(self) -> None:
        """The source goes on."""


class Publisher:
    """The subscribers of one key, and what they are sent."""

    window: Window | None = None
    """what bounds how much may be published, apart from the subscribers' buffers"""

    def __init__(self, source: SharedSource[Any], owner: Owner, backend: Backend) -> None:
        self.key = source.key
        self.published = 0
        """how many events have been published"""
        self.hold = Hold(lambda late: self._fail([(mailbox, None) for mailbox in late]))
        self.history = History(source.replay, source.replay_max_age, source.fold)
        self.last_event_at: float | None = None
        """when events were last published, in the event loop's seconds"""
        self.unfit = False
        """whether a function of the source's own has failed, which opening it again would not cure"""
        self._owner = owner
        self._clock = backend.clock
        self._backend = backend
        self._audience = Audience(backend.wake)
        self.members = self._audience.members
        """the registered subscribers, by id"""
        self._send: Callable[[tuple[Any, ...], Sequence[Hashable], int, int], list[Failed]] = self._audience.publish
        self._route_by = source.route_by
        self._fold = source.fold
        self._replay = source.replay
        # Who was there when the upstream failed and has not left since, while it may be opened again.
        self._bereft: dict[Entries[Any], None] = {}
        self._gathered: list[Any] = []
        self._gathered_routes: list[Hashable] = []
        self._turns = 0
        self._published_in_turn = 0
        self._publications = 0

    # Subscribers.

    def add(self, mailbox: Mailbox[Any]) -> None:
        subscriber_id = mailbox._subscriber_id
        if subscriber_id in self.members:
            raise RuntimeError(
                f"{self.key!r} already has a subscriber with the id {subscriber_id!r}: choose another, or none to have one made"
            )
        self._audience.add(mailbox)
        if isinstance(mailbox, Entries):
            if isinstance(mailbox, Blocking):
                self.hold.add(mailbox)
            if mailbox._snapshot:
                mailbox._history = self.history
        mailbox._register(self._backend)

    def welcome(self, mailbox: Mailbox[Any]) -> None:
        """Give a new subscriber what there was before it."""
        if not self.history.running:
            return
        if isinstance(mailbox, Entries) and mailbox._snapshot:
            mailbox._state_begins()
        elif self._replay:
            events, routes = self.history.latest(self._clock())
            failed = self._audience.replay(mailbox, events, routes, self._turns)
            if failed is not None:
                self._fail([failed])

    def remove(self, mailbox: Mailbox[Any]) -> bool:
        """Unregister; false if it is not registered."""
        if not self._audience.discard(mailbox):
            return False
        if isinstance(mailbox, Entries):
            self._bereft.pop(mailbox, None)
            if isinstance(mailbox, Blocking):
                self.hold.discard(mailbox)
        return True

    def dismiss(self, reason: BaseException) -> None:
        """Let everyone have what is buffered, and then be told of the end."""
        terminal = Terminal(reason)
        members = list(self.members.values())
        for mailbox in members:
            self.remove(mailbox)
        for mailbox in members:
            mailbox._ended_in = self._owner.epoch
            mailbox._end(terminal)

    def _marked(self) -> list[Entries[Any]]:
        return [mailbox for mailbox in self.members.values() if isinstance(mailbox, Entries)]

    # Openings of the upstream.

    def begin_history(self) -> None:
        """The upstream is being opened. Raises what the fold's ``initial`` raises."""
        try:
            self.history.begin()
        except BaseException:
            self.unfit = True
            raise
        if self._fold is not None:
            for mailbox in self._marked():
                mailbox._state_begins()

    def end_history(self) -> None:
        """The upstream has failed, and may be opened again."""
        self.history.running = False
        marked = self._marked()
        self._bereft = dict.fromkeys(reversed(marked))  # taken from the end
        for mailbox in marked:
            mailbox._state_ends()

    def interrupt(self) -> None:
        """The upstream will be opened again: say so to those who were there when it failed, and want to know."""
        while self._bereft:
            mailbox, _ = self._bereft.popitem()  # one by one, for finalisers may close others on the way
            mailbox._interrupted()

    # Publishing.

    def gather(self, event: Any) -> int:
        """Take an event to publish; returns how many there are. Raises what ``route_by`` or a fold's ``step`` raises."""
        if self._route_by is not None or self._fold is not None:
            self._digest(event)
        self._gathered.append(event)
        return len(self._gathered)

    @property
    def held(self) -> bool:
        """Whether the source waits at the moment, because we have it wait."""
        return self.hold.active

    @property
    def held_until(self) -> float:
        """When the source went on last after it had to wait, in the event loop's seconds."""
        return self.hold.ended_at

    def _digest(self, event: Any) -> None:
        try:
            if self._route_by is not None:
                route = self._route_by(event)
                self._audience.check_route(route)
            self.history.step(event)
            if self._route_by is not None:
                self._gathered_routes.append(route)
        except BaseException:
            self.unfit = True
            raise

    def flush(self, turn_ends: bool = True) -> bool:
        """Publish what was gathered; True if anything has been published in this turn, also earlier, for one who joined in it."""
        earlier = self._published_in_turn
        size = len(self._gathered)
        self._published_in_turn = 0 if turn_ends else earlier + size
        turn = self._turns
        self._turns += turn_ends
        if not size:
            return earlier > 0
        chunk = tuple(self._gathered)
        self._gathered.clear()
        routes, self._gathered_routes = self._gathered_routes, []
        self.published += size
        self.last_event_at = now = self._clock()
        if self._fold is not None:
            self.history.publish()
        if self._replay:
            self.history.remember(chunk, routes, now)
        failed = self._send(chunk, routes, turn, earlier)
        if failed:
            self._fail(failed)
        lines = self._owner.lines
        while self._audience.missing:
            mailbox = self._audience.missing.pop()
            lines.add("warning", "subscriber misses events", subscriber=mailbox._subscriber_id, missed=mailbox._missed)
            lines.write()
        return True

    def before_suspension(self) -> bool:
        """Publish before the source suspends; True if the poll task must then sit out one turn of the event loop.

        That is so on trio after every publication, for trio may run the poll task before the tasks that it woke. On asyncio it is
        so once in a while: a scope's cancellation reaches no task whose future is done, and by a source that publishes in every
        turn, a subscriber's is done whenever anyio looks. It could not be cancelled for as long as that goes on.
        """
        if not self.flush():
            return False
        self._publications += 1
        return self._backend.reorders or self._publications % TURN == 0

    def _fail(self, failed: list[Failed]) -> None:
        """End subscribers that cannot go on, which is nobody else's concern."""
        for mailbox, error in failed:
            self.remove(mailbox)
            mailbox._ended_in = self._owner.epoch
            if error is None:
                overflow = SubscriberOverflow(self.key, mailbox._subscriber_id, mailbox._max_buffer_size, mailbox._overflow())
                mailbox._fail(Terminal(overflow))
            else:
                mailbox._end(Terminal(own_failure(error)))
        if not self.members:
            self._owner.deserted()
        # Last, for a logger is foreign code and may call back.
        for mailbox, error in failed:
            self._report(mailbox, error)

    def _report(self, mailbox: Mailbox[Any], error: BaseException | None) -> None:
        subscriber, lines = mailbox._subscriber_id, self._owner.lines
        if error is None:
            lines.add("warning", "subscriber overflowed", subscriber=subscriber, bound=mailbox._max_buffer_size)
            lines.write()
            return
        lines.add("error", "subscriber failed", subscriber=subscriber, exc_info=error)
        lines.write()
        failure = without(error, get_cancelled_exc_class())
        if failure is not None and not isinstance(failure, Exception):
            self._owner.abort(failure)

    def statistics(self) -> tuple[SubscriptionStatistics, ...]:
        return tuple(mailbox._statistics() for mailbox in list(self.members.values()))
