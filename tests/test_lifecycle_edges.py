"""Where the policies of an upstream meet each other, foreign code, and what was there before."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import structlog
from anyio import get_cancelled_exc_class
from structlog.testing import LogCapture

from anyio_sharedstream import (
    Block,
    DropNewest,
    DropOldest,
    Fold,
    Gap,
    Latest,
    PollTerminated,
    Restart,
    SharedSource,
    SharedStreamManager,
    Snapshot,
)
from anyio_sharedstream._step import Step
from anyio_sharedstream.triggers import TriggerFailed, TriggerRunner
from tests.contract_support import routed
from tests.support import Feed, idle, settle, until
from tests.sweep import drain, managed
from tests.trigger_support import Shared
from tests.virtual_time import in_virtual_time

AT_ONCE = Restart(initial_delay=0, jitter=0)


def history(state: tuple[int, ...], event: int) -> tuple[int, ...]:
    return (*state, event)


# An upstream that hangs, and its successor.


@in_virtual_time
async def test_what_hung_and_comes_back_does_not_touch_the_hold_of_its_successor() -> None:
    comes_back = anyio.Event()
    openings = 0

    async def play() -> AsyncGenerator[int, None]:
        nonlocal openings
        openings += 1
        if openings == 1:
            with anyio.CancelScope(shield=True):
                await comes_back.wait()
            yield -1
        number = 0
        while True:
            yield number
            number += 1

    source = SharedSource(key="feed", open=play, silence_timeout=100, close_timeout=1, restart=AT_ONCE)
    async with managed() as manager, manager.subscribe(source, overflow=Block(math.inf), max_buffer_size=3) as stream:
        await anyio.sleep(110)
        comes_back.set()
        await anyio.sleep(1000)  # for which the library has the source wait
        assert [await stream.receive() for _ in range(20)] == [*range(20)]
        assert (openings, stream.epoch) == (2, 2)


@pytest.mark.parametrize("way", ["stop", "leave"])
@pytest.mark.parametrize("error", [OSError("clean-up"), KeyboardInterrupt()], ids=repr)
@in_virtual_time
async def test_what_a_late_clean_up_raises_is_told_all_the_same(error: BaseException, way: str) -> None:
    lines = LogCapture()

    async def play() -> AsyncGenerator[int, None]:
        try:
            yield 1
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(5)
            raise error

    async def run() -> None:
        async with SharedStreamManager(logger=structlog.wrap_logger(None, processors=[lines])) as manager:
            stream = await manager.subscribe(SharedSource(key="feed", open=play, close_timeout=1)).__aenter__()
            await stream.receive()
            await (manager.stop("feed") if way == "stop" else stream.aclose())
            await anyio.sleep(10)

    if isinstance(error, Exception):
        await run()
        (line,) = [line for line in lines.entries if line["event"] == "clean-up failed"]
        assert line["exc_info"] is error
    else:
        with pytest.raises(KeyboardInterrupt):
            await run()


@in_virtual_time
async def test_who_has_no_room_holds_the_next_opening_back_as_well() -> None:
    async def play() -> AsyncGenerator[int, None]:
        number = 0
        with anyio.fail_after(1):  # over its yields, so a hold ends it
            while True:
                yield number
                number += 1

    source = SharedSource(key="feed", open=play, restart=AT_ONCE)
    async with managed() as manager, manager.subscribe(source, overflow=Block(math.inf), max_buffer_size=2) as stream:
        await anyio.sleep(100)
        assert (stream.epoch, stream.statistics().current_buffer_used) == (1, 2)
        assert manager.statistics().groups["feed"].state == "restarting"
        assert drain(stream) == ([0, 1], None)
        await settle()
        assert (stream.epoch, drain(stream)) == (2, ([0, 1], None))


# The last state.


@pytest.mark.parametrize("stops", [True, False])
@pytest.mark.parametrize("gaps", [True, False])
@pytest.mark.parametrize("policy", [DropOldest(), DropNewest(), Latest()], ids=repr)
@in_virtual_time
async def test_who_has_received_its_gaps_while_the_upstream_failed_still_receives_the_last_state(
    policy: Any, gaps: bool, stops: bool
) -> None:
    feed = Feed()

    @asynccontextmanager
    async def opened() -> AsyncIterator[AsyncGenerator[Any, None]]:
        try:
            yield feed.source.open()  # type: ignore[misc]
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(5)

    source = SharedSource(key="feed", open=opened, restart=Restart(on=KeyError), fold=Fold((), history))
    async with managed(feed) as manager:
        contract: dict[str, Any] = {"overflow": policy, "max_buffer_size": 1, "gaps": gaps, "snapshot": True}
        stream: Any = manager.subscribe(source, **contract)
        await stream.__aenter__()
        await settle()
        for number in range(4):
            feed.emit(number)
            await settle()
        feed.fail(ValueError("final"))
        await settle()
        assert manager.statistics().groups["feed"].state == "restarting"
        first = drain(stream)
        assert first == ([Gap(4, "overflow")] if gaps else [], None)
        if stops:
            await manager.stop("feed")
        else:
            await anyio.sleep(10)
        items, terminal = drain(stream)
        assert items == [Snapshot((0, 1, 2, 3))]
        assert isinstance(terminal, anyio.EndOfStream if stops else ValueError)


# What foreign functions raise.


async def test_a_cancellation_that_leaks_from_the_question_whether_to_restart_cancels_nobody_else() -> None:
    def on(_: Exception) -> bool:
        raise cancelled

    feed, other = Feed(), Feed("other")
    async with SharedStreamManager() as manager, manager.subscribe(other.source) as witness:
        with anyio.CancelScope() as scope:
            scope.cancel()
            try:
                await anyio.sleep_forever()
            except get_cancelled_exc_class() as exc:
                cancelled = exc
                raise
        async with manager.subscribe(feed.asking_for(restart=Restart(on=on))) as stream:
            feed.fail(OSError("lost"))
            with pytest.raises(PollTerminated):
                await stream.receive()
        other.emit(1)
        assert await witness.receive() == 1


async def test_what_was_asked_about_may_be_raised_as_the_answer() -> None:
    def on(error: Exception) -> bool:
        raise error

    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.asking_for(restart=Restart(on=on))) as stream:
        feed.fail(OSError("lost"))
        with pytest.raises(OSError, match="lost") as caught:
            await stream.receive()
        assert caught.value.__cause__ is None


class Route:
    """A route that can be hashed, and not compared with another."""

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        raise OSError("no answer")


async def test_a_route_that_cannot_be_compared_in_the_replay_fails_the_one_who_asked_for_it() -> None:
    feed, mine = Feed(), Route()
    source = SharedSource(key="feed", open=routed(feed, int).open, route_by=lambda event: 1, replay=3)
    async with SharedStreamManager() as manager:
        witness = await manager.subscribe(source).__aenter__()
        feed.emit(1)
        assert await witness.receive() == 1
        with pytest.raises(OSError, match="no answer"):
            async with manager.subscribe(source, routes=[mine]) as stream:
                await stream.receive()
        feed.emit(2)
        assert await witness.receive() == 2
        await witness.aclose()
        assert idle(manager)


# Triggers.


class Stubborn(Shared):
    """A trigger that wants another life for the stream than the one before it."""

    linger = 1

    def shared_stream_policies(self) -> dict[str, Any]:
        return {"linger": self.linger}


@pytest.mark.parametrize("cancelled", [True, False])
async def test_triggers_that_disagree_are_told_so_also_by_one_who_is_being_cancelled(cancelled: bool) -> None:
    feed = Feed()
    other = Stubborn(feed)
    other.linger = 2
    async with TriggerRunner() as runner:
        runner.start("first", Stubborn(feed))
        with anyio.CancelScope() as scope:  # noqa: ASYNC100  # starting must not become a checkpoint
            if cancelled:
                scope.cancel()
            runner.start("other", other)
        outcome = await runner.outcomes.receive()
        assert isinstance(outcome, TriggerFailed)
        assert outcome.trigger_id == "other"
        assert "is open with linger=1, so it cannot be subscribed to with linger=2" in str(outcome.error)


# What is kept alive.


class Thrown(Exception):  # noqa: N818  # it stands for whatever is thrown
    """An exception that can be watched."""


class Refusing:
    """Awaits once, and lets whatever is thrown into it out again."""

    def __await__(self) -> Any:
        yield


@pytest.mark.usefixtures("anyio_backend")
async def test_a_step_that_was_interrupted_needs_no_collector_to_be_freed() -> None:
    stepping = Step(Refusing(), lambda: False).__await__()
    next(stepping)
    thrown = Thrown()
    watch = weakref.ref(thrown)
    gc.disable()
    try:
        with pytest.raises(Thrown) as caught:
            stepping.throw(thrown)
        del caught, thrown, stepping
        assert watch() is None
    finally:
        gc.enable()


async def test_who_has_left_keeps_nothing_of_the_upstream_alive() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager:
        stream = manager.subscribe(feed.asking_for(fold=Fold(Refusing, lambda state, event: state)))
        async with stream:
            await until(lambda: feed.opened)
        await until(lambda: idle(manager))
        gc.collect()
        assert not [thing for thing in gc.get_objects() if type(thing) is Refusing]
        assert stream.epoch == 1
