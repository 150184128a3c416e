"""What the tests of acknowledgement share: a producer that is played by hand and writes down what it is told."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from typing import Any

import anyio
import pytest

from anyio_sharedstream import AckSource, AckStatistics, AdvanceItem, SharedStreamManager, SharedStreamProducer, Subscription

#: An outcome as a tuple: acked, failed, rejected, released.
Counts = tuple[int, int, int, int]
#: What a single subscriber may say, as an outcome.
ACKED, FAILED, REJECTED, RELEASED = (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)


class Broker:
    """What is behind all producers of one source: events by number, payloads that say which, and everything that was advanced.

    `emit` hands over events; the payload of event *n* is ``(n, event)``. `fail` and `end` make the stream raise and return.
    While `blocked` holds a lane, `advance` of that lane waits; while `refusing` does, it raises what stands there.
    """

    def __init__(self, key: Hashable = "broker", lane: Callable[[Any], Hashable] | None = None) -> None:
        self.key = key
        self.lane = lane
        self.opened = 0
        self.log: list[str] = []
        """the ends, in order: "stream closed", "closed" """
        self.batches: list[tuple[Hashable, list[Any]]] = []
        """the events of each successful `advance`, with the lane"""
        self.outcomes: dict[Any, Counts] = {}
        """by event, as it was advanced last"""
        self.clean: dict[Any, bool] = {}
        self.blocked: dict[Hashable, anyio.Event] = {}
        self.refusing: dict[Hashable, BaseException] = {}
        self.attempts = 0
        self.pulled = 0
        """how many events were taken from the stream, less those that are asked for and not there yet"""
        self._events: list[Any] = []
        self._end: BaseException | None = None
        self._news = anyio.Event()

    def source(self, **policies: Any) -> AckSource[Any]:
        return AckSource(self.key, self._create, **policies)

    def _create(self) -> SharedStreamProducer[Any, Any]:
        self.opened += 1
        return _Producer(self)

    def emit(self, *events: Any) -> None:
        self._events += events
        self._news.set()

    def fail(self, error: BaseException) -> None:
        self._end = error
        self._news.set()

    def end(self) -> None:
        self.fail(StopAsyncIteration())

    @property
    def advanced(self) -> list[Any]:
        """All events that were advanced, in order."""
        return [event for _, batch in self.batches for event in batch]

    async def play(self) -> AsyncIterator[tuple[Any, Any]]:
        try:
            while True:
                while self._events:
                    self.pulled += 1
                    event = self._events.pop(0)
                    yield event, (self.pulled, event)
                if self._end is not None:
                    error, self._end = self._end, None
                    if isinstance(error, StopAsyncIteration):
                        return
                    raise error
                self._news = anyio.Event()
                await self._news.wait()
        finally:
            self.log.append("stream closed")

    async def advance(self, batch: Sequence[AdvanceItem[Any]]) -> None:
        self.attempts += 1
        assert batch
        lane = self.lane_of(batch[0].broker_payload)
        assert all(self.lane_of(item.broker_payload) == lane for item in batch)
        if lane in self.blocked:
            await self.blocked[lane].wait()
        if lane in self.refusing:
            raise self.refusing[lane]
        self.batches.append((lane, [payload[1] for payload, _ in batch]))
        for (_, event), outcome in batch:
            self.outcomes[event] = (outcome.acked, outcome.failed, outcome.rejected, outcome.released)
            self.clean[event] = outcome.is_clean

    def lane_of(self, payload: Any) -> Hashable:
        return None if self.lane is None else self.lane(payload[1])


class _Producer(SharedStreamProducer[Any, Any]):
    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    def open_stream(self) -> AsyncIterator[tuple[Any, Any]]:
        return self._broker.play()

    async def advance(self, batch: Sequence[AdvanceItem[Any]]) -> None:
        await self._broker.advance(batch)

    def get_advance_lane(self, broker_payload: Any) -> Hashable:
        return self._broker.lane_of(broker_payload)

    async def aclose(self) -> None:
        self._broker.log.append("closed")


async def take(stream: Subscription[Any], count: int) -> list[Any]:
    """Receive so many events, one by one; the last of them stays current."""
    return [await stream.receive() for _ in range(count)]


def finish(stream: Subscription[Any]) -> None:
    """Acknowledge what is current by asking for more, of which there is nothing."""
    with pytest.raises(anyio.WouldBlock):
        stream.receive_nowait()


def acknowledgement(manager: SharedStreamManager, key: Hashable = "broker") -> AckStatistics:
    """What is on its way back to the broker of this key."""
    statistics = manager.statistics().groups[key].acknowledgement
    assert statistics is not None
    return statistics
