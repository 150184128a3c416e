"""An upstream whose clean-up hangs holds up its own key, and nobody and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import pytest

from anyio_sharedstream import SharedStreamManager
from tests.support import Feed, idle, settle, until
from tests.sweep import Reader, managed, nothing_left


def closing(manager: SharedStreamManager) -> list[object]:
    return [group.key for group in manager.statistics().closing]


class Hanging(Feed):
    """A feed whose clean-up hangs until it is released."""

    def __init__(self) -> None:
        super().__init__("hung")
        self.clean_up = self._released = anyio.Event()

    def release(self) -> None:
        self._released.set()


@asynccontextmanager
async def released(feed: Hanging) -> AsyncIterator[SharedStreamManager]:
    """A manager that is idle after the block, for then at the latest the hanging feed is released."""
    async with managed(feed) as manager:
        try:
            yield manager
        finally:
            feed.release()
        await until(lambda: idle(manager))


async def leave_at_once(manager: SharedStreamManager, feed: Feed) -> None:
    """Open the upstream and leave it without waiting."""
    stream = await manager.subscribe(feed.source).__aenter__()
    await until(lambda: feed.open_now)
    stream.close()


@asynccontextmanager
async def hung(feed: Hanging) -> AsyncIterator[SharedStreamManager]:
    """A manager in which the feed's upstream hangs in its clean-up from the start."""
    async with released(feed) as manager:
        await leave_at_once(manager, feed)
        await settle()
        assert closing(manager) == [feed.key]
        assert feed.open_now == 1
        yield manager


async def waits(manager: SharedStreamManager, key: object) -> None:
    await settle()
    assert manager.statistics().groups[key].state == "waiting"


async def test_close_returns_at_once_and_statistics_show_what_is_closing() -> None:
    feed = Hanging()
    async with hung(feed) as manager:
        (group,) = manager.statistics().closing
        assert (group.key, group.state, group.subscriptions) == ("hung", "closing", ())
        assert not manager.statistics().groups


async def close_under_a_cancelled_scope(manager: SharedStreamManager, feed: Feed) -> None:
    with anyio.CancelScope() as scope:
        async with manager.subscribe(feed.source):
            await until(lambda: feed.open_now)
            scope.cancel()
    assert scope.cancel_called


async def cancel_the_wait_of_the_last(manager: SharedStreamManager, feed: Feed) -> None:
    async with anyio.create_task_group() as tasks:

        async def come_and_go() -> None:
            async with manager.subscribe(feed.source):
                await until(lambda: feed.open_now)

        tasks.start_soon(come_and_go)
        await until(lambda: closing(manager))
        await settle()
        tasks.cancel_scope.cancel()


async def cancel_a_stop(manager: SharedStreamManager, feed: Feed) -> None:
    async with manager.subscribe(feed.source) as stream, anyio.create_task_group() as tasks:
        await until(lambda: feed.open_now)
        tasks.start_soon(manager.stop, feed.key)
        with pytest.raises(anyio.EndOfStream):
            await stream.receive()
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("leave", [leave_at_once, close_under_a_cancelled_scope, cancel_the_wait_of_the_last, cancel_a_stop])
async def test_a_cancelled_leave_goes_on_regardless(leave: Callable[[SharedStreamManager, Feed], Awaitable[None]]) -> None:
    feed = Hanging()
    async with released(feed) as manager:
        await leave(manager, feed)
        assert closing(manager) == ["hung"]
        assert feed.open_now == 1


async def test_every_other_key_goes_on_regardless() -> None:
    feed, others = Hanging(), [Feed(key) for key in range(5)]
    async with hung(feed) as manager:
        for other in others:
            async with manager.subscribe(other.source) as stream:
                other.emit(1, 2)
                assert [await stream.receive(), await stream.receive()] == [1, 2]
            assert other.open_now == 0
        async with manager.subscribe(others[0].source) as stream:
            await manager.stop(others[0].key)
            with pytest.raises(anyio.EndOfStream):
                await stream.receive()
        assert closing(manager) == ["hung"]


async def test_the_next_subscriber_waits_and_can_leave() -> None:
    feed = Hanging()
    async with hung(feed) as manager:
        async with manager.subscribe(feed.source):
            await waits(manager, feed.key)
        # It was the last, and has waited: only for its own group, which had nothing to close.
        assert closing(manager) == ["hung"]
        assert feed.opened == 1


async def test_the_next_subscriber_gets_the_next_upstream_when_the_hanging_one_is_released() -> None:
    feed = Hanging()
    async with hung(feed) as manager, manager.subscribe(feed.source) as one, manager.subscribe(feed.source) as two:
        await waits(manager, feed.key)
        assert feed.opened == 1
        feed.release()
        feed.emit(7)
        assert await one.receive() == await two.receive() == 7
        assert (feed.opened, feed.most_open) == (2, 1)


async def test_groups_cancelled_while_they_waited_let_no_later_one_overtake() -> None:
    feed = Hanging()
    async with hung(feed) as manager:
        for turns in (0, 1, 5, 20):
            passing = await manager.subscribe(feed.source).__aenter__()
            await settle(turns)
            passing.close()
            # At once, while the group in between is still on its way out.
            following = await manager.subscribe(feed.source).__aenter__()
            await waits(manager, feed.key)
            following.close()
        async with manager.subscribe(feed.source) as last:
            await waits(manager, feed.key)
            assert feed.opened == 1
            feed.release()
            feed.emit(7)
            assert await last.receive() == 7


async def test_a_waiting_group_is_stopped_without_waiting_for_its_turn() -> None:
    feed = Hanging()
    async with hung(feed) as manager, anyio.create_task_group() as tasks:
        stream = await manager.subscribe(feed.source).__aenter__()
        reader = Reader(stream)
        tasks.start_soon(reader.run)
        await waits(manager, feed.key)
        tasks.start_soon(manager.stop, feed.key)
        await settle()
        assert isinstance(reader.terminal, anyio.EndOfStream)
        # Its own end has come; the stop still waits for the upstream that hangs.
        assert closing(manager) == ["hung"]
        tasks.cancel_scope.cancel()
    assert feed.opened == 1


async def test_stop_all_waits_for_what_is_already_closing() -> None:
    feed = Hanging()
    stopped = False

    async def stop() -> None:
        nonlocal stopped
        await manager.stop_all()
        stopped = True

    async with released(feed) as manager, anyio.create_task_group() as tasks:
        await leave_at_once(manager, feed)
        tasks.start_soon(stop)
        await settle()
        assert not stopped
        feed.release()
        await until(lambda: stopped)
        assert idle(manager)


async def test_a_generator_that_fails_and_hangs_in_its_own_finally_can_be_left() -> None:
    # From outside it is as any that says nothing, so its subscribers wait; and may go.
    feed = Hanging()
    async with released(feed) as manager:
        stream = await manager.subscribe(feed.source).__aenter__()
        feed.emit(1)
        feed.fail(ZeroDivisionError())
        assert await stream.receive() == 1
        await settle()
        assert manager.statistics().groups["hung"].state == "live"
        stream.close()
        assert closing(manager) == ["hung"]


@pytest.mark.parametrize("cancelled", [False, True])
async def test_the_manager_waits_for_a_hanging_clean_up_and_for_nothing_else(cancelled: bool) -> None:
    feed, other = Hanging(), Feed("other")
    managers: list[SharedStreamManager] = []

    async def live() -> None:
        async with SharedStreamManager() as manager:
            managers.append(manager)
            await leave_at_once(manager, feed)
            await manager.subscribe(feed.source).__aenter__()
            await manager.subscribe(other.source).__aenter__()
            await until(lambda: other.open_now)

    async with nothing_left(feed, other), anyio.create_task_group() as tasks:
        tasks.start_soon(live)
        await until(lambda: other.closed)
        if cancelled:
            tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await settle()
            assert closing(managers[0]) == ["hung"]
            assert feed.open_now == 1
            feed.release()
    assert idle(managers[0])
