"""What it means that an upstream returns: a failure, the end of the stream, or another opening."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import structlog
from structlog.testing import LogCapture

from anyio_sharedstream import Gap, PollTerminated, Restart, SharedSource, SharedStreamManager
from tests.support import Feed, idle, settle, until
from tests.sweep import RunFeed, drain, managed
from tests.virtual_time import in_virtual_time

AT_ONCE = Restart(initial_delay=0, jitter=0)


@pytest.mark.parametrize("restart", [None, AT_ONCE])
@pytest.mark.parametrize("on_exhausted", ["fail", "end"])
async def test_everyone_receives_what_is_buffered_and_then_the_end(on_exhausted: Any, restart: Restart | None) -> None:
    feed = Feed()
    source = feed.asking_for(on_exhausted=on_exhausted, restart=restart)
    async with managed(feed) as manager, manager.subscribe(source) as one, manager.subscribe(source, gaps=True) as other:
        feed.emit(*range(100))
        assert [await one.receive() for _ in range(30)] == list(range(30))
        feed.end()
        await until(lambda: idle(manager))
        for stream, begin in ((one, 30), (other, 0)):
            events, terminal = drain(stream)
            assert events == list(range(begin, 100))
            assert isinstance(terminal, PollTerminated if on_exhausted == "fail" else anyio.EndOfStream)
            assert stream.epoch == 1
        assert feed.opened == 1


async def test_events_that_are_yielded_together_with_the_return_come_before_the_end() -> None:
    async def source() -> AsyncGenerator[int, None]:
        for number in range(150):
            yield number

    async with managed() as manager:
        shared = SharedSource(key="finite", open=source, on_exhausted="end")
        async with manager.subscribe(shared) as stream, manager.subscribe(shared) as other:
            assert [event async for event in stream] == list(range(150))
            assert [event async for batch in other.batches(7) for event in batch] == list(range(150))
            with pytest.raises(anyio.EndOfStream):
                await stream.receive()
        async with manager.subscribe(shared) as again:
            assert await again.receive() == 0


@pytest.mark.parametrize("on_exhausted", ["fail", "end"])
async def test_the_key_is_free_at_the_moment_of_the_return(on_exhausted: Any) -> None:
    feed = Feed()
    source = feed.asking_for(on_exhausted=on_exhausted)
    async with managed(feed) as manager, manager.subscribe(source) as stream:
        feed.emit("last")
        feed.end()
        while drain(stream)[1] is None:
            await settle(1)
        async with manager.subscribe(source) as fresh:
            feed.emit("first")
            assert await fresh.receive() == "first"
        assert feed.opened == 2


async def test_the_end_of_a_stream_is_no_error_in_the_log() -> None:
    lines = LogCapture()
    feed = Feed()
    async with SharedStreamManager(logger=structlog.wrap_logger(None, processors=[lines])) as manager:
        async with manager.subscribe(feed.asking_for(on_exhausted="end")) as stream:
            feed.end()
            assert [event async for event in stream] == []
        await until(lambda: idle(manager))
    assert {line["log_level"] for line in lines.entries} == {"info", "debug"}


@in_virtual_time
async def test_a_return_is_followed_by_another_opening_as_a_failure_would_be() -> None:
    opened: list[float] = []

    async def source() -> AsyncGenerator[int, None]:
        opened.append(anyio.current_time())
        yield len(opened)

    restart = Restart(initial_delay=1, jitter=0, max_restarts=3, on=KeyError)
    async with (
        managed() as manager,
        manager.subscribe(SharedSource(key="polled", open=source, restart=restart, on_exhausted="restart"), gaps=True) as stream,
    ):
        await anyio.sleep(0.5)
        group = manager.statistics().groups["polled"]
        assert (group.state, group.restarts) == ("restarting", 1)
        assert isinstance(group.last_error, PollTerminated)
        await anyio.sleep(100)
        items, terminal = drain(stream)
    gap = Gap(None, "restart")
    assert opened == [0, 1, 3, 7]
    assert items == [1, gap, 2, gap, 3, gap, 4]
    assert isinstance(terminal, PollTerminated)
    assert terminal.key == "polled"


async def test_on_is_asked_after_errors_and_not_after_returns() -> None:
    feed = RunFeed()
    source = feed.asking_for(restart=Restart(initial_delay=0, on=KeyError), on_exhausted="restart")
    async with managed(feed) as manager, manager.subscribe(source) as stream:
        for run, ends in enumerate((StopAsyncIteration(), KeyError(), ValueError("final")), start=1):
            await until(lambda: feed.opened == stream.epoch == run)  # noqa: B023
            feed.emit("event")
            assert await stream.receive() == (run, "event")
            feed.fail(ends)
        with pytest.raises(ValueError, match="final"):
            await stream.receive()


@pytest.mark.parametrize("on_exhausted", ["fail", "end", "restart"])
async def test_an_upstream_that_returns_before_its_first_event(on_exhausted: Any) -> None:
    openings = 0

    async def source() -> AsyncGenerator[int, None]:
        nonlocal openings
        openings += 1
        for number in range(openings // 100):
            yield number

    async with managed() as manager:
        shared = SharedSource(key="empty", open=source, restart=AT_ONCE, on_exhausted=on_exhausted)
        async with manager.subscribe(shared) as stream:
            if on_exhausted == "restart":
                assert await stream.receive() == 0
                assert openings >= 100
            else:
                with pytest.raises(PollTerminated if on_exhausted == "fail" else anyio.EndOfStream):
                    await stream.receive()
                assert openings == 1


class Surrounded(Feed):
    """A feed with a context manager around it that has something to say when it ends."""

    def __init__(self, says: Exception | None) -> None:
        super().__init__()
        self.says = says

    def asking_for(self, **policies: Any) -> SharedSource[Any]:
        return SharedSource(key=self.key, open=self.surround, **policies)

    @asynccontextmanager
    async def surround(self) -> AsyncIterator[AsyncGenerator[Any, None]]:
        try:
            yield self._play()
        except ValueError:
            await anyio.lowlevel.checkpoint()
        if self.says is not None:
            raise self.says


@pytest.mark.parametrize("on_exhausted", ["fail", "end", "restart"])
async def test_an_error_of_what_surrounds_a_return_is_what_matters(on_exhausted: Any) -> None:
    feed = Surrounded(ConnectionError("while closing"))
    final = Restart(on=KeyError)  # not this one
    async with managed(feed) as manager:
        async with manager.subscribe(feed.asking_for(restart=final, on_exhausted=on_exhausted)) as stream:
            feed.emit(1, 2)
            feed.end()
            assert [await stream.receive(), await stream.receive()] == [1, 2]
            with pytest.raises(ConnectionError, match="while closing"):
                await stream.receive()
        assert feed.opened == 1
        async with manager.subscribe(feed.asking_for(restart=AT_ONCE, on_exhausted=on_exhausted)) as stream:
            feed.emit(1)
            feed.end()
            await until(lambda: feed.opened == 3)
            feed.emit(2)
            assert [await stream.receive(), await stream.receive()] == [1, 2]
            feed.says = None


@pytest.mark.parametrize("on_exhausted", ["fail", "end", "restart"])
async def test_an_error_that_is_swallowed_is_a_return(on_exhausted: Any) -> None:
    feed = Surrounded(None)
    async with managed(feed) as manager:
        async with manager.subscribe(feed.asking_for(restart=AT_ONCE, on_exhausted=on_exhausted)) as stream:
            feed.emit(1)
            feed.fail(ValueError("swallowed"))
            assert await stream.receive() == 1
            if on_exhausted == "restart":
                feed.emit(2)
                assert await stream.receive() == 2
            else:
                with pytest.raises(PollTerminated if on_exhausted == "fail" else anyio.EndOfStream):
                    await stream.receive()
        assert feed.opened == 1 + (on_exhausted == "restart")


@in_virtual_time
@pytest.mark.parametrize("on_exhausted", ["fail", "end", "restart"])
async def test_a_return_while_nobody_is_there_ends_it(on_exhausted: Any) -> None:
    feed = Feed()
    async with managed(feed) as manager:
        async with manager.subscribe(feed.asking_for(restart=AT_ONCE, on_exhausted=on_exhausted, linger=10)):
            await settle()
        feed.end()
        await anyio.sleep(1)
        assert idle(manager)
        assert feed.opened == 1


@pytest.mark.parametrize("on_exhausted", ["fail", "end", "restart"])
async def test_whoever_stops_a_returning_upstream_is_first(on_exhausted: Any) -> None:
    feed = Feed()
    async with managed(feed) as manager:
        async with manager.subscribe(feed.asking_for(restart=AT_ONCE, on_exhausted=on_exhausted)) as stream:
            await until(lambda: feed.opened)
            feed.emit(1)
            feed.end()
            await manager.stop("feed")
            assert isinstance(drain(stream)[1], anyio.EndOfStream)
        await settle()
        assert feed.opened == 1
