"""`Fold`: the state that a group keeps, and the `Snapshot` of it that a joiner begins with, whenever it joins."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import pytest

from anyio_sharedstream import (
    Block,
    Conflate,
    DropNewest,
    DropOldest,
    Fail,
    Fold,
    Gap,
    Latest,
    PollTerminated,
    Restart,
    SharedSource,
    Snapshot,
    SubscriberOverflow,
)
from tests.policies_support import publish
from tests.support import Feed, settle, until
from tests.sweep import drain, managed
from tests.virtual_time import in_virtual_time

State = tuple[Any, ...]
POLICIES: list[Any] = [Fail(), Block(math.inf), DropOldest(), DropNewest(), Latest(), Conflate(int)]
policies = pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
AT_ONCE = Restart(initial_delay=0, jitter=0)
ONCE_A_SECOND = Restart(initial_delay=1, factor=1, jitter=0)


def append(state: State, event: Any) -> State:
    return (*state, event)


HISTORY = Fold((), append)


class ClosingFeed(Feed):
    """Something around the iteration closes after it, and may take its time for that."""

    def __init__(self) -> None:
        super().__init__()
        self.closing = anyio.Event()

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[AsyncIterable[Any]]:
        try:
            yield self._play()
        finally:
            with anyio.CancelScope(shield=True):
                await self.closing.wait()

    def asking_for(self, **policies: Any) -> SharedSource[Any]:
        return SharedSource(key=self.key, open=self._open, **policies)


async def restart(feed: Feed) -> None:
    opened = feed.opened
    feed.fail(ConnectionError("lost"))
    await until(lambda: feed.opened > opened)
    await settle()


@policies
@pytest.mark.parametrize("bursts", [[1] * 8, [2, 3, 70, 1, 64]], ids=str)
async def test_a_joiner_between_any_two_bursts_gets_the_state_and_exactly_what_follows(policy: Any, bursts: list[int]) -> None:
    feed = Feed()
    source = feed.asking_for(fold=HISTORY)
    async with managed(feed) as manager, AsyncExitStack() as stack:
        readers: list[tuple[Any, list[Any]]] = []
        number = 0
        for burst in bursts:
            stream: Any = manager.subscribe(source, snapshot=True, overflow=policy)
            readers.append((await stack.enter_async_context(stream), [Snapshot((*range(number),))]))
            for size in [1] * burst if isinstance(policy, Latest) else [burst]:
                feed.emit(*range(number, number + size))
                await settle()
                for stream, expected in readers:
                    assert drain(stream) == ([*expected, *range(number, number + size)], None)
                    expected.clear()
                number += size
        for stream, _ in readers:
            assert stream.statistics().events_missed == 0


@policies
@pytest.mark.parametrize("joins_after", [0, 1, 3, 63, 64, 65, 99, 100])
async def test_a_joiner_in_the_middle_of_a_turn_gets_the_state_of_that_moment(policy: Any, joins_after: int) -> None:
    async def run() -> AsyncGenerator[int, None]:
        for number in range(101):
            if number == joins_after:
                await joiner.__aenter__()
            yield number
        await anyio.sleep_forever()

    source = SharedSource(key="feed", open=run, fold=HISTORY)
    async with managed() as manager, manager.subscribe(source):
        joiner: Any = manager.subscribe(source, snapshot=True, overflow=policy)
        await settle()
        items, terminal = drain(joiner)
        assert terminal is None
        if isinstance(policy, Latest) and joins_after < 100:
            assert items == [Snapshot((*range(101),))]
        else:
            assert items == [Snapshot((*range(joins_after),)), *range(joins_after, 101)]
        joiner.close()


@in_virtual_time
async def test_one_that_waits_for_the_opening_gets_the_first_state_when_it_comes() -> None:
    """In whatever state the group is: waiting for a cohort, for the upstream to open, or for its next opening."""
    feed = ClosingFeed()
    may_open = anyio.Event()
    initials: list[object] = []

    def initial() -> State:
        initials.append(anyio.current_time())
        return (len(initials),)

    @asynccontextmanager
    async def slow() -> AsyncIterator[AsyncIterable[Any]]:
        await may_open.wait()
        async with feed._open() as events:
            yield events

    source = SharedSource(key="feed", open=slow, fold=Fold(initial, append), cohort_grace=5, restart=ONCE_A_SECOND)
    joined: dict[str, Any] = {}
    async with managed(feed) as manager, AsyncExitStack() as stack:

        async def join(state: str) -> None:
            assert manager.statistics().groups["feed"].state == state
            stream: Any = manager.subscribe(source, snapshot=True, gaps=True)
            joined[f"{state}{len(joined)}"] = await stack.enter_async_context(stream)

        keeper = await stack.enter_async_context(manager.subscribe(source))
        await join("waiting")
        await anyio.sleep(4)
        await join("waiting")
        assert [drain(stream) for stream in joined.values()] == [([], None)] * 2
        await anyio.sleep(2)
        await join("opening")
        assert [drain(stream) for stream in joined.values()] == [([Snapshot((1,))], None)] * 3
        may_open.set()
        await settle()
        await publish(feed, "a")
        await join("live")
        assert drain(joined["live3"])[0] == [Snapshot((1, "a"))]
        feed.fail(ConnectionError("lost"))
        await settle()
        await join("restarting")  # and closing
        feed.closing.set()
        await settle()
        await join("restarting")  # and closed
        await anyio.sleep(2)
        feed.emit("b")
        await settle()
        assert initials == [5, 7]
        begun = [Gap(None, "restart"), Snapshot((2,)), "b"]
        *early, live, closing, closed = [drain(stream)[0] for stream in joined.values()]
        assert early == [["a", *begun]] * 3
        assert live == begun
        assert drain(keeper)[0] == ["a", "b"]
        # These came after the failure, and have missed nothing.
        assert closed == begun[1:]
        assert closing == begun[1:]


@in_virtual_time
async def test_lingering_goes_on_with_the_state() -> None:
    feed = Feed()
    source = feed.asking_for(fold=HISTORY, linger=10)
    async with managed(feed) as manager:
        async with manager.subscribe(source):
            await publish(feed, 1)
        await anyio.sleep(1)
        await publish(feed, 2, 3)
        async with manager.subscribe(source, snapshot=True) as stream:
            await publish(feed, 4)
            assert drain(stream) == ([Snapshot((1, 2, 3)), 4], None)
        await anyio.sleep(11)
        async with manager.subscribe(source, snapshot=True) as stream:
            assert await stream.receive() == Snapshot(())
        assert feed.opened == 2


@policies
async def test_the_library_hands_the_state_around_as_it_is(policy: Any) -> None:
    """Neither copied nor compared nor changed nor asked whether it is true; nor is what `step` returns."""

    class Shy:
        def __init__(self, events: State = ()) -> None:
            self.events = events

        # Not even there: whoever calls one of these meets a TypeError.
        __eq__ = __bool__ = __len__ = __copy__ = __deepcopy__ = __reduce_ex__ = __iter__ = __repr__ = None  # type: ignore[assignment]
        __hash__ = None  # type: ignore[assignment]

    states: list[Shy] = [Shy()]

    def step(state: Shy, event: int) -> Shy:
        assert state is states[-1]
        states.append(Shy((*state.events, event)))
        return states[-1]

    feed = Feed()
    source = feed.asking_for(fold=Fold(states[0], step), restart=AT_ONCE)
    contract: Any = {"overflow": policy, "snapshot": True, "gaps": True}
    async with managed(feed) as manager, manager.subscribe(source, **contract) as first:
        await settle()
        assert first.receive_nowait().state is states[0]
        await publish(feed, 1, 2)
        async with manager.subscribe(source, **contract) as second, manager.subscribe(source, **contract) as third:
            assert second.receive_nowait().state is third.receive_nowait().state is states[2]
        states.append(states[0])
        await restart(feed)
        async with manager.subscribe(source, **contract) as second:
            assert second.receive_nowait().state is states[0]
    assert [state.events for state in states] == [(), (1,), (1, 2), ()]


async def test_a_state_that_is_changed_in_place_is_changed_for_everyone() -> None:
    feed = Feed()

    def add(state: list[int], event: int) -> list[int]:
        state.append(event)
        return state

    source = feed.asking_for(fold=Fold(list, add))
    async with managed(feed) as manager, manager.subscribe(source, snapshot=True) as first:
        await publish(feed, 1, 2)
        async with manager.subscribe(source, snapshot=True) as second:
            await publish(feed, 3)
            items = drain(first)[0]
            assert items[0].state is second.receive_nowait().state
            assert items[0].state == [1, 2, 3]


def fails(*args: object) -> Any:
    raise ZeroDivisionError(*args)


@pytest.mark.parametrize(
    "restart",
    [None, AT_ONCE, Restart(on=lambda error: True), Restart(on=ZeroDivisionError)],
    ids=["no restart", "any", "asked", "its type"],
)
@policies
async def test_what_initial_raises_fails_the_upstream_for_everyone_before_it_is_opened(policy: Any, restart: Any) -> None:
    feed = Feed()
    source = feed.asking_for(fold=Fold(fails, append), restart=restart, replay=3)
    async with managed(feed) as manager, manager.subscribe(source) as plain:
        async with manager.subscribe(source, snapshot=True, overflow=policy, gaps=True) as stream:
            await settle()
            for one in (plain, stream):
                items, terminal = drain(one)
                assert (items, type(terminal)) == ([], ZeroDivisionError)
        assert "feed" not in manager.statistics().groups
    assert feed.opened == 0


@pytest.mark.parametrize(
    "restart",
    [None, AT_ONCE, Restart(on=lambda error: True), Restart(on=ZeroDivisionError)],
    ids=["no restart", "any", "asked", "its type"],
)
@pytest.mark.parametrize("kind", [Feed, ClosingFeed])
@policies
async def test_what_step_raises_fails_the_upstream_for_everyone_after_the_events_before(
    policy: Any, kind: type[Feed], restart: Any
) -> None:
    feed = kind()
    if isinstance(feed, ClosingFeed):
        feed.closing.set()

    fold = Fold((), lambda state, event: fails(event) if event == 3 else append(state, event))
    source = feed.asking_for(fold=fold, restart=restart, on_exhausted="fail", replay=3)
    async with managed(feed) as manager, manager.subscribe(source) as plain:
        async with manager.subscribe(source, snapshot=True, overflow=policy) as stream:
            await publish(feed, 1)
            assert drain(stream)[0] == [Snapshot(()), 1]
            feed.emit(2, 3, 4)
            await settle()
            for one, expected in ((plain, [1, 2]), (stream, [2])):
                items, terminal = drain(one)
                assert items == expected
                assert type(terminal) is ZeroDivisionError
                assert terminal.args == (3,)
        assert "feed" not in manager.statistics().groups
    assert feed.opened == 1


@pytest.mark.parametrize("where", ["initial", "step"])
async def test_what_is_no_exception_leaves_the_manager(where: str) -> None:
    feed = Feed()

    def stop(*args: object) -> Any:
        raise SystemExit(3)

    source = feed.asking_for(fold=Fold(stop, append) if where == "initial" else Fold((), stop), restart=AT_ONCE)
    with pytest.raises(SystemExit, match="3"):
        await until_the_end(feed, source)


async def until_the_end(feed: Feed, source: SharedSource[Any]) -> None:
    async with managed(feed) as manager, manager.subscribe(source) as stream:
        feed.emit(1)
        with pytest.raises(PollTerminated):
            await stream.receive()


@pytest.mark.parametrize("gaps", [True, False])
@policies
async def test_a_restart_puts_a_new_snapshot_in_its_place(policy: Any, gaps: bool) -> None:
    feed = Feed()
    source = feed.asking_for(fold=Fold(lambda: (feed.opened,), append), restart=AT_ONCE)
    gap = [Gap(None, "restart")] * gaps
    contract: Any = {"overflow": policy, "gaps": gaps, "snapshot": True}
    async with managed(feed) as manager, manager.subscribe(source, **contract) as stream:
        await publish(feed, 1)
        assert stream.receive_nowait() == Snapshot((0,))
        await restart(feed)
        await publish(feed, 2)
        if isinstance(policy, Latest):
            assert drain(stream) == ([Gap(2, "overflow"), *gap, Snapshot((1, 2))] if gaps else [Snapshot((1, 2))], None)
        else:
            assert drain(stream) == ([1, *gap, Snapshot((1,)), 2], None)
        await restart(feed)
        await restart(feed)  # what nobody has seen of the one before is gone
        assert drain(stream) == ([*gap, Snapshot((3,))], None)
        assert stream.epoch == 4


async def test_a_snapshot_takes_no_room_and_is_no_event() -> None:
    feed = Feed()
    source = feed.asking_for(fold=HISTORY, restart=AT_ONCE)
    async with managed(feed) as manager, manager.subscribe(source, snapshot=True, max_buffer_size=2) as stream:
        await settle()
        await publish(feed, 1)
        await restart(feed)
        await publish(feed, 2)
        statistics = stream.statistics()
        assert (statistics.current_buffer_used, statistics.peak_buffer_used, statistics.events_received) == (2, 2, 0)
        assert await stream.receive_batch(3) == (Snapshot(()), 1, Snapshot(()))
        assert stream.statistics().events_received == 1
        await publish(feed, 3)
        assert drain(stream) == ([2, 3], None)
        await publish(feed, 4, 5, 6)
        items, terminal = drain(stream)
        assert (items, type(terminal)) == ([], SubscriberOverflow)


async def test_block_is_held_for_events_and_not_for_snapshots() -> None:
    feed = Feed()
    source = feed.asking_for(fold=HISTORY, restart=AT_ONCE)
    contract: Any = {"overflow": Block(math.inf), "max_buffer_size": 1, "snapshot": True}
    async with managed(feed) as manager, manager.subscribe(source, **contract) as stream:
        feed.emit(1, 2)
        await settle()
        assert manager.statistics().groups["feed"].events_published == 1
        assert await stream.receive() == Snapshot(())
        await settle()
        assert manager.statistics().groups["feed"].events_published == 1
        assert await stream.receive() == 1
        await settle()
        assert drain(stream) == ([2], None)
        await restart(feed)
        feed.emit(3, 4)
        await settle()
        assert drain(stream) == ([Snapshot(()), 3], None)
        await settle()
        assert drain(stream) == ([4], None)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
async def test_a_predicate_chooses_events_and_not_what_the_state_is_made_of(policy: Any) -> None:
    feed = Feed()
    source = feed.asking_for(fold=HISTORY, route_by=lambda event: event % 3)
    contract: Any = {"overflow": policy, "snapshot": True}
    async with managed(feed) as manager, manager.subscribe(source):
        await publish(feed, 1, 2, 3)
        async with (
            manager.subscribe(source, where=lambda event: event % 2 == 0, **contract) as even,
            manager.subscribe(source, routes={0}, **contract) as third,
        ):
            assert drain(even) == drain(third) == ([Snapshot((1, 2, 3))], None)
            await publish(feed, 4, 5, 6)
            assert drain(third) == ([6], None)
            expected = [Snapshot((1, 2, 3, 4, 5, 6))] if isinstance(policy, Latest) else [4, 6]
            assert drain(even) == (expected, None)


async def test_a_snapshot_of_a_source_without_a_fold_is_an_error() -> None:
    feed = Feed()
    async with managed(feed) as manager:
        with pytest.raises(ValueError, match="'feed' has no fold"):
            manager.subscribe(feed.asking_for(replay=3), snapshot=True)


@pytest.mark.parametrize("where", ["initial", "step"])
async def test_one_that_joins_from_inside_of_a_function_of_the_fold_begins_right_there(where: str) -> None:
    feed = Feed()
    joiners: list[Any] = []

    def join() -> None:
        joiners.append(manager.subscribe(source, snapshot=True))
        with pytest.raises(StopIteration):  # it does not await
            joiners[-1].__aenter__().send(None)

    def initial() -> State:
        if where == "initial":
            join()
        return ()

    def step(state: State, event: int) -> State:
        if where == "step" and event == 3:
            join()
        return append(state, event)

    source = feed.asking_for(fold=Fold(initial, step), replay=1)
    async with managed(feed) as manager, manager.subscribe(source, snapshot=True) as stream:
        feed.emit(1, 2, 3, 4)
        await settle()
        assert drain(stream) == ([Snapshot(()), 1, 2, 3, 4], None)
        assert drain(joiners[0]) == ([Snapshot(()), 1, 2, 3, 4] if where == "initial" else [Snapshot((1, 2)), 3, 4], None)
        joiners[0].close()
