"""How an acknowledged upstream ends by itself: told at once, brought home if that is final, forgotten if not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from math import inf
from typing import Any

import anyio
import pytest
import structlog
from structlog.testing import LogCapture

from anyio_sharedstream import AckSource, Block, Fail, Gap, PollTerminated, Restart, SharedStreamManager, SharedStreamProducer
from tests.ack_support import Broker, acknowledgement, finish, take
from tests.conftest import on_asyncio
from tests.support import idle, settle, until
from tests.sweep import drain, managed
from tests.virtual_time import in_virtual_time

AT_ONCE = Restart(initial_delay=0, jitter=0)


async def failed(broker: Broker) -> None:
    broker.fail(ConnectionError("lost"))


async def returned(broker: Broker) -> None:
    broker.end()


@pytest.mark.parametrize(
    ("end", "on_exhausted", "terminal"),
    [
        (failed, "fail", ConnectionError),
        (returned, "fail", PollTerminated),
        (returned, "end", anyio.EndOfStream),
    ],
)
@in_virtual_time
async def test_a_final_end_is_told_at_once_and_what_is_still_said_is_advanced(
    end: Callable[[Broker], Awaitable[None]], on_exhausted: Any, terminal: type[Exception]
) -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source(on_exhausted=on_exhausted)) as stream:
        broker.emit(0, 1, 2)
        assert await take(stream, 1) == [0]
        await end(broker)
        await settle()
        assert not manager.statistics().groups
        await anyio.sleep_until(10)
        assert await take(stream, 1) == [1]
        await settle()
        assert broker.advanced == [0]
        assert broker.log == ["stream closed"]
        assert await take(stream, 1) == [2]
        with pytest.raises(terminal):
            await stream.receive()
        await settle()
        assert broker.advanced == [0, 1, 2]
        assert broker.log == ["stream closed", "closed"]
        assert anyio.current_time() == 10
        with pytest.raises(terminal):
            await stream.receive()


@in_virtual_time
async def test_after_a_final_end_the_next_group_of_the_key_opens_when_the_old_one_is_closed() -> None:
    broker = Broker()
    async with managed() as manager:
        stream = await manager.subscribe(broker.source(drain_timeout=30)).__aenter__()
        broker.emit(0, 1)
        await take(stream, 2)
        await failed(broker)
        await settle()
        async with manager.subscribe(broker.source(drain_timeout=30)) as another:
            await anyio.sleep_until(29.9)
            assert broker.opened == 1
            broker.emit(1)
            assert await another.receive() == 1
            assert (anyio.current_time(), broker.opened) == (30, 2)
        await stream.aclose()
        assert broker.advanced == [0, 1]


@in_virtual_time
async def test_events_of_an_upstream_that_failed_are_never_advanced_and_leave_the_buffers() -> None:
    lines = LogCapture()
    logger: Any = structlog.wrap_logger(None, processors=[lines])
    broker = Broker()
    async with (
        SharedStreamManager(logger=logger) as manager,
        manager.subscribe(broker.source(restart=AT_ONCE)) as stream,
        manager.subscribe(broker.source(restart=AT_ONCE)) as idler,
    ):
        broker.emit(0, 1, 2)
        assert await stream.receive() == 0
        pending = stream.defer()
        assert await stream.receive() == 1
        broker.fail(ConnectionError())
        await until(lambda: broker.opened == 2)
        assert broker.log == ["stream closed", "closed"]
        assert drain(idler) == ([], None)
        broker.emit(0, 1)
        await settle()
        pending.ack()
        assert await take(stream, 2) == await take(idler, 2) == [0, 1]
        finish(stream)
        finish(idler)
        await settle()
        assert broker.batches == [(None, [0, 1])]
        assert set(broker.outcomes.values()) == {(2, 0, 0, 0)}
        told = [(line["said"], line["events"]) for line in lines.entries if line["event"] == "too late to say"]
        assert told == [("acked", 1), ("acked", 1)]
        assert acknowledgement(manager).in_flight == acknowledgement(manager).deferred == 0


@pytest.mark.parametrize("gaps", [True, False])
@pytest.mark.parametrize("policy", [Fail(), Block(inf)], ids=repr)
async def test_one_that_has_lost_its_buffer_to_a_restart_has_a_whole_one_again(policy: Any, gaps: bool) -> None:
    broker = Broker()
    source = broker.source(restart=AT_ONCE)
    contract: dict[str, Any] = {"overflow": policy, "gaps": gaps}
    async with managed() as manager, manager.subscribe(source, **contract) as stream:
        broker.emit(0, 1, 2)
        assert await stream.receive() == 0
        broker.fail(ConnectionError())
        await until(lambda: broker.opened == 2)
        broker.emit(3, 4)
        broker.end()
        await settle()
        items, terminal = drain(stream)
        assert items == [*[Gap(None, "restart")] * gaps, 3, 4]
        assert isinstance(terminal, PollTerminated)


@pytest.mark.parametrize("gaps", [True, False])
@pytest.mark.parametrize("policy", [Fail(), Block(inf)], ids=repr)
async def test_one_that_joins_an_open_upstream_is_given_what_comes_and_nothing_else(policy: Any, gaps: bool) -> None:
    broker = Broker()
    source = broker.source(restart=AT_ONCE)
    contract: dict[str, Any] = {"overflow": policy, "gaps": gaps}
    async with managed() as manager, manager.subscribe(source) as first:
        broker.emit(0)
        assert await first.receive() == 0
        async with manager.subscribe(source, **contract) as stream:
            assert drain(stream) == ([], None)
            broker.emit(1)
            await settle()
            assert drain(stream) == ([1], None)


@in_virtual_time
async def test_an_exhausted_upstream_that_is_opened_again_begins_a_new_epoch() -> None:
    broker = Broker()
    source = broker.source(on_exhausted="restart", restart=AT_ONCE)
    async with managed() as manager, manager.subscribe(source) as stream:
        for epoch in range(5):
            broker.emit(epoch, 100)
            assert await stream.receive() == epoch
            if epoch % 2:
                finish_one = await stream.receive()
                assert finish_one == 100
                finish(stream)
                await settle()
            broker.end()
            await until(lambda: broker.opened == stream.epoch == epoch + 2)  # noqa: B023
        finish(stream)
        await settle()
        assert broker.advanced == [1, 100, 3, 100]


@in_virtual_time
async def test_what_an_advance_raises_when_it_is_cancelled_in_the_end_is_reported() -> None:
    lines = LogCapture()

    class Failing(Broker):
        async def advance(self, batch: Any) -> None:
            try:
                await anyio.sleep_forever()
            finally:
                raise ValueError("cannot be undone")

    broker = Failing()
    async with SharedStreamManager(logger=structlog.wrap_logger(None, processors=[lines])) as manager:
        async with manager.subscribe(broker.source(drain_timeout=5)) as stream:
            broker.emit(1)
            await stream.receive()
        assert anyio.current_time() == 5
    assert [type(line["exc_info"]) for line in lines.entries if line["event"] == "clean-up failed"] == [ValueError]
    assert broker.log == ["stream closed", "closed"]


@in_virtual_time
async def test_an_upstream_that_was_well_until_its_advance_failed_is_opened_again_after_the_first_delay() -> None:
    broker = Broker()
    source = broker.source(advance_retry=None, restart=Restart(initial_delay=1, factor=10, max_delay=10, jitter=0))
    async with managed() as manager, manager.subscribe(source) as stream:
        for opened in (1, 2, 3):
            await anyio.sleep(100)
            broker.refusing[None] = ConnectionError("lost")
            broker.emit(opened)
            assert await stream.receive() == opened
            finish(stream)
            await settle()
            assert manager.statistics().groups["broker"].state == "restarting"
            broker.refusing.clear()
            await anyio.sleep(1.001)
            assert broker.opened == opened + 1


@in_virtual_time
async def test_who_leaves_last_before_the_next_opening_does_not_wait_for_that() -> None:
    broker = Broker()
    source = broker.source(restart=Restart(initial_delay=1000, max_delay=1000, jitter=0))
    async with managed() as manager:
        async with manager.subscribe(source) as stream:
            broker.emit(1)
            assert await stream.receive() == 1
            broker.fail(ConnectionError("lost"))
            await anyio.sleep(1)
            assert manager.statistics().groups["broker"].state == "restarting"
        assert anyio.current_time() == 1
        assert idle(manager)


class Hung:
    """A stream that fails, and closes only if it is cancelled."""

    cancelled = False

    def __aiter__(self) -> Hung:
        return self

    async def __anext__(self) -> tuple[Any, Any]:
        raise ConnectionError("lost")

    async def aclose(self) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            self.cancelled = True


@in_virtual_time
async def test_the_clean_up_of_a_stream_that_has_failed_is_cancelled_when_the_last_subscriber_leaves() -> None:
    stream = Hung()

    class Producer(SharedStreamProducer[Any, Any]):
        def open_stream(self) -> Any:
            return stream

        async def advance(self, batch: Any) -> None:
            """Nothing is published."""

    async with managed() as manager:
        async with manager.subscribe(AckSource("hung", Producer, restart=AT_ONCE, close_timeout=50)):
            await anyio.sleep(3)
            assert not stream.cancelled
        assert anyio.current_time() == 3
        assert stream.cancelled
        assert idle(manager)


class Cancelling(Broker):
    """Its stream lets a cancellation of its own out, once it may."""

    def __init__(self) -> None:
        super().__init__()
        self.go = anyio.Event()

    async def play(self) -> AsyncIterator[tuple[Any, Any]]:
        yield 1, (1, 1)
        await self.go.wait()
        with anyio.CancelScope() as scope:
            scope.cancel()
            try:
                await anyio.sleep_forever()
            except anyio.get_cancelled_exc_class() as exc:
                own = exc
        raise own


async def test_a_stream_that_lets_a_cancellation_of_its_own_out_has_not_returned() -> None:
    broker = Cancelling()
    async with managed() as manager, manager.subscribe(broker.source(on_exhausted="end")) as stream:
        assert await stream.receive() == 1
        broker.go.set()
        with pytest.raises(PollTerminated, match="it was cancelled, and nobody had asked for that"):
            await stream.receive()
    assert broker.advanced == [1]


@on_asyncio  # for trio wakes tasks in any order
async def test_what_waited_for_a_subscriber_is_not_given_to_one_that_comes_when_the_upstream_fails() -> None:
    broker = Broker()
    broker.blocked[None] = anyio.Event()
    source = broker.source(advance_retry=None, linger=100)
    async with managed() as manager:
        async with manager.subscribe(source) as stream:
            broker.emit(1)
            assert await stream.receive() == 1
        broker.emit(2)
        await settle()
        assert broker.pulled == 2
        broker.refusing[None] = ConnectionError("lost")
        broker.blocked[None].set()
        async with manager.subscribe(source) as stream:
            with pytest.raises(ConnectionError):
                await stream.receive()
