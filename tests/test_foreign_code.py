"""Finalisers, loggers, keys and exceptions are foreign code that runs inside the library; whatever it does, all stays right."""

from __future__ import annotations

import gc
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from itertools import count
from types import FrameType
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from anyio_sharedstream import Block, DropOldest, Fail, PollTerminated, SharedSource, SharedStreamManager, Subscription
from tests.conftest import BACKENDS
from tests.support import Feed, idle, settle, until

# Finalisers.


@pytest.fixture
def collected_on_demand() -> Iterator[None]:
    threshold = gc.get_threshold()
    gc.collect()
    gc.disable()
    yield
    gc.set_threshold(*threshold)
    gc.enable()


def callers() -> Iterator[str]:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield frame.f_code.co_name
        frame = frame.f_back


class Abandoned:
    """A consumer that closes its subscription when it is collected, which takes the collector: it refers to itself."""

    def __init__(self, stream: Subscription[Any], closed_by: list[set[str]]) -> None:
        self.stream = stream
        self.closed_by = closed_by
        self.itself = self

    def __del__(self) -> None:
        self.stream.close()
        self.closed_by.append(set(callers()))


async def publish_while_collecting(bound: int, policy: Any, allocations: int) -> list[set[str]]:
    """Let the collector run so many allocations after publishing has begun; says from where it closed each subscription."""
    closed_by: list[set[str]] = []
    received: list[list[int]] = []
    go = anyio.Event()

    async def play() -> AsyncGenerator[int, None]:
        yield 0
        await go.wait()
        gc.set_threshold(gc.get_count()[0] + allocations)
        gc.enable()
        numbers = count(1)
        while True:
            yield (number := next(numbers))
            yield number
            await checkpoint()

    source = SharedSource(key="feed", open=play)

    async def read() -> None:
        async with manager.subscribe(source) as stream:
            received.append([await stream.receive() for _ in range(11)])

    async def abandon() -> None:
        stream: Any = manager.subscribe(source, max_buffer_size=bound, overflow=policy)
        await stream.__aenter__()
        Abandoned(stream, closed_by)

    async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:
        for _ in range(100):
            tasks.start_soon(read)
        for _ in range(5):
            await abandon()
        await settle()
        go.set()
        await until(lambda: len(received) == 100)
        gc.disable()
        gc.collect()
        assert received == [[0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]] * 100
    assert idle(manager)
    return closed_by


@pytest.mark.usefixtures("collected_on_demand")
@pytest.mark.parametrize("anyio_backend", [BACKENDS[0], BACKENDS[2]], indirect=True)  # uvloop wakes tasks without allocating
@pytest.mark.parametrize(
    ("bound", "policy"),
    [(1, Fail()), (1000, Fail()), (1, DropOldest()), (1000, DropOldest())],
    ids=["refused", "accepted", "dropping", "choosy"],
)
async def test_a_subscription_may_be_closed_by_a_finaliser_in_the_middle_of_a_publication(bound: int, policy: Any) -> None:
    closed_by = [
        names for allocations in range(5, 100, 10) for names in await publish_while_collecting(bound, policy, allocations)
    ]
    assert len(closed_by) == 50
    assert any("deliver" in names for names in closed_by)


class Creator:
    """Makes memory streams, and lets a finaliser close two subscriptions meanwhile."""

    def __init__(self, closed: list[Any]) -> None:
        self._closed = closed

    def __getitem__(self, _: object) -> Callable[[float], Any]:
        return self._create

    def _create(self, size: float) -> Any:
        for stream in self._closed[:2]:
            stream.close()
        return anyio.create_memory_object_stream[Any](size)


@pytest.mark.parametrize("policy", [Fail(), DropOldest(), Block(1)], ids=repr)
async def test_a_finaliser_may_close_subscriptions_while_one_of_them_gets_its_buffer(
    policy: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    feed = Feed()
    streams: list[Any] = []
    monkeypatch.setattr("anyio_sharedstream._buffer.create_memory_object_stream", Creator(streams))
    async with SharedStreamManager() as manager:
        streams += [await manager.subscribe(feed.source, overflow=policy).__aenter__() for _ in range(3)]
        for number in (1, 2):
            feed.emit(number)
            await until(lambda: streams[2].statistics().current_buffer_used == number)  # noqa: B023
        for stream in streams[:2]:
            assert stream.statistics().current_buffer_used == 0
            with pytest.raises(anyio.ClosedResourceError):
                stream.receive_nowait()
        assert await streams[2].receive_batch(2) == (1, 2)
        streams[2].close()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]  # nor has anybody overflowed


# Loggers.


class Logger:
    """Calls back on one kind of line."""

    def __init__(self, event: str, action: Callable[[], object]) -> None:
        self._event = event
        self._action = action
        self.called = 0

    def info(self, event: str, **values: object) -> None:
        if event == self._event:
            self.called += 1
            self._action()

    warning = error = info


def enter(stream: Subscription[Any]) -> None:
    with pytest.raises(StopIteration):
        stream.__aenter__().send(None)


async def test_a_logger_may_subscribe_while_a_joiner_makes_the_last_subscriber_overflow() -> None:
    joined: list[Subscription[Any]] = []
    opened: list[int] = []

    def join() -> None:
        joined.append(manager.subscribe(source))
        enter(joined[-1])

    async def play() -> AsyncGenerator[int, None]:
        opened.append(len(opened))
        if len(opened) == 1:
            yield 1
            await settle()
            yield 2
            # Joining publishes what was gathered, and so before this source suspends.
            joined.append(manager.subscribe(source))
            await joined[-1].__aenter__()
        while True:
            await settle()
            yield 3

    source = SharedSource(key="feed", open=play)
    logger: Any = Logger("subscriber overflowed", join)
    async with SharedStreamManager(logger=logger) as manager, manager.subscribe(source, max_buffer_size=1):
        await until(lambda: len(joined) == 2)
        assert logger.called == 1
        assert len(manager.statistics().groups["feed"].subscriptions) == 2
        for stream in joined:
            assert await stream.receive() == 3
            stream.close()
        assert len(opened) == 2
    assert idle(manager)


@pytest.mark.parametrize("event", ["group started", "group stopped", "poll failed", "subscriber overflowed", "clean-up failed"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=repr)
async def test_what_a_logger_raises_that_is_no_exception_leaves_the_manager_as_itself(event: str, error: BaseException) -> None:
    def fail() -> None:
        raise error

    async def play() -> AsyncGenerator[int, None]:
        try:
            yield 1
            await settle()
            yield 2
            await settle()
            if event != "poll failed":
                await anyio.sleep_forever()
            raise ValueError
        finally:
            if event == "clean-up failed":
                raise ValueError

    logger: Any = Logger(event, fail)

    async def run() -> None:
        async with SharedStreamManager(logger=logger) as manager:
            streams = [manager.subscribe(SharedSource(key="feed", open=play), max_buffer_size=bound) for bound in (1, 1000)]
            for stream in streams:
                await stream.__aenter__()
            await settle(60)

    with pytest.raises(type(error)) as caught:
        await run()
    assert caught.value is error
    assert logger.called


# Keys.


class Fickle:
    """A key that can be compared until it cannot."""

    broken = False

    def __init__(self, number: int) -> None:
        self.number = number

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        if Fickle.broken:
            raise ZeroDivisionError
        return self is other


async def test_a_manager_whose_keys_cannot_be_compared_any_more_is_left_all_the_same() -> None:
    feeds = [Feed(Fickle(1)), Feed(Fickle(2))]

    async def run() -> None:
        async with SharedStreamManager() as manager:
            for feed in feeds:
                await manager.subscribe(feed.source).__aenter__()
            await until(lambda: all(feed.opened for feed in feeds))
            Fickle.broken = True

    try:
        with pytest.raises(ZeroDivisionError):
            await run()
    finally:
        Fickle.broken = False
    assert [feed.closed for feed in feeds] == [1, 1]
    await checkpoint()


# Exceptions.


class PeculiarError(Exception):
    """Names of its own where others have the exception's."""

    @property
    def __traceback__(self) -> Any:  # type: ignore[override]
        raise ZeroDivisionError

    @property
    def __context__(self) -> Any:  # type: ignore[override]
        return "no exception"

    with_traceback = None  # type: ignore[assignment]


class UnpairedError(Exception):
    @property
    def args(self) -> Any:  # type: ignore[override]
        raise ZeroDivisionError


@pytest.mark.parametrize("error", [PeculiarError("1"), UnpairedError("1")], ids=["peculiar", "unpaired"])
async def test_an_exception_that_cannot_be_copied_is_still_the_terminal(error: Exception) -> None:
    feed, other = Feed(), Feed("other")
    async with (
        SharedStreamManager() as manager,
        manager.subscribe(feed.source) as one,
        manager.subscribe(feed.source) as two,
        manager.subscribe(other.source) as unrelated,
    ):
        feed.fail(error)
        for stream in (one, two, one):
            terminal: BaseException | None = None
            try:
                await stream.receive()
            except Exception as exc:
                terminal = exc
            assert type(terminal) is type(error)
        other.emit(1)
        assert await unrelated.receive() == 1
    assert not isinstance(terminal, PollTerminated)
