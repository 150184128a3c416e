"""`reject`, `fail` and `defer`: what a subscriber says in words of what is current."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest
from structlog.testing import LogCapture

from anyio_sharedstream import (
    AckSubscription,
    SharedStreamManager,
)
from tests.ack_support import ACKED, FAILED, REJECTED, Broker, Counts
from tests.support import settle
from tests.sweep import managed
from tests.test_ack_resolution import Take, policies, ways


def reject(stream: AckSubscription[Any]) -> None:
    stream.reject("malformed")


def fail(stream: AckSubscription[Any]) -> None:
    stream.fail("malformed")


def defer(stream: AckSubscription[Any]) -> None:
    stream.defer().ack()


words = pytest.mark.parametrize(
    ("say", "outcome"), [(reject, REJECTED), (fail, FAILED), (defer, ACKED)], ids=["reject", "fail", "defer"]
)
Say = Callable[[AckSubscription[Any]], None]


@policies
@words
async def test_a_word_is_for_what_is_current_alone_and_nothing_else_is_said_of_that(
    say: Say, outcome: Counts, options: Any
) -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source(), **options) as stream:
        broker.emit(*range(7))
        await settle()
        assert [await stream.receive() for _ in range(3)] == [0, 1, 2]
        say(stream)
        await settle()
        assert broker.outcomes == {0: ACKED, 1: ACKED, 2: outcome}
        assert await stream.receive_batch(3) == (3, 4, 5)
        say(stream)
        assert await stream.receive() == 6
        await settle()
        assert broker.outcomes == {0: ACKED, 1: ACKED, 2: outcome, 3: outcome, 4: outcome, 5: outcome}
        say(stream)
    assert broker.outcomes[6] == outcome
    assert [event for event, clean in broker.clean.items() if not clean] == ([2, 3, 4, 5, 6] if outcome != ACKED else [])


@policies
@words
@ways
async def test_a_word_in_one_go_with_what_was_taken_before_and_after_from_one_publication_or_several(
    take: Take, say: Say, outcome: Counts, options: Any
) -> None:
    sizes = (1, 3, 1, 1, 2)
    for spoken in range(8):
        broker = Broker()
        async with managed() as manager, manager.subscribe(broker.source(), **options) as stream:
            events = iter(range(8))
            for size in sizes:
                broker.emit(*(next(events) for _ in range(size)))
                await settle()
            for event in range(8):
                assert await take(stream) == event
                if event == spoken:
                    say(stream)
            await settle()
            assert broker.advanced == [*range(8)][: 8 if spoken == 7 else 7]
        assert broker.outcomes == {**dict.fromkeys(range(8), ACKED), spoken: outcome}


@words
async def test_with_nothing_current_there_is_nothing_to_speak_of(say: Say, outcome: Counts) -> None:
    broker = Broker()

    def refused() -> None:
        with pytest.raises(RuntimeError, match=r"AckSubscription 'mine' of 'broker'> has no current event"):
            say(stream)

    async with managed() as manager:
        stream = manager.subscribe(broker.source(), subscriber_id="mine")
        refused()
        async with stream:
            refused()
            broker.emit(1, 2)
            await settle()
            refused()
            assert await stream.receive() == 1
            say(stream)
            refused()
            assert await stream.receive() == 2
            with pytest.raises(anyio.WouldBlock):
                stream.receive_nowait()
            refused()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(stream.receive)
                await settle()
                refused()
                tasks.cancel_scope.cancel()
        refused()
    assert broker.outcomes == {1: outcome, 2: ACKED}


@words
async def test_a_word_may_come_from_another_task_than_the_one_that_received(say: Say, outcome: Counts) -> None:
    broker = Broker()
    got: list[int] = []

    async def take(stream: AckSubscription[Any]) -> None:
        with anyio.fail_after(60):
            got.append(await stream.receive())

    async with managed() as manager, manager.subscribe(broker.source()) as stream:
        for event in (1, 2):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(take, stream)
                await settle()
                broker.emit(event)
            say(stream)
        await settle()
        assert got == [1, 2]
        assert broker.outcomes == {1: outcome, 2: outcome}


@pytest.mark.parametrize("say", ["reject", "fail"])
async def test_what_was_said_is_logged_with_its_reason(say: str, manager: SharedStreamManager, lines: LogCapture) -> None:
    broker = Broker()
    told = {"key": "broker", "subscriber": "mine", "event": f"events {say}ed", "log_level": "warning"}
    async with manager, manager.subscribe(broker.source(), subscriber_id="mine") as stream:
        broker.emit(1, 2, 3, 4)
        assert await stream.receive() == 1
        getattr(stream, say)(reason := ValueError("malformed"))
        assert lines.entries[-1] == {**told, "events": 1, "reason": reason}
        assert await stream.receive_batch(2) == (2, 3)
        getattr(stream, say)()
        assert lines.entries[-1] == {**told, "events": 2, "reason": None}
        assert await stream.receive() == 4
    assert len([line for line in lines.entries if line["log_level"] == "warning"]) == 2


async def test_everyones_words_add_up() -> None:
    broker = Broker()
    async with managed() as manager:
        streams = [await manager.subscribe(broker.source()).__aenter__() for _ in range(5)]
        broker.emit(1)
        await settle()
        for stream in streams[:4]:
            assert stream.receive_nowait() == 1
        for stream, say in zip(streams, (reject, fail, defer), strict=False):
            say(stream)
        streams[4].close()
        await settle()
        assert not broker.outcomes
        with pytest.raises(anyio.WouldBlock):
            streams[3].receive_nowait()
        await settle()
        assert broker.outcomes == {1: (2, 1, 1, 1)}
        assert broker.clean == {1: False}
        for stream in streams:
            stream.close()
    assert broker.outcomes == {1: (2, 1, 1, 1)}
