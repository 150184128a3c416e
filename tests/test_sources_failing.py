"""Sources made of shared sources, failing anywhere: those above are told, and nobody else."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable
from functools import partial
from itertools import count
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from anyio_sharedstream import PollTerminated, SubscriberOverflow, Subscription
from tests.support import idle, settle, until
from tests.sweep import Cut, Reader, managed, noted, sweep
from tests.trees import Held, Merge, Shape, Tree, by_path, diamond, one_level, reached, shapes, two_levels


async def fail(_tree: Tree, place: Held) -> None:
    place.fail(ValueError("own"))


async def end(_tree: Tree, place: Held) -> None:
    place.end()


async def fail_in_a_child(_tree: Tree, place: Held) -> None:
    async def child() -> None:
        raise ValueError("child")

    place.tasks.start_soon(child)


async def cancel_the_scope(_tree: Tree, place: Held) -> None:
    place.scope.cancel()


async def cancel_the_task_group(_tree: Tree, place: Held) -> None:
    place.tasks.cancel_scope.cancel()


async def time_out(_tree: Tree, place: Held) -> None:
    place.scope.deadline = -math.inf


async def stop(tree: Tree, place: Held) -> None:
    await tree.manager.stop(place.key)


Mishap = Callable[[Tree, Held], Awaitable[None]]
# What is told to those who subscribe to the place of the mishap, and what reaches those above it.
MISHAPS: list[tuple[Mishap, type[Exception], type[Exception]]] = [
    (fail_in_a_child, ValueError, ValueError),
    (cancel_the_scope, PollTerminated, PollTerminated),
    (cancel_the_task_group, PollTerminated, PollTerminated),
    (time_out, TimeoutError, TimeoutError),
    (stop, anyio.EndOfStream, PollTerminated),
    (fail, ValueError, ValueError),
    (end, PollTerminated, PollTerminated),
]


def kinds(error: object) -> set[type[object]]:
    return set().union(*map(kinds, error.exceptions)) if isinstance(error, BaseExceptionGroup) else {type(error)}


async def strike(
    shape: Shape, key: Hashable, mishap: Mishap, here: type[Exception], above: type[Exception], steps: int, watched: bool
) -> None:
    tree, other = shape(), Held("other")
    (place,) = (feed for feed in tree.feeds if feed.key == key)
    async with tree.managed(other) as manager, anyio.create_task_group() as tasks:
        feeds = [tree.top, tree.top, tree.top, *tree.below * watched, other]
        readers = [(feed, Reader(await manager.subscribe(feed.source).__aenter__())) for feed in feeds]
        for _, reader in readers:
            tasks.start_soon(reader.run)
        users = feeds.count(place) + sum(feed.inner.count(place) for feed in tree.feeds)
        await until(lambda: place.opened and len(manager.statistics().groups[place.key].subscriptions) == users)
        for event in range(steps):
            tree.emit(event)
            other.emit(event)
            await checkpoint()
        await mishap(tree, place)

        struck = [(feed, reader) for feed, reader in readers if feed.rests_on(place)]
        await until(lambda: all(reader.terminal is not None for _, reader in struck))
        for feed, reader in struck:
            assert kinds(reader.terminal) == {here if feed is place else above}
            assert feed.key not in manager.statistics().groups
            assert all(consecutive(run) for run in by_path(reader.got).values())
        assert len({id(reader.terminal) for _, reader in struck}) == len(struck)
        assert [reader.got for _, reader in struck[:3]] == [struck[0][1].got] * 3

        tree.emit(steps)
        other.emit(steps)
        for feed, reader in [(feed, reader) for feed, reader in readers if not feed.rests_on(place)]:
            await until(partial(concluded, reader, steps))
            (run,) = by_path(reader.got).values()
            assert consecutive(run)
            assert feed.opened == 1
            reader.stream.close()
        await until(lambda: idle(manager))
        await tree.plays()


def consecutive(run: list[int]) -> bool:
    return run == list(range(run[0], run[0] + len(run)))


def concluded(reader: Reader, last: int) -> bool:
    return [event for *_, event in reader.got[-1:]] == [last]


@shapes
@pytest.mark.parametrize(("mishap", "here", "above"), MISHAPS)
async def test_a_mishap_on_any_level_reaches_those_above_and_nobody_else(
    shape: Shape, mishap: Mishap, here: type[Exception], above: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)  # hundreds of tracebacks would take longer to write than all the rest
    tree = shape()
    for place in tree.leaves if mishap in (fail, end) else tree.feeds:
        for steps in 0, 1, 3, 6:
            for watched in False, True:
                with noted(f"{place.key!r} after {steps} steps, watched: {watched}"):
                    await strike(shape, place.key, mishap, here, above, steps, watched)


@pytest.mark.parametrize("shape", [one_level, two_levels, diamond])
async def test_an_inner_subscription_that_overflows_fails_its_source_and_no_sibling(
    shape: Shape, caplog: pytest.LogCaptureFixture
) -> None:
    async def trial(cut: Cut) -> None:
        tree = shape()
        base, slow = tree.feeds[:2]
        gate = anyio.Event()
        slow.bound, slow.pace = 2, gate.wait

        async def life() -> None:
            async with manager.subscribe(tree.top.source) as stream:
                await until(lambda: tree.connected(others=1))
                for event in range(5):
                    tree.emit(event)
                    await until(partial(reached, reader, event + 1))
                gate.set()  # only now can the source learn that it has overflowed
                with pytest.raises(ExceptionGroup) as caught:
                    async for _ in stream:
                        pass
                assert kinds(caught.value) == {SubscriberOverflow}

        async with tree.managed() as manager, anyio.create_task_group() as tasks:
            reader = Reader(await manager.subscribe(base.source).__aenter__())
            tasks.start_soon(reader.run)
            await cut.run(life())
            await until(lambda: [*manager.statistics().groups] == [base.key] and not manager.statistics().closing)
            tree.emit(len(tree.emitted))
            await until(partial(reached, reader, len(tree.emitted)))
            assert by_path(reader.got) == {(base.key,): tree.emitted}
            assert base.opened == 1
            reader.stream.close()
            slow.pace = checkpoint
            await tree.plays()

    caplog.set_level(logging.CRITICAL)
    assert await sweep(trial) >= 10


# Sources that never rest.


class Ticking(Held):
    """Yields whenever it runs."""

    async def _play(self) -> AsyncGenerator[Any, None]:
        ticks = count()
        with self.counted():
            async with self.holding():
                while True:
                    yield self.key, next(ticks)
                    await self.pace()


def batch(stream: Subscription[Any]) -> Awaitable[object]:
    return stream.receive_batch(10)


async def never() -> None:
    """Not pausing at all."""


async def wait_for_a_task() -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(checkpoint)


@pytest.mark.parametrize("pace", [never, checkpoint, wait_for_a_task])
@pytest.mark.parametrize("receive", [Subscription.receive, anext, batch], ids=["receive", "anext", "receive_batch"])
async def test_a_reader_that_is_woken_at_every_step_can_be_cancelled(
    receive: Callable[[Subscription[Any]], Awaitable[object]], pace: Callable[[], Awaitable[object]]
) -> None:
    feed = Ticking("ticking")
    feed.pace = pace
    unimpressed: list[object] = []

    async def read() -> None:
        unimpressed.append([await receive(stream) for _ in range(20_000)])

    async with managed(feed) as manager:
        for steps in range(10):
            async with manager.subscribe(feed.source) as stream, anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                await settle(steps)
                tasks.cancel_scope.cancel()
            assert not unimpressed


async def test_a_source_whose_tasks_are_woken_at_every_step_can_be_left() -> None:
    left, right = Ticking("left"), Ticking("right")
    tree = Tree(left, right, Merge("top", left, right))
    async with tree.managed() as manager, anyio.create_task_group() as tasks:
        for feed in left, right:
            tasks.start_soon(Reader(await manager.subscribe(feed.source).__aenter__()).run)
        stream = await manager.subscribe(tree.top.source).__aenter__()
        try:
            assert {(await stream.receive())[0] for _ in range(20)} == {"left", "right"}
            tasks.start_soon(stream.aclose)
            await until(lambda: not tree.top.open_now, rounds=1000)
            assert left.open_now == right.open_now == 1
        finally:
            await manager.stop_all()
