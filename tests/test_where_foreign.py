"""Predicates are foreign code inside a publication: what they raise is their own subscriber's, and what they do is seen to."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from anyio import get_cancelled_exc_class

from anyio_sharedstream import Conflate, Latest, SharedStreamError, SharedStreamManager
from tests.conftest import on_asyncio
from tests.contract_support import EVERY_POLICY, drain, even
from tests.support import Feed, settle, until


class RefusedError(Exception):
    """What a predicate raises."""


# What a predicate raises.


@EVERY_POLICY
async def test_a_predicate_that_raises_fails_its_own_subscriber_after_what_is_in_its_buffer(policy: Any) -> None:
    feed = Feed()
    failure = RefusedError("of 3")

    def where(number: int) -> bool:
        if number == 3:
            raise failure
        return number > 0

    async with (
        SharedStreamManager() as manager,
        manager.subscribe(feed.source) as witness,
        manager.subscribe(feed.source, where=where, overflow=policy) as stream,
        manager.subscribe(feed.source, where=where, routes=None) as sibling,
        manager.subscribe(feed.source, where=even) as other,
    ):
        feed.emit(*range(6))
        assert [await witness.receive() for _ in range(6)] == [*range(6)]
        assert [told.subscriber_id for told in manager.statistics().groups["feed"].subscriptions] == [
            witness.subscriber_id,
            other.subscriber_id,
        ]
        assert [stream.receive_nowait() for _ in range(stream.statistics().current_buffer_used)] == (
            [2] if policy == Latest() else [1, 2]
        )
        assert [await sibling.receive() for _ in range(2)] == [1, 2]
        raised: list[BaseException] = []
        for failed in (stream, sibling, stream):
            with pytest.raises(RefusedError, match="of 3") as caught:
                await failed.receive()
            raised.append(caught.value)
        assert len({id(error) for error in [*raised, failure]}) == 4  # what one does to its exception shows in no other
        assert "where" in [entry.name for entry in caught.traceback]
        feed.emit(6)
        assert await witness.receive() == 6
        assert drain(other) == [0, 2, 4, 6]
        assert feed.open_now == 1


async def test_what_was_refused_before_a_predicate_raised_counts_however_it_was_published() -> None:
    def where(number: int) -> bool:
        if number == 3:
            raise RefusedError
        return False

    for burst in ([1, 2, 3],), ([1], [2], [3]):
        feed = Feed()
        async with SharedStreamManager() as manager, manager.subscribe(feed.source, where=where) as stream:
            for events in burst:
                feed.emit(*events)
                await settle()
            with pytest.raises(RefusedError):
                await stream.receive()
            assert stream.statistics().events_refused == 2


async def test_the_last_subscriber_whose_predicate_raises_closes_the_upstream() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source, where=lambda _: 1 / 0) as stream:
        feed.emit(1)
        with pytest.raises(ZeroDivisionError):
            await stream.receive()
        assert not manager.statistics().groups
        await until(lambda: feed.closed)


@pytest.mark.parametrize("signal", [anyio.EndOfStream, anyio.WouldBlock, StopIteration, StopAsyncIteration])
async def test_a_streams_own_signals_that_leak_from_a_predicate_pass_for_no_word_of_the_subscription(signal: Any) -> None:
    # A quiet end, or "nothing yet" for ever: what a predicate that asks another stream or iterator would make of its loss.
    def where(_: object) -> bool:
        raise signal

    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source, where=where) as stream:
        feed.emit(1)
        await until(lambda: not manager.statistics().groups)
        for receive in (anext, lambda stream: stream.receive()):
            with pytest.raises(Exception) as caught:  # noqa: PT011 - of which class is left open
                await receive(stream)
            assert not isinstance(caught.value, signal)
            assert isinstance(caught.value.__cause__, signal)


async def test_what_a_policys_own_function_raises_is_its_own_subscribers_too() -> None:
    feed = Feed()
    by = {1: "one", 2: "two"}.__getitem__
    async with (
        SharedStreamManager() as manager,
        manager.subscribe(feed.source, overflow=Conflate(by)) as stream,
        manager.subscribe(feed.source, where=even, overflow=Conflate(by)) as sibling,
    ):
        feed.emit(1, 2, 3, 2)
        await settle()
        assert [await stream.receive() for _ in range(2)] == [1, 2]
        with pytest.raises(KeyError, match="3"):
            await stream.receive()
        assert drain(sibling) == [2]  # which has refused what it has no name for


# What a predicate does meanwhile.


async def test_a_predicate_may_subscribe_and_the_joiner_starts_after_the_publication() -> None:
    feed = Feed()
    joined: list[Any] = []
    entering: list[Any] = []

    def where(_: object) -> bool:
        if len(joined) < 2:
            joined.append(manager.subscribe(feed.source, where=where))
            # Entering is no checkpoint, so a function may do it.
            entering.append(joined[-1].__aenter__())
            with pytest.raises(StopIteration):
                entering[-1].send(None)
        return True

    async with SharedStreamManager() as manager, manager.subscribe(feed.source, where=where) as stream:
        feed.emit(1, 2)
        await until(lambda: stream.statistics().current_buffer_used)
        feed.emit(3)
        await until(lambda: stream.statistics().current_buffer_used == 3)
        assert drain(stream) == [1, 2, 3]
        assert [drain(other) for other in joined] == [[3], [3]]


@pytest.mark.parametrize("accepts", [True, False, None], ids=["accepts", "refuses", "raises"])
@EVERY_POLICY
async def test_a_predicate_may_close_any_subscription(policy: Any, accepts: bool | None) -> None:
    feed = Feed()
    streams: list[Any] = []

    def where(number: int) -> bool:
        if number == 2:
            for stream in streams[1:4]:
                stream.close()
            if accepts is None:
                raise RefusedError
        return accepts is True

    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as witness:
        for _ in range(2):
            streams += [await manager.subscribe(feed.source, overflow=policy).__aenter__()]
            streams += [await manager.subscribe(feed.source, where=where, overflow=policy).__aenter__()]
        streams += [await manager.subscribe(feed.source, where=even).__aenter__()]
        for number in range(4):
            feed.emit(number)
            await until(lambda: witness.statistics().current_buffer_used == number + 1)  # noqa: B023
        assert drain(witness) == [*range(4)]
        for stream in streams[1:4]:
            with pytest.raises(anyio.ClosedResourceError):
                stream.receive_nowait()
        assert drain(streams[4]) == [0, 2]
        assert len(manager.statistics().groups["feed"].subscriptions) == 3
    assert feed.closed == 1


async def test_a_predicate_may_leave_nobody() -> None:
    feed = Feed()
    streams: list[Any] = []

    def where(_: object) -> bool:
        for stream in streams:
            stream.close()
        return True

    async with SharedStreamManager() as manager:
        streams += [await manager.subscribe(feed.source, where=where).__aenter__() for _ in range(3)]
        feed.emit(1, 2, 3)
        await until(lambda: feed.closed)
        assert not manager.statistics().groups


@on_asyncio  # on trio a step of a task must be that task's own, so this cannot be had
@EVERY_POLICY
async def test_a_predicate_may_stop_the_group_and_nothing_is_added_any_more(policy: Any) -> None:
    feed = Feed()

    def where(number: int) -> bool:
        if number == 3:
            # As a task that starts eagerly does: the groups have stopped before the first suspension.
            stopping.send(None)
        return True

    async with SharedStreamManager() as manager:
        stopping = manager.stop("feed")
        plain = await manager.subscribe(feed.source).__aenter__()
        choosing = [await manager.subscribe(feed.source, where=where, overflow=policy).__aenter__() for _ in range(2)]
        other = await manager.subscribe(feed.source, where=even).__aenter__()
        for number in range(1, 4):
            feed.emit(number)
            await until(lambda: plain.statistics().current_buffer_used == number)  # noqa: B023
        await until(lambda: feed.closed)
        stopping.close()
        buffered = [2] if policy == Latest() else [1, 2]
        for stream, events in ((plain, [1, 2, 3]), (choosing[0], buffered), (choosing[1], buffered), (other, [2])):
            assert [event async for event in stream] == events
            with pytest.raises(anyio.EndOfStream):
                stream.receive_nowait()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=repr)
async def test_what_a_predicate_raises_that_is_no_exception_stops_the_manager_and_costs_no_sibling_an_event(
    error: BaseException,
) -> None:
    def where(_: object) -> bool:
        raise error

    feed = Feed()
    siblings: list[Any] = []

    async def run() -> None:
        async with SharedStreamManager() as manager:
            first, chooser, last = (manager.subscribe(feed.source, where=function) for function in (None, where, bool))
            siblings.extend([await stream.__aenter__() for stream in (first, chooser, last)])
            feed.emit(1)
            await anyio.sleep_forever()

    with pytest.raises(type(error)) as caught:
        await run()
    assert caught.value is error
    first, chooser, last = siblings
    assert first.receive_nowait() == last.receive_nowait() == 1
    with pytest.raises(SharedStreamError) as told:
        chooser.receive_nowait()
    assert told.value.__cause__ is error


@on_asyncio
async def test_a_cancellation_that_leaks_from_a_predicate_fails_its_own_subscriber_alone() -> None:
    def where(_: object) -> bool:
        raise get_cancelled_exc_class()

    feed = Feed()
    async with (
        SharedStreamManager() as manager,
        manager.subscribe(feed.source, where=where) as chooser,
        manager.subscribe(feed.source) as sibling,
    ):
        feed.emit(1, 2)
        assert await sibling.receive_batch(2) == (1, 2)
        with pytest.raises(SharedStreamError):
            await chooser.receive()
        feed.emit(3)
        assert await sibling.receive() == 3


@pytest.mark.parametrize("signal", [anyio.ClosedResourceError, anyio.BusyResourceError, anyio.EndOfStream, anyio.WouldBlock])
async def test_what_a_stream_would_say_of_itself_is_wrapped_if_a_predicate_says_it(signal: type[Exception]) -> None:
    def where(_: object) -> bool:
        raise signal("sending") if signal is anyio.BusyResourceError else signal

    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source, where=where) as stream:
        feed.emit(1)
        with pytest.raises(SharedStreamError, match=f"a function of this subscriber's own raised {signal.__name__}") as caught:
            await stream.receive()
        assert isinstance(caught.value.__cause__, signal)


async def test_a_predicate_is_not_asked_for_a_subscriber_that_another_one_has_closed() -> None:
    feed = Feed()
    asked: list[int] = []
    streams: list[Any] = []

    def close_the_other(_: object) -> bool:
        streams[1].close()
        return True

    async with SharedStreamManager() as manager:
        streams += [await manager.subscribe(feed.source, where=where).__aenter__() for where in (close_the_other, asked.append)]
        feed.emit(1, 2)
        assert await streams[0].receive_batch(2) == (1, 2)
        assert not asked
        await streams[0].aclose()
