"""Sources of one key that disagree in a policy cannot share an upstream, and are told in which."""

from __future__ import annotations

import inspect
import math
from typing import Any

import anyio
import pytest

from anyio_sharedstream import Fold, Restart, SharedSource, SharedStreamManager, shared_source
from tests.support import Feed, idle, settle
from tests.test_lifecycle_values import add, numbers, policies, source_of

DIFFERENCES: dict[str, tuple[Any, Any]] = {
    "route_by": (None, abs),
    "linger": (0.0, 5),
    "cohort_grace": (None, 0),
    "min_subscribers": (1, 2),
    "restart": (None, Restart()),
    "on_exhausted": ("fail", "end"),
    "replay": (0, 4),
    "replay_max_age": (None, 1),
    "fold": (None, Fold(0, add)),
    "silence_timeout": (None, 60),
    "close_timeout": (None, 0),
}


def test_no_policy_is_forgotten_here() -> None:
    assert DIFFERENCES.keys() == inspect.signature(SharedSource).parameters.keys() - {"key", "open"}


@pytest.mark.parametrize("swap", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize("name", DIFFERENCES)
async def test_sources_of_one_key_that_disagree_in_a_policy_cannot_share(name: str, swap: bool) -> None:
    feed = Feed()
    mine, theirs = reversed(DIFFERENCES[name]) if swap else DIFFERENCES[name]
    async with SharedStreamManager() as manager:
        other = manager.subscribe(feed.asking_for(**policies(name, theirs)), subscriber_id="other")
        async with manager.subscribe(feed.asking_for(**policies(name, mine))):
            await settle()
            before = manager.statistics()
            with pytest.raises(ValueError, match="all sources of one key must have the same policies") as caught:
                await other.__aenter__()
            assert str(caught.value).startswith(f"'feed' is open with {name}={mine!r}, ")
            assert f"subscribed to with {name}={theirs!r}" in str(caught.value)
            assert manager.statistics() == before
            await manager.stop("feed")
        async with other:
            assert [told.subscriber_id for told in manager.statistics().groups["feed"].subscriptions] == ["other"]
            await manager.stop("feed")
        assert idle(manager)


async def test_equal_policies_are_no_difference_whoever_made_them() -> None:
    feed = Feed()

    def source(five: float) -> SharedSource[Any]:
        restart = Restart(max_delay=five, on=(OSError, ValueError))
        fold = Fold([], feed.emit)  # a method is another object each time, and equal
        return feed.asking_for(linger=five, replay_max_age=five, replay=3, restart=restart, fold=fold, route_by=add)

    async with SharedStreamManager() as manager:
        async with manager.subscribe(source(5)), manager.subscribe(source(5.0)):
            await settle()
            assert len(manager.statistics().groups["feed"].subscriptions) == 2
        assert feed.opened == 1


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("route_by", lambda event: event, lambda event: event),
        ("restart", Restart(on=ValueError), Restart(on=(ValueError,))),
        ("fold", Fold(0, add), Fold(0, max)),
        ("fold", Fold(0, add), Fold(1, add)),
    ],
)
async def test_values_that_differ_in_a_part_are_a_difference(name: str, one: Any, other: Any) -> None:
    async with SharedStreamManager() as manager, manager.subscribe(source_of({name: one})):
        with pytest.raises(ValueError, match=f"is open with {name}=.*; a function among them must be the same object"):
            await manager.subscribe(source_of({name: other})).__aenter__()


async def test_a_function_that_is_decorated_twice_with_different_policies_cannot_be_shared() -> None:
    plain, lingering = shared_source(numbers), shared_source(linger=1)(numbers)
    async with SharedStreamManager() as manager, manager.subscribe(plain()) as stream:
        with pytest.raises(ValueError, match=r"^numbers\(.*\) is open with linger=0\.0, .* with linger=1: "):
            await manager.subscribe(lingering()).__aenter__()
        async with manager.subscribe(shared_source()(numbers)()) as other:
            assert (await stream.receive(), stream.key) == (0, other.key)


async def test_who_disagrees_does_not_adopt_an_upstream_that_lingers() -> None:
    feed = Feed()
    async with SharedStreamManager() as manager:
        async with manager.subscribe(feed.asking_for(linger=math.inf)):
            await settle()
        other = manager.subscribe(feed.source)
        with pytest.raises(ValueError, match=r"linger=inf, .* linger=0\.0: "):
            await other.__aenter__()
        assert manager.statistics().groups["feed"].state == "lingering"
        await manager.stop("feed")
        async with other:
            await settle()
        assert (feed.opened, feed.closed) == (2, 2)


async def test_who_disagrees_with_an_upstream_that_is_closing_is_the_next() -> None:
    feed = Feed()
    feed.clean_up = anyio.Event()
    async with SharedStreamManager() as manager:
        first = await manager.subscribe(feed.source).__aenter__()
        await settle()
        first.close()
        async with manager.subscribe(feed.asking_for(replay=3)):
            await settle()
            assert (feed.opened, manager.statistics().groups["feed"].state) == (1, "waiting")
            feed.clean_up.set()
            await settle()
            assert (feed.opened, feed.most_open) == (2, 1)


class Incomparable:
    """An initial state that has no answer to whether it is another, as arrays have none."""

    def __eq__(self, other: object) -> bool:
        raise ValueError("the truth value is ambiguous")

    __hash__ = None  # type: ignore[assignment]


async def test_values_that_cannot_be_compared_are_a_difference_unless_they_are_the_same() -> None:
    same = Fold(Incomparable(), add)
    async with SharedStreamManager() as manager, manager.subscribe(source_of({"fold": same})):
        with pytest.raises(ValueError, match="is open with fold="):
            await manager.subscribe(source_of({"fold": Fold(Incomparable(), add)})).__aenter__()
        async with manager.subscribe(source_of({"fold": same})):
            assert len(manager.statistics().groups["feed"].subscriptions) == 2
