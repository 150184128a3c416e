"""`_leaving`: what leaves a task group of the library's own."""

from __future__ import annotations

from types import TracebackType

import pytest
from anyio import get_cancelled_exc_class

from anyio_sharedstream._leaving import Exit, leave


def raising(error: BaseException) -> Exit:
    async def exit_(
        exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> bool | None:
        raise error

    return exit_


@pytest.mark.parametrize("body_error", [None, ValueError()], ids=repr)
async def test_an_interrupt_of_the_waiting_task_leaves_as_itself(body_error: BaseException | None) -> None:
    # Trio puts into a group what is raised in the task that waits for a nursery.
    interrupt = KeyboardInterrupt()
    group = BaseExceptionGroup("nursery", [BaseExceptionGroup("nursery", [interrupt])])
    with pytest.raises(KeyboardInterrupt) as caught:
        await leave(raising(group), body_error, lambda: None)
    assert caught.value is interrupt


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_cancellation_beside_an_interrupt_does_not_hide_it() -> None:
    interrupt = KeyboardInterrupt()
    group = BaseExceptionGroup("nursery", [get_cancelled_exc_class()(), interrupt])
    with pytest.raises(KeyboardInterrupt) as caught:
        await leave(raising(group), None, lambda: None)
    assert caught.value is interrupt


async def test_several_errors_stay_a_group() -> None:
    group = BaseExceptionGroup("nursery", [KeyboardInterrupt(), SystemExit()])
    with pytest.raises(BaseExceptionGroup) as caught:
        await leave(raising(group), None, lambda: None)
    assert caught.value is group


async def test_what_is_fatal_goes_before_an_interrupt() -> None:
    fatal = SystemExit()
    with pytest.raises(SystemExit) as caught:
        await leave(raising(BaseExceptionGroup("nursery", [KeyboardInterrupt()])), None, lambda: fatal)
    assert caught.value is fatal


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_cancellation_does_not_replace_what_leaves_the_body() -> None:
    await leave(raising(get_cancelled_exc_class()()), ValueError(), lambda: None)
    with pytest.raises(get_cancelled_exc_class()):
        await leave(raising(get_cancelled_exc_class()()), None, lambda: None)
