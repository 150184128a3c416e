"""One round after the other on one backend, each in an event loop of its own, so that its seed and its number give it again.

Relies on `tests.virtual_time`. Trio shuffles what is ready; that it does so by a seed takes private names, which its hook for
hypothesis uses too.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from anyio import current_time
from trio._core import _run as trio_run

from tests.soak.quiet import Memory
from tests.soak.rounds import Round
from tests.soak.world import BrokenPromiseError, Fatal, Size, Tally, World
from tests.virtual_time import run

BACKENDS = ["asyncio", "trio"]

#: Many keys, or many subscribers of few keys.
LARGE = [
    Size(keys=400, actors=500, triggers=50, seconds=200, waves=7),
    Size(keys=16, actors=3000, triggers=50, seconds=40, waves=7),
]
#: For a test.
SMALL = [Size(keys=30, actors=40, triggers=8, seconds=60, waves=7)]


class Soak:
    """Rounds on one backend, and what has become of them."""

    def __init__(self, backend: str, seed: int, sizes: Sequence[Size] = LARGE) -> None:
        self.backend = backend
        self.seed = seed
        self.sizes = sizes
        self.tally = Tally()
        self.memory = Memory()
        self.round = 0
        self.broken: BrokenPromiseError | None = None

    def play(self, numbers: Iterable[int]) -> None:
        """Play the rounds of these numbers, up to the first promise that is broken."""
        for self.round in numbers:
            name = f"seed {self.seed}, round {self.round}"
            try:
                with _chance(name):
                    run(partial(self._play_round, name), backend=self.backend)
            except BrokenPromiseError as exc:
                self.broken = exc
            except (Exception, BaseExceptionGroup, Fatal) as exc:
                self.broken = BrokenPromiseError(f"nothing unexpected is raised ({name}): {exc!r}")
                self.broken.__cause__ = exc
            if self.broken is not None:
                break

    async def _play_round(self, name: str) -> None:
        world = World(self.tally, name)
        try:
            await Round(world, world.dice("size").choice(self.sizes)).run()
            self.memory.measure(world)
        finally:
            self.tally.seconds += current_time()
            if world.broken is not None:
                raise world.broken  # whatever has come of it


@contextmanager
def _chance(name: str) -> Iterator[None]:
    """Let nothing be left to chance that can be helped."""
    trio: Any = trio_run
    before = random.getstate(), trio._r.getstate(), trio._ALLOW_DETERMINISTIC_SCHEDULING
    random.seed(name)
    trio._r.seed(name)
    trio._ALLOW_DETERMINISTIC_SCHEDULING = True
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        random.setstate(before[0])
        trio._r.setstate(before[1])
        trio._ALLOW_DETERMINISTIC_SCHEDULING = before[2]
