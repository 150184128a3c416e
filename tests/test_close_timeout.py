"""A clean-up that takes too long is waited for by the manager alone: everyone else goes on, to the second."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from typing import Any

import anyio
import pytest
import structlog
from structlog.testing import LogCapture

from anyio_sharedstream import Fold, Gap, PollTerminated, Restart, SharedSource, SharedStreamManager, Subscription, UpstreamSilent
from tests.support import Feed, idle, settle
from tests.sweep import Reader, RunFeed, drain, nothing_left
from tests.virtual_time import in_virtual_time

IN_A_SECOND = Restart(initial_delay=1, factor=1, jitter=0)
RESTARTED = Gap(None, "restart")
LATE = "clean-up takes too long"


class Stuck(RunFeed):
    """A feed inside a context manager whose exit takes, for each opening in turn, so many seconds, whatever is cancelled.

    :param error: what the exit then raises
    """

    def __init__(self, *seconds: float, error: BaseException | None = None) -> None:
        super().__init__("stuck")
        self.seconds = list(seconds)
        self.error = error
        self.opened_at: list[float] = []
        self.open_together = 0

    def asking_for(self, **policies: Any) -> SharedSource[Any]:
        return SharedSource(key=self.key, open=self.surround, **policies)

    @asynccontextmanager
    async def surround(self) -> AsyncIterator[AsyncGenerator[Any, None]]:
        seconds = self.seconds.pop(0) if self.seconds else 0
        self.opened_at.append(anyio.current_time())
        self.open_together += 1
        try:
            yield self._play()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(seconds)
            self.open_together -= 1
            self._complain(seconds)

    def _complain(self, seconds: float) -> None:
        if seconds and self.error is not None:
            raise self.error


class Logged:
    """A manager with a log that can be looked at; leaves no task behind."""

    def __init__(self) -> None:
        self.lines = LogCapture()

    def said(self, *levels: str) -> list[Any]:
        return [line["event"] for line in self.lines.entries if line["log_level"] in (levels or ("warning", "error"))]

    @asynccontextmanager
    async def manager(self) -> AsyncIterator[SharedStreamManager]:
        async with nothing_left(), SharedStreamManager(logger=structlog.wrap_logger(None, processors=[self.lines])) as manager:
            yield manager


def closing(manager: SharedStreamManager) -> list[tuple[str, int]]:
    return [(group.state, group.epoch) for group in manager.statistics().closing]


async def leave(manager: SharedStreamManager, stream: Subscription[Any]) -> None:
    await stream.aclose()


async def stop(manager: SharedStreamManager, stream: Subscription[Any]) -> None:
    await manager.stop("stuck")


async def stop_all(manager: SharedStreamManager, stream: Subscription[Any]) -> None:
    await manager.stop_all()


async def close_and_stop(manager: SharedStreamManager, stream: Subscription[Any]) -> None:
    stream.close()
    await manager.stop("stuck")


async def close_and_join(manager: SharedStreamManager, stream: Subscription[Any]) -> None:
    """The next group of the key opens at the moment when the others go on."""
    stream.close()
    next_one = Feed("stuck")
    async with manager.subscribe(next_one.asking_for(close_timeout=100)) as another:
        next_one.emit("event")
        assert await another.receive() == "event"
        assert next_one.opened == 1


WAYS = [leave, stop, stop_all, close_and_stop, close_and_join]


@in_virtual_time
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("timeout", [0, 3])
async def test_whoever_waits_goes_on_in_time_and_the_manager_waits_for_all(
    way: Callable[[SharedStreamManager, Any], Awaitable[None]], timeout: float
) -> None:
    feed, log = Stuck(50), Logged()
    async with log.manager() as manager:
        stream = await manager.subscribe(feed.asking_for(close_timeout=timeout)).__aenter__()
        await anyio.sleep(1)
        await way(manager, stream)
        assert anyio.current_time() == 1 + timeout
        assert feed.open_together == 1
        assert log.said() == [LATE]
        assert closing(manager) == [("closing", 1)]
        assert not manager.statistics().groups
        await manager.stop("stuck")  # this need not wait any more
        assert anyio.current_time() == 1 + timeout
    assert anyio.current_time() == 51
    assert feed.open_together == 0
    (late,) = [line for line in log.lines.entries if line["event"] == LATE]
    assert (late["key"], late["seconds"]) == ("stuck", timeout)
    assert log.said("info")[-1] == "group stopped"


@in_virtual_time
@pytest.mark.parametrize("way", [leave, stop, stop_all, close_and_stop])
@pytest.mark.parametrize("timeout", [3, None])
async def test_a_clean_up_that_ends_in_time_is_waited_for_and_not_worth_a_word(
    way: Callable[[SharedStreamManager, Any], Awaitable[None]], timeout: float | None
) -> None:
    feed, log = Stuck(2), Logged()
    async with log.manager() as manager:
        stream = await manager.subscribe(feed.asking_for(close_timeout=timeout)).__aenter__()
        await anyio.sleep(1)
        await way(manager, stream)
        assert anyio.current_time() == 3
        assert feed.open_together == 0
        await anyio.sleep(100)
        assert log.said() == []


@in_virtual_time
async def test_a_wait_that_is_cancelled_changes_nothing_for_the_next_group() -> None:
    feed, log = Stuck(50), Logged()
    async with log.manager() as manager:
        source = feed.asking_for(close_timeout=3)
        with anyio.move_on_after(2):
            async with manager.subscribe(source):
                await anyio.sleep(1)
        assert anyio.current_time() == 2
        async with manager.subscribe(source) as stream:
            feed.emit("event")
            assert await stream.receive() == (2, "event")
        assert feed.opened_at == [0, 4]


@in_virtual_time
@pytest.mark.parametrize("error", [None, KeyError("late")])
async def test_when_it_closes_at_last_nobody_is_told_twice(error: Exception | None) -> None:
    feed, log = Stuck(50, error=error), Logged()
    async with log.manager() as manager:
        async with manager.subscribe(feed.asking_for(close_timeout=3)) as one:
            reader = Reader(one)
            feed.emit("event")
            feed.fail(ConnectionError("lost"))
            await reader.run()
            assert anyio.current_time() == 3
            assert reader.got == [(1, "event")]
            assert isinstance(reader.terminal, ConnectionError)
            assert sorted(log.said()) == [LATE, "poll failed"]
            async with manager.subscribe(feed.asking_for(close_timeout=3)) as other:
                await anyio.sleep(60)
                feed.emit("event")
                assert await other.receive() == (2, "event")
            assert isinstance(drain(one)[1], ConnectionError)
        assert idle(manager)
        assert sorted(log.said()) == [*(["clean-up failed"] if error else []), LATE, "poll failed"]


@in_virtual_time
@pytest.mark.parametrize("error", [None, KeyError("late")])
async def test_the_next_opening_goes_on_beside_the_one_that_hangs(error: Exception | None) -> None:
    feed, log = Stuck(50, error=error), Logged()
    restart = Restart(initial_delay=1, jitter=0, on=ConnectionError)  # not what comes late
    async with log.manager() as manager:
        async with manager.subscribe(feed.asking_for(close_timeout=3, restart=restart), gaps=True) as stream:
            feed.emit("event")
            feed.fail(ConnectionError("lost"))
            await anyio.sleep(2)
            assert drain(stream) == ([(1, "event")], None)
            await anyio.sleep(3)
            assert feed.opened_at == [0, 4]
            assert feed.open_together == 2
            assert closing(manager) == [("closing", 1)]
            feed.emit("event")
            await anyio.sleep(60)
            assert feed.open_together == 1
            assert closing(manager) == []
            feed.emit("late")
            await settle()
            assert drain(stream) == ([RESTARTED, (2, "event"), (2, "late")], None)
            group = manager.statistics().groups["stuck"]
            assert (group.epoch, group.restarts, repr(group.last_error)) == (2, 1, "ConnectionError('lost')")
        assert sorted(log.said()) == [*(["clean-up failed"] if error else []), LATE, "poll failed"]


@in_virtual_time
async def test_several_that_hang_are_shown_with_their_openings_and_all_are_waited_for() -> None:
    feed, log = Stuck(100, 200, 300), Logged()
    async with log.manager() as manager:
        async with manager.subscribe(feed.asking_for(close_timeout=3, restart=IN_A_SECOND)) as stream:
            for _ in range(3):
                feed.fail(ConnectionError())
                await anyio.sleep(4.5)
            assert feed.opened_at == [0, 4, 8.5, 13]
            assert stream.epoch == 4
            assert closing(manager) == [("closing", 1), ("closing", 2), ("closing", 3)]
            assert [(group.epoch, group.opened_at) for group in manager.statistics().closing] == [(1, 0), (2, 4), (3, 8.5)]
            assert {group.subscriptions for group in manager.statistics().closing} == {()}
            assert manager.statistics().groups["stuck"].subscriptions == (stream.statistics(),)
            await anyio.sleep_until(150)
            assert closing(manager) == [("closing", 2), ("closing", 3)]
        assert anyio.current_time() == 150  # the one that is live closes at once, and nobody waits for the others
    assert anyio.current_time() == 309
    assert log.said() == [LATE, "poll failed"] * 3


@in_virtual_time
async def test_silence_a_clean_up_that_hangs_and_a_restart() -> None:
    """A connection that is dead and does not even close: the one thing that ends a generator stuck in its own clean-up."""
    opened_at: list[float] = []

    async def dead() -> AsyncGenerator[int, None]:
        opened_at.append(anyio.current_time())
        try:
            yield len(opened_at)
            await anyio.sleep(1)
            raise ConnectionError("lost")
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(100)

    log = Logged()
    source = SharedSource(key="dead", open=dead, silence_timeout=5, close_timeout=3, restart=IN_A_SECOND)
    async with log.manager() as manager:
        async with manager.subscribe(source, gaps=True) as stream:
            await anyio.sleep(20)
            assert opened_at == [0, 9, 18]
            assert drain(stream) == ([1, RESTARTED, 2, RESTARTED, 3], None)
            assert isinstance(manager.statistics().groups["dead"].last_error, UpstreamSilent)
        assert anyio.current_time() == 23
    assert anyio.current_time() == 119
    assert log.said()[:4] == [LATE, "poll failed"] * 2


@in_virtual_time
async def test_what_a_hanging_upstream_yields_in_the_end_belongs_to_nobody() -> None:
    async def revenant() -> AsyncGenerator[tuple[int, str], None]:
        number = manager.statistics().groups["revenant"].epoch
        yield number, "event"
        with suppress(anyio.get_cancelled_exc_class()):
            await anyio.sleep_forever()
        with anyio.CancelScope(shield=True):
            await anyio.sleep(8)
        yield number, "late"

    fold: Fold = Fold((), lambda state, event: (*state, event[0]))
    log = Logged()
    async with log.manager() as manager:
        source = SharedSource(
            key="revenant", open=revenant, silence_timeout=5, close_timeout=3, restart=IN_A_SECOND, fold=fold, replay=10
        )
        async with manager.subscribe(source, gaps=True) as stream:
            await anyio.sleep(30)  # opened at 0, 9, 18 and 27; the first one yields at 13, and so on
            expected = [(1, "event"), RESTARTED, (2, "event"), RESTARTED, (3, "event"), RESTARTED, (4, "event")]
            assert drain(stream) == (expected, None)
            async with manager.subscribe(source) as replayed, manager.subscribe(source, snapshot=True) as snapshot:
                assert drain(replayed)[0] == [(4, "event")]
                assert snapshot.receive_nowait().state == (4,)  # type: ignore[union-attr]


@in_virtual_time
async def test_an_opening_beside_another_has_a_context_of_its_own() -> None:
    variable: ContextVar[str] = ContextVar("variable")
    seen: list[str] = []

    @asynccontextmanager
    async def hangs() -> AsyncIterator[AsyncGenerator[int, None]]:
        seen.append(variable.get())
        variable.set("source")
        feed = Feed()
        feed.fail(ConnectionError())
        try:
            yield feed._play()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(30)

    variable.set("manager")
    async with Logged().manager() as manager:
        variable.set("subscriber")
        async with manager.subscribe(SharedSource(key="hangs", open=hangs, close_timeout=1, restart=IN_A_SECOND)):
            await anyio.sleep(5)
    assert seen == ["manager"] * 3


@in_virtual_time
@pytest.mark.parametrize("way", [leave, stop, stop_all])
@pytest.mark.parametrize("moment", [1, 2, 3.5, 4, 5])
async def test_ending_it_while_one_hangs(way: Callable[[SharedStreamManager, Any], Awaitable[None]], moment: float) -> None:
    """Fails at 0, is late at 3, opens again at 4. The time for closing counts from the failure, whoever leaves meanwhile."""
    feed, log = Stuck(50), Logged()
    async with log.manager() as manager:
        stream = await manager.subscribe(feed.asking_for(close_timeout=3, restart=IN_A_SECOND)).__aenter__()
        feed.fail(ConnectionError())
        await anyio.sleep(moment)
        await settle()
        await way(manager, stream)
        assert anyio.current_time() == max(moment, 3)
        assert not manager.statistics().groups
        assert closing(manager)
        assert feed.open_together == 1
        assert log.said().count(LATE) == 1
        await anyio.sleep_until(40)
        assert len(feed.opened_at) == 1 + (moment >= 4)
        async with manager.subscribe(feed.asking_for(close_timeout=3, restart=IN_A_SECOND)) as again:
            feed.emit("event")
            assert (await again.receive())[1] == "event"
        assert anyio.current_time() == 40
    assert anyio.current_time() == 50


@in_virtual_time
async def test_an_error_that_leaves_the_manager_waits_for_every_one_that_hangs() -> None:
    feed, log = Stuck(50, 60), Logged()

    async def main() -> None:
        async with log.manager() as manager:
            for _ in range(2):
                async with manager.subscribe(feed.asking_for(close_timeout=3)):
                    await anyio.sleep(1)
            assert closing(manager) == [("closing", 1), ("closing", 1)]
            raise ValueError("body")

    with pytest.raises(ValueError, match="body"):
        await main()
    assert anyio.current_time() == 65
    assert feed.open_together == 0


@in_virtual_time
@pytest.mark.parametrize("restart", [None, IN_A_SECOND])
async def test_an_interrupt_that_comes_late_leaves_the_manager(restart: Restart | None) -> None:
    feed, log = Stuck(50, error=KeyboardInterrupt()), Logged()

    async def main() -> None:
        async with log.manager() as manager, manager.subscribe(feed.asking_for(close_timeout=3, restart=restart)):
            feed.fail(ConnectionError())
            await anyio.sleep_forever()

    with pytest.raises(KeyboardInterrupt):
        await main()
    assert anyio.current_time() == 50


@in_virtual_time
@pytest.mark.parametrize("restart", [None, Restart(on=OSError)], ids=["no restart", "another restart"])
@pytest.mark.parametrize("error", [None, ZeroDivisionError()], ids=["returned", "failed"])
async def test_an_end_that_no_restart_follows_is_told_when_the_clean_up_has_taken_too_long(
    error: Exception | None, restart: Restart | None
) -> None:
    feed, log = Stuck(50), Logged()
    async with log.manager() as manager, manager.subscribe(feed.asking_for(close_timeout=3, restart=restart)) as stream:
        await anyio.sleep(1)
        if error is None:
            feed.end()
        else:
            feed.fail(error)
        with pytest.raises(PollTerminated if error is None else ZeroDivisionError):
            await stream.receive()
        assert anyio.current_time() == 4
        assert len(feed.opened_at) == 1
    assert log.said() == [LATE, "poll failed"]


@in_virtual_time
async def test_an_upstream_that_failed_and_is_stopped_in_its_clean_up_had_failed_by_itself() -> None:
    feed, log = Stuck(50), Logged()
    async with log.manager() as manager, manager.subscribe(feed.asking_for(restart=IN_A_SECOND)) as stream:
        feed.fail(ZeroDivisionError())
        await anyio.sleep(1)
        await manager.stop("stuck")
        with pytest.raises(anyio.EndOfStream):
            await stream.receive()
    assert log.said() == ["poll failed"]


@in_virtual_time
async def test_what_is_cancelled_with_all_around_it_while_an_earlier_one_hangs_has_not_failed() -> None:
    feed = Stuck(50)
    with anyio.CancelScope() as scope:
        async with SharedStreamManager() as manager:
            stream = await manager.subscribe(feed.asking_for(close_timeout=3, restart=IN_A_SECOND)).__aenter__()
            feed.fail(ZeroDivisionError())
            await anyio.sleep(10)
            assert len(feed.opened_at) == 2
            scope.cancel()
            with anyio.CancelScope(shield=True):
                await anyio.sleep(10)
    assert isinstance(drain(stream)[1], anyio.EndOfStream)
