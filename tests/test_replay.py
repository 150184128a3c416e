"""`replay` and `replay_max_age`: what a joiner receives of what was before it, and that this costs it nothing of its buffer."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from anyio_sharedstream import (
    Block,
    Conflate,
    DropNewest,
    DropOldest,
    Fail,
    Fold,
    Gap,
    Latest,
    Restart,
    SharedSource,
    Snapshot,
    SubscriberOverflow,
)
from tests.policies_support import missing, parity, publish
from tests.support import Feed, idle, settle, until
from tests.sweep import drain, managed
from tests.virtual_time import in_virtual_time

#: What may be asked for by a subscriber that is to receive everything.
EVERYTHING: dict[str, dict[str, Any]] = {
    "plain": {},
    "Block": {"overflow": Block(math.inf)},
    "DropOldest": {"overflow": DropOldest()},
    "DropNewest": {"overflow": DropNewest(), "gaps": True},
    "Conflate": {"overflow": Conflate(int)},
    "where": {"where": lambda event: True},
    "routes": {"routes": {"all"}},
    "gaps": {"gaps": True},
}
FAILING = ["plain", "where", "routes", "gaps"]
everything = pytest.mark.parametrize("contract", EVERYTHING.values(), ids=EVERYTHING)
AT_ONCE = Restart(initial_delay=0, jitter=0)


def asking(feed: Feed, replay: int, **policies: Any) -> SharedSource[Any]:
    return feed.asking_for(replay=replay, restart=AT_ONCE, route_by=lambda event: "all", **policies)


@everything
@pytest.mark.parametrize("burst", [1, 2, 7, 150])
@pytest.mark.parametrize("replay", [1, 3, 70, 1000])
async def test_a_joiner_between_any_two_bursts_misses_nothing_and_gets_nothing_twice(
    replay: int, burst: int, contract: dict[str, Any]
) -> None:
    feed = Feed()
    source = asking(feed, replay)
    async with managed(feed) as manager, AsyncExitStack() as stack:
        joiners: list[Any] = []
        total = max(20, 2 * burst)
        for start in range(0, total, burst):
            joiners.append((start, await stack.enter_async_context(manager.subscribe(source, **contract))))
            feed.emit(*range(start, start + burst))
            await settle()
        for joined_at, stream in joiners:
            assert drain(stream) == ([*range(max(0, joined_at - replay), start + burst)], None)


@everything
@pytest.mark.parametrize("joins_after", [0, 1, 3, 4, 63, 64, 65, 99, 100])
async def test_a_joiner_in_the_middle_of_a_turn_misses_nothing_and_gets_nothing_twice(
    joins_after: int, contract: dict[str, Any]
) -> None:
    """What was gathered and not published is published then, and so is replayed."""

    async def run() -> AsyncGenerator[int, None]:
        for number in range(101):
            if number == joins_after:
                await joiner.__aenter__()
            yield number
        await anyio.sleep_forever()

    source = SharedSource(key="feed", open=run, replay=3, restart=AT_ONCE, route_by=lambda event: "all")
    async with managed() as manager:
        joiner: Any = manager.subscribe(source, **contract)
        async with manager.subscribe(source) as other:
            await settle()
            assert drain(other) == ([*range(101)], None)
            assert drain(joiner) == ([*range(max(0, joins_after - 3), 101)], None)
            joiner.close()


async def test_one_that_joins_in_the_middle_of_a_publication_gets_that_by_replay_alone() -> None:
    feed = Feed()
    source = feed.asking_for(replay=2)
    joiners: list[Any] = []

    def joins(event: int) -> bool:
        if event == 3:
            stack.push_async_exit(joiner := manager.subscribe(source))
            without_awaiting(joiner.__aenter__())
            joiners.append(joiner)
        return True

    async with managed(feed) as manager, AsyncExitStack() as stack, manager.subscribe(source, where=joins) as stream:
        feed.emit(1, 2, 3, 4)
        await settle()
        feed.emit(5)
        await settle()
        assert drain(stream) == ([1, 2, 3, 4, 5], None)
        assert drain(joiners[0]) == ([3, 4, 5], None)


def without_awaiting(coroutine: Any) -> None:
    """Run to its end what does not await."""
    with pytest.raises(StopIteration):
        coroutine.send(None)


async def test_the_last_of_the_group_are_replayed_and_only_then_filtered() -> None:
    feed = Feed()
    source = feed.asking_for(replay=4, route_by=lambda event: event % 3)
    contracts: list[tuple[dict[str, Any], list[int], int]] = [
        ({}, [6, 7, 8, 9], 0),
        ({"where": lambda event: event % 2 == 0}, [6, 8], 2),
        ({"where": lambda event: event < 6}, [], 4),
        ({"routes": {0}}, [6, 9], 0),
        ({"routes": {0, 2, "none"}}, [6, 8, 9], 0),
        ({"routes": {"none"}}, [], 0),
        ({"routes": {0}, "where": lambda event: event % 2 == 0}, [6], 1),
    ]
    async with managed(feed) as manager, manager.subscribe(source):
        await publish(feed, *range(6))
        feed.emit(6, 7, 8, 9)
        await settle()
        for contract, expected, refused in contracts:
            async with manager.subscribe(source, **contract) as stream:
                assert drain(stream) == (expected, None)
                assert stream.statistics().events_refused == refused


@pytest.mark.parametrize("gaps", [True, False])
@pytest.mark.parametrize(
    ("policy", "replayed", "left", "missed", "ending"),
    [
        (Fail(), [5, 6, 7, 8, 9], [], 0, SubscriberOverflow),
        (Block(math.inf), [5, 6, 7, 8, 9], [5, 6, 7, 8, 9, 10], 0, type(None)),
        (DropOldest(), [5, 6, 7, 8, 9], [missing(6), 11], 6, type(None)),
        (DropNewest(), [5, 6, 7, 8, 9], [5, 6, 7, 8, 9, 10, missing(1)], 1, type(None)),
        (Latest(), [9], [missing(2), 11], 2, type(None)),
        (Conflate(parity), [9, 8], [11, 10], 5, type(None)),
        (Conflate(parity, lambda old, new: old + new), [21, 14], [32, 24], 0, type(None)),
    ],
    ids=["Fail", "Block", "DropOldest", "DropNewest", "Latest", "Conflate", "merge"],
)
async def test_the_replay_takes_no_room_of_a_buffer_of_one_event(
    policy: Any, replayed: list[int], left: list[Any], missed: int, ending: type[object], gaps: bool
) -> None:
    feed = Feed()
    source = feed.asking_for(replay=5)
    contract: dict[str, Any] = {"overflow": policy, "max_buffer_size": 1, "gaps": gaps}
    async with (
        managed(feed) as manager,
        manager.subscribe(source) as other,
    ):
        await publish(feed, *range(1, 10))
        async with manager.subscribe(source, **contract) as stream, manager.subscribe(source, **contract) as reads:
            assert stream.statistics().current_buffer_used == stream.statistics().peak_buffer_used == len(replayed)
            assert drain(reads) == (replayed, None)
            feed.emit(10)
            await settle()
            assert drain(reads) == ([10], None)
            feed.emit(11)
            await settle()
            items, terminal = drain(stream)
            assert items == [item for item in left if gaps or not isinstance(item, Gap)]
            assert type(terminal) is ending
            assert stream.statistics().events_missed == missed
            await settle()
            assert drain(stream)[0] == [11] * isinstance(policy, Block)
            assert drain(reads)[0] == [11]
            assert drain(other) == ([*range(1, 12)], None)


async def test_the_replay_takes_no_room_of_one_that_keeps_an_event_per_key() -> None:
    feed = Feed()
    source = feed.asking_for(replay=5)
    async with managed(feed) as manager, manager.subscribe(source):
        await publish(feed, *range(5))
        contract: dict[str, Any] = {"overflow": Conflate(str), "max_buffer_size": 2}
        async with manager.subscribe(source, **contract) as stream:
            await publish(feed, 5, 6)
            assert drain(stream) == ([*range(7)], None)


@pytest.mark.parametrize("bound", [1, 2, 5, 64, 100])
@pytest.mark.parametrize("taken", [0, 1, 9, 10, 11])
@pytest.mark.parametrize("contract", [EVERYTHING[name] for name in FAILING], ids=FAILING)
async def test_one_that_has_yet_to_take_its_replay_overflows_when_the_live_events_alone_are_too_many(
    bound: int, taken: int, contract: Any
) -> None:
    feed = Feed()
    source = asking(feed, 10)
    async with managed(feed) as manager, manager.subscribe(source):
        await publish(feed, *range(20))
        async with manager.subscribe(source, max_buffer_size=bound, **contract) as stream:
            await publish(feed, *range(20, 20 + bound))
            assert [stream.receive_nowait() for _ in range(taken)] == [*range(10, 10 + taken)]
            more = max(0, taken - 10)  # events that are not replayed leave room
            await publish(feed, *range(20 + bound, 20 + bound + more))
            assert stream.statistics().current_buffer_used == 10 - taken + bound + more
            await publish(feed, 1000)
            items, terminal = drain(stream)
            assert (items, type(terminal)) == ([], SubscriberOverflow)


@pytest.mark.parametrize("size", [200, 1000])
@everything
async def test_one_that_takes_a_long_replay_lets_the_others_run_once_in_64_events(size: int, contract: Any) -> None:
    feed = Feed()
    source = asking(feed, size)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await checkpoint()

    async with managed(feed) as manager, manager.subscribe(source), anyio.create_task_group() as tasks:
        feed.emit(*range(size))
        await settle(5 + size // 16)
        tasks.start_soon(others)
        await until(lambda: turns)
        async with manager.subscribe(source, **contract) as stream:
            turns_at = [turns]
            for number in range(size):
                assert await stream.receive() == number
                turns_at.append(turns)
            # Twice, for trio may run two tasks in one order and then in the other.
            assert [index for index in range(size - 128) if turns_at[index + 129] == turns_at[index]] == []
        tasks.cancel_scope.cancel()


def fails_at(number: int) -> Callable[[int], bool]:
    return lambda event: 1 // (event - number) < 5


@pytest.mark.parametrize(
    ("contract", "accepted"),
    [
        ({"where": fails_at(8)}, [6, 7]),
        ({"where": fails_at(6)}, []),
        ({"where": fails_at(8), "overflow": DropNewest(), "max_buffer_size": 1}, [6, 7]),
        ({"where": fails_at(8), "overflow": Block(1), "max_buffer_size": 1}, [6, 7]),
        ({"where": fails_at(8), "overflow": Latest()}, [7]),
        ({"overflow": Conflate(fails_at(8)), "max_buffer_size": 1}, [7]),
        ({"overflow": Conflate(lambda event: event // (event - 8))}, [6, 7]),
    ],
    ids=["Fail", "first", "DropNewest", "Block", "Latest", "Conflate", "Conflate with two"],
)
async def test_a_function_that_raises_at_a_replayed_event_fails_the_joiner_alone(contract: Any, accepted: list[int]) -> None:
    feed = Feed()
    source = feed.asking_for(replay=4)
    async with managed(feed) as manager, manager.subscribe(source) as other:
        await publish(feed, *range(10))
        async with manager.subscribe(source, **contract) as stream:
            assert len(manager.statistics().groups["feed"].subscriptions) == 1
            await publish(feed, 10)
            statistics = stream.statistics()
            assert statistics.current_buffer_used == len(accepted)
            assert statistics.peak_buffer_used >= statistics.current_buffer_used
            items, terminal = drain(stream)
            assert (items, type(terminal)) == (accepted, ZeroDivisionError)
            with pytest.raises(ZeroDivisionError):
                await stream.receive()
        assert drain(other) == ([*range(11)], None)


@in_virtual_time
async def test_one_that_fails_in_its_replay_leaves_a_lingering_upstream_to_linger_anew() -> None:
    feed = Feed()
    source = feed.asking_for(replay=4, linger=10)
    async with managed(feed) as manager:
        async with manager.subscribe(source):
            await publish(feed, 1)
        await anyio.sleep(6)
        async with manager.subscribe(source, where=fails_at(1)) as stream:
            assert manager.statistics().groups["feed"].state == "lingering"
            with pytest.raises(ZeroDivisionError):
                await stream.receive()
        await anyio.sleep(9)
        assert feed.open_now
        await anyio.sleep(2)
        assert (feed.opened, feed.closed) == (1, 1)
        assert idle(manager)


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("policy", [Fail(), DropOldest(), Conflate(int)], ids=["Fail", "DropOldest", "Conflate"])
@in_virtual_time
async def test_a_predicate_that_closes_its_own_subscription_in_the_replay_leaves_as_any_other(policy: Any, others: int) -> None:
    feed = Feed()
    source = feed.asking_for(replay=4, linger=5)

    def leaves(event: int) -> bool:
        stream.close()
        return True

    async with managed(feed) as manager, AsyncExitStack() as stack:
        async with manager.subscribe(source):
            await publish(feed, 1, 2)
            for _ in range(others):
                await stack.enter_async_context(manager.subscribe(source))
        stream: Any = manager.subscribe(source, where=leaves, overflow=policy)
        async with stream:
            with pytest.raises(anyio.ClosedResourceError):
                stream.receive_nowait()
            assert stream.statistics().current_buffer_used == 0
            assert len(manager.statistics().groups["feed"].subscriptions) == others
        await stack.aclose()
        await anyio.sleep(6)
        assert (feed.opened, feed.closed) == (1, 1)
        assert idle(manager)


async def test_a_predicate_that_closes_everybody_in_the_replay_makes_its_subscriber_the_last_who_waits() -> None:
    feed = Feed()
    source = feed.asking_for(replay=1)

    def leaves(event: int) -> bool:
        other.close()
        stream.close()
        return True

    async with managed(feed) as manager:
        other = await manager.subscribe(source).__aenter__()
        await publish(feed, 0)
        stream = manager.subscribe(source, where=leaves)
        async with stream:
            assert feed.closed == 0
        assert feed.closed == 1


async def test_a_predicate_may_close_another_and_subscribe_in_the_replay() -> None:
    feed = Feed()
    source = feed.asking_for(replay=3)
    inner: list[Any] = []

    def acts(event: int) -> bool:
        if not inner:
            inner.append(manager.subscribe(source))
            without_awaiting(inner[0].__aenter__())
            other.close()
        return True

    async with managed(feed) as manager:
        other = await manager.subscribe(source).__aenter__()
        await publish(feed, 1, 2, 3, 4)
        async with manager.subscribe(source, where=acts) as stream:
            await publish(feed, 5)
            assert drain(stream) == ([2, 3, 4, 5], None)
            assert drain(inner[0]) == ([2, 3, 4, 5], None)
            with pytest.raises(anyio.ClosedResourceError):
                other.receive_nowait()
            inner[0].close()


@pytest.mark.parametrize(
    "policy", [Fail(), Block(1), DropOldest(), DropNewest(), Latest(), Conflate(int)], ids=lambda policy: type(policy).__name__
)
async def test_who_asks_for_a_snapshot_gets_no_replay(policy: Any) -> None:
    feed = Feed()
    source = feed.asking_for(replay=3, fold=Fold(0, lambda state, event: state + event))
    async with managed(feed) as manager, manager.subscribe(source):
        await publish(feed, 1, 2, 3, 4)
        async with manager.subscribe(source, snapshot=True, overflow=policy) as stream:
            assert drain(stream) == ([Snapshot(10)], None)
            await publish(feed, 5)
            assert drain(stream) == ([5], None)


@in_virtual_time
async def test_what_is_replayed_to_one_that_wants_the_newest_alone_gives_way_to_the_next_event() -> None:
    feed = Feed()
    source = feed.asking_for(replay=3)
    async with managed(feed) as manager, manager.subscribe(source):
        await publish(feed, 1, 2)
        async with manager.subscribe(source, overflow=Latest()) as stream:
            await publish(feed, 3)
            assert await stream.receive() == 3
            assert stream.statistics().current_buffer_used == 0


async def test_a_restart_begins_the_replay_anew() -> None:
    feed, close = Feed(), anyio.Event()

    @asynccontextmanager
    async def run() -> AsyncIterator[AsyncIterable[Any]]:
        try:
            yield feed.source.open()  # type: ignore[misc]
        finally:
            with anyio.CancelScope(shield=True):
                await close.wait()

    source = SharedSource(key="feed", open=run, replay=3, restart=Restart(initial_delay=1, jitter=0))

    async def replayed() -> list[Any]:
        async with manager.subscribe(source, gaps=True) as stream:
            return drain(stream)[0]

    async with managed(feed) as manager, manager.subscribe(source, gaps=True) as first:
        await publish(feed, 1, 2)
        assert await replayed() == [1, 2]
        feed.emit(3)
        feed.fail(ConnectionError("lost"))
        await settle()
        assert await replayed() == []  # it is closing
        close.set()
        await settle()
        assert await replayed() == []  # it is closed
        waits = await manager.subscribe(source).__aenter__()
        await anyio.sleep(1.5)
        assert await replayed() == []
        await publish(feed, 4, 5)
        assert await replayed() == [4, 5]
        assert drain(waits) == ([4, 5], None)
        assert drain(first) == ([1, 2, 3, Gap(None, "restart"), 4, 5], None)
        await waits.aclose()


@in_virtual_time
async def test_lingering_keeps_the_replay_and_adds_to_it() -> None:
    feed = Feed()
    source = feed.asking_for(replay=3, linger=10)
    async with managed(feed) as manager:
        async with manager.subscribe(source):
            await publish(feed, 1, 2)
        await anyio.sleep(9)
        await publish(feed, 3, 4)
        async with manager.subscribe(source) as stream:
            assert drain(stream) == ([2, 3, 4], None)
        await anyio.sleep(11)
        async with manager.subscribe(source) as stream:
            await settle()
            assert drain(stream) == ([], None)
        assert feed.opened == 2


@in_virtual_time
async def test_events_are_replayed_until_they_are_older_than_the_greatest_age() -> None:
    feed = Feed()
    source = feed.asking_for(replay=4, replay_max_age=2, linger=math.inf)

    async def replayed() -> list[Any]:
        async with manager.subscribe(source, max_buffer_size=1) as stream:
            return drain(stream)[0]

    async with managed(feed) as manager:
        async with manager.subscribe(source):
            await settle()
        for second in range(5):
            assert await replayed() == [*range(max(0, second - 2), second)]
            feed.emit(second)
            await anyio.sleep(1)
        feed.emit(5, 6, 7, 8, 9)  # at 5, beyond the number
        await settle()
        assert await replayed() == [6, 7, 8, 9]
        await anyio.sleep(1.5)
        feed.emit(10)
        await settle()
        assert await replayed() == [7, 8, 9, 10]
        await anyio.sleep(0.5)  # at 7, and they are exactly as old as they may be
        assert await replayed() == [7, 8, 9, 10]
        await anyio.sleep(0.25)
        assert await replayed() == [10]
        await anyio.sleep(2)
        assert await replayed() == []
        await manager.stop_all()


async def test_the_statistics_count_what_is_replayed_as_received_and_not_as_published() -> None:
    feed = Feed()
    source = feed.asking_for(replay=3)
    async with managed(feed) as manager, manager.subscribe(source):
        await publish(feed, 1, 2, 3, 4)
        async with manager.subscribe(source, max_buffer_size=1, where=lambda event: event != 2) as stream:
            (statistics,) = manager.statistics().groups["feed"].subscriptions[1:]
            assert (statistics.current_buffer_used, statistics.peak_buffer_used) == (2, 2)
            assert (statistics.events_received, statistics.events_refused, statistics.events_missed) == (0, 1, 0)
            assert await stream.receive() == 3
            assert stream.statistics().current_buffer_used == 1
            assert await stream.receive_batch(10) == (4,)
            assert stream.statistics().events_received == 2
        assert manager.statistics().groups["feed"].events_published == 4
