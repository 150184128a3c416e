"""One schedule on asyncio; imported only where it is run, and relies on the package detangle for the event loop.

detangle's loop keeps what is ready in one lane per task, and one for all callbacks that belong to no task. Before each step its
strategy says which lane comes next, and time passes when none is ready.
"""

from __future__ import annotations

from asyncio import Task, TimerHandle, all_tasks, current_task
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from functools import partial
from math import inf
from typing import Any

from detangle import DeadlockError, Failure, RandomWalk, SimConfig, SimLoop, StepLimitExceeded, execute
from detangle.strategies import LaneLike

from anyio_sharedstream.testing._deadlock import Deadlock
from anyio_sharedstream.testing._explore_schedule import MAX_STEPS, Livelock, Schedule
from anyio_sharedstream.testing._virtual_asyncio import waiting_tasks
from anyio_sharedstream.testing._waiting import keep, name_of

__all__ = ["run_schedule"]

_CONFIG = SimConfig(max_steps=MAX_STEPS, seed_random=False)


class _Walk(RandomWalk):
    def schedule(self, lanes: Sequence[LaneLike]) -> int:
        # The lanes come in the order in which they became ready, and anyio cancels the tasks of a scope in the order of a set: by
        # where they lie in memory. Numbers drawn again would then mean other tasks.
        by_age = sorted(lanes, key=lambda lane: lane.id)
        return lanes.index(by_age[super().schedule(lanes)])


def run_schedule(scenario: Callable[[], Awaitable[object]], seed: int) -> Schedule:
    """Run *scenario* once, its tasks in an order drawn from *seed*."""

    async def main() -> None:
        task = current_task()
        assert task is not None
        task.set_name(name_of(scenario))
        await scenario()

    left: list[Task[Any]] = []
    result = execute(main, config=_CONFIG, strategy=_Walk(seed), setup=partial(_prepare, left))
    keep(task for task in left if not task.done())
    return Schedule(order=result.order_hash, error=None if result.failure is None else _error(result.failure))


def _prepare(left: list[Task[Any]], loop: SimLoop) -> None:
    """Make its virtual time and its deadlocks like those of this package. It makes its loop itself, so no subclass can.

    :param left: to be filled with the tasks that are there when the scenario is given up
    """
    call_at = loop.call_at
    run_until_complete = loop.run_until_complete

    def unless_never(when: float, callback: Callable[..., object], *args: object, context: Context | None = None) -> TimerHandle:
        if when < inf:
            return call_at(when, callback, *args, context=context)
        # `anyio.sleep_forever` sets a timer. It never comes, and the time would pass for ever.
        return TimerHandle(when, callback, args, loop, context)

    def reporting(main: Any) -> Any:
        try:
            return run_until_complete(main)
        except DeadlockError:
            left.extend(all_tasks(loop))
            # Now, for afterwards it cancels all tasks.
            raise Deadlock(waiting_tasks(loop), loop.time()) from None
        except StepLimitExceeded:
            left.extend(all_tasks(loop))
            raise

    loop.call_at = unless_never  # type: ignore[method-assign]
    loop.run_until_complete = reporting  # type: ignore[method-assign, assignment]


def _error(failure: Failure) -> BaseException:
    if failure.kind == "step-limit":
        return Livelock()
    if failure.exception is None:
        return AssertionError(failure.message)
    if failure.kind != "exception":
        failure.exception.add_note(failure.message)  # which says where it came up, for nobody has raised it
    return failure.exception
