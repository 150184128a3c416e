"""One key's life, with exact times, in plain lists and without a loop: the reference that the library is compared with.

Whatever somebody does takes effect at once; what follows by itself at the same time, and what comes with the time, does so in
`Life.settle` and `Life.advance`. Times are added up in the same way as by clocks that are exact, so they are equal, not close.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Literal

from anyio_sharedstream import Gap, Snapshot

# Sums of a few of these are neither equal nor multiples of a quarter, so what happens at one time has one cause.
_UNIT = 2.0**-28
DELAY = 1 + 2**20 * _UNIT
MAX_DELAY = 4 * DELAY
SILENCE = 5 + 2**14 * _UNIT
CLOSE = 3 + 2**10 * _UNIT
SLOW = 2 + 2**6 * _UNIT
LINGER = 4 + 2**3 * _UNIT
GRACE = 2 + _UNIT
WITHIN = 20.5

#: How many events a subscriber holds that drops more of them.
BOUND = 3

Item = int | Gap | Snapshot[Any]
GapCause = Literal["overflow", "restart"]
RESTARTED = Gap(None, "restart")


@dataclass(frozen=True)
class Terms:
    """The policies of a source, and whether it cleans up *apart* from its generator, in a context manager around it."""

    apart: bool = False
    linger: float = 0.0
    grace: float | None = None
    least: int = 1
    restart: bool = False
    most: int | None = None
    picky: bool = False
    """whether it is opened again after silence alone"""
    exhausted: str = "fail"
    replay: int = 0
    age: float | None = None
    fold: bool = False
    silence: float | None = None
    close: float | None = None

    def consistent(self) -> Terms:
        """The same, without what means nothing by itself."""
        exhausted = "fail" if self.exhausted == "restart" and not self.restart else self.exhausted
        return replace(self, exhausted=exhausted, age=self.age if self.replay else None)

    def grant(self, wish: Wish) -> Wish:
        """What can be asked for under these terms."""
        return replace(wish, snapshot=wish.snapshot and self.fold, drops=wish.drops and wish.snapshot and self.fold)


@dataclass(frozen=True)
class Wish:
    """What a subscriber asks for, and whether it *reads* everything as it comes, or only when it is told to take."""

    reads: bool = False
    gaps: bool = False
    snapshot: bool = False
    drops: bool = False
    """whether it drops rather than have more than `BOUND` events; only with *snapshot*"""
    even: bool = False
    """whether it wants even events alone"""


@dataclass(eq=False)
class Sub:
    """A subscriber: what it has yet to take, what it has taken and when, and how it ends."""

    wish: Wish
    epoch: int = 0
    unread: list[Item] = field(default_factory=list)
    received: list[tuple[float, Item]] = field(default_factory=list)
    ending: str | None = None
    outcome: str | None = None
    """the ending, once it has seen that"""
    last: bool = False
    """whether nobody was left when it left"""
    lost: dict[GapCause, int | None] | None = None
    """what it has missed since it has dropped everything, in order; there is nothing else then"""

    def _marks(self) -> list[Item]:
        """Whatever stands behind the last event."""
        return [*takewhile(lambda item: not isinstance(item, int), reversed(self.unread))]

    def welcome(self, state: tuple[int, ...], replayed: list[int]) -> None:
        if self.wish.snapshot:
            self.state_begins(state)
        else:
            self.give(replayed)

    def state_begins(self, state: tuple[int, ...]) -> None:
        if self.wish.snapshot and self.lost is None:
            self.unread.append(Snapshot(state))

    def give(self, events: list[int]) -> None:
        chosen = [event for event in events if not (self.wish.even and event % 2)]
        held = sum(isinstance(item, int) for item in self.unread)
        if self.lost is not None:
            self._lose(chosen)
        elif chosen and self.wish.drops and held and held + len(chosen) > BOUND:
            self.lost = {}
            self._lose([*self.unread, *chosen])
            self.unread = []
        else:
            self.unread += chosen

    def _lose(self, items: Sequence[Item]) -> None:
        assert self.lost is not None
        for item in items:
            if isinstance(item, int):
                self.lost["overflow"] = (self.lost.get("overflow") or 0) + 1
            elif isinstance(item, Gap):
                self.lost[item.cause] = item.missed and (self.lost.get(item.cause) or 0) + item.missed

    def interrupted(self) -> None:
        """The upstream will be opened again. A state that it has not seen is not worth seeing any more."""
        if self.lost is not None:
            self.lost["restart"] = None
            return
        if self.unread and isinstance(self.unread[-1], Snapshot):
            self.unread.pop()
        if self.wish.gaps and RESTARTED not in self._marks():
            self.unread.append(RESTARTED)

    def _resume(self, state: tuple[int, ...] | None) -> None:
        """Go on with what there is instead of the events, if there is anything."""
        if self.lost is not None and (self.wish.gaps or state is not None):
            self.unread = [Gap(missed, cause) for cause, missed in self.lost.items() if self.wish.gaps]
            self.lost = None
            if state is not None:
                self.unread.append(Snapshot(state))

    def take(self, now: float, state: tuple[int, ...] | None, limit: int = 1000) -> None:
        self._resume(state)
        items, self.unread = self.unread[:limit], self.unread[limit:]
        self.received += [(now, item) for item in items]
        if len(items) < limit:
            self.outcome = self.outcome or self.ending

    def end(self, ending: str, state: tuple[int, ...] | None) -> None:
        self._resume(state)
        self.lost = None
        self.ending = ending

    def close(self) -> None:
        self.unread, self.lost = [], None
        self.ending = "ClosedResourceError"

    def look(self) -> tuple[Any, ...]:
        return self.received, self.outcome, self.epoch


@dataclass(eq=False)
class Run:
    """One opening of the upstream."""

    number: int
    live_at: float | None = None
    ending: str | None = None
    ended_at: float = 0.0
    seen: bool = False
    """whether it can be known that it has ended"""
    stuck: bool = False
    """whether its clean-up is held"""
    closed: bool = False
    decided: bool = False
    delay: float | None = None
    """after how many seconds it is followed by another"""


class Group:
    """All that happens from a subscriber who finds nobody to the closing of the last upstream that this leads to."""

    def __init__(self, life: Life, earlier: Group | None) -> None:
        self.life = life
        self.terms = life.terms
        self.earlier = earlier
        self.state = "waiting"
        self.subs: list[Sub] = []
        self.runs: list[Run] = []
        self.run: Run | None = None
        """the latest, until that has closed or nobody waits for it any more"""
        self.requested = False
        self.complete = self.terms.grace is None and self.terms.least == 1
        self.deadlines = {} if self.terms.grace is None else {"cohort": life.now + self.terms.grace}
        self.epoch = self.restarts = self.published = 0
        self.last_event_at: float | None = None
        self.last_error: str | None = None
        self.folded: tuple[int, ...] | None = None
        """the state; None while there is no upstream that it would be of"""
        self.latest: list[tuple[float, int]] = []
        self._failed_in: tuple[int, ...] | None = None  # the state at a failure, until it is known what follows
        self._bereft: list[Sub] = []  # who was there when the upstream failed
        self._delay = DELAY
        self._restarted_at: list[float] = []

    @property
    def evicted(self) -> bool:
        return self.state == "closing"

    @property
    def released(self) -> bool:
        return self.evicted and self.run is None

    @property
    def gone(self) -> bool:
        return self.evicted and all(run.closed for run in self.runs)

    # Subscribers.

    def join(self, sub: Sub) -> None:
        self.subs.append(sub)
        sub.epoch = self.epoch
        if self.state == "lingering":
            self.deadlines.pop("lingered")
            self.state = "opening" if self.run is not None and self.run.live_at is None else "live"
        if len(self.subs) >= self.terms.least > 1:
            self.cohort()
        if self.folded is not None:
            youngest = 0.0 if self.terms.age is None else self.life.now - self.terms.age
            replayed = [event for time, event in self.latest[-self.terms.replay :] if time >= youngest]
            sub.welcome(self.folded, replayed if self.terms.replay else [])

    def leave(self, sub: Sub) -> None:
        self.subs.remove(sub)
        if self.subs:
            return
        if self.terms.linger and self.state in ("opening", "live"):
            self.state = "lingering"
            self.deadlines["lingered"] = self.life.now + self.terms.linger
        else:
            self.request()

    def _dismiss(self, ending: str) -> None:
        for sub in self.subs:
            sub.end(ending, self.folded)
        self.subs.clear()

    def may_open(self) -> bool:
        earlier = self.earlier is None or self.earlier.released
        return self.state == "waiting" and self.complete and earlier

    # Time. Each of these has the name of its deadline.

    def cohort(self) -> None:
        self.complete = True
        self.deadlines.pop("cohort", None)

    def lingered(self) -> None:
        self.request()

    def live(self) -> None:
        assert self.run is not None
        self.run.live_at = self.life.now
        if self.state == "opening":
            self.state = "live"

    def silent(self) -> None:
        run = self.run
        assert run is not None
        run.ending = "UpstreamSilent"
        self._see(run, apart=False)
        self._clean_up(run)

    def late(self) -> None:
        assert self.run is not None
        self._settle(self.run)

    def open(self) -> None:
        now = self.life.now
        self.run = run = Run(len(self.life.opens))
        self.runs.append(run)
        self.life.opens.append(now)
        self.epoch += 1
        self.state = "opening"
        self.folded = ()
        for sub in self.subs:
            sub.epoch = self.epoch
            sub.state_begins(self.folded)
        if self.terms.silence is not None:
            self.deadlines["silent"] = now + self.terms.silence
        if self.life.refusals:
            self.life.refusals -= 1
            self.ends("SourceError('refused')")
        elif self.terms.apart and self.life.slow:
            self.deadlines["live"] = now + SLOW
        else:
            self.live()

    # What the upstream does.

    def at_work(self) -> bool:
        return self.run is not None and self.run.live_at is not None and self.run.ending is None

    def publish(self, events: list[int]) -> None:
        assert self.folded is not None
        now = self.life.now
        self.published += len(events)
        self.last_event_at = now
        self.folded += tuple(events)
        self.latest += [(now, event) for event in events]
        if self.terms.silence is not None:
            self.deadlines["silent"] = now + self.terms.silence
        for sub in self.subs:
            sub.give(events)

    def ends(self, ending: str, *, final: bool = False) -> None:
        """It ends by itself. If its clean-up hangs, inside of it, nobody can know; unless the end did not come from there."""
        run = self.run
        assert run is not None
        run.ending = ending
        run.stuck = self.life.held and run.live_at is not None
        run.decided = final
        if final or self.terms.apart or not run.stuck:
            self._see(run, apart=self.terms.apart and run.live_at is not None)
            self._clean_up(run)

    def let_go(self) -> None:
        """Clean-ups are not held any more."""
        for run in self.runs:
            if run.stuck and not run.closed:
                if not (run.seen or self.evicted):
                    self._see(run, apart=False)
                self.close(run)

    # What follows.

    def request(self) -> None:
        """It is to end, and unless it does so already, for no other reason."""
        run = self.run
        if not self.evicted:
            self.requested = True
            self._evict()
            if run is not None:
                self._begin_to_close()
                if run.ending is None:
                    run.ending = "cancelled"
                    self._clean_up(run)
        if self.requested:
            self._dismiss("EndOfStream")

    def _see(self, run: Run, *, apart: bool) -> None:
        """Its end is known, but if something *apart* from it may change the reason, what that means is not."""
        run.seen = True
        run.ended_at = self.life.now
        undecided = apart and self.terms.restart and not run.decided
        if not (run.decided or undecided):
            self._decide(run)
        if self.state == "lingering" or not (undecided or run.delay is not None):
            self._evict()
        else:
            self.state = "restarting"
            self.deadlines.pop("silent", None)
            self._failed_in, self.folded, self.latest = self.folded, None, []
            self._bereft = [*self.subs]
        self._begin_to_close()

    def _evict(self) -> None:
        if not self.evicted:
            if self._failed_in is not None:
                self.folded = self._failed_in  # no other follows
            self.state = "closing"
            self.life.accepting = None
            self.deadlines = {name: time for name, time in self.deadlines.items() if name == "late"}

    def _begin_to_close(self) -> None:
        self.deadlines.pop("live", None)
        if self.terms.close is not None:
            self.deadlines.setdefault("late", self.life.now + self.terms.close)

    def _clean_up(self, run: Run) -> None:
        run.stuck = run.stuck or (self.life.held and run.live_at is not None)
        if not run.stuck:
            self.life.ready_to_close.append((self, run))

    def close(self, run: Run) -> None:
        run.closed = True
        self.life.closes.append((self.life.now, run.number))
        if run is self.run:
            self.deadlines.pop("late", None)
            self._settle(run)

    def _settle(self, run: Run) -> None:
        """The upstream has closed, or nobody waits for that any more."""
        self.run = None
        if self.requested:
            return
        if not (self.evicted or run.decided):
            self._decide(run)
        assert run.ending is not None
        if self.evicted or run.delay is None:
            self._evict()
            at_end = run.ending == "PollTerminated" and self.terms.exhausted == "end"
            self.last_error = self.last_error if at_end else run.ending
            self._dismiss("EndOfStream" if at_end else run.ending)
        else:
            self.last_error = run.ending
            self.restarts += 1
            self._failed_in = None
            self.deadlines["open"] = self.life.now + run.delay
            for sub in self._bereft:
                if sub in self.subs:
                    sub.interrupted()

    def _decide(self, run: Run) -> None:
        """Whether another one follows."""
        terms, now = self.terms, self.life.now
        run.decided = True
        wanted = not terms.picky or run.ending == "UpstreamSilent"
        if run.ending == "PollTerminated":
            wanted = terms.exhausted == "restart"
        self._restarted_at = [time for time in self._restarted_at if now - time < WITHIN]
        if terms.restart and wanted and len(self._restarted_at) != terms.most:
            if run.live_at is not None and run.ended_at - run.live_at > MAX_DELAY:
                self._delay = DELAY
            self._restarted_at.append(now)
            run.delay, self._delay = self._delay, min(2 * self._delay, MAX_DELAY)

    def look(self) -> tuple[Any, ...]:
        """What statistics say. Between its end and its closing, whether an upstream counts as open is nobody's business."""
        live_at = None if self.run is None else self.run.live_at
        opened_at = live_at if self.state in ("opening", "live", "lingering") else None
        facts = (self.state, self.epoch, self.restarts, self.published, self.last_event_at, self.last_error)
        return *facts, opened_at, len(self.subs)


@dataclass(eq=False)
class Life:
    """The key: its groups, one after the other, and whoever waits for them."""

    terms: Terms
    now: float = 0.0
    groups: list[Group] = field(default_factory=list)
    accepting: Group | None = None
    subs: list[tuple[Sub, Group]] = field(default_factory=list)
    opens: list[float] = field(default_factory=list)
    closes: list[tuple[float, int]] = field(default_factory=list)
    returns: list[tuple[str, float]] = field(default_factory=list)
    """who has waited for something to close, and until when"""
    ready_to_close: list[tuple[Group, Run]] = field(default_factory=list)
    """whose clean-ups nothing holds"""
    refusals: int = 0
    held: bool = False
    slow: bool = False
    emitted: int = 0
    failures: int = 0
    _waiting: list[tuple[str, Callable[[], bool]]] = field(default_factory=list)

    def act(self, name: str, *arguments: Any) -> None:
        getattr(self, name)(*arguments)

    # Time.

    def advance(self, time: float, *, up_to: bool = False, amid: bool = False) -> None:
        """Let everything happen until then.

        What comes up just then does so as well, unless it is only *up_to* then, and so does all that follows from it, unless this
        is *amid* that, when nobody else has run.
        """
        while due := [
            (when, name, group)
            for group in self.groups
            for name, when in group.deadlines.items()
            if when < time or (when == time and not up_to)
        ]:
            self.now, name, group = min(due, key=lambda entry: entry[0])
            del group.deadlines[name]
            getattr(group, name)()
            if not (amid and self.now == time):
                self.settle()
        self.now = time

    def settle(self) -> None:
        """Let happen what nothing has to be waited for any more for."""
        closing, self.ready_to_close = self.ready_to_close, []
        for group, run in closing:
            group.close(run)
        accepting = self.accepting
        if accepting is not None and accepting.may_open():
            accepting.open()
            self.settle()
        for sub, group in self.subs:
            if sub.wish.reads:
                sub.take(self.now, group.folded)
        for name, over in [*self._waiting]:
            if over():
                self._waiting.remove((name, over))
                self.returns.append((name, self.now))

    # What can be done.

    def join(self, wish: Wish) -> None:
        if self.accepting is None:
            openers = [group for group in self.groups if group.runs and not group.released]
            self.accepting = Group(self, openers[-1] if openers else None)
            self.groups.append(self.accepting)
        sub = Sub(self.terms.grant(wish))
        self.subs.append((sub, self.accepting))
        self.accepting.join(sub)

    def leave(self, index: int) -> None:
        number, sub, group = self._sub(index)
        present = sub in group.subs
        sub.close()
        if present:
            group.leave(sub)
            sub.last = group.evicted and not group.subs
        self._waiting.append((f"leave {number}", lambda: group.released or not sub.last))

    def take(self, index: int, limit: int = 1000) -> None:
        _, sub, group = self._sub(index)
        if not sub.wish.reads:
            sub.take(self.now, group.folded, limit)

    def _sub(self, index: int) -> tuple[int, Sub, Group]:
        number = index % len(self.subs)
        return number, *self.subs[number]

    def stop(self) -> None:
        self._end("stop", lambda group: group.released)

    def exit(self) -> None:
        self._end("exit", lambda group: group.gone)

    def _end(self, name: str, over: Callable[[Group], bool]) -> None:
        groups = [*self.groups]
        for group in groups:
            group.request()
        self._waiting.append((name, lambda: all(map(over, groups))))

    def emit(self, count: int) -> None:
        """As everything that is done to the upstream, this does nothing while there is none at work."""
        group = self._at_work()
        if group is not None:
            events = [*range(self.emitted, self.emitted + count)]
            self.emitted += count
            group.publish(events)

    def poison(self) -> None:
        """What the fold cannot take: an event, if there is a fold."""
        group = self._at_work()
        if group is not None and self.terms.fold:
            group.ends("StepError", final=True)

    def fail(self) -> None:
        group = self._at_work()
        if group is not None:
            self.failures += 1
            group.ends(f"SourceError({self.failures})")

    def exhaust(self) -> None:
        group = self._at_work()
        if group is not None:
            group.ends("PollTerminated")

    def _at_work(self) -> Group | None:
        group = self.accepting
        return group if group is not None and group.at_work() else None

    def refuse(self, count: int) -> None:
        """So many openings fail, from the next one on."""
        self.refusals = count

    def slow_down(self, slow: bool) -> None:
        """Openings take `SLOW` seconds, in a context manager."""
        self.slow = slow

    def hold(self) -> None:
        """Clean-ups that begin from now on hang."""
        self.held = True

    def let_go(self) -> None:
        self.held = False
        for group in self.groups:
            group.let_go()

    def look(self) -> dict[str, Any]:
        """Everything that can be seen from outside."""
        closing = [group.epoch for group in self.groups if group.evicted and not group.gone]
        accepting = [] if self.accepting is None else [self.accepting]
        for group in self.groups:
            if not group.gone:
                # The latest opening of a group that is closing is what that says of itself.
                others = group.runs[: group.epoch - 1] if group.evicted else [run for run in group.runs if run is not group.run]
                closing += [place for place, run in enumerate(others, 1) if not run.closed]
        return {
            "opened": self.opens,
            "closed": sorted(self.closes),
            "returned": sorted(self.returns),
            "group": [group.look() for group in accepting],
            "closing": sorted(closing),
            "subscribers": [sub.look() for sub, _ in self.subs],
        }
