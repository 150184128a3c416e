"""Parking on trio; imported only where trio runs."""

from __future__ import annotations

from functools import partial

from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

__all__ = ["create_waiter", "suspend", "wake"]


def create_waiter() -> Task:
    task = current_task()
    # Trio clears this as soon as the task is to run again. That is how `wake` knows of a cancellation that came first.
    task.custom_sleep_data = task
    return task


def _abort(_raise_cancel: object) -> Abort:
    return Abort.SUCCEEDED


suspend = partial(wait_task_rescheduled, _abort)


def wake(task: Task, _nothing: None) -> None:
    if task.custom_sleep_data is task:
        reschedule(task)
