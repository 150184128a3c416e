"""Virtual time passes exactly, at once, and only when nothing else can happen."""

from __future__ import annotations

import asyncio

import anyio
import pytest
import trio

from tests.support import settle
from tests.virtual_time import in_virtual_time, run

on_both = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@in_virtual_time
async def test_time_passes_to_the_deadline_and_not_before() -> None:
    await settle()
    assert anyio.current_time() == 0
    await anyio.sleep_until(1e6)  # over a day, and that is the longest wait that an event loop asks for
    await anyio.sleep(0.1)
    assert anyio.current_time() == 1e6 + 0.1
    with anyio.move_on_after(3) as scope:
        await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert anyio.current_time() == 1e6 + 0.1 + 3


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
def test_the_result_is_returned(backend: str) -> None:
    async def double(number: int) -> int:
        await anyio.sleep(number)
        return 2 * number

    assert run(double, 3, backend=backend) == 6


@on_both
@pytest.mark.parametrize("shield", [False, True])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what trio leaves when it is ended by force
def test_a_deadlock_fails(backend: str, shield: bool) -> None:
    async def stuck() -> None:
        with anyio.CancelScope(shield=shield):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(anyio.Event().wait)
                await anyio.sleep(3)

    with pytest.raises(AssertionError, match="deadlock"):
        run(stuck, backend=backend)
