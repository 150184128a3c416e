"""The ways into the state of draining and out of it, which only an acknowledged upstream goes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import pytest

from anyio_sharedstream import Pending, SharedStreamManager
from anyio_sharedstream._states import Move, State
from tests.ack_support import Broker
from tests.support import idle, settle
from tests.virtual_time import in_virtual_time


async def drains(linger: float = 0) -> tuple[Broker, SharedStreamManager, Pending]:
    """An upstream whose only subscriber leaves with an event deferred."""
    broker, manager = Broker(), SharedStreamManager()
    await manager.__aenter__()
    async with manager.subscribe(broker.source(linger=linger)) as stream:
        broker.emit(1)
        await stream.receive()
        pending = stream.defer()
    return broker, manager, pending


async def drains_when_left() -> None:
    _, manager, pending = await drains()
    assert manager.statistics().groups["broker"].state == "draining"
    pending.ack()
    await manager.__aexit__(None, None, None)


async def drains_when_nobody_has_come() -> None:
    _, manager, pending = await drains(linger=10)
    assert manager.statistics().groups["broker"].state == "lingering"
    await anyio.sleep(10)
    await settle()
    assert manager.statistics().groups["broker"].state == "draining"
    pending.ack()
    await manager.__aexit__(None, None, None)


async def is_adopted_while_it_drains() -> None:
    broker, manager, pending = await drains()
    async with manager.subscribe(broker.source()):
        assert manager.statistics().groups["broker"].state == "live"
        assert broker.opened == 1
        pending.ack()
    await manager.__aexit__(None, None, None)


async def ends_when_all_is_said() -> None:
    broker, manager, pending = await drains()
    pending.ack()
    assert not manager.statistics().groups
    await settle()
    assert idle(manager)
    assert broker.advanced == [1]
    await manager.__aexit__(None, None, None)


DRAINING: dict[tuple[State, Move], Callable[[], Awaitable[None]]] = {
    (State.LIVE, Move.DRAIN): drains_when_left,
    (State.LINGERING, Move.DRAIN): drains_when_nobody_has_come,
    (State.DRAINING, Move.ADOPT): is_adopted_while_it_drains,
    (State.DRAINING, Move.END): ends_when_all_is_said,
}


@pytest.mark.parametrize("transition", DRAINING, ids=lambda way: " ".join(part.name for part in way))
@in_virtual_time
async def test_each_transition_of_an_upstream_that_waits_for_what_was_deferred(transition: tuple[State, Move]) -> None:
    await DRAINING[transition]()
