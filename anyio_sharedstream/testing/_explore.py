"""`explore`: a scenario under many different orders of its tasks, until one fails.

Relies on `_explore_asyncio` and `_explore_trio`, which run one schedule each, and are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from random import Random
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import anyio

from anyio_sharedstream.testing._explore_schedule import Schedule, reproducible

__all__ = ["Exploration", "ScheduleFailure", "explore"]

Scenario: TypeAlias = Callable[[], Awaitable[object]]

#: What each backend needs beyond this package. The extra "testing" brings both.
_NEEDS = {"asyncio": "detangle", "trio": "trio"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exploration:
    """What an exploration that found nothing has covered."""

    schedules: int
    """how many schedules have been run on each backend"""
    orders: Mapping[str, int]
    """by backend, how many of them differed in the order in which the tasks took their steps"""


class ScheduleFailure(AssertionError):  # noqa: N818  # the name says what happened
    """A schedule failed. Its cause is what left the scenario: a `Deadlock` or a `Livelock` if nothing could."""

    def __init__(self, scenario: str, error: BaseException, *, backend: str, schedule: int, schedules: int, seed: int) -> None:
        super().__init__(
            f"schedule {schedule} of {schedules} on {backend} failed with {_words(error)}\n"
            f'replay with explore({scenario}, schedules=1, seed={seed}, backend="{backend}")'
        )
        self.error = error
        """what left the scenario"""
        self.backend = backend
        self.schedule = schedule
        """the how manieth schedule it was, counted from 1"""
        self.seed = seed
        """the seed of this schedule, by which it is the first"""


def explore(
    scenario: Scenario, *, schedules: int = 1000, seed: int = 0, backend: Literal["asyncio", "trio"] | None = None
) -> Exploration:
    """Run an async function under many different orders of its tasks, and raise the first failure with a seed to replay it.

    Whenever several tasks are ready, any of them may run next, drawn at random, and any may be left waiting while others go on
    and on. That is more than the event loops do by themselves, but no more than they may do: what a task awaits may always take
    a little longer. So a scenario must not take it for granted that others have run after some number of checkpoints. It should
    wait for a condition, and make everything anew that it works with.

    Time is virtual, in seconds from 0: it passes only when no task is ready, and then at once to the next deadline. Tasks that
    wake at the same moment run in any order. The module `random` is seeded anew for each schedule: draw delays from it.

    A deadlock is a failure, and so is a scenario that does not end. Threads, subprocesses, I/O and
    `anyio.wait_all_tasks_blocked` cannot be used in one, and the garbage collector does not run meanwhile.

    :param scenario: called without arguments, once for each schedule, and cancelled only if it has failed to end
    :param schedules: how many to run on each backend
    :param seed: of the first schedule; it determines all
    :param backend: where to run it; None for asyncio and then trio
    :raises ScheduleFailure: a schedule failed. `KeyboardInterrupt` and `SystemExit` are raised as themselves
    :raises ValueError: there is no such backend, or uvloop was asked for, which has neither virtual time nor a say in the order
    :raises ImportError: what the backend needs is not installed
    :raises RuntimeError: an event loop is running already
    :raises TypeError: the scenario cannot be called
    """
    if not callable(scenario):
        raise TypeError(f"a scenario is called for every schedule: give the function itself, not {scenario!r}")
    if schedules < 1:
        raise ValueError(f"schedules must be at least 1, not {schedules!r}")
    backends = list(_NEEDS) if backend is None else [backend]
    runners = [_runner(name) for name in backends]
    _check_no_event_loop()
    orders = {name: _explore(scenario, name, run, schedules, seed) for name, run in zip(backends, runners, strict=True)}
    return Exploration(schedules=schedules, orders=MappingProxyType(orders))


def _explore(scenario: Scenario, backend: str, run: Callable[[Scenario, int], Schedule], schedules: int, seed: int) -> int:
    orders = set()
    for number, own_seed in zip(range(1, schedules + 1), _seeds(seed), strict=False):
        schedule = _run(run, scenario, own_seed)
        if schedule.error is not None:
            again = _run(run, scenario, own_seed)
            name = getattr(scenario, "__name__", repr(scenario))
            failure = ScheduleFailure(name, schedule.error, backend=backend, schedule=number, schedules=schedules, seed=own_seed)
            if again.order != schedule.order or type(again.error) is not type(schedule.error):
                failure.add_note("It went another way when it was run again: something else than the schedule decides, too.")
            raise failure from schedule.error
        orders.add(schedule.order)
    return len(orders)


def _run(run: Callable[[Scenario, int], Schedule], scenario: Scenario, seed: int) -> Schedule:
    with reproducible(seed):
        schedule = run(scenario, seed)
    for leaf in _leaves(schedule.error):  # trio puts into groups what leaves a nursery
        if isinstance(leaf, KeyboardInterrupt | SystemExit):
            raise leaf
    return schedule


def _leaves(error: BaseException | None) -> list[BaseException]:
    """The exception, or the members of the group and of the groups in it."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for member in error.exceptions for leaf in _leaves(member)]
    return [] if error is None else [error]


def _words(error: BaseException) -> str:
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    leaves = _leaves(error)
    return said if leaves == [error] else f"{said}: {', '.join(map(_words, leaves))}"


def _seeds(seed: int) -> Iterator[int]:
    """The seeds of all schedules. A schedule's own seed makes it the first."""
    draw = Random(seed)
    while True:
        yield seed
        seed = draw.getrandbits(32)


def _runner(backend: str) -> Callable[[Scenario, int], Schedule]:
    if backend == "uvloop":
        raise ValueError("uvloop has neither virtual time nor a say in the order of tasks: explore on asyncio or trio")
    if backend not in _NEEDS:
        raise ValueError(f'backend must be "asyncio" or "trio", not {backend!r}')
    try:
        module: Any = import_module(f"anyio_sharedstream.testing._explore_{backend}")
    except ImportError as exc:
        message = f"to explore on {backend}, {_NEEDS[backend]} is needed: pip install 'anyio-sharedstream[testing]'"
        raise ImportError(message, name=exc.name) from exc
    return module.run_schedule  # type: ignore[no-any-return]


def _check_no_event_loop() -> None:
    try:
        anyio.current_time()
    except RuntimeError:
        return
    raise RuntimeError("explore runs event loops of its own: call it from a synchronous function")
