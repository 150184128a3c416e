"""The states of a group, and the ways between them: one table, and nothing that awaits.

Relies on `_logging`, for each change of the public name is a line, and on `_statistics` for these names. What is not in the
table cannot happen: a step that it does not know is a
`KeyError`, at the moment of the mistake. ``docs/lifecycle.md`` has the picture.
"""

from __future__ import annotations

from enum import StrEnum, auto

from anyio_sharedstream._logging import Level, Lines
from anyio_sharedstream._statistics import GroupState

__all__ = ["TRANSITIONS", "Move", "State", "Stateful"]


class State(StrEnum):
    """What a group does at the moment; its name in the statistics is `State.public`."""

    WAITING = auto()
    """for the key's earlier upstream to close, or for a cohort to be complete"""
    OPENING = auto()
    """``open`` has been called"""
    LIVE = auto()
    """the upstream is being driven"""
    LINGERING_OPENING = auto()
    """as `OPENING`, without subscribers"""
    LINGERING = auto()
    """as `LIVE`, without subscribers"""
    DRAINING = auto()
    """as `LINGERING`, until those who have left have said what became of what they took"""
    FAILING = auto()
    """the upstream has failed and is closing, and may be opened again"""
    BACKING_OFF = auto()
    """the upstream has closed, and will be opened again when the time has come"""
    CLOSING = auto()
    """the key is free; whatever is still open is being closed"""

    @property
    def public(self) -> GroupState:
        return _PUBLIC[self]


_PUBLIC: dict[State, GroupState] = {
    State.WAITING: "waiting",
    State.OPENING: "opening",
    State.LIVE: "live",
    State.LINGERING_OPENING: "lingering",
    State.LINGERING: "lingering",
    State.DRAINING: "draining",
    State.FAILING: "restarting",
    State.BACKING_OFF: "restarting",
    State.CLOSING: "closing",
}


class Move(StrEnum):
    """What can happen to a group."""

    OPEN = auto()
    """nothing has to be waited for any more"""
    OPENED = auto()
    """the upstream can be iterated over"""
    LINGER = auto()
    """the last subscriber has gone, and the upstream outlives it"""
    DRAIN = auto()
    """there are no subscribers any more, and some have yet to say what became of what they took"""
    ADOPT = auto()
    """a subscriber has come to an upstream that had none"""
    FAIL = auto()
    """the upstream has ended by itself, and may be opened again"""
    BACK_OFF = auto()
    """it has closed, and will be opened again"""
    END = auto()
    """eviction: a stop, the last subscriber gone, or an end that is final"""


TRANSITIONS: dict[tuple[State, Move], State] = {
    (State.WAITING, Move.OPEN): State.OPENING,
    (State.OPENING, Move.OPENED): State.LIVE,
    (State.OPENING, Move.LINGER): State.LINGERING_OPENING,
    (State.LIVE, Move.LINGER): State.LINGERING,
    (State.LINGERING_OPENING, Move.OPENED): State.LINGERING,
    (State.LINGERING_OPENING, Move.ADOPT): State.OPENING,
    (State.LINGERING, Move.ADOPT): State.LIVE,
    (State.LIVE, Move.DRAIN): State.DRAINING,
    (State.LINGERING, Move.DRAIN): State.DRAINING,
    (State.DRAINING, Move.ADOPT): State.LIVE,
    (State.OPENING, Move.FAIL): State.FAILING,
    (State.LIVE, Move.FAIL): State.FAILING,
    (State.FAILING, Move.BACK_OFF): State.BACKING_OFF,
    (State.BACKING_OFF, Move.OPEN): State.OPENING,
    **{(state, Move.END): State.CLOSING for state in State if state is not State.CLOSING},
}


class Stateful:
    """What is in one of the states, and goes from one to the other."""

    def __init__(self, lines: Lines) -> None:
        self.state = State.WAITING
        self.lines = lines

    @property
    def evicted(self) -> bool:
        """Whether the key is free."""
        return self.state is State.CLOSING

    def _go(self, move: Move) -> None:
        before = self.state.public
        self.state = TRANSITIONS[self.state, move]
        if self.state.public != before:
            level: Level = "info" if self.state.public in ("lingering", "restarting") else "debug"
            self.lines.add(level, f"group {self.state.public}")
