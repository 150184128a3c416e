"""What a subscriber asks for: refused at once where it makes no sense, and shown in the statistics as it was asked for."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from anyio_sharedstream import (
    Block,
    Conflate,
    DropNewest,
    DropOldest,
    Fail,
    Gap,
    Latest,
    LossySubscription,
    Restart,
    SharedSource,
    SharedStreamManager,
    Subscription,
)
from tests.ack_support import Broker
from tests.support import Feed, idle, until

LOSSLESS = [Fail(), Block(1), Block(math.inf)]
LOSSY = [DropOldest(), DropNewest(), Latest(), Conflate(str), Conflate(by=str, merge=max)]
POLICIES = [*LOSSLESS, *LOSSY]


class NoFunction:
    def __repr__(self) -> str:
        return "<no function>"


@pytest.fixture
async def manager() -> AsyncIterator[SharedStreamManager]:
    async with SharedStreamManager() as manager:
        yield manager


# Policies are values.


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (Fail(), "Fail()"),
        (Block(2.5), "Block(up_to=2.5)"),
        (DropOldest(), "DropOldest()"),
        (DropNewest(), "DropNewest()"),
        (Latest(), "Latest()"),
        (Conflate(str), "Conflate(by=<class 'str'>, merge=None)"),
        (Gap(None, "overflow"), "Gap(missed=None, cause='overflow')"),
    ],
)
def test_a_policy_says_how_it_was_made(policy: object, text: str) -> None:
    assert repr(policy) == text


def test_policies_are_equal_if_they_ask_for_the_same() -> None:
    again = [Fail(), Block(up_to=1.0), Block(math.inf), DropOldest(), DropNewest(), Latest(), Conflate(str), Conflate(str, max)]
    assert again == POLICIES
    assert len({*again, *POLICIES}) == len(POLICIES)
    assert Block(1) != Block(2)
    assert Conflate(str) != Conflate(str, max) != Conflate(repr, max)


@pytest.mark.parametrize(("policy", "field"), [(Block(1), "up_to"), (Conflate(str), "by"), (Conflate(str), "merge")])
def test_policies_cannot_be_changed(policy: object, field: str) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(policy, field, 2)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_policies_carry_nothing_else(policy: object) -> None:
    # On the class and not on the object: what a frozen class with slots raises for a name of no field differs by version.
    assert not hasattr(policy, "__dict__")


@pytest.mark.parametrize("up_to", [0, -1, -math.inf, math.nan, True, "1", None])
def test_a_time_to_block_that_is_no_positive_number_of_seconds_is_refused_and_named(up_to: Any) -> None:
    with pytest.raises(ValueError, match="up_to must be a positive number of seconds") as caught:
        Block(up_to)
    assert repr(up_to) in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [((None,), "by", "None"), (("symbol",), "by", "'symbol'"), ((str, 42), "merge", "42"), ((str, False), "merge", "False")],
)
def test_what_cannot_be_called_to_conflate_is_refused_and_named(arguments: Any, name: str, value: str) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be a function, not {value}$"):
        Conflate(*arguments)


async def asynchronous(_: Any) -> Any:
    """Must be awaited; the library calls functions of events in the middle of a publication, where nobody can wait."""


class AsynchronousObject:
    def __repr__(self) -> str:
        return "<function asynchronous as an object>"

    async def __call__(self, _: Any) -> Any:
        """Must be awaited as well."""


@pytest.mark.parametrize(
    "function", [asynchronous, AsynchronousObject(), Feed._play], ids=["coroutine", "object", "asynchronous generator"]
)
@pytest.mark.parametrize(
    "make",
    [
        lambda function: Conflate(function),
        lambda function: Conflate(str, function),
        lambda function: SharedSource(key="feed", open=Feed().source.open, route_by=function),
    ],
)
def test_a_function_that_must_be_awaited_is_refused_and_named(make: Callable[[Any], object], function: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a function( of an event)?, not <function (asynchronous|Feed\._play)"):
        make(function)


# What `subscribe` refuses.


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"overflow": DropOldest}, TypeError, "such as DropOldest(), not <class 'anyio_sharedstream._policies.DropOldest'>"),
        ({"overflow": Fail}, TypeError, "not <class 'anyio_sharedstream._policies.Fail'>"),
        ({"overflow": None}, TypeError, "overflow must be a policy, such as DropOldest(), not None"),
        ({"overflow": "latest"}, TypeError, "not 'latest'"),
        ({"overflow": [Latest()]}, TypeError, "not [Latest()]"),
        ({"where": "cheap"}, TypeError, "where must be a function of an event, not 'cheap'"),
        ({"where": asynchronous}, TypeError, "where must be a function of an event, not <function asynchronous"),
        ({"gaps": 1}, TypeError, "gaps must be True or False, not 1"),
        ({"where": False}, TypeError, "not False"),
        ({"where": NoFunction(), "overflow": Latest()}, TypeError, "not <no function>"),
        ({"routes": []}, ValueError, "routes must name at least one route; None asks for all events"),
        ({"routes": iter(())}, ValueError, "routes must name at least one route"),
        ({"routes": ""}, TypeError, "routes must be a collection of routes, not ''"),
        ({"routes": "eu"}, TypeError, "not 'eu'; for a single one, {'eu'}"),
        ({"routes": b"eu"}, TypeError, "not b'eu'; for a single one, {b'eu'}"),
        ({"routes": 42}, TypeError, "routes must be a collection of hashable routes, and 42 is not ("),
        ({"routes": ["eu", ["us"]]}, TypeError, "and ['eu', ['us']] is not (unhashable type: 'list')"),
        ({"max_buffer_size": 0, "overflow": DropOldest()}, ValueError, "max_buffer_size must be a positive number"),
        ({"max_buffer_size": 1.5, "where": bool}, ValueError, "not 1.5"),
        ({"subscriber_id": ["me"], "overflow": Latest()}, TypeError, "subscriber_id must be hashable, and ['me'] is not"),
    ],
)
async def test_what_makes_no_sense_is_refused_at_once_and_named_and_leaves_no_state(
    arguments: dict[str, Any], error: type[Exception], named: str, manager: SharedStreamManager
) -> None:
    feed = Feed()
    with pytest.raises(error) as caught:
        manager.subscribe(SharedSource(key=feed.key, open=feed.source.open, route_by=str), **arguments)
    assert named in str(caught.value)
    assert caught.value.__cause__ is None
    assert idle(manager)
    assert feed.opened == 0


@pytest.mark.parametrize("routes", [["eu"], "eu", [], 42], ids=repr)
async def test_routes_of_a_source_without_any_are_refused_and_the_key_and_they_named(
    routes: Any, manager: SharedStreamManager
) -> None:
    feed = Feed("prices")
    with pytest.raises(ValueError, match="the source of 'prices' has no route_by") as caught:
        manager.subscribe(feed.source, routes=routes)
    assert repr(routes) in str(caught.value)
    assert idle(manager)


@pytest.mark.parametrize("route_by", ["symbol", 42, False])
def test_a_source_whose_route_by_cannot_be_called_is_refused_and_named(route_by: Any) -> None:
    with pytest.raises(TypeError, match=f"^route_by must be a function of an event, not {route_by!r}$"):
        SharedSource(key="feed", open=Feed().source.open, route_by=route_by)


async def test_what_is_refused_for_its_id_leaves_the_one_who_has_it_alone(manager: SharedStreamManager) -> None:
    feed = Feed()
    source = SharedSource(key=feed.key, open=feed.source.open, route_by=str)
    async with manager.subscribe(source, subscriber_id="me", where=bool) as stream:
        other = manager.subscribe(source, subscriber_id="me", overflow=Block(1), max_buffer_size=1, routes={"2"})
        with pytest.raises(RuntimeError, match="already has a subscriber with the id 'me'"):
            await other.__aenter__()
        feed.emit(0, 1, 2, 3)
        assert [await stream.receive() for _ in range(3)] == [1, 2, 3]
        assert other.statistics().current_buffer_used == 0
        assert len(manager.statistics().groups["feed"].subscriptions) == 1


# What can be seen of a contract.


@pytest.mark.parametrize("gaps", [False, True], ids=["silent", "gaps"])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
async def test_a_subscription_is_of_the_class_that_its_policy_promises(
    policy: Any, gaps: bool, manager: SharedStreamManager
) -> None:
    contract: dict[str, Any] = {"overflow": policy, "gaps": gaps}
    stream: object = manager.subscribe(Feed().source, **contract)
    assert isinstance(stream, Subscription) == (policy in LOSSLESS)
    assert isinstance(stream, LossySubscription) == (policy in LOSSY)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
async def test_statistics_show_the_policy_and_what_it_has_done(policy: Any, manager: SharedStreamManager) -> None:
    feed = Feed()
    async with manager.subscribe(feed.source, overflow=policy, max_buffer_size=7) as stream:
        before = stream.statistics()
        assert before.policy is policy
        assert before.max_buffer_size == 7
        assert (before.events_missed, before.events_refused, before.held_seconds) == (0, 0, 0.0)
        assert manager.statistics().groups["feed"].subscriptions == (before,)
        feed.emit("event")
        assert await stream.receive() == "event"
    assert stream.statistics().policy is policy  # also of one that has left


async def test_who_says_nothing_fails(manager: SharedStreamManager) -> None:
    assert manager.subscribe(Feed().source).statistics().policy == Fail()


async def test_an_asked_for_collection_of_routes_is_not_looked_at_again(manager: SharedStreamManager) -> None:
    feed = Feed()
    routes = ["1"]
    source = SharedSource(key=feed.key, open=feed.source.open, route_by=str)
    async with manager.subscribe(source, routes=routes) as stream, manager.subscribe(source, routes=iter(routes)) as other:
        routes[:] = ["2"]
        feed.emit(2, 1)
        await until(lambda: other.statistics().current_buffer_used)
        assert stream.receive_nowait() == other.receive_nowait() == 1


@pytest.mark.parametrize("gaps", [False, True], ids=["silent", "gaps"])
@pytest.mark.parametrize("policy", LOSSLESS, ids=repr)
async def test_an_acknowledging_subscription_has_the_id_and_the_bound_that_were_asked_for(
    policy: Any, gaps: bool, manager: SharedStreamManager
) -> None:
    source = Broker().source(restart=Restart())
    contract: dict[str, Any] = {"overflow": policy, "gaps": gaps}
    async with manager.subscribe(source, subscriber_id="mine", max_buffer_size=7, **contract) as stream:
        (asked,) = manager.statistics().groups["broker"].subscriptions
        assert (asked.subscriber_id, asked.policy, asked.max_buffer_size) == ("mine", policy, 7)
        assert stream.statistics() == asked
