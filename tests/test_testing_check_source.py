"""`check_source` finds nothing wrong with sound sources, and says what is wrong with each kind of unsound ones."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from anyio_sharedstream import AckSource, SharedSource
from anyio_sharedstream.testing import Finding, Pause, Raise, ScriptedSource, SourceNonconformance, _waiting, check_source, run
from anyio_sharedstream.testing import _life as life_module
from anyio_sharedstream.testing._watchdog import Interrupted, Watchdog
from tests.conftest import on_asyncio

#: What is kept alive on purpose, also after a test: see there.
STAYING: list[object] = []

QUICK: dict[str, Any] = {"patience": 0.2, "close_within": 0.2, "max_block": 1.0}


async def findings(open_: Callable[[], Any], **limits: Any) -> dict[str, Finding]:
    """What is found, by its rule."""
    with pytest.raises(SourceNonconformance) as caught:
        await check_source(SharedSource(key="bad", open=open_), **{**QUICK, **limits})
    for finding in caught.value.findings:
        assert f"- [{finding.rule}] {finding.detail}. Remedy: {finding.remedy}." in str(caught.value)
    return {finding.rule: finding for finding in caught.value.findings}


async def numbers() -> AsyncGenerator[int, None]:
    while True:
        yield 1
        await checkpoint()


# Sound sources.


@asynccontextmanager
async def managed() -> AsyncIterator[AsyncIterator[int]]:
    try:
        yield numbers()
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.01)


async def with_a_task_group() -> AsyncGenerator[int, None]:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.sleep_forever)
        while True:
            yield 1
            await checkpoint()


async def failing_after_a_while() -> AsyncGenerator[int, None]:
    yield 1
    await checkpoint()
    raise OSError("gone")


async def ending() -> AsyncGenerator[int, None]:
    yield 1
    await checkpoint()


async def ending_with_a_failure() -> AsyncGenerator[int, None]:
    with suppress(Exception):
        while True:
            yield 1
            await checkpoint()


class Iterating:
    """An iterator that is no generator, and has no way to be closed."""

    def __aiter__(self) -> AsyncIterator[int]:
        return self

    async def __anext__(self) -> int:
        await checkpoint()
        return 1


def receive_stream() -> Any:
    send, receive = anyio.create_memory_object_stream[int](10)
    with send:
        for number in range(10):
            send.send_nowait(number)
        return receive


async def not_minding_failures() -> AsyncGenerator[int, None]:
    while True:
        await checkpoint()
        with suppress(Exception):
            yield 1


sound = pytest.mark.parametrize(
    "open_",
    [
        numbers,
        managed,
        with_a_task_group,
        ScriptedSource().source().open,
        failing_after_a_while,
        ending,
        Iterating,
        receive_stream,
        not_minding_failures,
        ending_with_a_failure,
        ScriptedSource(1, Pause(0.01), 2, 3, closing=Pause(0.01)).source().open,
    ],
)


@sound
async def test_nothing_is_found_in_a_sound_source(open_: Callable[[], Any]) -> None:
    await check_source(SharedSource(key="sound", open=open_), **{**QUICK, "close_within": 5})


@sound
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_nothing_is_found_in_a_sound_source_in_virtual_time(open_: Callable[[], Any], backend: str) -> None:
    async def check() -> None:
        await check_source(SharedSource(key="sound", open=open_), max_block=1.0)

    run(check, backend=backend)


async def test_anything_that_can_be_opened_is_checked() -> None:
    await check_source(SimpleNamespace(open=numbers))
    only = numbers()
    with pytest.raises(SourceNonconformance, match="the source 'mine' is not sound"):
        await check_source(SimpleNamespace(open=lambda: only, key="mine"), **QUICK)


async def test_an_acknowledged_source_is_refused_for_it_gives_producers() -> None:
    create_producer: Any = object
    with pytest.raises(TypeError, match=r"gives producers: check what a producer's open_stream\(\) gives"):
        await check_source(AckSource("mine", create_producer))


# What does not open, or not again.


async def test_what_is_no_source_is_refused() -> None:
    with pytest.raises(TypeError, match="unlike 5"):
        await check_source(5)  # type: ignore[arg-type]


async def test_what_cannot_be_opened_is_found() -> None:
    async def failing() -> AsyncGenerator[int, None]:
        await checkpoint()
        yield int("nobody there")

    (finding,) = (await findings(failing)).values()
    assert (finding.rule, finding.detail) == (
        "opens",
        "it failed with ValueError(\"invalid literal for int() with base 10: 'nobody there'\")",
    )
    assert "TypeError" in (await findings(int))["opens"].detail
    slow = ScriptedSource(1, opening=Pause(100)).source()
    assert (await findings(slow.open))["opens"].detail == "it had not opened within 0.2 s"


async def test_what_is_the_same_at_each_opening_is_found() -> None:
    only = numbers()
    assert "returned the object again" in (await findings(lambda: only))["reopens"].detail


@pytest.mark.parametrize(
    ("later", "detail"),
    [
        ((Raise(OSError("in use")),), "it failed with OSError('in use')"),
        ((), "it had not given an event within 0.2 s"),
    ],
)
async def test_what_does_not_open_again_is_found(later: Any, detail: str) -> None:
    cancelled = ScriptedSource(1, 2, 3).then(*later)
    assert (await findings(cancelled.source().open))["reopens"].detail == f"opened again after it was cancelled, {detail}"
    failed = ScriptedSource(1, 2, 3).then(1).then(*later)
    assert (await findings(failed.source().open))["reopens"].detail == f"opened again after it has failed, {detail}"


async def test_what_ends_at_once_when_it_is_opened_again_is_found() -> None:
    events = iter([1, 2, 3])

    async def used_up() -> AsyncGenerator[int, None]:
        for event in events:
            yield event
            await checkpoint()

    detail = "opened again after it was cancelled, it ended without an event"
    assert (await findings(used_up))["reopens"].detail == detail


# What does not end.


async def test_a_clean_up_without_a_limit_is_found_with_its_line() -> None:
    @asynccontextmanager
    async def hanging() -> AsyncIterator[AsyncIterator[int]]:
        try:
            yield numbers()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep_forever()

    (finding,) = (await findings(hanging)).values()
    assert finding.rule == "closes"
    assert "0.2 s after it was cancelled it still waits: " in finding.detail
    assert finding.detail.endswith(f"in {hanging.__qualname__}")


async def test_what_does_not_end_after_a_failure_is_found() -> None:
    failing = ScriptedSource(1).then(1, closing=Pause(100)).then(1)
    assert "after it had failed it still waits" in (await findings(failing.source().open))["closes"].detail


async def test_what_goes_on_waiting_after_every_cancellation_is_found() -> None:
    async def stubborn() -> AsyncGenerator[int, None]:
        yield 1
        while True:
            with suppress(anyio.get_cancelled_exc_class()):
                await anyio.sleep_forever()

    found = await findings(stubborn, events=2)
    assert found["cancels"].detail == "it went on after it was cancelled 101 times"


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_what_goes_on_for_ever_is_found_in_virtual_time_as_well(backend: str) -> None:
    async def stubborn() -> AsyncGenerator[int, None]:
        yield 1
        while True:
            with suppress(BaseException):
                await anyio.sleep(1)

    async def check() -> None:
        assert "cancels" in await findings(stubborn)

    run(check, backend=backend)


async def test_what_gives_another_event_after_its_cancellation_is_found() -> None:
    async def swallowing() -> AsyncGenerator[int, None]:
        while True:
            with suppress(anyio.get_cancelled_exc_class()):
                await anyio.sleep(0.001)
            yield 1

    (finding,) = (await findings(swallowing)).values()
    assert (finding.rule, finding.detail) == ("cancels", "it gave another event after it was cancelled")


async def test_what_cannot_even_be_closed_is_found_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []

    def keep(tasks: list[Any]) -> None:
        kept.extend(tasks)
        _waiting.keep(tasks)

    monkeypatch.setattr(life_module, "keep", keep)

    async def immortal() -> AsyncGenerator[int, None]:
        yield 1
        while True:
            with suppress(BaseException):
                await anyio.sleep(1)

    assert "cancels" in await findings(immortal)
    assert kept


async def test_a_clean_up_that_fails_when_it_is_closed_by_force_is_ended() -> None:
    async def failing() -> AsyncGenerator[int, None]:
        yield 1
        try:
            with anyio.CancelScope(shield=True):
                await anyio.sleep_forever()
        finally:
            raise OSError("closed by force")

    assert list(await findings(failing)) == ["closes"]


async def test_what_nobody_can_wake_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    release = anyio.Event()

    async def hanging() -> AsyncGenerator[int, None]:
        yield 1
        with anyio.CancelScope(shield=True):
            await release.wait()

    monkeypatch.setattr(life_module.Life, "wake", lambda self: None)
    assert (await findings(hanging))["closes"].detail.endswith("; it cannot be ended, and still runs")
    release.set()
    await anyio.sleep(0.01)


async def test_a_task_of_the_source_that_nobody_can_end_is_left_behind(backend_name: str) -> None:
    release = anyio.Event()

    async def hold() -> None:
        with anyio.CancelScope(shield=True):
            await release.wait()

    async def hanging() -> AsyncGenerator[int, None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hold)
            yield 1
            await checkpoint()

    (finding,) = (await findings(hanging)).values()
    assert finding.rule == "closes"
    assert ("still runs" in finding.detail) == (backend_name == "trio")
    release.set()
    await anyio.sleep(0.01)


async def test_what_never_rests_in_its_clean_up_is_ended() -> None:
    @asynccontextmanager
    async def busy() -> AsyncIterator[AsyncIterator[int]]:
        try:
            yield numbers()
        finally:
            with anyio.CancelScope(shield=True):
                while True:
                    await checkpoint()

    (finding,) = (await findings(busy)).values()
    assert finding.rule == "closes"


async def test_a_failing_clean_up_is_found() -> None:
    async def failing() -> AsyncGenerator[int, None]:
        try:
            while True:
                yield 1
                await checkpoint()
        finally:
            raise OSError("in the clean-up")

    detail = "it raised OSError('in the clean-up') after it was cancelled"
    assert (await findings(failing))["cleans-up"].detail == detail


# What keeps the event loop for itself.


async def test_a_step_that_blocks_is_found_with_its_line() -> None:
    async def blocking() -> AsyncGenerator[int, None]:
        while True:
            time.sleep(0.1)  # noqa: ASYNC251  # that is what is wrong with it
            yield 1
            await checkpoint()

    (finding,) = (await findings(blocking, max_block=0.05)).values()
    assert finding.rule == "does-not-block"
    assert finding.detail.endswith(f"in {blocking.__qualname__}")
    assert "more than max_block=0.05 s: " in finding.detail


async def test_a_step_that_never_ends_is_interrupted() -> None:
    async def spinning() -> AsyncGenerator[int, None]:
        yield 1
        while True:
            time.sleep(0.001)  # noqa: ASYNC251  # that is what is wrong with it

    found = await findings(spinning, max_block=0.02, interrupt_after=0.1)
    assert ", and was interrupted: " in found["does-not-block"].detail


def test_an_interrupt_that_comes_late_is_no_error_of_the_step_after(monkeypatch: pytest.MonkeyPatch) -> None:
    end, late = Watchdog._end, [True]

    def interrupted(watchdog: Watchdog) -> None:
        if late and late.pop():
            raise Interrupted
        end(watchdog)

    monkeypatch.setattr(Watchdog, "_end", interrupted)
    with Watchdog(max_block=1, interrupt_after=5) as watchdog:
        assert watchdog.step(lambda: 1) == 1
        assert watchdog.step(lambda: 2) == 2
    assert watchdog.blocks == []


async def test_a_source_that_never_suspends_is_found() -> None:
    async def rushing() -> AsyncGenerator[int, None]:
        while True:
            yield 1

    (finding,) = (await findings(rushing)).values()
    assert finding.rule == "takes-turns"


# The check itself.


async def test_an_interrupt_leaves_the_check_as_itself() -> None:
    async def interrupted() -> AsyncGenerator[int, None]:
        yield 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await check_source(SharedSource(key="interrupted", open=interrupted))


async def test_a_check_that_is_cancelled_closes_the_source() -> None:
    feed = ScriptedSource(1, closing=Pause(0.01))
    with anyio.move_on_after(0.01) as scope:
        await check_source(feed.source(), patience=100)
    assert scope.cancelled_caught
    assert (feed.opened, feed.closed) == (1, 1)


@on_asyncio
async def test_no_task_is_left_on_asyncio() -> None:
    before = len(anyio.get_running_tasks())
    await check_source(SharedSource(key="sound", open=with_a_task_group))
    assert len(anyio.get_running_tasks()) == before
