# pyright: standard, reportUnnecessaryTypeIgnoreComment=true
"""What type checkers must reject. Never run, as `accepted`: mypy and pyright read it.

Each mistake carries both checkers' ways to say that one is expected here, with its code. As both are told to complain of such a
remark that has nothing to excuse, a mistake that one of them no longer sees fails the check. (``pyrightconfig.json`` makes
pyright ignore what is meant for mypy, or it would take the first remark for its own and the second for an idle one.)
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import NamedTuple

from anyio.abc import ObjectReceiveStream

from anyio_sharedstream import (
    Block,
    Conflate,
    DropNewest,
    DropOldest,
    Fold,
    Gap,
    Latest,
    LossySubscription,
    Restart,
    SharedSource,
    SharedStreamManager,
    Subscription,
    shared_source,
)


class Trade(NamedTuple):
    symbol: str
    price: float


def symbol(trade: Trade) -> str:
    return trade.symbol


def length(text: str) -> int:
    return len(text)


def parts(_trade: Trade) -> list[str]:
    return []


async def trades() -> AsyncGenerator[Trade, None]:
    yield Trade("BTC", 1.0)


SOURCE = SharedSource(key="trades", open=trades, route_by=symbol)


# Loss is visible in the type.


def every_event(stream: ObjectReceiveStream[Trade]) -> ObjectReceiveStream[Trade]:
    return stream


def lossy_subscriptions_are_no_reliable_streams(manager: SharedStreamManager) -> None:
    subscribe = manager.subscribe
    every_event(subscribe(SOURCE, overflow=DropOldest()))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    every_event(subscribe(SOURCE, overflow=DropNewest()))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    every_event(subscribe(SOURCE, overflow=Latest()))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    every_event(subscribe(SOURCE, overflow=Conflate(symbol)))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def nor_are_they_subscriptions(lossy: LossySubscription[Trade], lossless: Subscription[Trade]) -> None:
    lossy = lossless  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    lossless = lossy  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]


async def a_gap_must_be_told_from_an_event(manager: SharedStreamManager) -> None:
    every_event(manager.subscribe(SOURCE, gaps=True))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    async with manager.subscribe(SOURCE, overflow=DropOldest(), gaps=True) as stream:
        assert (await stream.receive()).price  # type: ignore[union-attr]  # pyright: ignore[reportAttributeAccessIssue]
        gap = stream.receive_nowait()
        if isinstance(gap, Gap):
            assert gap.missed + 1  # type: ignore[operator]  # pyright: ignore[reportOptionalOperand]
            gap.missed = 0  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


# Arguments.


def policies_are_objects(manager: SharedStreamManager) -> None:
    subscribe = manager.subscribe
    subscribe(SOURCE, overflow=DropOldest)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    subscribe(SOURCE, overflow=None)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    subscribe(SOURCE, overflow="drop")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    subscribe(SOURCE, gaps=None)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]


def policies_have_these_parameters() -> None:
    Block()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Block("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Conflate()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Conflate("symbol")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Conflate(parts)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Conflate(symbol, merge=symbol)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Latest(1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Block(1).up_to = 2  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


def all_but_the_source_are_keywords(manager: SharedStreamManager) -> None:
    subscribe = manager.subscribe
    subscribe(SOURCE, "me")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


def functions_of_an_event_take_the_sources(manager: SharedStreamManager) -> None:
    subscribe = manager.subscribe
    subscribe(SOURCE, where=length)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
    subscribe(SOURCE, where=lambda it: it.volume)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    subscribe(SOURCE, where="cheap")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    subscribe(SOURCE, routes=1)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    subscribe(SOURCE, routes=[["BTC"]])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType, reportCallIssue]
    SharedSource(key="trades", open=trades, route_by=length)  # type: ignore[misc]  # pyright: ignore[reportArgumentType]
    SharedSource(key="trades", open=trades, route_by=parts)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    SharedSource(key="trades", open=trades, route_by="symbol")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@shared_source(route_by=parts)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
async def by_what_is_not_hashable() -> AsyncGenerator[Trade, None]:
    yield Trade("BTC", 1.0)


@shared_source(symbol)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
async def not_by_keyword() -> AsyncGenerator[Trade, None]:
    yield Trade("BTC", 1.0)


def policies_of_a_source_are_of_their_kind() -> None:
    shared_source(lingers=1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    shared_source(linger="long")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    shared_source(on_exhausted="stop")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    SharedSource(key="trades", open=trades, restart=True)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    SharedSource(key="trades", open=trades, fold={})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Restart(1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Restart(on="errors")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Fold(0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def snapshots_are_asked_for_by_true_or_false(manager: SharedStreamManager) -> None:
    manager.subscribe(SOURCE, snapshot=None)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
