"""The lessons about what subscribers do to each other and to the source, each under many orders of its tasks."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator
from contextlib import suppress
from contextvars import ContextVar
from typing import Literal

import anyio
import pytest
from anyio import create_task_group
from anyio.lowlevel import checkpoint

from anyio_sharedstream import SharedSource, SubscriberOverflow
from tests.explore_support import Gate, Scenario, at_once, dawdle, holds, published, subscribed
from tests.support import Busy, Feed
from tests.sweep import managed

pytestmark = pytest.mark.usefixtures("unlogged")


async def lesson_06_a_slow_consumer_is_bounded_told_and_alone() -> None:
    """The others have a bound so large that being left waiting for a while does not make them slow."""

    source = Busy().source

    async def read_slowly() -> None:
        async with manager.subscribe(source, max_buffer_size=2) as stream:
            expected = published(manager, stream)
            with suppress(SubscriberOverflow):
                while True:
                    assert stream.statistics().current_buffer_used <= 2
                    assert await stream.receive() == expected
                    expected += 1
                    await dawdle(8)
            assert not subscribed(manager, stream)

    async def read() -> None:
        async with manager.subscribe(source, max_buffer_size=5_000) as stream:
            first = published(manager, stream)
            assert [await stream.receive() for _ in range(50)] == list(range(first, first + 50))

    async with managed() as manager, create_task_group() as tasks:
        tasks.start_soon(at_once, 2, read)
        await at_once(2, read_slowly)


async def lesson_09_what_a_subscriber_does_with_an_event_reaches_no_sibling() -> None:
    feed = Feed()
    joined = Gate(4)

    def refuse(event: int) -> bool:
        if event == bad:
            raise ZeroDivisionError
        return True

    async def choose() -> None:
        async with manager.subscribe(feed.source, where=refuse) as stream:
            joined.come()
            got: list[int] = []
            with suppress(ZeroDivisionError):
                while True:
                    got.append(await stream.receive())
            assert got == [*range(bad)]

    async def misbehave() -> None:
        with suppress(KeyError):
            async with manager.subscribe(feed.source) as stream:
                joined.come()
                raise KeyError(await stream.receive())

    async def behave() -> None:
        async with manager.subscribe(feed.source) as stream:
            joined.come()
            assert [await stream.receive() for _ in range(4)] == [0, 1, 2, 3]

    bad = random.randrange(4)
    async with managed(feed) as manager, create_task_group() as tasks:
        tasks.start_soon(at_once, 1, choose)
        tasks.start_soon(at_once, 1, misbehave)
        tasks.start_soon(at_once, 2, behave)
        await joined.wait()
        for event in range(4):
            feed.emit(event)
            await dawdle()


async def lesson_12_generators_are_finalised_in_the_task_that_ran_them() -> None:
    began: list[int] = []
    ended: list[int] = []

    async def play() -> AsyncGenerator[int, None]:
        began.append(anyio.get_current_task().id)
        try:
            with anyio.CancelScope():
                while True:
                    yield 1
                    await dawdle()
        finally:
            with anyio.CancelScope(shield=True):
                await dawdle()
            ended.append(anyio.get_current_task().id)

    async def visit() -> None:
        for _ in range(2):
            with anyio.CancelScope() as scope:
                async with manager.subscribe(SharedSource(key="generator", open=play)) as stream:
                    for _ in range(random.randrange(3)):
                        await stream.receive()
                    if random.random() < 0.3:
                        scope.cancel()

    async with managed() as manager:
        await at_once(3, visit)
    assert began == ended


async def lesson_13_every_subscriber_has_an_exception_of_its_own() -> None:
    feed = Feed()
    joined = Gate(4)
    errors: list[BaseException] = []

    async def subscribe() -> None:
        number = len(errors)
        async with manager.subscribe(feed.source) as stream:
            joined.come()
            for _ in range(2):
                await dawdle()
                with pytest.raises(ValueError, match="shared") as caught:
                    await stream.receive()
                assert not hasattr(caught.value, "__notes__")
                caught.value.add_note(f"seen by {number}")
                errors.append(caught.value)

    async with managed(feed) as manager, create_task_group() as tasks:
        tasks.start_soon(at_once, 4, subscribe)
        await joined.wait()
        feed.fail(ValueError("shared"))
    assert len({id(error) for error in errors}) == 8
    assert len({depth(error) for error in errors}) == 1


def depth(error: BaseException) -> int:
    """Of its traceback."""
    frames, traceback = 0, error.__traceback__
    while traceback is not None:
        frames, traceback = frames + 1, traceback.tb_next
    return frames


request: ContextVar[str] = ContextVar("request", default="none")


async def lesson_14_the_first_subscribers_context_is_not_the_upstreams() -> None:
    async def play() -> AsyncGenerator[str, None]:
        while True:
            yield request.get()
            await checkpoint()

    async def subscribe() -> None:
        name = str(random.random())
        request.set(name)
        async with manager.subscribe(SharedSource(key="context", open=play)) as stream:
            assert [await stream.receive() for _ in range(2)] == ["none", "none"]
        assert request.get() == name

    async with managed() as manager:
        await at_once(3, subscribe)


async def lesson_21_a_receiver_is_not_slowed_to_one_item_per_turn_of_the_loop() -> None:
    """What others do in the meantime is counted; nothing may happen between two events of a burst."""
    steps = 0
    feed = Feed()

    async def live() -> None:
        nonlocal steps
        while True:
            steps += 1
            await checkpoint()

    async def subscribe() -> None:
        async with manager.subscribe(feed.source, max_buffer_size=8) as stream:
            joined.come()
            for burst in range(3):
                assert await stream.receive() == (burst, 0)
                before = steps
                assert [await stream.receive() for _ in range(7)] == [(burst, n) for n in range(1, 8)]
                assert steps == before
                taken[burst].come()

    joined = Gate(2)
    taken = [Gate(2) for _ in range(3)]
    async with managed(feed) as manager, create_task_group() as tasks:
        tasks.start_soon(live)
        tasks.start_soon(at_once, 2, subscribe)
        await joined.wait()
        for burst in range(3):
            feed.emit(*((burst, n) for n in range(8)))
            await taken[burst].wait()
        tasks.cancel_scope.cancel()


SCENARIOS: list[Scenario] = [
    lesson_06_a_slow_consumer_is_bounded_told_and_alone,
    lesson_09_what_a_subscriber_does_with_an_event_reaches_no_sibling,
    lesson_12_generators_are_finalised_in_the_task_that_ran_them,
    lesson_13_every_subscriber_has_an_exception_of_its_own,
    lesson_14_the_first_subscribers_context_is_not_the_upstreams,
    lesson_21_a_receiver_is_not_slowed_to_one_item_per_turn_of_the_loop,
]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_lesson_holds_in_any_order(scenario: Scenario, backend: Literal["asyncio", "trio"]) -> None:
    holds(scenario, backend)
