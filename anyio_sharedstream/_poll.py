"""The tasks of a group: the one that hosts it, and the poll task that opens, drives and closes the upstream.

Relies on `_group` for every change of state; this module holds all the awaiting of a group, and decides nothing but what to
await next. The poll task is the only one that ever touches the upstream, so an upstream may hold task groups and cancel scopes
wherever it likes, over its yields too. That is also why no scope is entered here between two steps of an iterator.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable
from contextlib import AbstractAsyncContextManager
from typing import Any

from anyio import create_task_group, current_effective_deadline, get_cancelled_exc_class
from anyio.lowlevel import checkpoint_if_cancelled

from anyio_sharedstream._group import Group
from anyio_sharedstream._mailbox import TURN
from anyio_sharedstream._source import iterate, open_source
from anyio_sharedstream._step import Step

__all__ = ["host"]


async def host(group: Group) -> None:
    """Run a group from its start to its end. Whatever happens, it does not raise: a group's end is nobody else's."""
    error: BaseException | None = None
    group.started()
    try:
        with group.scope:
            async with create_task_group() as tasks:
                tasks.start_soon(_poll, group)
    except get_cancelled_exc_class() as exc:
        error = exc
    finally:
        # The poll task has finished the group, unless it was natively cancelled before its first step.
        group.finish(error, _cancelled_from_outside(group))
        group.close()


async def _poll(group: Group) -> None:
    error: BaseException | None = None
    try:
        for earlier in group.earlier:
            await earlier.closed.wait()
        # Whoever subscribed may have left before this task first ran.
        if not group.evicted:
            group.advance("opening")
            await _run_upstream(group)
    except BaseException as exc:
        # Nothing is raised from here: on asyncio a KeyboardInterrupt would leave the event loop by its shortest way out,
        # and a stray cancellation would cancel every other group.
        error = exc
    group.finish(error, _cancelled_from_outside(group))


def _cancelled_from_outside(group: Group) -> bool:
    return not group.scope.cancel_called and current_effective_deadline() == -math.inf


async def _run_upstream(group: Group) -> None:
    opened = open_source(group.source)
    if isinstance(opened, AbstractAsyncContextManager):
        async with opened as iterable:
            await _iterate(group, iterable)
    else:
        try:
            await _iterate(group, opened)
        finally:
            await _close(group, opened)


async def _iterate(group: Group, iterable: AsyncIterable[Any]) -> None:
    failure: BaseException | None = None
    iterator: AsyncIterator[Any] | None = None
    try:
        iterator = iterate(iterable, group.key)
        group.advance("live")
        await _drive(group, iterator)
    except BaseException as exc:
        failure = exc
        raise
    finally:
        group.iteration_ended(failure)
        # What is its own iterator is closed by whoever opened it. Not so a generator: a context manager that gives one may
        # leave it to be closed here, and closing it twice does no harm.
        if iterator is not iterable or isinstance(iterator, AsyncGenerator):
            await _close(group, iterator)


async def _close(group: Group, opened: object) -> None:
    """Close what has a way to be closed. What that raises is reported, and does not take the place of why it was closed."""
    aclose = getattr(opened, "aclose", None)
    if aclose is not None:
        try:
            await aclose()
        except BaseException as exc:
            group.clean_up_failed(exc)


async def _drive(group: Group, iterator: AsyncIterator[Any]) -> None:
    """Publish everything that the iterator yields; return when it is exhausted, or rests at a yield and should be closed."""
    awaitable: Awaitable[Any] = iterator.__anext__()
    ready = 0
    thrown = False
    while True:
        step = Step(awaitable, group.flush, group.backend.reorders)
        try:
            event = await step
        except StopAsyncIteration:
            return
        if group.evicted and thrown:
            return  # it was told of the cancellation and yields again
        group.gather(event)
        ready = 1 if step.suspended else ready + 1
        if ready < TURN and not group.evicted:
            awaitable = iterator.__anext__()
            continue
        ready = 0
        group.flush()
        try:
            await _pause(group)
        except BaseException as exc:
            # The iterator rests at a yield, inside whatever scopes it holds there, and this may be one of theirs. So the
            # exception is raised where it belongs. Closing the generator instead would turn an ordinary end into a
            # BaseExceptionGroup([GeneratorExit]) in every source that holds a task group over its yield.
            if not isinstance(iterator, AsyncGenerator):
                raise
            awaitable = iterator.athrow(exc)
            thrown = True
        else:
            if group.evicted:
                return  # it shields its yield from the cancellation
            awaitable = iterator.__anext__()


async def _pause(group: Group) -> None:
    """Give every other task its turn, or be cancelled."""
    if group.evicted:
        await checkpoint_if_cancelled()
    else:
        await group.backend.let_woken_run()
