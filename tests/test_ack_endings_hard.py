"""Ends that do not go well: what hangs, what is silent, what is cancelled, and what is no ordinary exception."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import structlog
from structlog.testing import LogCapture

from anyio_sharedstream import AckSource, Restart, SharedStreamManager, UpstreamSilent
from tests.ack_support import Broker, finish, take
from tests.support import idle, settle, until
from tests.sweep import managed, nothing_left
from tests.virtual_time import in_virtual_time

AT_ONCE = Restart(initial_delay=0, jitter=0)


class Hanging(Broker):
    """A broker that hangs where it is told to, until it is cancelled, or not even then."""

    def __init__(self, *places: str, shielded: bool = False) -> None:
        super().__init__()
        self.places = places
        self.shielded = shielded
        self.release = anyio.Event()
        self.cancelled: list[str] = []

    async def hang(self, place: str) -> None:
        if place in self.places:
            try:
                with anyio.CancelScope(shield=self.shielded):
                    await self.release.wait()
            except anyio.get_cancelled_exc_class():
                self.cancelled.append(place)
                raise

    def source(self, **policies: Any) -> AckSource[Any]:
        broker = self

        class Producer:
            def __init__(self) -> None:
                broker.opened += 1

            async def open_stream(self) -> Any:
                try:
                    async for pair in broker.play():
                        yield pair
                finally:
                    await broker.hang("stream")

            async def advance(self, batch: Any) -> None:
                await broker.hang("advance")
                await broker.advance(batch)

            async def aclose(self) -> None:
                await broker.hang("aclose")
                broker.log.append("closed")

        create: Any = Producer
        return AckSource(self.key, create, **policies)


@asynccontextmanager
async def released_after(broker: Hanging) -> AsyncIterator[SharedStreamManager]:
    """A manager; when the block is over, what hangs goes on, and then there must be nothing left."""
    async with managed() as manager:
        try:
            yield manager
        finally:
            broker.release.set()
        await until(lambda: idle(manager))


@in_virtual_time
async def test_a_hung_advance_holds_nobody_up_for_longer_than_draining_may_take() -> None:
    lines = LogCapture()
    logger: Any = structlog.wrap_logger(None, processors=[lines])
    broker = Hanging("advance")
    async with SharedStreamManager(logger=logger) as manager:
        async with manager.subscribe(broker.source(drain_timeout=30)) as stream:
            broker.emit(0, 1, 2)
            await take(stream, 3)
            await anyio.sleep_until(7)
        assert anyio.current_time() == 37
        assert broker.cancelled == ["advance"]
        assert broker.log == ["stream closed", "closed"]
        assert idle(manager)
    assert [line["events"] for line in lines.entries if line["event"] == "events not advanced"] == [3]


@in_virtual_time
async def test_the_manager_is_left_in_time_though_an_advance_hangs() -> None:
    broker = Hanging("advance")
    async with nothing_left():
        async with SharedStreamManager() as manager:
            stream = await manager.subscribe(broker.source(drain_timeout=30)).__aenter__()
            broker.emit(0, 1, 2)
            await take(stream, 3)
            stream.close()
        assert anyio.current_time() == 30


@in_virtual_time
async def test_an_advance_that_is_being_retried_is_tried_while_draining_and_not_after() -> None:
    broker = Broker()
    broker.refusing[None] = ConnectionError()
    retry = Restart(initial_delay=4, factor=1, max_delay=4, jitter=0)
    async with managed() as manager:
        async with manager.subscribe(broker.source(drain_timeout=30, advance_retry=retry)) as stream:
            broker.emit(0)
            await take(stream, 1)
        assert anyio.current_time() == 30
        assert broker.attempts == 8
        async with manager.subscribe(broker.source(drain_timeout=30, advance_retry=retry)) as stream:
            broker.emit(0)
            await take(stream, 1)
            finish(stream)
            await anyio.sleep(1)
            del broker.refusing[None]
        assert anyio.current_time() == 34
        assert broker.advanced == [0]


@pytest.mark.parametrize("place", ["stream", "aclose"])
@in_virtual_time
async def test_a_hung_clean_up_is_waited_for_by_the_last_leaver_as_long_as_closing_may_take(place: str) -> None:
    broker = Hanging(place, shielded=True)
    async with released_after(broker) as manager:
        async with manager.subscribe(broker.source(close_timeout=3)) as stream:
            broker.emit(0)
            await take(stream, 1)
        assert anyio.current_time() == 3
        assert broker.advanced == [0]
        # And who comes next need not wait either.
        async with manager.subscribe(broker.source(close_timeout=3)) as stream:
            broker.emit(1)
            assert await stream.receive() == 1
            assert broker.opened == 2


@pytest.mark.parametrize("place", ["stream", "aclose"])
@in_virtual_time
async def test_time_that_draining_takes_is_not_counted_as_time_to_close(place: str) -> None:
    broker = Hanging("advance", place, shielded=False)
    async with released_after(broker) as manager:
        async with manager.subscribe(broker.source(close_timeout=3, drain_timeout=10)) as stream:
            broker.emit(0)
            await take(stream, 1)
        assert anyio.current_time() in (10, 13)


@in_virtual_time
async def test_who_leaves_before_its_upstream_could_open_does_not_wait_for_the_one_before_it() -> None:
    broker = Hanging("aclose", shielded=True)
    async with released_after(broker) as manager:
        stream = await manager.subscribe(broker.source()).__aenter__()
        await settle()
        stream.close()
        await settle()
        with anyio.fail_after(1):
            async with manager.subscribe(broker.source()):
                await settle()
        assert broker.opened == len(manager.statistics().closing) == 1


@in_virtual_time
async def test_a_hung_clean_up_after_a_failure_does_not_keep_the_next_subscriber_waiting() -> None:
    broker = Hanging("aclose", shielded=True)
    async with released_after(broker) as manager, manager.subscribe(broker.source(close_timeout=3)) as stream:
        broker.emit(0)
        await take(stream, 1)
        finish(stream)
        await settle()
        broker.fail(ConnectionError())
        with pytest.raises(ConnectionError):
            await stream.receive()
        assert anyio.current_time() == 0
        async with manager.subscribe(broker.source(close_timeout=3)) as another:
            broker.emit(1)
            with anyio.fail_after(4):
                assert await another.receive() == 1
            assert broker.opened == 2
            assert anyio.current_time() == 3


@pytest.mark.parametrize("place", ["aclose", "advance"])
@in_virtual_time
async def test_what_hangs_does_not_keep_a_restart_waiting(place: str) -> None:
    broker = Hanging(place, shielded=True)
    source = broker.source(close_timeout=3, restart=AT_ONCE)
    async with released_after(broker) as manager, manager.subscribe(source) as stream:
        broker.emit(0)
        await take(stream, 1)
        finish(stream)
        await settle()
        broker.fail(ConnectionError())
        with anyio.fail_after(4):
            await settle()
            broker.emit(1)
            assert await stream.receive() == 1
        assert broker.opened == 2
        assert anyio.current_time() == 3


@in_virtual_time
async def test_a_silent_upstream_fails_and_what_was_taken_is_advanced() -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source(silence_timeout=5)) as stream:
        broker.emit(0, 1)
        assert await stream.receive() == 0
        await anyio.sleep_until(4.9)
        assert manager.statistics().groups
        await anyio.sleep_until(5.1)
        assert not manager.statistics().groups
        assert await stream.receive() == 1
        with pytest.raises(UpstreamSilent):
            await stream.receive()
        await settle()
        assert broker.advanced == [0, 1]
        assert broker.log == ["stream closed", "closed"]


@in_virtual_time
async def test_an_upstream_that_waits_for_room_is_not_silent() -> None:
    broker = Broker()
    source = broker.source(silence_timeout=5, max_in_flight=2)
    async with managed() as manager, manager.subscribe(source) as stream:
        broker.emit(*range(6))
        for number in range(6):
            assert await stream.receive() == number
            await anyio.sleep(12 if number < 5 else 4)  # when this is taken there is room, and nothing comes
        finish(stream)
        await settle()
        assert broker.advanced == list(range(6))


@in_virtual_time
async def test_an_upstream_that_is_not_pulled_while_it_lingers_is_not_silent() -> None:
    broker = Broker()
    source = broker.source(silence_timeout=5, linger=100)
    async with managed() as manager:
        async with manager.subscribe(source) as stream:
            broker.emit(0)
            assert await stream.receive() == 0
        broker.emit(1)
        await anyio.sleep(50)
        assert manager.statistics().groups["broker"].state == "lingering"
        async with manager.subscribe(source) as stream:
            assert await stream.receive() == 1
        assert broker.opened == 1
        await manager.stop_all()


async def go_on(broker: Broker) -> None:
    """Finish some events, and then wait for more."""
    async with SharedStreamManager() as manager, manager.subscribe(broker.source(drain_timeout=30)) as stream:
        broker.emit(0, 1, 2)
        await take(stream, 3)
        finish(stream)
        await anyio.sleep_forever()


@pytest.mark.parametrize("place", ["advance", "stream", "aclose"])
@in_virtual_time
async def test_what_hangs_ends_in_time_when_what_surrounds_the_manager_is_cancelled(place: str) -> None:
    broker = Hanging(place)
    async with nothing_left():
        with anyio.move_on_after(1):
            await go_on(broker)
        assert anyio.current_time() == (1 if place == "stream" else 31)
        assert broker.cancelled == [place]


class Malformed(Broker):
    """Its stream yields something that is no pair, five seconds after its only event."""

    async def play(self) -> AsyncIterator[Any]:
        try:
            yield 1, (1, 1)
            await anyio.sleep(5)
            yield "no pair"
        finally:
            self.log.append("stream closed")


@in_virtual_time
async def test_what_a_stream_yields_while_it_is_only_kept_open_is_not_looked_at() -> None:
    lines = LogCapture()
    broker = Malformed()
    broker.blocked[None] = anyio.Event()
    async with SharedStreamManager(logger=structlog.wrap_logger(None, processors=[lines])) as manager:
        stream = await manager.subscribe(broker.source()).__aenter__()
        await take(stream, 1)
        stream.close()
        await anyio.sleep(7)
        assert not broker.log
        broker.blocked.pop(None).set()
    assert broker.log == ["stream closed", "closed"]
    assert not [line for line in lines.entries if line["log_level"] in ("warning", "error")]
