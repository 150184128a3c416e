"""Sources made of shared sources, cancelled anywhere: every level ends, quietly, and nobody else notices."""

from __future__ import annotations

from functools import partial

import anyio
import pytest

from anyio_sharedstream import SharedStreamManager
from tests.support import idle, settle, until
from tests.sweep import Cut, Reader, drain, noted, nothing_left, sweep
from tests.trees import Shape, by_path, reached, shapes


@shapes
async def test_a_cancelled_life_takes_all_levels_with_it(shape: Shape, caplog: pytest.LogCaptureFixture) -> None:
    async def trial(cut: Cut) -> None:
        tree = shape()

        async def life() -> None:
            async with manager.subscribe(tree.top.source) as stream:
                await until(tree.connected)
                await tree.take(stream, 0, 1)

        async with tree.managed() as manager:
            await cut.run(life())
            assert tree.top.key not in manager.statistics().groups
            await until(lambda: idle(manager))
            assert not any(feed.open_now for feed in tree.feeds)
            await tree.plays()
        assert tree.ended_ordinarily()

    assert await sweep(trial) >= 8
    assert not caplog.records


@shapes
async def test_a_cancelled_consumer_harms_no_other_on_any_level(shape: Shape, caplog: pytest.LogCaptureFixture) -> None:
    async def trial(cut: Cut) -> None:
        tree = shape()

        async def life() -> None:
            async with manager.subscribe(tree.top.source) as stream, manager.subscribe(tree.leaves[0].source):
                await until(lambda: tree.connected(others=len(tree.below) + 1))
                await tree.take(stream, 0, 1)

        async with tree.managed() as manager, anyio.create_task_group() as tasks:
            readers = [Reader(await manager.subscribe(feed.source).__aenter__()) for feed in tree.feeds]
            for reader in readers:
                tasks.start_soon(reader.run)
            await cut.run(life())
            await until(lambda: tree.connected(others=len(tree.below)))
            for event in range(len(tree.emitted), 4):
                tree.emit(event)
            for reader, paths in zip(readers, [*[1] * len(tree.below), tree.paths], strict=True):
                await until(partial(reached, reader, 4 * paths))
                assert list(by_path(reader.got).values()) == [[0, 1, 2, 3]] * paths
                assert reader.terminal is None
                reader.stream.close()
        assert all(feed.opened == 1 for feed in tree.feeds)
        assert tree.ended_ordinarily()

    assert await sweep(trial) >= 4
    assert not caplog.records


@shapes
async def test_leaving_last_is_cancelled_and_no_level_opens_again_before_it_has_closed(
    shape: Shape, caplog: pytest.LogCaptureFixture
) -> None:
    async def trial(cut: Cut) -> None:
        tree = shape()
        clean_up = anyio.Event()

        async def release() -> None:
            await settle(10)
            clean_up.set()

        async with tree.managed() as manager, anyio.create_task_group() as tasks:
            stream = await manager.subscribe(tree.top.source).__aenter__()
            await until(tree.connected)
            await tree.take(stream, 0)
            for leaf in tree.leaves:
                leaf.clean_up = clean_up
            tasks.start_soon(release)
            await cut.run(stream.aclose())
            await tree.plays()
        assert all(feed.opened == 2 for feed in tree.feeds)
        assert tree.ended_ordinarily()

    assert await sweep(trial) >= 2
    assert not caplog.records


@shapes
async def test_a_cancelled_stop_of_everything_ends_every_level_quietly(shape: Shape, caplog: pytest.LogCaptureFixture) -> None:
    async def trial(cut: Cut, opening: int) -> None:
        tree = shape()
        async with tree.managed() as manager, anyio.create_task_group() as tasks:
            readers = [Reader(await manager.subscribe(feed.source).__aenter__()) for feed in [*tree.feeds, tree.top, tree.top]]
            for reader in readers:
                tasks.start_soon(reader.run)
            await settle(opening)
            tree.emit(0)
            await cut.run(manager.stop_all())
            # What was still opening may have subscribed to something since.
            await until(lambda: idle(manager))
            await until(lambda: all(reader.terminal is not None for reader in readers))
            assert all(isinstance(reader.terminal, anyio.EndOfStream) for reader in readers)
            await tree.plays()
        assert tree.ended_ordinarily()

    for opening in 0, 1, 2, 4, 7:
        with noted(f"after {opening} steps"):
            assert await sweep(partial(trial, opening=opening)) >= 2
    assert not caplog.records


@shapes
async def test_a_manager_cancelled_anywhere_ends_every_level_quietly(shape: Shape, caplog: pytest.LogCaptureFixture) -> None:
    async def trial(cut: Cut) -> None:
        tree = shape()
        readers: list[Reader] = []

        async def life() -> None:
            async with SharedStreamManager() as tree.manager:
                for feed in (tree.top, tree.top, tree.leaves[0]):
                    readers.append(Reader(await tree.manager.subscribe(feed.source).__aenter__()))
                    tasks.start_soon(readers[-1].run)
                await until(lambda: tree.connected(others=1))
                tree.emit(0)
                await settle(4)
                await readers[0].stream.aclose()
                await settle(2)

        async with nothing_left(*tree.feeds), anyio.create_task_group() as tasks:
            await cut.run(life())
            await until(lambda: all(reader.terminal is not None for reader in readers))
        assert all(isinstance(reader.terminal, anyio.EndOfStream | anyio.ClosedResourceError) for reader in readers)
        assert tree.ended_ordinarily()

    assert await sweep(trial) >= 10
    assert not caplog.records


@shapes
async def test_a_manager_left_while_its_sources_open_ends_every_level_quietly(
    shape: Shape, caplog: pytest.LogCaptureFixture
) -> None:
    for steps in range(15):
        tree = shape()
        with noted(f"left after {steps} steps"):
            async with tree.managed() as manager:
                streams = [await manager.subscribe(tree.top.source).__aenter__() for _ in range(2)]
                await settle(steps)
            assert [drain(stream)[0] for stream in streams] == [[], []]
            assert tree.ended_ordinarily()
            assert not caplog.records
