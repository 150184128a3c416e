"""Ways in which a subscriber says what became of an event without words: by going on, and by leaving."""

from __future__ import annotations

from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from anyio_sharedstream import (
    AckSubscription,
    Block,
    PollTerminated,
    Restart,
)
from tests.ack_support import ACKED, FAILED, RELEASED, Broker, Counts
from tests.support import settle, until
from tests.sweep import managed
from tests.virtual_time import in_virtual_time

AT_ONCE = Restart(initial_delay=0, jitter=0)

Take = Callable[[AckSubscription[Any]], Coroutine[Any, Any, Any]]


async def receive(stream: AckSubscription[Any]) -> Any:
    return await stream.receive()


async def receive_nowait(stream: AckSubscription[Any]) -> Any:
    return stream.receive_nowait()


async def iterate(stream: AckSubscription[Any]) -> Any:
    return await anext(stream)


async def receive_batch(stream: AckSubscription[Any]) -> Any:
    return (await stream.receive_batch(1))[0]


async def iterate_over_batches(stream: AckSubscription[Any]) -> Any:
    return (await anext(stream.batches(1)))[0]


WAITING: list[Take] = [receive, iterate, receive_batch, iterate_over_batches]
ways = pytest.mark.parametrize("take", [*WAITING, receive_nowait])
waiting_ways = pytest.mark.parametrize("take", WAITING)
#: With `Block` events are stored one by one, and otherwise in chunks.
policies = pytest.mark.parametrize("options", [{}, {"overflow": Block(1)}, {"where": lambda _: True}], ids=["", "block", "where"])


# Going on.


@policies
@ways
async def test_every_call_that_receives_acknowledges_what_came_before(take: Take, options: Any) -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source(), **options) as stream:
        broker.emit(1, 2, 3)
        await settle()
        for event in (1, 2, 3):
            assert await take(stream) == event
            assert stream.statistics().events_current > 0
            await settle()
            assert stream.statistics().events_current == 1
            assert broker.outcomes == dict.fromkeys(range(1, event), ACKED)
    assert broker.outcomes == {1: ACKED, 2: ACKED, 3: ACKED}
    assert broker.batches == [(None, [1]), (None, [2]), (None, [3])]


@policies
@ways
async def test_what_was_taken_in_one_go_is_acknowledged_while_its_consumer_is_busy_with_the_last(
    take: Take, options: Any
) -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source(), **options) as stream:
        broker.emit(*range(5))
        await settle()
        assert [await take(stream) for _ in range(3)] == [0, 1, 2]
        await settle()
        assert broker.outcomes == {0: ACKED, 1: ACKED}
        assert [await take(stream) for _ in range(2)] == [3, 4]
        await settle()
        assert broker.advanced == [0, 1, 2, 3]


@policies
@waiting_ways
async def test_a_call_that_waits_has_acknowledged_and_so_has_one_that_is_cancelled(take: Take, options: Any) -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source(), **options) as stream:
        async with anyio.create_task_group() as tasks:
            broker.emit(1)
            assert await take(stream) == 1
            tasks.start_soon(take, stream)
            await settle()
            assert broker.outcomes == {1: ACKED}
            assert stream.statistics().events_current == 0
            tasks.cancel_scope.cancel()
        broker.emit(2)
        assert await take(stream) == 2
        with anyio.CancelScope() as scope:
            scope.cancel()
            await take(stream)
        await settle()
        assert broker.outcomes == {1: ACKED, 2: ACKED}
        broker.emit(3)
        assert await take(stream) == 3
        await settle()
        assert broker.advanced == [1, 2]


@policies
async def test_a_call_that_finds_nothing_has_acknowledged(options: Any) -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source(), **options) as stream:
        broker.emit(1)
        assert await stream.receive() == 1
        for _ in range(2):
            with pytest.raises(anyio.WouldBlock):
                stream.receive_nowait()
        await settle()
        assert broker.outcomes == {1: ACKED}


@ways
async def test_a_call_that_is_refused_for_another_task_is_receiving_acknowledges_nothing(take: Take) -> None:
    broker = Broker()
    refused: list[int] = []
    got: list[int] = []
    async with managed() as manager, anyio.create_task_group() as tasks, manager.subscribe(broker.source()) as stream:

        def between(event: int) -> bool:
            # The reader has been woken for the event, and has yet to run.
            with pytest.raises(anyio.BusyResourceError):
                stream.receive_nowait()
            refused.append(event)
            return True

        async with manager.subscribe(broker.source(), where=between) as other:

            async def read() -> None:
                got.append(await stream.receive())

            tasks.start_soon(read)
            await settle()
            with pytest.raises(anyio.BusyResourceError):
                await take(stream)
            broker.emit(1)
            assert await other.receive() == 1
            await settle()
            assert got == refused == [1]
            other.fail()
            await settle()
            assert not broker.outcomes  # for the reader has it in hand
            assert stream.statistics().events_current == 1
            with pytest.raises(anyio.WouldBlock):
                stream.receive_nowait()
            await settle()
            assert broker.outcomes == {1: (1, 1, 0, 0)}


@ways
@pytest.mark.parametrize("read", WAITING)
@pytest.mark.parametrize("size", [1, 2])
async def test_a_reader_counts_as_receiving_until_it_has_resumed(read: Take, take: Take, size: int) -> None:
    broker = Broker()
    got: list[int] = []
    refused: list[int] = []
    async with managed() as manager, anyio.create_task_group() as tasks, manager.subscribe(broker.source()) as stream:

        def refuse(event: int) -> bool:
            with pytest.raises(anyio.BusyResourceError):
                take(stream).send(None)  # its first step, for nothing is awaited here
            refused.append(event)
            return True

        async with manager.subscribe(broker.source(), where=refuse):

            async def run() -> None:
                got.append(await read(stream))

            tasks.start_soon(run)
            await settle()
            refuse(0)
            broker.emit(*range(1, size + 1))
            await until(lambda: bool(got))
    assert got == [1]
    assert refused == list(range(size + 1))


@in_virtual_time
async def test_who_has_taken_a_whole_publication_in_which_another_stands_is_not_waited_for() -> None:
    broker = Broker()
    source = broker.source()
    async with managed() as manager, manager.subscribe(source) as slow, manager.subscribe(source) as fast:
        broker.emit(1, 2)
        await settle()
        assert [await slow.receive() for _ in range(2)] == [1, 2]
        await settle()
        assert not broker.outcomes
        assert await fast.receive_batch(2) == (1, 2)
        with pytest.raises(anyio.WouldBlock):
            fast.receive_nowait()
        await settle()
        assert broker.outcomes == {1: (2, 0, 0, 0)}
        assert slow.statistics().events_current == 1


async def test_a_batch_size_that_is_none_acknowledges_nothing() -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source()) as stream:
        broker.emit(1)
        assert await stream.receive() == 1
        wrong: list[Any] = [0, -1, True, "2"]
        for size in wrong:
            with pytest.raises(ValueError, match="max_size must be a positive number of events"):
                await stream.receive_batch(size)
        await settle()
        assert not broker.outcomes
        assert stream.statistics().events_current == 1


@policies
async def test_batches_and_single_events_in_turn(options: Any) -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source(), **options) as stream:
        broker.emit(*range(9))
        await settle()
        assert await stream.receive() == 0
        assert await stream.receive_batch(3) == (1, 2, 3)
        await settle()
        assert broker.advanced == [0]
        assert stream.statistics().events_current == 3
        assert stream.receive_nowait() == 4
        await settle()
        assert broker.advanced == [0, 1, 2, 3]
        assert await anext(stream.batches(2)) == (5, 6)
        assert await anext(stream) == 7
        await settle()
        assert broker.advanced == [*range(7)]
        assert await stream.receive_batch(100) == (8,)
        with pytest.raises(anyio.WouldBlock):
            stream.receive_nowait()
        await settle()
        assert broker.outcomes == dict.fromkeys(range(9), ACKED)


async def go_past(items: AsyncIterable[Any], last: object) -> None:
    async for item in items:
        if item == last:
            break


async def test_a_loop_acknowledges_all_that_it_has_gone_past_and_what_it_broke_off_at_stays_current() -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source(on_exhausted="end")) as stream:
        broker.emit(*range(7))
        await go_past(stream, 2)
        await settle()
        assert broker.advanced == [0, 1]
        await go_past(stream.batches(2), (5, 6))
        await settle()
        assert broker.advanced == [0, 1, 2, 3, 4]
        broker.emit(7, 8)
        broker.end()
        await go_past(stream, "the end")
    assert broker.outcomes == dict.fromkeys(range(9), ACKED)


@pytest.mark.parametrize(
    ("end", "terminal"), [(None, anyio.EndOfStream), (StopAsyncIteration(), PollTerminated), (OSError("gone"), OSError)]
)
async def test_a_call_that_meets_the_end_has_acknowledged(end: Exception | None, terminal: type[Exception]) -> None:
    broker = Broker()
    async with managed() as manager, anyio.create_task_group() as tasks, manager.subscribe(broker.source()) as stream:
        broker.emit(1, 2)
        assert await stream.receive() == 1
        if end is None:
            tasks.start_soon(manager.stop, broker.key)
        else:
            broker.fail(end)
        await settle()
        assert await stream.receive() == 2
        assert broker.outcomes.keys() <= {1}
        for _ in range(2):
            with pytest.raises(terminal):
                await stream.receive()
        await until(lambda: broker.log == ["stream closed", "closed"])
    assert broker.outcomes == {1: ACKED, 2: ACKED}


# Leaving.


class CrashError(Exception):
    """What a consumer raises."""


async def leave(how: str, stream: AckSubscription[Any], take: Callable[[], Awaitable[object]]) -> None:
    """Take something, and leave."""
    with anyio.CancelScope() as scope:
        try:
            async with stream:
                await take()
                if how == "exception":
                    raise CrashError
                if how == "cancelled":
                    scope.cancel()
                    await checkpoint()
                if how == "closed":
                    stream.close()
                    stream.close()
                if how == "aclosed":
                    await stream.aclose()
                if how == "caught":
                    with pytest.raises(CrashError):
                        raise CrashError
        except CrashError:
            assert how == "exception"


LEAVINGS: dict[str, Counts] = {
    "at its end": ACKED, "caught": ACKED, "exception": FAILED, "cancelled": FAILED, "closed": FAILED, "aclosed": FAILED
}  # fmt: skip


@policies
@pytest.mark.parametrize("how", LEAVINGS)
@pytest.mark.parametrize("size", [1, 3])
async def test_leaving_speaks_for_what_is_current_and_releases_what_was_never_taken(how: str, size: int, options: Any) -> None:
    broker = Broker()
    async with managed() as manager:
        stream = manager.subscribe(broker.source(), **options)

        async def take() -> None:
            broker.emit(*range(6))
            await settle()
            assert await stream.receive_batch(size) == tuple(range(size))

        await leave(how, stream, take)
        # Who leaves last goes when everything has been advanced; one that is cancelled does not wait for it.
        await until(lambda: broker.log == ["stream closed", "closed"])
        assert broker.outcomes == {event: LEAVINGS[how] if event < size else RELEASED for event in range(6)}
        assert broker.clean == {event: event < size and LEAVINGS[how] == ACKED for event in range(6)}
        assert broker.attempts == len(broker.batches) <= 2


@pytest.mark.parametrize("how", LEAVINGS)
async def test_whoever_stays_is_waited_for_and_its_acknowledgement_counts_beside_what_leavers_released(how: str) -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source()) as stays:
        stream = manager.subscribe(broker.source())

        async def take() -> None:
            broker.emit(1, 2, 3)
            assert await stream.receive() == 1

        await leave(how, stream, take)
        await settle()
        assert not broker.outcomes
        assert [await stays.receive() for _ in range(3)] == [1, 2, 3]
        await settle()
        acked, failed, *_ = LEAVINGS[how]
        assert broker.outcomes == {1: (1 + acked, failed, 0, 0), 2: (1, 0, 0, 1)}
        assert broker.clean == {1: not failed, 2: True}


async def test_who_leaves_without_having_taken_anything_releases_everything_and_is_not_waited_for() -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source()) as stays:
        async with manager.subscribe(broker.source()):
            broker.emit(1, 2)
            assert await stays.receive_batch(2) == (1, 2)
            with pytest.raises(anyio.WouldBlock):
                stays.receive_nowait()
            await settle()
            assert not broker.outcomes
        await settle()
        assert broker.outcomes == {1: (1, 0, 0, 1), 2: (1, 0, 0, 1)}


async def test_subscribers_that_join_after_a_publication_are_not_waited_for() -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source()) as first:
        broker.emit(1)
        assert await first.receive() == 1
        async with manager.subscribe(broker.source()) as second:
            broker.emit(2)
            assert await first.receive() == await second.receive() == 2
            await settle()
            assert broker.outcomes == {1: ACKED}
            second.reject()
        first.fail()
        await settle()
        assert broker.outcomes == {1: ACKED, 2: (0, 1, 1, 0)}


@pytest.mark.parametrize("size", [1, 2])
async def test_what_was_taken_is_acknowledged_when_the_reader_has_stopped_at_the_first_of_several_behind_it(size: int) -> None:
    broker = Broker()
    taken: dict[Any, Counts] = dict.fromkeys(range(size), ACKED)
    async with managed() as manager, manager.subscribe(broker.source()) as stream:
        broker.emit(*range(size))
        assert [await stream.receive() for _ in range(size)] == list(range(size))
        broker.emit("next", "last")
        await settle()
        assert await stream.receive() == "next"
        await settle()
        assert broker.outcomes == taken
        stream.fail()
        assert await stream.receive() == "last"
    assert broker.outcomes == {**taken, "next": FAILED, "last": ACKED}


@waiting_ways
async def test_a_call_that_is_cancelled_acknowledges_though_the_upstream_has_ended_and_more_is_ready(take: Take) -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source()) as stream:
        broker.emit(1)
        assert await take(stream) == 1
        broker.emit(2, 3)
        broker.end()
        await settle()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await take(stream)
        assert scope.cancelled_caught
        with pytest.raises(RuntimeError, match="no current event"):
            stream.fail()
        assert [await take(stream) for _ in range(2)] == [2, 3]
        with pytest.raises(PollTerminated):
            await take(stream)
    assert broker.outcomes == dict.fromkeys((1, 2, 3), ACKED)
