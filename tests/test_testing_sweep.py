"""`cancel_sweep` cancels everywhere and in every way, and says where something went wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from anyio_sharedstream import SharedStreamManager
from anyio_sharedstream.testing import Deadlock, Pause, ScriptedSource, SweptRun, _sweep, cancel_sweep, run
from anyio_sharedstream.testing._sweep import CancelWay
from tests.conftest import on_asyncio
from tests.support import settle

SCOPED = ["scope", "scope-woken"]
NATIVE = ["native", "native-woken"]


def ways_of(backend_name: str) -> list[str]:
    return SCOPED + NATIVE if backend_name == "asyncio" else SCOPED


async def test_a_scenario_is_cancelled_before_each_of_its_steps_and_then_completes(backend_name: str) -> None:
    runs: dict[str, list[tuple[int, bool]]] = {}
    steps: list[int] = []

    async def scenario() -> None:
        steps[:] = [1]
        for step in (2, 3, 4):
            await checkpoint()
            steps.append(step)

    def check(swept: SweptRun) -> None:
        assert swept.completed == (steps == [1, 2, 3, 4])
        assert swept.step == len(runs.setdefault(swept.way, [])) + 1
        runs[swept.way].append((steps[-1], swept.completed))

    assert await cancel_sweep(scenario, check) == 4
    assert list(runs) == ways_of(backend_name)
    # Cancelled before its first step, a scenario still runs up to its first suspension, if it runs at all.
    assert runs["scope"] == [(1, False), (1, False), (2, False), (3, False), (4, True)]
    assert all(len(trials) > 4 and trials[0] == (1, False) and trials[-1] == (4, True) for trials in runs.values())


async def test_a_set_up_and_a_tear_down_are_not_cancelled() -> None:
    order: list[str] = []

    @asynccontextmanager
    async def scenario() -> AsyncIterator[Callable[[], Coroutine[Any, Any, None]]]:
        await checkpoint()
        order.append("set up")

        async def body() -> None:
            order.append("body")
            await checkpoint()
            order.append("completed")

        yield body
        await checkpoint()
        order.append("torn down")

    async def check(swept: SweptRun) -> None:
        await checkpoint()
        assert order[:2] == ["set up", "body"]
        assert order[-1] == "torn down"
        assert ("completed" in order) == swept.completed
        order.clear()

    assert await cancel_sweep(scenario, check) == 2


async def test_what_is_wrong_leaves_as_itself_and_says_which_run_it_was(backend_name: str) -> None:
    """The planted bug: a cancellation while it waits leaves the scenario's lock locked."""
    held: list[bool] = []

    async def scenario() -> None:
        for locked in (True, False):
            held[:] = [locked]
            await checkpoint()

    await scenario()

    def check(swept: SweptRun) -> None:
        assert held == [False]

    with pytest.raises(AssertionError) as caught:
        await cancel_sweep(scenario, check)
    assert caught.value.__notes__ == ["cancelled before step 1: its cancel scope, as it suspends"]
    if backend_name == "asyncio":
        with pytest.raises(AssertionError) as caught:
            await cancel_sweep(scenario, check, ways=["native-woken"])
        assert caught.value.__notes__ == ["cancelled before step 1: its asyncio task, after its wake-up"]


@on_asyncio
async def test_an_item_that_is_lost_between_wake_up_and_next_step_is_found() -> None:
    """The planted bug: the item is the value of the wake-up, and a reader that is cancelled then has lost it."""
    got: list[int] = []

    @asynccontextmanager
    async def scenario() -> AsyncIterator[Callable[[], Coroutine[Any, Any, None]]]:
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        got.clear()

        async def body() -> None:
            got.append(await waiter)

        def hand_over() -> None:
            if not waiter.cancelled():
                waiter.set_result(1)

        loop.call_soon(loop.call_soon, loop.call_soon, hand_over)
        yield body
        await settle(5)
        assert waiter.cancelled() or got, "the item is lost"

    assert await cancel_sweep(scenario, ways=["scope", "scope-woken", "native"]) == 2
    with pytest.raises(AssertionError, match="the item is lost") as caught:
        await cancel_sweep(scenario)
    assert caught.value.__notes__ == ["cancelled before step 2: its asyncio task, after its wake-up"]


async def test_a_scenario_that_fails_natively_cancelled_fails_the_sweep(backend_name: str) -> None:
    async def scenario() -> None:
        try:
            await checkpoint()
        except BaseException:
            raise OSError("instead") from None

    with pytest.raises(OSError, match="instead"):
        await cancel_sweep(scenario, ways=ways_of(backend_name)[-1:])  # type: ignore[arg-type]


async def test_ways_are_chosen_and_those_that_are_not_there_are_refused(backend_name: str) -> None:
    seen = []
    await cancel_sweep(checkpoint, lambda swept: seen.append(swept.way), ways=["scope-woken"])
    assert set(seen) == {"scope-woken"}
    with pytest.raises(ValueError, match="ways must be some of"):
        await cancel_sweep(checkpoint, ways=[])
    unknown: Any = "by hand" if backend_name == "asyncio" else "native"
    with pytest.raises(ValueError, match=unknown):
        await cancel_sweep(checkpoint, ways=["scope", unknown])


async def test_a_scenario_that_does_not_come_to_an_end_is_given_up() -> None:
    async def scenario() -> None:
        with suppress(anyio.get_cancelled_exc_class()):
            for _ in range(10):
                await checkpoint()

    assert await cancel_sweep(scenario, max_steps=11) == 11
    with pytest.raises(AssertionError, match="more than max_steps=10 steps"):
        await cancel_sweep(scenario, max_steps=10)


@pytest.mark.parametrize("ends", [True, False])
async def test_a_scenario_that_swallows_its_cancellation_is_given_up(ends: bool) -> None:
    async def scenario() -> None:
        while True:
            try:
                await checkpoint()
            except GeneratorExit:
                if ends:
                    raise
            except BaseException:
                await anyio.lowlevel.cancel_shielded_checkpoint()

    with pytest.raises(AssertionError, match="gone on for 10 steps after it was cancelled") as caught:
        await cancel_sweep(scenario, max_steps=10)
    assert any("cancelled before step 1" in note for note in caught.value.__notes__)


async def swallows_in_its_own_scopes() -> None:
    while True:
        try:
            with anyio.fail_after(1000):
                await anyio.sleep_forever()
        except BaseException:
            pass


async def swallows_in_scopes_of_the_event_loop() -> None:
    while True:
        with suppress(BaseException):
            await anyio.sleep(1)


@pytest.mark.parametrize("scenario", [swallows_in_its_own_scopes, swallows_in_scopes_of_the_event_loop])
async def test_one_that_is_given_up_in_the_middle_of_a_scope_does_not_hide_that(scenario: Callable[[], Any]) -> None:
    with anyio.CancelScope():
        with pytest.raises(AssertionError, match="gone on for 10 steps after it was cancelled") as caught:
            await cancel_sweep(scenario, ways=["scope"], max_steps=10)
        assert any("cancelled before step 1" in note for note in caught.value.__notes__)
        await checkpoint()


async def test_what_fails_without_a_cancellation_says_so() -> None:
    async def scenario() -> None:
        await checkpoint()
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own") as caught:
        await cancel_sweep(scenario)
    assert caught.value.__notes__ == ["not cancelled: it had no step 3"]


async def test_a_cancellation_that_a_scenario_makes_up_fails_the_sweep(backend_name: str) -> None:
    async def scenario() -> None:
        with anyio.CancelScope() as scope:
            scope.cancel()
            try:
                await checkpoint()
            except BaseException as exc:
                cancellation.append(exc)
        raise cancellation[-1]

    cancellation: list[BaseException] = []
    with pytest.raises(anyio.get_cancelled_exc_class()):
        await cancel_sweep(scenario, ways=["scope"])


@pytest.mark.parametrize("made", [3, None])
async def test_what_is_no_scenario_is_refused(made: Any) -> None:
    with pytest.raises(TypeError, match=f"this one gave {made}"):
        await cancel_sweep(lambda: made)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what is left when a loop is ended by force
def test_a_scenario_that_hangs_is_a_deadlock_in_virtual_time(backend: str) -> None:
    """The planted bug: what is cancelled never tells the other one, who waits for it."""

    async def scenario() -> None:
        told = anyio.Event()

        async def wait_for_it() -> None:
            with anyio.CancelScope(shield=True):
                await told.wait()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait_for_it)
            await anyio.sleep(1)
            told.set()

    run(scenario, backend=backend)
    with pytest.raises(Deadlock) as caught:
        run(cancel_sweep, scenario, backend=backend)
    assert any(task.where.endswith("wait_for_it") for task in caught.value.waiting)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_consumer_is_swept_in_virtual_time(backend: str) -> None:
    feed = ScriptedSource(1, Pause(60), 2, closing=Pause(5))

    @asynccontextmanager
    async def scenario() -> AsyncIterator[Callable[[], Coroutine[Any, Any, None]]]:
        async with SharedStreamManager() as manager:

            async def consume() -> None:
                async with manager.subscribe(feed.source()) as stream:
                    assert [await stream.receive(), await stream.receive()] == [1, 2]

            yield consume
        assert feed.open_now == 0

    assert run(cancel_sweep, scenario, backend=backend) >= 3
    assert feed.most_open == 1


@on_asyncio
@pytest.mark.parametrize("way", ["native", "scope"])
async def test_a_sweep_that_is_cancelled_leaves_no_task_behind(way: CancelWay) -> None:
    ended = []

    async def scenario() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(True)

    before = asyncio.all_tasks()
    cut = _sweep.Cut(way, 99)
    with anyio.move_on_after(0.01):
        await cut.run(scenario())
    assert ended == [True]
    assert asyncio.all_tasks() == before


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_where_a_swept_scenario_waits_is_known(backend: str) -> None:
    async def scenario() -> None:
        with anyio.CancelScope(shield=True):
            await anyio.Event().wait()

    with pytest.raises(Deadlock) as caught:
        run(cancel_sweep, scenario, backend=backend)
    assert any(
        task.where.endswith("in test_where_a_swept_scenario_waits_is_known.<locals>.scenario") for task in caught.value.waiting
    )
