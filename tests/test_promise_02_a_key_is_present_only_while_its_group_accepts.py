"""Promise 2: whoever sees an upstream end, or begins to leave it as the last, finds its key free: the next one starts afresh."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Hashable
from contextlib import asynccontextmanager

import anyio
import pytest
from anyio.lowlevel import checkpoint

from anyio_sharedstream import PollTerminated, SharedSource, SharedStreamManager, SubscriberOverflow
from tests.support import Feed, idle, settle, until


def present(manager: SharedStreamManager, key: Hashable = "feed") -> bool:
    return key in manager.statistics().groups


@asynccontextmanager
async def slow_clean_up(feed: Feed) -> AsyncIterator[anyio.Event]:
    """Let the feed's clean-up wait for an event; set at last, so that a test that fails does not hang."""
    feed.clean_up = anyio.Event()
    try:
        yield feed.clean_up
    finally:
        feed.clean_up.set()


async def assert_starts_afresh(manager: SharedStreamManager, key: Hashable = "feed") -> None:
    fresh = Feed(key)
    async with manager.subscribe(fresh.source) as stream:
        fresh.emit("fresh")
        assert await stream.receive() == "fresh"
    assert fresh.opened == 1


async def test_a_subscriber_that_sees_the_error_finds_the_key_gone() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream:
        feed.fail(ValueError("broken"))
        with pytest.raises(ValueError, match="broken"):
            await stream.receive()
        assert not present(manager)
        await assert_starts_afresh(manager)


async def test_a_subscriber_that_sees_its_upstream_return_finds_the_key_gone() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream:
        feed.end()
        with pytest.raises(PollTerminated):
            await stream.receive()
        assert not present(manager)
        await assert_starts_afresh(manager)


async def test_a_subscriber_whose_source_could_not_be_opened_finds_the_key_gone() -> None:
    def refuse() -> AsyncIterator[None]:
        raise OSError("no such host")

    async with SharedStreamManager() as manager, manager.subscribe(SharedSource(key="feed", open=refuse)) as stream:
        assert present(manager)
        with pytest.raises(OSError, match="no such host"):
            await stream.receive()
        assert not present(manager)
        await assert_starts_afresh(manager)


async def test_the_only_subscriber_finds_the_key_gone_when_it_has_overflowed() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source, max_buffer_size=1) as stream:
        await until(lambda: feed.opened)
        for event in range(2):
            feed.emit(event)
            await settle()
        assert not present(manager)
        with pytest.raises(SubscriberOverflow):
            await stream.receive()
        await assert_starts_afresh(manager)


async def test_the_key_is_gone_as_soon_as_the_last_subscriber_has_begun_to_leave() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as one, manager.subscribe(feed.source) as two:
        await until(lambda: feed.opened)
        async with slow_clean_up(feed):
            one.close()
            assert present(manager)
            two.close()
            assert not present(manager)
            await settle()
            assert feed.open_now == 1


async def test_one_who_joins_while_the_last_leaves_starts_afresh() -> None:
    feed = Feed()

    async def leave() -> None:
        async with manager.subscribe(feed.source):
            await until(lambda: feed.opened)

    async with SharedStreamManager() as manager, anyio.create_task_group() as tasks, slow_clean_up(feed) as cleaned_up:
        tasks.start_soon(leave)
        await until(lambda: manager.statistics().closing)
        async with manager.subscribe(feed.source) as stream:
            cleaned_up.set()
            feed.emit("event")
            assert await stream.receive() == "event"
        assert (feed.opened, feed.most_open) == (2, 1)


async def test_the_key_is_gone_as_soon_as_it_is_stopped() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream, anyio.create_task_group() as tasks:
        await until(lambda: feed.opened)
        async with slow_clean_up(feed):
            tasks.start_soon(manager.stop, "feed")
            with pytest.raises(anyio.EndOfStream):
                await stream.receive()
            assert not present(manager)
            assert feed.open_now == 1


class Watched:
    """A source that says when its iteration is over, and whose context manager looks at the key while it cleans up."""

    def __init__(self, manager: SharedStreamManager, end: BaseException | None) -> None:
        self.manager = manager
        self.end = end
        self.may_end = anyio.Event()
        self.may_close = anyio.Event()
        self.over = False
        self.present_in_clean_up: list[bool] = []

    async def _iterate(self) -> AsyncGenerator[str, None]:
        yield "event"
        await self.may_end.wait()
        self.over = True
        if self.end is not None:
            raise self.end

    @asynccontextmanager
    async def open(self) -> AsyncIterator[AsyncGenerator[str, None]]:
        try:
            yield self._iterate()
        finally:
            self.present_in_clean_up.append(present(self.manager))
            await self.may_close.wait()
            self.present_in_clean_up.append(present(self.manager))


@pytest.mark.parametrize(("end", "terminal"), [(ValueError("broken"), ValueError), (None, PollTerminated)])
async def test_an_upstream_is_evicted_before_its_clean_up_runs(end: BaseException | None, terminal: type[Exception]) -> None:
    async with SharedStreamManager() as manager:
        watched = Watched(manager, end)
        async with manager.subscribe(SharedSource(key="feed", open=watched.open)) as stream:
            assert await stream.receive() == "event"
            watched.may_end.set()
            await until(lambda: watched.present_in_clean_up)
            with pytest.raises(anyio.WouldBlock):
                stream.receive_nowait()  # the terminal is what finally leaves the source
            watched.may_close.set()
            with pytest.raises(terminal):
                await stream.receive()
    assert watched.present_in_clean_up == [False, False]


async def test_one_who_comes_during_the_clean_up_of_a_failed_upstream_waits_for_a_fresh_one() -> None:
    fresh = Feed()
    async with SharedStreamManager() as manager:
        watched = Watched(manager, ValueError("broken"))
        async with manager.subscribe(SharedSource(key="feed", open=watched.open)) as stream:
            watched.may_end.set()
            await until(lambda: watched.present_in_clean_up)
            async with manager.subscribe(fresh.source) as later:
                fresh.emit("fresh")
                await settle()
                assert manager.statistics().groups["feed"].state == "waiting"
                assert fresh.opened == 0
                watched.may_close.set()
                assert await stream.receive() == "event"
                with pytest.raises(ValueError, match="broken"):
                    await stream.receive()
                assert await later.receive() == "fresh"


async def test_a_generator_that_cleans_up_after_its_failure_keeps_its_key_until_the_failure_leaves_it() -> None:
    # Not to be told from one that is silent; its joiners share the terminal.
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source), slow_clean_up(feed) as cleaned_up:
        feed.fail(ValueError("broken"))
        await until(lambda: feed.opened)
        await settle()
        assert present(manager)
        async with manager.subscribe(feed.source) as late:
            cleaned_up.set()
            with pytest.raises(ValueError, match="broken"):
                await late.receive()
        assert feed.opened == 1


@pytest.mark.parametrize("fail", [True, False], ids=["raises", "returns"])
async def test_no_task_ever_sees_a_key_whose_upstream_is_dead(fail: bool) -> None:
    async with SharedStreamManager() as manager:
        watched = Watched(manager, ValueError("broken") if fail else None)
        watched.may_close.set()
        seen: list[tuple[bool, bool]] = []

        async def watch() -> None:
            while True:
                seen.append((watched.over, present(manager)))
                await checkpoint()

        async with anyio.create_task_group() as tasks, manager.subscribe(SharedSource(key="feed", open=watched.open)) as stream:
            for _ in range(5):
                tasks.start_soon(watch)
            assert await stream.receive() == "event"
            watched.may_end.set()
            await until(lambda: idle(manager))
            tasks.cancel_scope.cancel()
    assert {(False, True), (True, False)} <= set(seen)
    assert (True, True) not in seen


async def test_joining_in_the_turn_of_a_failure_gives_either_its_terminal_or_a_fresh_upstream() -> None:
    # Tasks that join before, in and after the turn in which the upstream fails.
    feed = Feed()
    ends: list[str] = []

    async def come(turns: int) -> None:
        await settle(turns)
        async with manager.subscribe(feed.source) as stream:
            try:
                ends.append(await stream.receive())
            except ValueError as exc:
                ends.append(str(exc))

    async with SharedStreamManager() as manager, manager.subscribe(feed.source):
        await until(lambda: feed.opened)
        async with anyio.create_task_group() as tasks:
            for turns in range(20):
                tasks.start_soon(come, turns)
            await settle(3)
            feed.fail(ValueError("broken"))
            await until(lambda: feed.opened == 2)
            await settle()
            feed.emit("fresh")
    assert set(ends) == {"broken", "fresh"}
    assert len(ends) == 20
    assert (feed.opened, feed.most_open) == (2, 1)
