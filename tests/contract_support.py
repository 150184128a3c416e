"""What the tests of contracts share: every policy, with a bound that does not matter, and a look into a buffer."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any

import anyio
import pytest

from anyio_sharedstream import Block, Conflate, DropNewest, DropOldest, Fail, Latest, SharedSource
from tests.support import Feed

EVERY_POLICY = pytest.mark.parametrize(
    "policy", [Fail(), Block(math.inf), DropOldest(), DropNewest(), Latest(), Conflate(str), Conflate(str, max)], ids=repr
)


def even(number: int) -> bool:
    return number % 2 == 0


def routed(feed: Feed, route_by: Callable[[Any], Hashable]) -> SharedSource[Any]:
    """The feed as a source with routes."""
    return SharedSource(key=feed.key, open=feed.source.open, route_by=route_by)


def drain(stream: Any) -> list[Any]:
    """Take everything that is in a buffer."""
    events: list[Any] = []
    with suppress(anyio.WouldBlock):
        while True:
            events.append(stream.receive_nowait())
    return events
