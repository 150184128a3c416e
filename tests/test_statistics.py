"""What can be seen from outside: every state, every count, and that a snapshot is one."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from anyio_sharedstream import DEFAULT_MAX_BUFFER_SIZE, SharedSource, SharedStreamManager, SubscriptionStatistics
from tests.support import Feed, idle, settle, until
from tests.test_promise_02_a_key_is_present_only_while_its_group_accepts import slow_clean_up


def state(manager: SharedStreamManager, key: str = "feed") -> str:
    return manager.statistics().groups[key].state


async def test_a_manager_that_runs_nothing_says_so_at_any_time() -> None:
    manager = SharedStreamManager()
    nothing = manager.statistics()
    assert (dict(nothing.groups), nothing.closing) == ({}, ())
    async with manager:
        assert manager.statistics() == nothing
    assert manager.statistics() == nothing


async def test_a_group_waits_opens_lives_and_closes() -> None:
    feed = Feed()
    opening = anyio.Event()

    @asynccontextmanager
    async def slow_to_open() -> AsyncIterator[Any]:
        await opening.wait()
        yield feed.source.open()

    async with SharedStreamManager() as manager:
        stream = manager.subscribe(SharedSource(key="feed", open=slow_to_open))
        await stream.__aenter__()
        assert state(manager) == "waiting"
        await settle()
        assert state(manager) == "opening"
        opening.set()
        await until(lambda: feed.opened)
        assert state(manager) == "live"
        async with slow_clean_up(feed):
            stream.close()
            (closing,) = manager.statistics().closing
            assert (closing.key, closing.state, closing.subscriptions) == ("feed", "closing", ())
            assert dict(manager.statistics().groups) == {}
        await until(lambda: not manager.statistics().closing)


async def test_a_group_that_was_left_while_it_opened_does_not_come_to_life() -> None:
    feed = Feed()
    opening = anyio.Event()

    @asynccontextmanager
    async def slow_to_open() -> AsyncIterator[Any]:
        with anyio.CancelScope(shield=True):
            await opening.wait()
        yield feed.source.open()

    async with SharedStreamManager() as manager:
        stream = manager.subscribe(SharedSource(key="feed", open=slow_to_open))
        await stream.__aenter__()
        await settle()
        stream.close()
        opening.set()
        while closing := manager.statistics().closing:
            assert [group.state for group in closing] == ["closing"]
            await settle(1)
        assert feed.opened == feed.closed


async def test_a_key_may_have_several_groups_on_their_way_out_and_one_that_waits() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, slow_clean_up(feed) as cleaned_up:
        for turns in (20, 0):
            stream = manager.subscribe(feed.source)
            await stream.__aenter__()
            await settle(turns)
            stream.close()
        async with manager.subscribe(feed.source):
            assert state(manager) == "waiting"
            assert [group.state for group in manager.statistics().closing] == ["closing", "closing"]
            cleaned_up.set()
            await until(lambda: state(manager) == "live")
            await until(lambda: not manager.statistics().closing)


async def test_subscribers_of_a_failed_upstream_are_seen_until_they_are_told() -> None:
    closing = anyio.Event()

    @asynccontextmanager
    async def slow_to_close() -> AsyncIterator[Any]:
        try:
            yield feed.source.open()
        finally:
            await closing.wait()

    feed = Feed()
    source = SharedSource(key="feed", open=slow_to_close)
    async with SharedStreamManager() as manager, manager.subscribe(source, subscriber_id="one") as stream:
        feed.emit("event")
        feed.fail(ValueError("broken"))
        await until(lambda: manager.statistics().closing)
        (group,) = manager.statistics().closing
        assert [subscription.subscriber_id for subscription in group.subscriptions] == ["one"]
        closing.set()
        await until(lambda: not manager.statistics().closing)
        assert await stream.receive() == "event"
        with pytest.raises(ValueError, match="broken"):
            await stream.receive()


async def test_a_subscriber_that_is_told_why_nothing_was_opened_sees_nothing_of_the_group_any_more() -> None:
    def broken() -> Any:
        raise ValueError("broken")

    async with SharedStreamManager() as manager, manager.subscribe(SharedSource(key="feed", open=broken)) as stream:
        with pytest.raises(ValueError, match="broken"):
            await stream.receive()
        assert idle(manager)


async def test_a_group_lists_its_subscribers_in_the_order_in_which_they_joined() -> None:
    feed = Feed()
    async with (
        SharedStreamManager(max_buffer_size=7) as manager,
        manager.subscribe(feed.source, subscriber_id="one") as one,
        manager.subscribe(feed.source, subscriber_id=2, max_buffer_size=5),
        manager.subscribe(feed.source, subscriber_id=("three",), max_buffer_size=float("inf")),
    ):
        group = manager.statistics().groups["feed"]
        assert group.key == "feed"
        listed = [(each.subscriber_id, each.max_buffer_size) for each in group.subscriptions]
        assert listed == [("one", 7), (2, 5), (("three",), float("inf"))]
        one.close()
        ids = [each.subscriber_id for each in manager.statistics().groups["feed"].subscriptions]
        assert ids == [2, ("three",)]


async def test_the_default_bound_is_the_managers_and_the_managers_is_the_documented_one() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream:
        assert stream.statistics().max_buffer_size == DEFAULT_MAX_BUFFER_SIZE == 1024


async def test_ids_that_are_made_equal_no_other() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager:
        streams = [manager.subscribe(feed.source, subscriber_id=given) for given in (None, None, 1, 2, "<subscriber 1>")]
        for stream in streams:
            await stream.__aenter__()
        assert len({stream.subscriber_id for stream in streams}) == 5
        assert [repr(stream.subscriber_id) for stream in streams[:2]] == ["<subscriber 1>", "<subscriber 2>"]
        ids = [each.subscriber_id for each in manager.statistics().groups["feed"].subscriptions]
        assert ids == [stream.subscriber_id for stream in streams]


async def test_a_subscription_counts_what_it_has_taken_and_what_it_has_not() -> None:
    feed = Feed()

    def seen() -> tuple[int, int, int]:
        statistics = stream.statistics()
        return statistics.events_received, statistics.current_buffer_used, statistics.peak_buffer_used

    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream:
        await until(lambda: feed.opened)
        assert seen() == (0, 0, 0)
        feed.emit(1, 2, 3)
        await settle()
        assert seen() == (0, 3, 3)
        await stream.receive()
        assert seen() == (1, 2, 3)
        feed.emit(4, 5)
        await settle()
        assert seen() == (1, 4, 4)
        stream.receive_nowait()
        assert seen() == (2, 3, 4)
        await stream.receive_batch(2)
        assert seen() == (4, 1, 4)
        assert await anext(stream) == 5
        assert seen() == (5, 0, 4)
        assert manager.statistics().groups["feed"].events_published == 5
        feed.emit(*range(6, 16))
        await settle()
        stream.close()
        assert seen() == (5, 0, 10)


async def test_a_reader_that_waits_is_counted_like_any_other() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream, anyio.create_task_group() as tasks:
        await until(lambda: feed.opened)
        tasks.start_soon(stream.receive)
        await settle()
        feed.emit(*range(10))
        await until(lambda: stream.statistics().events_received)
        statistics = stream.statistics()
        assert (statistics.events_received, statistics.current_buffer_used, statistics.peak_buffer_used) == (1, 9, 10)


async def test_the_peak_counts_the_single_events_of_a_reader_that_keeps_up() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream, anyio.create_task_group() as tasks:
        tasks.start_soon(stream.receive)
        await settle()
        assert stream.statistics().peak_buffer_used == 0
        feed.emit(1)
        await until(lambda: stream.statistics().events_received)
        assert stream.statistics().peak_buffer_used == 1


async def test_the_peak_counts_what_a_waiting_reader_has_chosen() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source, where=lambda event: event > 1) as stream:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream.receive)
            await settle()
            feed.emit(1, 2, 3)
        assert stream.statistics().peak_buffer_used == 2


async def test_a_subscription_that_has_ended_counts_what_it_has_yet_to_give() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream:
        for chunk in ([0], [1, 2], [3, 4, 5]):
            feed.emit(*chunk)
            await settle()
        await manager.stop("feed")
        assert (stream.statistics().events_received, stream.statistics().current_buffer_used) == (0, 6)
        assert await stream.receive_batch(4) == (0, 1, 2, 3)
        assert (stream.statistics().events_received, stream.statistics().current_buffer_used) == (4, 2)
        assert [event async for event in stream] == [4, 5]
        assert (stream.statistics().events_received, stream.statistics().current_buffer_used) == (6, 0)


async def test_a_subscription_that_has_overflowed_has_nothing_left() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source, max_buffer_size=2) as stream:
        await until(lambda: feed.opened)
        for event in range(3):
            feed.emit(event)
            await settle()
        statistics = stream.statistics()
        assert (statistics.events_received, statistics.current_buffer_used, statistics.peak_buffer_used) == (0, 0, 2)


async def test_a_subscription_that_joins_later_counts_from_there_on() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source):
        feed.emit(1, 2, 3)
        await settle()
        async with manager.subscribe(feed.source) as late:
            feed.emit(4)
            await settle()
            assert manager.statistics().groups["feed"].events_published == 4
            assert late.statistics().current_buffer_used == 1


async def test_a_snapshot_does_not_change_and_cannot_be_changed() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source, subscriber_id="one") as stream:
        snapshot = manager.statistics()
        feed.emit(1)
        await settle()
        assert snapshot.groups["feed"].events_published == 0
        assert snapshot.groups["feed"].subscriptions[0].current_buffer_used == 0
        assert manager.statistics().groups["feed"].subscriptions == (stream.statistics(),)
        with pytest.raises(TypeError):
            snapshot.groups["other"] = snapshot.groups["feed"]  # type: ignore[index]
        for frozen, name in ((snapshot, "closing"), (snapshot.groups["feed"], "state"), (stream.statistics(), "events_received")):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(frozen, name, None)
    assert list(snapshot.groups) == ["feed"]


def test_statistics_take_keywords_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        SubscriptionStatistics("one", 0, 0, 1, 0)  # type: ignore[call-arg]
