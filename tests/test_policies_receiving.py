"""A stream that loses events is a stream like others: to wait on, to cancel, to close, and to take batches from."""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

import anyio
import pytest

from anyio_sharedstream import Conflate, DropNewest, DropOldest, Gap, Latest, LossySubscription, PollTerminated
from tests.policies_support import LOSSY, NAMES, end, missing, publish, subscribed
from tests.support import Feed, settle
from tests.sweep import SCOPE, Cut, drain, managed, sweep

Stream = LossySubscription[Any]


@pytest.mark.parametrize("policy", LOSSY, ids=NAMES)
async def test_busy_closed_and_nothing_yet(policy: Any) -> None:
    async with subscribed(policy) as (feed, stream):
        assert drain(stream) == ([0], None)
        with pytest.raises(anyio.WouldBlock):
            stream.receive_nowait()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_receives_until_closed, stream)
            await settle()
            for receive in (stream.receive, lambda: stream.receive_batch(2)):
                with pytest.raises(anyio.BusyResourceError):
                    await receive()
            feed.emit(1)
            await settle()
            stream.close()
        with pytest.raises(anyio.ClosedResourceError):
            stream.receive_nowait()


async def _receives_until_closed(stream: Stream) -> None:
    assert await stream.receive() == 1
    with pytest.raises(anyio.ClosedResourceError):
        await stream.receive()


@pytest.mark.parametrize("policy", LOSSY, ids=NAMES)
async def test_one_that_was_abandoned_after_its_end_leaves_nothing_open(policy: Any) -> None:
    """A memory stream that was left open would warn when it is collected."""
    feed = Feed()
    async with managed(feed) as manager:
        stream: Any = manager.subscribe(feed.source, overflow=policy, max_buffer_size=3, gaps=True)
        await stream.__aenter__()
        await publish(feed, 1, 2, 3)
        await end(feed)
        del stream
        gc.collect()


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (DropOldest(), [(missing(2), 2, 3), (4,)]),
        (DropNewest(), [(0, 1, 2), (missing(2),)]),
        (Latest(), [(missing(4), 4)]),
        (Conflate(lambda event: event // 2), [(1, 3, 4)]),
    ],
    ids=["DropOldest", "DropNewest", "Latest", "Conflate"],
)
async def test_batches_hold_gaps_and_leave_the_rest(policy: Any, expected: list[Any]) -> None:
    async with subscribed(policy, 3, gaps=True) as (feed, stream):
        await publish(feed, 1, 2, 3, 4)
        await end(feed)
        batches = stream.batches(3)
        assert [await anext(batches) for _ in expected] == expected
        with pytest.raises(PollTerminated):
            await anext(batches)


@pytest.mark.parametrize("way", ["receive", "receive_batch", "__anext__"])
@pytest.mark.parametrize("policy", [DropOldest(), DropNewest(), Conflate(int)], ids=str)
async def test_a_reader_yields_at_least_once_in_64_events(policy: Any, way: str) -> None:
    feed = Feed()
    async with managed(feed) as manager, manager.subscribe(feed.source, overflow=policy, max_buffer_size=300) as stream:
        for start in range(0, 300, 50):
            feed.emit(*range(start, start + 50))
            await settle()
        cut = Cut(SCOPE, 0)  # which never comes, but counts the steps
        received = {1: 0}  # how much, at the end of each step

        async def scenario() -> None:
            total = 0
            while total < 300:
                got = await (stream.receive_batch(10) if way == "receive_batch" else getattr(stream, way)())
                total += len(got) if way == "receive_batch" else 1
                received[cut.steps] = total

        await cut.run(scenario())
        assert [*received] == [*range(1, cut.steps + 1)]
        assert all(after - before <= 64 for before, after in pairwise([0, *received.values()]))


@pytest.mark.parametrize("policy", LOSSY, ids=NAMES)
async def test_a_cancelled_reception_loses_no_event_and_no_gap(policy: Any) -> None:
    async def trial(cut: Cut, receive: Callable[[Stream], Awaitable[Any]]) -> None:
        feed = Feed()
        got: list[Any] = []

        async def scenario() -> None:
            for _ in range(4):
                taken = await receive(stream)
                got.extend(taken if isinstance(taken, tuple) else [taken])

        async with (
            managed(feed) as manager,
            manager.subscribe(feed.source, overflow=policy, max_buffer_size=2, gaps=True) as stream,
        ):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(cut.run, scenario())
                for _ in range(4):
                    await settle()
                    feed.emit(1, 2, 3)
            await settle()
            got += drain(stream)[0]
            statistics = stream.statistics()
            told = sum(item.missed or 0 for item in got if isinstance(item, Gap))
            assert sum(not isinstance(item, Gap) for item in got) == statistics.events_received
            assert statistics.events_received + statistics.events_missed == 12
            assert told == (0 if isinstance(policy, Conflate) else statistics.events_missed)

    for receive in (lambda stream: stream.receive(), lambda stream: stream.receive_batch(2)):
        assert await sweep(lambda cut, receive=receive: trial(cut, receive)) > 2  # type: ignore[misc]
