"""Exploration itself: what it finds, what it replays, and what it refuses."""

from __future__ import annotations

import asyncio
import gc
import random
import re
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator
from contextlib import suppress
from typing import Any, Literal, TypeAlias

import anyio
import pytest
from anyio.lowlevel import checkpoint
from trio.lowlevel import Abort, wait_task_rescheduled

from anyio_sharedstream.testing import Deadlock, Livelock, ScheduleFailure, _explore_asyncio, _explore_trio, explore

Backend: TypeAlias = Literal["asyncio", "trio"]
Scenario: TypeAlias = Callable[[], Coroutine[Any, Any, object]]

on_both = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever goes on for ever need not go on for as long."""
    monkeypatch.setattr(_explore_trio, "MAX_STEPS", 1000)
    monkeypatch.setattr(_explore_asyncio, "_CONFIG", _explore_asyncio._CONFIG.replace(max_steps=1000))


async def several(*functions: Scenario) -> None:
    async with anyio.create_task_group() as tasks:
        for function in functions:
            tasks.start_soon(function)


async def lost_update() -> None:
    """Two tasks read, and then both write; it goes wrong unless one of them does both before the other begins."""
    value = 0

    async def increment() -> None:
        nonlocal value
        read = value
        await checkpoint()
        value = read + 1

    await several(increment, increment)
    assert value == 2, "an update was lost"


async def rare() -> None:
    """Goes wrong only if one task takes all its steps before the other takes its first."""
    steps = 0

    async def step() -> None:
        nonlocal steps
        for _ in range(4):
            steps += 1
            await checkpoint()

    async def look() -> None:
        assert steps < 4, "too late"

    await several(step, look)


async def lost_wake_up() -> None:
    """A flag is looked at, and the event is made afterwards, with an await in between."""
    ready = False
    news: anyio.Event | None = None

    async def wait() -> None:
        nonlocal news
        if not ready:
            await checkpoint()
            news = anyio.Event()
            await news.wait()

    async def wake() -> None:
        nonlocal ready
        await anyio.sleep(random.randrange(2))
        for _ in range(2):
            await checkpoint()
        ready = True
        if news is not None:
            news.set()

    await several(wait, wake)


async def correct() -> None:
    value = 0
    lock = anyio.Lock()

    async def increment() -> None:
        nonlocal value
        async with lock:
            read = value
            await checkpoint()
            value = read + 1

    await several(increment, increment)
    assert value == 2


def failure_of(scenario: Scenario, backend: Backend, *, schedules: int = 1000, seed: int = 0) -> ScheduleFailure:
    with pytest.raises(ScheduleFailure) as caught:
        explore(scenario, schedules=schedules, seed=seed, backend=backend)
    assert caught.value.__cause__ is caught.value.error
    return caught.value


@on_both
@pytest.mark.parametrize(
    ("scenario", "error", "message"),
    [
        (lost_update, AssertionError, "an update was lost"),
        (rare, ExceptionGroup, "TaskGroup|nursery"),
        (lost_wake_up, Deadlock, r"lost_wake_up\.<locals>\.wait"),
    ],
)
def test_a_race_is_found_and_replayed_by_the_seed_that_is_printed(
    backend: Backend, scenario: Scenario, error: type[BaseException], message: str
) -> None:
    failure = failure_of(scenario, backend)
    with pytest.raises(error, match=message):
        raise failure.error
    assert f"schedule {failure.schedule} of 1000 on {backend} failed with {error.__name__}" in str(failure)
    replay = str(failure).splitlines()[-1].removeprefix("replay with ")
    assert replay == f'explore({scenario.__name__}, schedules=1, seed={failure.seed}, backend="{backend}")'
    with pytest.raises(ScheduleFailure) as again:
        eval(replay)
    assert (again.value.schedule, type(again.value.error)) == (1, error)
    assert not hasattr(failure, "__notes__")


@on_both
def test_correct_code_passes(backend: Backend) -> None:
    found = explore(correct, schedules=200, backend=backend)
    assert found.schedules == 200
    assert 2 <= found.orders[backend] <= 200


def test_without_a_backend_both_are_explored() -> None:
    assert set(explore(correct, schedules=5).orders) == {"asyncio", "trio"}
    assert failure_of(correct_on_asyncio_only, "trio").backend == "trio"
    with pytest.raises(ScheduleFailure, match="on trio failed"):
        explore(correct_on_asyncio_only, schedules=5)


async def correct_on_asyncio_only() -> None:
    assert anyio.get_cancelled_exc_class() is asyncio.CancelledError


def recorded(orders: list[list[int]]) -> Scenario:
    """Four tasks with three checkpoints each, which write down in which order they run."""

    async def scenario() -> None:
        order: list[int] = []
        orders.append(order)

        async def step(name: int) -> None:
            for _ in range(3):
                order.append(name)
                await checkpoint()
            order.append(name)

        async with anyio.create_task_group() as tasks:
            for name in range(4):
                tasks.start_soon(step, name)

    return scenario


@on_both
def test_hundreds_of_different_orders_are_reached_and_the_same_seed_gives_the_same_ones(backend: Backend) -> None:
    first: list[list[int]] = []
    second: list[list[int]] = []
    other: list[list[int]] = []
    found = explore(recorded(first), schedules=1000, seed=7, backend=backend)
    assert len({tuple(order) for order in first}) > 900
    assert found.orders[backend] > 900
    # Some task has run to its end before another has begun, so they are not merely shuffled round by round.
    assert any(len(set(order[:4])) == 1 for order in first)
    explore(recorded(second), schedules=1000, seed=7, backend=backend)
    assert first == second
    explore(recorded(other), schedules=1000, seed=8, backend=backend)
    assert first != other


@on_both
def test_random_numbers_are_part_of_the_schedule_and_left_alone_outside(backend: Backend) -> None:
    drawn: list[float] = []

    async def draw() -> None:
        drawn.append(random.random())

    before = random.getstate()
    explore(draw, schedules=5, backend=backend)
    explore(draw, schedules=5, backend=backend)
    assert drawn[:5] == drawn[5:]
    assert len(set(drawn)) == 5
    assert random.getstate() == before


@pytest.fixture
def collector() -> Iterator[None]:
    """Turn the garbage collector on again."""
    yield
    gc.enable()


@pytest.mark.usefixtures("collector")
def test_the_garbage_collector_rests_meanwhile_and_then_is_as_it_was() -> None:
    async def collects_nothing() -> None:
        assert not gc.isenabled()

    explore(collects_nothing, schedules=1)
    assert gc.isenabled()
    gc.disable()
    explore(collects_nothing, schedules=1)
    assert not gc.isenabled()


@on_both
def test_time_is_virtual_and_exact(backend: Backend) -> None:
    async def sleeps() -> None:
        assert anyio.current_time() == 0
        with anyio.move_on_after(5000) as scope:
            await several(lambda: anyio.sleep(3600), lambda: anyio.sleep(4000))
            assert anyio.current_time() == 4000
            await anyio.sleep_forever()
        assert scope.cancelled_caught
        assert anyio.current_time() == 5000

    explore(sleeps, schedules=50, backend=backend)


@on_both
def test_tasks_whose_deadlines_are_equal_wake_in_any_order(backend: Backend) -> None:
    orders: set[tuple[int, ...]] = set()

    async def sleeps() -> None:
        order: list[int] = []

        async def sleep(name: int) -> None:
            await anyio.sleep(1)
            order.append(name)

        async with anyio.create_task_group() as tasks:
            for name in range(3):
                tasks.start_soon(sleep, name)
        orders.add(tuple(order))

    explore(sleeps, schedules=200, backend=backend)
    assert len(orders) == 6


async def waits_for_ever() -> None:
    with anyio.CancelScope(shield=True):
        await several(anyio.sleep_forever, anyio.Event().wait)


async def deadlock() -> None:
    first, second = anyio.Lock(), anyio.Lock()

    async def take(one: anyio.Lock, other: anyio.Lock) -> None:
        async with one:
            await checkpoint()
            await other.acquire()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take, first, second, name="one way")
        tasks.start_soon(take, second, first, name="the other way")


@on_both
def test_a_deadlock_is_a_failure_that_names_who_waits(backend: Backend) -> None:
    error = failure_of(deadlock, backend).error
    assert isinstance(error, Deadlock)
    where = {task.name: task.where for task in error.waiting}
    assert set(where) == {"deadlock", "one way", "the other way"}
    assert where["deadlock"].endswith("in deadlock")
    assert where["one way"] == where["the other way"]
    assert re.fullmatch(rf"{re.escape(__file__)}:\d+ in deadlock\.<locals>\.take", where["one way"])
    assert error.time == 0
    assert all(f"\n  {name}: {place}" in str(error) for name, place in where.items())


@on_both
def test_a_deadlock_is_one_also_where_nothing_can_be_cancelled(backend: Backend) -> None:
    failure = failure_of(waits_for_ever, backend, schedules=1)
    assert isinstance(failure.error, Deadlock)
    assert "sleep_forever" in str(failure.error)


async def spins() -> None:
    while True:
        await checkpoint()


async def spins_shielded() -> None:
    with anyio.CancelScope(shield=True):
        await several(spins, anyio.sleep_forever)


@on_both
@pytest.mark.parametrize("scenario", [spins, spins_shielded])
def test_going_on_for_ever_is_a_failure(backend: Backend, scenario: Scenario) -> None:
    assert isinstance(failure_of(scenario, backend, schedules=1).error, Livelock)


async def swallows() -> None:
    while True:
        with suppress(BaseException):
            await anyio.Event().wait()


async def swallows_and_spins() -> None:
    while True:
        with suppress(BaseException):
            await checkpoint()


@on_both
@pytest.mark.parametrize(("scenario", "error"), [(swallows, Deadlock), (swallows_and_spins, Livelock)])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_swallows_its_cancellation_for_ever_is_ended(backend: Backend, scenario: Scenario, error: type[Exception]) -> None:
    assert isinstance(failure_of(scenario, backend, schedules=1).error, error)
    gc.collect()  # while that is not an error


def test_what_cannot_be_called_is_refused() -> None:
    scenario = spins()
    with pytest.raises(TypeError, match="give the function itself"):
        explore(scenario)  # type: ignore[arg-type]
    scenario.close()


async def cannot_be_ended() -> None:
    while True:
        with suppress(BaseException), anyio.CancelScope(shield=True):
            await anyio.Event().wait()


def waits_by(abort: Callable[[Callable[[], None]], Abort]) -> Scenario:
    async def scenario() -> None:
        with anyio.CancelScope(shield=True):
            await wait_task_rescheduled(abort)

    return scenario


def test_what_trio_cannot_cancel_is_ended_by_its_own_means() -> None:
    def abort(raise_cancel: Callable[[], None]) -> Abort:
        with pytest.raises(BaseException, match=r"^$"):
            raise_cancel()
        return Abort.SUCCEEDED

    assert isinstance(failure_of(waits_by(abort), "trio", schedules=1).error, Deadlock)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_cannot_be_ended_at_all_is_abandoned_on_trio() -> None:
    failure = failure_of(waits_by(lambda _raise_cancel: Abort.FAILED), "trio", schedules=1)
    assert isinstance(failure.error, Deadlock)
    del failure
    gc.collect()  # while that is not an error


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_catches_everything_is_abandoned_on_trio() -> None:
    assert isinstance(failure_of(cannot_be_ended, "trio", schedules=1).error, Deadlock)
    gc.collect()  # while that is not an error


def test_what_is_not_for_trio_is_told_so() -> None:
    class Foreign:
        def __await__(self) -> Generator[object, None, None]:
            yield "a message of another event loop"

    async def asks_the_wrong_one() -> None:
        await Foreign()

    with pytest.raises(TypeError, match="unrecognized yield message 'a message of another event loop'"):
        raise failure_of(asks_the_wrong_one, "trio").error


@on_both
def test_an_interrupt_is_no_finding(backend: Backend) -> None:
    async def interrupted() -> None:
        raise KeyboardInterrupt

    async def interrupted_in_a_task() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(interrupted)

    for scenario in (interrupted, interrupted_in_a_task):
        with pytest.raises(KeyboardInterrupt):
            explore(scenario, backend=backend)


@on_both
def test_what_is_wrong_in_a_task_is_named(backend: Backend) -> None:
    async def fails() -> None:
        raise ValueError("its own")

    async def silently() -> None:
        raise LookupError

    async def scenario() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fails)

    failure = failure_of(scenario, backend)
    assert isinstance(failure.error, ExceptionGroup)
    assert str(failure).splitlines()[0].endswith(": ValueError: its own")
    assert str(failure_of(silently, backend)).splitlines()[0].endswith("failed with LookupError")


def test_what_nobody_retrieves_is_a_failure_on_asyncio() -> None:
    async def fail() -> None:
        raise ValueError("unheard")

    async def forgets() -> None:
        await asyncio.wait([asyncio.ensure_future(fail())])

    failure = failure_of(forgets, "asyncio")
    assert isinstance(failure.error, ValueError)
    assert "never retrieved" in failure.error.__notes__[0]


def test_what_the_event_loop_is_told_of_is_a_failure_on_asyncio() -> None:
    async def complains() -> None:
        asyncio.get_running_loop().call_exception_handler({"message": "something is wrong"})

    with pytest.raises(AssertionError, match="something is wrong"):
        raise failure_of(complains, "asyncio").error


@on_both
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_an_abandoned_generator_is_closed_within_the_schedule(backend: Backend) -> None:
    closed: list[int] = []

    async def play() -> AsyncGenerator[int, None]:
        try:
            yield 1
        finally:
            with anyio.CancelScope(shield=True):
                await checkpoint()
            closed.append(1)

    async def abandons() -> None:
        generator = play()
        await anext(generator)
        del generator
        await anyio.sleep(1)
        assert closed

    explore(abandons, schedules=1, backend=backend)
    assert closed == [1]


@on_both
def test_a_failure_that_does_not_come_again_says_so(backend: Backend) -> None:
    runs: list[int] = []

    async def fails_once() -> None:
        runs.append(1)
        assert len(runs) > 1

    assert "another way" in failure_of(fails_once, backend).__notes__[0]


class Unnamed:
    """A scenario that is no function."""

    async def __call__(self) -> None:
        raise ValueError("no function")

    def __repr__(self) -> str:
        return "Unnamed()"


def test_any_callable_may_be_a_scenario() -> None:
    assert "explore(Unnamed(), schedules=1, " in str(failure_of(Unnamed(), "asyncio"))


def test_uvloop_is_refused() -> None:
    backend: Any = "uvloop"
    with pytest.raises(ValueError, match="uvloop has neither virtual time"):
        explore(correct, backend=backend)


def test_an_unknown_backend_is_refused() -> None:
    backend: Any = "curio"
    with pytest.raises(ValueError, match='backend must be "asyncio" or "trio", not \'curio\''):
        explore(correct, backend=backend)


def test_no_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="schedules must be at least 1, not 0"):
        explore(correct, schedules=0)


@on_both
def test_what_is_not_installed_is_named(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = "detangle" if backend == "asyncio" else "trio"
    monkeypatch.delitem(sys.modules, f"anyio_sharedstream.testing._explore_{backend}", raising=False)
    monkeypatch.setitem(sys.modules, needed, None)
    with pytest.raises(ImportError, match=rf"{needed} is needed: pip install 'anyio-sharedstream\[testing\]'"):
        explore(correct, backend=backend)


async def test_it_is_not_for_asynchronous_functions() -> None:
    with pytest.raises(RuntimeError, match="call it from a synchronous function"):
        explore(correct)


def test_a_trio_that_drives_tasks_in_another_way_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def spawned(self: _explore_trio._Scheduler, task: Any) -> None:
        self._stepwise(task, task.coro).close()  # which trio then does not use

    monkeypatch.setattr(_explore_trio._Scheduler, "task_spawned", spawned)
    with pytest.raises(RuntimeError, match=r"does not run `Task\.coro`"):
        explore(correct, schedules=1, backend="trio")
