"""What the clean-up of a silent upstream raises is not lost, whether its source is acknowledged or not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
import structlog
from structlog.testing import LogCapture

from anyio_sharedstream import AckSource, SharedSource, SharedStreamManager, UpstreamSilent
from tests.virtual_time import in_virtual_time


class Halt(KeyboardInterrupt):
    """So that the test is not interrupted itself."""


def source(acknowledged: bool, error: BaseException) -> SharedSource[Any]:
    async def play() -> AsyncIterator[Any]:
        try:
            yield (1, "payload") if acknowledged else 1
            await anyio.sleep_forever()
        finally:
            raise error

    class Producer:
        open_stream = staticmethod(play)

        async def advance(self, batch: Any) -> None:
            """The broker does not mind."""

    create: Any = Producer
    if acknowledged:
        return AckSource("silent", create, silence_timeout=5)
    return SharedSource(key="silent", open=play, silence_timeout=5)


@pytest.mark.parametrize("acknowledged", [False, True], ids=["plain", "acknowledged"])
@in_virtual_time
async def test_what_the_clean_up_of_a_silent_stream_raises_is_reported(acknowledged: bool) -> None:
    lines, error = LogCapture(), ValueError("cannot be closed")
    manager = SharedStreamManager(logger=structlog.wrap_logger(None, processors=[lines]))
    async with manager, manager.subscribe(source(acknowledged, error)) as stream:
        assert await stream.receive() == 1
        with pytest.raises(UpstreamSilent):
            await stream.receive()
    assert [line["exc_info"] for line in lines.entries if line["event"] == "clean-up failed"] == [error]


@pytest.mark.parametrize("acknowledged", [False, True], ids=["plain", "acknowledged"])
@in_virtual_time
async def test_an_interrupt_in_the_clean_up_of_a_silent_stream_leaves_the_manager(acknowledged: bool) -> None:
    async def program() -> None:
        async with SharedStreamManager() as manager, manager.subscribe(source(acknowledged, Halt())) as stream:
            assert await stream.receive() == 1
            with pytest.raises(UpstreamSilent):
                await stream.receive()

    with pytest.raises(Halt):
        await program()
