"""One opening of an acknowledged upstream: its producer, the stream of that, and the tasks that advance what comes back.

Relies on `_ack_group` for every change of state. The stream is driven in the poll task, like any other; around it is what keeps
it open until everything has been advanced that can be. A cancellation from outside is a request to end, like any other, and must
not reach the stream before that has been done; so all of this is shielded, and ends in time by itself.
"""

from __future__ import annotations

from collections.abc import AsyncIterable
from contextlib import nullcontext
from typing import Any

from anyio import CancelScope, create_task_group, get_cancelled_exc_class, move_on_after, sleep_forever

from anyio_sharedstream._ack_group import AckEpoch, AckGroup
from anyio_sharedstream._drive import close_quietly, drive
from anyio_sharedstream._exceptions import consists_of
from anyio_sharedstream._leaving import being_cancelled
from anyio_sharedstream._source import discard
from anyio_sharedstream._workers import Workers

__all__ = ["produce"]


async def produce(epoch: AckEpoch) -> None:
    """Run one opening from the creation of its producer until that is closed; raises what ends it, unless that has been dealt
    with."""
    group, acks = epoch.group, epoch.acks
    error: BaseException | None = None
    try:
        producer = acks.open()
    except BaseException:
        acks.abandon()
        raise
    try:
        async with create_task_group() as around:
            around.start_soon(_watch, epoch)
            with CancelScope(shield=True):
                async with create_task_group() as tasks:
                    tasks.start_soon(_advance, epoch)
                    assert epoch.scope is not None
                    with epoch.scope:
                        error = await _pull(epoch, producer)
                    group.stream_ended(epoch, error)
            around.cancel_scope.cancel()
    finally:
        acks.abandon()
        await _close(group, producer, acks.source.drain_timeout)
    if error is not None and not epoch.settled:
        try:
            raise error
        finally:
            del error  # it and this frame, which is in its traceback, would keep each other alive


async def _advance(epoch: AckEpoch) -> None:
    """Run those who advance until there is nothing left for them to do; then the stream is of no use any more."""
    async with create_task_group() as tasks:
        tasks.start_soon(Workers(epoch.acks).run, tasks)
        await epoch.acks.over.wait()
        tasks.cancel_scope.cancel()
    # Not before: an `advance` that hangs may hold what the stream needs to close, and one that is cancelled may need the stream.
    if epoch.brought_home:
        assert epoch.scope is not None
        epoch.scope.cancel()


async def _watch(epoch: AckEpoch) -> None:
    """Take a cancellation from outside for a request to stop."""
    try:
        await sleep_forever()
    except get_cancelled_exc_class():
        if not epoch.acks.over.is_set():
            epoch.group.stop()
        raise


async def _pull(epoch: AckEpoch, producer: Any) -> BaseException | None:
    """Drive the producer's stream to its end; returns what it raises, if that is not because it was cancelled."""
    group = epoch.group
    try:
        try:
            stream = producer.open_stream()
            if not isinstance(stream, AsyncIterable):
                discard(stream)
                raise TypeError(f"open_stream() of {group.key!r} must return an async iterable, not {stream!r}")
        except BaseException as exc:
            group.iteration_ended(epoch, exc, final=True)
            raise
        await drive(group, epoch, stream, close=True, final=True)
    except BaseException as exc:
        if being_cancelled() and consists_of(exc, get_cancelled_exc_class()):
            raise
        return exc
    return None


async def _close(group: AckGroup, producer: object, seconds: float) -> None:
    # If all around is cancelled, a clean-up that has to wait for its broker needs some time all the same.
    with move_on_after(seconds, shield=True) if being_cancelled() else nullcontext():
        await close_quietly(group, producer)
