"""`Subscription`: what each of its methods gives, and what it raises."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import anyio
import pytest
from anyio import to_thread

from anyio_sharedstream import Fail, SharedStreamManager, Subscription, SubscriptionStatistics
from tests.support import Feed, idle, settle, until


@pytest.fixture
def feed() -> Feed:
    return Feed()


@pytest.fixture
async def manager() -> AsyncIterator[SharedStreamManager]:
    async with SharedStreamManager() as manager:
        yield manager


@pytest.fixture
async def stream(manager: SharedStreamManager, feed: Feed) -> AsyncIterator[Subscription[Any]]:
    async with manager.subscribe(feed.source, subscriber_id="me") as stream:
        yield stream


async def buffered(stream: Subscription[Any], feed: Feed, *chunks: int) -> None:
    """Have chunks of the given sizes published, of events that count from 0."""
    end = 0
    for size in chunks:
        feed.emit(*range(end, end + size))
        end += size
        await until(lambda: stream.statistics().current_buffer_used == end)  # noqa: B023


async def receive(stream: Subscription[Any]) -> Any:
    return await stream.receive()


async def receive_nowait(stream: Subscription[Any]) -> Any:
    return stream.receive_nowait()


async def receive_batch(stream: Subscription[Any]) -> Any:
    return await stream.receive_batch(5)


async def iterate(stream: Subscription[Any]) -> Any:
    return await anext(stream)


async def iterate_batches(stream: Subscription[Any]) -> Any:
    return await anext(stream.batches(5))


READS = [receive, receive_nowait, receive_batch]
ITERATIONS = [iterate, iterate_batches]
EVERY_READ = pytest.mark.parametrize("read", [*READS, *ITERATIONS])


async def test_each_way_of_receiving_takes_from_the_same_run(stream: Subscription[Any], feed: Feed) -> None:
    await buffered(stream, feed, 3, 4)
    assert await stream.receive() == 0
    assert stream.receive_nowait() == 1
    assert await anext(stream) == 2
    assert await stream.receive_batch(2) == (3, 4)
    assert await anext(stream.batches(5)) == (5, 6)


async def test_receive_nowait_raises_would_block_if_there_is_nothing_yet(stream: Subscription[Any], feed: Feed) -> None:
    for n in range(2):
        with pytest.raises(anyio.WouldBlock):
            stream.receive_nowait()
        feed.emit(n)
        await settle()
        assert stream.receive_nowait() == n


async def test_async_for_ends_at_the_end_of_the_stream(
    stream: Subscription[Any], feed: Feed, manager: SharedStreamManager
) -> None:
    await buffered(stream, feed, 2, 3)
    await manager.stop_all()
    assert [event async for event in stream] == [0, 1, 2, 3, 4]
    assert [event async for event in stream] == []


# Batches.


@pytest.mark.parametrize("chunks", [(7,), (1, 1, 1, 1, 1, 1, 1), (3, 1, 3)])
@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 8, 1000])
async def test_a_batch_is_everything_ready_up_to_its_size_across_chunks(
    stream: Subscription[Any], feed: Feed, size: int, chunks: tuple[int, ...]
) -> None:
    await buffered(stream, feed, *chunks)
    for begin in range(0, 7, size):
        assert await stream.receive_batch(size) == tuple(range(begin, min(begin + size, 7)))
    with pytest.raises(anyio.WouldBlock):
        stream.receive_nowait()
    assert stream.statistics().events_received == 7


async def test_a_batch_starts_where_single_receives_have_stopped(stream: Subscription[Any], feed: Feed) -> None:
    await buffered(stream, feed, 3, 3)
    assert await stream.receive() == 0
    assert await stream.receive_batch(4) == (1, 2, 3, 4)
    assert await stream.receive() == 5


async def test_a_batch_waits_for_one_event_at_least(stream: Subscription[Any], feed: Feed) -> None:
    taken: list[tuple[Any, ...]] = []

    async def read() -> None:
        taken.append(await stream.receive_batch(10))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await settle()
        assert not taken
        feed.emit(1, 2)
    assert taken == [(1, 2)]


async def test_batches_end_at_the_end_of_the_stream(stream: Subscription[Any], feed: Feed, manager: SharedStreamManager) -> None:
    await buffered(stream, feed, 2, 3)
    await manager.stop_all()
    batches = stream.batches(2)
    assert aiter(batches) is batches
    assert [batch async for batch in batches] == [(0, 1), (2, 3), (4,)]
    with pytest.raises(anyio.EndOfStream):
        await stream.receive_batch(2)


async def test_what_is_left_of_batches_that_were_broken_off_can_be_received(stream: Subscription[Any], feed: Feed) -> None:
    await buffered(stream, feed, 5)
    assert await anext(stream.batches(2)) == (0, 1)
    assert await stream.receive() == 2


@pytest.mark.parametrize("size", [0, -1, True, 1.5, math.inf, "5", None])
async def test_a_batch_size_that_is_no_positive_number_is_refused(stream: Subscription[Any], feed: Feed, size: Any) -> None:
    await buffered(stream, feed, 1)
    with pytest.raises(ValueError, match=f"max_size.*{size!r}"):
        await stream.receive_batch(size)
    with pytest.raises(ValueError, match=f"max_size.*{size!r}"):
        stream.batches(size)
    assert stream.receive_nowait() == 0


# The end.


@pytest.mark.parametrize("read", READS)
async def test_a_stopped_stream_has_ended_for_every_later_receive(
    stream: Subscription[Any], manager: SharedStreamManager, read: Any
) -> None:
    await manager.stop_all()
    for _ in range(3):
        with pytest.raises(anyio.EndOfStream):
            await read(stream)


@pytest.mark.parametrize("read", ITERATIONS)
async def test_a_stopped_stream_has_ended_for_every_later_iteration(
    stream: Subscription[Any], manager: SharedStreamManager, read: Any
) -> None:
    await manager.stop_all()
    for _ in range(3):
        with pytest.raises(StopAsyncIteration):
            await read(stream)


@EVERY_READ
async def test_a_failure_is_repeated_by_every_later_receive(stream: Subscription[Any], feed: Feed, read: Any) -> None:
    feed.fail(ValueError("end"))
    await until(lambda: feed.closed)
    await settle()
    for _ in range(3):
        with pytest.raises(ValueError, match="end"):
            await read(stream)


@EVERY_READ
async def test_a_closed_subscription_says_so_and_drops_what_was_buffered(
    stream: Subscription[Any], feed: Feed, read: Any
) -> None:
    await buffered(stream, feed, 2, 2)
    stream.close()
    for _ in range(2):
        with pytest.raises(anyio.ClosedResourceError):
            await read(stream)
    assert stream.statistics().current_buffer_used == 0


@EVERY_READ
async def test_closing_comes_before_how_the_stream_had_ended(stream: Subscription[Any], feed: Feed, read: Any) -> None:
    feed.fail(ValueError("end"))
    with pytest.raises(ValueError, match="end"):
        await stream.receive()
    stream.close()
    with pytest.raises(anyio.ClosedResourceError):
        await read(stream)


async def test_closing_unregisters_at_once(manager: SharedStreamManager, stream: Subscription[Any], feed: Feed) -> None:
    stream.close()
    assert not manager.statistics().groups
    assert len(manager.statistics().closing) == 1
    await stream.aclose()
    assert idle(manager)
    assert feed.opened == feed.closed


async def test_the_context_manager_closes(manager: SharedStreamManager, feed: Feed) -> None:
    async with manager.subscribe(feed.source) as stream:
        assert isinstance(stream, Subscription)
    with pytest.raises(anyio.ClosedResourceError):
        await stream.receive()


# Looking.


async def test_it_knows_its_key_and_its_id(manager: SharedStreamManager) -> None:
    stream = manager.subscribe(Feed(("a", 1)).source, subscriber_id=("b", 2))
    assert (stream.key, stream.subscriber_id) == (("a", 1), ("b", 2))
    assert repr(stream) == "<Subscription ('b', 2) of ('a', 1)>"
    generated = manager.subscribe(Feed("c").source)
    assert repr(generated) == f"<Subscription {generated.subscriber_id!r} of 'c'>"


async def test_statistics_count_what_was_taken_and_what_was_not(stream: Subscription[Any], feed: Feed) -> None:
    def statistics(used: int, peak: int, received: int) -> SubscriptionStatistics:
        return SubscriptionStatistics(
            subscriber_id="me",
            current_buffer_used=used,
            peak_buffer_used=peak,
            max_buffer_size=1024,
            events_received=received,
            policy=Fail(),
            events_missed=0,
            events_refused=0,
            held_seconds=0,
        )

    assert stream.statistics() == statistics(0, 0, 0)
    await buffered(stream, feed, 3, 2)
    assert stream.statistics() == statistics(5, 5, 0)
    await stream.receive()
    assert stream.statistics() == statistics(4, 5, 1)
    await stream.receive_batch(3)
    assert stream.statistics() == statistics(1, 5, 4)
    stream.close()
    assert stream.statistics() == statistics(0, 5, 4)


async def test_it_has_no_typed_attributes_to_offer(stream: Subscription[Any]) -> None:
    assert stream.extra_attributes == {}


# Wrong use.


@EVERY_READ
async def test_receiving_before_entering_is_refused(manager: SharedStreamManager, feed: Feed, read: Any) -> None:
    stream = manager.subscribe(feed.source)
    with pytest.raises(RuntimeError, match="has not been entered"):
        await read(stream)
    assert idle(manager)


async def test_entering_twice_is_refused_and_harms_nothing(stream: Subscription[Any], feed: Feed) -> None:
    with pytest.raises(RuntimeError, match="entered or closed before"):
        await stream.__aenter__()
    feed.emit(1)
    assert await stream.receive() == 1


async def test_entering_after_closing_is_refused(manager: SharedStreamManager, feed: Feed) -> None:
    stream = manager.subscribe(feed.source)
    stream.close()
    await stream.aclose()
    with pytest.raises(RuntimeError, match="entered or closed before"):
        await stream.__aenter__()
    assert idle(manager)


async def test_an_id_that_is_taken_is_refused_until_it_is_free(
    manager: SharedStreamManager, stream: Subscription[Any], feed: Feed
) -> None:
    second = manager.subscribe(feed.source, subscriber_id="me")
    with pytest.raises(RuntimeError, match="'feed' already has a subscriber with the id 'me'"):
        await second.__aenter__()
    async with manager.subscribe(Feed("other").source, subscriber_id="me"), manager.subscribe(feed.source):
        stream.close()
        async with second:  # what was refused has left no state
            feed.emit(1)
            assert await second.receive() == 1


@pytest.mark.parametrize("receive", [Subscription.receive, anext, lambda stream: stream.receive_batch(1)])
async def test_a_receive_that_cannot_wait_leaves_the_subscription_usable(receive: Any) -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream:
        coroutine = receive(stream)
        # Stepped where no event loop runs, it cannot wait.
        await to_thread.run_sync(step_and_close, coroutine)
        feed.emit(1)
        assert await stream.receive() == 1


def step_and_close(coroutine: Any) -> None:
    with suppress(RuntimeError):
        coroutine.send(None)
    coroutine.close()
