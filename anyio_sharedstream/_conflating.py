"""The buffer of a subscriber that keeps one event per key.

Relies on `_entries`.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, TypeVar

from anyio_sharedstream._buffer import TURN
from anyio_sharedstream._entries import Entries, Mark
from anyio_sharedstream._policies import Conflate, Gap, Snapshot

__all__ = ["Conflating"]

T_co = TypeVar("T_co", covariant=True)


class _Kept:
    """What is kept for a key. It moves behind a mark when it is replaced, for a newer event must not overtake that."""

    __slots__ = ("era", "event", "key", "moved")

    def __init__(self, key: Hashable, event: Any, era: int) -> None:
        self.key = key
        self.event = event
        self.era = era
        self.moved = False


class Conflating(Entries[T_co]):
    """`Conflate`: the stream holds what is kept for each key, in the order of the keys' first events since the last mark."""

    def __init__(self, subscriber_id: Hashable, max_buffer_size: float, policy: Conflate, *, gaps: bool) -> None:
        super().__init__(subscriber_id, max_buffer_size, gaps=gaps)
        self._by = policy.by
        self._merge = policy.merge
        self._kept: dict[Hashable, _Kept] = {}
        self._era = 0
        self._in_era: dict[int, int] = {}  # how many of the entries belong between which marks
        self._left_behind = 0  # entries in the stream that have moved

    def _publish(self, events: tuple[Any, ...], turn: int) -> bool:
        try:
            exempt = self._exempt(turn)
            return all(self._keep(event, exempt) for event in events)
        finally:
            self._published()

    def _keep(self, event: Any, exempt: bool) -> bool:
        key = self._by(event)
        kept = self._kept.get(key)
        if kept is not None and self._merge is not None and not self._in_a_state_since(kept):
            event = self._merge(kept.event, event)
            kept = self._kept.get(key)  # it may have been received meanwhile, by `merge` itself
        elif kept is not None:
            self._missed += 1
        if self._over:
            return True  # by a function of its own
        if kept is not None and kept.era == self._era:
            kept.event = event
            return True
        if kept is not None:
            self._leave_behind(kept)
        elif self._unread() >= self._max_buffer_size and not exempt:
            return False
        self._kept[key] = kept = _Kept(key, event, self._era)
        self._in_era[self._era] = self._in_era.get(self._era, 0) + 1
        self._store(kept)
        return True

    def _leave_behind(self, kept: _Kept) -> None:
        kept.moved = True
        self._left_behind += 1
        self._queued -= 1
        self._backlogged -= 1
        self._one_less(kept.era)
        # The marks around an era that is empty are neighbours; and what was left behind is not to outgrow what is kept.
        if kept.era not in self._in_era or self._left_behind > TURN + self._queued:
            self._compact()

    def _one_less(self, era: int) -> None:
        self._in_era[era] -= 1
        if not self._in_era[era]:
            del self._in_era[era]

    def _in_a_state_since(self, kept: _Kept) -> bool:
        """Whether a new state stands behind it, which a newer event is a change of, and not of this."""
        return self._snapshot and kept.era != self._era

    def _prefill(self, events: tuple[Any, ...]) -> None:
        try:
            for event in events:
                self._keep(event, exempt=True)
        finally:
            self._replayed = self._queued
            self._published()

    def _mark(self, kind: str, item: Gap | Snapshot[Any]) -> None:
        self._era += 1
        super()._mark(kind, item)

    def _take_entry(self) -> Any:
        entry = super()._take_entry()
        while isinstance(entry, _Kept) and entry.moved:
            self._left_behind -= 1
            entry = super()._take_entry()
        if not isinstance(entry, _Kept):
            return entry
        self._one_less(entry.era)
        del self._kept[entry.key]
        return entry.event

    def _stored(self) -> int:
        return super()._stored() + self._left_behind

    def _compact(self) -> None:
        """Take out what has moved, and of marks that nothing stands between any more all but the last of each kind."""
        entries = [Entries._take_entry(self) for _ in range(self._stored())]
        kept: list[Any] = []
        marks: dict[str, Mark] = {}
        for entry in entries:
            if isinstance(entry, Mark):
                marks[entry.kind] = entry
            elif not entry.moved:
                kept += [*_in_order(marks), entry]
                marks.clear()
        kept += _in_order(marks)
        self._tail = marks
        self._left_behind = 0
        self._marks = len(kept) - self._queued
        self._backlogged = self._queued + sum(isinstance(entry, Mark) and not entry.void for entry in kept)
        for entry in kept:
            assert self._feed is not None
            self._feed.send_nowait(entry)

    def _overflow(self) -> str:
        return f"had more than {self._max_buffer_size} unread entries"

    def _drop(self) -> None:
        super()._drop()
        self._kept.clear()
        self._in_era.clear()
        self._left_behind = 0


def _in_order(marks: dict[str, Mark]) -> list[Mark]:
    return [marks[kind] for kind in ("restart", "snapshot") if kind in marks]
