"""`Pending`: events that were deferred, resolved by anybody, once, at any time."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from structlog.testing import LogCapture

from anyio_sharedstream import AckSubscription, AckTimeout, Pending, Restart, SharedStreamManager
from tests.ack_support import ACKED, FAILED, REJECTED, RELEASED, Broker, Counts
from tests.support import idle, settle, until
from tests.sweep import managed
from tests.virtual_time import in_virtual_time

AT_ONCE = Restart(initial_delay=0, jitter=0)
VERBS = {"ack": "acknowledged", "fail": "failed", "reject": "rejected"}

words = pytest.mark.parametrize(("say", "outcome"), [("ack", ACKED), ("fail", FAILED), ("reject", REJECTED)])


async def deferred(stream: AckSubscription[Any], event: Any) -> Pending:
    assert await stream.receive() == event
    return stream.defer()


def state(manager: SharedStreamManager) -> str:
    return manager.statistics().groups["broker"].state


# Resolving.


@words
async def test_what_was_deferred_is_open_until_somebody_says_what_became_of_it(say: str, outcome: Counts) -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source()) as stream:
        broker.emit(1, 2, 3)
        first, second = await deferred(stream, 1), await deferred(stream, 2)
        assert await stream.receive() == 3
        with pytest.raises(anyio.WouldBlock):
            stream.receive_nowait()
        await settle()
        assert not broker.outcomes
        getattr(second, say)()
        await settle()
        assert not broker.outcomes  # of one lane, and the first is still open
        first.ack()
        await settle()
        assert broker.outcomes == {1: ACKED, 2: outcome, 3: ACKED}
        assert broker.batches == [(None, [1, 2, 3])]


async def test_neither_going_on_nor_leaving_speaks_for_what_was_deferred() -> None:
    broker = Broker(lane=lambda event: event)
    pendings: list[Pending] = []
    async with managed() as manager, manager.subscribe(broker.source()) as stays:
        broker.emit(*range(5))
        assert await stays.receive_batch(5) == tuple(range(5))
        stays.reject()
        for leave in ("at its end", "with an error", "closed"):
            with pytest.raises(OSError, match="mine") if leave == "with an error" else anyio.CancelScope():
                async with manager.subscribe(broker.source()) as stream:
                    broker.emit(leave)
                    pendings.append(await deferred(stream, leave))
                    if leave == "with an error":
                        raise OSError("mine")
                    if leave == "closed":
                        stream.close()
        await settle()
        assert broker.advanced == [*range(5)]
        assert await stays.receive_batch(5) == ("at its end", "with an error", "closed")
        stays.reject()
        await settle()
        assert broker.advanced == [*range(5)]
        for pending in pendings[::-1]:
            pending.ack()
        await settle()
        assert [broker.outcomes[leave] for leave in ("at its end", "with an error", "closed")] == [(1, 0, 1, 0)] * 3
        assert broker.advanced[5:] == ["closed", "with an error", "at its end"]


@pytest.mark.parametrize("again", VERBS)
@pytest.mark.parametrize("first", VERBS)
async def test_a_second_word_is_an_error_that_says_what_the_first_was_and_changes_nothing(first: str, again: str) -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source()) as stream:
        broker.emit(1)
        pending = await deferred(stream, 1)
        assert repr(pending) == f"<Pending of {stream!r}: unresolved>"
        getattr(pending, first)()
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"was {VERBS[first]} before: it cannot be {VERBS[again]} now"):
                getattr(pending, again)()
            await settle()
        assert repr(pending) == f"<Pending of {stream!r}: {VERBS[first]}>"
        assert broker.outcomes == {1: {"ack": ACKED, "fail": FAILED, "reject": REJECTED}[first]}
        assert stream.statistics().events_deferred == 0


@words
@pytest.mark.parametrize("options", [{}, {"where": lambda _: True}], ids=["", "where"])
async def test_a_batch_is_deferred_and_resolved_as_one(say: str, outcome: Counts, options: Any) -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source(), **options) as stream:
        broker.emit(*range(7))
        assert await stream.receive() == 0
        assert await stream.receive_batch(4) == (1, 2, 3, 4)
        pending = stream.defer()
        with pytest.raises(RuntimeError, match="no current event"):
            stream.defer()
        assert await stream.receive_batch(4) == (5, 6)
        assert stream.statistics().events_deferred == 4
        await settle()
        assert broker.outcomes == {0: ACKED}
        getattr(pending, say)()
        await settle()
        assert broker.outcomes == {0: ACKED, **dict.fromkeys((1, 2, 3, 4), outcome)}
        assert stream.statistics().events_deferred == 0


async def test_one_subscriber_may_defer_what_others_have_finished_and_several_may_defer_one_event() -> None:
    broker = Broker()
    async with (
        managed() as manager,
        manager.subscribe(broker.source()) as one,
        manager.subscribe(broker.source()) as two,
        manager.subscribe(broker.source(), where=lambda event: event != 1) as three,
    ):
        broker.emit(1, 2)
        pendings = [await deferred(one, 1), await deferred(two, 1), await deferred(three, 2)]
        assert await one.receive() == await two.receive() == 2
        told = manager.statistics().groups["broker"].acknowledgement
        assert told is not None
        assert told.deferred == 3
        one.fail()
        two.reject()
        pendings[0].reject()
        pendings[2].ack()
        await settle()
        assert not broker.outcomes
        pendings[1].ack()
        await settle()
        assert broker.outcomes == {1: (2, 0, 1, 0), 2: (1, 1, 1, 0)}


async def test_any_task_may_resolve() -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source()) as stream, anyio.create_task_group() as tasks:

        async def work(pending: Pending, done: anyio.Event) -> None:
            await done.wait()
            pending.ack()

        broker.emit(1, 2, 3)
        workers = [anyio.Event() for _ in range(3)]
        for number, done in enumerate(workers, 1):
            tasks.start_soon(work, await deferred(stream, number), done)
        advanced = []
        for done in (workers[0], workers[2], workers[1]):
            done.set()
            await settle()
            advanced.append(broker.advanced)
        assert advanced == [[1], [1], [1, 2, 3]]


@pytest.mark.parametrize("say", ["reject", "fail"])
async def test_what_was_said_is_logged_with_its_reason(say: str, manager: SharedStreamManager, lines: LogCapture) -> None:
    broker = Broker()
    async with manager, manager.subscribe(broker.source(), subscriber_id="mine") as stream:
        broker.emit(1, 2)
        assert await stream.receive_batch(2) == (1, 2)
        getattr(stream.defer(), say)("malformed")
        told = {"key": "broker", "subscriber": "mine", "event": f"events {VERBS[say]}", "log_level": "warning"}
        assert lines.entries[-1] == {**told, "events": 2, "reason": "malformed"}


async def test_nobody_defers_more_than_may_be_in_flight_those_of_dead_upstreams_included() -> None:
    broker = Broker()
    source = broker.source(max_in_flight=3, restart=AT_ONCE)
    async with managed() as manager, manager.subscribe(source, subscriber_id="mine") as stream:
        broker.emit(1, 2)
        old = [await deferred(stream, 1), await deferred(stream, 2)]
        broker.fail(OSError("lost"))
        await until(lambda: broker.opened == 2)
        broker.emit(1, 2, 3)
        assert await stream.receive_batch(2) == (1, 2)
        wanted = r"'mine' of 'broker'> has deferred 2 events, and with 2 more exceeds max_in_flight=3: resolve some of them first"
        for _ in range(2):
            with pytest.raises(RuntimeError, match=wanted):
                stream.defer()
        assert stream.statistics().events_current == 2
        old.pop().ack()
        new = [stream.defer()]
        assert await stream.receive() == 3
        with pytest.raises(RuntimeError, match="has deferred 3 events"):
            stream.defer()
        old.pop().ack()
        new.append(stream.defer())
        assert stream.statistics().events_deferred == 3
        broker.emit(4)
        await settle()
        assert stream.statistics().current_buffer_used == 0  # there is no room for it
        new[0].fail()
        new[1].ack()
        await settle()
        assert broker.outcomes == {1: FAILED, 2: FAILED, 3: ACKED}
        assert await stream.receive() == 4


@in_virtual_time
async def test_no_timeout_counts_for_what_was_deferred() -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source(ack_timeout=10)) as stream:
        broker.emit(1, 2)
        pending = await deferred(stream, 1)
        await anyio.sleep(1000)
        assert await stream.receive() == 2
        await anyio.sleep(9.999)
        pending.ack()
        await settle()
        assert broker.outcomes == {1: ACKED}
        await anyio.sleep(0.002)
        with pytest.raises(AckTimeout):
            await stream.receive()


# Leaving with something deferred.


@in_virtual_time
@words
async def test_the_last_leaver_does_not_wait_and_may_resolve_when_it_has_left(say: str, outcome: Counts) -> None:
    broker = Broker()
    async with managed() as manager:
        async with manager.subscribe(broker.source()) as stream:
            broker.emit(1, 2)
            pending = await deferred(stream, 1)
        assert state(manager) == "draining"
        await anyio.sleep(29.9)
        assert state(manager) == "draining"
        assert not broker.log
        getattr(pending, say)()
        await settle()
        assert broker.outcomes == {1: outcome, 2: RELEASED}
        assert broker.log == ["stream closed", "closed"]
        assert idle(manager)
    assert anyio.current_time() == 29.9


@in_virtual_time
async def test_a_joiner_adopts_what_waits_for_resolutions_and_neither_these_nor_their_time_end_it_then() -> None:
    broker = Broker()
    source = broker.source(drain_timeout=5)
    async with managed() as manager:
        async with manager.subscribe(source) as stream:
            broker.emit(1)
            pending = await deferred(stream, 1)
        for _ in range(3):
            assert state(manager) == "draining"
            await anyio.sleep(4)
            async with manager.subscribe(source) as stream:
                assert state(manager) == "live"
                await anyio.sleep(20)
        async with manager.subscribe(source) as stream:
            broker.emit(2)
            assert await stream.receive() == 2
            pending.ack()
            await settle()
            assert broker.outcomes == {1: ACKED}
            assert state(manager) == "live"
            await anyio.sleep(20)
        assert broker.outcomes == {1: ACKED, 2: ACKED}
        assert idle(manager)
    assert broker.opened == 1


@in_virtual_time
async def test_what_nobody_resolves_in_time_is_not_advanced_and_too_late_is_no_error() -> None:
    broker = Broker()
    async with managed() as manager:
        async with manager.subscribe(broker.source(drain_timeout=5)) as stream:
            broker.emit(1, 2)
            pending = await deferred(stream, 1)
        await anyio.sleep(4.999)
        assert state(manager) == "draining"
        await anyio.sleep(0.002)
        assert idle(manager)
        pending.ack()
        with pytest.raises(RuntimeError, match="acknowledged before"):
            pending.fail()
        await settle()
        assert not broker.outcomes
        assert broker.log == ["stream closed", "closed"]


@in_virtual_time
async def test_stopping_waits_for_what_was_deferred_and_goes_on_when_that_is_resolved() -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source()) as stream, anyio.create_task_group() as tasks:
        broker.emit(1)
        pending = await deferred(stream, 1)
        tasks.start_soon(manager.stop, "broker")
        await anyio.sleep(20)
        with pytest.raises(anyio.EndOfStream):
            await stream.receive()
        assert not broker.log
        pending.reject()
        await settle()
        assert broker.outcomes == {1: REJECTED}
        assert broker.log == ["stream closed", "closed"]
        assert idle(manager)


@words
async def test_resolutions_for_an_upstream_that_was_opened_again_are_ignored(
    say: str, outcome: Counts, manager: SharedStreamManager, lines: LogCapture
) -> None:
    broker = Broker()
    async with manager, manager.subscribe(broker.source(restart=AT_ONCE), subscriber_id="mine") as stream:
        broker.emit(1, 2)
        pending = await deferred(stream, 1)
        assert await stream.receive() == 2
        broker.fail(OSError("lost"))
        await until(lambda: broker.opened == 2)
        stale = stream.defer()
        broker.emit(1)
        again = await deferred(stream, 1)
        told = {"key": "broker", "subscriber": "mine", "event": "too late to say", "log_level": "debug"}
        for late in (pending, stale):
            getattr(late, say)()
            assert lines.entries[-1] == {**told, "events": 1, "said": {"ack": "acked"}.get(say, VERBS[say])}
            with pytest.raises(RuntimeError, match="before"):
                late.ack()
        await settle()
        assert not broker.outcomes
        assert stream.statistics().events_deferred == 1
        getattr(again, say)()
        await settle()
        assert broker.outcomes == {1: outcome}
        assert stream.statistics().events_deferred == 0
