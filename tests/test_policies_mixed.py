"""Subscribers with every policy on one upstream: what one of them receives is what it receives alone, whoever the others are."""

from __future__ import annotations

import math
from contextlib import AsyncExitStack, suppress
from itertools import permutations
from typing import Any

from anyio import WouldBlock

from anyio_sharedstream import Block, Conflate, DropNewest, DropOldest, Fail, Gap, Latest, SubscriberOverflow
from tests.policies_model import Seen, seen
from tests.support import Feed, settle
from tests.sweep import drain, managed

Outcome = tuple[list[Any], str, Seen]
# Bursts of one turn and of several, some of which nobody has finished when the next one comes.
BURSTS = [1, 3, 70, 2, 0, 5, 64, 1, 0, 130, 9, 1]


class SourceError(Exception):
    """What the source raises in the end."""


def even(event: int) -> bool:
    return event % 2 == 0


def small(event: int) -> bool:
    return 1 // (200 - event) >= 0


def last_digit(event: int) -> int:
    return event % 10


#: Who asks for what, and how many items it takes after each burst.
CONTRACTS: dict[str, tuple[int, dict[str, Any]]] = {
    "fails": (40, {"overflow": Fail(), "max_buffer_size": 8}),
    "misses nothing": (1, {"overflow": Fail(), "max_buffer_size": 1000}),
    # It has room for everything. One that had not would make the turns of the source shorter, which is known to all others.
    "holds": (7, {"overflow": Block(math.inf), "max_buffer_size": 1000}),
    "oldest": (5, {"overflow": DropOldest(), "max_buffer_size": 3, "gaps": True}),
    "newest": (5, {"overflow": DropNewest(), "max_buffer_size": 64, "gaps": True}),
    "newest of the even": (40, {"overflow": DropNewest(), "max_buffer_size": 2, "where": even, "gaps": True}),
    "oldest of the even": (2, {"overflow": DropOldest(), "max_buffer_size": 10, "where": even}),
    "latest": (1, {"overflow": Latest(), "gaps": True}),
    "conflates": (9, {"overflow": Conflate(last_digit), "max_buffer_size": 10}),
    "conflates too many": (60, {"overflow": Conflate(int), "max_buffer_size": 10}),
    "merges": (3, {"overflow": Conflate(last_digit, max), "where": even}),
    "raises": (100, {"overflow": DropOldest(), "max_buffer_size": 90, "where": small}),
}


async def outcomes(*names: str) -> dict[str, Outcome]:
    """What each of them has received in the end, how it ended, and what its statistics said."""
    feed = Feed()
    got: dict[str, list[Any]] = {name: [] for name in names}
    endings: dict[str, Outcome] = {}
    number = 0
    async with managed(feed) as manager, AsyncExitStack() as stack:
        streams: dict[str, Any] = {}
        for name in names:
            streams[name] = await stack.enter_async_context(manager.subscribe(feed.source, **CONTRACTS[name][1]))
        for burst in BURSTS:
            feed.emit(*range(number, number + burst))
            number += burst
            await settle()
            for name, stream in streams.items():
                with suppress(WouldBlock, SubscriberOverflow, ZeroDivisionError):
                    for _ in range(CONTRACTS[name][0]):
                        got[name].append(stream.receive_nowait())
        feed.fail(SourceError())
        await settle()
        for name, stream in streams.items():
            rest, terminal = drain(stream)
            endings[name] = got[name] + rest, type(terminal).__name__, seen(stream.statistics())
    return endings


async def test_each_alone_loses_what_its_contract_gives_up() -> None:
    """What the others are compared with: everything happens in it."""
    alone = {name: (await outcomes(name))[name] for name in CONTRACTS}
    failed = {name: ending for name, (_, ending, _) in alone.items() if ending != "SourceError"}
    assert failed == {"fails": "SubscriberOverflow", "conflates too many": "SubscriberOverflow", "raises": "ZeroDivisionError"}
    everything = [*range(sum(BURSTS))]
    assert alone["misses nothing"][0] == alone["holds"][0] == everything
    for name in ("oldest", "newest", "newest of the even", "oldest of the even", "latest", "conflates"):
        items, _, (used, _, received, missed, refused) = alone[name]
        assert used == 0
        assert missed > 0
        assert received + missed + refused == len(everything)
        assert (refused > 0) == name.endswith("even")
        told = sum(item.missed or 0 for item in items if isinstance(item, Gap))
        assert told == (missed if CONTRACTS[name][1].get("gaps") else 0)


async def test_no_two_change_what_the_other_receives() -> None:
    alone = {name: (await outcomes(name))[name] for name in CONTRACTS}
    for pair in permutations(CONTRACTS, 2):
        assert await outcomes(*pair) == {name: alone[name] for name in pair}, pair


async def test_all_together_change_nothing() -> None:
    alone = {name: (await outcomes(name))[name] for name in CONTRACTS}
    assert await outcomes(*CONTRACTS) == alone
    assert await outcomes(*reversed(CONTRACTS)) == alone
