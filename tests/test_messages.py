"""What the errors of misuse say, word by word: the message is all that whoever reads it has to go by."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from anyio_sharedstream import (
    AckSource,
    Block,
    Fold,
    PollTerminated,
    Restart,
    SharedSource,
    SharedStreamManager,
    shared_source,
)
from tests.ack_support import Broker
from tests.support import Feed, settle, until

SECONDS, AT_LEAST_ZERO = "a positive number of seconds", "a number of seconds, zero or more"


def source(**policies: Any) -> SharedSource[Any]:
    return Feed().asking_for(**policies)


def acked(**options: Any) -> AckSource[Any]:
    return Broker().source(**options)


MADE: list[tuple[Callable[[], object], str]] = [
    (lambda: source(linger=-1), f"linger must be {AT_LEAST_ZERO} or math.inf, not -1"),
    (lambda: source(close_timeout=-1), f"close_timeout must be {AT_LEAST_ZERO}, not -1"),
    (lambda: source(silence_timeout=0), f"silence_timeout must be {SECONDS}, not 0"),
    (lambda: Restart(within=0), f"within must be {SECONDS} or math.inf, not 0"),
    (lambda: acked(ack_timeout=0), f"ack_timeout must be {SECONDS} or math.inf, not 0"),
    (lambda: acked(drain_timeout=-1), f"drain_timeout must be {AT_LEAST_ZERO}, not -1"),
    (lambda: acked(drain_timeout=math.inf), f"drain_timeout must be {AT_LEAST_ZERO}, not inf"),
    (lambda: acked(max_in_flight=0), "max_in_flight must be an integer of at least 1, not 0"),
    (lambda: acked(max_concurrent_advances=0), "max_concurrent_advances must be an integer of at least 1, not 0"),
    (lambda: source(route_by=3), "route_by must be a function of an event, not 3"),
    (lambda: Fold(0, 3), "step must be a function of a state and an event, not 3"),  # type: ignore[arg-type]
    (lambda: Restart(on=3), "on must be an exception type, a tuple of them, or a function of an exception, not 3"),  # type: ignore[arg-type]
    (lambda: Restart(on=int), f"on must be an exception type, a tuple of them, or a function of an exception, not {int!r}"),  # type: ignore[arg-type]
    (
        lambda: AckSource("orders", 3),  # type: ignore[arg-type]
        "create_producer must be a function without arguments that returns a producer, not 3",
    ),
    (lambda: SharedSource(key=None, open=list), "key must not be None: it names the upstream that subscribers share"),  # type: ignore[arg-type]
    (lambda: SharedSource(key="a", open=3), "open must be a callable without arguments, not 3"),  # type: ignore[arg-type]
    (lambda: source(on_exhausted="restart"), 'on_exhausted="restart" needs restart=Restart(), which says how'),
    (lambda: shared_source(linger=-1), f"linger must be {AT_LEAST_ZERO} or math.inf, not -1"),
]


@pytest.mark.parametrize(("make", "message"), MADE, ids=[message for _, message in MADE])
def test_what_cannot_be_made_says_what_it_must_be(make: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    assert str(caught.value) == message


SUBSCRIBED: list[tuple[dict[str, Any], str]] = [
    ({"where": 3}, "where must be a function of an event, not 3"),
    ({"routes": []}, "routes must name at least one route; None asks for all events"),
    ({"subscriber_id": []}, "subscriber_id must be hashable, and [] is not (unhashable type: 'list'); use a string"),
    ({"where": anyio.sleep}, f"where must be a function of an event, not {anyio.sleep!r}"),
]


@pytest.mark.parametrize(("arguments", "message"), SUBSCRIBED, ids=[message[:20] for _, message in SUBSCRIBED])
async def test_what_cannot_be_subscribed_to_says_what_it_must_be(arguments: dict[str, Any], message: str) -> None:
    async with SharedStreamManager() as manager:
        with pytest.raises((TypeError, ValueError)) as caught:
            manager.subscribe(source(route_by=abs), **arguments)
    assert str(caught.value) == message


async def test_a_manager_that_is_not_running_says_why() -> None:
    manager = SharedStreamManager()
    with pytest.raises(RuntimeError) as caught:
        manager.subscribe(source())
    assert str(caught.value) == "the SharedStreamManager has not been entered: subscribe inside its `async with` block"
    async with manager:
        stream = manager.subscribe(source())
        with pytest.raises(RuntimeError) as caught:
            await manager.__aenter__()
        assert str(caught.value) == "a SharedStreamManager can be entered only once: make another one"
    with pytest.raises(RuntimeError) as caught:
        manager.subscribe(source())
    left = "the SharedStreamManager has been left: subscribe inside its `async with` block"
    assert str(caught.value) == left
    with pytest.raises(RuntimeError) as caught:
        await stream.__aenter__()
    assert str(caught.value) == left


async def test_a_manager_that_is_being_left_says_so() -> None:
    feed = Feed()
    feed.clean_up = anyio.Event()
    manager = SharedStreamManager()
    said: list[str] = []

    async def subscribe() -> None:
        await until(lambda: not manager.statistics().groups)
        with pytest.raises(RuntimeError) as caught:
            await manager.subscribe(source()).__aenter__()
        said.append(str(caught.value))
        assert feed.clean_up is not None
        feed.clean_up.set()

    async with anyio.create_task_group() as tasks, manager:
        await manager.subscribe(feed.source).__aenter__()
        await until(lambda: feed.opened)
        tasks.start_soon(subscribe)
    assert said == ["the SharedStreamManager is being left: subscribe inside its `async with` block"]


@pytest.mark.parametrize("options", [{}, {"overflow": Block(5)}], ids=["plain", "block"])
@pytest.mark.parametrize("make", [source, acked])
async def test_a_subscription_that_cannot_be_used_says_why(make: Callable[[], SharedSource[Any]], options: Any) -> None:
    async with SharedStreamManager() as manager:
        stream = manager.subscribe(make(), **options)
        with pytest.raises(RuntimeError) as caught:
            stream.receive_nowait()
        assert str(caught.value) == ("this subscription has not been entered: use `async with manager.subscribe(...) as stream`")
        async with stream, anyio.create_task_group() as tasks:
            tasks.start_soon(stream.receive)
            await settle()
            busy = str(anyio.BusyResourceError("receiving from"))
            for receive in (stream.receive, stream.__anext__):
                with pytest.raises(anyio.BusyResourceError) as clash:
                    await receive()
                assert str(clash.value) == busy
            tasks.cancel_scope.cancel()
        with pytest.raises(RuntimeError) as caught:
            await stream.__aenter__()
        assert str(caught.value) == f"{stream!r} was entered or closed before: call subscribe() again for another one"


async def test_sources_of_one_key_that_differ_say_in_what() -> None:
    async with SharedStreamManager() as manager, manager.subscribe(source(linger=1)):
        with pytest.raises(ValueError, match="linger") as caught:
            await manager.subscribe(source(linger=2)).__aenter__()
    assert str(caught.value) == (
        "'feed' is open with linger=1, so it cannot be subscribed to with linger=2: "
        "all sources of one key must have the same policies; a function among them must be the same object"
    )


@asynccontextmanager
async def number() -> Any:
    yield 3


@pytest.mark.parametrize(
    ("open_", "giver", "given"),
    [
        (lambda: 3, "open() of 'feed'", "3"),
        (number, "the context manager that open() of 'feed' returned", "3"),
    ],
    ids=["open", "context manager"],
)
async def test_what_cannot_be_iterated_over_is_named_with_its_giver(open_: Any, giver: str, given: str) -> None:
    async with SharedStreamManager() as manager, manager.subscribe(SharedSource(key="feed", open=open_)) as stream:
        with pytest.raises(TypeError) as caught:
            await stream.receive()
    assert str(caught.value) == (f"{giver} must give an async iterable or an async context manager that gives one, not {given}")


async def test_an_upstream_that_returned_says_so() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream:
        feed.end()
        with pytest.raises(PollTerminated) as caught:
            await stream.receive()
    assert caught.value.reason == "it returned, and a source runs until it is cancelled"
