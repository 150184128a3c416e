"""The tasks of a group: the one that hosts it, and the poll task that opens, drives and closes the upstream.

Relies on `_group` for every change of state; this module holds all the awaiting of a group, and decides nothing but what to
await next. The poll task is the only one that ever touches the upstream, so an upstream may hold task groups and cancel scopes
wherever it likes, over its yields too. That is also why no scope is entered here between two steps of an iterator.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from contextvars import copy_context
from types import AsyncGeneratorType
from typing import Any

from anyio import CancelScope, create_task_group, current_effective_deadline, get_cancelled_exc_class, sleep
from anyio.lowlevel import checkpoint_if_cancelled

from anyio_sharedstream._buffer import TURN
from anyio_sharedstream._epoch import Epoch
from anyio_sharedstream._group import Group
from anyio_sharedstream._hold import Hold
from anyio_sharedstream._source import iterate, open_source
from anyio_sharedstream._step import Step

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
            group.finish(surroundings_cancelled=_cancelled())
        finally:
            group.close()


def _cancelled() -> bool:
    return current_effective_deadline() == -math.inf


async def _poll(group: Group, epoch: Epoch, delay: float | None) -> None:
    """One opening of the upstream, in a task of its own: the next one need not wait for one that does not close."""
    error: BaseException | None = None
    with epoch.scope or nullcontext():
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
    group.upstream_closed(epoch, error, cancelled=_cancelled())
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
    await _hold(group.publisher.hold)


async def _run_upstream(group: Group, epoch: Epoch) -> None:
    opened = open_source(group.source)
    if isinstance(opened, AbstractAsyncContextManager):
        async with opened as iterable:
            # What a context manager gives it closes itself; only a generator may be left to whoever iterates over it.
            await _iterate(group, epoch, iterable, close=isinstance(iterable, AsyncGeneratorType), final=False)
    else:
        await _iterate(group, epoch, opened, close=True, final=True)


async def _iterate(group: Group, epoch: Epoch, iterable: AsyncIterable[Any], *, close: bool, final: bool) -> None:
    failure: BaseException | None = None
    iterator: AsyncIterator[Any] | None = None
    try:
        iterator = iterate(iterable, group.key)
        group.live(epoch)
        await _drive(group, epoch, iterator)
    except BaseException as exc:
        failure = exc
        raise
    finally:
        group.iteration_ended(epoch, failure, final=final)
        del failure  # it and this frame, which is in its traceback, would keep each other alive
        if iterator is not iterable:
            await _close(group, iterator)
        if close:
            await _close(group, iterable)


async def _close(group: Group, opened: object) -> None:
    """Close what has a way to be closed. What that raises is reported, and does not take the place of why it was closed."""
    try:
        aclose = getattr(opened, "aclose", None)
        if aclose is not None:
            await aclose()
    except BaseException as exc:
        group.clean_up_failed(exc)
        group.lines.write()


async def _drive(group: Group, epoch: Epoch, iterator: AsyncIterator[Any]) -> None:
    """Publish everything that the iterator yields; return when it is exhausted, or rests at a yield and should be closed."""
    interruption: BaseException | None = None
    publisher, hold = group.publisher, group.publisher.hold
    blocking = hold.blocking
    ready = 0
    while True:
        told = interruption is not None and epoch.over
        try:
            if interruption is not None and isinstance(iterator, AsyncGenerator):
                step = Step(iterator.athrow(interruption), publisher.before_suspension)
            else:
                step = Step(iterator.__anext__(), publisher.before_suspension)
            event = await step
        except StopAsyncIteration:
            return
        if told:
            return  # it was told that it is over, and yields again
        # What comes after that may be of an upstream that hung until another had taken its place: it is nobody's.
        gathered = 0 if epoch.silent else publisher.gather(event)
        ready = 1 if step.suspended else ready + 1
        interruption = None
        if ready == TURN or epoch.over or (blocking and gathered >= hold.room()):
            ready = 0
            publisher.flush()
            interruption = await _pause(group, epoch, isinstance(iterator, AsyncGenerator))
            if interruption is not None and not isinstance(iterator, AsyncGenerator):
                raise interruption  # it cannot be told, but what opened it can
            if epoch.over and interruption is None:
                return  # it cannot be told


async def _pause(group: Group, epoch: Epoch, interruptible: bool) -> BaseException | None:
    """Give every other task its turn. What is raised meanwhile is returned, to be raised inside the iterator.

    The iterator rests at a yield, inside whatever scopes it holds there, and this may be one of theirs. So the exception belongs
    into the iterator. Closing a generator instead would turn an ordinary end into a BaseExceptionGroup([GeneratorExit]) in every
    source that holds a task group over its yield. Other iterators cannot be thrown into: they meet a cancellation at their next
    await, and it is kept off until then, except while a subscriber has the source wait: that may be for ever.
    """
    try:
        with CancelScope(shield=not interruptible):
            if not epoch.over:
                await group.backend.let_woken_run()
        if not epoch.over:  # else it is of no use any more, and others may be waiting with it
            await _hold(group.publisher.hold)
        if epoch.over and interruptible:
            # It may have come in the half of that which cannot be cancelled.
            await checkpoint_if_cancelled()
    except BaseException as exc:
        return exc
    return None


async def _hold(hold: Hold) -> None:
    """Wait until every subscriber that may hold the source back has room, or has failed because that took too long."""
    while hold.begin():
        try:
            while (deadline := hold.deadline()) is not None:
                with CancelScope(deadline=deadline):
                    await hold.news().wait()
                hold.expire()
        finally:
            hold.finish()
