"""One schedule: what it came to, and what must be the same each time it is run.

Relies on nothing. A schedule is fixed by its seed. So whatever else decides what happens next is held still while it runs.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["MAX_STEPS", "Livelock", "Schedule", "reproducible"]

MAX_STEPS = 100_000
"""After so many steps of its tasks a scenario is taken to go on for ever."""


class Livelock(AssertionError):  # noqa: N818  # the name says what happened
    """The scenario has not ended after `MAX_STEPS` steps of its tasks."""

    def __init__(self) -> None:
        super().__init__(f"livelock: the scenario has not ended after {MAX_STEPS} steps of its tasks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A schedule that has been run."""

    order: int
    """tells schedules apart in which the tasks took their steps in another order"""
    error: BaseException | None
    """what left the scenario, or is wrong with it"""


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Draw the same random numbers each time, and let the garbage collector rest: it runs finalisers when memory has it."""
    state = random.getstate()
    collecting = gc.isenabled()
    random.seed(seed)
    gc.disable()
    try:
        yield
    finally:
        random.setstate(state)
        if collecting:
            gc.enable()
