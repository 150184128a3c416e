"""A reader or a manager, cancelled before whichever of its steps while a source is held: nothing is lost, and nothing waits."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from anyio_sharedstream import Block, SharedStreamManager, Subscription
from tests.block_support import KINDS, Steps, generator_in_tasks, published
from tests.support import settle, until
from tests.sweep import Cut, Reader, drain, managed, nothing_left, sweep
from tests.virtual_time import in_virtual_time

FOREVER = Block(math.inf)
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@in_virtual_time
async def test_a_reader_cancelled_anywhere_loses_nothing_and_holds_nobody() -> None:
    async def trial(cut: Cut) -> None:
        got: list[int] = []
        async with held_for_sweep() as (manager, steps, reader):

            async def life() -> None:
                async with manager.subscribe(steps.source, max_buffer_size=2, overflow=FOREVER) as stream:
                    while len(got) < 6:
                        got.append(await stream.receive())
                        await settle(len(got) % 3)

            await cut.run(life())
            seen = len(reader.got)
            await until(lambda: len(reader.got) > seen + 100)
            assert reader.got == list(range(len(reader.got)))
            assert got == list(range(got[0] if got else 0, (got[0] if got else 0) + len(got)))

    assert await sweep(trial) >= 6
    assert anyio.current_time() == 0


@asynccontextmanager
async def held_for_sweep() -> AsyncIterator[tuple[SharedStreamManager, Steps, Reader]]:
    steps = Steps(generator_in_tasks)
    async with anyio.create_task_group() as tasks, managed() as manager:
        reader = Reader(await manager.subscribe(steps.source).__aenter__())
        tasks.start_soon(reader.run)
        yield manager, steps, reader
        tasks.cancel_scope.cancel()
        await manager.stop_all()
    assert steps.opened == steps.closed


@kinds
@in_virtual_time
async def test_a_manager_cancelled_anywhere_during_a_hold_ends_everything(kind: Callable[[Steps], Any]) -> None:
    async def trial(cut: Cut) -> None:
        steps = Steps(kind)
        readers: list[Reader] = []
        streams: list[Subscription[int]] = []

        async def life() -> None:
            async with SharedStreamManager() as manager:
                readers.append(Reader(await manager.subscribe(steps.source).__aenter__()))
                tasks.start_soon(readers[0].run)
                streams.append(await manager.subscribe(steps.source, max_buffer_size=2, overflow=FOREVER).__aenter__())
                await settle(8)
                assert published(manager) == 2
                await streams[0].receive()
                await settle(4)

        async with nothing_left(), anyio.create_task_group() as tasks:
            await cut.run(life())
            assert steps.opened == steps.closed
            await until(lambda: all(reader.terminal is not None for reader in readers))
            for stream, reader in zip(streams, readers, strict=False):
                taken = stream.statistics().events_received
                rest, terminal = drain(stream)
                assert list(range(taken)) + rest == reader.got
                assert isinstance(terminal, anyio.EndOfStream)

    assert await sweep(trial) >= 6
    assert anyio.current_time() == 0
