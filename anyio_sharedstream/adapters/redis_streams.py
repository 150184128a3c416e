"""Redis Streams (and Valkey's): a consumer group that is shared in the process and acknowledged when everybody is done.

Relies on `_redis_consumer` for what is done with the events, and on the public API of `anyio_sharedstream`. Needs the extra
``redis``, and a server that is at least as new as Redis 7.0 or any Valkey; no cluster.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Hashable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from secrets import token_hex
from typing import Any, TypedDict, Unpack
from urllib.parse import parse_qsl, urlencode, urlsplit

from anyio import CancelScope, Event, create_task_group
from anyio.abc import TaskGroup
from coredis import Redis
from coredis.retry import NoRetryPolicy
from structlog.typing import BindableLogger

from anyio_sharedstream import AckSource, AdvanceItem, SharedStreamProducer
from anyio_sharedstream._lifecycle import check_function
from anyio_sharedstream._producer import AckPolicies
from anyio_sharedstream.adapters._redis_consumer import Consumer, Terms
from anyio_sharedstream.adapters._redis_group import Group, RedisStreamEvent

__all__ = ["RedisStreamEvent", "RedisStreamOptions", "RedisStreamProducer", "redis_stream"]

#: For how many seconds a server may keep a command waiting before the connection counts as lost.
PATIENCE = 10.0


class RedisStreamOptions(TypedDict, total=False):
    """What a `RedisStreamProducer` may be asked for, beside which stream to read."""

    consumer: str | None
    start: str
    count: int
    block: float
    min_idle_time: float
    claim_interval: float | None
    max_deliveries: int | None
    dead_letter: str | None
    lane_by: Callable[[RedisStreamEvent], Hashable] | None
    logger: BindableLogger | None


class _Options(RedisStreamOptions, AckPolicies, total=False):
    """Both, for `redis_stream`."""


class RedisStreamProducer(SharedStreamProducer[RedisStreamEvent, RedisStreamEvent]):
    """Reads a stream as one consumer of a group, and tells the group what has been handled; each event is its own payload.

    What is acknowledged is removed from what is pending for the group. What was failed stays pending and is delivered again, to
    whichever consumer of the group is the first to claim it, this one included. What was rejected, and what was delivered
    *max_deliveries* times, goes to the dead-letter stream, with its fields and with ``dead-letter-id``, ``-stream``,
    ``-group``, ``-deliveries`` and ``-reason``: "rejected", "failed", or "abandoned" if each of its consumers died. What was
    released is free for the others at once, and that delivery does not count.

    A consumer that is alive keeps what it has: while an event is on its way here, it does not look idle to others. If this
    process is frozen for longer than *min_idle_time*, its events are delivered to others while it still works on them.

    :param url: as `coredis.Redis.from_url` takes it: ``redis://``, ``rediss://`` or ``unix://``
    :param stream: the key of the stream; created if it is not there
    :param group: the name of the group; created if it is not there
    :param consumer: Its name in the group. Two that are alive must not have the same. One that is used again takes up at once
        what its last bearer has left; by default it is made up, and that happens after *min_idle_time*.
    :param start: where a group that is created begins: "0" for all that the stream has, "$" for what is added from then on
    :param count: how many entries are fetched at once
    :param block: for how many seconds the server is asked to wait for the next entry, time after time
    :param min_idle_time: after how many seconds an event that nobody works on is delivered again
    :param claim_interval: every how many seconds to look for such events; by default half of *min_idle_time*
    :param max_deliveries: how many times an event is delivered at most; None for as many as it takes
    :param dead_letter: the key of the dead-letter stream; by default that of the stream and ":dead"
    :param lane_by: Gives the lane of an event. The server knows no order, so lanes only keep events that take long to be resolved
        from holding up the acknowledgement of those after them. By default there is one.
    :param logger: where lines about dead letters and deleted entries go, by default where all of the package's do
    :raises ValueError: a number is out of range, the url is of another kind, or the dead-letter stream is the stream
    :raises TypeError: *lane_by* cannot be called
    """

    def __init__(
        self,
        url: str,
        stream: str,
        group: str,
        *,
        consumer: str | None = None,
        start: str = "0",
        count: int = 100,
        block: float = 5.0,
        min_idle_time: float = 60.0,
        claim_interval: float | None = None,
        max_deliveries: int | None = 10,
        dead_letter: str | None = None,
        lane_by: Callable[[RedisStreamEvent], Hashable] | None = None,
        logger: BindableLogger | None = None,
    ) -> None:
        if urlsplit(url).scheme not in ("redis", "rediss", "unix"):
            raise ValueError("url must begin with redis://, rediss:// or unix://")  # and is not shown: it may hold a password
        if lane_by is not None:
            check_function("lane_by", lane_by, "a function of an event")
        if dead_letter == stream:
            raise ValueError(f"dead_letter={dead_letter!r} must be another stream, or what is dead would be delivered again")
        self._url = url
        self._names = stream, group, consumer or _made_up()
        self._start = start
        self._lane_by = lane_by
        self._terms = Terms(
            count=count,
            block=block,
            min_idle_time=min_idle_time,
            claim_interval=claim_interval,
            max_deliveries=max_deliveries,
            dead_letter=dead_letter or f"{stream}:dead",
        )
        self._logger = logger
        self._consumer: Consumer | None = None

    def get_advance_lane(self, broker_payload: RedisStreamEvent) -> Hashable:
        """Return what *lane_by* says."""
        return None if self._lane_by is None else self._lane_by(broker_payload)

    async def open_stream(self) -> AsyncGenerator[tuple[RedisStreamEvent, RedisStreamEvent], None]:
        """Yield what is pending for this consumer, and then what it claims from others and what is new, without an end.

        The connections live in here. Whatever coredis raises ends it: a connection that is lost, or that nothing comes from for
        ten seconds longer than it should. Cancelled or closed, it hands back what it has fetched and not yielded.
        """
        async with self._connected() as consumer:
            await consumer.begin(self._start)
            while True:
                while (event := consumer.next_event()) is not None:
                    yield event, event
                await consumer.fetch()

    async def advance(self, batch: Sequence[AdvanceItem[RedisStreamEvent]]) -> None:
        """Acknowledge what is clean, and do with the rest what the class says.

        All of it may be done again, so a call that raised or was cancelled can be repeated.

        :raises RuntimeError: `open_stream` is not open
        """
        if self._consumer is None:
            raise RuntimeError("nothing can be acknowledged while open_stream() is not open: the connection lives in there")
        await self._consumer.settle(batch)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Consumer]:
        # Tried again is what the library tries again: the whole upstream, and each `advance`.
        client = Redis.from_url(
            self._url,
            retry_policy=NoRetryPolicy(),
            connect_timeout=PATIENCE,
            stream_timeout=self._terms.block + PATIENCE,
        )
        error: BaseException | None = None
        async with _connections(client) as tasks:
            self._consumer = consumer = Consumer(Group(client, *self._names), self._terms, self._logger)
            tasks.start_soon(consumer.keep)
            try:
                yield consumer
            except BaseException as exc:
                error = exc  # kept from the task group, which would wrap it
                if not isinstance(exc, Exception):
                    await consumer.leave()
            finally:
                self._consumer = None
        try:
            assert error is not None, "the stream has no end of its own"
            raise error
        finally:
            del error  # or it and this frame would keep each other alive


@asynccontextmanager
async def _connections(client: Redis[bytes]) -> AsyncIterator[TaskGroup]:
    """Give a task group, to whose end the client is open even if everything is cancelled: it still has to say goodbye."""
    opened, done = Event(), Event()

    async def hold() -> None:
        # The client's tasks are here: in the task that is cancelled they would be cancelled, too.
        with CancelScope(shield=True):
            async with client:
                opened.set()
                await done.wait()

    async with create_task_group() as tasks:
        tasks.start_soon(hold)
        try:
            await opened.wait()
            yield tasks
        finally:
            done.set()
            tasks.cancel_scope.cancel()


def redis_stream(url: str, stream: str, group: str, **options: Unpack[_Options]) -> AckSource[RedisStreamEvent]:
    """Make a source of what is added to a Redis stream, read through a consumer group; to be subscribed to.

    Its key is the server, the stream and the group, so what asks for these shares one consumer of the group.

    :param options: those of `RedisStreamProducer` and the policies of `AckSource`. With ``restart=Restart()`` it outlives
        connections that break.
    :raises ValueError: as `RedisStreamProducer` and `AckSource`
    :raises TypeError: as they do
    """
    given: dict[str, Any] = dict(options)
    own = {name: given.pop(name) for name in RedisStreamOptions.__annotations__ if name in given}
    own["consumer"] = own.get("consumer") or _made_up()  # one name for all openings: each takes up what the last has left
    create = partial(RedisStreamProducer, url, stream, group, **own)
    create()  # what is wrong with the options is said now
    return AckSource((_without_secrets(url), stream, group), create, **given)


def _without_secrets(url: str) -> str:
    """Which server it is, and no more: keys are written to logs."""
    parts = urlsplit(url)
    query = [(name, value) for name, value in parse_qsl(parts.query) if name not in ("username", "password")]
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query=urlencode(query)).geturl()


def _made_up() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{token_hex(4)}"
