"""What the log says of events that were not advanced, and of those who were too slow; and what the tasks are called.

Relies on virtual time.
"""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from structlog.testing import LogCapture

from anyio_sharedstream import AckTimeout, Restart, SharedStreamManager
from tests.ack_support import Broker, acknowledgement
from tests.support import settle
from tests.virtual_time import in_virtual_time


def told(lines: LogCapture, event: str) -> list[Any]:
    return [line for line in lines.entries if line["event"] == event]


@in_virtual_time
async def test_a_subscriber_that_is_late_is_named_with_the_time_that_it_had(
    manager: SharedStreamManager, lines: LogCapture
) -> None:
    broker = Broker()
    async with manager, manager.subscribe(broker.source(ack_timeout=10), subscriber_id="packer") as stream:
        broker.emit("event")
        assert await stream.receive() == "event"
        await anyio.sleep(10.001)
        with pytest.raises(AckTimeout) as caught:
            stream.receive_nowait()
    assert (caught.value.key, caught.value.subscriber_id, caught.value.seconds) == ("broker", "packer", 10)
    line = {"key": "broker", "subscriber": "packer", "seconds": 10, "event": "subscriber timed out", "log_level": "warning"}
    assert told(lines, "subscriber timed out") == [line]


@in_virtual_time
async def test_each_advance_that_is_tried_again_is_told_with_the_delay(manager: SharedStreamManager, lines: LogCapture) -> None:
    broker = Broker()
    error = broker.refusing[None] = ConnectionError("lost")
    retry = Restart(initial_delay=3, factor=2, jitter=0)
    async with manager, manager.subscribe(broker.source(advance_retry=retry)) as stream:
        broker.emit("first", "second")
        assert await stream.receive_batch(2) == ("first", "second")
        stream.close()
        await settle()
        line = {"key": "broker", "exc_info": error, "events": 2, "event": "advance failed", "log_level": "warning"}
        assert told(lines, "advance failed") == [{**line, "retry_in": 3}]
        await anyio.sleep(3)
        await settle()
        assert told(lines, "advance failed") == [{**line, "retry_in": 3}, {**line, "retry_in": 6}]
        broker.refusing.clear()
    assert broker.advanced == ["first", "second"]


@in_virtual_time
async def test_an_advance_that_fails_when_nobody_is_left_is_told_with_what_is_lost(
    manager: SharedStreamManager, lines: LogCapture
) -> None:
    broker = Broker()
    error = broker.refusing[None] = ConnectionError("lost")
    async with manager, manager.subscribe(broker.source(advance_retry=None)) as stream:
        broker.emit("first", "second", "third")
        assert await stream.receive_batch(3) == ("first", "second", "third")
    line = {"key": "broker", "exc_info": error, "events": 3, "event": "advance failed", "log_level": "error"}
    assert told(lines, "advance failed") == [line]


@in_virtual_time
async def test_an_advance_that_fails_when_the_stream_has_ended_beside_it_is_told_as_well(
    manager: SharedStreamManager, lines: LogCapture
) -> None:
    broker = Broker()
    broker.blocked[None] = anyio.Event()
    error = broker.refusing[None] = ConnectionError("lost")
    async with manager:
        stream = await manager.subscribe(broker.source(advance_retry=None)).__aenter__()
        broker.emit("event")
        assert await stream.receive() == "event"
        stream.close()
        await settle()
        broker.end()
        await settle()
        assert told(lines, "advance failed") == []
        broker.blocked[None].set()
    line = {"key": "broker", "exc_info": error, "events": 1, "event": "advance failed", "log_level": "error"}
    assert told(lines, "advance failed") == [line]


@in_virtual_time
async def test_what_was_put_off_for_too_long_is_told_and_is_no_failure_of_the_upstream(
    manager: SharedStreamManager, lines: LogCapture
) -> None:
    broker = Broker()
    async with manager:
        async with manager.subscribe(broker.source(drain_timeout=30)) as stream:
            broker.emit("event")
            assert await stream.receive() == "event"
            pending = stream.defer()
        await anyio.sleep(31)
        events = [line["event"] for line in lines.entries if line["log_level"] != "debug"]
        assert events == ["group started", "events not advanced", "group stopped"]
        pending.ack()


@in_virtual_time
async def test_who_timed_out_stays_in_the_opening_in_which_it_did() -> None:
    broker = Broker()
    source = broker.source(ack_timeout=10, restart=Restart(initial_delay=1, jitter=0))
    async with SharedStreamManager() as manager, manager.subscribe(source) as late, manager.subscribe(source) as other:
        broker.emit("event")
        assert await late.receive() == await other.receive() == "event"
        other.defer().ack()
        await anyio.sleep(11)
        broker.fail(ConnectionError("lost"))
        await anyio.sleep(2)
        with pytest.raises(AckTimeout):
            await late.receive()
        assert (late.epoch, other.epoch) == (1, 2)


@in_virtual_time
async def test_who_holds_everybody_up_is_told_for_how_long() -> None:
    broker = Broker()
    source = broker.source(ack_timeout=10, max_in_flight=1)
    async with SharedStreamManager() as manager, manager.subscribe(source) as stream:
        broker.emit("first", "second")
        await anyio.sleep(11)
        with pytest.raises(AckTimeout) as caught:
            await stream.receive()
        assert caught.value.seconds == 10


async def test_a_task_that_advances_says_for_whom() -> None:
    broker = Broker("orders")
    broker.blocked[None] = anyio.Event()
    async with SharedStreamManager() as manager, manager.subscribe(broker.source()) as stream:
        broker.emit("event")
        assert await stream.receive() == "event"
        stream.defer().ack()
        await settle()
        assert "advancing 'orders'" in {task.name for task in anyio.get_running_tasks()}
        broker.blocked[None].set()


@in_virtual_time
async def test_that_there_is_no_room_is_not_told_when_somebody_is_to_blame_for_it(
    manager: SharedStreamManager, lines: LogCapture
) -> None:
    broker = Broker()
    async with manager, manager.subscribe(broker.source(ack_timeout=10, max_in_flight=1)):
        broker.emit("first", "second")
        await anyio.sleep(11)
    assert [line["event"] for line in lines.entries if line["log_level"] == "warning"] == ["subscriber timed out"]


@in_virtual_time
async def test_that_there_is_no_room_is_not_told_when_all_that_is_wanting_is_a_subscriber(
    manager: SharedStreamManager, lines: LogCapture
) -> None:
    broker = Broker()
    source = broker.source(ack_timeout=10, linger=100)
    async with manager:
        async with manager.subscribe(source):
            await settle()
        broker.emit("event")
        await anyio.sleep(50)
        assert acknowledgement(manager).waiting
        async with manager.subscribe(source) as stream:
            assert await stream.receive() == "event"
        await manager.stop_all()
    assert not [line for line in lines.entries if line["log_level"] == "warning"]


async def test_that_what_was_deferred_is_acknowledged_is_not_told(manager: SharedStreamManager, lines: LogCapture) -> None:
    broker = Broker()
    async with manager, manager.subscribe(broker.source()) as stream:
        broker.emit("event")
        assert await stream.receive() == "event"
        stream.defer().ack()
    assert broker.advanced == ["event"]
    assert not [line for line in lines.entries if not line["event"].startswith("group ")]
