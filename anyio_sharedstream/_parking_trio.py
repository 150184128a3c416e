"""Parking on trio; imported only where trio runs, and relies on trio alone."""

from __future__ import annotations

from collections.abc import Callable, Generator
from types import coroutine
from typing import Any

from trio import current_time
from trio.lowlevel import Abort, Task, current_task, current_trio_token, reschedule, wait_task_rescheduled

__all__ = ["create_waiter", "current_call_soon", "current_time", "suspend", "wake"]


def create_waiter() -> Task:
    task = current_task()
    # Trio clears this as soon as the task is to run again. That is how `wake` knows of a cancellation that came first.
    task.custom_sleep_data = task
    return task


def _abort(_raise_cancel: object) -> Abort:
    return Abort.SUCCEEDED


def _message() -> Any:
    """Get what `trio.lowlevel.wait_task_rescheduled` yields to the event loop."""
    waiting = wait_task_rescheduled(_abort)
    message = waiting.send(None)
    waiting.close()
    return message


_MESSAGE = _message()


@coroutine
def suspend(_waiter: Task) -> Generator[Any, Any, None]:
    # This is `await wait_task_rescheduled(_abort)`, less the two coroutines and the message that it would make at each call: a
    # seventh of what it costs to wake a task.
    outcome = yield _MESSAGE
    outcome.unwrap()


def wake(task: Task, _nothing: None) -> None:
    if task.custom_sleep_data is task:
        reschedule(task)


def current_call_soon() -> Callable[[Callable[[], object]], object]:
    return current_trio_token().run_sync_soon
