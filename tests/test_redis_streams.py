"""A Redis stream, read through a consumer group of a real server and acknowledged: the producer by itself."""

from __future__ import annotations

import socket
from contextlib import aclosing
from importlib.metadata import version
from typing import Any

import anyio
import pytest
import structlog
from structlog.testing import LogCapture

from anyio_sharedstream import AdvanceItem
from anyio_sharedstream.adapters.redis_streams import RedisStreamEvent, RedisStreamProducer, redis_stream
from tests.redis_support import ACKED, FAILED, LONG_AGO, REJECTED, RELEASED, Broker, Run, eventually, needs_server, values
from tests.sweep import Cut, sweep

pytestmark = needs_server

ANYIO = tuple(map(int, version("anyio").split(".")[:2]))


def recorded() -> tuple[Any, list[Any]]:
    """A logger, and its lines. Not `structlog.testing.capture_logs`: after that, structlog is configured for all other tests."""
    lines = LogCapture()
    return structlog.wrap_logger(None, processors=[lines]), lines.entries


async def test_what_the_stream_has_comes_first_and_what_is_added_then_follows(broker: Broker) -> None:
    first, second = broker.add("a", "b")
    async with Run(broker.producer(count=1)) as run:
        events = await run.take(2)
        (third,) = broker.add("c")
        events.append(await run.next())
    assert [(event.id, dict(event.fields), event.deliveries) for event in events] == [
        (first, {"value": b"a"}, 1),
        (second, {"value": b"b"}, 1),
        (third, {"value": b"c"}, 1),
    ]


async def test_a_group_that_begins_at_the_end_does_not_give_what_was_there_before(broker: Broker) -> None:
    broker.add("old")
    async with Run(broker.producer(start="$")) as run:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run.next)
            await eventually(lambda: broker.client.xinfo_groups(broker.stream))
            broker.add("new")
        assert [entry[1] for entry in broker.client.xrange(broker.stream, *broker.pending())] == [{"value": "new"}]


async def test_a_stream_that_is_not_there_is_created_and_a_group_that_is_there_is_joined(broker: Broker) -> None:
    async with Run(broker.producer()) as one, Run(broker.producer()) as other:
        for run in (one, other, one):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run.next)
                await eventually(lambda: broker.client.exists(broker.stream))
                broker.add("x")
    assert len(broker.client.xinfo_groups(broker.stream)) == 1


async def test_what_is_clean_is_acknowledged_with_one_command(broker: Broker) -> None:
    ids = broker.add(*range(50))
    async with Run(broker.producer()) as run:
        events = await run.take(50)
        assert sorted(broker.pending()) == sorted(ids)
        before = broker.calls("xack")
        await run.advance(ACKED, *events[:-1])
        assert broker.calls("xack") == before + 1
        assert set(broker.pending()) == {ids[-1]}
        await run.advance(ACKED, *events)  # as after a reply that was lost
        assert broker.pending() == {}
    assert broker.dead() == []


async def test_more_than_the_server_should_do_at_once_is_acknowledged_in_parts(broker: Broker) -> None:
    broker.add(*range(1500))
    async with Run(broker.producer(count=1500)) as run:
        events = await run.take(1500)
        before = broker.calls("xack")
        await run.advance(ACKED, *events)
        assert broker.calls("xack") == before + 2
    assert broker.pending() == {}


async def test_what_was_failed_is_delivered_again_by_the_same_consumer_and_the_rest_is_not(broker: Broker) -> None:
    broker.add("good", "bad", "later")
    async with Run(broker.producer(min_idle_time=0.05)) as run:
        good, bad, later = await run.take(3)
        await run.advance(ACKED, good)
        await run.advance(FAILED, bad)
        again = await run.next()
        assert (again.id, again.fields, again.deliveries) == (bad.id, bad.fields, 2)
        await run.advance(ACKED, later, again)
        assert broker.pending() == {}


async def test_what_was_failed_is_not_delivered_again_before_its_time(broker: Broker) -> None:
    broker.add("bad")
    async with Run(broker.producer(min_idle_time=1000)) as run:
        await run.advance(FAILED, await run.next())
        claims = broker.calls("xautoclaim")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run.next)
            await eventually(lambda: broker.calls("xautoclaim") > claims + 3)
            broker.add("next")
    assert set(broker.deliveries().values()) == {1}


@pytest.mark.parametrize("consumer", ["the same", "another"])
async def test_what_was_delivered_as_often_as_allowed_and_fails_again_is_dead(broker: Broker, consumer: str) -> None:
    (id_,) = broker.add("bad")
    for delivery in (1, 2):
        async with Run(broker.producer(consumer=consumer, min_idle_time=0.02, max_deliveries=3)) as run:
            event = await run.next()
            assert event.deliveries == delivery
            await run.advance(FAILED, event)
            assert broker.dead() == []
    async with Run(broker.producer(min_idle_time=0.02, max_deliveries=3)) as run:
        event = await run.next()
        await run.advance(FAILED, event)
        await run.advance(FAILED, event)  # as after a reply that was lost
    assert broker.pending() == {}
    assert broker.dead() == [
        {
            "dead-letter-stream": broker.stream,
            "dead-letter-group": "group",
            "dead-letter-id": id_,
            "dead-letter-reason": "failed",
            "dead-letter-deliveries": "3",
            "value": "bad",
        }
    ]


async def test_without_a_limit_it_is_delivered_as_often_as_it_takes(broker: Broker) -> None:
    (id_,) = broker.add("bad")
    broker.die_with(id_, deliveries=1000)
    async with Run(broker.producer(max_deliveries=None)) as run:
        event = await run.next()
        assert event.deliveries == 1001
        await run.advance(FAILED, event)
        assert broker.deliveries() == {id_: 1001}


@pytest.mark.parametrize("fields", [3000, 3001, 9000])
async def test_an_entry_of_many_fields_can_be_rejected_once(broker: Broker, fields: int) -> None:
    entry = {f"field {number}": str(number) for number in range(fields)}
    broker.client.xadd(broker.stream, entry)
    async with Run(broker.producer()) as run:
        event = await run.next()
        for _ in range(2):
            await run.advance(REJECTED, event)
        assert not broker.pending()
    (grave,) = broker.dead()
    assert {name: value for name, value in grave.items() if not name.startswith("dead-letter-")} == entry
    assert (grave["dead-letter-id"], grave["dead-letter-reason"]) == (event.id, "rejected")


async def test_what_was_rejected_is_dead_at_once(broker: Broker) -> None:
    broker.add("good", "bad", "good")
    async with Run(broker.producer(dead_letter=f"{broker.stream}-graves")) as run:
        one, bad, two = await run.take(3)
        await run.producer.advance([AdvanceItem(one, ACKED), AdvanceItem(bad, REJECTED), AdvanceItem(two, ACKED)])
        assert broker.pending() == {}
    (grave,) = broker.dead(f"{broker.stream}-graves")
    assert (grave["dead-letter-id"], grave["dead-letter-reason"], grave["value"]) == (bad.id, "rejected", "bad")
    assert broker.client.xlen(broker.stream) == 3, "the stream may have other groups, and is left as it is"


async def test_a_dead_letter_has_all_the_entry_had_and_if_that_is_gone_what_was_delivered(broker: Broker) -> None:
    twice, gone = [b"a", b"1", b"\xff", b"\xfe", b"a", b"2"], [b"b", b"3", b"\xff", b"\xfe"]
    for words in (twice, gone):
        broker.client.execute_command("XADD", broker.stream, "*", *words)
    async with Run(broker.producer()) as run:
        events = await run.take(2)
        assert [dict(event.fields) for event in events] == [{"a": b"2", "\udcff": b"\xfe"}, {"b": b"3", "\udcff": b"\xfe"}]
        broker.client.xdel(broker.stream, events[1].id)
        await run.advance(REJECTED, *events)
    read = "return redis.call('XRANGE', KEYS[1], '-', '+')"  # for the client would make dictionaries of them
    graves = broker.client.execute_command("EVAL", read, 1, f"{broker.stream}:dead", NEVER_DECODE=True)
    assert [words[10:] for _, words in graves] == [twice, gone]


async def test_if_the_dead_letter_cannot_be_written_the_entry_stays_pending(broker: Broker) -> None:
    (id_,) = broker.add("bad")
    broker.client.set(f"{broker.stream}:dead", "not a stream")
    async with Run(broker.producer()) as run:
        event = await run.next()
        with pytest.raises(Exception, match="wrong kind"):
            await run.advance(REJECTED, event)
        assert set(broker.pending()) == {id_}
        broker.client.delete(f"{broker.stream}:dead")
        await run.advance(REJECTED, event)
    assert broker.pending() == {}
    assert len(broker.dead()) == 1


async def test_what_was_released_is_free_for_others_at_once_and_was_not_delivered(broker: Broker) -> None:
    ids = broker.add("a", "b")
    async with Run(broker.producer(min_idle_time=1000)) as one, Run(broker.producer(min_idle_time=1000)) as other:
        events = await one.take(2)
        await one.advance(RELEASED, *events)
        await one.advance(RELEASED, *events)  # as after a reply that was lost
        assert broker.deliveries() == {ids[0]: 0, ids[1]: 0}
        assert await other.take(2) == events
        assert {entry["times_delivered"] for entry in broker.pending().values()} == {1}
        # Again, after it is somebody else's: that one keeps it.
        owners = {entry["consumer"] for entry in broker.pending().values()}
        await one.advance(RELEASED, *events)
        assert {entry["consumer"] for entry in broker.pending().values()} == owners
        assert max(entry["time_since_delivered"] for entry in broker.pending().values()) < 1_000_000


async def test_what_a_dead_consumer_has_left_comes_before_what_is_new(broker: Broker) -> None:
    ids = broker.add("a", "b", "c", "d")
    broker.die_with(*ids[:3])
    async with Run(broker.producer(count=2)) as run:
        events = await run.take(4)
    assert sorted(values(events[:2])) == ["a", "b"]
    assert sorted(values(events)) == ["a", "b", "c", "d"]
    assert {event.id: event.deliveries for event in events} == {ids[0]: 2, ids[1]: 2, ids[2]: 2, ids[3]: 1}


async def test_much_that_was_left_is_claimed_without_a_pause_and_given_without_waiting_for_what_is_new(broker: Broker) -> None:
    ids = broker.add(*range(7))
    broker.die_with(*ids)
    async with Run(broker.producer(count=2, block=1000, claim_interval=1000)) as run:
        assert sorted(event.id for event in await run.take(7)) == ids


async def test_what_another_consumer_leaves_later_is_claimed_later(broker: Broker) -> None:
    async with Run(broker.producer()) as run:
        broker.add("a")
        await run.advance(ACKED, await run.next())
        (id_,) = broker.add("b")
        assert broker.client.xreadgroup(broker.group, "dying", {broker.stream: ">"})
        broker.age(id_, consumer="dying")
        event = await run.next()
        assert (event.id, event.deliveries) == (id_, 2)


async def test_what_a_consumer_holds_does_not_look_idle_while_it_works_and_asks_for_nothing(broker: Broker) -> None:
    given, fetched = broker.add("a", "b")
    async with Run(broker.producer(consumer="busy", min_idle_time=0.03)) as run:
        await run.next()
        broker.age(given, fetched, consumer="busy")
        await eventually(lambda: max(each["time_since_delivered"] for each in broker.pending().values()) < 1000)
        assert broker.deliveries() == {given: 1, fetched: 1}


async def test_what_was_taken_away_is_not_taken_back_by_saying_that_one_is_alive(broker: Broker) -> None:
    ids = broker.add("a", "b")
    async with Run(broker.producer(consumer="frozen", min_idle_time=0.03, claim_interval=1000)) as run:
        await run.take(2)
        broker.client.xclaim(broker.stream, broker.group, "thief", 0, [ids[0]])
        broker.age(ids[1], consumer="frozen")
        await eventually(lambda: broker.pending()[ids[1]]["time_since_delivered"] < 1000)
        assert [broker.pending()[id_]["consumer"] for id_ in ids] == ["thief", "frozen"]


async def test_what_is_held_is_not_given_a_second_time_even_if_the_server_does(broker: Broker) -> None:
    (held,) = broker.add("long")

    def delivered_again() -> bool:
        # Until this hits the moment between saying that one is alive and claiming what others have left.
        broker.client.xclaim(broker.stream, broker.group, "busy", 0, [held], idle=LONG_AGO, justid=True)
        return broker.deliveries()[held] > 1

    async with Run(broker.producer(consumer="busy", min_idle_time=1000, claim_interval=0.001)) as run:
        event = await run.next()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run.next)
            await eventually(delivered_again)
            (new,) = broker.add("new")
        assert sorted(broker.pending()) == [held, new]
        # And that did not count.
        broker.age(held, consumer="busy", deliveries=9)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run.next)
            await eventually(lambda: broker.deliveries()[held] == 1)
            broker.add("newer")
        await run.advance(ACKED, event)
        assert held not in broker.pending()


async def test_a_consumer_of_the_same_name_takes_up_at_once_what_its_earlier_life_has_left(broker: Broker) -> None:
    ids = broker.add(*range(5))
    async with Run(broker.producer(consumer="me", min_idle_time=1000)) as run:
        await run.take(5)
    broker.client.xdel(broker.stream, ids[1])
    broker.add("new")
    logger, lines = recorded()
    async with Run(broker.producer(consumer="me", min_idle_time=1000, count=2, logger=logger)) as run:
        events = await run.take(5)
    assert [(event.id, event.deliveries) for event in events[:4]] == [(id_, 2) for id_ in (ids[0], *ids[2:])]
    assert values(events[4:]) == ["new"]
    assert ids[1] not in broker.pending()
    assert [line["entries"] for line in lines] == [[ids[1]]]


async def test_entries_that_were_deleted_are_neither_given_nor_pending_any_longer(broker: Broker) -> None:
    ids = broker.add("a", "deleted", "c")
    broker.die_with(*ids)
    broker.client.xdel(broker.stream, ids[1])
    logger, lines = recorded()
    async with Run(broker.producer(logger=logger)) as run:
        assert values(await run.take(2)) == ["a", "c"]
        assert set(broker.pending()) == {ids[0], ids[2]}
    (line,) = lines
    assert (line["log_level"], line["entries"]) == ("warning", [ids[1]])


async def test_what_kills_each_of_its_consumers_is_dead_in_the_end(broker: Broker) -> None:
    ids = broker.add("poison", "good")
    broker.die_with(*ids[:1], deliveries=3)
    logger, lines = recorded()
    async with Run(broker.producer(max_deliveries=3, logger=logger)) as run:
        assert values([await run.next()]) == ["good"]
    (grave,) = broker.dead()
    assert (grave["dead-letter-id"], grave["dead-letter-reason"]) == (ids[0], "abandoned")
    assert [(line["entry"], line["reason"], line["deliveries"]) for line in lines] == [(ids[0], "abandoned", 4)]


async def test_what_was_fetched_and_never_given_out_is_handed_back_at_the_end(broker: Broker) -> None:
    ids = broker.add("a", "b", "c")
    async with Run(broker.producer(consumer="me", min_idle_time=1000)) as run:
        await run.next()
    assert broker.deliveries() == {ids[0]: 1, ids[1]: 0, ids[2]: 0}
    async with Run(broker.producer(min_idle_time=1000)) as run:
        assert values(await run.take(2)) == ["b", "c"]


@pytest.mark.skipif(ANYIO < (4, 14), reason="before anyio 4.14, a native cancellation leaves a task group as something else")
@pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning")  # of coredis, if it was just connecting
async def test_cancelled_at_any_moment_it_leaves_no_connection_and_loses_nothing(broker: Broker) -> None:
    before = broker.connections()
    added: list[str] = []
    handled: list[str] = []

    async def scenario() -> None:
        producer = broker.producer(consumer="me")
        async with aclosing(producer.open_stream()) as stream:
            event, payload = await anext(stream)
            handled.append(event.id)
            await producer.advance([AdvanceItem(payload, ACKED)])
            await anext(stream)

    async def trial(cut: Cut) -> None:
        added.extend(broker.add("a", "b", "c"))
        await cut.run(scenario())
        await eventually(lambda: broker.connections() <= before)

    assert await sweep(trial) > 10
    async with Run(broker.producer(consumer="me", min_idle_time=1000)) as run:
        left = [event.id for event in await run.take(broker.unfinished())]
    assert len(left) == len(set(left))
    assert {*left, *handled} == {*added}


async def test_a_consumer_that_has_nothing_pending_leaves_no_name_behind(broker: Broker) -> None:
    broker.add("a", "b")
    async with Run(broker.producer(consumer="done")) as done, Run(broker.producer(consumer="busy", count=1)) as busy:
        await busy.next()
        await done.advance(ACKED, await done.next())
    assert [each["name"] for each in broker.client.xinfo_consumers(broker.stream, broker.group)] == ["busy"]


async def test_a_connection_that_breaks_while_waiting_raises_out_of_the_stream(broker: Broker) -> None:
    before = broker.connections()
    async with Run(broker.producer(block=1000, claim_interval=1000)) as run:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(expect_failure, run)
            await eventually(lambda: any(each["cmd"] == "xreadgroup" for each in broker.client.client_list()))
            broker.lose_connections()
        with pytest.raises(StopAsyncIteration):
            await run.next()
        with pytest.raises(RuntimeError, match="not open"):
            await run.advance(ACKED)
    assert broker.connections() <= before


async def expect_failure(run: Run) -> None:
    with pytest.raises(Exception, match="Connection lost") as caught:
        await run.next()
    assert type(caught.value).__name__ == "ConnectionError"
    assert type(caught.value).__module__ == "coredis.exceptions"


async def test_failing_to_say_that_one_is_alive_raises_out_of_the_stream(broker: Broker) -> None:
    broker.add("a")
    async with Run(broker.producer(min_idle_time=0.03, claim_interval=1000)) as run:
        await run.next()
        calls = broker.calls("evalsha")
        broker.client.rename(broker.stream, f"{broker.stream}-gone")
        await eventually(lambda: broker.calls("evalsha") > calls)
        broker.client.rename(f"{broker.stream}-gone", broker.stream)
        with pytest.raises(Exception, match="No such key"):
            await run.next()


@pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning")  # of coredis, if it could not connect
async def test_a_server_that_is_not_there_raises_out_of_the_stream_plainly() -> None:
    async with Run(RedisStreamProducer("redis://127.0.0.1:1", "stream", "group")) as run:
        with pytest.raises(Exception, match="Unable to establish a connection") as caught:
            await run.next()
    assert not isinstance(caught.value, BaseExceptionGroup)
    assert "coredis" in type(caught.value).__module__


@pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning")
async def test_a_server_that_says_nothing_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anyio_sharedstream.adapters.redis_streams.PATIENCE", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        producer = RedisStreamProducer(f"redis://127.0.0.1:{silent.getsockname()[1]}", "stream", "group", block=0.01)
        async with Run(producer) as run:
            with pytest.raises(Exception, match="Unable to establish a connection"):
                await run.next()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"url": "http://127.0.0.1"}, ValueError, "url must begin with"),
        ({"count": 0}, ValueError, "count must be"),
        ({"block": 0}, ValueError, "block must be"),
        ({"min_idle_time": 0}, ValueError, "min_idle_time must be"),
        ({"claim_interval": -1}, ValueError, "claim_interval must be"),
        ({"max_deliveries": 0}, ValueError, "max_deliveries must be"),
        ({"lane_by": "id"}, TypeError, "lane_by must be"),
        ({"dead_letter": "orders"}, ValueError, "must be another stream"),
    ],
)
def test_what_is_wrong_is_said_at_construction(options: dict[str, Any], error: type[Exception], message: str) -> None:
    url = options.pop("url", "redis://127.0.0.1")
    with pytest.raises(error, match=message):
        redis_stream(url, "orders", "billing", **options)


def test_events_have_the_lane_they_are_given() -> None:
    event = RedisStreamEvent("1-0", {"customer": b"7"}, 1)
    assert RedisStreamProducer("redis://host", "s", "g").get_advance_lane(event) is None
    by_customer = RedisStreamProducer("redis://host", "s", "g", lane_by=lambda event: event.fields["customer"])
    assert by_customer.get_advance_lane(event) == b"7"


def test_an_event_can_be_hashed_and_compared() -> None:
    assert {RedisStreamEvent("1-0", {"a": b"1"}, 1)} == {RedisStreamEvent("1-0", {"a": b"1"}, 1)}


def test_sources_of_one_stream_and_group_have_one_key_without_secrets() -> None:
    one = redis_stream("rediss://me:secret@host:1/2?password=secret&db=3", "s", "g", count=5, ack_timeout=7.0)
    assert one.key == redis_stream("rediss://host:1/2?db=3", "s", "g").key
    assert one.key != redis_stream("rediss://host:1/2?db=4", "s", "g").key
    assert one.key != redis_stream("rediss://host:1/2?db=3", "s", "h").key
    assert "secret" not in repr(one.key)
    assert one.ack_timeout == 7.0


def test_all_openings_of_a_source_are_one_consumer_and_of_two_sources_two() -> None:
    one, other = (redis_stream("redis://host", "s", "g") for _ in range(2))
    names = [vars(source.open())["_names"] for source in (one, one, other)]
    assert names[0] == names[1] != names[2]
