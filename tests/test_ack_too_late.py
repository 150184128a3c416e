"""A subscriber that has failed, and is still at its last event: what it says of that is too late, and no mistake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest
import structlog
from structlog.testing import LogCapture

from anyio_sharedstream import AckSubscription, AckTimeout, Block, SharedStreamManager, SubscriberOverflow
from tests.ack_support import Broker
from tests.support import settle
from tests.virtual_time import in_virtual_time

SAYING: dict[str, Callable[[AckSubscription[Any]], Any]] = {
    "rejected": lambda stream: stream.reject("malformed"),
    "failed": lambda stream: stream.fail("malformed"),
    "acked": lambda stream: stream.defer().ack(),
}


@pytest.mark.parametrize("said", SAYING)
@in_virtual_time
async def test_after_a_timeout_it_is_ignored_once_and_the_error_comes_with_the_next_receive(said: str) -> None:
    broker, lines = Broker(), LogCapture()
    manager = SharedStreamManager(logger=structlog.wrap_logger(None, processors=[lines]))
    async with (
        manager,
        manager.subscribe(broker.source(ack_timeout=5)),
        manager.subscribe(broker.source(ack_timeout=5)) as stream,
    ):
        broker.emit(1)
        await stream.receive()
        await anyio.sleep(6)
        SAYING[said](stream)
        assert [(line["event"], line["said"]) for line in lines.entries if line["event"] == "too late to say"] == [
            ("too late to say", said)
        ]
        with pytest.raises(RuntimeError, match="no current event"):
            stream.fail()
        with pytest.raises(AckTimeout):
            await stream.receive()
    assert broker.outcomes == {1: (0, 1, 0, 1)}


@in_virtual_time
async def test_after_the_time_for_draining_too() -> None:
    broker, lines = Broker(), LogCapture()
    manager = SharedStreamManager(logger=structlog.wrap_logger(None, processors=[lines]))
    async with manager, manager.subscribe(broker.source(drain_timeout=5), subscriber_id="mine") as stream:
        broker.emit(1)
        await stream.receive()
        broker.end()
        await anyio.sleep(6)
        assert broker.log == ["stream closed", "closed"]
        stream.reject("malformed")
        line = {"key": "broker", "subscriber": "mine", "events": 1, "said": "rejected"}
        assert lines.entries[-1] == {**line, "event": "too late to say", "log_level": "debug"}
    assert not broker.outcomes


@in_virtual_time
async def test_after_a_timeout_all_that_was_current_is_deferred() -> None:
    broker = Broker()
    async with SharedStreamManager() as manager, manager.subscribe(broker.source(ack_timeout=5)) as stream:
        broker.emit(1, 2)
        assert await stream.receive_batch(2) == (1, 2)
        await anyio.sleep(6)
        pending = stream.defer()
        assert stream.statistics().events_deferred == 2
        pending.ack()
        assert stream.statistics().events_deferred == 0


@pytest.mark.parametrize("said", SAYING)
async def test_after_an_overflow_too(said: str) -> None:
    broker = Broker()
    async with SharedStreamManager() as manager, manager.subscribe(broker.source()) as other:
        async with manager.subscribe(broker.source(), max_buffer_size=1) as stream:
            for number in range(3):
                broker.emit(number)
                await settle()
                if number == 0:
                    await stream.receive()
            SAYING[said](stream)
            with pytest.raises(SubscriberOverflow):
                await stream.receive()
        assert await other.receive_batch(3) == (0, 1, 2)
    assert broker.outcomes == {0: (1, 1, 0, 0), 1: (1, 0, 0, 1), 2: (1, 0, 0, 1)}


async def test_a_subscription_that_was_never_entered_has_nothing_to_say() -> None:
    broker = Broker()
    async with SharedStreamManager() as manager:
        stream = manager.subscribe(broker.source())
        with pytest.raises(RuntimeError, match="no current event"):
            stream.fail()
        stream.close()
    assert broker.opened == 0


async def test_who_takes_everything_and_is_closed_in_the_middle_of_a_publication_releases_it() -> None:
    broker = Broker()
    async with SharedStreamManager() as manager:
        blocking = await manager.subscribe(broker.source(), overflow=Block(10)).__aenter__()

        def close_it(_event: object) -> bool:
            blocking.close()
            return True

        async with manager.subscribe(broker.source(), where=close_it) as stream:
            await blocking.aclose()
            blocking = await manager.subscribe(broker.source(), overflow=Block(10)).__aenter__()
            broker.emit(1)
            assert await stream.receive() == 1
    assert broker.outcomes == {1: (1, 0, 0, 1)}
