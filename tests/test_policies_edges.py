"""The policies one by one, in examples: what is left, where gaps stand, and what ends a subscriber."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from anyio_sharedstream import (
    Conflate,
    DropNewest,
    DropOldest,
    Gap,
    Latest,
    PollTerminated,
    Restart,
    SharedSource,
    SharedStreamManager,
    SubscriberOverflow,
)
from tests.policies_support import end, missing, parity, publish, subscribed
from tests.support import Feed, settle
from tests.sweep import drain, managed


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (DropOldest(), [missing(3), 3, 4]),
        (DropNewest(), [0, 1, missing(3)]),
        (Latest(), [missing(4), 4]),
        (Conflate(parity), [4, 3]),
        (Conflate(parity, lambda old, new: old + new), [6, 4]),
    ],
    ids=["DropOldest", "DropNewest", "Latest", "Conflate", "Conflate with merge"],
)
@pytest.mark.parametrize("gaps", [True, False])
async def test_what_is_left_comes_before_the_terminal_and_so_does_a_gap(policy: Any, expected: list[Any], gaps: bool) -> None:
    async with subscribed(policy, gaps=gaps) as (feed, stream):
        await publish(feed, 1, 2, 3, 4)
        await end(feed)
        items, terminal = drain(stream)
        assert items == (expected if gaps else [item for item in expected if not isinstance(item, Gap)])
        assert isinstance(terminal, PollTerminated)
        assert stream.statistics().events_missed == (0 if expected == [6, 4] else 3 + isinstance(policy, Latest))
        assert stream.statistics().events_received == 2 - isinstance(policy, Latest)


async def test_neighbouring_gaps_are_one_and_others_are_not() -> None:
    async with subscribed(DropOldest(), gaps=True) as (feed, stream):
        await publish(feed, 1, 2, 3)
        assert stream.receive_nowait() == missing(2)
        await publish(feed, 4)  # what was told already is not told again
        assert drain(stream) == ([missing(1), 3, 4], None)
    async with subscribed(DropNewest(), 1, gaps=True) as (feed, stream):
        await publish(feed, 1, 2)
        assert stream.receive_nowait() == 0
        await publish(feed, 3, 4)
        assert drain(stream) == ([missing(2), 3, missing(1)], None)


async def test_a_gap_that_was_received_is_over() -> None:
    async with subscribed(DropNewest(), gaps=True) as (feed, stream):
        await publish(feed, 1, 2)
        assert drain(stream) == ([0, 1, missing(1)], None)
        await publish(feed, 3, 4, 5)
        assert drain(stream) == ([3, 4, missing(1)], None)


@pytest.mark.parametrize("bound", [1, 64, 100])
async def test_gaps_take_no_room(bound: int) -> None:
    """Not even between a gap that was not received and another one, with a buffer full of events in between."""
    async with subscribed(DropNewest(), bound, gaps=True) as (feed, stream):
        feed.emit(*range(1, bound + 2))
        await settle()
        for number in range(bound):
            assert stream.receive_nowait() == number
        assert stream.statistics().current_buffer_used == 0
        feed.emit(*range(1000, 1064))
        await settle()
        assert stream.statistics().current_buffer_used == 64
        await publish(feed, *range(2000, 2000 + bound))
        after = [missing(bound)] if bound <= 64 else [*range(2000, 2036), missing(64)]
        assert drain(stream) == ([missing(2), *range(1000, 1064), *after], None)


async def test_a_gap_between_every_two_events_takes_no_room() -> None:
    async with subscribed(DropNewest(), 50, gaps=True) as (feed, stream):
        await publish(feed, *range(1, 50))
        expected: list[Any] = []
        for number in range(50):
            assert await stream.receive() == number
            await publish(feed, 100 + number, 200)
            expected += [100 + number, missing(1)]
        assert drain(stream) == (expected, None)


@pytest.mark.parametrize("policy", [DropOldest(), DropNewest()], ids=str)
async def test_who_has_taken_everything_accepts_a_whole_turn(policy: Any) -> None:
    async with subscribed(policy, gaps=True) as (feed, stream):
        assert drain(stream) == ([0], None)
        feed.emit(*range(1, 65))
        await settle()
        assert stream.statistics().current_buffer_used == 64
        assert drain(stream) == ([*range(1, 65)], None)


@pytest.mark.parametrize("policy", [DropOldest(), DropNewest()], ids=str)
@pytest.mark.parametrize("suspensions", range(4))
async def test_the_first_turn_of_all_is_accepted_whole_whenever_it_comes(suspensions: int, policy: Any) -> None:
    async def source() -> AsyncIterator[int]:
        for _ in range(suspensions):
            await checkpoint()
        for number in range(5):
            yield number
        await anyio.sleep_forever()

    asked: Any = {"overflow": policy, "max_buffer_size": 2}
    async with managed() as manager, manager.subscribe(SharedSource(key="feed", open=source), **asked) as stream:
        await settle()
        assert drain(stream) == ([0, 1, 2, 3, 4], None)


@pytest.mark.parametrize(
    ("policy", "expected"), [(DropOldest(), [missing(7), 7, 8]), (DropNewest(), [0, 1, missing(7)])], ids=["oldest", "newest"]
)
@pytest.mark.parametrize("joins_after", [1, 3, 4, 5, 9])
async def test_a_sibling_that_joins_within_a_turn_changes_nothing(policy: Any, expected: list[Any], joins_after: int) -> None:
    """Joining publishes the turn so far. Who was late for the first half is late for the second."""
    async with SharedStreamManager() as manager:
        go = anyio.Event()

        async def run() -> AsyncIterator[int]:
            yield 0
            await go.wait()
            for number in range(1, 9):
                if number == joins_after:
                    await sibling.__aenter__()
                yield number
            await anyio.sleep_forever()

        source: Any = SharedSource(key="feed", open=run)
        sibling: Any = manager.subscribe(source)
        async with manager.subscribe(source, overflow=policy, max_buffer_size=2, gaps=True) as stream:
            await settle()
            go.set()
            await settle()
            assert drain(stream) == (expected, None)
        sibling.close()


@pytest.mark.parametrize("gaps", [True, False])
@pytest.mark.parametrize("joins_after", [1, 2, 5, 8])
async def test_a_sibling_that_joins_within_a_turn_makes_nobody_late(joins_after: int, gaps: bool) -> None:
    async with SharedStreamManager() as manager:
        go = anyio.Event()

        async def run() -> AsyncIterator[int]:
            await go.wait()
            for number in range(1, 9):
                if number == joins_after:
                    await sibling.__aenter__()
                yield number
            await anyio.sleep_forever()

        source: Any = SharedSource(key="feed", open=run, restart=Restart())
        sibling: Any = manager.subscribe(source)
        contract: dict[str, Any] = {"max_buffer_size": 2, "gaps": gaps}
        async with manager.subscribe(source, **contract) as stream:
            await settle()
            go.set()
            await settle()
            assert drain(stream) == ([*range(1, 9)], None)
        sibling.close()


async def test_latest_keeps_one_of_a_turn_as_well() -> None:
    async with subscribed(Latest(), 100) as (feed, stream):
        assert drain(stream) == ([0], None)
        feed.emit(1, 2, 3)
        await settle()
        assert stream.statistics().peak_buffer_used == 1
        assert drain(stream) == ([3], None)


async def test_conflating_bounds_the_keys_of_a_subscriber_that_is_behind() -> None:
    async with subscribed(Conflate(int), gaps=True) as (feed, stream):
        await publish(feed, 1, 1, 0, 1)
        assert stream.statistics().events_missed == 3
        await publish(feed, 2)
        items, terminal = drain(stream)
        assert (items, type(terminal)) == ([], SubscriberOverflow)
    async with subscribed(Conflate(int)) as (feed, stream):
        assert drain(stream) == ([0], None)
        feed.emit(*range(64))
        await settle()
        assert drain(stream) == ([*range(64)], None)


def no_merge(old: object, new: object) -> object:
    raise ZeroDivisionError(old, new)


def _unhashable(event: int) -> Any:
    return [event] if event == 9 else event


@pytest.mark.parametrize(
    ("contract", "bad", "error"),
    [
        ({"overflow": Conflate(_unhashable)}, 9, TypeError),
        ({"overflow": Conflate(lambda event: 1 / (9 - event))}, 9, ZeroDivisionError),
        ({"overflow": Conflate(int, no_merge)}, 0, ZeroDivisionError),
        ({"overflow": DropOldest(), "where": lambda event: 1 // (9 - event) <= 1}, 9, ZeroDivisionError),
    ],
    ids=["unhashable", "by", "merge", "where"],
)
async def test_a_function_that_raises_ends_its_subscriber_alone(contract: Any, bad: int, error: type[Exception]) -> None:
    feed = Feed()
    async with (
        managed(feed) as manager,
        manager.subscribe(feed.source) as other,
        manager.subscribe(feed.source, **contract) as stream,
    ):
        feed.emit(0, 8)
        await settle()
        feed.emit(7, bad, 6)
        await settle()
        assert drain(other) == ([0, 8, 7, bad, 6], None)
        items, terminal = drain(stream)
        assert items[0] == 0 or not isinstance(contract["overflow"], Conflate)
        assert items == sorted(items, key=[0, 8, 7].index)
        assert type(terminal) is error
        for _ in range(2):
            with pytest.raises(error):
                await stream.receive()


async def test_what_was_refused_before_the_predicate_raised_is_counted() -> None:
    async with subscribed(DropOldest(), where=lambda event: 1 // (9 - event) > 0) as (feed, stream):
        assert stream.statistics().events_refused == 1
        feed.emit(1, 8, 2, 9)
        await settle()
        assert stream.statistics().events_refused == 3
        items, terminal = drain(stream)
        assert (items, type(terminal)) == ([8], ZeroDivisionError)


async def test_one_that_closes_itself_in_its_predicate_gives_no_gap() -> None:
    """It is closed for good, though it had been asked for events that its policy would give up."""

    def leaves(event: object) -> bool:
        if event:
            streams[0].close()
        return True

    streams: list[Any] = []
    async with subscribed(Latest(), where=leaves, gaps=True) as (feed, stream):
        streams.append(stream)
        feed.emit(1, 2, 3)
        await settle()
        with pytest.raises(anyio.ClosedResourceError):
            stream.receive_nowait()
        assert stream.statistics().current_buffer_used == 0


async def test_one_that_closes_itself_while_conflating_keeps_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def leaves(event: int) -> int:
        if event:
            streams[0].close()
        return event

    streams: list[Any] = []
    async with subscribed(Conflate(leaves)) as (feed, stream):
        streams.append(stream)
        feed.emit(1, 2, 3)
        await settle()
        with pytest.raises(anyio.ClosedResourceError):
            stream.receive_nowait()
        assert stream.statistics().current_buffer_used == 0
    assert not caplog.records  # it has left, and is not told to have overflowed


async def test_merge_may_receive_the_very_event_that_it_merges() -> None:
    feed = Feed()
    received: list[int] = []

    def merge(older: int, newer: int) -> int:
        received.append(stream.receive_nowait())
        return older + newer

    async with SharedStreamManager() as manager:
        stream = await manager.subscribe(feed.source, overflow=Conflate(lambda _: "one", merge)).__aenter__()
        for number in (1, 2):
            feed.emit(number)
            await settle()
        received.append(stream.receive_nowait())
        assert received == [1, 3]
        stream.close()


@pytest.mark.parametrize("gaps", [True, False])
@pytest.mark.parametrize("policy", [DropOldest(), Latest()], ids=repr)
async def test_an_event_that_is_dropped_may_close_the_stream_that_drops_it(policy: Any, gaps: bool) -> None:
    class Event:
        def __del__(self) -> None:
            stream.close()

    async def play() -> AsyncIterator[object]:
        yield Event()
        await settle()
        yield 1
        yield 2
        await anyio.sleep_forever()

    async with managed() as manager:
        source = SharedSource(key="feed", open=play)
        witness = await manager.subscribe(source, where=lambda event: isinstance(event, int)).__aenter__()
        contract: Any = {"overflow": policy, "gaps": gaps}
        stream: Any = await manager.subscribe(source, max_buffer_size=1, **contract).__aenter__()
        assert [await witness.receive(), await witness.receive()] == [1, 2]
        with pytest.raises(anyio.ClosedResourceError):
            stream.receive_nowait()
        assert stream.statistics().current_buffer_used == 0
        await witness.aclose()
