"""`routes` and `route_by`: an event concerns those who asked for its route, and those who asked for none, and costs no more."""

from __future__ import annotations

import gc
import math
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest

from anyio_sharedstream import Block, Fail, Latest, SharedSource, SharedStreamManager, SubscriberOverflow
from tests.contract_support import EVERY_POLICY, drain, even, routed
from tests.support import Feed, settle, until


def tens(number: int) -> int:
    return number // 10


async def joined(manager: SharedStreamManager, source: SharedSource[Any], **contract: Any) -> Any:
    return await manager.subscribe(source, **contract).__aenter__()


# Who receives what.


async def test_an_event_goes_to_those_who_asked_for_its_route_and_to_those_who_asked_for_none() -> None:
    feed = Feed()
    source = routed(feed, tens)
    async with SharedStreamManager() as manager:
        everything, also_everything = await joined(manager, source), await joined(manager, source, where=lambda _: True)
        one, two, both, none = [await joined(manager, source, routes=routes) for routes in ({1}, [2], (1, 2), {"1"})]
        feed.emit(*range(30))
        await until(lambda: everything.statistics().current_buffer_used == 30)
        assert drain(everything) == drain(also_everything) == [*range(30)]
        assert drain(one) == [*range(10, 20)]
        assert drain(two) == [*range(20, 30)]
        assert drain(both) == [*range(10, 30)]
        assert drain(none) == []
        assert [told.events_refused for told in manager.statistics().groups["feed"].subscriptions] == [0] * 6


@EVERY_POLICY
async def test_several_routes_give_one_run_in_order_and_nothing_twice(policy: Any) -> None:
    feed = Feed()
    source = routed(feed, lambda number: number % 4)
    received: list[int] = []
    async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:
        stream = await joined(manager, source, routes=[0, 1, 3, 1], overflow=policy)

        async def read() -> None:
            received.extend([event async for event in stream])

        tasks.start_soon(read)
        await settle()
        for number in range(40):
            feed.emit(number)
            await settle(5)
        await manager.stop("feed")
    assert received == [number for number in range(40) if number % 4 != 2]
    assert stream.statistics().events_missed == 0


async def test_any_hashable_is_a_route_and_equal_ones_are_one() -> None:
    feed = Feed()
    events: list[Any] = [1, 1.0, True, None, "1", (1, 2), frozenset({1})]
    source = routed(feed, lambda event: event)
    async with SharedStreamManager() as manager:
        streams = [await joined(manager, source, routes=[route]) for route in events]
        feed.emit(*events)
        await settle()
        assert [drain(stream) for stream in streams] == [[1, 1, 1]] * 3 + [[event] for event in events[3:]]


async def test_routes_and_a_predicate_choose_together_and_only_the_predicate_refuses() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager:
        stream = await joined(manager, routed(feed, tens), routes={1, 3}, where=even, max_buffer_size=5)
        feed.emit(*range(25))
        await settle()
        assert drain(stream) == [10, 12, 14, 16, 18]
        assert stream.statistics().events_refused == 5


@EVERY_POLICY
async def test_whoever_is_too_slow_for_its_route_is_so_alone(policy: Any) -> None:
    feed = Feed()
    source = routed(feed, tens)
    async with SharedStreamManager() as manager:
        slow = await joined(manager, source, routes={1}, max_buffer_size=1)
        sibling = await joined(manager, source, routes={1}, overflow=policy)
        other = await joined(manager, source, routes={2}, max_buffer_size=1)
        for number in (10, 20, 11):
            feed.emit(number)
            await settle()
        with pytest.raises(SubscriberOverflow):
            await slow.receive()
        kept = sibling.statistics()
        assert kept.current_buffer_used + kept.events_missed == 2
        assert drain(sibling)[-1] == 11
        assert drain(other) == [20]
        feed.emit(12, 21)
        await settle()
        assert (drain(sibling), drain(other)) == ([12], [21])
        assert len(manager.statistics().groups["feed"].subscriptions) == 2


@EVERY_POLICY
async def test_a_route_starts_with_who_joins_it_and_outlives_who_leaves_it(policy: Any) -> None:
    feed = Feed()
    source = routed(feed, tens)
    async with SharedStreamManager() as manager, manager.subscribe(source, routes={9}, overflow=policy) as keeper:
        feed.emit(10, 90)
        assert await keeper.receive() == 90
        first = await joined(manager, source, routes={1, 2}, overflow=policy)
        second = await joined(manager, source, routes={1}, overflow=policy)
        first.close()
        first.close()
        feed.emit(11, 20)
        await settle()
        assert drain(second) == [11]
        await second.aclose()
        third = await joined(manager, source, routes={2, 1}, overflow=policy)
        feed.emit(12)
        await settle()
        assert drain(third) == [12]
        assert feed.opened == 1


# What it costs.


class Route:
    """A route that counts how often one is looked up."""

    hashed = 0

    def __init__(self, number: int) -> None:
        self.number = number

    def __hash__(self) -> int:
        Route.hashed += 1
        return hash(self.number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Route) and other.number == self.number


async def test_routes_that_come_and_go_leave_nothing() -> None:
    feed = Feed()
    routes: weakref.WeakSet[Route] = weakref.WeakSet()
    async with SharedStreamManager() as manager:
        source = routed(feed, lambda number: Route(number))
        keeper = await joined(manager, source)

        async def come_and_go(start: int) -> int:
            for number in range(start, start + 1000):
                asked = [Route(number), Route(number + 1)]
                routes.update(asked)
                stream = await joined(manager, source, routes=asked)
                if number % 100 == 0:  # in these, something is also published
                    feed.emit(number, number + 1, -1)
                    assert [await keeper.receive() for _ in range(3)] == [number, number + 1, -1]
                    assert drain(stream) == [number, number + 1]
                stream.close()
                del asked, stream
            assert len(manager.statistics().groups["feed"].subscriptions) == 1
            gc.collect()
            assert not routes
            return len(gc.get_objects())

        await come_and_go(0)
        before = await come_and_go(1000)
        assert await come_and_go(2000) - before < 100  # of thousands, and what an event loop has in hand varies


@contextmanager
def counted_calls() -> Iterator[list[str]]:
    """Every call of a function, built-in ones included. (A timing would depend on the machine.)"""
    calls: list[str] = []

    sys.setprofile(lambda _frame, event, _argument: calls.append(event) if event in ("call", "c_call") else None)
    try:
        yield calls
    finally:
        sys.setprofile(None)


async def cost_of_events(subscribers: int, routes: int, policy: Any) -> tuple[int, int]:
    """How many calls, and how many looks at a route, it takes to publish one event for each of ten routes."""
    feed = Feed()
    async with SharedStreamManager() as manager:
        source = routed(feed, lambda number: Route(number))
        for number in range(subscribers):
            await joined(manager, source, routes=[Route(number % routes)], overflow=policy)
        probe = await joined(manager, source, routes=[Route(9)])
        feed.emit(*range(10))
        Route.hashed = 0
        with counted_calls() as calls:
            await until(lambda: probe.statistics().current_buffer_used)
        hashed = Route.hashed
        told = manager.statistics().groups["feed"]
        assert sum(subscription.current_buffer_used for subscription in told.subscriptions) == 10 * subscribers // routes + 1
    return len(calls), hashed


@pytest.mark.parametrize("policy", [Fail(), Block(math.inf), Latest()], ids=repr)
async def test_an_event_costs_what_its_own_subscribers_cost_however_many_others_there_are(policy: Any) -> None:
    calls, hashed = await cost_of_events(10_000, 1_000, policy)
    few_calls, few_hashed = await cost_of_events(100, 10, policy)
    assert hashed == few_hashed <= 3 * 10
    assert calls <= 1.1 * few_calls  # of the same order, but for what an event loop does beside
