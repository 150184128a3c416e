"""Lanes and producers that misbehave: what they return, what they raise, and what becomes of everybody."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import anyio
import pytest

from anyio_sharedstream import AckSource, AdvanceItem, PollTerminated, Restart
from tests.ack_support import Broker, finish, take
from tests.support import settle, until
from tests.sweep import managed


class Lane:
    """A lane of the producer's own: foreign code, which fails from the n-th time on that it is hashed."""

    def __init__(self, name: str, good: float = math.inf) -> None:
        self.name = name
        self.good = good

    def __hash__(self) -> int:
        self.good -= 1
        if self.good < 0:
            raise ZeroDivisionError
        return 1

    def __eq__(self, other: object) -> bool:
        return bool(1 / (isinstance(other, Lane) and self.name == other.name))


def raising(event: str) -> Hashable:
    raise ZeroDivisionError


def unhashable(event: str) -> Hashable:
    names: Any = [event]
    return names  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("lane", "error", "events", "advanced"),
    [
        (raising, ZeroDivisionError, "a", []),
        (unhashable, TypeError, "a", []),
        (Lane, ZeroDivisionError, "ab", []),  # two that cannot be compared
        (lambda event: Lane(event, 0), ZeroDivisionError, "a", []),
        (lambda event: Lane(event, 1), ZeroDivisionError, "a", []),
        (lambda event: Lane(event, 2), ZeroDivisionError, "a", ["a"]),
    ],
    ids=["raises", "unhashable", "cannot be compared", "cannot be hashed", "cannot be hashed again", "cannot be found again"],
)
async def test_a_lane_that_cannot_be_used_is_the_upstreams_failure(
    lane: Callable[[Any], Hashable], error: type[Exception], events: str, advanced: list[str]
) -> None:
    told: list[str] = []
    broker = Broker()

    class Producer:
        def open_stream(self) -> Any:
            return broker.play()

        async def advance(self, batch: list[AdvanceItem[Any]]) -> None:
            told.extend(item.broker_payload[1] for item in batch)
            await settle(2)

        def get_advance_lane(self, payload: tuple[int, str]) -> Hashable:
            return lane(payload[1])

    source: AckSource[str] = AckSource("broker", Producer, advance_retry=Restart())
    async with managed() as manager, manager.subscribe(source) as stream:
        broker.emit(*events)
        await take(stream, len(events))
        with pytest.raises(error):
            await stream.receive()
        assert told == advanced
    assert broker.log == ["stream closed"]


async def test_lanes_that_are_equal_are_one_lane() -> None:
    broker = Broker(lane=lambda event: (1, 1.0, True)[event % 3])
    broker.blocked[1] = anyio.Event()
    async with managed() as manager, manager.subscribe(broker.source()) as stream:
        broker.emit(*range(6))
        await take(stream, 6)
        finish(stream)
        await settle()
        assert broker.attempts == 1
        broker.blocked.pop(1).set()
        await settle()
        assert broker.advanced == list(range(6))


async def test_a_failure_of_advance_is_restarted_after_like_any_other_and_the_broker_repeats() -> None:
    broker = Broker()
    broker.refusing[None] = ConnectionError()
    source = broker.source(advance_retry=None, restart=Restart(initial_delay=0))
    async with managed() as manager, manager.subscribe(source) as stream:
        broker.emit(0, 1, 2)
        assert await take(stream, 2) == [0, 1]
        await until(lambda: broker.opened == 2)
        assert broker.log == ["stream closed", "closed"]
        del broker.refusing[None]
        broker.emit(0, 1, 2)
        # What nobody had taken is gone from the buffer.
        assert await take(stream, 3) == [0, 1, 2]
        finish(stream)
        await settle()
        assert broker.batches == [(None, [0, 1, 2])]
        assert manager.statistics().groups["broker"].restarts == 1


async def test_an_advance_that_is_cancelled_from_inside_is_a_failure_that_everybody_is_told_of(backend_name: str) -> None:
    broker = Broker()

    class Producer:
        def open_stream(self) -> Any:
            return broker.play()

        async def advance(self, batch: list[AdvanceItem[Any]]) -> None:
            # The scope of somebody else's that ends an await in here, and lets its cancellation out.
            with anyio.CancelScope() as scope:
                scope.cancel()
                try:
                    await anyio.sleep_forever()
                except BaseException as exc:
                    cancellation = exc
            raise cancellation

    source: AckSource[str] = AckSource("broker", Producer)
    async with managed() as manager, manager.subscribe(source) as stream, manager.subscribe(source) as other:
        broker.emit("a")
        await take(stream, 1)
        await take(other, 1)
        finish(other)
        for each in (stream, other):
            with pytest.raises(PollTerminated):
                await each.receive()
