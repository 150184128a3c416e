"""What type checkers must accept, with exactly the types that it has. Never run: mypy and pyright read it, both strictly.

It lies in no package, so that neither pytest nor coverage takes it for code, and it needs nothing that the library does not.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, assert_type

from anyio.abc import ObjectReceiveStream, UnreliableObjectReceiveStream

from anyio_sharedstream import (
    AckSource,
    AckSubscription,
    AdvanceItem,
    Block,
    Conflate,
    DropNewest,
    DropOldest,
    Fail,
    Fold,
    Gap,
    Latest,
    LossySubscription,
    Restart,
    SharedSource,
    SharedStreamManager,
    SharedStreamProducer,
    Snapshot,
    Subscription,
    shared_source,
)


class Trade(NamedTuple):
    symbol: str
    price: float


def symbol(trade: Trade) -> str:
    return trade.symbol


def newer(_older: Trade, newer: Trade) -> Trade:
    return newer


async def trades() -> AsyncGenerator[Trade, None]:
    yield Trade("BTC", 1.0)


def newest(prices: dict[str, float], trade: Trade) -> dict[str, float]:
    return {**prices, trade.symbol: trade.price}


Event = Trade | Gap
FOLD = Fold({}, newest)
FOLDED = SharedSource(key="trades", open=trades, fold=FOLD)
SOURCE = SharedSource(key="trades", open=trades)
ROUTED = SharedSource(key="trades", open=trades, route_by=symbol)


# Sources.


def sources_are_of_what_they_yield() -> None:
    assert_type(SOURCE, SharedSource[Trade])
    assert_type(ROUTED, SharedSource[Trade])
    assert_type(SharedSource(key="trades", open=trades, route_by=lambda trade: trade.symbol), SharedSource[Trade])
    assert_type(SharedSource(key="trades", open=trades, route_by=hash), SharedSource[Trade])


@shared_source
async def plain(symbol: str, /, depth: int = 1) -> AsyncGenerator[Trade, None]:
    yield Trade(symbol, depth)


@shared_source()
async def called(symbol: str) -> AsyncGenerator[Trade, None]:
    yield Trade(symbol, 1)


@shared_source(route_by=symbol)
async def routed(symbol: str, *, depth: int = 1) -> AsyncGenerator[Trade, None]:
    yield Trade(symbol, depth)


@shared_source(route_by=symbol)
@asynccontextmanager
async def managed(symbol: str) -> AsyncGenerator[AsyncGenerator[Trade, None], None]:
    yield trades()


# What the event of a lambda is cannot be told before the function is seen, so that is not checked.
@shared_source(route_by=lambda trade: trade.symbol)
async def routed_by_lambda(symbol: str) -> AsyncGenerator[Trade, None]:
    yield Trade(symbol, 1)


@shared_source(route_by=None)
async def not_routed(symbol: str) -> AsyncGenerator[Trade, None]:
    yield Trade(symbol, 1)


def decorated_functions_keep_their_parameters_and_give_sources() -> None:
    assert_type(plain("BTC", depth=2), SharedSource[Trade])
    assert_type(called(symbol="BTC"), SharedSource[Trade])
    assert_type(routed("BTC", depth=2), SharedSource[Trade])
    assert_type(managed("BTC"), SharedSource[Trade])
    assert_type(routed_by_lambda("BTC"), SharedSource[Trade])
    assert_type(not_routed("BTC"), SharedSource[Trade])


# Policies.


def lossless_policies_give_a_subscription(manager: SharedStreamManager) -> None:
    assert_type(manager.subscribe(SOURCE), Subscription[Trade])
    assert_type(manager.subscribe(SOURCE, subscriber_id=1, max_buffer_size=math.inf), Subscription[Trade])
    assert_type(manager.subscribe(SOURCE, overflow=Fail()), Subscription[Trade])
    assert_type(manager.subscribe(SOURCE, overflow=Block(1)), Subscription[Trade])
    assert_type(manager.subscribe(SOURCE, overflow=Block(math.inf), gaps=False), Subscription[Trade])


def lossy_policies_give_a_lossy_subscription(manager: SharedStreamManager) -> None:
    assert_type(manager.subscribe(SOURCE, overflow=DropOldest()), LossySubscription[Trade])
    assert_type(manager.subscribe(SOURCE, overflow=DropNewest()), LossySubscription[Trade])
    assert_type(manager.subscribe(SOURCE, overflow=Latest()), LossySubscription[Trade])
    assert_type(manager.subscribe(SOURCE, overflow=Conflate(symbol), gaps=False), LossySubscription[Trade])
    assert_type(manager.subscribe(SOURCE, overflow=Conflate(by=symbol, merge=newer)), LossySubscription[Trade])


def gaps_show_in_the_events(manager: SharedStreamManager) -> None:
    assert_type(manager.subscribe(SOURCE, gaps=True), Subscription[Event])
    assert_type(manager.subscribe(SOURCE, overflow=Fail(), gaps=True), Subscription[Event])
    assert_type(manager.subscribe(SOURCE, overflow=Block(1), gaps=True), Subscription[Event])
    assert_type(manager.subscribe(SOURCE, overflow=DropOldest(), gaps=True), LossySubscription[Event])
    assert_type(manager.subscribe(SOURCE, overflow=DropNewest(), gaps=True), LossySubscription[Event])
    assert_type(manager.subscribe(SOURCE, overflow=Latest(), gaps=True), LossySubscription[Event])
    assert_type(manager.subscribe(SOURCE, overflow=Conflate(symbol), gaps=True), LossySubscription[Event])


def snapshots_show_in_the_events(manager: SharedStreamManager) -> None:
    assert_type(manager.subscribe(FOLDED, snapshot=True), Subscription[Trade | Snapshot[Any]])
    assert_type(manager.subscribe(FOLDED, snapshot=False), Subscription[Trade])
    assert_type(manager.subscribe(FOLDED, snapshot=True, gaps=True), Subscription[Event | Snapshot[Any]])
    assert_type(manager.subscribe(FOLDED, overflow=Block(1), snapshot=True), Subscription[Trade | Snapshot[Any]])
    assert_type(manager.subscribe(FOLDED, overflow=Latest(), snapshot=True), LossySubscription[Trade | Snapshot[Any]])
    assert_type(manager.subscribe(FOLDED, overflow=Latest(), gaps=True, snapshot=True), LossySubscription[Event | Snapshot[Any]])


@shared_source(
    linger=30, cohort_grace=0.5, min_subscribers=2, restart=Restart(on=(OSError, TimeoutError)), on_exhausted="restart"
)
async def long_lived(symbol: str) -> AsyncGenerator[Trade, None]:
    yield Trade(symbol, 1.0)


@shared_source(replay=10, replay_max_age=60, fold=FOLD, silence_timeout=30, close_timeout=5, on_exhausted="end", restart=None)
async def remembered(symbol: str) -> AsyncGenerator[Trade, None]:
    yield Trade(symbol, 1.0)


def policies_of_a_source_change_nothing_about_its_events() -> None:
    assert_type(long_lived("BTC"), SharedSource[Trade])
    assert_type(remembered("BTC"), SharedSource[Trade])
    assert_type(FOLDED, SharedSource[Trade])
    Restart(on=lambda error: "again" in str(error), max_restarts=None, within=math.inf)


def a_policy_that_is_decided_later_gives_either(manager: SharedStreamManager, overflow: Fail | Latest) -> None:
    assert_type(manager.subscribe(SOURCE, overflow=overflow), Subscription[Trade] | LossySubscription[Trade])


# Receiving.


async def every_way_of_receiving_gives_the_events(manager: SharedStreamManager) -> None:
    async with manager.subscribe(SOURCE) as stream:
        assert_type(stream, Subscription[Trade])
        assert_type(await stream.receive(), Trade)
        assert_type(stream.receive_nowait(), Trade)
        assert_type(await stream.receive_batch(5), tuple[Trade, ...])
        async for trade in stream:
            assert_type(trade, Trade)
        async for batch in stream.batches(5):
            assert_type(batch, tuple[Trade, ...])


async def so_does_every_way_of_a_lossy_one(manager: SharedStreamManager) -> None:
    async with manager.subscribe(SOURCE, overflow=DropOldest(), gaps=True) as stream:
        assert_type(stream, LossySubscription[Event])
        assert_type(stream.receive_nowait(), Event)
        assert_type(await stream.receive_batch(5), tuple[Event, ...])
        async for batch in stream.batches(5):
            assert_type(batch, tuple[Event, ...])
        async for event in stream:
            # The two can be told apart, and each has its attributes.
            if isinstance(event, Gap):
                assert_type(event.missed, int | None)
            else:
                assert_type(event, Trade)


# As streams of anyio's.


def every_event(stream: ObjectReceiveStream[Trade]) -> ObjectReceiveStream[Trade]:
    return stream


def some_events(stream: UnreliableObjectReceiveStream[Trade]) -> UnreliableObjectReceiveStream[Trade]:
    return stream


def some_tuples(stream: UnreliableObjectReceiveStream[tuple[object, ...]]) -> None: ...


def subscriptions_are_the_streams_that_they_say(manager: SharedStreamManager) -> None:
    every_event(manager.subscribe(SOURCE))
    every_event(manager.subscribe(SOURCE, overflow=Block(1)))
    some_events(manager.subscribe(SOURCE))
    some_events(manager.subscribe(SOURCE, overflow=Latest()))
    some_tuples(manager.subscribe(SOURCE, overflow=Latest()))


# Functions of an event.


def anything_is_cheap(event: object) -> bool:
    return event is None


def either_is_cheap(event: Trade | str) -> bool:
    return event in ("", ())


def functions_of_an_event_are_given_the_sources(manager: SharedStreamManager) -> None:
    assert_type(manager.subscribe(ROUTED, where=lambda trade: trade.price > 1, routes={"BTC"}), Subscription[Trade])
    assert_type(manager.subscribe(ROUTED, where=anything_is_cheap, routes=["BTC", 1, None]), Subscription[Trade])
    # A predicate that takes more than there is does not widen what is received.
    assert_type(manager.subscribe(ROUTED, where=either_is_cheap, overflow=Latest()), LossySubscription[Trade])
    assert_type(manager.subscribe(ROUTED, where=bool, gaps=True), Subscription[Event])
    assert_type(manager.subscribe(ROUTED, where=None, routes=None), Subscription[Trade])


# Acknowledgement.


class Offsets(SharedStreamProducer[Trade, int]):
    async def open_stream(self) -> AsyncIterator[tuple[Trade, int]]:
        yield Trade("BTC", 1.0), 1

    async def advance(self, batch: Sequence[AdvanceItem[int]]) -> None:
        for offset, outcome in batch:
            assert_type(offset, int)
            assert_type(outcome.is_clean, bool)


class ByShape:
    """Neither a subclass, nor with all the methods."""

    async def open_stream(self) -> AsyncGenerator[tuple[Trade, str], None]:
        yield Trade("BTC", 1.0), "1-0"

    async def advance(self, batch: list[tuple[str, object]]) -> None:
        pass


def producers_say_what_their_source_yields() -> None:
    assert_type(AckSource("trades", Offsets), AckSource[Trade])
    assert_type(AckSource("trades", ByShape), AckSource[Trade])
    assert_type(AckSource("trades", lambda: Offsets(), ack_timeout=1, restart=Restart()), AckSource[Trade])


async def an_acknowledged_source_gives_an_ack_subscription(manager: SharedStreamManager) -> None:
    source = AckSource("trades", Offsets)
    assert_type(manager.subscribe(source), AckSubscription[Trade])
    assert_type(manager.subscribe(source, overflow=Block(1)), AckSubscription[Trade])
    assert_type(manager.subscribe(source, gaps=True), AckSubscription[Event])
    async with manager.subscribe(source, where=lambda trade: trade.price > 1) as stream:
        consumed: Subscription[Trade] = stream
        assert_type(await consumed.receive(), Trade)
        async for batch in stream.batches(10):
            assert_type(batch, tuple[Trade, ...])
