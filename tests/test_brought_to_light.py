"""What came to light where a change of the code had made no difference to any test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import structlog
from structlog.testing import LogCapture

from anyio_sharedstream import DropNewest, DropOldest, Fold, Latest, Restart, SharedSource, SharedStreamManager
from tests.policies_support import publish
from tests.support import Feed, idle, settle, until
from tests.sweep import drain, managed


class Closes:
    """An event whose finaliser closes the subscription that drops it."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __del__(self) -> None:
        self.stream.close()


@pytest.mark.parametrize("gaps", [True, False])
@pytest.mark.parametrize("policy", [DropOldest(), DropNewest(), Latest()], ids=str)
async def test_a_finaliser_that_closes_the_subscription_that_drops_everything_has_closed_it(policy: Any, gaps: bool) -> None:
    feed = Feed()
    asked: Any = {"overflow": policy, "max_buffer_size": 2, "snapshot": True, "gaps": gaps}
    source = feed.asking_for(fold=Fold(0, lambda state, event: state + 1))
    async with managed(feed) as manager, manager.subscribe(source, **asked) as stream:
        await settle()
        drain(stream)
        await publish(feed, Closes(stream))
        await publish(feed, 1, 2, 3, 4)
        with pytest.raises(anyio.ClosedResourceError):
            await stream.receive()


async def test_a_cancellation_of_all_around_is_no_failure_of_an_upstream_that_may_be_restarted() -> None:
    feed, lines = Feed(), LogCapture()
    logger: Any = structlog.wrap_logger(None, processors=[lines])
    with anyio.CancelScope() as scope:
        async with SharedStreamManager(logger=logger) as manager:
            stream = await manager.subscribe(feed.asking_for(restart=Restart())).__aenter__()
            await settle()
            scope.cancel()
            with anyio.CancelScope(shield=True):
                await until(lambda: idle(manager))
    assert isinstance(drain(stream)[1], anyio.EndOfStream)
    assert [line["event"] for line in lines.entries if line["log_level"] in ("warning", "error")] == []


async def test_what_a_context_manager_raises_when_all_around_is_cancelled_is_told_with_a_restart_as_without() -> None:
    @asynccontextmanager
    async def opened() -> AsyncIterator[AsyncIterator[Any]]:
        try:
            yield feed.source.open()  # type: ignore[misc]
        finally:
            raise ValueError("broken")

    feed = Feed()
    with anyio.CancelScope() as scope:
        async with SharedStreamManager() as manager:
            source = SharedSource(key="feed", open=opened, restart=Restart())
            stream = await manager.subscribe(source).__aenter__()
            await settle()
            scope.cancel()
            with anyio.CancelScope(shield=True):
                await until(lambda: idle(manager))
    assert isinstance(drain(stream)[1], ValueError)
