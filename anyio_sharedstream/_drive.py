"""Driving an upstream: taking its events one by one, publishing them, and giving every other task its turn.

Relies on `_group` for every change of state; decides nothing but what to await next. It runs in the poll task, the only one that
ever touches the upstream, so an upstream may hold task groups and cancel scopes wherever it likes, over its yields too. That is
also why no scope is entered here between two steps of an iterator.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from typing import Any

from anyio import CancelScope
from anyio.lowlevel import checkpoint_if_cancelled

from anyio_sharedstream._buffer import TURN
from anyio_sharedstream._epoch import Epoch
from anyio_sharedstream._group import Group
from anyio_sharedstream._hold import Hold
from anyio_sharedstream._publisher import Window
from anyio_sharedstream._source import iterate
from anyio_sharedstream._step import Step

__all__ = ["close_quietly", "drive", "hold_back"]


async def drive(group: Group, epoch: Epoch, iterable: AsyncIterable[Any], *, close: bool, final: bool) -> None:
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
            await close_quietly(group, iterator)
        if close:
            await close_quietly(group, iterable)


async def close_quietly(group: Group, opened: object) -> None:
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
    blocking, window = hold.blocking, publisher.window
    ready = 0
    if window is not None:
        interruption = await _pause(group, epoch, isinstance(iterator, AsyncGenerator))
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
        gathered = 0 if epoch.broken_off else publisher.gather(event)
        ready = 1 if step.suspended else ready + 1
        interruption = None
        if ready == TURN or epoch.over or (blocking and gathered >= hold.room()) or (window is not None and window.room() <= 0):
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
            await hold_back(group.publisher.hold)
        if group.publisher.window is not None:
            await _wait_for_room(group, epoch, group.publisher.window)
        if epoch.over and interruptible:
            # It may have come in the half of that which cannot be cancelled.
            await checkpoint_if_cancelled()
    except BaseException as exc:
        return exc
    return None


async def hold_back(hold: Hold) -> None:
    """Wait until every subscriber that may hold the source back has room, or has failed because that took too long."""
    while hold.begin():
        try:
            while (deadline := hold.deadline()) is not None:
                with CancelScope(deadline=deadline):
                    await hold.news().wait()
                hold.expire()
        finally:
            hold.finish()


async def _wait_for_room(group: Group, epoch: Epoch, window: Window) -> None:
    """Wait until something may be published. Once nothing may any more, the wait ends by a cancellation, when all is advanced."""
    try:
        while epoch.over or window.room() <= 0:
            await window.begin_to_wait().wait()
            if group.publisher.flush():  # of what nobody was there for
                await group.backend.let_woken_run()
    finally:
        window.waited()
