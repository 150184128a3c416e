"""An upstream that says nothing for too long has failed: to the second, whatever it is made of and does about it."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any

import anyio
import pytest
import structlog
from structlog.testing import LogCapture

from anyio_sharedstream import Block, Fold, Gap, Restart, SharedSource, SharedStreamManager, UpstreamSilent
from tests.support import Feed, idle, settle
from tests.sweep import Reader, drain, managed
from tests.virtual_time import in_virtual_time

IN_A_SECOND = Restart(initial_delay=1, jitter=0)


class Beats:
    """Yields at the given times, counted from its opening, and then hangs."""

    def __init__(self, *times: float) -> None:
        self.times = times
        self.opened_at: list[float] = []
        self.closed_at: list[float] = []

    def __aiter__(self) -> AsyncIterator[float]:
        self.opened_at.append(anyio.current_time())
        self.left = [self.opened_at[-1] + time for time in self.times] + [math.inf]
        return self

    async def __anext__(self) -> float:
        await anyio.sleep_until(self.left[0])
        return self.left.pop(0)

    async def aclose(self) -> None:
        self.closed_at.append(anyio.current_time())


def iterator(beats: Beats) -> Any:
    return beats


async def generator(beats: Beats) -> AsyncGenerator[float, None]:
    try:
        async for beat in beats:
            yield beat
    finally:
        await beats.aclose()


async def in_tasks(beats: Beats) -> AsyncGenerator[float, None]:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.sleep_forever)
        async for beat in generator(beats):
            yield beat


async def in_scopes(beats: Beats) -> AsyncGenerator[float, None]:
    with anyio.move_on_after(1000), anyio.fail_after(2000):
        async for beat in generator(beats):
            yield beat


@asynccontextmanager
async def manager_of_iterator(beats: Beats) -> AsyncIterator[Beats]:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.sleep_forever)
        try:
            yield beats
        finally:
            await beats.aclose()


@asynccontextmanager
async def manager_of_generator(beats: Beats) -> AsyncIterator[AsyncGenerator[float, None]]:
    with anyio.CancelScope():
        yield generator(beats)


KINDS: list[Callable[[Beats], Any]] = [iterator, generator, in_tasks, in_scopes, manager_of_iterator, manager_of_generator]
kinds = pytest.mark.parametrize("kind", KINDS)


@in_virtual_time
@kinds
@pytest.mark.parametrize("times", [[], [0], [1, 1.5, 6, 10], [4.5 * number for number in range(100)]], ids=len)
async def test_it_has_failed_so_many_seconds_after_its_last_event(kind: Callable[[Beats], Any], times: list[float]) -> None:
    beats = Beats(*times)
    source = SharedSource(key="beats", open=lambda: kind(beats), silence_timeout=5)
    async with managed() as manager, manager.subscribe(source) as one, manager.subscribe(source) as other:
        errors = []
        for stream in (one, other):
            reader = Reader(stream)
            await reader.run()
            assert reader.got == times
            assert isinstance(reader.terminal, UpstreamSilent)
            assert reader.terminal.args == ("beats", 5)
            errors.append(reader.terminal)
        assert errors[0] is not errors[1]
        assert anyio.current_time() == max(times, default=0) + 5
        assert beats.closed_at == [anyio.current_time()]
        assert "beats" not in manager.statistics().groups


@in_virtual_time
@kinds
async def test_with_a_restart_it_is_opened_again_and_again(kind: Callable[[Beats], Any]) -> None:
    beats = Beats(0, 1)
    source = SharedSource(key="beats", open=lambda: kind(beats), silence_timeout=5, restart=IN_A_SECOND)
    async with managed() as manager:
        async with manager.subscribe(source, gaps=True) as stream:
            await anyio.sleep(24)
            assert beats.opened_at == [0, 7, 15]
            assert beats.closed_at == [6, 13, 21]
            gap = Gap(None, "restart")
            assert drain(stream) == ([0, 1, gap, 7, 8, gap, 15, 16, gap], None)
            last_error = manager.statistics().groups["beats"].last_error
            assert isinstance(last_error, UpstreamSilent)
        assert idle(manager)


class NeverEntered(AbstractAsyncContextManager[Any]):
    async def __aenter__(self) -> None:
        await anyio.sleep_forever()

    async def __aexit__(self, *_: object) -> None: ...


@in_virtual_time
@pytest.mark.parametrize("open_", [NeverEntered, Beats, lambda: generator(Beats())])
async def test_it_counts_from_the_opening_and_not_from_what_the_opening_has_waited_for(open_: Callable[[], Any]) -> None:
    async with managed() as manager:
        source = SharedSource(key="never", open=open_, silence_timeout=5, cohort_grace=20)
        async with manager.subscribe(source) as stream:
            with pytest.raises(UpstreamSilent):
                await stream.receive()
            assert anyio.current_time() == 25
        async with manager.subscribe(SharedSource(key="never", open=open_, silence_timeout=5, restart=IN_A_SECOND)) as stream:
            await anyio.sleep(14)
            assert (stream.epoch, manager.statistics().groups["never"].restarts) == (3, 2)


@in_virtual_time
@pytest.mark.parametrize(
    ("on", "restarted"),
    [(UpstreamSilent, True), (lambda error: error.args == ("feed", 5), True), (Exception, True), (ConnectionError, False)],
)
async def test_whether_it_is_opened_again_is_for_on_to_say(on: Any, restarted: bool) -> None:
    feed = Feed()
    source = feed.asking_for(silence_timeout=5, restart=Restart(initial_delay=1, jitter=0, on=on))
    async with managed(feed) as manager, manager.subscribe(source) as stream:
        await anyio.sleep(6.5)
        assert feed.opened == 1 + restarted
        assert type(drain(stream)[1]) is (type(None) if restarted else UpstreamSilent)


@in_virtual_time
@kinds
async def test_time_for_which_a_subscriber_holds_it_does_not_count(kind: Callable[[Beats], Any]) -> None:
    beats = Beats(0, 0, 0)
    source = SharedSource(key="beats", open=lambda: kind(beats), silence_timeout=5)
    async with managed() as manager, manager.subscribe(source, max_buffer_size=1, overflow=Block(math.inf)) as stream:
        for moment in (4, 40, 43):
            await anyio.sleep_until(moment)
            assert await stream.receive() == 0
        with pytest.raises(UpstreamSilent):
            await stream.receive()
        assert anyio.current_time() == 48


@in_virtual_time
async def test_time_without_subscribers_counts() -> None:
    feed = Feed()
    source = feed.asking_for(silence_timeout=5, linger=100, restart=IN_A_SECOND)
    async with managed(feed) as manager:
        async with manager.subscribe(source):
            await anyio.sleep(2)
            feed.emit("event")
            await anyio.sleep(1)
        await anyio.sleep_until(6.5)
        assert manager.statistics().groups["feed"].state == "lingering"
        await anyio.sleep_until(7.5)
        assert idle(manager)
        assert feed.opened == 1
        async with manager.subscribe(source) as stream:
            feed.emit("event")
            assert await stream.receive() == "event"


@in_virtual_time
async def test_events_that_nobody_wants_are_events() -> None:
    beats = Beats(*range(50))
    source = SharedSource(key="beats", open=lambda: beats, silence_timeout=5)
    async with managed() as manager, manager.subscribe(source, where=lambda event: False) as stream:
        with pytest.raises(UpstreamSilent):
            await stream.receive()
        assert anyio.current_time() == 54


@in_virtual_time
@pytest.mark.parametrize("restart", [None, IN_A_SECOND])
@pytest.mark.parametrize("fold", [None, Fold(0, lambda state, event: state + event)], ids=["plain", "fold"])
async def test_what_it_yields_when_it_is_told_is_published_to_nobody(fold: Fold | None, restart: Restart | None) -> None:
    """It swallows the cancellation and yields on: that is part of its clean-up, and breaks nothing."""
    closed_at: list[float] = []

    async def stubborn() -> AsyncGenerator[int, None]:
        try:
            yield 1
            with suppress(anyio.get_cancelled_exc_class()):
                await anyio.sleep_forever()
            yield 2
        finally:
            closed_at.append(anyio.current_time())

    source = SharedSource(key="stubborn", open=stubborn, silence_timeout=5, restart=restart, fold=fold)
    async with managed() as manager, manager.subscribe(source) as stream:
        await anyio.sleep(20)
        events, terminal = drain(stream)
    if restart is None:
        assert (events, closed_at[0]) == ([1], 5)
        assert isinstance(terminal, UpstreamSilent)
    else:
        assert (events, terminal) == ([1, 1, 1], None)
        assert closed_at == [5, 11, 18]


@in_virtual_time
async def test_an_error_of_its_own_comes_first() -> None:
    async def impatient() -> AsyncGenerator[float, None]:
        with anyio.fail_after(3):
            async for beat in Beats(1):
                yield beat

    source = SharedSource(key="impatient", open=impatient, silence_timeout=5)
    async with managed() as manager, manager.subscribe(source) as stream:
        assert await stream.receive() == 1
        with pytest.raises(TimeoutError):
            await stream.receive()
        assert anyio.current_time() == 3


@in_virtual_time
async def test_an_event_at_the_last_moment_either_counts_or_does_not() -> None:
    for _ in range(20):
        beats = Beats(5)
        source = SharedSource(key="beats", open=lambda beats=beats: generator(beats), silence_timeout=5)  # type: ignore[misc]
        async with managed() as manager, manager.subscribe(source) as stream:
            reader = Reader(stream)
            await reader.run()
            assert anyio.current_time() - beats.opened_at[0] == 5 + 5 * len(reader.got)
            assert isinstance(reader.terminal, UpstreamSilent)


async def fails_to_end(beats: Beats) -> AsyncGenerator[float, None]:
    try:
        async for beat in beats:
            yield beat
    finally:
        raise ValueError("clean-up")


@asynccontextmanager
async def manager_fails_to_end(beats: Beats) -> AsyncIterator[AsyncGenerator[float, None]]:
    try:
        yield generator(beats)
    finally:
        raise ValueError("clean-up")


class Unclosable(Beats):
    async def aclose(self) -> None:
        raise ValueError("clean-up")


@in_virtual_time
@pytest.mark.parametrize("restart", [None, IN_A_SECOND])
@pytest.mark.parametrize("kind", [fails_to_end, manager_fails_to_end, lambda beats: Unclosable(*beats.times)])
async def test_what_goes_wrong_in_its_clean_up_is_logged_and_takes_the_place_of_nothing(
    kind: Callable[[Beats], Any], restart: Restart | None
) -> None:
    lines = LogCapture()
    beats = Beats(0)
    source = SharedSource(key="beats", open=lambda: kind(beats), silence_timeout=5, restart=restart)
    logger: Any = structlog.wrap_logger(None, processors=[lines])
    async with SharedStreamManager(logger=logger) as manager, manager.subscribe(source) as stream:
        await anyio.sleep(5.5)
        assert drain(stream)[0] == [0]
        errors = [line["exc_info"] for line in lines.entries if line["log_level"] in ("error", "warning")]
        assert sorted(type(error).__name__ for error in errors) == ["UpstreamSilent", "ValueError"]
        assert type(drain(stream)[1]) is (UpstreamSilent if restart is None else type(None))
        group = manager.statistics().groups.get("beats")
        assert group is None or isinstance(group.last_error, UpstreamSilent)


@in_virtual_time
async def test_an_interrupt_in_its_clean_up_leaves_the_manager() -> None:
    async def interrupted() -> AsyncGenerator[int, None]:
        try:
            yield 1
            await anyio.sleep_forever()
        finally:
            raise KeyboardInterrupt

    async def main() -> None:
        source = SharedSource(key="interrupted", open=interrupted, silence_timeout=5, restart=IN_A_SECOND)
        async with SharedStreamManager() as manager, manager.subscribe(source):
            await anyio.sleep_forever()

    with pytest.raises(KeyboardInterrupt):
        await main()
    assert anyio.current_time() == 5


@in_virtual_time
@pytest.mark.parametrize("moment", [2, 5])
async def test_who_ends_it_before_or_at_that_moment_leaves_no_timer_behind(moment: float) -> None:
    for end in ("leave", "stop"):
        feed = Feed()
        async with managed(feed) as manager:
            async with manager.subscribe(feed.asking_for(silence_timeout=5, restart=IN_A_SECOND)):
                await anyio.sleep(moment)
                if end == "stop":
                    await manager.stop("feed")
            await settle()
            assert idle(manager)
            await anyio.sleep(100)
            assert feed.opened == 1


@in_virtual_time
async def test_the_key_is_free_at_once_and_subscribers_are_told_when_it_has_closed() -> None:
    feed = Feed()
    source = feed.asking_for(silence_timeout=5)
    async with managed(feed) as manager, manager.subscribe(source) as stream:
        feed.clean_up = anyio.Event()
        await anyio.sleep(6)
        assert "feed" not in manager.statistics().groups
        assert drain(stream) == ([], None)
        async with manager.subscribe(source) as fresh:
            await anyio.sleep(10)
            assert feed.opened == 1
            feed.clean_up.set()
            with pytest.raises(UpstreamSilent):
                await stream.receive()
            feed.emit("event")
            assert await fresh.receive() == "event"


@in_virtual_time
async def test_one_that_keeps_all_other_times_as_well_is_silent_all_the_same() -> None:
    feed = Feed()
    source = feed.asking_for(cohort_grace=1, silence_timeout=3, close_timeout=5)
    async with managed(feed) as manager, manager.subscribe(source) as stream:
        with pytest.raises(UpstreamSilent):
            await stream.receive()
        assert anyio.current_time() == 4
