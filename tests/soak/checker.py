"""What one consumer may receive: checked at every item, at its terminal, and whenever somebody looks.

Relies on `openings` for what was yielded. A checker stands at a place: what comes next there has yet to be received.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from math import inf
from typing import Any

from anyio import ClosedResourceError, EndOfStream, current_time

from anyio_sharedstream import (
    AckTimeout,
    Block,
    Conflate,
    Fail,
    Gap,
    Latest,
    PollTerminated,
    Snapshot,
    SubscriberOverflow,
    UpstreamSilent,
)
from anyio_sharedstream._subscription import Receiver
from tests.soak.brokers import AdvanceError
from tests.soak.openings import Event, Place, Record, UpstreamError
from tests.soak.wishes import Wish, conflated_by

#: How an opening ends that subscribers are told of by `PollTerminated`; nobody has asked for that cancellation.
TERMINATED = {"returns", "leaks EndOfStream", "is cancelled", "raises no Exception"}
#: How it may have returned: a task group takes a cancellation that nobody asked for as its own.
RETURNED = {"returns", "is cancelled"}


class Checker:
    """Receives along with one consumer."""

    stream: Receiver[Any]

    def __init__(self, record: Record, wish: Wish) -> None:
        self.record = record
        self.world = record.world
        self.wish = wish
        self.sieve = wish.sieve
        self.place: Place = (0, 0)
        self.receiving = False
        self.calls = 0  # how often it has asked for something
        self.taken_at = 0.0
        self._stood_since = 0.0  # when it took what came before that: it may have stood at the latest ones since then
        self._latest: deque[Any] = deque(maxlen=5)  # what it has received last
        self._earliest: Place = (0, 0)  # where the first item may be
        self._joined_at: Place = (0, 0)  # what had been published before
        self._joined_late = True  # whether the upstream had ended already, and it need not be told of that
        self._exact = True  # whether it is known at which event it began
        self._openings = 0  # how many there had been, and of those before how many were not of its group
        self._owed = 0  # what gaps have told of, and the next item must confirm
        self._told = False  # whether a gap has told of a restart
        self._jumped = 0  # what is missing
        self._state_of = 0  # the opening of the last snapshot
        self._forgotten: tuple[int, bool, bool] | None = None  # what it was waiting in, when somebody looked

    def joined(self, stream: Receiver[Any]) -> None:
        """It has been entered, in this very moment."""
        self.stream = stream
        record, policies = self.record, self.record.policies
        self._openings = len(record.openings) - stream.epoch
        self._stood_since = self.taken_at = current_time()
        self._joined_late = False
        if not stream.epoch:
            self.place = self._earliest = (len(record.openings) + 1, 0)
            return
        last = record.openings[-1]
        # Its clean-up has begun, or it is silent: perhaps that is known already, and perhaps not.
        ending = last.closing_since is not None or last.disturbed or policies["silence_timeout"] is not None
        self._joined_late = ending
        self.place = self._earliest = self._joined_at = (last.number, last.yielded)
        replay = 0 if self.wish.snapshot else policies.get("replay", 0)
        if replay:
            self._earliest = (last.number, max(0, last.yielded - replay))
        unknown = policies.get("replay_max_age") or isinstance(self.wish.policy, Latest) or ending
        self._exact = not (replay and unknown)
        if self._exact:
            self.place = self._earliest
        if self.record.acknowledged:
            self._earliest = (last.number, 0)  # what nobody was there for has waited

    @property
    def opening(self) -> int:
        """The number of the latest opening that it knows of."""
        return self._openings + self.stream.epoch

    def item(self, item: Any) -> None:
        """It has received something."""
        self._latest.append(item)
        self.world.done["items received"] += 1
        if isinstance(item, Gap):
            self._gap(item)
        elif isinstance(item, Snapshot):
            self._snapshot(item.state)
        else:
            self._event(item)

    def _gap(self, gap: Gap) -> None:
        check, world = self.world.check, self.world
        check(self.wish.gaps, "gaps are for those who ask for them", self)
        if gap.cause == "restart":
            check(gap.missed is None and self.record.policies.get("restart"), "a gap tells of a restart", self, gap)
            self._told = True
        else:
            check(gap.missed and not self.wish.lossless, "a gap tells how much is missing", self, gap)
            self._owed += gap.missed or 0
        world.done["gaps received"] += 1

    def _snapshot(self, state: Any) -> None:
        opening, number, total = state
        self.world.check(total == number * (number - 1) // 2 and self.wish.snapshot, "a snapshot equals the fold", self, state)
        self.world.done["snapshots received"] += 1
        self._move((opening, number))
        self._state_of = opening

    def _event(self, event: Event) -> None:
        number, check = event.opening.number, self.world.check
        if current_time() > self.taken_at:
            self._stood_since, self.taken_at = self.taken_at, current_time()
        genuine = event.opening.record is self.record and (event.kind == "event" or self.world.interrupted)
        check(genuine, "events are of the key, and in time", self, event)
        check(self.sieve.passes(event.number), "events are those that were asked for", self, event)
        check(number <= self.opening, "the epoch counts openings", self, event, self.opening)
        check(not self.wish.snapshot or self._state_of == number, "a snapshot comes before its events", self, event)
        self._receive(event)

    def _receive(self, event: Event) -> None:
        self._move((event.opening.number, event.number))
        self.place = self._earliest = (event.opening.number, event.number + 1)

    def _move(self, to: Place) -> None:
        check = self.world.check
        check(to >= self._earliest, "in order, without repetition", self, self._earliest, to)
        restarted = to[0] > self.place[0]
        start = self.place
        if self.record.acknowledged and restarted:
            start = (to[0], 0)  # the broker delivers again what nobody has taken
        counted = to if self.sieve.raised is None else min(to, self.sieve.raised)  # what came then, nobody can say
        missing = self.sieve.passed(self.record, start, counted) if counted > start else 0
        self._miss(missing, to)
        check(not restarted or self.record.policies.get("restart"), "no other upstream without a restart", self, to)
        told = self._told or self._joined_late or not self.wish.gaps
        check(told if restarted else not self._told, "a gap tells of each restart", self, to)
        self._told = self._joined_late = False
        self.place = self._earliest = to

    def _miss(self, missing: int, to: Place) -> None:
        known = self.wish.lossless or (self.wish.gaps and self._exact)
        expected = self._owed if known else missing
        promise = "a contiguous run" if self.wish.lossless else "gaps account for what is missing"
        self.world.check(missing == expected, promise, self, missing, expected, to)
        self._jumped += missing
        self._owed = 0

    # The end.

    def terminal(self, error: BaseException) -> None:
        """This is how it ends."""
        self._latest.append(error)
        self.world.done[f"terminals: {type(error).__name__}"] += 1
        self.world.check(self._expected(error), "a terminal that can be", self, error)
        self.world.check(not hasattr(error, "__notes__"), "an exception of one's own", self, error)
        error.add_note("received")
        for _ in range(2):
            again = attempt(self.stream.receive_nowait)
            same = repr(again) == repr(error) and not hasattr(again, "__notes__")
            self.world.check(same, "exactly one terminal, which repeats", self, error, again)
        if not isinstance(error, SubscriberOverflow | AckTimeout | ClosedResourceError):
            self._complete()

    def _expected(self, error: BaseException) -> object:
        record, opening = self.record, self.record.openings[self.opening - 1 : self.opening]
        ending = opening[0].ending if opening else None
        match error:
            case UpstreamError():
                return error.opening == self.opening
            case ExceptionGroup():
                leaked = ending in TERMINATED
                return all(self._expected(member) or (leaked and isinstance(member, EndOfStream)) for member in error.exceptions)
            case PollTerminated():
                return ending in TERMINATED or self.world.interrupted
            case UpstreamSilent():
                return current_time() - opening[0].yielded_at >= (record.policies["silence_timeout"] or inf) - 1e-3
            case ZeroDivisionError():
                return self.sieve.raised
            case SubscriberOverflow():
                return self._too_slow() or self.world.interrupted  # for what swallows that cancellation, and yields again
            case EndOfStream():
                returned = ending in RETURNED and record.policies.get("on_exhausted") == "end"
                return returned or not opening or opening[0].stopped is not None or self.world.interrupted
            case AckTimeout():
                return current_time() - self._stood_since >= record.policies["ack_timeout"] - 1e-3
            case AdvanceError():
                return record.acknowledged
            case _:
                return isinstance(error, ClosedResourceError)

    def _too_slow(self) -> bool:
        policy = self.wish.policy
        if isinstance(policy, Block):
            # What was replayed takes no room, so to take that makes none.
            slow = current_time() - self.taken_at >= policy.up_to - 1e-3
            return slow or self.place <= self._joined_at
        unread = self.sieve.passed(self.record, self._earliest, self._end())
        return unread > self.wish.bound and isinstance(policy, Fail | Conflate)

    def _end(self) -> Place:
        """Where everything ends that it is to receive."""
        if self.sieve.raised is not None:
            return max(self.place, self.sieve.raised)
        number = self.opening
        return max(self.place, (number, self.record.openings[number - 1].published)) if number >= self.place[0] else self.place

    def _complete(self) -> None:
        """It has received everything, or knows what not."""
        world, end = self.world, self._end()
        openings = self.record.openings[end[0] - 1 : end[0]]
        # What an acknowledged upstream has published and nobody has taken is given up when that fails.
        given_up = [each for each in openings if each.ending or each.disturbed or each.number > self.place[0]]
        if world.interrupted or (self.record.acknowledged and given_up):
            return
        self._miss(self.sieve.passed(self.record, self.place, end), end)
        missed = self.stream.statistics().events_missed
        world.check(self._jumped == missed or not self._exact, "the statistics count what is missing", self, self._jumped, missed)

    # Whether it was forgotten.

    def behind(self) -> bool:
        """Whether there is something that it could receive."""
        if self.record.acknowledged or not self._exact:
            return False
        missing = self._jumped + self.sieve.passed(self.record, self.place, self._end())
        return missing > self.stream.statistics().events_missed

    def look(self, members: dict[Hashable, set[Hashable]]) -> None:
        gone = self.stream.subscriber_id not in members.get(self.record.key, ())
        state = (self.calls, self.behind(), gone) if self.receiving else None
        forgotten = state is not None and state == self._forgotten and (state[1] or gone)
        self.world.check(not forgotten, "nobody who waits is forgotten", self, state)
        self._forgotten = state

    def __repr__(self) -> str:
        latest = [item[1:] if isinstance(item, Event) else item for item in self._latest]
        openings = self.record.openings[-2:]
        return f"<{self.wish!r} of {self.record.key!r} at {self.place} after {latest}; {self.record.policies}; {openings}>"


class ConflateChecker(Checker):
    """The same for `Conflate`, which gives events in the order of their keys, and perhaps several as one."""

    def joined(self, stream: Receiver[Any]) -> None:
        super().joined(stream)
        self._start = self.place
        self._weight = 0
        self._newest: dict[Hashable, Place] = {}
        self._exact = self._exact and not self.wish.snapshot

    def _receive(self, event: Event) -> None:
        place = event.opening.number, event.number
        by = conflated_by(event)
        newer = place > self._newest.get(by, (0, 0)) and place >= self._earliest
        self.world.check(newer, "the events of a conflation's key in order", self, event)
        self._newest[by] = place
        self._weight += event.weight

    def _move(self, to: Place) -> None:
        self.world.check(to >= self._earliest, "in order, without repetition", self, self._earliest, to)
        self.place = self._earliest = to

    def _miss(self, _missing: int, to: Place) -> None:
        self._jumped = self.sieve.passed(self.record, self._start, to) - self._weight

    def behind(self) -> bool:
        if not self._exact:
            return False
        self._miss(0, self._end())
        return self._jumped > self.stream.statistics().events_missed


def make_checker(record: Record, wish: Wish) -> Checker:
    kind = ConflateChecker if isinstance(wish.policy, Conflate) else Checker
    return kind(record, wish)


def attempt(function: Any) -> Any:
    """Call a function; returns what it gives or raises."""
    try:
        return function()
    except Exception as exc:
        return exc
