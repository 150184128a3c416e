"""The kit's virtual time: it passes at once and exactly, stands still for threads, and a deadlock is a report."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncGenerator
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import Any

import anyio
import pytest
import trio
from anyio.from_thread import BlockingPortal

from anyio_sharedstream import SharedStreamManager, shared_source
from anyio_sharedstream.testing import Deadlock, _deadlock, _virtual_asyncio, _virtual_trio, run

on_both = pytest.mark.parametrize("backend", ["asyncio", "trio"])
by_force = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what is left when a loop is ended so


def report(function: Any, backend: str) -> Deadlock:
    with pytest.raises(Deadlock) as caught:
        run(function, backend=backend)
    return caught.value


def line_of(function: Any, text: str) -> int:
    """The line of the function's file that contains a text for the first time from its beginning on."""
    with open(function.__code__.co_filename, encoding="utf-8") as file:
        lines = file.read().splitlines()
    return next(number for number, line in enumerate(lines, 1) if number >= function.__code__.co_firstlineno and text in line)


@on_both
def test_time_passes_to_the_deadline_and_not_before(backend: str) -> None:
    async def sleep() -> None:
        assert anyio.current_time() == 0
        await anyio.sleep_until(1e6)
        await anyio.sleep(0.1)
        assert anyio.current_time() == 1e6 + 0.1
        with anyio.move_on_after(3) as scope:
            await anyio.sleep_forever()
        assert scope.cancelled_caught
        assert anyio.current_time() == 1e6 + 0.1 + 3

    run(sleep, backend=backend)


@on_both
@pytest.mark.parametrize("seconds", [2.0**24, 1e12, 1e300])
def test_any_time_comes_at_once_however_late_it_is(backend: str, seconds: float) -> None:
    async def main() -> None:
        await anyio.sleep(seconds)
        assert anyio.current_time() == seconds
        with anyio.move_on_after(seconds):
            await anyio.sleep_forever()
        assert anyio.current_time() == 2 * seconds

    run(main, backend=backend)


def test_timers_of_asyncio_are_called_in_order_and_not_once_they_are_cancelled() -> None:
    called: list[int] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        second = loop.call_later(1, called.append, 2)
        loop.call_later(1, called.append, 3)
        never = loop.call_later(0.5, called.append, 4, context=copy_context())
        never.cancel()
        loop.call_later(1, called.append, 5).cancel()
        loop.call_at(0.75, lambda: loop.call_later(0.25, called.append, 6))
        loop.call_later(0, called.append, 0)
        while not called:
            await anyio.lowlevel.checkpoint()  # what is due is called although something is ready
        loop.call_at(1, second.cancel)
        await asyncio.sleep(1)
        await asyncio.sleep(0)
        assert called == [0, 2, 3, 6]
        last = loop.call_at(3, called.append, 7)
        loop.call_at(2, last.cancel)
        at_the_same_time: list[asyncio.TimerHandle] = []
        loop.call_at(4, lambda: at_the_same_time[0].cancel())
        at_the_same_time.append(loop.call_at(4, called.append, 8))
        await asyncio.sleep(4)
        assert called == [0, 2, 3, 6]

    run(main)


def test_timers_that_were_cancelled_keep_nothing_though_their_time_is_far_away() -> None:
    class Thing:
        def go(self) -> None: ...

    async def main() -> None:
        things: weakref.WeakSet[Thing] = weakref.WeakSet()
        with anyio.fail_after(3600):  # so that these are not the next
            for _ in range(1000):
                thing = Thing()
                things.add(thing)
                asyncio.get_running_loop().call_later(86400, thing.go).cancel()
                await anyio.lowlevel.checkpoint()
            gc.collect()
            assert len(things) <= 200

    run(main)


@on_both
def test_a_deadline_in_the_past_does_not_turn_time_back(backend: str) -> None:
    async def be_late() -> None:
        await anyio.sleep(5)
        with anyio.CancelScope(deadline=2):
            await anyio.sleep(10)
        assert anyio.current_time() == 5

    run(be_late, backend=backend)


@on_both
def test_arguments_are_passed_and_the_result_is_returned(backend: str) -> None:
    async def double(number: int) -> int:
        await anyio.sleep(number)
        return 2 * number

    assert run(double, 3, backend=backend) == 6


@on_both
def test_an_exception_leaves_as_itself(backend: str) -> None:
    async def fail() -> None:
        raise ValueError("what is wrong")

    with pytest.raises(ValueError, match="what is wrong"):
        run(fail, backend=backend)


@pytest.mark.parametrize(
    ("backend", "reason"), [("uvloop", "'uvloop': its timers are not within reach"), ("curio", "not on 'curio'$")]
)
def test_a_backend_without_virtual_time_is_refused(backend: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        run(anyio.sleep, 1, backend=backend)


def test_what_is_optional_is_not_imported_unless_it_is_wanted() -> None:
    program = "import anyio, sys; from anyio_sharedstream.testing import run; run(anyio.sleep, 1)"
    code = f"{program}; print({{'detangle', 'pytest', 'trio'}} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"


@on_both
def test_what_is_queued_from_outside_is_no_deadlock(backend: str) -> None:
    async def call() -> None:
        called = anyio.Event()
        if backend == "asyncio":
            asyncio.get_running_loop().call_soon_threadsafe(called.set)
        else:
            trio.lowlevel.current_trio_token().run_sync_soon(called.set)
        await called.wait()

    run(call, backend=backend)


@on_both
def test_whoever_waits_until_all_others_wait_does_not_wait_in_vain(backend: str) -> None:
    async def look() -> list[str]:
        seen = []

        async def other() -> None:
            seen.append("other")
            await anyio.sleep(100)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(other)
            await anyio.wait_all_tasks_blocked()
            assert anyio.current_time() < 1
            seen.append("looked")
        return seen

    assert run(look, backend=backend) == ["other", "looked"]


def test_without_a_word_from_trio_nobody_waits_until_all_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio._core._run.GLOBAL_RUN_CONTEXT", None)
    assert not _virtual_trio._waiting_for_idle()


# Deadlocks.


@on_both
def test_a_deadlock_lists_the_waiting_tasks_with_their_names_and_lines(backend: str) -> None:
    async def wait_for(event: anyio.Event) -> None:
        await event.wait()  # for ever

    async def stuck() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait_for, anyio.Event(), name="the waiting one")
            tasks.start_soon(anyio.sleep, 3)

    deadlock = report(stuck, backend)
    assert deadlock.time == 3
    where = {task.name: task.where for task in deadlock.waiting}
    assert len(where) == 2
    assert where["the waiting one"] == f"{__file__}:{line_of(wait_for, '# for ever')} in {wait_for.__qualname__}"
    assert where[stuck.__qualname__] == f"{__file__}:{line_of(stuck, 'create_task_group')} in {stuck.__qualname__}"
    message = str(deadlock)
    assert message.startswith("deadlock after 3.0 s: nothing can run, and there is no deadline. These tasks wait:\n  ")
    assert all(f"\n  {name}: {place}" in message for name, place in where.items())


@shared_source
async def silent_feed() -> AsyncGenerator[int, None]:
    yield 1
    await anyio.Event().wait()  # silence


@on_both
def test_a_deadlock_says_where_a_source_and_its_subscriber_wait(backend: str) -> None:
    async def consume(manager: SharedStreamManager) -> None:
        async with manager.subscribe(silent_feed()) as stream:
            async for _ in stream:  # the next
                pass

    async def stuck() -> None:
        async with SharedStreamManager() as manager:
            await consume(manager)

    where = {task.where for task in report(stuck, backend).waiting}
    assert f"{__file__}:{line_of(silent_feed.__wrapped__, '# silence')} in silent_feed" in where  # type: ignore[attr-defined]
    assert f"{__file__}:{line_of(consume, '# the next')} in {consume.__qualname__}" in where
    assert any("anyio_sharedstream/_" in place for place in where), "a task of the library itself"


@on_both
def test_a_partial_is_named_after_its_function(backend: str) -> None:
    deadlock = report(partial(partial(anyio.sleep_forever)), backend)
    assert [task.name for task in deadlock.waiting] == ["sleep_forever"]
    assert f"anyio_sharedstream{os.sep}" not in deadlock.waiting[0].where  # which may be a part of any directory's name


@on_both
def test_clean_ups_run_after_a_deadlock_and_what_they_raise_is_its_cause(backend: str) -> None:
    async def stuck() -> None:
        try:
            await anyio.Event().wait()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(2)
            raise OSError("in the clean-up")

    deadlock = report(stuck, backend)
    assert deadlock.time == 0
    assert isinstance(deadlock.__cause__, OSError)


@on_both
def test_a_deadlock_is_reported_also_if_the_function_makes_something_else_of_its_cancellation(backend: str) -> None:
    async def stuck() -> str:
        with suppress(anyio.get_cancelled_exc_class()):
            await anyio.Event().wait()
        return "a result"

    report(stuck, backend)


@on_both
@by_force
def test_a_deadlock_that_cannot_be_cancelled_is_ended_by_force(backend: str) -> None:
    async def stuck() -> None:
        with anyio.CancelScope(shield=True):
            await anyio.Event().wait()

    deadlock = report(stuck, backend)
    assert [task.name for task in deadlock.waiting] == [stuck.__qualname__]


@on_both
@by_force
def test_what_swallows_its_cancellation_for_ever_is_ended_by_force(backend: str) -> None:
    async def stubborn() -> None:
        while True:
            with suppress(BaseException):
                await anyio.Event().wait()

    deadlock = report(stubborn, backend)
    assert [task.name for task in deadlock.waiting] == [stubborn.__qualname__]


@by_force
def test_a_deadlock_while_the_loop_is_being_closed_is_reported_as_well() -> None:
    async def stubborn() -> None:
        try:
            await asyncio.sleep(10)
        finally:
            await asyncio.Event().wait()

    tasks = []

    async def leave_behind() -> None:
        tasks.append(asyncio.get_running_loop().create_task(stubborn(), name="left behind"))
        await asyncio.sleep(1)

    assert "left behind" in [task.name for task in report(leave_behind, "asyncio").waiting]


# Threads.


def test_time_stands_still_for_a_thread_of_trios_own() -> None:
    def job() -> int:
        time.sleep(0.05)
        return 7

    assert run(trio.to_thread.run_sync, job, backend="trio") == 7


@on_both
def test_time_passes_for_what_a_worker_thread_has_a_portal_do(backend: str) -> None:
    async def work() -> None:
        async with BlockingPortal() as portal:
            await anyio.to_thread.run_sync(portal.call, anyio.sleep, 5)
            assert anyio.current_time() == 5
            await portal.stop()

    run(work, backend=backend)


@on_both
def test_time_stands_still_while_a_worker_thread_is_under_way(backend: str) -> None:
    async def work() -> None:
        done = threading.Event()

        async def let_it_end() -> None:
            await anyio.to_thread.run_sync(time.sleep, 0.05)
            done.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep, 100)
            tasks.start_soon(let_it_end)
            await anyio.to_thread.run_sync(done.wait)
            assert anyio.current_time() == 0
        assert anyio.current_time() == 100

    run(work, backend=backend)


def test_without_another_thread_no_task_is_asked_whether_it_waits_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_virtual_asyncio, "active_count", lambda: 1)
    monkeypatch.delattr(_virtual_asyncio, "threads_under_way")
    run(anyio.sleep, 5)


@on_both
def test_time_passes_for_what_a_worker_thread_has_the_event_loop_do(backend: str) -> None:
    async def work() -> None:
        await anyio.to_thread.run_sync(lambda: anyio.from_thread.run(anyio.sleep, 5))
        assert anyio.current_time() == 5

    run(work, backend=backend)


@on_both
def test_waiting_for_a_thread_that_is_not_to_be_had_is_a_deadlock(backend: str) -> None:
    async def hold() -> None:
        limiter = anyio.CapacityLimiter(1)
        async with limiter, anyio.create_task_group() as tasks:
            tasks.start_soon(partial(anyio.to_thread.run_sync, int, limiter=limiter))
            await anyio.to_thread.run_sync(int)

    report(hold, backend)


def test_time_stands_still_for_an_executor_of_asyncio() -> None:
    async def work() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep, 100)
            await asyncio.to_thread(time.sleep, 0.05)
            assert anyio.current_time() == 0

    run(work)


@on_both
@by_force
def test_a_thread_that_waits_for_time_to_pass_is_an_error_in_the_end(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _virtual_trio if backend == "trio" else _virtual_asyncio
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    done = threading.Event()

    async def work() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(anyio.to_thread.run_sync, done.wait, abandon_on_cancel=True))
            await anyio.sleep(3)

    try:
        deadlock = report(work, backend)
    finally:
        done.set()
    assert f"a worker thread has been under way for {_deadlock.PATIENCE} s" in str(deadlock)
    assert deadlock.time == 0
