"""While a source is held, whatever ends, in any order: the upstream goes on or ends at once, and nothing published is dropped."""

from __future__ import annotations

import math
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import permutations
from typing import Any

import anyio
import pytest

from anyio_sharedstream import Block, SharedSource, SharedStreamManager, SubscriberOverflow, Subscription
from tests.block_support import KINDS, Steps, generator, generator_in_tasks, manager_of_generator, manager_of_iterator, published
from tests.machine_play import reachable
from tests.support import Feed, idle, settle, until
from tests.sweep import Reader, drain, managed, noted, nothing_left
from tests.virtual_time import in_virtual_time

FOREVER = Block(math.inf)
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
failing_kinds = pytest.mark.parametrize(
    "kind", [generator_in_tasks, manager_of_generator, manager_of_iterator], ids=lambda kind: kind.__name__
)


class Held:
    """An upstream that is held for one subscriber, with another that reads: in a task each, in a manager."""

    def __init__(self, kind: Callable[[Steps], Any], manager: SharedStreamManager, tasks: anyio.abc.TaskGroup) -> None:
        self.steps = Steps(kind)
        self.manager = manager
        self.tasks = tasks
        self.life = anyio.CancelScope()
        self.stream = manager.subscribe(self.steps.source, max_buffer_size=2, overflow=FOREVER)
        self.reader = Reader(manager.subscribe(self.steps.source))
        self.deaf = manager.subscribe(self.steps.source, max_buffer_size=1, overflow=Block(60))

    async def begin(self) -> None:
        for stream in [self.reader.stream, self.deaf]:
            await stream.__aenter__()
        self.tasks.start_soon(self.reader.run)
        self.tasks.start_soon(self._live)
        await until(lambda: self.steps.begun == 1)
        self.deaf.receive_nowait()
        await until(lambda: self.steps.begun == 2)
        await settle()

    async def _live(self) -> None:
        with self.life:
            async with self.stream:
                await anyio.sleep_forever()

    # What may happen.

    async def cancel(self) -> None:
        self.life.cancel()

    async def close(self) -> None:
        self.stream.close()

    async def deaf_leaves(self) -> None:
        await self.deaf.aclose()

    async def other_leaves(self) -> None:
        await self.reader.stream.aclose()

    async def room(self) -> None:
        for stream in [self.stream, self.deaf]:
            drain(stream)

    async def fail(self) -> None:
        self.steps.failure.set()

    async def stop(self) -> None:
        await self.manager.stop("steps")

    async def stop_all(self) -> None:
        await self.manager.stop_all()

    async def all_leave(self) -> None:
        for stream in [self.stream, self.deaf, self.reader.stream]:
            stream.close()


HAPPENINGS = [
    Held.cancel,
    Held.close,
    Held.deaf_leaves,
    Held.other_leaves,
    Held.room,
    Held.fail,
    Held.stop,
    Held.stop_all,
    Held.all_leave,
]


@pytest.mark.parametrize("rounds", [0, 1, 10])
@kinds
@in_virtual_time
async def test_no_order_of_events_takes_any_time(kind: Callable[[Steps], Any], rounds: int) -> None:
    for happenings in permutations(HAPPENINGS, 2):
        with noted(" then ".join(happening.__name__ for happening in happenings)):
            async with nothing_left(), anyio.create_task_group() as tasks:
                async with SharedStreamManager() as manager:
                    held = Held(kind, manager, tasks)
                    await held.begin()
                    for happening in happenings:
                        tasks.start_soon(happening, held)
                        await settle(rounds)
                    # Leaving the manager is always the last that happens.
                assert held.steps.opened == held.steps.closed
                held.life.cancel()
            assert anyio.current_time() == 0


@asynccontextmanager
async def held_for(
    kind: Callable[[Steps], Any], overflow: Block = FOREVER
) -> AsyncIterator[tuple[SharedStreamManager, Steps, Subscription[int], Reader]]:
    """A manager with an upstream that is held for one subscriber with a single event; and another, that reads."""
    steps = Steps(kind)
    async with anyio.create_task_group() as tasks, managed() as manager:
        stream = await manager.subscribe(steps.source, max_buffer_size=1, overflow=overflow).__aenter__()
        reader = Reader(await manager.subscribe(steps.source).__aenter__())
        tasks.start_soon(reader.run)
        await until(lambda: reader.got == [0])
        await anyio.sleep(3)
        yield manager, steps, stream, reader
        assert anyio.current_time() == 3
        await manager.stop_all()
        await until(lambda: reader.terminal is not None)
        tasks.cancel_scope.cancel()


async def closes(stream: Subscription[int]) -> None:
    stream.close()


async def exits(stream: Subscription[int]) -> None:
    await stream.__aexit__(None, None, None)


@pytest.mark.parametrize("leave", [closes, Subscription.aclose, exits])
@kinds
@in_virtual_time
async def test_when_the_held_one_leaves_the_upstream_goes_on(
    kind: Callable[[Steps], Any], leave: Callable[[Subscription[int]], Awaitable[None]]
) -> None:
    async with held_for(kind) as (_, steps, stream, reader):
        assert steps.begun == 1
        await leave(stream)
        await until(lambda: len(reader.got) > 100)
        assert reader.got == list(range(len(reader.got)))
        assert stream.statistics().held_seconds == 3


@pytest.mark.parametrize("everything", [False, True])
@kinds
@in_virtual_time
async def test_a_stop_ends_at_once_and_the_held_one_gets_what_is_in_its_buffer(
    kind: Callable[[Steps], Any], everything: bool
) -> None:
    async with held_for(kind) as (manager, steps, stream, reader):
        await (manager.stop_all() if everything else manager.stop("steps"))
        assert idle(manager)
        assert steps.opened == steps.closed
        assert steps.begun == 1
        for got, terminal in [drain(stream), (reader.got, reader.terminal)]:
            assert got == [0]
            assert isinstance(terminal, anyio.EndOfStream)
        assert stream.statistics().held_seconds == 3


@failing_kinds
@in_virtual_time
async def test_a_failure_of_the_source_reaches_everyone_at_once(kind: Callable[[Steps], Any]) -> None:
    async with held_for(kind) as (manager, steps, stream, reader):
        steps.failure.set()
        await settle()
        assert idle(manager), "the source has failed, and is still held"
        for got, terminal in [drain(stream), (reader.got, reader.terminal)]:
            assert got == [0]
            assert isinstance(terminal, ExceptionGroup)
            assert terminal.subgroup(ConnectionError)


@kinds
@in_virtual_time
async def test_a_cancellation_around_the_manager_ends_the_upstream_while_the_body_is_shielded(
    kind: Callable[[Steps], Any],
) -> None:
    steps = Steps(kind)
    with anyio.CancelScope() as surroundings:
        async with managed() as manager, manager.subscribe(steps.source, max_buffer_size=1, overflow=FOREVER):
            with anyio.CancelScope(shield=True):
                await until(lambda: steps.begun)
                surroundings.cancel()
                await settle()
                assert idle(manager)
    assert steps.opened == steps.closed


@in_virtual_time
async def test_a_sibling_that_overflows_in_the_next_step_changes_nothing() -> None:
    async with held_for(generator) as (manager, steps, stream, reader):
        lazy = await manager.subscribe(steps.source, max_buffer_size=1).__aenter__()
        for expected in range(3):
            assert await stream.receive() == expected
            await until(partial(steps.have_begun, expected + 2))
            await settle()
        assert isinstance(drain(lazy)[1], SubscriberOverflow)
        assert reader.got == [0, 1, 2, 3]


def interrupting(times: int) -> SharedSource[int]:
    """A source that rests no longer than a second at a yield, whatever the library does there; then waits."""

    async def play() -> AsyncGenerator[int, None]:
        for number in range(times):
            with anyio.move_on_after(1):
                yield number
        await anyio.sleep_forever()

    return SharedSource(key="interrupting", open=play)


@in_virtual_time
async def test_what_a_source_gives_after_it_interrupted_a_hold_goes_beyond_the_bound() -> None:
    # It cannot be held, and what others receive the held one must receive as well, however much that is.
    source = interrupting(200)
    async with anyio.create_task_group() as tasks, managed() as manager:
        stream = await manager.subscribe(source, max_buffer_size=1, overflow=FOREVER).__aenter__()
        reader = Reader(await manager.subscribe(source).__aenter__())
        tasks.start_soon(reader.run)
        await anyio.sleep(250)
        assert reader.got == list(range(200))
        assert stream.statistics().current_buffer_used == 200
        await manager.stop_all()
        got, terminal = drain(stream)
        assert got == list(range(200))
        assert isinstance(terminal, anyio.EndOfStream)


@in_virtual_time
async def test_who_never_has_room_fails_also_if_the_source_interrupts_the_hold() -> None:
    source = interrupting(200)
    async with (
        managed() as manager,
        manager.subscribe(source, max_buffer_size=1, overflow=Block(10)) as stream,
        manager.subscribe(source),
    ):
        await anyio.sleep(20)
        assert isinstance(drain(stream)[1], SubscriberOverflow)


@in_virtual_time
async def test_only_the_time_counts_for_which_the_source_was_held() -> None:
    async def play() -> AsyncGenerator[int, None]:
        number = 0
        while True:
            with anyio.move_on_after(1):
                yield number
            number += 1
            await anyio.sleep(10)  # the source's own doing

    async with managed() as manager:
        source = SharedSource(key="slow", open=play)
        stream = await manager.subscribe(source, max_buffer_size=1, overflow=Block(3.5)).__aenter__()
        witness = await manager.subscribe(source).__aenter__()
        await anyio.sleep_until(33.4)
        assert stream.statistics().held_seconds == pytest.approx(3.4)
        await anyio.sleep_until(33.6)
        assert stream.statistics().held_seconds == pytest.approx(3.5)
        got, terminal = drain(stream)
        assert (got, str(terminal)) == (
            [],
            f"subscriber {stream.subscriber_id!r} of 'slow' had no room in its buffer of 1 events for 3.5 seconds; "
            "receive faster, or subscribe with a larger max_buffer_size",
        )
        await witness.aclose()


@in_virtual_time
async def test_who_has_had_room_in_between_is_waited_for_anew() -> None:
    async with (
        managed() as manager,
        manager.subscribe(interrupting(200), max_buffer_size=1, overflow=Block(10)) as stream,
    ):
        for _ in range(20):
            await anyio.sleep(8)
            stream.receive_nowait()
            while stream.statistics().current_buffer_used:
                stream.receive_nowait()
        assert stream.statistics().held_seconds == pytest.approx(160)


@in_virtual_time
async def test_many_with_patience_of_their_own_fail_each_at_its_time() -> None:
    feed = Feed()
    async with managed(feed) as manager, manager.subscribe(feed.source) as witness:
        streams = [
            await manager.subscribe(feed.source, max_buffer_size=1, overflow=Block(up_to)).__aenter__()
            for up_to in [3, 1, 2, 2, 5, 4]
        ]
        feed.emit(0, 1)
        await settle()
        for time, alive in [(0.5, 6), (1.5, 5), (2.5, 3), (3.5, 2)]:
            await anyio.sleep_until(time)
            assert len(manager.statistics().groups[feed.key].subscriptions) == 1 + alive
        streams[4].close()
        await anyio.sleep_until(3.9)
        assert [await witness.receive(), witness.statistics().current_buffer_used] == [0, 0]
        await anyio.sleep_until(4)
        assert await witness.receive() == 1


@in_virtual_time
async def test_a_thread_may_look_at_the_statistics_during_a_hold() -> None:
    feed = Feed()
    async with managed(feed) as manager, manager.subscribe(feed.source, max_buffer_size=1, overflow=FOREVER) as stream:
        feed.emit(0, 1)
        await anyio.sleep(1)
        seen: list[Any] = []
        thread = threading.Thread(target=lambda: seen.append(manager.statistics()))
        thread.start()
        thread.join()  # no clock runs there, so it sees what was held before
        (group,) = seen[0].groups.values()
        assert group.subscriptions[0].held_seconds == 0
        assert stream.statistics().held_seconds == 1


async def test_who_leaves_while_others_hold_the_source_is_kept_by_nothing() -> None:
    steps = Steps(generator)
    async with managed() as manager:
        streams = [await manager.subscribe(steps.source, max_buffer_size=1, overflow=FOREVER).__aenter__() for _ in range(4)]
        await until(lambda: published(manager) == 1)
        await settle()
        for place in (1, 0, 1):
            await streams.pop(place).aclose()
            assert sorted(map(id, reachable(manager))) == sorted(map(id, streams))
        assert steps.begun == 1
        assert await streams[0].receive() == 0
        await until(lambda: published(manager) == 2)
        await manager.stop_all()
