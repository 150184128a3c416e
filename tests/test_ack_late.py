"""What becomes of the events of a subscriber that fails, and of what is said of an upstream that is gone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from structlog.testing import LogCapture

from anyio_sharedstream import (
    AckSubscription,
    AckTimeout,
    Fail,
    SharedStreamManager,
    SubscriberOverflow,
)
from tests.ack_support import ACKED, FAILED, RELEASED, Broker
from tests.support import settle, until
from tests.sweep import managed
from tests.test_ack_resolution import AT_ONCE, LEAVINGS, Take, leave, policies, ways
from tests.virtual_time import in_virtual_time


@policies
async def test_an_overflow_fails_what_its_subscriber_was_at_and_touches_neither_what_is_done_nor_what_is_pending(
    options: Any,
) -> None:
    broker = Broker()
    async with (
        managed() as manager,
        manager.subscribe(broker.source()) as healthy,
        manager.subscribe(broker.source(), max_buffer_size=2, **{**options, "overflow": Fail()}) as stream,
    ):
        broker.emit(*range(6))
        assert await healthy.receive_batch(6) == tuple(range(6))
        assert await stream.receive_batch(2) == (0, 1)
        pending = stream.defer()
        assert [await stream.receive() for _ in range(2)] == [2, 3]
        broker.emit(6, 7)
        assert await healthy.receive_batch(2) == (6, 7)
        with pytest.raises(anyio.WouldBlock):
            healthy.receive_nowait()
        assert len(manager.statistics().groups["broker"].subscriptions) == 1
        await settle()
        assert not broker.outcomes
        with pytest.raises(SubscriberOverflow):
            await stream.receive()
        pending.ack()
        await settle()
        both, failed, released = (2, 0, 0, 0), (1, 1, 0, 0), (1, 0, 0, 1)
        assert broker.outcomes == {0: both, 1: both, 2: both, 3: failed, **dict.fromkeys(range(4, 8), released)}


@policies
@in_virtual_time
async def test_a_timeout_fails_what_was_late_and_touches_neither_what_is_done_nor_what_is_pending(options: Any) -> None:
    broker = Broker()
    async with managed() as manager:
        async with manager.subscribe(broker.source(ack_timeout=10), **options) as stream:
            broker.emit(*range(6))
            assert await stream.receive() == 0
            pending = stream.defer()
            assert await stream.receive() == 1
            assert await stream.receive_batch(2) == (2, 3)
            await anyio.sleep(9.999)
            assert not broker.outcomes
            await anyio.sleep(0.002)
            with pytest.raises(AckTimeout):
                stream.receive_nowait()
            pending.ack()
        assert anyio.current_time() == pytest.approx(10.001)
    assert broker.outcomes == {0: ACKED, 1: ACKED, 2: FAILED, 3: FAILED, 4: RELEASED, 5: RELEASED}


@in_virtual_time
async def test_who_iterates_and_finds_several_events_ready_may_be_late_with_the_first() -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source(ack_timeout=10)) as stream:
        broker.emit(1, 2)
        await anyio.sleep(50)
        assert await anext(stream) == 1
        await anyio.sleep(10.001)
        with pytest.raises(AckTimeout):
            await anext(stream)
    assert broker.outcomes == {1: FAILED, 2: RELEASED}


async def test_without_a_timeout_several_events_that_are_ready_are_iterated_over_like_any_others() -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source(ack_timeout=math.inf)) as stream:
        broker.emit(1, 2)
        await settle()
        assert [await anext(stream) for _ in range(2)] == [1, 2]
    assert broker.outcomes == {1: ACKED, 2: ACKED}


LATE: dict[str, Callable[[AckSubscription[Any]], object]] = {
    "acked": lambda stream: stream.receive_nowait(),
    "failed": lambda stream: stream.fail("too late"),
    "rejected": lambda stream: stream.reject("too late"),
}


@policies
@pytest.mark.parametrize("said", LATE)
@pytest.mark.parametrize("size", [1, 2])
async def test_what_is_said_of_an_upstream_that_is_gone_changes_nothing_and_is_no_warning(
    said: str, size: int, options: Any, manager: SharedStreamManager, lines: LogCapture
) -> None:
    broker = Broker()
    async with manager, manager.subscribe(broker.source(restart=AT_ONCE), subscriber_id="mine", **options) as stream:
        broker.emit(*range(4))
        assert await stream.receive_batch(size) == tuple(range(size))
        broker.fail(OSError("lost"))
        await until(lambda: broker.opened == 2)
        broker.emit("again")  # the broker delivers from where it was told last
        await settle()
        assert stream.statistics().current_buffer_used == 1
        assert not broker.outcomes
        LATE[said](stream)
        told = {"key": "broker", "subscriber": "mine", "event": "too late to say", "log_level": "debug"}
        assert lines.entries[-1] == {**told, "said": said, "events": size}
        if said != "acked":
            assert await stream.receive() == "again"
        await settle()
        assert not broker.outcomes
        assert stream.statistics().events_current == 1
    assert broker.outcomes == {"again": ACKED}


@policies
@ways
async def test_what_is_taken_behind_an_event_of_an_upstream_that_is_gone_is_told_as_ever(take: Take, options: Any) -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source(restart=AT_ONCE), **options) as stream:
        broker.emit(1, 2)
        await settle()
        assert await take(stream) == 1
        for opened in (2, 3):
            broker.fail(OSError("lost"))
            await until(lambda opened=opened: broker.opened == opened)  # type: ignore[misc]
            broker.emit(*range(1, 6))
            await settle()
            assert not broker.outcomes
            if opened == 2:
                assert await take(stream) == 1
        assert [await take(stream) for _ in range(3)] == [1, 2, 3]
        await settle()
        assert broker.outcomes == {1: ACKED, 2: ACKED}
        stream.fail()
        assert await take(stream) == 4
        await settle()
        assert broker.outcomes == {1: ACKED, 2: ACKED, 3: FAILED}


@pytest.mark.parametrize("how", LEAVINGS)
async def test_who_leaves_with_an_event_of_an_upstream_that_is_gone_says_nothing_of_it_and_releases_the_rest(how: str) -> None:
    broker = Broker()
    async with managed() as manager:
        stream = manager.subscribe(broker.source(restart=AT_ONCE))

        async def take() -> None:
            broker.emit(1, 2)
            assert await stream.receive() == 1
            broker.fail(OSError("lost"))
            await until(lambda: broker.opened == 2)
            broker.emit("again")
            await settle()

        await leave(how, stream, take)
        await until(lambda: broker.log == ["stream closed", "closed"] * 2)
    assert broker.outcomes == {"again": RELEASED}
