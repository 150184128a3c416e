"""Where a task waits is found through everything that Python lets one await."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from types import coroutine
from typing import Any

import pytest

from anyio_sharedstream.testing import _waiting
from anyio_sharedstream.testing._waiting import await_chain, where


@coroutine
def trap() -> Generator[Any, Any, None]:
    yield


class Delegating:
    """Awaitable because something else is."""

    def __await__(self) -> Generator[Any, Any, None]:
        return inside().__await__()


async def inside() -> None:
    await trap()


async def generated() -> AsyncGenerator[int, None]:
    try:
        yield 1
    finally:
        await inside()


async def iterating() -> None:
    async for _ in generated():
        pass


async def asking_for_one_more() -> None:
    events = generated()
    await anext(events)
    await anext(events, None)


async def throwing() -> None:
    events = generated()
    await anext(events)
    await events.athrow(ValueError())


async def delegating() -> None:
    await Delegating()


@pytest.mark.parametrize("function", [iterating, asking_for_one_more, throwing, delegating])
def test_the_chain_reaches_the_innermost_function(function: Any) -> None:
    suspended = function()
    suspended.send(None)
    names = [frame.f_code.co_name for frame in await_chain(suspended)]
    assert (names[0], names[-2:]) == (function.__name__, ["inside", "trap"])
    assert where(suspended).endswith(" in trap")
    with pytest.raises(ValueError if function is throwing else StopIteration):
        suspended.send(None)
    assert where(suspended) == "nowhere: it has ended"


def test_what_leads_nowhere_ends_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_waiting, "_WRAPPERS", {"object"})
    assert list(await_chain(object())) == []
