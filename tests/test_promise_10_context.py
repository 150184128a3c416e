"""Promise 10: the upstream runs in the context variables of the manager's entry."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextvars import ContextVar
from typing import Any

import anyio
import pytest

from anyio_sharedstream import SharedSource, SharedStreamManager
from tests.support import Feed, idle, until

request: ContextVar[str] = ContextVar("request", default="default")


class Observed:
    """A source that notes the value of the variable when it is opened, driven and closed."""

    def __init__(self, key: str, below: SharedSource[Any] | None = None) -> None:
        self.seen: list[str] = []
        self.source = SharedSource(key=key, open=self._open)
        self.manager: SharedStreamManager
        self._below = below

    def _open(self) -> AsyncGenerator[str, None]:
        self.seen.append(request.get())
        return self._play()

    async def _play(self) -> AsyncGenerator[str, None]:
        try:
            self.seen.append(request.get())
            if self._below is not None:
                request.set("outer source")
                async with self.manager.subscribe(self._below) as stream:
                    await stream.receive()
            yield request.get()
            request.set("set by the source")
            await anyio.sleep_forever()
        finally:
            self.seen.append(request.get())


@pytest.fixture(autouse=True)
def fresh_variable() -> Any:
    token = request.set("before")
    yield
    request.reset(token)


async def test_open_iteration_and_clean_up_run_in_the_context_of_the_managers_entry() -> None:
    observed = Observed("context")
    request.set("manager")
    async with SharedStreamManager() as manager:
        request.set("first subscriber")
        async with manager.subscribe(observed.source) as stream:
            assert await stream.receive() == "manager"
            await until(lambda: manager.statistics().groups["context"].events_published)
            assert request.get() == "first subscriber"
    assert observed.seen == ["manager", "manager", "set by the source"]


async def test_it_does_not_matter_which_task_subscribes_first() -> None:
    observed = Observed("context")

    async def subscribe(name: str) -> None:
        request.set(name)
        async with manager.subscribe(observed.source) as stream:
            assert await stream.receive() == "manager"

    request.set("manager")
    async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:
        tasks.start_soon(subscribe, "one")
        tasks.start_soon(subscribe, "two")
    assert observed.seen[:2] == ["manager", "manager"]


async def test_what_one_upstream_sets_shows_in_no_other() -> None:
    observed = Observed("context")
    request.set("manager")
    async with SharedStreamManager() as manager:
        for _ in range(2):
            async with manager.subscribe(observed.source) as stream:
                assert await stream.receive() == "manager"
            assert idle(manager)


async def test_an_upstream_that_a_source_subscribes_to_has_the_managers_context_too() -> None:
    inner = Observed("inner")
    outer = Observed("outer", inner.source)
    request.set("manager")
    async with SharedStreamManager() as outer.manager, outer.manager.subscribe(outer.source) as stream:
        assert await stream.receive() == "outer source"
    assert inner.seen[:2] == ["manager", "manager"]


async def test_two_managers_have_two_contexts() -> None:
    one, two = Observed("context"), Observed("context")
    request.set("one")
    async with SharedStreamManager() as first:
        request.set("two")
        async with SharedStreamManager() as second, first.subscribe(one.source) as a, second.subscribe(two.source) as b:
            assert [await a.receive(), await b.receive()] == ["one", "two"]


async def test_the_subscribers_own_context_is_its_own() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager:
        request.set("subscriber")
        async with manager.subscribe(feed.source) as stream:
            feed.emit(1)
            await stream.receive()
            assert request.get() == "subscriber"
