"""Predicates are foreign code inside a publication: what they raise and do, and what is acknowledged then."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest

from anyio_sharedstream import AckSubscription
from tests.ack_support import ACKED, FAILED, Broker
from tests.contract_support import drain
from tests.support import idle, settle
from tests.sweep import managed
from tests.test_ack_choosy import tens, yes


class RefusedError(Exception):
    """What a predicate raises."""


# Predicates that raise.


async def test_a_predicate_that_raises_fails_that_event_and_releases_those_behind_it() -> None:
    broker = Broker()

    def where(event: int) -> bool:
        if event == 3:
            raise RefusedError
        return event != 1

    async with managed() as manager, manager.subscribe(broker.source()) as stays:
        async with manager.subscribe(broker.source(), where=where) as stream:
            broker.emit(*range(6))
            assert await stays.receive_batch(9) == tuple(range(6))
            stays.defer().ack()
            assert await stream.receive() == 0
            await settle()
            assert not broker.outcomes
            assert await stream.receive() == 2
            stream.reject()
            await settle()
            both = (2, 0, 0, 0)
            expected = {0: both, 1: both, 2: (1, 0, 1, 0), 3: (1, 1, 0, 0), 4: (1, 0, 0, 1), 5: (1, 0, 0, 1)}
            assert broker.outcomes == expected
            for _ in range(2):
                with pytest.raises(RefusedError):
                    await stream.receive()
            broker.emit(6)
            assert await stays.receive() == 6
        stays.fail()
        await settle()
        assert broker.outcomes == {**expected, 6: FAILED}


@pytest.mark.parametrize("at", [0, 1, 2])
async def test_what_others_with_other_routes_were_asked_by_the_same_predicate_is_not_acknowledged_by_who_failed(at: int) -> None:
    broker = Broker()
    source = broker.source(route_by=tens)

    def where(event: int) -> bool:
        if event >= 10:
            raise RefusedError
        return True

    events = [0, 1, 2]
    events.insert(at, 10)
    async with managed() as manager:
        # In both orders: the one is asked first, or the other.
        async with (
            manager.subscribe(source, where=where, routes={0}),
            manager.subscribe(source, where=where, routes={0, 1}) as fails,
            manager.subscribe(source, where=where, routes={0}),
        ):
            broker.emit(*events)
            await settle()
            taken = [await fails.receive() for _ in range(at)]
            assert taken == [0, 1, 2][:at]
            with pytest.raises(RefusedError):
                await fails.receive()
        assert idle(manager)
    acked = dict.fromkeys(taken, (1, 0, 0, 2))
    assert broker.outcomes == {**dict.fromkeys((0, 1, 2), (0, 0, 0, 3)), **acked, 10: (2, 1, 0, 0)}
    assert [event for event in (0, 1, 2) if broker.clean[event]] == taken


async def test_each_predicate_that_raises_at_the_same_event_fails_it_once_more() -> None:
    broker = Broker()

    def refuses(event: int) -> bool:
        raise RefusedError

    def refuses_too(event: int) -> bool:
        raise RefusedError

    async with (
        managed() as manager,
        manager.subscribe(broker.source()) as stays,
        manager.subscribe(broker.source(), where=refuses) as one,
        manager.subscribe(broker.source(), where=refuses_too) as other,
    ):
        broker.emit("event")
        assert await stays.receive() == "event"
        for stream in (one, other):
            with pytest.raises(RefusedError):
                await stream.receive()
    assert broker.outcomes == {"event": (1, 2, 0, 0)}


# Predicates that do something else than choose.


async def played(act: Callable[[dict[str, AckSubscription[Any]], Any], object], *names: str) -> tuple[Broker, dict[str, Any]]:
    """Publish 1 and 2 at once, and then 3, to subscribers some of whom choose, by a predicate that acts. All take everything.

    Names that begin with "plain" take all, others choose; "acts" is the one whose predicate acts.
    """
    broker = Broker()
    got: dict[str, Any] = {}
    async with managed() as manager, AsyncExitStack() as stack:
        streams: dict[str, AckSubscription[Any]] = {}
        wheres: dict[str, Any] = {"plain": None, "acts": lambda event: act(streams, event) or True}
        for name in names:
            where = wheres.get(name.partition(" ")[0], lambda event: True)
            streams[name] = await stack.enter_async_context(manager.subscribe(broker.source(), where=where))
        broker.emit(1, 2)
        await settle()
        assert not [event for event in broker.advanced if broker.outcomes[event][0]]  # nobody has taken it
        broker.emit(3)
        await settle()
        for name, stream in streams.items():
            try:
                got[name] = drain(stream)
            except anyio.ClosedResourceError:
                got[name] = None
        await settle()
        assert not manager.statistics().groups or broker.advanced == [1, 2, 3]
    assert broker.log == ["stream closed", "closed"]
    assert broker.advanced == [1, 2, 3][: len(broker.advanced)]
    return broker, got


def closing(*names: str, at: int = 1) -> Callable[[dict[str, AckSubscription[Any]], Any], None]:
    def act(streams: dict[str, AckSubscription[Any]], event: Any) -> None:
        for name in names if event == at else ():
            streams[name].close()

    return act


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize(
    "names",
    [
        ["plain", "acts"],
        ["acts", "plain"],
        ["plain 1", "plain 2", "acts", "later"],
        ["earlier", "acts", "later"],
        ["earlier", "acts", "later", "plain"],
    ],
    ids=" ".join,
)
async def test_whoever_is_closed_in_the_middle_of_a_publication_is_released_and_the_others_are_waited_for(
    names: list[str], at: int
) -> None:
    for closed in names:
        broker, got = await played(closing(closed, at=at), *names)
        stay = len(names) - 1
        released = (stay, 0, 0, 1)
        # 1 and 2 are offered together, and nobody had taken them before 3 was.
        assert broker.outcomes == {1: released, 2: released, 3: released if at == 3 else (stay, 0, 0, 0)}
        assert got == {name: None if name == closed else [1, 2, 3] for name in names}


@pytest.mark.parametrize("names", [["plain", "acts", "later"], ["earlier", "acts", "later"], ["acts"]], ids=" ".join)
async def test_if_all_are_closed_in_the_middle_of_a_publication_it_is_released_by_all_and_that_is_the_end(
    names: list[str],
) -> None:
    broker, got = await played(closing(*names), *names)
    assert got == dict.fromkeys(names)
    assert broker.outcomes == dict.fromkeys((1, 2), (0, 0, 0, len(names)))
    assert broker.clean == {1: False, 2: False}


async def test_what_is_finished_in_the_middle_of_a_publication_does_not_pass_those_who_have_yet_to_be_given_it() -> None:
    def act(streams: dict[str, AckSubscription[Any]], event: Any) -> None:
        if event == 1:
            assert drain(streams["plain"]) == [1, 2]
            assert drain(streams["earlier"]) == [1, 2]

    broker, got = await played(act, "plain", "earlier", "acts", "later")
    assert got == {"plain": [3], "earlier": [3], "acts": [1, 2, 3], "later": [1, 2, 3]}
    assert broker.outcomes == dict.fromkeys((1, 2, 3), (4, 0, 0, 0))


async def test_who_joins_in_the_middle_of_a_publication_is_given_the_next_and_not_waited_for_before() -> None:
    broker = Broker()
    joined: list[AckSubscription[Any]] = []
    async with managed() as manager, AsyncExitStack() as stack:

        def where(event: int) -> bool:
            if event == 1:
                for chooses in (None, yes):
                    joined.append(manager.subscribe(broker.source(), where=chooses))
                    with pytest.raises(StopIteration):  # entering is no checkpoint
                        joined[-1].__aenter__().send(None)
                    stack.push_async_exit(joined[-1])
            return True

        first = await stack.enter_async_context(manager.subscribe(broker.source(), where=where))
        broker.emit(1, 2)
        assert [await first.receive() for _ in range(2)] == [1, 2]
        broker.emit(3)
        assert await first.receive() == 3
        await settle()
        assert broker.outcomes == {1: ACKED, 2: ACKED}
        first.fail()
        assert [await stream.receive() for stream in joined] == [3, 3]
        joined[0].reject()
        await settle()
        assert broker.advanced == [1, 2]
        joined[1].defer().ack()
        await settle()
        assert broker.outcomes[3] == (1, 1, 1, 0)


async def test_who_is_closed_by_anothers_predicate_releases_what_its_routes_would_have_given_it_and_nothing_else() -> None:
    broker = Broker()
    source = broker.source(route_by=tens)
    async with managed() as manager, manager.subscribe(source, routes={0}) as goes:

        def closes(event: int) -> bool:
            goes.close()
            return True

        async with manager.subscribe(source, where=closes) as stays:
            broker.emit(0, 10)
            assert await stays.receive_batch(2) == (0, 10)
    assert broker.outcomes == {0: (1, 0, 0, 1), 10: (2, 0, 0, 0)}
