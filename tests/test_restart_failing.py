"""Which failures an upstream is opened again after, when, and for how often."""

from __future__ import annotations

import math
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import anyio
import pytest
from anyio.lowlevel import checkpoint

from anyio_sharedstream import AckSource, Fold, PollTerminated, Restart, SharedSource, SharedStreamManager
from tests.support import Feed, idle, settle, until
from tests.sweep import Reader, drain, managed
from tests.trigger_support import cancellation
from tests.virtual_time import in_virtual_time


def at_once(on: Any = Exception) -> Restart:
    return Restart(initial_delay=0, jitter=0, on=on)


class Attempts:
    """A source that yields one event, lives for as long as it is told, and fails; the last opening lives on."""

    def __init__(self, *lives: float) -> None:
        self.lives = [*lives, math.inf]
        self.opened_at: list[float] = []

    async def open(self) -> AsyncGenerator[int, None]:
        self.opened_at.append(anyio.current_time())
        number = len(self.opened_at)
        yield number
        await anyio.sleep(self.lives.pop(0))
        raise ConnectionError(f"attempt {number}")

    async def run(self, restart: Restart) -> BaseException | None:
        """Subscribe until the last opening lives, or all is over; returns the terminal."""
        source = SharedSource(key="attempts", open=self.open, restart=restart)
        async with managed() as manager, manager.subscribe(source) as stream:
            with anyio.move_on_after(10_000):
                await Reader(stream).run()
            return drain(stream)[1]


@in_virtual_time
async def test_delays_grow_from_the_first_to_the_longest() -> None:
    attempts = Attempts(*[0] * 7)
    await attempts.run(Restart(initial_delay=1, factor=3, max_delay=20, jitter=0))
    assert attempts.opened_at == [0, 1, 4, 13, 33, 53, 73, 93]


@in_virtual_time
@pytest.mark.parametrize(
    ("initial", "factor", "longest", "expected"),
    [(2, 1, 30, [0, 2, 4, 6]), (0, 2, 30, [0, 0, 0, 0]), (3, 10, 3, [0, 3, 6, 9]), (0, 1, 0, [0, 0, 0, 0])],
)
async def test_delays_may_be_constant_or_none(initial: float, factor: float, longest: float, expected: list[float]) -> None:
    attempts = Attempts(0, 0, 0)
    await attempts.run(Restart(initial_delay=initial, factor=factor, max_delay=longest, jitter=0))
    assert attempts.opened_at == expected


@in_virtual_time
@pytest.mark.parametrize(("drawn", "expected"), [(0.0, [0, 4, 12, 28]), (0.5, [0, 3, 9, 21]), (1.0, [0, 2, 6, 14])])
async def test_jitter_shortens_each_delay_by_a_random_part_and_none_of_it_accumulates(
    drawn: float, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "random", lambda: drawn)
    attempts = Attempts(0, 0, 0)
    await attempts.run(Restart(initial_delay=4, jitter=0.5))
    assert attempts.opened_at == expected


@in_virtual_time
async def test_only_a_life_longer_than_the_longest_delay_begins_the_delays_anew() -> None:
    attempts = Attempts(0, 0, 0, 8, 8.5, 0, 0)
    await attempts.run(Restart(initial_delay=1, max_delay=8, jitter=0))
    ends = [opened + lived for opened, lived in zip(attempts.opened_at, [0, 0, 0, 8, 8.5, 0, 0], strict=False)]
    assert [opened - ended for opened, ended in zip(attempts.opened_at[1:], ends, strict=True)] == [1, 2, 4, 8, 1, 2, 4]


@in_virtual_time
async def test_what_was_never_live_has_not_lived_however_short_the_longest_delay() -> None:
    opened_at: list[float] = []

    def refused() -> NoReturn:
        opened_at.append(anyio.current_time())
        raise ConnectionError

    source: SharedSource[Any] = SharedSource(
        key="refused", open=refused, restart=Restart(initial_delay=0.125, max_delay=0.5, jitter=0)
    )
    async with managed() as manager, manager.subscribe(source):
        await anyio.sleep(1.5)
    assert opened_at == [0, 0.125, 0.375, 0.875, 1.375]


@in_virtual_time
async def test_too_many_restarts_in_a_while_make_the_last_error_final() -> None:
    attempts = Attempts(0, 0, 0, 0)
    terminal = await attempts.run(Restart(initial_delay=1, factor=1, jitter=0, max_restarts=2, within=2.5))
    assert attempts.opened_at == [0, 1, 2]
    assert isinstance(terminal, ConnectionError)
    assert str(terminal) == "attempt 3"
    attempts = Attempts(0)
    assert isinstance(await attempts.run(Restart(max_restarts=0)), ConnectionError)
    assert len(attempts.opened_at) == 1


@in_virtual_time
async def test_restarts_longer_ago_are_not_counted() -> None:
    attempts = Attempts(*[0] * 20)  # a failure every second: of the two before, the first is just long enough ago
    assert await attempts.run(Restart(initial_delay=1, factor=1, jitter=0, max_restarts=2, within=2)) is None
    assert len(attempts.opened_at) == 21
    attempts = Attempts(*[9] * 4)  # healthy ones count as well, for ever
    assert await attempts.run(Restart(initial_delay=1, max_delay=1, jitter=0, max_restarts=3, within=math.inf)) is not None
    assert [opened - attempts.opened_at[0] for opened in attempts.opened_at] == [0, 10, 20, 30]


async def test_a_failure_that_no_restart_follows_frees_the_key_before_the_iterator_has_closed() -> None:
    closing = anyio.Event()

    class Source:
        def __aiter__(self) -> Source:
            return self

        async def __anext__(self) -> str:
            raise ValueError("broken")

        async def aclose(self) -> None:
            await closing.wait()

    async with managed() as manager:
        source = SharedSource(key="feed", open=Source, restart=at_once(KeyError))
        async with manager.subscribe(source) as stream:
            await settle()
            assert ([*manager.statistics().groups], [group.key for group in manager.statistics().closing]) == ([], ["feed"])
            closing.set()
            with pytest.raises(ValueError, match="broken"):
                await stream.receive()


# What is opened, the first time so that it fails.


async def well() -> AsyncGenerator[str, None]:
    yield "well"
    await anyio.sleep_forever()


async def lose(error: Exception | None = None) -> NoReturn:
    await checkpoint()
    raise error or ConnectionError("lost")


def no_upstream(broken: bool) -> Any:
    if broken:
        raise ConnectionError("lost")
    return well()


async def generator(broken: bool) -> AsyncGenerator[str, None]:
    if broken:
        await lose()
    async for event in well():
        yield event


class Unreadable:
    def __aiter__(self) -> AsyncIterator[str]:
        raise ConnectionError("lost")


def no_iterator(broken: bool) -> Any:
    return Unreadable() if broken else well()


class Broken:
    """Fails, and fails to close as well, which is not what anybody asks about."""

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        await lose()

    async def aclose(self) -> None:
        raise KeyError("clean-up")


def broken_iterator(broken: bool) -> Any:
    return Broken() if broken else well()


@asynccontextmanager
async def not_entered(broken: bool) -> AsyncIterator[Any]:
    if broken:
        await lose()
    yield well()


@asynccontextmanager
async def translated(broken: bool) -> AsyncIterator[Any]:
    async def other() -> AsyncGenerator[str, None]:
        yield await lose(KeyError("translated"))

    try:
        yield other() if broken else well()
    except KeyError as exc:
        raise ConnectionError("lost") from exc


@asynccontextmanager
async def in_the_background(broken: bool) -> AsyncIterator[Any]:
    sends, receives = anyio.create_memory_object_stream[str]()
    with sends, receives:
        async with anyio.create_task_group() as tasks:
            if broken:
                tasks.start_soon(lose)
            yield receives if broken else well()


KINDS: list[Callable[[bool], Any]] = [
    no_upstream,
    generator,
    no_iterator,
    broken_iterator,
    not_entered,
    translated,
    in_the_background,
]


def unreliable(open_: Callable[[bool], Any], **policies: Any) -> SharedSource[Any]:
    """Fails when it is opened first, and never again."""
    broken: Iterator[bool] = iter([True])
    return SharedSource(key="unreliable", open=lambda: open_(next(broken, False)), **policies)


def failing(error: BaseException) -> Callable[[bool], Any]:
    async def source(broken: bool) -> AsyncGenerator[str, None]:
        if broken:
            raise error
        yield "well"
        await anyio.sleep_forever()

    return source


async def outcome(source: SharedSource[Any]) -> tuple[int, Any]:
    """How often the source was opened, and what a subscriber received, be that an event or the terminal."""
    async with managed() as manager, manager.subscribe(source) as stream:
        try:
            return 2, (await stream.receive(), stream.epoch)
        except Exception as exc:
            assert "unreliable" not in manager.statistics().groups
            return stream.epoch, exc


@pytest.mark.parametrize("kind", KINDS)
async def test_whatever_part_of_it_fails_the_error_that_leaves_it_decides(kind: Callable[[bool], Any]) -> None:
    assert await outcome(unreliable(kind, restart=at_once(ConnectionError))) == (2, ("well", 2))
    opened, terminal = await outcome(unreliable(kind, restart=at_once(KeyError)))
    assert opened == 1
    if kind is in_the_background:
        (terminal,) = terminal.exceptions
    assert isinstance(terminal, ConnectionError)
    assert terminal.args == ("lost",)


LOST, BROKEN = ConnectionResetError("lost"), ValueError("broken")
BOTH = ExceptionGroup("both", [LOST, ExceptionGroup("inner", [BROKEN])])


@pytest.mark.parametrize(
    ("on", "error", "restarted"),
    [
        (Exception, LOST, True),
        (BaseException, LOST, True),
        (ConnectionError, LOST, True),
        (ConnectionError, BROKEN, False),
        ((KeyError, ValueError), BROKEN, True),
        ((KeyError, ValueError), LOST, False),
        (lambda error: error.args, LOST, True),
        (lambda error: error is not BROKEN, BROKEN, False),
        (Exception, BOTH, True),
        (OSError, ExceptionGroup("one", [ExceptionGroup("inner", [LOST])]), True),
        (OSError, BOTH, False),
        ((OSError, ValueError), BOTH, True),
        (ExceptionGroup, BOTH, True),
        (lambda error: error is BOTH, BOTH, True),
        (PollTerminated, anyio.EndOfStream(), True),
        (anyio.EndOfStream, anyio.EndOfStream(), False),
        (lambda error: isinstance(error, PollTerminated), anyio.WouldBlock(), True),
    ],
)
async def test_only_wanted_errors_are_restarted_after(on: Any, error: Exception, restarted: bool) -> None:
    opened, got = await outcome(unreliable(failing(error), restart=at_once(on)))
    if restarted:
        assert (opened, got) == (2, ("well", 2))
    else:
        assert opened == 1
        assert got is not error
        assert isinstance(got, type(error) if not isinstance(error, anyio.EndOfStream) else PollTerminated)


@pytest.mark.parametrize(("on", "restarted"), [(Exception, True), (PollTerminated, True), (ConnectionError, False)])
async def test_a_cancellation_that_nobody_asked_for_is_restarted_after_as_poll_terminated(on: Any, restarted: bool) -> None:
    async def cancelled(broken: bool) -> AsyncGenerator[str, None]:
        if broken:
            raise await cancellation()
        yield "well"
        await anyio.sleep_forever()

    opened, got = await outcome(unreliable(cancelled, restart=at_once(on)))
    assert (got == ("well", 2)) if restarted else (opened == 1 and isinstance(got, PollTerminated))


class CancelledOpening:
    async def __aenter__(self) -> AsyncIterator[str]:
        raise await cancellation()

    async def __aexit__(self, *_: object) -> None:
        """Is not called, for it was not entered."""


async def test_what_is_cancelled_before_it_is_iterated_over_has_not_returned() -> None:
    source = SharedSource(key="feed", open=CancelledOpening, on_exhausted="end")
    async with managed() as manager, manager.subscribe(source) as stream:
        with pytest.raises(PollTerminated, match="terminated: it was cancelled, and nobody had asked for that; "):
            await stream.receive()


async def test_the_final_error_is_the_original_and_everyone_has_a_copy() -> None:
    source = unreliable(generator, restart=Restart(max_restarts=0))
    async with managed() as manager, manager.subscribe(source) as one, manager.subscribe(source) as other:
        errors = []
        for stream in (one, other):
            with pytest.raises(ConnectionError, match="lost") as caught:
                await stream.receive()
            assert "lose" in [entry.name for entry in caught.traceback]
            errors.append(caught.value)
        assert errors[0] is not errors[1]


async def test_a_predicate_is_told_of_which_key_an_upstream_has_terminated() -> None:
    seen: list[Any] = []
    feed = Feed()
    feed.fail(anyio.EndOfStream())
    source = feed.asking_for(restart=Restart(on=seen.append))
    async with managed(feed) as manager, manager.subscribe(source) as stream:
        with pytest.raises(PollTerminated) as caught:
            await stream.receive()
    assert [error.key for error in (*seen, caught.value)] == ["feed", "feed"]


class SlowToClose:
    """An iterator that fails at once, and takes five seconds to close."""

    def __aiter__(self) -> SlowToClose:
        return self

    async def __anext__(self) -> Any:
        raise ZeroDivisionError

    async def aclose(self) -> None:
        await anyio.sleep(5)

    # A producer, too.

    open_stream = __aiter__

    async def advance(self, batch: object) -> None:
        """Nothing is ever advanced."""


NEVER_AFTER_THIS = Restart(on=OSError)


@pytest.mark.parametrize(
    "source",
    [
        SharedSource(key="feed", open=SlowToClose, restart=NEVER_AFTER_THIS),
        AckSource("feed", SlowToClose, restart=NEVER_AFTER_THIS),
    ],
    ids=["plain", "acknowledged"],
)
@in_virtual_time
async def test_a_failure_that_no_restart_follows_frees_the_key_before_the_clean_up_begins(source: Any) -> None:
    async with managed() as manager, manager.subscribe(source):
        await anyio.sleep(1)
        assert not manager.statistics().groups
        assert [group.state for group in manager.statistics().closing] == ["closing"]


async def test_a_predicate_that_fails_has_the_last_word() -> None:
    asked: list[Exception] = []

    def confused(error: Exception) -> bool:
        asked.append(error)
        raise LookupError("confused")

    opened, terminal = await outcome(unreliable(generator, restart=at_once(confused)))
    assert opened == 1
    assert isinstance(terminal, LookupError)
    assert isinstance(terminal.__cause__, ConnectionError)
    assert [type(error) for error in asked] == [ConnectionError]


async def test_a_predicate_may_close_the_last_subscription() -> None:
    async with managed() as manager:

        def close(error: Exception) -> bool:
            stream.close()
            return True

        source = unreliable(generator, restart=at_once(close))
        stream = await manager.subscribe(source).__aenter__()
        await until(lambda: idle(manager))
        assert stream.epoch == 1


def interrupted(_: Exception) -> bool:
    raise KeyboardInterrupt


@asynccontextmanager
async def interrupted_at_its_end(broken: bool) -> AsyncIterator[Any]:
    try:
        yield generator(broken)
    except ConnectionError:
        raise KeyboardInterrupt from None


@pytest.mark.parametrize(
    ("kind", "on"),
    [
        (failing(KeyboardInterrupt()), BaseException),
        (failing(KeyboardInterrupt()), lambda error: True),
        (failing(BaseExceptionGroup("several", [KeyboardInterrupt()])), BaseException),
        (failing(BaseExceptionGroup("several", [KeyboardInterrupt(), ValueError()])), (BaseException, Exception)),
        (interrupted_at_its_end, BaseException),
        (generator, interrupted),
    ],
)
async def test_an_interrupt_is_never_restarted_after_and_leaves_the_manager(kind: Callable[[bool], Any], on: Any) -> None:
    streams: list[Any] = []

    async def main() -> None:
        async with SharedStreamManager() as manager:
            streams.append(await manager.subscribe(unreliable(kind, restart=at_once(on))).__aenter__())
            await anyio.sleep_forever()

    with pytest.raises((KeyboardInterrupt, BaseExceptionGroup)) as caught:
        await main()
    assert isinstance(getattr(caught.value, "exceptions", [caught.value])[0], KeyboardInterrupt)
    received, terminal = drain(streams[0])
    assert not received
    assert isinstance(terminal, PollTerminated)
    assert streams[0].epoch == 1


def refuse(*_: object) -> NoReturn:
    raise KeyError("refused")


async def events(broken: bool) -> AsyncGenerator[int, None]:
    yield 1


@asynccontextmanager
async def misleading(broken: bool) -> AsyncIterator[Any]:
    try:
        yield events(broken)
    except KeyError as exc:
        raise ConnectionError("refused") from exc


@pytest.mark.parametrize("kind", [events, misleading])
@pytest.mark.parametrize(
    ("policies", "error"),
    [
        ({"route_by": refuse}, KeyError),
        ({"route_by": lambda event: [event]}, TypeError),
        ({"fold": Fold(0, refuse)}, KeyError),
        ({"fold": Fold(refuse, max)}, KeyError),
    ],
    ids=["route_by", "route", "step", "initial"],
)
async def test_what_the_functions_of_the_source_raise_is_final(
    kind: Callable[[bool], Any], policies: Any, error: type[Exception]
) -> None:
    opened, terminal = await outcome(unreliable(kind, restart=at_once(BaseException), **policies))
    translates = kind is misleading and error is KeyError and policies.get("fold") != Fold(refuse, max)
    assert opened == 1
    assert isinstance(terminal, ConnectionError if translates else error)


async def test_a_function_of_the_source_may_fail_after_restarts_too() -> None:
    states = iter([0])
    source = unreliable(generator, restart=at_once(), fold=Fold(lambda: next(states), lambda state, event: state))
    opened, terminal = await outcome(source)
    assert opened == 2
    assert isinstance(terminal, PollTerminated)  # for a StopIteration is not what a stream may raise
    assert isinstance(terminal.__cause__, StopIteration)
