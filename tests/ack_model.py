"""What becomes of every event of an acknowledged source, in plain lists and without a loop: the reference for `tests.ack_play`.

For each event: who was there, what each of them has said, and so when it must have been advanced and with which outcome. What
somebody does takes effect at once; what follows by itself does so in `Life.settle`, and what comes with the time in `advance`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any

# Sums of a few of these are neither equal nor multiples of a quarter, so what happens at one time has one cause.
_UNIT = 2.0**-28
DELAY = 1 + 2**20 * _UNIT
RETRY = 0.75 + 2**17 * _UNIT
ACK = 5 + 2**14 * _UNIT
LINGER = 4 + 2**10 * _UNIT
DRAIN = 3 + 2**6 * _UNIT
LONG_DRAIN = 12 + 2**3 * _UNIT

#: How many events a subscriber may be behind that is bounded.
BOUND = 2


@dataclass(frozen=True)
class Terms:
    """The policies of a source, and how many lanes its events are in."""

    window: int = 4
    workers: int = 8
    lanes: int = 2
    patience: float = inf
    """its ack_timeout"""
    drain: float = DRAIN
    retries: int | None = None
    """how often `advance` is tried again, if it is"""
    restart: bool = False
    exhausted: str = "fail"
    linger: float = 0.0


@dataclass(frozen=True)
class Wish:
    """What a subscriber asks for, and whether it *reads* everything as it comes, or only when it is told to take."""

    reads: bool = False
    even: bool = False
    bounded: bool = False


@dataclass(eq=False)
class Event:
    """An event that was published in one opening, and what those have said of it that were there."""

    number: int
    opening: Opening
    said: dict[Sub, str]

    def has(self, said: str) -> bool:
        return said in self.said.values()

    @property
    def counts(self) -> tuple[int, ...]:
        everything = [*self.said.values()]
        return tuple(everything.count(said) for said in ("acked", "failed", "rejected", "released"))


@dataclass(eq=False)
class Sub:
    """A subscriber: what it has yet to take, what it is busy with, and how it ends."""

    wish: Wish
    unread: list[Event] = field(default_factory=list)
    current: list[Event] = field(default_factory=list)
    taken_at: float = 0.0
    deferred: int = 0
    received: list[tuple[float, int]] = field(default_factory=list)
    waiting: bool = False
    ending: str | None = None
    outcome: str | None = None
    """the ending, once it has seen that"""
    left: bool = False

    def say(self, said: str) -> None:
        for event in self.current:
            event.said[self] = said
        self.current = []

    def acknowledge(self) -> None:
        self.say("acked")

    def take(self, now: float, limit: int = 1) -> None:
        """Be done with what is current, and take as much as there is, up to a limit."""
        self.say("acked")
        self.current, self.unread = self.unread[:limit], self.unread[limit:]
        self.received += [(now, event.number) for event in self.current]
        self.taken_at = now
        if not self.current:
            self.outcome = self.outcome or self.ending

    def read(self, now: float) -> None:
        while (self.wish.reads or self.waiting) and (self.unread or (self.ending and not self.outcome)):
            self.waiting = False
            self.take(now)
        if self.wish.reads and not self.outcome:
            self.say("acked")

    def go(self, ending: str, said: str = "failed") -> None:
        """Take nothing more."""
        self.say(said)
        for event in self.unread:
            event.said[self] = "released"
        self.unread = []
        self.ending = ending

    def late_at(self, patience: float) -> float:
        return self.taken_at + patience if self.current and not self.current[0].opening.dead else inf

    def look(self) -> tuple[Any, ...]:
        return self.received, self.outcome, len(self.current), self.deferred, len(self.unread)


@dataclass(eq=False)
class Lane:
    """Events of one order that have passed, and what of them is being advanced."""

    key: int
    events: list[Event] = field(default_factory=list)
    batch: list[Event] = field(default_factory=list)
    busy: bool = False
    failures: int = 0
    retry_at: float = inf


class Opening:
    """One opening of the upstream: what was published and has not been advanced."""

    def __init__(self, group: Group, number: int) -> None:
        self.group = group
        self.life = group.life
        self.number = number
        self.opened = self.asked = self.waiting = self.draining = self.dead = self.stream_closed = False
        self.gathered: list[int] = []
        self.events: list[Event] = []
        """those that somebody has yet to finish, and those behind them"""
        self.in_flight = self.deferred = self.advanced = 0
        self.lanes: dict[int, Lane] = {}
        self.ready: list[Lane] = []
        self.hung: list[Lane] = []
        self.retrying: list[Lane] = []
        self.stuck_at = self.drain_at = inf

    @property
    def full(self) -> bool:
        return self.in_flight >= self.life.terms.window

    def pull(self) -> None:
        """Take from the broker what there is room for."""
        life, group = self.life, self.group
        if self.draining:
            self._pull_in_vain()
        while self.opened and not (self.draining or self.dead):
            if not self.asked:
                self.flush()
                if self.full or not group.members:
                    self._wait()
                    return
                self.waiting, self.stuck_at = False, inf
            self.asked = True
            if life.queue:
                self.gathered.append(life.queue.pop(0))
                self.asked = self.in_flight + len(self.gathered) < life.terms.window and bool(group.members)
                continue
            self.flush()
            if life.end is not None:
                error, life.end = life.end, None
                self.asked = False
                self.close_stream()
                group.ended(error, drain=True)
            return

    def _pull_in_vain(self) -> None:
        """It was asked for one more before the end; that will come again, from the broker."""
        if self.asked and self.life.queue:
            self.life.queue.pop(0)
            self.asked = False
        elif self.asked and self.life.end is not None:
            self.life.end = None
            self.asked = False
            self.close_stream()

    def _wait(self) -> None:
        if not self.waiting and self.full:
            self.stuck_at = self.life.now + self.life.terms.patience
        self.waiting = True

    def flush(self) -> None:
        members = self.group.members
        if not self.gathered or not members:
            return
        chunk = [Event(number, self, {}) for number in self.gathered]
        self.gathered = []
        self.events += chunk
        self.in_flight += len(chunk)
        self.group.published += len(chunk)
        overflowing: list[Sub] = []
        for sub in members:
            chosen = [event for event in chunk if not (sub.wish.even and event.number % 2)]
            for event in chunk:
                event.said[sub] = "open" if event in chosen else "acked"
            if chosen and sub.unread and sub.wish.bounded and len(sub.unread) + len(chosen) > BOUND:
                overflowing.append(sub)
            sub.unread += chosen
        for sub in overflowing:
            sub.go("SubscriberOverflow")
            self.group.remove(sub)

    def let_pass(self) -> None:
        """Put into its lane whatever everybody has finished."""
        while self.events and not self.events[0].has("open"):
            event = self.events.pop(0)
            key = event.number % self.life.terms.lanes
            lane = self.lanes.setdefault(key, Lane(key))
            lane.events.append(event)
            self.look(lane)
            if self.waiting and self.full and not self.draining:
                self.stuck_at = self.life.now + self.life.terms.patience

    def look(self, lane: Lane) -> None:
        if not lane.busy and lane.events and not lane.events[0].has("deferred"):
            lane.busy = True
            self.ready.append(lane)

    def advance(self) -> None:
        while self.ready and len(self.hung) < self.life.terms.workers and not self.dead:
            lane = self.ready.pop(0)
            while lane.events and not lane.events[0].has("deferred"):
                lane.batch.append(lane.events.pop(0))
            if lane.key in self.life.blocked:
                self.hung.append(lane)
            else:
                self.tried(lane)

    def tried(self, lane: Lane) -> None:
        life, batch = self.life, lane.batch
        lane.batch = []
        if lane.key in life.refusing:
            self._failed(lane, batch)
            return
        for event in batch:
            life.advanced.setdefault(lane.key, []).append(
                (life.now, self.group.opened_before + self.number, event.number, event.counts)
            )
        self.in_flight -= len(batch)
        self.advanced += len(batch)
        lane.failures, lane.busy = 0, False
        if lane.events:
            self.look(lane)
        else:
            del self.lanes[lane.key]

    def _failed(self, lane: Lane, batch: list[Event]) -> None:
        lane.failures += 1
        if lane.failures > (self.life.terms.retries or 0):
            self.die()
            self.group.ended("BrokerError('refused')", drain=False)
        else:
            lane.events = batch + lane.events
            lane.retry_at = self.life.now + RETRY * 2 ** (lane.failures - 1)
            self.retrying.append(lane)

    def drain(self) -> None:
        self.draining = True
        self.stuck_at = inf
        self.wait_for_the_rest()

    def wait_for_the_rest(self) -> None:
        self.drain_at = min(self.drain_at, self.life.now + self.life.terms.drain)

    def die(self) -> None:
        """Nothing is advanced any more."""
        self.dead = True
        self.stuck_at = self.drain_at = inf
        self.retrying = []
        self.events = []

    def close_stream(self) -> None:
        if not self.stream_closed:
            self.stream_closed = True
            self.life.log.append("stream closed")

    def close(self) -> None:
        self.die()
        if self.opened:
            self.close_stream()
            self.life.log.append("closed")

    def statistics(self) -> tuple[int, ...]:
        return self.in_flight, self.deferred, len(self.hung), len(self.retrying), self.advanced, len(self.lanes)


class Group:
    """All that happens from a subscriber who finds nobody to the closing of the last upstream that this leads to."""

    def __init__(self, life: Life) -> None:
        self.life = life
        self.state = "waiting"
        self.members: list[Sub] = []
        self.opened_before = 0
        self.published = self.epoch = 0
        self.opening = Opening(self, 1)
        self.linger_at = self.reopen_at = inf
        self.waiters: list[str] = []

    def open(self) -> None:
        self.state = "live"
        self.epoch = self.opening.number
        self.reopen_at = inf
        self.opening.opened = True
        self.life.opened += 1
        self.opened_before = self.life.opened - self.epoch

    def join(self, sub: Sub) -> None:
        self.members.append(sub)
        if self.state in ("lingering", "draining"):
            self.state = "live"
        self.linger_at = self.opening.drain_at = inf

    def remove(self, sub: Sub) -> bool:
        """Remove a subscriber; True if that means the end."""
        if sub not in self.members:
            return False
        self.members.remove(sub)
        if self.members:
            return False
        if self.state == "live" and self.life.terms.linger:
            self.state = "lingering"
            self.linger_at = self.life.now + self.life.terms.linger
        else:
            self.wait_or_cancel()
        return self.state == "closing"

    def wait_or_cancel(self) -> None:
        """There are no subscribers any more; those who were may have something to say."""
        self.linger_at = inf
        if self.opening.deferred:
            self.state = "draining"
            self.opening.wait_for_the_rest()
        else:
            self.cancel()

    def cancel(self) -> None:
        self._evict()
        if self.opening.opened:
            self.opening.drain()
        else:
            self.close()

    def _evict(self) -> None:
        if self.state != "closing":
            self.state = "closing"
            self.linger_at = self.reopen_at = inf
            self.life.group = None
            self.life.closing.append(self)

    def dismiss(self, ending: str) -> None:
        for sub in self.members:
            sub.ending = ending
        self.members = []

    def ended(self, error: str, *, drain: bool) -> None:
        """The upstream has ended by itself; if it can be told no more, it does not *drain*."""
        terms = self.life.terms
        wanted = terms.exhausted == "restart" if error == "exhausted" else terms.restart
        if wanted and self.members and self.state == "live":
            for sub in self.members:
                sub.unread = []
            self.opening.close()
            self.opening = Opening(self, self.opening.number + 1)
            self.state = "restarting"
            self.reopen_at = self.life.now + DELAY
            return
        self._evict()
        if error == "exhausted":
            error = "EndOfStream" if terms.exhausted == "end" else "PollTerminated"
        self.dismiss(error)
        if drain:
            self.opening.drain()
        else:
            self.close()

    def close(self) -> None:
        self.opening.close()
        self.life.closing.remove(self)
        self.life.returned(self)

    def stuck(self) -> None:
        opening = self.opening
        oldest = opening.events[:1]
        first = [sub for sub in self.members if oldest and oldest[0].said.get(sub) == "open"]
        opening.stuck_at = self.life.now + self.life.terms.patience if not first else inf
        for sub in first:
            sub.go("AckTimeout")
            self.remove(sub)

    def look(self) -> tuple[Any, ...]:
        return self.state, self.epoch, self.opening.number - 1, self.published, len(self.members), self.opening.waiting


class Life:
    """One key, its groups, its broker, and everybody who has ever subscribed. Its public methods up to `stop` are actions."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.now = 0.0
        self.group: Group | None = None
        self.closing: list[Group] = []
        self.subs: list[Sub] = []
        self.pendings: list[tuple[Sub, list[Event]] | None] = []
        self.queue: list[int] = []
        self.end: str | None = None
        self.blocked: set[int] = set()
        self.refusing: set[int] = set()
        self.opened = self.emitted = 0
        self.log: list[str] = []
        self.advanced: dict[int, list[tuple[float, int, int, tuple[int, ...]]]] = {}
        self.returns: list[tuple[str, float]] = []
        self._stops: list[tuple[str, list[Group]]] = []

    def _sub(self, index: int) -> Sub:
        return self.subs[index % len(self.subs)]

    def join(self, wish: Wish) -> None:
        self.group = self.group or Group(self)
        self.subs.append(Sub(wish))
        self.group.join(self.subs[-1])

    def leave(self, index: int, how: str) -> None:
        sub = self._sub(index)
        if not sub.left:
            sub.left = True
            sub.go("ClosedResourceError", "acked" if how == "well" else "failed")
            group = self.group
            name = f"leave {self.subs.index(sub)}"
            last = group is not None and group.remove(sub)
            self._wait(name, [group] if last and group in self.closing else [])

    def _wait(self, name: str, groups: list[Group]) -> None:
        if groups:
            self._stops.append((name, groups))
        else:
            self.returns.append((name, self.now))

    def returned(self, group: Group) -> None:
        waits = [(name, [other for other in groups if other is not group]) for name, groups in self._stops]
        self.returns += [(name, self.now) for name, groups in waits if not groups]
        self._stops = [wait for wait in waits if wait[1]]

    def take(self, index: int, count: int) -> None:
        sub = self._sub(index)
        for _ in range(0 if sub.waiting or sub.wish.reads else count):
            sub.take(self.now)

    def batch(self, index: int, size: int) -> None:
        sub = self._sub(index)
        if sub.unread and not sub.wish.reads:
            sub.take(self.now, size)

    def wait(self, index: int) -> None:
        sub = self._sub(index)
        if not sub.wish.reads and not sub.waiting:
            sub.acknowledge()
            sub.waiting = True

    def cancel(self, index: int) -> None:
        self._sub(index).waiting = False

    def say(self, index: int, said: str) -> None:
        self._sub(index).say(said)

    def defer(self, index: int) -> None:
        sub = self._sub(index)
        if sub.current and sub.deferred + len(sub.current) <= self.terms.window:
            opening = sub.current[0].opening
            self.pendings.append((sub, sub.current))
            sub.deferred += len(sub.current)
            opening.deferred += len(sub.current)
            sub.say("deferred")

    def resolve(self, index: int, said: str) -> None:
        if self.pendings:
            place = index % len(self.pendings)
            pending, self.pendings[place] = self.pendings[place], None
            if pending is not None:
                self._resolve(*pending, said)

    def _resolve(self, sub: Sub, events: list[Event], said: str) -> None:
        sub.deferred -= len(events)
        for event in events:
            event.said[sub] = said
        if not (opening := events[0].opening).dead:
            opening.deferred -= len(events)
            for event in [event for event in events if event not in opening.events]:
                opening.look(opening.lanes[event.number % self.terms.lanes])
            if not opening.deferred and opening.group.state == "draining":
                opening.group.cancel()

    def emit(self, count: int) -> None:
        self.queue += range(self.emitted, self.emitted + count)
        self.emitted += count

    def fail(self) -> None:
        self.end = "BrokerError('failed')"

    def exhaust(self) -> None:
        self.end = "exhausted"

    def block(self, lane: int) -> None:
        self.blocked.add(lane % self.terms.lanes)

    def unblock(self, lane: int) -> None:
        key = lane % self.terms.lanes
        self.blocked.discard(key)
        for group in self._groups():
            for lane_ in [lane_ for lane_ in group.opening.hung if lane_.key == key and not group.opening.dead]:
                group.opening.hung.remove(lane_)
                group.opening.tried(lane_)
                group.opening.advance()  # the one that was held up goes on before anybody else can

    def refuse(self, lane: int) -> None:
        self.refusing.add(lane % self.terms.lanes)

    def accept(self, lane: int) -> None:
        self.refusing.discard(lane % self.terms.lanes)

    def stop(self, name: str = "stop") -> None:
        group = self.group
        if group is not None:
            group.cancel()
            group.dismiss("EndOfStream")
        self._wait(name, [*self.closing])

    def _groups(self) -> list[Group]:
        return [*self.closing, *([self.group] if self.group else [])]

    def settle(self) -> None:
        """Let everything happen that needs no time."""
        before = None
        while before != (before := self._progress()):
            for group in self._groups():
                if group.state == "waiting" and not self.closing:
                    group.open()
                group.opening.pull()
            for sub in self.subs:
                sub.read(self.now)
            for group in self._groups():
                group.opening.let_pass()
                group.opening.advance()
                if group in self.closing and not group.opening.in_flight:
                    group.close()

    def _progress(self) -> tuple[Any, ...]:
        return repr(self.look()), len(self.queue), self.end, [len(sub.unread) for sub in self.subs]

    def advance(self, until: float) -> None:
        """Let the time pass."""
        while (due := min(self._deadlines())) <= until:
            self.now = due
            for sub in [sub for sub in self.subs if sub.late_at(self.terms.patience) == due]:
                opening = sub.current[0].opening
                sub.go("AckTimeout")
                opening.group.remove(sub)
                opening.let_pass()  # so whoever stands at the next event is given time
            for group in self._groups():
                self._fire(group, group.opening)
            self.settle()
        self.now = until

    def _fire(self, group: Group, opening: Opening) -> None:
        for lane in [lane for lane in opening.retrying if lane.retry_at == self.now]:
            opening.retrying.remove(lane)
            opening.ready.append(lane)
        if opening.stuck_at == self.now:
            group.stuck()
        if group.linger_at == self.now:
            group.wait_or_cancel()
        if group.reopen_at == self.now:
            group.open()
        if opening.drain_at == self.now:
            group._evict()
            group.close()

    def _deadlines(self) -> list[float]:
        found = [sub.late_at(self.terms.patience) for sub in self.subs]
        for group in self._groups():
            opening = group.opening
            found += [opening.stuck_at, opening.drain_at, group.linger_at, group.reopen_at]
            found += [lane.retry_at for lane in opening.retrying]
        return [inf, *found]

    def look(self) -> dict[str, Any]:
        group = self.group
        return {
            "opened": self.opened,
            "log": self.log,
            "advanced": self.advanced,
            "returned": sorted(self.returns),
            "group": group and (*group.look(), group.opening.statistics()),
            "closing": [group.opening.statistics() for group in self.closing],
            "subscribers": [sub.look() for sub in self.subs],
        }
