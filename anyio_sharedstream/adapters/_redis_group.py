"""What is asked of the server about one stream and one consumer group.

Relies on coredis. Whatever depends on what the server knows at that moment is a script, which nothing can come between.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, cast

from coredis import Redis
from coredis.exceptions import StreamDuplicateConsumerGroupError

__all__ = ["BEGINNING", "Group", "Page", "RedisStreamEvent"]

T = TypeVar("T")

#: Where a scan of what is pending begins, and where it is again when it has come to the end.
BEGINNING = "0-0"

#: The most ids that one command is given: the server does nothing else meanwhile.
MOST_IDS = 1000

#: The most fields of an entry that a script moves: Lua hands on no more than eight thousand words at once.
MOST_FIELDS = 3000

#: KEYS: the stream; ARGV: the group, the consumer, the idle time in milliseconds, where to go on, and how many.
CLAIM = """
local claimed = redis.call('XAUTOCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4], 'COUNT', ARGV[5])
for _, entry in ipairs(claimed[2]) do
    entry[3] = redis.call('XPENDING', KEYS[1], ARGV[1], entry[1], entry[1], 1)[1][4]
end
return claimed
"""

#: The same of what is pending for the consumer itself, however short a time.
CLAIM_OWN = """
local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], '+', ARGV[4], ARGV[2])
local claimed = {'0-0', {}, {}}
for _, own in ipairs(pending) do
    local entry = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, own[1])[1]
    if entry then
        table.insert(claimed[2], {entry[1], entry[2], own[4] + 1})
    else
        table.insert(claimed[3], own[1])
    end
    claimed[1] = '(' .. own[1]
end
return claimed
"""

#: ARGV: the group, the consumer, the idle time in milliseconds, and pairs of an id and how many times it has been delivered.
TOUCH = """
for i = 4, #ARGV, 2 do
    if redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2])[1] then
        redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'IDLE', ARGV[3], 'RETRYCOUNT', ARGV[i + 1], 'JUSTID')
    end
end
"""

#: KEYS: the stream, the dead-letter stream; ARGV: the group, the id, how many words are metadata, these, and the fields.
BURY = """
if not redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)[1] then
    return 0
end
local fields = {unpack(ARGV, 4)}
local entry = redis.call('XRANGE', KEYS[1], ARGV[2], ARGV[2])[1]
if entry then
    fields = {unpack(ARGV, 4, 3 + ARGV[3])}
    for _, word in ipairs(entry[2]) do
        table.insert(fields, word)
    end
end
redis.call('XADD', KEYS[2], '*', unpack(fields))
return redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
"""

#: ARGV: the group, the consumer.
LEAVE = """
if not redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2])[1] then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
end
"""


@dataclass(frozen=True, slots=True)
class RedisStreamEvent:
    """An entry of the stream, as it was delivered."""

    id: str
    """the entry's id, such as "1700000000000-0"; a consumer that must not do a thing twice remembers it"""
    fields: Mapping[str, bytes] = field(hash=False)
    """What the entry says; names are UTF-8, and of a name that is there twice the last value counts."""
    deliveries: int
    """how many times it has been delivered, this time included; more than one if it was failed before, or its consumer died"""


class Page(NamedTuple):
    """A part of what was pending."""

    cursor: str
    """where to go on"""
    events: list[RedisStreamEvent]
    """what now belongs to this consumer"""
    deleted: list[str]
    """the ids of entries that were pending and are not in the stream any more; they are pending no longer"""


class Group:
    """One consumer's view of its group. What its methods raise is what coredis raises; cancelled, they may have been done."""

    def __init__(self, client: Redis[bytes], stream: str, group: str, consumer: str) -> None:
        self._client = client
        self._stream = stream
        self._group = group
        self._consumer = consumer
        self._claim = client.register_script(CLAIM)
        self._claim_own = client.register_script(CLAIM_OWN)
        self._touch = client.register_script(TOUCH)
        self._bury = client.register_script(BURY)
        self._leave = client.register_script(LEAVE)

    async def create(self, start: str) -> None:
        """Create the group and the stream, if they are not there."""
        with suppress(StreamDuplicateConsumerGroupError):
            await self._client.xgroup_create(self._stream, self._group, start, mkstream=True)

    async def read(self, count: int, seconds: float) -> list[RedisStreamEvent]:
        """Return at most so many entries that nobody has been given yet; wait for the first of them if there is none."""
        # Without BLOCK it does not wait at all; with BLOCK 0, for ever.
        block = _milliseconds(seconds) if seconds > 0 else None
        streams = await self._client.xreadgroup(self._group, self._consumer, {self._stream: ">"}, count=count, block=block)
        entries = cast(Iterable[Any], next(iter(streams.values())) if streams else ())  # of bytes, though typed as either
        return [_event(entry.identifier, entry.field_values.items(), 1) for entry in entries]

    async def claim(self, cursor: str, count: int, min_idle_time: float) -> Page:
        """Take over what anybody has left pending for so many seconds; for the consumer itself it counts as delivered again."""
        return _page(
            await self._claim([self._stream], [self._group, self._consumer, _milliseconds(min_idle_time), cursor, count])
        )

    async def claim_own(self, cursor: str, count: int) -> Page:
        """Take up what is pending for a consumer of this name, however short a time."""
        return _page(await self._claim_own([self._stream], [self._group, self._consumer, cursor, count]))

    async def touch(self, deliveries: Mapping[str, int], idle: float = 0.0) -> None:
        """Set for how many seconds these ids are idle and how many times they are delivered, if they belong to this consumer."""
        for some in _chunks(deliveries.items()):
            words = [word for pair in some for word in pair]
            await self._touch([self._stream], [self._group, self._consumer, _milliseconds(idle), *words])

    async def acknowledge(self, ids: Collection[str]) -> None:
        """Tell the server that these have been handled; again does no harm."""
        for some in _chunks(ids):
            await self._client.xack(self._stream, self._group, some)

    async def bury(self, event: RedisStreamEvent, reason: str, dead_letter: str) -> None:
        """Move an entry to the dead-letter stream, both or nothing; again does no harm, for then it is no longer pending."""
        about = {
            "dead-letter-stream": self._stream,
            "dead-letter-group": self._group,
            "dead-letter-id": event.id,
            "dead-letter-reason": reason,
            "dead-letter-deliveries": str(event.deliveries),
        }
        if len(event.fields) > MOST_FIELDS:
            await self._bury_large(event, dead_letter, about)
            return
        words = [word for pair in about.items() for word in pair]
        fields = [word for name, value in event.fields.items() for word in (name.encode(errors="surrogateescape"), value)]
        # What the stream has is exact. What was trimmed meanwhile is known only as it was delivered.
        await self._bury([self._stream, dead_letter], [self._group, event.id, len(words), *words, *fields])

    async def _bury_large(self, event: RedisStreamEvent, dead_letter: str, about: Mapping[str, str]) -> None:
        # Nobody but this consumer moves what is pending for it, so that cannot change between the question and the transaction.
        if await self._client.xpending(self._stream, self._group, event.id, event.id, 1):
            fields: dict[str, str | bytes] = {**about, **event.fields}
            async with self._client.pipeline(transaction=True) as pipeline:
                pipeline.xadd(dead_letter, {name.encode(errors="surrogateescape"): value for name, value in fields.items()})
                pipeline.xack(self._stream, self._group, [event.id])

    async def leave(self) -> None:
        """Remove the consumer if nothing is pending for it, so that names that are never used again do not gather."""
        await self._leave([self._stream], [self._group, self._consumer])


def _milliseconds(seconds: float) -> int:
    return math.ceil(seconds * 1000)


def _chunks(ids: Collection[T]) -> Iterable[list[T]]:
    all_ids = list(ids)
    return (all_ids[start : start + MOST_IDS] for start in range(0, len(all_ids), MOST_IDS))


def _event(id_: bytes, fields: Iterable[tuple[bytes, bytes]], deliveries: int) -> RedisStreamEvent:
    named = {name.decode(errors="surrogateescape"): value for name, value in fields}
    return RedisStreamEvent(id_.decode(), MappingProxyType(named), deliveries)


def _page(reply: Any) -> Page:
    cursor, entries, deleted = reply
    events = [_event(id_, zip(words[::2], words[1::2], strict=True), deliveries) for id_, words, deliveries in entries]
    return Page(cursor.decode(), events, [id_.decode() for id_ in deleted])
