"""Producers: by shape, broken ones, and what they are told."""

from __future__ import annotations

import gc
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextvars import ContextVar
from dataclasses import FrozenInstanceError
from typing import Any

import anyio
import pytest
import structlog
from structlog.testing import LogCapture

from anyio_sharedstream import (
    AckSource,
    AdvanceItem,
    AdvanceOutcome,
    PollTerminated,
    Restart,
    SharedStreamManager,
    SharedStreamProducer,
)
from tests.ack_support import Broker, finish
from tests.support import idle, settle, until
from tests.sweep import managed
from tests.trigger_support import cancellation
from tests.virtual_time import in_virtual_time


class Shape:
    """Not a subclass of anything, and with no method that need not be there."""

    def __init__(self) -> None:
        self.send, self.receive = anyio.create_memory_object_stream[Any](math.inf)
        self.batches: list[Sequence[AdvanceItem[Any]]] = []
        self.opened = 0

    def open_stream(self) -> Any:
        self.opened += 1
        return self.receive

    async def advance(self, batch: Sequence[AdvanceItem[Any]]) -> None:
        self.batches.append(batch)

    def source(self, **policies: Any) -> AckSource[Any]:
        create: Any = self.create
        return AckSource("shape", create, **policies)

    def create(self) -> Shape:
        return self


class Closing(Shape):
    """The same, with clean-up."""

    closing: Any = None

    async def aclose(self) -> None:
        self.closed = True
        if self.closing is not None:
            raise self.closing


async def test_any_object_with_the_methods_will_do_and_any_payload_in_one_lane_without_more() -> None:
    shape = Shape()
    payloads = [None, 0, [], {"unhashable": []}, object(), (1, 2)]
    async with managed() as manager, manager.subscribe(shape.source()) as stream:
        for number, payload in enumerate(payloads):
            shape.send.send_nowait((number, payload) if number % 2 else [number, payload])
        assert [await stream.receive() for _ in payloads] == [*range(len(payloads))]
    items = [item for batch in shape.batches for item in batch]
    assert [item.broker_payload for item in items] == payloads
    assert all(mine is theirs for (mine, _), theirs in zip(items, payloads, strict=True))
    assert {outcome for _, outcome in items} == {AdvanceOutcome(acked=1, failed=0, rejected=0, released=0)}
    assert all(type(item) is AdvanceItem and isinstance(batch, Sequence) for batch in shape.batches for item in batch)
    with pytest.raises(anyio.BrokenResourceError):  # what it had opened was closed
        shape.send.send_nowait((1, 1))
    shape.send.close()


def test_the_base_class_has_one_lane_and_nothing_to_close() -> None:
    with pytest.raises(TypeError, match="abstract"):
        SharedStreamProducer()  # type: ignore[abstract]

    class Producer(SharedStreamProducer[int, str]):
        async def open_stream(self) -> AsyncIterator[tuple[int, str]]:
            await anyio.lowlevel.checkpoint()
            yield 1, "one"

        async def advance(self, batch: Sequence[AdvanceItem[str]]) -> None:
            told.extend(batch)

    told: list[AdvanceItem[str]] = []

    async def main() -> None:
        async with managed() as manager, manager.subscribe(AckSource("key", Producer, on_exhausted="end")) as stream:
            assert [event async for event in stream] == [1]
        assert [payload for payload, _ in told] == ["one"]

    assert Producer().get_advance_lane("one") is None
    anyio.run(main)


async def no_producer() -> None:
    """Called without being awaited."""


class Lacking:
    """Has one of the methods."""

    def open_stream(self) -> None:
        """It is never called."""


def broken() -> Any:
    raise OSError("no broker")


@pytest.mark.parametrize("restart", [None, Restart(initial_delay=1, jitter=0, max_restarts=2)], ids=["", "restart"])
@pytest.mark.parametrize(
    ("create", "error", "message"),
    [
        (lambda: None, TypeError, "must return an object with open_stream.* not None"),
        (Lacking, TypeError, "must return an object with open_stream"),
        (lambda: SharedStreamProducer, TypeError, "open_stream"),  # the class, not an instance
        (lambda: no_producer(), TypeError, "must return an object with open_stream.* not <coroutine object"),
        (broken, OSError, "no broker"),
    ],
    ids=["None", "lacking", "class", "coroutine", "raises"],
)
@in_virtual_time
async def test_a_producer_that_cannot_be_created_is_a_failure_of_the_upstream(
    create: Callable[[], Any], error: type[Exception], message: str, restart: Restart | None
) -> None:
    async with managed() as manager, manager.subscribe(AckSource("key", create, restart=restart)) as stream:
        with pytest.raises(error, match=message):
            await stream.receive()
        await settle()
        assert anyio.current_time() == (0 if restart is None else 1 + 2)
        assert idle(manager)
        gc.collect()


class BadStream(Closing):
    """Whose stream is not what it should be."""

    def __init__(self, open_stream: Callable[[], Any]) -> None:
        super().__init__()
        self.receive.close()
        self.send.close()
        self.open_stream = open_stream  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("open_stream", "error", "message"),
    [
        (lambda: None, TypeError, r"open_stream\(\) of 'shape' must return an async iterable, not None"),
        (lambda: [(1, 2)], TypeError, r"open_stream\(\) of 'shape' must return an async iterable"),
        (lambda: no_producer(), TypeError, r"open_stream\(\) of 'shape' must return an async iterable, not <coroutine"),
        (broken, OSError, "no broker"),
    ],
    ids=["None", "list", "coroutine", "raises"],
)
async def test_a_stream_that_cannot_be_opened_is_a_failure_of_the_upstream_and_its_producer_is_closed(
    open_stream: Callable[[], Any], error: type[Exception], message: str
) -> None:
    shape = BadStream(open_stream)
    async with managed() as manager, manager.subscribe(shape.source()) as stream:
        with pytest.raises(error, match=message):
            await stream.receive()
        await until(lambda: idle(manager))
        assert shape.closed
        gc.collect()  # a coroutine that was never awaited would say so here


@pytest.mark.parametrize("item", [None, 1, (), (1,), (1, 2, 3), [1], "event", {1: 2}], ids=repr)
async def test_what_is_no_pair_is_a_failure_of_the_upstream_behind_what_came_before(item: Any) -> None:
    shape = Closing()
    async with managed() as manager, manager.subscribe(shape.source()) as stream:
        for each in ((1, "one"), (2, "two"), item):
            shape.send.send_nowait(each)
        assert [await stream.receive() for _ in range(2)] == [1, 2]
        with pytest.raises(TypeError, match=r"open_stream\(\) of 'shape' must yield pairs \(event, broker_payload\)") as caught:
            await stream.receive()
        assert str(caught.value).endswith(f"not {item!r}")
        await until(lambda: idle(manager))
        assert shape.closed
    assert [payload for batch in shape.batches for payload, _ in batch] == ["one", "two"]
    shape.send.close()


class Synchronous(Closing):
    """Forgot an ``async``."""

    def advance(self, batch: Sequence[AdvanceItem[Any]]) -> None:  # type: ignore[override]
        self.batches.append(batch)


async def test_an_advance_that_cannot_be_awaited_is_a_failure_of_the_upstream() -> None:
    shape = Synchronous()
    async with managed() as manager, manager.subscribe(shape.source(advance_retry=None)) as stream:
        shape.send.send_nowait((1, 1))
        assert await stream.receive() == 1
        with pytest.raises(TypeError, match="await"):
            await stream.receive()
        await until(lambda: idle(manager))
        assert len(shape.batches) == 1
        assert shape.closed
    shape.send.close()


async def test_what_closing_a_producer_raises_is_reported_and_nobodys_concern() -> None:
    lines = LogCapture()
    shape = Closing()
    shape.closing = OSError("goodbye")
    async with SharedStreamManager(logger=structlog.wrap_logger(None, processors=[lines])) as manager:
        async with manager.subscribe(shape.source()) as stream:
            shape.send.send_nowait((1, 1))
            assert await stream.receive() == 1
        assert idle(manager)
    shape.send.close()
    assert [line["exc_info"] for line in lines.entries if line["event"] == "clean-up failed"] == [shape.closing]
    assert len(shape.batches) == 1


CONTEXT: ContextVar[str] = ContextVar("CONTEXT", default="the manager's")


class Slow(Broker):
    """Takes its time to close its producer."""

    closed_at = 0.0

    def _create(self) -> SharedStreamProducer[Any, Any]:
        producer: Any = super()._create()
        producer.aclose = self._aclose
        return producer  # type: ignore[no-any-return]

    async def _aclose(self) -> None:
        await anyio.sleep(50)
        self.closed_at = anyio.current_time()


@in_virtual_time
async def test_closing_a_producer_takes_as_long_as_it_takes_while_nothing_is_cancelled() -> None:
    broker = Slow()
    async with managed() as manager:
        async with manager.subscribe(broker.source(drain_timeout=1)):
            await settle()
        assert broker.closed_at == 50


@in_virtual_time
@pytest.mark.parametrize("stops", [True, False], ids=["stopped", "failed"])
async def test_what_a_stream_raises_is_told_once_whether_it_was_the_reason_or_came_of_the_end(stops: bool) -> None:
    lines = LogCapture()
    error = ValueError("broken")

    class Failing(Broker):
        async def play(self) -> AsyncIterator[tuple[Any, Any]]:
            try:
                yield 0, (0, 0)
                await anyio.sleep(1)
            finally:
                raise error

    logger: Any = structlog.wrap_logger(None, processors=[lines])
    async with SharedStreamManager(logger=logger) as manager, manager.subscribe(Failing().source()) as stream:
        assert await stream.receive() == 0
        finish(stream)
        if stops:
            await manager.stop("broker")
        with pytest.raises(anyio.EndOfStream if stops else ValueError):
            await stream.receive()
    told = [(line["event"], line["exc_info"]) for line in lines.entries if line["log_level"] in ("warning", "error")]
    assert told == [("clean-up failed" if stops else "poll failed", error)]


async def test_a_cancellation_out_of_nowhere_is_no_return_of_the_stream() -> None:
    broker = Broker()
    broker.fail(await cancellation())
    async with managed() as manager, manager.subscribe(broker.source(on_exhausted="end")) as stream:
        with pytest.raises(PollTerminated, match="it was cancelled, and nobody had asked for that"):
            await stream.receive()


async def test_a_stream_that_cannot_be_opened_and_will_not_be_again_is_not_about_to_be_restarted() -> None:
    class Broken(Broker):
        def play(self) -> AsyncIterator[tuple[Any, Any]]:
            raise ValueError("broken")

    lines = LogCapture()
    logger: Any = structlog.wrap_logger(None, processors=[lines])
    source = Broken().source(restart=Restart(on=OSError))
    async with SharedStreamManager(logger=logger) as manager, manager.subscribe(source) as stream:
        with pytest.raises(ValueError, match="broken"):
            await stream.receive()
    states = [line["event"] for line in lines.entries if line["event"].startswith("group ")]
    assert states == ["group started", "group opening", "group closing", "group stopped"]


async def test_a_producer_is_created_once_for_each_opening_in_the_managers_context() -> None:
    broker = Broker()
    contexts: list[str] = []

    def create() -> Any:
        contexts.append(CONTEXT.get())
        return broker._create()

    source = AckSource("broker", create, restart=Restart(initial_delay=0))
    async with managed() as manager:
        CONTEXT.set("the subscriber's")
        async with manager.subscribe(source), manager.subscribe(source) as stream:
            await until(lambda: broker.opened)
            CONTEXT.set("another")
            broker.fail(OSError("lost"))
            await until(lambda: stream.epoch == 2)
        async with manager.subscribe(source):
            await settle()
    assert contexts == ["the manager's"] * 3 == ["the manager's"] * broker.opened


# What producers are told.


@pytest.mark.parametrize("failed", [0, 1])
@pytest.mark.parametrize("rejected", [0, 2])
@pytest.mark.parametrize("released", [0, 3])
@pytest.mark.parametrize("acked", [0, 4])
def test_clean_is_what_somebody_has_acknowledged_and_nobody_failed_or_rejected(
    acked: int, failed: int, rejected: int, released: int
) -> None:
    outcome = AdvanceOutcome(acked=acked, failed=failed, rejected=rejected, released=released)
    assert outcome.is_clean is (acked > 0 and not failed and not rejected)


def test_items_and_outcomes_are_values() -> None:
    outcome = AdvanceOutcome(acked=1, failed=2, rejected=3, released=4)
    assert outcome == AdvanceOutcome(acked=1, failed=2, rejected=3, released=4)
    assert repr(outcome) == "AdvanceOutcome(acked=1, failed=2, rejected=3, released=4)"
    with pytest.raises(FrozenInstanceError):
        outcome.acked = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        AdvanceOutcome(1, 2, 3, 4)  # type: ignore[call-arg]
    item = AdvanceItem("payload", outcome)
    payload, same = item
    assert (item.broker_payload, item.outcome) == (payload, same) == ("payload", outcome)
    assert item == AdvanceItem(broker_payload="payload", outcome=outcome)
