"""What goes wrong with routes: a ``route_by`` that fails, routes that mean nothing; and the decorator, with its forms."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from anyio_sharedstream import PollTerminated, SharedSource, SharedStreamManager, shared_source
from tests.contract_support import even, routed
from tests.support import Feed, idle, until


class RouteError(Exception):
    """What a ``route_by`` raises."""


class Incomparable:
    """A route that can be hashed, and no more."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __hash__(self) -> int:
        return hash(self._number)

    def __eq__(self, other: object) -> bool:
        raise RouteError


def tens(number: int) -> int:
    return number // 10


async def joined(manager: SharedStreamManager, source: SharedSource[Any], **contract: Any) -> Any:
    return await manager.subscribe(source, **contract).__aenter__()


class Watched:
    """A source that holds a task group over its yields, with a task in it."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    async def play(self) -> AsyncGenerator[int, None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.beat)
            try:
                number = 0
                while True:
                    yield number
                    number += 1
            finally:
                self.ended.append("generator")

    async def beat(self) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            self.ended.append("task")


def raises_at_3(number: int) -> int:
    if number == 3:
        raise RouteError(number)
    return number


def cannot_be_hashed_at_3(number: int) -> object:
    return [number] if number == 3 else number


@pytest.mark.parametrize(
    ("route_by", "error", "text"),
    [(raises_at_3, RouteError, "3"), (cannot_be_hashed_at_3, TypeError, "unhashable type: 'list'")],
)
async def test_a_route_by_that_fails_is_a_failure_of_the_upstream(
    route_by: Any, error: type[Exception], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched()
    async with SharedStreamManager() as manager:
        source = SharedSource(key="feed", open=watched.play, route_by=route_by)
        streams = [await joined(manager, source, routes=routes) for routes in (None, {1, 3}, {2}, {99})]
        await until(lambda: idle(manager))
        raised: list[BaseException] = []
        for stream, events in zip(streams, ([0, 1, 2], [1], [2], []), strict=True):
            assert [await stream.receive() for _ in events] == events  # what was there before comes first
            with pytest.raises(error, match=text) as caught:
                await stream.receive()
            raised.append(caught.value)
        assert len({id(exception) for exception in raised}) == 4
    assert sorted(watched.ended) == ["generator", "task"]
    assert [record.levelname for record in caplog.records].count("ERROR") == 1  # the failure, and no failure to clean up


async def test_a_route_by_that_leaks_a_signal_gives_no_quiet_end() -> None:
    def route_by(_: object) -> object:
        raise anyio.EndOfStream

    feed = Feed()
    async with SharedStreamManager() as manager:
        stream = await joined(manager, routed(feed, route_by))
        feed.emit(1)
        with pytest.raises(PollTerminated):
            await stream.receive()


async def test_routes_mean_nothing_to_a_group_whose_source_has_none() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager:
        stream = await joined(manager, feed.source)
        late = manager.subscribe(routed(feed, tens), routes={1}, subscriber_id="late")
        for _ in range(2):  # also when it tries again
            with pytest.raises(ValueError, match="'feed' is open with route_by=None, so it cannot be subscribed to with"):
                await late.__aenter__()
        assert len(manager.statistics().groups["feed"].subscriptions) == 1
        again = await joined(manager, feed.source, subscriber_id="late")
        feed.emit(10)
        assert await stream.receive() == await again.receive() == 10
        for other in (stream, again):
            await other.aclose()
        async with late:  # whose source opens the next group, and has routes
            feed.emit(20, 11)
            assert await late.receive() == 11


async def test_a_route_whose_comparison_fails_leaves_no_state() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager:
        source = routed(feed, int)
        stream = await joined(manager, source, routes=[1])
        for routes in ([Incomparable(1)], [2, Incomparable(1)]):
            with pytest.raises(RouteError):
                await joined(manager, source, routes=routes)
        feed.emit(2, 1)
        assert await stream.receive() == 1
        await stream.aclose()
        assert idle(manager)


async def test_a_route_that_cannot_be_looked_up_is_a_failure_of_the_upstream() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager:
        source = routed(feed, lambda number: Incomparable(1) if number == 3 else number)
        everything, stream = await joined(manager, source), await joined(manager, source, routes=[1])
        feed.emit(1, 2, 3)
        for subscriber, events in ((everything, [1, 2]), (stream, [1])):
            assert [await subscriber.receive() for _ in events] == events
            with pytest.raises(RouteError):
                await subscriber.receive()


class Fickle:
    """A route whose hash changes."""

    def __init__(self) -> None:
        self.hash = 1

    def __hash__(self) -> int:
        return self.hash


async def test_a_route_that_is_not_what_it_was_harms_nobody_and_its_subscriber_leaves_all_the_same() -> None:
    feed, fickle = Feed(), Fickle()
    async with SharedStreamManager() as manager:
        source = routed(feed, lambda event: fickle if event == "fickle" else event)
        everything, stream = await joined(manager, source), await joined(manager, source, routes=[fickle, 1])
        feed.emit("fickle")
        assert await stream.receive() == "fickle"
        fickle.hash = 2
        feed.emit("fickle", 1)
        assert await stream.receive() == 1
        await stream.aclose()
        fickle.hash = 1
        feed.emit("fickle", 1)
        assert [await everything.receive() for _ in range(5)] == ["fickle", "fickle", 1, "fickle", 1]
        assert stream.statistics().current_buffer_used == 0


class Broken(Fickle):
    """A route that cannot be hashed any more, once it is broken."""

    broken = False

    def __hash__(self) -> int:
        if self.broken:
            raise RouteError
        return super().__hash__()


async def test_a_route_that_cannot_be_hashed_any_more_does_not_keep_its_subscriber_from_leaving() -> None:
    feed, broken = Feed(), Broken()
    async with SharedStreamManager() as manager:
        source = routed(feed, int)
        everything, stream = await joined(manager, source), await joined(manager, source, routes=[broken])
        broken.broken = True
        await stream.aclose()
        assert len(manager.statistics().groups["feed"].subscriptions) == 1
        feed.emit(2)
        assert await everything.receive() == 2
        await everything.aclose()
        assert idle(manager)


# Through the decorator.


async def numbers() -> AsyncGenerator[int, None]:
    for number in range(30):
        yield number
    await anyio.sleep_forever()


@shared_source(route_by=tens)
@asynccontextmanager
async def managed() -> AsyncGenerator[AsyncGenerator[int, None], None]:
    yield numbers()


@pytest.mark.parametrize("source", [shared_source(route_by=tens)(numbers)(), managed()], ids=["generator", "context manager"])
async def test_a_decorated_function_may_have_routes(source: SharedSource[int]) -> None:
    assert source.route_by is tens
    async with SharedStreamManager() as manager, manager.subscribe(source, routes={1}) as stream:
        assert await stream.receive_batch(100) == tuple(range(10, 20))


def test_routes_are_no_part_of_the_key() -> None:
    plain, also_plain, with_routes = shared_source(numbers), shared_source()(numbers), shared_source(route_by=even)(numbers)
    assert plain().key == also_plain().key == with_routes().key
    assert plain().route_by is also_plain().route_by is None
    assert with_routes().route_by is even


def test_the_forms_of_the_decorator_are_no_others() -> None:
    decorate: Any = shared_source
    for arguments in ((managed, tens), (None, tens)):
        with pytest.raises(TypeError, match="positional"):
            decorate(*arguments)
    with pytest.raises(TypeError, match="route_by must be a function of an event, not 'tens'"):
        decorate(route_by="tens")(numbers)()
