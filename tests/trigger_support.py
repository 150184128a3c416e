"""What the tests of triggers share: small triggers, and ways to see what becomes of them."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import anyio
from anyio import CancelScope, get_cancelled_exc_class
from anyio.lowlevel import checkpoint

from anyio_sharedstream import Subscription
from anyio_sharedstream.triggers import (
    BaseEventTrigger,
    TriggerEvent,
    TriggerFailed,
    TriggerFired,
    TriggerOutcome,
    TriggerRunner,
)
from tests.support import Feed

Events = AsyncIterator[TriggerEvent]


async def every(stream: AsyncIterable[Any]) -> Events:
    async for event in stream:
        yield TriggerEvent(event)


class Shared(BaseEventTrigger):
    """Shares a feed; fires as its filter says."""

    def __init__(self, feed: Feed, events: Callable[[Subscription[Any]], Events] = every) -> None:
        self.feed = feed
        self.events = events

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return "tests.test_triggers.Shared", {"feed": self.feed, "trigger": self}

    def shared_stream_key(self) -> Any:
        return self.feed.key

    @classmethod
    def open_shared_stream(cls, kwargs: dict[str, Any]) -> Any:
        return kwargs["feed"].source.open()

    def filter_shared_stream(self, shared_stream: Subscription[Any]) -> Events:
        return self.events(shared_stream)


def alone(run: Callable[[], object]) -> Any:
    """A trigger without a key, written against nothing but what the runner calls."""
    return SimpleNamespace(shared_stream_key=lambda: None, run=run)


def yields(*payloads: Any) -> Any:
    """A trigger that fires with each of these, then finishes."""

    async def run() -> Events:
        for payload in payloads:
            yield TriggerEvent(payload)

    return alone(run)


class Waits:
    """A trigger's own loop that waits to be woken, and records its clean-up; *clean_up* is awaited, shielded, before that."""

    def __init__(self, clean_up: Callable[[], Any] = checkpoint) -> None:
        self.clean_up = clean_up
        self.wake = anyio.Event()
        self.started = 0
        self.cleaned_up = 0

    async def __call__(self) -> Events:
        self.started += 1
        try:
            await self.wake.wait()
            yield TriggerEvent("awake")
        finally:
            with CancelScope(shield=True):
                await self.clean_up()
            self.cleaned_up += 1


def fired(trigger_id: Any, *payloads: Any) -> list[TriggerOutcome]:
    return [TriggerFired(trigger_id, TriggerEvent(payload)) for payload in payloads]


async def take(runner: TriggerRunner, count: int) -> list[TriggerOutcome]:
    return [await runner.outcomes.receive() for _ in range(count)]


async def rest(runner: TriggerRunner) -> list[TriggerOutcome]:
    """What can still be read once the runner has been left."""
    return [outcome async for outcome in runner.outcomes]


async def failure(runner: TriggerRunner) -> Exception:
    outcome = await runner.outcomes.receive()
    assert isinstance(outcome, TriggerFailed)
    return outcome.error


async def cancellation() -> BaseException:
    """A cancellation that has lost its scope."""
    with CancelScope() as scope:
        scope.cancel()
        try:
            await checkpoint()
        except get_cancelled_exc_class() as exc:
            stray = exc
            raise
    return stray


def raising(error: BaseException) -> Callable[..., Any]:
    def method(*_: object) -> Any:
        raise error

    return method


class Plain:
    """An async iterator that is no generator."""

    def __init__(self, *steps: Any) -> None:
        self.steps = list(steps)

    def __aiter__(self) -> Plain:
        return self

    async def __anext__(self) -> TriggerEvent:
        if not self.steps:
            raise StopAsyncIteration
        step = self.steps.pop(0)
        if isinstance(step, BaseException):
            raise step
        return TriggerEvent(step)


class Closable(Plain):
    """The same, with something to close; *error* is what that raises."""

    error: BaseException | None = None
    closed = 0

    async def aclose(self) -> None:
        self.closed += 1
        if self.error is not None:
            raise self.error


class Wrapped:
    """An async iterator that hides a generator: nothing can be thrown into it."""

    def __init__(self, generator: Events) -> None:
        self.generator = generator

    def __aiter__(self) -> Wrapped:
        return self

    async def __anext__(self) -> TriggerEvent:
        return await anext(self.generator)


class Peculiar(BaseException):
    """No Exception, and no group would be."""
