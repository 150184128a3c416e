"""`SharedSource` and `@shared_source`: what they refuse, how calls become keys, what may be opened, and that it is closed."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Self

import anyio
import pytest
from anyio import get_cancelled_exc_class

from anyio_sharedstream import SharedSource, SharedStreamManager, Subscription, shared_source
from tests.support import Feed, idle, settle, until


async def numbers(*args: object, **kwargs: object) -> AsyncGenerator[int, None]:
    for number in range(3):
        yield number
    await anyio.sleep_forever()


# Sources.


def test_a_source_without_a_key_is_refused() -> None:
    with pytest.raises(ValueError, match="key must not be None"):
        SharedSource(key=None, open=numbers)


def test_a_source_with_a_key_that_cannot_be_hashed_is_refused_and_the_key_named() -> None:
    with pytest.raises(TypeError, match=r"key must be hashable, and \['BTC'\] is not"):
        SharedSource(key=["BTC"], open=numbers)  # type: ignore[arg-type]


def test_a_source_whose_key_only_looks_hashable_is_refused() -> None:
    with pytest.raises(TypeError, match=r"\('prices', \[\]\)"):
        SharedSource(key=("prices", []), open=numbers)


@pytest.mark.parametrize("open_", [None, 42, numbers()], ids=["None", "number", "generator"])
def test_a_source_that_cannot_be_called_is_refused_and_named(open_: Any) -> None:
    with pytest.raises(TypeError) as caught:
        SharedSource(key="feed", open=open_)
    assert repr(open_) in str(caught.value)


def test_a_source_takes_keywords_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        SharedSource("feed", numbers)  # type: ignore[call-arg]


def test_a_source_is_a_value() -> None:
    source = SharedSource(key="feed", open=numbers)
    assert source == SharedSource(key="feed", open=numbers)
    assert hash(source) == hash(SharedSource(key="feed", open=numbers))
    with pytest.raises(AttributeError):
        source.key = "other"  # type: ignore[misc]


def test_a_source_says_what_it_is_made_of() -> None:
    assert repr(SharedSource(key="feed", open=Feed, linger=5)) == (  # type: ignore[arg-type]
        f"SharedSource(key='feed', open={Feed!r}, route_by=None, linger=5, cohort_grace=None, min_subscribers=1, "
        "restart=None, on_exhausted='fail', replay=0, replay_max_age=None, fold=None, silence_timeout=None, close_timeout=None)"
    )


def test_a_source_may_be_made_with_its_type_given() -> None:
    assert SharedSource[int](key="feed", open=numbers).key == "feed"


# Decorated functions.


@shared_source
async def prices(symbol: str, /, exchange: str = "NYSE", *, depth: int = 1) -> AsyncGenerator[str, None]:
    yield f"{symbol} {exchange} {depth}"
    await anyio.sleep_forever()


@shared_source()
async def everything(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
    yield args, kwargs
    await anyio.sleep_forever()


@shared_source
@asynccontextmanager
async def managed(symbol: str) -> AsyncIterator[AsyncGenerator[int, None]]:
    yield numbers(symbol)


async def first_event(source: SharedSource[Any]) -> Any:
    async with SharedStreamManager() as manager, manager.subscribe(source) as stream:
        return await stream.receive()


def test_the_same_arguments_give_equal_keys_however_they_are_written() -> None:
    keys = {source.key for source in (prices("BTC"), prices("BTC", "NYSE"), prices("BTC", exchange="NYSE", depth=1))}
    assert len(keys) == 1


def test_other_arguments_or_another_function_give_other_keys() -> None:
    sources = [prices("BTC"), prices("ETH"), prices("BTC", "LSE"), prices("BTC", depth=2), everything("BTC"), everything()]
    assert len({source.key for source in sources}) == len(sources)


def test_positional_arguments_of_any_number_are_part_of_the_key_in_their_order() -> None:
    assert everything(1, 2).key == everything(1, 2).key
    assert len({everything(1, 2).key, everything(2, 1).key, everything(1).key, everything((1, 2)).key}) == 4


def test_keyword_arguments_of_any_name_are_part_of_the_key_in_no_order() -> None:
    assert everything(a=1, b="2").key == everything(b="2", a=1).key
    assert everything(a=1, b="2").key != everything(a="2", b=1).key


def test_the_key_says_which_call_it_is() -> None:
    assert repr(prices("BTC").key) == "prices(symbol='BTC', exchange='NYSE', depth=1)"


async def test_the_function_is_called_with_the_arguments_as_they_were_given() -> None:
    assert await first_event(prices("BTC", depth=5)) == "BTC NYSE 5"
    assert await first_event(everything(1, 2, b=3, a=4)) == ((1, 2), {"b": 3, "a": 4})


async def test_equal_calls_share_one_upstream() -> None:
    one, two = prices("BTC"), prices("BTC", exchange="NYSE")
    async with SharedStreamManager() as manager, manager.subscribe(one), manager.subscribe(two) as stream:
        assert len(manager.statistics().groups) == 1
        assert stream.key == one.key


async def test_a_function_that_makes_a_context_manager_may_be_decorated() -> None:
    assert await first_event(managed("BTC")) == 0


class Exchange:
    def __init__(self, name: str) -> None:
        self.name = name

    @shared_source
    async def prices(self, symbol: str) -> AsyncGenerator[str, None]:
        yield f"{symbol} at {self.name}"
        await anyio.sleep_forever()

    @staticmethod
    @shared_source
    async def news() -> AsyncGenerator[str, None]:
        yield "news"
        await anyio.sleep_forever()


async def test_the_key_of_a_methods_source_contains_the_instance() -> None:
    here, there = Exchange("here"), Exchange("there")
    assert here.prices("BTC").key == here.prices(symbol="BTC").key
    assert here.prices("BTC").key != there.prices("BTC").key
    assert await first_event(there.prices("BTC")) == "BTC at there"


async def test_the_key_of_a_static_methods_source_contains_no_instance() -> None:
    assert Exchange("here").news().key == Exchange("there").news().key == Exchange.news().key
    assert await first_event(Exchange.news()) == "news"


async def test_a_plain_function_may_be_decorated_and_keeps_its_name_and_docstring() -> None:
    @shared_source
    def documented() -> AsyncIterator[int]:
        """Says what it is for."""
        return numbers()

    assert (documented.__name__, documented.__doc__) == ("documented", "Says what it is for.")
    assert await first_event(documented()) == 0


async def test_a_callable_that_is_no_function_may_be_decorated() -> None:
    assert await first_event(shared_source(functools.partial(numbers, "BTC"))()) == 0


def test_the_key_of_a_callable_without_a_name_shows_the_callable() -> None:
    function = functools.partial(numbers, "BTC")
    assert repr(shared_source(function)().key).startswith(repr(function))


async def a_coroutine_function() -> None:
    """Not a source: it gives nothing to iterate over."""


@pytest.mark.parametrize("function", [42, a_coroutine_function, functools.partial(a_coroutine_function), lambda: (yield), min])
def test_what_is_no_source_function_is_refused_and_named(function: Any) -> None:
    for decorate in (shared_source, shared_source()):
        with pytest.raises(TypeError) as caught:
            decorate(function)
        assert repr(function) in str(caught.value)


@pytest.mark.parametrize(
    ("args", "kwargs", "named"),
    [
        ((), {}, "symbol"),
        (("BTC", "NYSE", 1), {}, "too many positional arguments"),
        (("BTC",), {"symbol": "BTC"}, "symbol"),
        (("BTC",), {"colour": "red"}, "colour"),
    ],
)
def test_arguments_that_do_not_bind_are_refused_and_named(args: Any, kwargs: Any, named: str) -> None:
    with pytest.raises(TypeError) as caught:
        prices(*args, **kwargs)
    assert "prices(symbol" in str(caught.value)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: prices(["BTC"]), "argument symbol=['BTC']"),  # type: ignore[arg-type]
        (lambda: prices("BTC", depth={}), "argument depth={}"),  # type: ignore[arg-type]
        (lambda: everything([1], 2), "argument args=([1], 2)"),
        (lambda: everything(b=[1], a=2), "argument kwargs=(('a', 2), ('b', [1]))"),
    ],
)
def test_arguments_that_cannot_be_hashed_are_refused_and_named(make: Callable[[], object], named: str) -> None:
    with pytest.raises(TypeError) as caught:
        make()
    assert named in str(caught.value)


@pytest.mark.parametrize("source", [42, numbers, prices, numbers()], ids=["number", "function", "decorated", "generator"])
async def test_subscribing_to_what_is_no_source_is_refused_and_leaves_no_state(source: Any) -> None:
    async with SharedStreamManager() as manager:
        with pytest.raises(TypeError) as caught:
            manager.subscribe(source)
        assert repr(source) in str(caught.value)
        assert idle(manager)


async def test_a_key_whose_repr_fails_leaves_no_state() -> None:
    class Key:
        broken = True

        def __repr__(self) -> str:
            return {False: "a key"}[self.broken]

    key = Key()
    async with SharedStreamManager() as manager:
        stream = manager.subscribe(SharedSource(key=key, open=numbers))
        with pytest.raises(KeyError):
            await stream.__aenter__()
        assert idle(manager)
        key.broken = False
        async with stream:
            assert await stream.receive() == 0


# What may be opened, and that each is closed once, by the task that drove it.


class Watched:
    """What was opened: records which task drove and which closed it."""

    def __init__(self) -> None:
        self.drivers: set[int] = set()
        self.closers: list[int] = []

    def driven(self) -> None:
        self.drivers.add(anyio.get_current_task().id)

    def was_closed(self) -> None:
        self.closers.append(anyio.get_current_task().id)

    async def generator(self) -> AsyncGenerator[int, None]:
        try:
            while True:
                self.driven()
                yield 0
                await anyio.sleep_forever()
        finally:
            self.was_closed()

    def iterator(self) -> WatchedIterator:
        return WatchedIterator(self)

    def iterable(self) -> WatchedIterable:
        return WatchedIterable(self)

    def iterator_that_is_a_manager(self) -> WatchedStream:
        return WatchedStream(self)

    @asynccontextmanager
    async def manager_of_a_generator(self) -> AsyncIterator[AsyncGenerator[int, None]]:
        yield self.generator()  # and leaves it to be closed

    @asynccontextmanager
    async def manager_of_a_generator_that_it_closes(self) -> AsyncIterator[AsyncGenerator[int, None]]:
        generator = self.generator()
        try:
            yield generator
        finally:
            await generator.aclose()

    def manager_of_an_iterator(self) -> WatchedManager:
        return WatchedManager(self)


class WatchedIterator:
    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._events = [0]

    def __aiter__(self) -> WatchedIterator:
        return self

    async def __anext__(self) -> int:
        self._watched.driven()
        if not self._events:
            await anyio.sleep_forever()
        return self._events.pop()

    async def aclose(self) -> None:
        self._watched.was_closed()


class WatchedIterable:
    """Makes its iterator, which has no way to be closed, and is closed itself."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched

    async def _iterate(self) -> AsyncGenerator[int, None]:
        self._watched.driven()
        yield 0
        await anyio.sleep_forever()

    def __aiter__(self) -> AsyncIterator[int]:
        return self._iterate()

    async def aclose(self) -> None:
        self._watched.was_closed()


class WatchedStream(WatchedIterator):
    """Like anyio's streams: an iterator, a context manager, and something with an `aclose`, all in one."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()


class WatchedManager(AbstractAsyncContextManager[WatchedIterator]):
    def __init__(self, watched: Watched) -> None:
        self._iterator = watched.iterator()

    async def __aenter__(self) -> WatchedIterator:
        return self._iterator

    async def __aexit__(self, *error: object) -> None:
        await self._iterator.aclose()


async def leave(manager: SharedStreamManager, stream: Subscription[int]) -> None:
    await stream.aclose()


async def stop(manager: SharedStreamManager, stream: Subscription[int]) -> None:
    await manager.stop("feed")


@pytest.mark.parametrize("end", [leave, stop])
@pytest.mark.parametrize(
    "kind",
    [
        Watched.generator,
        Watched.iterator,
        Watched.iterable,
        Watched.iterator_that_is_a_manager,
        Watched.manager_of_a_generator,
        Watched.manager_of_a_generator_that_it_closes,
        Watched.manager_of_an_iterator,
    ],
    ids=lambda kind: kind.__name__,
)
async def test_whatever_was_opened_is_closed_once_by_the_task_that_drove_it(kind: Any, end: Any) -> None:
    watched = Watched()
    source = SharedSource(key="feed", open=lambda: kind(watched))
    async with SharedStreamManager() as manager, manager.subscribe(source) as stream:
        assert await stream.receive() == 0
        await end(manager, stream)
        assert len(watched.closers) == 1
    (driver,) = watched.drivers
    assert watched.closers == [driver]
    assert driver != anyio.get_current_task().id


async def test_a_receive_stream_of_anyios_may_be_opened_and_is_closed() -> None:
    send, receive = anyio.create_memory_object_stream[str](1)
    async with SharedStreamManager() as manager, send:
        async with manager.subscribe(SharedSource(key="feed", open=lambda: receive)) as stream:
            send.send_nowait("event")
            assert await stream.receive() == "event"
        with pytest.raises(anyio.BrokenResourceError):
            send.send_nowait("nobody is there")


async def test_an_iterable_with_nothing_to_close_may_be_opened() -> None:
    class Plain:
        def __aiter__(self) -> Plain:
            return self

        async def __anext__(self) -> None:
            await anyio.sleep_forever()

    async with SharedStreamManager() as manager, manager.subscribe(SharedSource(key="feed", open=Plain)) as stream:
        await settle()
        with pytest.raises(anyio.WouldBlock):
            stream.receive_nowait()


async def test_an_iterator_that_is_no_iterable_of_its_own_is_closed_before_what_gave_it() -> None:
    order: list[str] = []

    class Given:
        async def _iterate(self) -> AsyncGenerator[int, None]:
            try:
                yield 0
                await anyio.sleep_forever()
            finally:
                order.append("iterator")

        def __aiter__(self) -> AsyncIterator[int]:
            return self._iterate()

        async def aclose(self) -> None:
            order.append("iterable")

    assert await first_event(SharedSource(key="feed", open=Given)) == 0
    assert order == ["iterator", "iterable"]


async def test_a_generator_that_a_context_manager_gives_is_closed_before_that_is_left() -> None:
    """Also one that rests at a yield, and knows nothing of what has gone wrong."""
    order: list[str] = []

    @asynccontextmanager
    async def opened() -> AsyncIterator[AsyncIterator[int]]:
        try:
            yield given()
        finally:
            order.append("context manager")

    async def given() -> AsyncGenerator[int, None]:
        try:
            yield 0
        finally:
            order.append("generator")

    source = SharedSource(key="feed", open=opened, route_by=lambda event: 1 / event)
    async with SharedStreamManager() as manager, manager.subscribe(source) as stream:
        with pytest.raises(ZeroDivisionError):
            await stream.receive()
    assert order == ["generator", "context manager"]


@pytest.mark.parametrize("kind", [Watched.iterator, Watched.iterable], ids=["iterator", "iterable"])
async def test_what_was_opened_is_closed_when_its_iteration_has_failed(kind: Any) -> None:
    watched = Watched()

    def failing() -> None:
        raise ValueError("broken")

    watched.driven = failing  # type: ignore[method-assign]
    source = SharedSource(key="feed", open=lambda: kind(watched))
    async with SharedStreamManager() as manager, manager.subscribe(source) as stream:
        with pytest.raises(ValueError, match="broken"):
            await stream.receive()
        assert len(watched.closers) == 1


# A generator that rests at a yield is told of a cancellation there.


@pytest.mark.parametrize("turns", range(4))
async def test_a_generator_that_rests_at_a_yield_is_thrown_the_cancellation_and_not_closed(turns: int) -> None:
    thrown: list[BaseException] = []
    leavers = 30  # in whatever order the event loop runs what is ready together

    async def source() -> AsyncGenerator[int, None]:
        try:
            while True:
                yield 0
        except BaseException as exc:
            thrown.append(exc)
            raise

    async with SharedStreamManager(max_buffer_size=float("inf")) as manager:
        for _ in range(leavers):
            async with manager.subscribe(SharedSource(key="feed", open=source)) as stream:
                await stream.receive_batch(64)
                await settle(turns)
    assert [type(error) for error in thrown] == [get_cancelled_exc_class()] * leavers


@pytest.mark.parametrize("ready", [True, False], ids=["at a yield", "in an await"])
async def test_the_last_leave_is_no_failure_of_a_generator_with_a_task_group_over_its_yields(
    ready: bool, caplog: pytest.LogCaptureFixture
) -> None:
    ends: list[str] = []

    async def child() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ends.append("child")

    async def source() -> AsyncGenerator[int, None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child)
            await until(lambda: tasks)
            yield 0
            await settle()
            while ready:
                yield 0
            await anyio.sleep_forever()

    async with SharedStreamManager() as manager:
        async with manager.subscribe(SharedSource(key="feed", open=source)) as stream:
            await stream.receive()
            await stream.receive_batch(1) if ready else await settle()
        assert idle(manager)
    assert ends == ["child"]
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


async def test_a_scope_of_the_generators_own_may_be_cancelled_over_its_yield() -> None:
    feed = Feed()
    scopes: list[anyio.CancelScope] = []

    async def source() -> AsyncGenerator[str, None]:
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            while True:
                yield "before"
        async for event in feed.source.open():  # type: ignore[union-attr]
            yield event

    async with SharedStreamManager() as manager, manager.subscribe(SharedSource(key="feed", open=source)) as stream:
        assert await stream.receive() == "before"
        scopes[0].cancel()
        feed.emit("after")
        events: list[str] = []
        while "after" not in events:
            events.append(await stream.receive())
        assert set(events) <= {"before", "after"}


class Guarded:
    """An iterator that is no generator: holds a scope over its steps, cancels it in one of them, and meets that in the next."""

    def __init__(self) -> None:
        self._scope = anyio.CancelScope()
        self._steps = 0

    def __aiter__(self) -> Guarded:
        return self

    async def __anext__(self) -> str:
        self._steps += 1
        if self._steps == 1:
            self._scope.__enter__()
        if self._steps <= 64:  # then the library gives others their turn
            if self._steps == 64:
                self._scope.cancel()
            return "before"
        try:
            await anyio.sleep_forever()
        except get_cancelled_exc_class() as exc:
            caught = self._scope.__exit__(type(exc), exc, exc.__traceback__)
        assert caught
        return "after"


async def test_a_scope_of_an_iterators_own_may_be_cancelled_between_its_steps() -> None:
    async with SharedStreamManager() as manager, manager.subscribe(SharedSource(key="feed", open=Guarded)) as stream:
        assert [await stream.receive() for _ in range(65)] == ["before"] * 64 + ["after"]
