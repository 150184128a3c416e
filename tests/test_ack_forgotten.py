"""A `Pending` that is forgotten has failed, on whatever thread and in the middle of whatever that comes to light."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from structlog.testing import LogCapture

from anyio_sharedstream import Pending, SharedStreamManager
from tests.ack_support import ACKED, FAILED, Broker
from tests.support import idle, settle, until
from tests.sweep import managed
from tests.test_ack_pending import AT_ONCE, VERBS, deferred, state
from tests.virtual_time import run


def forget_here(forget: Callable[[], object]) -> None:
    forget()
    gc.collect()


def forget_on_a_thread(forget: Callable[[], object]) -> None:
    thread = threading.Thread(target=forget_here, args=[forget])
    thread.start()
    thread.join()


threads = pytest.mark.parametrize("forget", [forget_here, forget_on_a_thread])


@threads
async def test_what_is_forgotten_has_failed_with_a_warning(
    forget: Callable[[Any], None], manager: SharedStreamManager, lines: LogCapture
) -> None:
    broker = Broker()
    async with manager, manager.subscribe(broker.source(), subscriber_id="mine") as stream:
        broker.emit(1, 2, 3)
        assert await stream.receive_batch(2) == (1, 2)
        pendings = [stream.defer()]
        pendings.append(await deferred(stream, 3))
        pendings[1].ack()
        before = len(lines.entries)
        forget(pendings.clear)
        assert len(lines.entries) == before  # a finaliser only has it done later
        await until(lambda: broker.outcomes)
        await settle()
        assert broker.outcomes == {1: FAILED, 2: FAILED, 3: ACKED}
        assert lines.entries[before:] == [
            {
                "key": "broker",
                "subscriber": "mine",
                "event": "events failed",
                "events": 2,
                "reason": "its Pending was forgotten",
                "log_level": "warning",
            }
        ]
        assert stream.statistics().events_deferred == 0


@threads
async def test_an_event_loop_that_sleeps_is_woken_for_what_is_forgotten(forget: Callable[[Any], None]) -> None:
    broker = Broker()
    closed = threading.Event()
    async with managed() as manager, anyio.create_task_group() as tasks:
        async with manager.subscribe(broker.source()) as stream:
            broker.emit(1)
            pendings = [await deferred(stream, 1)]

        def elsewhere() -> None:
            forget(pendings.clear)
            closed.wait()

        tasks.start_soon(anyio.to_thread.run_sync, elsewhere)
        # The thread stays until the end, and nothing else happens here: this is over in no time, or after the drain_timeout.
        await manager.stop("broker")
        closed.set()
        assert broker.outcomes == {1: FAILED}
        assert idle(manager)


async def test_the_last_one_to_be_forgotten_ends_what_waited_for_it() -> None:
    broker = Broker()
    async with managed() as manager:
        async with manager.subscribe(broker.source()) as stream:
            broker.emit(1, 2)
            pendings = [await deferred(stream, 1), await deferred(stream, 2)]
        pendings.pop().ack()
        await settle()
        assert state(manager) == "draining"
        pendings.clear()
        gc.collect()
        await until(lambda: idle(manager))
    assert broker.outcomes == {1: FAILED, 2: ACKED}


async def test_it_may_be_forgotten_in_the_middle_of_a_publication_and_so_may_it_be_resolved() -> None:
    broker = Broker()
    forgotten: list[Pending] = []
    resolved: list[Pending] = []

    def meanwhile(_: object) -> bool:
        forgotten.clear()
        gc.collect()
        while resolved:
            resolved.pop().ack()
        return True

    async with managed() as manager, manager.subscribe(broker.source()) as stream:
        broker.emit(1, 2)
        forgotten.append(await deferred(stream, 1))
        resolved.append(await deferred(stream, 2))
        async with manager.subscribe(broker.source(), where=meanwhile) as other:
            broker.emit(3)
            assert await other.receive() == await stream.receive() == 3
            await settle()
            assert broker.outcomes == {1: FAILED, 2: ACKED}
    assert broker.outcomes == {1: FAILED, 2: ACKED, 3: (2, 0, 0, 0)}


async def test_what_is_forgotten_of_an_upstream_that_is_gone_is_of_no_consequence(
    manager: SharedStreamManager, lines: LogCapture
) -> None:
    broker = Broker()
    async with manager, manager.subscribe(broker.source(restart=AT_ONCE)) as stream:
        broker.emit(1, 2)
        pendings = [await deferred(stream, 1)]
        assert await stream.receive() == 2
        broker.fail(OSError("lost"))
        await until(lambda: broker.opened == 2)
        pendings.append(stream.defer())
        broker.emit(1)
        pendings.append(await deferred(stream, 1))
        for left in (2, 1):
            del pendings[0]
            gc.collect()
            await until(lambda left=left: stream.statistics().events_deferred == left)  # type: ignore[misc]
            await settle()
            assert (lines.entries[-1]["event"], lines.entries[-1]["log_level"]) == ("too late to say", "debug")
        assert not broker.outcomes
        pendings.pop().ack()
        await settle()
        assert broker.outcomes == {1: ACKED}


@pytest.mark.parametrize("say", [*VERBS, None])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_when_the_event_loop_has_ended_nothing_that_is_said_or_forgotten_matters(say: str | None, backend: str) -> None:
    broker = Broker()

    async def main() -> Pending:
        async with managed() as manager, manager.subscribe(broker.source(drain_timeout=1)) as stream:
            broker.emit(1)
            return await deferred(stream, 1)

    pending = run(main, backend=backend)
    if say is not None:
        getattr(pending, say)()
        with pytest.raises(RuntimeError, match=f"was {VERBS[say]} before"):
            pending.ack()
    del pending
    gc.collect()  # what a finaliser raises is an error here
    assert not broker.outcomes


async def test_who_has_left_is_not_kept_alive_by_an_upstream_that_goes_on() -> None:
    broker = Broker()

    async def visit(manager: SharedStreamManager) -> weakref.ref[Any]:
        async with manager.subscribe(broker.source()) as stream:
            broker.emit(1)
            assert await stream.receive() == 1
        return weakref.ref(stream)

    async with managed() as manager, manager.subscribe(broker.source()) as other:
        gone = await visit(manager)
        assert await other.receive() == 1
        await settle()
        gc.collect()
        assert gone() is None


def test_one_that_was_made_wrongly_goes_without_a_word() -> None:
    make: Any = Pending
    with pytest.raises(TypeError):
        make()
    gc.collect()  # what its finaliser raises fails this test
