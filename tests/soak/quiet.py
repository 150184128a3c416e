"""What must be left when nobody is there: nothing of the library's, and no more memory than before.

Relies on `gc` for the objects, and on the interpreter's count of the blocks of memory in use, which is exact and costs nothing.
How much memory a program needs in the end varies a little. What matters is whether it grows with what has been done. So what
counts of each quiet moment is the least that there was then or later, and the test is the median of all slopes between two of
them (Theil and Sen), which a moment that is out of line does not move. Too much is a fraction of a block per subscription:
whatever leaks, leaks a whole one at least.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from itertools import accumulate, combinations
from statistics import median

import anyio

from tests.soak.world import World

#: Quiet moments in which caches fill, and memory may grow.
WARM_UP = 2
#: Quiet moments after those that it takes to see a slope.
ENOUGH = 4
#: Blocks of memory per subscription. A group is shared by a few, and is not the least thing that could leak.
TOO_MUCH = 0.2
#: Blocks of memory that come and go: asyncio keeps up to a hundred timers that were cancelled.
NOISE = 300


class Memory:
    """How much memory was in use at moments that should be alike."""

    def __init__(self) -> None:
        self.blocks: list[tuple[int, int]] = []
        """how many subscriptions there had been, and how many blocks of memory were in use"""

    def measure(self, world: World) -> None:
        gc.collect()
        self.blocks.append((world.done["subscriptions"], sys.getallocatedblocks()))
        subscriptions = self.blocks[-1][0] - self.blocks[:WARM_UP][-1][0]
        flat = self.slope() * subscriptions < TOO_MUCH * subscriptions + NOISE
        world.check(flat, "quiet: memory does not grow", self.slope(), self.blocks)

    def slope(self) -> float:
        """Blocks per subscription; 0 while that cannot be known."""
        moments = self.blocks[WARM_UP:]
        if len(moments) < ENOUGH:
            return 0.0
        least = [*accumulate((blocks for _, blocks in reversed(moments)), min)][::-1]
        pairs = combinations(zip([subscriptions for subscriptions, _ in moments], least, strict=True), 2)
        return median((after[1] - before[1]) / max(1, after[0] - before[0]) for before, after in pairs)


class Quiet:
    """The moments at which nobody is there but those who were there at the first one."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._memory = Memory()
        self._members = self._count_members()
        self._tasks = {task.id for task in anyio.get_running_tasks()}
        self._lives, self._open = world.lives, world.open_now
        self._objects = objects()

    def _count_members(self) -> dict[object, int]:
        groups = self._world.manager.statistics().groups
        return {key: len(group.subscriptions) for key, group in groups.items()}

    async def arrive(self) -> None:
        """Everybody else goes, and nothing may be left of them."""
        world = self._world
        await world.until(lambda: (world.lives, world.open_now) == (self._lives, self._open), "everybody goes")
        await anyio.sleep(1)
        self._check_who_is_left()

    # Apart from `arrive`, for on newer Pythons the frame of what has waited on trio lives on for a while, with all it knows.
    def _check_who_is_left(self) -> None:
        world = self._world
        statistics = world.manager.statistics()
        world.check(self._count_members() == self._members and not statistics.closing, "quiet: no group", statistics)
        left = [task for task in anyio.get_running_tasks() if task.id not in self._tasks]
        world.check(not left, "quiet: no task", left)
        world.check(len(world.readers) == self._lives, "quiet: no reader", list(world.readers))

    def look(self) -> None:
        """See what there is in memory."""
        world, now = self._world, objects()
        world.check(now == self._objects, "quiet: no object of the library", now - self._objects, self._objects - now)
        self._memory.measure(world)


def objects() -> Counter[str]:
    """What there is of the library's objects."""
    gc.collect()
    classes = map(type, gc.get_objects())
    return Counter(cls.__qualname__ for cls in classes if str(cls.__module__).startswith("anyio_sharedstream"))
