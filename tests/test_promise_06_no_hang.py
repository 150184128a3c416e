"""Promise 6: every way in which an upstream can end reaches every subscriber."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import anyio
import pytest
from anyio import get_cancelled_exc_class
from anyio.lowlevel import checkpoint

from anyio_sharedstream import PollTerminated, SharedSource, SharedStreamManager, Subscription
from tests.conftest import on_asyncio
from tests.support import Feed, failing_to_close, idle, settle, until

Received = tuple[list[Any], Exception]


async def drain(stream: Subscription[Any], into: list[Received]) -> None:
    """Receive until the terminal, and record both."""
    events: list[Any] = []
    try:
        while True:
            events.append(await stream.receive())
    except Exception as terminal:
        into.append((events, terminal))


async def endings(
    manager: SharedStreamManager, open_: Callable[[], Any], act: Callable[[], object] = lambda: None
) -> list[Received]:
    """Subscribe a reader that waits, and one that reads when all is over; fail, rather than hang, if they do not end."""
    source: SharedSource[Any] = SharedSource(key="feed", open=open_)
    received: list[Received] = []
    async with manager.subscribe(source) as one, manager.subscribe(source) as two, anyio.create_task_group() as tasks:
        tasks.start_soon(drain, one, received)
        await settle()
        act()
        await until(lambda: len(received) == 1)
        assert "feed" not in manager.statistics().groups
        tasks.start_soon(drain, two, received)
        await until(lambda: len(received) == 2)
    return received


# Sources, each of which ends in a way of its own.


async def returns() -> AsyncGenerator[str, None]:
    yield "event"


async def returns_later() -> AsyncGenerator[str, None]:
    yield "event"
    await checkpoint()


async def raises() -> AsyncGenerator[str, None]:
    yield "event"
    raise ValueError("broken")


async def raises_later() -> AsyncGenerator[str, None]:
    yield "event"
    await checkpoint()
    raise ValueError("broken")


async def raises_a_group() -> AsyncGenerator[str, None]:
    yield "event"
    raise ExceptionGroup("broken", [ValueError("one"), OSError("two")])


async def has_a_failing_child() -> AsyncGenerator[str, None]:
    async def child() -> NoReturn:
        raise ValueError("a child's")

    async with anyio.create_task_group() as tasks:
        yield "event"
        tasks.start_soon(child)
        await anyio.sleep_forever()


async def raises_a_group_with_a_cancellation() -> AsyncGenerator[str, None]:
    yield "event"
    raise BaseExceptionGroup("broken", [ValueError("one"), await a_cancellation()])


async def leaks_end_of_stream() -> AsyncGenerator[str, None]:
    yield "event"
    raise anyio.EndOfStream


async def leaks_would_block() -> AsyncGenerator[str, None]:
    yield "event"
    raise anyio.WouldBlock


async def leaks_stop_async_iteration() -> AsyncGenerator[str, None]:
    yield "event"
    raise StopAsyncIteration  # Python turns this into a RuntimeError


async def fails_in_its_clean_up() -> AsyncGenerator[str, None]:
    try:
        yield "event"
    finally:
        raise OSError("clean-up")


async def fails_in_its_clean_up_after_a_failure() -> AsyncGenerator[str, None]:
    try:
        yield "event"
        raise ValueError("broken")
    finally:
        raise OSError("clean-up")


async def a_cancellation() -> BaseException:
    """The exception of a cancellation that is over."""
    leaked: BaseException | None = None
    with anyio.CancelScope() as scope:
        scope.cancel()
        try:
            await checkpoint()
        except get_cancelled_exc_class() as exc:
            leaked = exc
    assert leaked is not None
    return leaked


async def leaks_a_cancellation() -> AsyncGenerator[str, None]:
    yield "event"
    raise await a_cancellation()


async def leaks_a_group_of_cancellations() -> AsyncGenerator[str, None]:
    yield "event"
    raise BaseExceptionGroup("leaked", [await a_cancellation()])


class Iterator:
    """An iterator that gives one event, or none, and then raises."""

    def __init__(self, error: BaseException, events: int = 1) -> None:
        self._steps = [None] * events + [error]

    def __aiter__(self) -> Iterator:
        return self

    async def __anext__(self) -> str:
        error = self._steps.pop(0)
        if error is not None:
            raise error
        return "event"


class Unclosable(Iterator):
    async def aclose(self) -> None:
        raise OSError("clean-up")


class NotIterable:
    def __aiter__(self) -> NoReturn:
        raise ValueError("broken")


def cannot_be_opened() -> NoReturn:
    raise ValueError("broken")


def cannot_be_opened_and_says_stop() -> NoReturn:
    raise StopAsyncIteration


async def a_coroutine_function() -> None:
    """Not a source: it gives nothing to iterate over."""


class Manager:
    """A context manager around a source: its hooks are given."""

    def __init__(
        self,
        given: Callable[[], Any] = raises,
        entered: Callable[[], object] = lambda: None,
        left: Callable[[BaseException | None], object] = lambda error: None,
    ) -> None:
        self._given = given
        self._entered = entered
        self._left = left

    async def __aenter__(self) -> Any:
        self._entered()
        return self._given()

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        return bool(self._left(error))


def clean_up_fails(error: BaseException | None) -> None:
    raise OSError("clean-up") from error


def translate(error: BaseException | None) -> None:
    raise ConnectionError("lost") from error


def translate_to_end_of_stream(error: BaseException | None) -> None:
    raise anyio.EndOfStream from error


def given_no_iterable() -> Any:
    return 42


EVENT = ["event"]
ENDINGS = {
    "returns": (returns, EVENT, PollTerminated, "returned", None),
    "returns at once": (lambda: Iterator(StopAsyncIteration(), events=0), [], PollTerminated, "returned", None),
    "returns later": (returns_later, EVENT, PollTerminated, "returned", None),
    "exhausted iterator": (lambda: Iterator(StopAsyncIteration()), EVENT, PollTerminated, "returned", None),
    "raises": (raises, EVENT, ValueError, "broken", None),
    "raises later": (raises_later, EVENT, ValueError, "broken", None),
    "raising iterator": (lambda: Iterator(ValueError("broken")), EVENT, ValueError, "broken", None),
    "group": (raises_a_group, EVENT, ExceptionGroup, "broken (2 sub-exceptions)", None),
    "failing child": (has_a_failing_child, EVENT, ExceptionGroup, "(1 sub-exception)", None),
    "group with a cancellation": (raises_a_group_with_a_cancellation, EVENT, ExceptionGroup, "(1 sub-exception)", None),
    "EndOfStream": (leaks_end_of_stream, EVENT, PollTerminated, "EndOfStream", anyio.EndOfStream),
    "WouldBlock": (leaks_would_block, EVENT, PollTerminated, "WouldBlock", anyio.WouldBlock),
    "StopAsyncIteration": (leaks_stop_async_iteration, EVENT, RuntimeError, "StopAsyncIteration", StopAsyncIteration),
    "StopAsyncIteration on opening": (
        cannot_be_opened_and_says_stop,
        [],
        PollTerminated,
        "StopAsyncIteration",
        StopAsyncIteration,
    ),
    "cancellation": (leaks_a_cancellation, EVENT, PollTerminated, "cancelled", BaseException),
    "group of cancellations": (leaks_a_group_of_cancellations, EVENT, PollTerminated, "cancelled", BaseExceptionGroup),
    "open fails": (cannot_be_opened, [], ValueError, "broken", None),
    "open gives a number": (given_no_iterable, [], TypeError, "not 42", None),
    "open is a coroutine function": (a_coroutine_function, [], TypeError, "<coroutine object a_coroutine_function", None),
    "iterating fails": (NotIterable, [], ValueError, "broken", None),
    "entering fails": (lambda: Manager(entered=cannot_be_opened), [], ValueError, "broken", None),
    "manager gives a number": (lambda: Manager(given_no_iterable), [], TypeError, "not 42", None),
    "manager gives a coroutine": (lambda: Manager(a_coroutine_function), [], TypeError, "<coroutine object", None),
    "manager's source returns": (lambda: Manager(returns), EVENT, PollTerminated, "returned", None),
    "manager's source raises": (lambda: Manager(raises), EVENT, ValueError, "broken", None),
    "manager swallows": (lambda: Manager(raises, left=lambda error: True), EVENT, PollTerminated, "returned", ValueError),
    "manager translates": (lambda: Manager(raises, left=translate), EVENT, ConnectionError, "lost", ValueError),
    "manager translates a return": (lambda: Manager(returns, left=translate), EVENT, ConnectionError, "lost", None),
    "manager swallows a cancellation": (
        lambda: Manager(leaks_a_cancellation, left=lambda error: True),
        EVENT,
        PollTerminated,
        "returned",
        BaseException,
    ),
    "manager translates to EndOfStream": (
        lambda: Manager(raises, left=translate_to_end_of_stream),
        EVENT,
        PollTerminated,
        "EndOfStream",
        anyio.EndOfStream,
    ),
    "clean-up fails": (fails_in_its_clean_up, EVENT, OSError, "clean-up", None),
    "clean-up fails after a failure": (fails_in_its_clean_up_after_a_failure, EVENT, OSError, "clean-up", None),
    "leaving fails": (lambda: Manager(raises, left=clean_up_fails), EVENT, OSError, "clean-up", ValueError),
    "closing fails": (lambda: Unclosable(StopAsyncIteration()), EVENT, PollTerminated, "returned", None),
    "closing fails after a failure": (lambda: Unclosable(ValueError("broken")), EVENT, ValueError, "broken", None),
}


@pytest.mark.parametrize(("open_", "events", "kind", "message", "cause"), ENDINGS.values(), ids=ENDINGS.keys())
async def test_every_ending_reaches_every_subscriber(
    open_: Callable[[], Any], events: list[str], kind: type[Exception], message: str, cause: type[BaseException] | None
) -> None:
    async with SharedStreamManager() as manager:
        for received, terminal in await endings(manager, open_):
            assert received == events
            assert type(terminal) is kind
            assert message in str(terminal)
            assert isinstance(terminal.__cause__, cause or type(None))
        assert idle(manager)
        fresh = Feed("feed")
        async with manager.subscribe(fresh.source) as stream:
            fresh.emit("fresh")
            assert await stream.receive() == "fresh"


class Alarm(BaseException):
    """Not an `Exception`, and nobody's."""


FATAL = {
    "KeyboardInterrupt": lambda: KeyboardInterrupt("Ctrl-C"),
    "SystemExit": lambda: SystemExit(3),
    "another": lambda: Alarm("fire"),
    "group": lambda: BaseExceptionGroup("several", [ValueError("broken"), KeyboardInterrupt("Ctrl-C")]),
}


@pytest.mark.parametrize("opening", [True, False], ids=["opening", "iterating"])
@pytest.mark.parametrize("make", FATAL.values(), ids=FATAL.keys())
async def test_what_is_no_exception_ends_everybody_and_leaves_the_manager_as_itself(
    make: Callable[[], BaseException], opening: bool
) -> None:
    error = make()

    def open_() -> Iterator:
        if opening:
            raise error
        return Iterator(error)

    received: list[Received] = []
    siblings: list[Received] = []
    sibling = Feed("sibling")

    async def run() -> None:
        async with SharedStreamManager() as manager:
            for source, into in ((sibling.source, siblings), (SharedSource(key="feed", open=open_), received)):
                stream = manager.subscribe(source)
                await stream.__aenter__()
                readers.start_soon(drain, stream, into)
            await settle(10_000)  # until it is cancelled

    async with anyio.create_task_group() as readers:
        with pytest.raises(type(error)) as caught:
            await run()
    assert caught.value is error
    ((events, terminal),) = received
    assert events == EVENT[opening:]
    assert isinstance(terminal, PollTerminated)
    assert terminal.__cause__ is error
    ((_, end),) = siblings
    assert isinstance(end, anyio.EndOfStream)
    assert sibling.opened == sibling.closed


@pytest.mark.parametrize("make", FATAL.values(), ids=FATAL.keys())
async def test_what_is_no_exception_and_comes_out_of_a_clean_up_leaves_the_manager_as_itself(
    make: Callable[[], BaseException],
) -> None:
    error = make()

    async def run() -> None:
        async with SharedStreamManager() as manager, manager.subscribe(failing_to_close(error)) as stream:
            assert await stream.receive() == "event"

    with pytest.raises(type(error)) as caught:
        await run()
    assert caught.value is error


@on_asyncio
async def test_an_inner_task_that_was_cancelled_ends_the_subscribers() -> None:
    inner: asyncio.Future[None]

    async def source() -> AsyncGenerator[str, None]:
        nonlocal inner
        yield "event"
        inner = asyncio.ensure_future(anyio.sleep_forever())
        await inner

    async with SharedStreamManager() as manager:
        for events, terminal in await endings(manager, source, lambda: inner.cancel()):
            assert events == EVENT
            assert isinstance(terminal, PollTerminated)
            assert "cancelled" in str(terminal)
            assert isinstance(terminal.__cause__, asyncio.CancelledError)


@on_asyncio
@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize(
    "whom", [["poll"], ["shared stream"], ["poll", "shared stream"], ["shared stream", "poll"]], ids=" ".join
)
# A task that is cancelled before its first step never awaits the coroutine that anyio has wrapped in another.
@pytest.mark.filterwarnings("ignore:coroutine '_poll' was never awaited:RuntimeWarning")
async def test_a_native_cancellation_of_the_librarys_own_tasks_ends_the_subscribers(whom: list[str], turns: int) -> None:
    async def source() -> AsyncGenerator[str, None]:
        yield "event"
        await anyio.sleep_forever()

    others = asyncio.all_tasks()
    received: list[Received] = []
    async with SharedStreamManager() as manager, anyio.create_task_group() as readers:
        async with manager.subscribe(SharedSource(key="feed", open=source)) as stream:
            await until(lambda: len(asyncio.all_tasks() - others) == 2)  # the poll task, and the one that hosts it
            tasks = asyncio.all_tasks() - others
            await settle(turns)
            for name in whom:
                (task,) = (task for task in tasks if name in task.get_name())
                task.cancel()
            readers.start_soon(drain, stream, received)
            await until(lambda: received)
        ((events, terminal),) = received
        assert set(events) <= {"event"}
        assert isinstance(terminal, PollTerminated)
        assert terminal.reason == "it was cancelled, and nobody had asked for that"
        await until(lambda: idle(manager))


# After a leave or a stop, the poll task is cancelled; not everything gives way to that at once.


class Defiant:
    """Sources that are told of the cancellation and go on; each says when it has ended."""

    def __init__(self) -> None:
        self.over = False
        self.told = 0

    async def yields_again(self) -> AsyncGenerator[str, None]:
        try:
            yield "event"
            while True:
                try:
                    await anyio.sleep_forever()
                except get_cancelled_exc_class():
                    self.told += 1
                yield "too late"
        finally:
            self.over = True

    async def yields_again_at_its_yield(self) -> AsyncGenerator[str, None]:
        try:
            while True:
                try:
                    yield "event"
                except get_cancelled_exc_class():
                    self.told += 1
        finally:
            self.over = True

    async def shields_its_yields(self) -> AsyncGenerator[str, None]:
        try:
            with anyio.CancelScope(shield=True):
                while True:
                    yield "event"
        finally:
            self.over = True

    async def returns(self) -> AsyncGenerator[str, None]:
        yield "event"
        try:
            await anyio.sleep_forever()
        except get_cancelled_exc_class():
            self.over = True

    async def raises(self) -> AsyncGenerator[str, None]:
        yield "event"
        try:
            await anyio.sleep_forever()
        except get_cancelled_exc_class():
            self.over = True
            raise ValueError("broken") from None

    @asynccontextmanager
    async def swallows_in_its_manager(self) -> AsyncIterator[AsyncGenerator[str, None]]:
        try:
            yield self.yields_again()
        except get_cancelled_exc_class():
            self.over = True


class DefiantIterator:
    """An iterator, and no generator, that swallows a cancellation and goes on."""

    def __init__(self, defiant: Defiant, ready: bool) -> None:
        self._defiant = defiant
        self._ready = ready

    def __aiter__(self) -> DefiantIterator:
        return self

    async def __anext__(self) -> str:
        if not self._ready:
            try:
                await anyio.sleep_forever()
            except get_cancelled_exc_class():
                self._defiant.told += 1
        return "event"

    async def aclose(self) -> None:
        self._defiant.over = True


DEFIANCE: dict[str, Callable[[Defiant], Any]] = {
    "yields again": Defiant.yields_again,
    "yields again at its yield": Defiant.yields_again_at_its_yield,
    "shields its yields": Defiant.shields_its_yields,
    "returns": Defiant.returns,
    "raises": Defiant.raises,
    "swallows in its manager": Defiant.swallows_in_its_manager,
    "iterator": lambda defiant: DefiantIterator(defiant, ready=False),
    "ready iterator": lambda defiant: DefiantIterator(defiant, ready=True),
}
every_defiance = pytest.mark.parametrize("open_", DEFIANCE.values(), ids=DEFIANCE.keys())


@every_defiance
async def test_the_last_who_leaves_need_not_wait_for_a_source_that_goes_on_after_its_cancellation(
    open_: Callable[[Defiant], Any],
) -> None:
    defiant = Defiant()
    async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:

        async def visit() -> None:
            async with manager.subscribe(SharedSource(key="feed", open=lambda: open_(defiant))):
                await settle()

        tasks.start_soon(visit)
        await until(lambda: manager.statistics().groups)
        await until(lambda: idle(manager))
        assert defiant.over
        assert defiant.told <= 1


@every_defiance
async def test_stopping_ends_the_subscribers_of_a_source_that_goes_on_after_its_cancellation(
    open_: Callable[[Defiant], Any],
) -> None:
    defiant = Defiant()
    received: list[Received] = []
    async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:
        async with manager.subscribe(SharedSource(key="feed", open=lambda: open_(defiant))) as stream:
            tasks.start_soon(drain, stream, received)
            await settle()
            tasks.start_soon(manager.stop, "feed")
            await until(lambda: received and idle(manager))
        ((events, terminal),) = received
        assert isinstance(terminal, anyio.EndOfStream)
        assert set(events) <= {"event"}
        assert defiant.over


@pytest.mark.parametrize("swallow", [True, False], ids=["swallows", "raises"])
async def test_a_failure_whose_clean_up_is_cut_short_is_still_the_terminal(swallow: bool) -> None:
    # The last healthy subscriber does not leave, the manager is left; the upstream had failed before that.
    received: list[Received] = []
    cleaning = anyio.Event()

    @asynccontextmanager
    async def opened() -> AsyncIterator[AsyncGenerator[str, None]]:
        try:
            yield raises()
        finally:
            cleaning.set()
            try:
                await anyio.sleep_forever()
            except get_cancelled_exc_class():
                if not swallow:
                    raise

    async with anyio.create_task_group() as readers:
        async with SharedStreamManager() as manager:
            stream = manager.subscribe(SharedSource(key="feed", open=opened))
            await stream.__aenter__()
            readers.start_soon(drain, stream, received)
            await cleaning.wait()
            await settle()
            assert not received
        await until(lambda: received)
    ((events, terminal),) = received
    assert events == EVENT
    assert repr(terminal) == "ValueError('broken')"


async def test_a_subscriber_that_waits_is_told_when_the_manager_is_left() -> None:
    received: list[Received] = []
    feed = Feed()
    async with anyio.create_task_group() as readers:
        async with SharedStreamManager() as manager:
            stream = manager.subscribe(feed.source)
            await stream.__aenter__()
            readers.start_soon(drain, stream, received)
            feed.emit("event")
            await settle()
        await until(lambda: received)
    ((events, terminal),) = received
    assert events == EVENT
    assert isinstance(terminal, anyio.EndOfStream)


async def test_a_subscriber_that_waits_is_told_when_what_surrounds_the_manager_is_cancelled() -> None:
    received: list[Received] = []
    feed = Feed()

    async def run() -> None:
        async with SharedStreamManager() as manager:
            stream = manager.subscribe(feed.source)
            await stream.__aenter__()
            readers.start_soon(drain, stream, received)
            await anyio.sleep_forever()

    async with anyio.create_task_group() as readers:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            await until(lambda: feed.opened)
            tasks.cancel_scope.cancel()
        await until(lambda: received)
    ((_, terminal),) = received
    assert isinstance(terminal, anyio.EndOfStream)
    assert feed.closed == 1
