"""What acknowledgement is asked for with: sources and subscriptions; and what the statistics say of it."""

from __future__ import annotations

import inspect
import math
from dataclasses import FrozenInstanceError
from typing import Any

import anyio
import pytest

from anyio_sharedstream import (
    AckSource,
    AckStatistics,
    AckSubscription,
    Block,
    Conflate,
    DropNewest,
    DropOldest,
    Fold,
    Latest,
    Restart,
    SharedSource,
    SharedStreamManager,
    Subscription,
)
from tests.ack_support import Broker
from tests.support import Feed, idle, settle, until
from tests.sweep import managed
from tests.test_lifecycle_values import HUGE, LARGEST, NO_COUNTS, NO_FUNCTIONS, NO_SECONDS, add
from tests.virtual_time import in_virtual_time

# Sources.

#: What is refused of each parameter, None apart where that is a value; and what is taken, the extremes first.
REFUSED: dict[str, list[Any]] = {
    "ack_timeout": [*NO_SECONDS, None, 0],
    "max_in_flight": [*NO_COUNTS, None, 0],
    "max_concurrent_advances": [*NO_COUNTS, None, 0],
    "drain_timeout": [*NO_SECONDS, None, math.inf],
    "advance_retry": [True, 3, "always", Restart, ValueError],
    "linger": [*NO_SECONDS, None],
    "restart": [True, 3, Restart],
    "on_exhausted": [None, "stop"],
    "route_by": NO_FUNCTIONS[1:],
    "replay": [1, 1024, True, -1],
    "replay_max_age": [1, 0, -1],
    "fold": [Fold(0, add), add, 0],
}
TAKEN: dict[str, list[Any]] = {
    "ack_timeout": [1e-9, 1, LARGEST, math.inf],
    "max_in_flight": [1, HUGE],
    "max_concurrent_advances": [1, HUGE],
    "drain_timeout": [0, 0.0, 1e-9, LARGEST],
    "advance_retry": [None, Restart()],
    "linger": [0, 5, math.inf],
    "restart": [None, Restart()],
    "route_by": [None, abs],
    "replay": [0],
    "replay_max_age": [None],
    "fold": [None],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_when_a_source_is_made(name: str) -> None:
    for value in REFUSED[name]:
        with pytest.raises((ValueError, TypeError), match=name):
            Broker().source(**{name: value})
    with pytest.raises((ValueError, TypeError)) as caught:
        Broker().source(**{name: REFUSED[name][0]})
    assert str(caught.value).endswith((f"not {REFUSED[name][0]!r}", "each event is given once"))


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken_is_there_to_be_read(name: str) -> None:
    for value in TAKEN[name]:
        assert getattr(Broker().source(**{name: value}), name) is value


@pytest.mark.parametrize("name", ["replay", "fold"])
def test_an_event_that_is_given_again_could_not_be_acknowledged_twice(name: str) -> None:
    value: Any = {"replay": 3, "fold": Fold(0, add)}[name]
    with pytest.raises(ValueError, match=f"an acknowledged source cannot have {name}=") as caught:
        Broker().source(**{name: value})
    assert repr(value) in str(caught.value)


def test_a_source_needs_a_key_and_a_function_that_creates_producers() -> None:
    with pytest.raises(ValueError, match="key must not be None"):
        AckSource(None, list)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="key must be hashable"):
        AckSource([], list)  # type: ignore[arg-type]
    for value in NO_FUNCTIONS:
        create: Any = value
        with pytest.raises(TypeError, match="create_producer must be a function without arguments that returns a producer"):
            AckSource("key", create)
    with pytest.raises(TypeError, match="unknown"):
        Broker().source(unknown=1)


def test_a_source_is_a_value() -> None:
    broker = Broker()
    source = broker.source()
    assert isinstance(source, SharedSource)
    assert source == broker.source()
    assert hash(source) == hash(broker.source())
    assert source != broker.source(ack_timeout=1)
    assert source != Broker().source()
    assert repr(source) == f"AckSource('broker', {broker._create!r})"
    assert (source.ack_timeout, source.max_in_flight, source.max_concurrent_advances, source.drain_timeout) == (300, 1024, 8, 30)
    assert source.advance_retry is not None
    assert source.advance_retry.max_restarts is not None  # what cannot be advanced is a failure in the end
    with pytest.raises(FrozenInstanceError):
        source.ack_timeout = 1  # type: ignore[misc]


# Subscribing.


async def test_subscribing_gives_the_same_stream_of_bare_events() -> None:
    broker = Broker()
    async with managed() as manager, manager.subscribe(broker.source(), subscriber_id="mine") as stream:
        broker.emit("one", "two")
        assert [await stream.receive(), stream.receive_nowait()] == ["one", "two"]
        assert (stream.key, stream.subscriber_id, stream.epoch) == ("broker", "mine", 1)
        assert isinstance(stream, AckSubscription)
        assert isinstance(stream, Subscription)
        assert isinstance(stream, anyio.abc.ObjectReceiveStream)
        assert repr(stream) == "<AckSubscription 'mine' of 'broker'>"


async def test_what_makes_no_sense_is_refused_when_a_subscription_is_made() -> None:
    broker = Broker()
    async with managed() as manager:
        subscribe: Any = manager.subscribe
        for lossy in (DropOldest(), DropNewest(), Latest(), Conflate(str), Conflate(str, max)):
            with pytest.raises(ValueError, match="what is dropped could not be acknowledged"):
                subscribe(broker.source(), overflow=lossy)
        for wrong in (None, Block, "block"):
            with pytest.raises(TypeError, match="overflow must be a policy"):
                subscribe(broker.source(), overflow=wrong)
        with pytest.raises(ValueError, match="has no fold"):
            subscribe(broker.source(), snapshot=True)
        with pytest.raises(ValueError, match="has no route_by"):
            subscribe(broker.source(), routes={1})
        with pytest.raises(TypeError, match="gaps must be"):
            subscribe(broker.source(), gaps=1)
        for no_function in NO_FUNCTIONS[1:]:
            with pytest.raises(TypeError, match="where must be a function"):
                subscribe(broker.source(), where=no_function)
        with pytest.raises(ValueError, match="max_buffer_size"):
            subscribe(broker.source(), max_buffer_size=0)
        with pytest.raises(TypeError, match="source must be a SharedSource"):
            subscribe(broker)
    assert broker.opened == 0


@pytest.mark.parametrize("first", ["SharedSource", "AckSource"])
async def test_a_key_is_of_one_kind_as_long_as_it_is_open(first: str) -> None:
    broker, feed = Broker("key"), Feed("key")
    sources: list[SharedSource[Any]] = [feed.source, broker.source()]
    kinds = ["SharedSource", "AckSource"]
    if first == "AckSource":
        sources.reverse()
        kinds.reverse()
    async with managed() as manager:
        other = manager.subscribe(sources[1])
        async with manager.subscribe(sources[0]):
            await settle()
            before = manager.statistics()
            with pytest.raises(ValueError, match=f"'key' is open as a {kinds[0]}, .* subscribed to as a {kinds[1]}"):
                await other.__aenter__()
            assert manager.statistics() == before
        async with other:
            await settle()
        assert broker.opened == feed.opened == 1
        assert idle(manager)


DIFFERENCES: dict[str, tuple[Any, Any]] = {
    "ack_timeout": (300, math.inf),
    "max_in_flight": (1024, 1),
    "max_concurrent_advances": (8, 1),
    "drain_timeout": (30, 0),
    "advance_retry": (Restart(), None),
    "restart": (None, Restart()),
}


@pytest.mark.parametrize("swap", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize("name", DIFFERENCES)
async def test_sources_of_one_key_that_disagree_in_a_policy_cannot_share(name: str, swap: bool) -> None:
    broker = Broker()
    mine, theirs = reversed(DIFFERENCES[name]) if swap else DIFFERENCES[name]
    async with managed() as manager, manager.subscribe(broker.source(**{name: mine})):
        await settle()
        before = manager.statistics()
        with pytest.raises(ValueError, match="all sources of one key must have the same policies") as caught:
            await manager.subscribe(broker.source(**{name: theirs})).__aenter__()
        assert str(caught.value).startswith(f"'broker' is open with {name}={mine!r}, ")
        assert f"subscribed to with {name}={theirs!r}" in str(caught.value)
        assert manager.statistics() == before
        other_function: Any = object
        async with manager.subscribe(AckSource("broker", other_function, **{name: mine})):
            await settle()
    assert broker.opened == 1


def test_no_policy_is_forgotten_here() -> None:
    own = {name for name, each in inspect.signature(AckSource).parameters.items() if each.kind is each.KEYWORD_ONLY}
    assert own == DIFFERENCES.keys() - {"restart"} == REFUSED.keys() & own


# Statistics.


def acknowledgement(manager: SharedStreamManager) -> AckStatistics:
    told = manager.statistics().groups["broker"].acknowledgement
    assert told is not None
    return told


def numbers(told: AckStatistics) -> dict[str, int]:
    """Those that are not zero, without the bound."""
    assert isinstance(told.waiting, bool)
    names = ("in_flight", "waiting", "deferred", "lanes", "advancing", "retrying", "events_advanced")
    return {name: int(getattr(told, name)) for name in names if getattr(told, name)}


@in_virtual_time
async def test_statistics_say_what_is_on_its_way() -> None:
    broker = Broker(lane=lambda event: event % 2)
    retry = Restart(initial_delay=5, jitter=0)
    async with managed() as manager, manager.subscribe(broker.source(max_in_flight=5, advance_retry=retry)) as stream:
        assert numbers(acknowledgement(manager)) == {}
        assert acknowledgement(manager).max_in_flight == 5
        broker.emit(*range(6))
        await settle()
        assert numbers(acknowledgement(manager)) == {"in_flight": 5, "waiting": True}
        assert await stream.receive_batch(2) == (0, 1)
        pending = stream.defer()
        broker.blocked[0] = anyio.Event()
        assert await stream.receive_batch(2) == (2, 3)
        assert (stream.statistics().events_current, stream.statistics().events_deferred) == (2, 2)
        await settle()
        assert numbers(acknowledgement(manager)) == {"in_flight": 5, "waiting": True, "deferred": 2, "lanes": 2}
        broker.refusing[1] = OSError("not now")
        pending.ack()
        await settle()
        expected = {"in_flight": 5, "waiting": True, "lanes": 2, "advancing": 1, "retrying": 1}
        assert numbers(acknowledgement(manager)) == expected
        broker.blocked[0].set()
        await settle()
        assert numbers(acknowledgement(manager)) == {
            "in_flight": 5,
            "waiting": True,
            "lanes": 1,
            "retrying": 1,
            "events_advanced": 1,
        }
        broker.refusing.clear()
        await anyio.sleep(5)
        await settle()
        assert numbers(acknowledgement(manager)) == {"in_flight": 4, "events_advanced": 2}
        assert (stream.statistics().events_current, stream.statistics().events_deferred) == (2, 0)
        with pytest.raises(FrozenInstanceError):
            acknowledgement(manager).in_flight = 0  # type: ignore[misc]


async def test_statistics_are_of_the_present_opening_and_of_groups_that_close_as_well() -> None:
    broker, feed = Broker(), Feed()
    async with managed() as manager, anyio.create_task_group() as tasks, manager.subscribe(feed.source):
        assert manager.statistics().groups["feed"].acknowledgement is None
        async with manager.subscribe(broker.source(restart=Restart(initial_delay=0))) as stream:
            broker.emit(1, 2, 3)
            assert await stream.receive() == 1
            assert await stream.receive() == 2
            await settle()
            assert numbers(acknowledgement(manager)) == {"in_flight": 2, "events_advanced": 1}
            pending = stream.defer()
            broker.fail(OSError("lost"))
            await until(lambda: broker.opened == 2)
            assert numbers(acknowledgement(manager)) == {}
            assert stream.statistics().events_deferred == 1
            pending.ack()
            assert stream.statistics().events_deferred == 0
            broker.emit(2)
            assert await stream.receive() == 2
            last = stream.defer()
            tasks.start_soon(manager.stop, "broker")
            await settle()
            (closing,) = manager.statistics().closing
            assert closing.state == "closing"
            assert closing.acknowledgement is not None
            assert numbers(closing.acknowledgement) == {"in_flight": 1, "deferred": 1, "lanes": 1}
            last.ack()
            await until(lambda: not manager.statistics().closing)
