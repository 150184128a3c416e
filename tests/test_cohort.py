"""`cohort_grace` and `min_subscribers`: the opening waits for those who start together, so that all have the first event."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from anyio_sharedstream import Restart, SharedSource, SharedStreamManager, Subscription
from tests.support import Feed, idle, settle
from tests.sweep import Reader, drain, managed, nothing_left
from tests.virtual_time import in_virtual_time


class Timed(Feed):
    """A feed that has its first event at once, and says when it was opened."""

    def __init__(self, key: Any = "feed") -> None:
        super().__init__(key)
        self.opened_at: list[float] = []

    def _play(self) -> AsyncGenerator[Any, None]:
        self.opened_at.append(anyio.current_time())
        self.emit("first")
        return super()._play()


def state(manager: SharedStreamManager) -> str:
    return manager.statistics().groups["feed"].state


class Crowd:
    """Subscribers that come and go at certain times, and are all still there at the end."""

    def __init__(self, manager: SharedStreamManager, source: SharedSource[Any]) -> None:
        self.manager = manager
        self.source = source
        self.streams: list[Subscription[Any]] = []

    async def join(self) -> Subscription[Any]:
        self.streams.append(await self.manager.subscribe(self.source).__aenter__())
        return self.streams[-1]

    async def change(self, moment: float, by: int) -> None:
        """So many come at this time, or, if it is negative, go."""
        await anyio.sleep_until(moment)
        for _ in range(by):
            await self.join()
        for _ in range(-by):
            self.streams.pop(0).close()


@pytest.mark.parametrize(
    ("policies", "changes", "opens"),
    [
        # The grace alone.
        ({"cohort_grace": 5}, {0: 1}, 5),
        ({"cohort_grace": 5}, {2: 1, 3: 10, 6: 1}, 7),
        ({"cohort_grace": 5}, {0: 1, 1: 1, 2: -1}, 5),
        ({"cohort_grace": 0}, {1: 1}, 1),
        ({"cohort_grace": 1e6}, {0: 1}, 1e6),
        # The number alone.
        ({"min_subscribers": 1}, {3: 1}, 3),
        ({"min_subscribers": 3}, {0: 1, 4: 1, 1000: 1}, 1000),
        ({"min_subscribers": 3}, {0: 5}, 0),
        ({"min_subscribers": 3}, {0: 1, 1: 1, 2: -1, 3: 1, 4: -1, 5: 1, 6: 1}, 6),
        # Both: whichever comes first.
        ({"cohort_grace": 5, "min_subscribers": 3}, {0: 1, 1: 1, 2: 1}, 2),
        ({"cohort_grace": 5, "min_subscribers": 3}, {0: 1, 1: 1}, 5),
        ({"cohort_grace": 5, "min_subscribers": 3}, {0: 1, 1: 1, 6: 1}, 5),
        ({"cohort_grace": 5, "min_subscribers": 3}, {0: 2, 1: -1, 2: 1, 3: -1}, 5),
        ({"cohort_grace": 5, "min_subscribers": 3}, {0: 2, 5: 1}, 5),
        ({"cohort_grace": 0, "min_subscribers": 3}, {1: 1}, 1),
        ({"cohort_grace": 5, "min_subscribers": 1}, {1: 1}, 6),
        # All go: the next one begins anew.
        ({"cohort_grace": 5}, {0: 2, 2: -2, 3: 1}, 8),
        ({"min_subscribers": 2}, {0: 1, 2: -1, 3: 1, 4: 1}, 4),
        ({"cohort_grace": 5, "min_subscribers": 3}, {0: 2, 2: -2, 3: 1, 6: 1}, 8),
        ({"cohort_grace": 5, "min_subscribers": 3}, {0: 2, 2: -2, 3: 1, 6: 1, 7: 1}, 7),
        ({"cohort_grace": 5}, {0: 1, 1: -1, 2: 1, 3: -1, 4: 1, 5: -1, 6: 1}, 11),
    ],
    ids=str,
)
@in_virtual_time
async def test_it_opens_when_the_cohort_is_there_or_has_been_waited_for(policies: Any, changes: Any, opens: float) -> None:
    feed = Timed()
    async with managed(feed) as manager:
        crowd = Crowd(manager, feed.asking_for(**policies))
        for moment, by in changes.items():
            await crowd.change(moment, by)
            if moment < opens:
                await settle()
                assert feed.opened_at == []
                assert not crowd.streams or state(manager) == "waiting"
        await anyio.sleep_until(max(opens, *changes))
        await settle()
        assert feed.opened_at == [opens]
        assert state(manager) == "live"
        early = [stream for stream in crowd.streams if "first" in drain(stream)[0]]
        late = sum(by for moment, by in changes.items() if moment > opens)
        assert len(early) == len(crowd.streams) - late
        await manager.stop_all()


@pytest.mark.parametrize(
    "policies", [{"cohort_grace": 5}, {"min_subscribers": 2}, {"cohort_grace": 5, "min_subscribers": 2}], ids=str
)
@in_virtual_time
async def test_who_leaves_before_that_never_opens_the_upstream(policies: Any) -> None:
    feed = Timed()
    source = feed.asking_for(**policies)
    async with managed(feed) as manager:
        for pause in (0, 1, 4):
            async with manager.subscribe(source):
                await anyio.sleep(pause)
            assert anyio.current_time() in (0, 1, 5)  # leaving has waited for nothing
            assert idle(manager)
        await anyio.sleep(100)
    assert feed.opened_at == []


async def test_a_cohort_of_hundreds_has_the_first_event_to_the_last() -> None:
    feed = Timed()
    source = feed.asking_for(min_subscribers=500)
    async with managed(feed) as manager, anyio.create_task_group() as tasks, AsyncExitStack() as stack:
        readers = []
        for number in range(500):
            assert feed.opened_at == []
            readers.append(Reader(await stack.enter_async_context(manager.subscribe(source))))
            tasks.start_soon(readers[-1].run)
            await settle(number % 2)
        await settle()
        feed.emit("second")
        await settle()
        assert all(reader.got == ["first", "second"] for reader in readers)
        assert manager.statistics().groups["feed"].epoch == 1
        tasks.cancel_scope.cancel()


async def test_the_last_of_a_cohort_may_leave_as_soon_as_it_has_come() -> None:
    """Enough were there. But if nobody is left when the upstream would be opened, it is not."""
    feed = Timed()
    source = feed.asking_for(min_subscribers=2)
    async with managed(feed) as manager:
        async with manager.subscribe(source) as stream:
            await settle()
            async with manager.subscribe(source):
                pass
            assert await stream.receive() == "first"
        async with manager.subscribe(source), manager.subscribe(source):
            pass
        assert feed.opened == 1


@in_virtual_time
async def test_once_a_cohort_is_complete_nothing_waits_for_the_rest_of_the_grace() -> None:
    source = Feed().asking_for(cohort_grace=5, min_subscribers=2)
    async with managed() as manager:
        tasks = len(anyio.get_running_tasks())
        async with manager.subscribe(source), manager.subscribe(source):
            await settle()
            assert len(anyio.get_running_tasks()) == tasks + 2
        async with manager.subscribe(source):
            await settle()
            assert len(anyio.get_running_tasks()) == tasks + 3  # the clock's
        await settle()
        assert len(anyio.get_running_tasks()) == tasks


# The tick in which the grace is over.


@pytest.mark.parametrize("pauses", range(10))
@pytest.mark.parametrize("first", [True, False])
@in_virtual_time
async def test_who_joins_in_that_tick_misses_nothing_that_comes_after_it(first: bool, pauses: int) -> None:
    feed = Timed()
    source = feed.asking_for(cohort_grace=5)

    async def join() -> None:
        await anyio.sleep_until(5)
        await settle(pauses)
        group = manager.statistics().groups["feed"]
        async with manager.subscribe(source) as stream:
            await settle()
            feed.emit("second")
            await settle()
            assert drain(stream)[0] == ["first", "second"][group.events_published :]

    async with managed(feed) as manager, anyio.create_task_group() as tasks:
        if first:
            tasks.start_soon(join)
            await settle()
        async with manager.subscribe(source) as stream:
            if not first:
                tasks.start_soon(join)
            await anyio.sleep(6)
            assert drain(stream)[0] == ["first", "second"]
    assert feed.opened_at == [5]


@pytest.mark.parametrize("pauses", range(10))
@in_virtual_time
async def test_who_leaves_in_that_tick_has_opened_it_or_not_and_leaves_nothing(pauses: int) -> None:
    feed = Timed()
    source = feed.asking_for(cohort_grace=5)
    async with managed(feed) as manager:
        async with manager.subscribe(source):
            await anyio.sleep(5)
            await settle(pauses)
            waiting = state(manager) == "waiting"
        assert feed.opened_at == ([] if waiting else [5])
        assert idle(manager)
        await anyio.sleep(5)
        async with manager.subscribe(source) as stream:
            assert await stream.receive() == "first"
        assert feed.opened_at[-1] == 15


@in_virtual_time
async def test_a_cohort_that_is_complete_in_that_tick_opens_once() -> None:
    for pauses in range(10):
        feed = Timed()
        source = feed.asking_for(cohort_grace=5, min_subscribers=2)
        async with managed(feed) as manager:
            start = anyio.current_time()
            async with manager.subscribe(source) as one:
                await anyio.sleep(5)
                await settle(pauses)
                async with manager.subscribe(source):
                    await settle()
                    assert drain(one)[0] == ["first"]
                    await anyio.sleep(20)
        assert feed.opened_at == [start + 5]


# An earlier upstream of the key.


@pytest.mark.parametrize(
    ("policies", "closes", "opens"),
    [
        ({"cohort_grace": 5}, 3, 5),
        ({"cohort_grace": 5}, 5, 5),
        ({"cohort_grace": 5}, 20, 20),
        ({"min_subscribers": 2}, 0, 1),
        ({"min_subscribers": 2}, 20, 20),
        ({"min_subscribers": 3, "cohort_grace": 5}, 4, 5),
        ({"min_subscribers": 3, "cohort_grace": 5}, 6, 6),
    ],
    ids=str,
)
@in_virtual_time
async def test_the_cohort_gathers_while_an_earlier_upstream_closes(policies: Any, closes: float, opens: float) -> None:
    feed = Timed()
    feed.clean_up = anyio.Event()
    async with managed(feed) as manager, anyio.create_task_group() as tasks:
        async with manager.subscribe(feed.source):
            await settle()
            tasks.start_soon(manager.stop, "feed")
            await settle()
        source = feed.asking_for(**policies)
        async with manager.subscribe(source) as one:
            await anyio.sleep(1)
            async with manager.subscribe(source) as two:
                await anyio.sleep_until(closes)
                assert feed.opened == 1
                assert state(manager) == "waiting"
                feed.clean_up.set()
                await anyio.sleep_until(30)
                assert drain(one)[0] == drain(two)[0] == ["first"]
    assert feed.opened_at == [0, opens]


@in_virtual_time
async def test_a_cohort_that_gave_up_while_an_earlier_upstream_closes_does_not_let_the_next_one_in() -> None:
    feed = Timed()
    feed.clean_up = anyio.Event()
    source = feed.asking_for(cohort_grace=5, min_subscribers=2)
    async with managed(feed) as manager, anyio.create_task_group() as tasks:
        async with manager.subscribe(feed.source):
            await settle()
            tasks.start_soon(manager.stop, "feed")
            await settle()
        for pauses in (0, 1, 20):
            one, two = [await manager.subscribe(source).__aenter__() for _ in range(2)]
            await settle()
            one.close()
            two.close()
            await settle(pauses)
        one, two = [await manager.subscribe(source).__aenter__() for _ in range(2)]
        await settle()
        one.close()
        two.close()
        async with manager.subscribe(source), manager.subscribe(source) as stream:
            await anyio.sleep_until(40)
            assert (feed.opened, state(manager)) == (1, "waiting")
            feed.clean_up.set()
            assert await stream.receive() == "first"
    assert feed.opened_at == [0, 40]


# What else may happen meanwhile.


@pytest.mark.parametrize("policies", [{"cohort_grace": 50}, {"min_subscribers": 5}], ids=str)
@pytest.mark.parametrize("way", ["stop", "stop_all", "exit", "cancellation"])
@in_virtual_time
async def test_stopping_does_not_wait_for_a_cohort_nor_open_the_upstream(way: str, policies: Any) -> None:
    feed = Timed()
    readers = []
    async with nothing_left(feed):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks, SharedStreamManager() as manager:
                stops: dict[str, Callable[[], Any]] = {"stop": partial(manager.stop, "feed"), "stop_all": manager.stop_all}
                for _ in range(2):
                    readers.append(Reader(await manager.subscribe(feed.asking_for(**policies)).__aenter__()))
                    tasks.start_soon(readers[-1].run)
                await anyio.sleep(3)
                if way in stops:
                    await stops[way]()
                    assert idle(manager)
                elif way == "cancellation":
                    scope.cancel()
                    await checkpoint()
        assert scope.cancelled_caught == (way == "cancellation")
    assert anyio.current_time() == 3
    assert feed.opened_at == []
    for reader in readers:
        assert reader.got == []
        assert isinstance(reader.terminal, anyio.EndOfStream) or way == "cancellation"


@in_virtual_time
async def test_a_subscriber_that_is_cancelled_while_it_waits_is_not_counted_any_more() -> None:
    feed = Timed()
    source = feed.asking_for(min_subscribers=2)
    async with managed(feed) as manager:
        with anyio.move_on_after(3):
            async with manager.subscribe(source) as stream:
                await stream.receive()
        await settle()
        assert idle(manager)
        async with manager.subscribe(source) as one:
            with anyio.move_on_after(3):
                await one.receive()
            assert feed.opened_at == []
            async with manager.subscribe(source):
                assert await one.receive() == "first"
    assert feed.opened_at == [6]


@in_virtual_time
async def test_a_second_subscriber_that_may_not_join_is_not_counted() -> None:
    feed = Timed()
    source = feed.asking_for(min_subscribers=2)
    async with managed(feed) as manager, manager.subscribe(source, subscriber_id="me"):
        with pytest.raises(RuntimeError, match="me"):
            await manager.subscribe(source, subscriber_id="me").__aenter__()
        with pytest.raises(ValueError, match="min_subscribers"):
            await manager.subscribe(feed.asking_for(min_subscribers=1)).__aenter__()
        await anyio.sleep(10)
        assert (feed.opened, state(manager)) == (0, "waiting")
        assert [stream.subscriber_id for stream in manager.statistics().groups["feed"].subscriptions] == ["me"]


@in_virtual_time
async def test_only_the_first_opening_of_a_group_waits_for_a_cohort() -> None:
    feed = Timed()
    source = feed.asking_for(cohort_grace=5, min_subscribers=3, linger=math.inf, restart=Restart(initial_delay=1, jitter=0))
    async with managed(feed) as manager:
        async with manager.subscribe(source):
            await anyio.sleep(6)
        async with manager.subscribe(source) as stream:
            assert state(manager) == "live"
            feed.fail(ConnectionError())
            assert await stream.receive() == "first"
            assert anyio.current_time() == 7
            await manager.stop("feed")
        async with manager.subscribe(source) as stream:
            assert await stream.receive() == "first"
    assert feed.opened_at == [5, 7, 12]


async def test_who_comes_when_a_cohort_gives_up_waits_for_nothing_that_it_had_waited_for() -> None:
    feed = Feed()
    async with managed(feed) as manager:
        first = await manager.subscribe(feed.source).__aenter__()
        await settle()
        first.close()
        second = await manager.subscribe(feed.asking_for(min_subscribers=2)).__aenter__()
        await settle()
        second.close()
        async with manager.subscribe(feed.source) as third:
            feed.emit("event")
            assert await third.receive() == "event"
