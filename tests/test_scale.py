"""A thousand subscribers, a thousand keys, and hundreds of lives at random: all are served, nothing remains, cost is linear."""

from __future__ import annotations

import gc
import logging
import random
import sys
import traceback
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from itertools import count
from operator import attrgetter
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

import anyio_sharedstream
from anyio_sharedstream import SharedSource, SharedStreamManager, SubscriberOverflow, Subscription
from tests.support import Feed, idle, settle, until
from tests.sweep import Reader, RunFeed, drain, managed

MANY = 1000
HOME = str(Path(anyio_sharedstream.__file__).parent)


@pytest.fixture(autouse=True)
def terse(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(
        logging.CRITICAL
    )  # a thousand warnings would cost more than what they warn of, and keep alive what they name


async def enter(manager: SharedStreamManager, feed: Feed, number: int, **policy: Any) -> list[Subscription[Any]]:
    return [await manager.subscribe(feed.source, **policy).__aenter__() for _ in range(number)]


@asynccontextmanager
async def crowd(feed: Feed, number: int = MANY) -> AsyncIterator[tuple[SharedStreamManager, list[Reader]]]:
    """Subscribers of a feed, each of which receives in a task of its own until it has ended."""
    async with managed(feed) as manager, anyio.create_task_group() as tasks:
        readers = [Reader(stream) for stream in await enter(manager, feed, number)]
        for reader in readers:
            tasks.start_soon(reader.run)
        await until(lambda: feed.opened)
        yield manager, readers


def all_got(readers: list[Reader], number: int) -> bool:
    return all(len(reader.got) == number for reader in readers)


def all_ended(readers: list[Reader]) -> bool:
    return all(reader.terminal is not None for reader in readers)


# A thousand subscribers of one key.


async def test_a_thousand_subscribers_share_one_opening_and_each_gets_everything_in_order() -> None:
    feed = Feed()
    async with crowd(feed) as (manager, readers):
        for start in range(0, 60, 20):
            feed.emit(*range(start, start + 20))
            await checkpoint()
        await until(partial(all_got, readers, 60))
        await manager.stop_all()
        await until(partial(all_ended, readers))
    assert all(reader.got == list(range(60)) for reader in readers)
    assert all(isinstance(reader.terminal, anyio.EndOfStream) for reader in readers)
    assert feed.opened == 1


def first_come_first_out(_streams: list[Subscription[Any]]) -> None:
    """They are in this order already."""


ORDERS = [first_come_first_out, list.reverse, random.Random(20).shuffle]


@pytest.mark.parametrize("arrange", ORDERS, ids=["as they came", "last in, first out", "at random"])
async def test_a_thousand_leave_in_any_order_and_whoever_stays_misses_nothing(
    arrange: Callable[[list[Subscription[Any]]], None],
) -> None:
    feed = Feed()
    async with managed(feed) as manager:
        streams = await enter(manager, feed, MANY)
        last = streams[:]
        arrange(streams)
        for event in range(10):
            feed.emit(event)
            await settle(10)
            leaving, streams = streams[:100], streams[100:]
            for stream in leaving:
                assert feed.open_now
                assert drain(stream) == (list(range(event + 1)), None)
                await stream.aclose()
        assert idle(manager)
        assert (feed.opened, feed.closed) == (1, 1)
        assert all(isinstance(drain(stream)[1], anyio.ClosedResourceError) for stream in last)


async def test_a_failure_reaches_a_thousand_with_an_exception_of_their_own_each() -> None:
    feed = Feed()
    async with crowd(feed) as (_, readers):
        feed.emit(0)
        feed.fail(ExceptionGroup("both", [ValueError("one"), OSError(2, "two")]))
        await until(partial(all_ended, readers))
    errors = [reader.terminal for reader in readers if isinstance(reader.terminal, ExceptionGroup)]
    assert len({id(error) for error in errors}) == MANY
    assert len({id(member) for error in errors for member in error.exceptions}) == 2 * MANY
    for number, error in enumerate(errors):
        error.add_note(str(number))
    assert [error.__notes__ for error in errors] == [[str(number)] for number in range(MANY)]
    assert {repr(error) for error in errors} == {repr(errors[0])}
    assert len({len([*traceback.walk_tb(error.__traceback__)]) for error in errors}) == 1
    assert all(reader.got == [0] for reader in readers)


async def test_all_but_one_of_a_thousand_overflow_and_that_one_reads_on() -> None:
    feed = Feed()
    async with managed(feed) as manager:
        async with manager.subscribe(feed.source, max_buffer_size=1) as reader:
            idlers = await enter(manager, feed, MANY - 1, max_buffer_size=1)
            for event in range(5):
                feed.emit(event)
                assert await reader.receive() == event
            (group,) = manager.statistics().groups.values()
            assert [known.subscriber_id for known in group.subscriptions] == [reader.subscriber_id]
            for idler in idlers:
                events, terminal = drain(idler)
                assert events == []
                assert isinstance(terminal, SubscriberOverflow)
                assert terminal.subscriber_id == idler.subscriber_id
        # The dead do not keep it open.
        assert (feed.opened, feed.closed) == (1, 1)


# A thousand keys.


async def stop_all(manager: SharedStreamManager) -> None:
    await manager.stop_all()
    assert idle(manager)


async def leave(manager: SharedStreamManager) -> None:
    assert not idle(manager)


@pytest.mark.parametrize("end", [stop_all, leave])
async def test_a_thousand_upstreams_open_and_are_closed_side_by_side(
    end: Callable[[SharedStreamManager], Awaitable[None]],
) -> None:
    opened: list[int] = []
    closing: list[int] = []
    closed: list[int] = []
    release = anyio.Event()

    async def play(key: int) -> AsyncGenerator[int, None]:
        opened.append(key)
        try:
            yield key
            await anyio.sleep_forever()
        finally:
            closing.append(key)
            with anyio.CancelScope(shield=True):
                await release.wait()
            closed.append(key)

    async def release_all_once_all_wait() -> None:
        try:
            await until(lambda: len(closing) == MANY)
            assert not closed
        finally:
            release.set()

    async with anyio.create_task_group() as tasks, managed() as manager:
        sources = [SharedSource(key=key, open=partial(play, key)) for key in range(MANY)]
        streams = [await manager.subscribe(source).__aenter__() for source in sources]
        assert [await stream.receive() for stream in streams] == [*range(MANY)]
        assert {group.state for group in manager.statistics().groups.values()} == {"live"}
        tasks.start_soon(release_all_once_all_wait)
        await end(manager)
    assert sorted(opened) == sorted(closed) == [*range(MANY)]
    assert all(isinstance(drain(stream)[1], anyio.EndOfStream) for stream in streams)


# Hundreds of lives at random.

Life = Callable[[SharedStreamManager, Feed, random.Random, list[Any]], Awaitable[None]]


async def take(stream: Subscription[Any], number: int, got: list[Any]) -> None:
    while number > 0:
        got.append(await stream.receive())
        number -= 1


async def receive_a_few(manager: SharedStreamManager, feed: Feed, dice: random.Random, got: list[Any]) -> None:
    async with manager.subscribe(feed.source) as stream:
        await take(stream, dice.randrange(8), got)


async def close_and_not_wait(manager: SharedStreamManager, feed: Feed, dice: random.Random, got: list[Any]) -> None:
    stream = await manager.subscribe(feed.source).__aenter__()
    await take(stream, dice.randrange(3), got)
    stream.close()


async def be_cancelled(manager: SharedStreamManager, feed: Feed, dice: random.Random, got: list[Any]) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive_many, manager, feed, got)
        await settle(dice.randrange(12))
        tasks.cancel_scope.cancel()
    assert len(got) < MANY


async def receive_many(manager: SharedStreamManager, feed: Feed, got: list[Any]) -> None:
    async with manager.subscribe(feed.source) as stream:
        await take(stream, MANY, got)


async def overflow(manager: SharedStreamManager, feed: Feed, _dice: random.Random, got: list[Any]) -> None:
    async with manager.subscribe(feed.source, max_buffer_size=2) as stream:
        with pytest.raises(SubscriberOverflow):
            await take_slowly(stream, got)


async def take_slowly(stream: Subscription[Any], got: list[Any]) -> None:
    while True:
        got.append(await stream.receive())
        await settle(10)


LIVES: list[Life] = [receive_a_few, close_and_not_wait, be_cancelled, overflow]


def alive() -> Counter[str]:
    """What there is of the library's objects."""
    gc.collect()
    classes = map(type, gc.get_objects())
    return Counter(cls.__qualname__ for cls in classes if str(cls.__module__).startswith("anyio_sharedstream"))


@pytest.mark.parametrize("seed", range(3))
async def test_hundreds_of_random_lives_get_contiguous_runs_and_leave_nothing(seed: int) -> None:
    feeds = [RunFeed(key) for key in range(4)]

    async def play() -> None:
        numbers = [count() for _ in feeds]
        while True:
            for feed in filter(attrgetter("open_now"), feeds):
                feed.emit(next(numbers[feeds.index(feed)]))
            await checkpoint()

    async def act(dice: random.Random) -> None:
        for _ in range(30):
            got: list[tuple[int, int]] = []
            await dice.choice(LIVES)(manager, dice.choice(feeds), dice, got)
            assert got == [(run, first + place) for run, first in got[:1] for place in range(len(got))]

    async with managed(*feeds) as manager:
        before = alive()
        async with anyio.create_task_group() as players:
            players.start_soon(play)
            async with anyio.create_task_group() as actors:
                for actor in range(12):
                    actors.start_soon(act, random.Random(1000 * seed + actor))
            await until(lambda: idle(manager))
            players.cancel_scope.cancel()
        assert alive() == before
        assert sum(feed.opened for feed in feeds) > 2 * len(feeds)


# What it costs.


@contextmanager
def counting(calls: Counter[bool]) -> Iterator[None]:
    """Count the calls that the library makes and gets: in step with its work, and unlike time the same on every machine."""
    sys.setprofile(lambda frame, _event, _arg: calls.update([frame.f_code.co_filename.startswith(HOME)]))
    try:
        yield
    finally:
        sys.setprofile(None)


async def come_and_go(number: int) -> None:
    async with crowd(Feed(), number) as (_, readers):
        for reader in readers:
            await reader.stream.aclose()


async def fail(number: int) -> None:
    feed = Feed()
    async with crowd(feed, number):
        feed.emit(*range(10))
        feed.fail(ValueError("own"))


async def fall_behind(number: int) -> None:
    feed = Feed()
    async with managed(feed) as manager:
        await enter(manager, feed, number, max_buffer_size=1)
        for event in range(3):
            feed.emit(event)
            await settle(5)


async def use_a_key_each(number: int) -> None:
    async with managed() as manager:
        for key in range(number):
            await manager.subscribe(Feed(key).source).__aenter__()
        await settle()
        await manager.stop_all()


async def cost(work: Callable[[int], Awaitable[None]], number: int) -> int:
    calls: Counter[bool] = Counter()
    with counting(calls):
        await work(number)
    return calls[True]


@pytest.mark.parametrize("work", [come_and_go, fail, fall_behind, use_a_key_each])
async def test_the_cost_of_many_is_linear(work: Callable[[int], Awaitable[None]]) -> None:
    few, many = [await cost(work, number) for number in (50, 200)]
    assert 3 * few < many < 4.4 * few
