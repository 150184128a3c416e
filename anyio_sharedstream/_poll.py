"""The tasks of a group: the one that hosts it, and the poll task that opens, drives and closes the upstream.

Relies on `_group` for every change of state, on `_drive` for what is done with an opened upstream, and on `_producing` for what
there is besides, where a broker waits for acknowledgement. Decides nothing but what to await next.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from contextvars import copy_context
from types import AsyncGeneratorType

from anyio import create_task_group, get_cancelled_exc_class, sleep

from anyio_sharedstream._ack_group import AckEpoch
from anyio_sharedstream._drive import drive, hold_back
from anyio_sharedstream._epoch import Epoch
from anyio_sharedstream._group import Group
from anyio_sharedstream._leaving import being_cancelled
from anyio_sharedstream._producing import produce
from anyio_sharedstream._source import open_source

__all__ = ["host"]


async def host(group: Group) -> None:
    """Run a group from its start to its end, and raise nothing: a group's end is nobody else's."""
    # Each poll task begins in the manager's context; the one before it may have changed its own.
    context = copy_context()
    try:
        group.lines.add("info", "group started")
        group.lines.write()
        with suppress(get_cancelled_exc_class()), group.scope:
            async with create_task_group() as tasks:
                group.reopen = lambda epoch, delay: context.copy().run(tasks.start_soon, _poll, group, epoch, delay)
                tasks.start_soon(_poll, group, group.current, None)
    finally:
        try:
            group.finish(surroundings_cancelled=being_cancelled())
        finally:
            group.close()


async def _poll(group: Group, epoch: Epoch, delay: float | None) -> None:
    """One opening of the upstream, in a task of its own: the next one need not wait for one that does not close."""
    error: BaseException | None = None
    with nullcontext() if epoch.scope is None or isinstance(epoch, AckEpoch) else epoch.scope:
        try:
            await (_wait_for_others(group) if delay is None else _back_off(group, delay))
            # Whoever subscribed may have left before this task first ran.
            if not epoch.over:
                group.opening(epoch)
            if not epoch.over:
                await _run_upstream(group, epoch)
        except BaseException as exc:
            # Nothing is raised from here: on asyncio a KeyboardInterrupt would leave the event loop by its shortest way out,
            # and a stray cancellation would cancel every other group.
            error = exc
    group.upstream_closed(epoch, error, cancelled=being_cancelled())
    del error  # else it and this frame, which is in its traceback, keep each other alive


async def _wait_for_others(group: Group) -> None:
    # Not in `_poll`, whose frame a failure's traceback keeps: a local variable there would chain every failed group of the key
    # to the one before it.
    if group.earlier is not None:
        await group.earlier.released.wait()
        group.earlier = None
    if group.timers.cohort is not None:
        await group.timers.cohort.wait()


async def _back_off(group: Group, delay: float) -> None:
    await sleep(delay)
    # Another opening would have more to yield, and who had no room for the last has none for this.
    await hold_back(group.publisher.hold)


async def _run_upstream(group: Group, epoch: Epoch) -> None:
    if isinstance(epoch, AckEpoch):
        await produce(epoch)
        return
    opened = open_source(group.source)
    if isinstance(opened, AbstractAsyncContextManager):
        async with opened as iterable:
            # What a context manager gives it closes itself; only a generator may be left to whoever iterates over it.
            await drive(group, epoch, iterable, close=isinstance(iterable, AsyncGeneratorType), final=False)
    else:
        await drive(group, epoch, opened, close=True, final=True)
