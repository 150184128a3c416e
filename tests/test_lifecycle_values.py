"""What may be asked of the life of an upstream: `Restart`, `Fold`, the policies of a source, and sources that disagree."""

from __future__ import annotations

import functools
import inspect
import math
import re
import sys
from collections.abc import AsyncGenerator, Callable
from dataclasses import FrozenInstanceError
from typing import Any

import anyio
import pytest

from anyio_sharedstream import Block, DropOldest, Fail, Fold, Restart, SharedSource, SharedStreamManager, Snapshot, shared_source
from tests.support import Feed, idle, settle

LARGEST = sys.float_info.max
HUGE = 10**400


async def numbers(*args: object) -> AsyncGenerator[int, None]:
    yield 0
    await anyio.sleep_forever()


def add(state: int, event: int) -> int:
    return state + event


async def a_coroutine_function(*args: object) -> None:
    """What nobody can wait for where the policies' functions are called."""


NO_FUNCTIONS = [None, 42, "add", a_coroutine_function, functools.partial(a_coroutine_function, 1)]
NO_NUMBERS: list[Any] = [True, False, "1", b"1", [1], 1j, math.nan, -math.inf]
NO_SECONDS = [*NO_NUMBERS, -1, -0.001, HUGE, -HUGE]
NO_COUNTS = [*NO_NUMBERS, -1, 1.0, 0.5, math.inf, -HUGE]

#: What is refused of each parameter, None apart where that is a value.
REFUSED_BY_RESTART: dict[str, list[Any]] = {
    "initial_delay": [*NO_SECONDS, None, math.inf],
    "max_delay": [*NO_SECONDS, None, math.inf],
    "within": [*NO_SECONDS, None, 0],
    "factor": [*NO_NUMBERS, None, math.inf, HUGE, 0, 0.999, -2],
    "jitter": [*NO_NUMBERS, None, math.inf, HUGE, -0.001, 1.001],
    "max_restarts": NO_COUNTS,
    "on": [*NO_FUNCTIONS, (), ValueError(), (ValueError, "OSError"), (ValueError, (OSError,)), [ValueError], (len,), int, str],
}
REFUSED_BY_SOURCES: dict[str, list[Any]] = {
    "linger": [*NO_SECONDS, None],
    "cohort_grace": [*NO_SECONDS, math.inf],
    "close_timeout": [*NO_SECONDS, math.inf],
    "silence_timeout": [*NO_SECONDS, math.inf, 0],
    "replay_max_age": [*NO_SECONDS, math.inf, 0],
    "min_subscribers": [*NO_COUNTS, None, 0],
    "replay": [*NO_COUNTS, None, HUGE, sys.maxsize + 1],
    "on_exhausted": [None, True, 0, "", "FAIL", "stop", b"end", ["end"]],
    "restart": [True, 3, "always", Restart, {"max_restarts": 3}, ValueError],
    "fold": [True, 0, add, Fold, (0, add)],
    "route_by": NO_FUNCTIONS[1:],
}
#: What is taken, the extremes first.
TAKEN_BY_RESTART: dict[str, list[Any]] = {
    "initial_delay": [0, 0.0, 30, 1e-9],
    "max_delay": [0.1, LARGEST, int(LARGEST)],
    "within": [1e-9, 1, LARGEST, math.inf],
    "factor": [1, 1.0, LARGEST],
    "jitter": [0, 1, 0.5],
    "max_restarts": [None, 0, 1, HUGE],
    "on": [ValueError, BaseException, (ValueError,), (OSError, EOFError), callable, lambda error: False],
}
TAKEN_BY_SOURCES: dict[str, list[Any]] = {
    "linger": [0, 0.0, 1e-9, 1, LARGEST, int(LARGEST), math.inf],
    "cohort_grace": [None, 0, 1.5, LARGEST],
    "close_timeout": [None, 0, 1.5, LARGEST],
    "silence_timeout": [None, 1e-9, 1, LARGEST],
    "replay_max_age": [None, 1e-9, 1, LARGEST],
    "min_subscribers": [1, 2, HUGE],
    "replay": [1, 1000, sys.maxsize],
    "on_exhausted": ["fail", "end", "restart"],
    "restart": [Restart(), Restart(max_restarts=0)],
    "fold": [None, Fold(0, add), Fold(dict, add), Fold(None, max)],
    "route_by": [None, add, abs],
}


def each(table: dict[str, list[Any]]) -> pytest.MarkDecorator:
    """One test for each value of each parameter."""
    pairs = [(name, value, number) for name, values in table.items() for number, value in enumerate(values)]
    ids = [f"{name}-{number}-{type(value).__name__}" for name, value, number in pairs]
    return pytest.mark.parametrize(("name", "value"), [pair[:2] for pair in pairs], ids=ids)


def refused(name: str, value: object, make: Callable[[], object]) -> None:
    """Making it is an error that says which parameter it is about, and what is wrong with it."""
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    assert re.match(rf"{name}\b", str(caught.value))
    assert repr(value) in str(caught.value)


# `Restart` and `Fold`.


@each(REFUSED_BY_RESTART)
def test_restart_refuses_and_names(name: str, value: Any) -> None:
    refused(name, value, lambda: Restart(**{name: value}))


@each(TAKEN_BY_RESTART)
def test_restart_takes(name: str, value: Any) -> None:
    assert getattr(Restart(**{name: value}), name) == value


def test_a_first_delay_that_is_longer_than_the_longest_is_refused_and_both_are_named() -> None:
    refused("initial_delay", 2, lambda: Restart(initial_delay=2, max_delay=1))
    with pytest.raises(ValueError, match=r"initial_delay=0\.1 .* max_delay=0$"):
        Restart(max_delay=0)
    assert Restart(initial_delay=0, max_delay=0).max_delay == 0


def test_restart_takes_keywords_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        Restart(0.1)  # type: ignore[call-arg]


@pytest.mark.parametrize("step", NO_FUNCTIONS)
def test_a_fold_refuses_a_step_that_is_no_plain_function(step: Any) -> None:
    refused("step", step, lambda: Fold(0, step))


@pytest.mark.parametrize("initial", NO_FUNCTIONS[3:])
def test_a_fold_refuses_an_initial_state_that_would_have_to_be_awaited(initial: Any) -> None:
    refused("initial", initial, lambda: Fold(initial, add))


def test_restart_and_fold_are_values() -> None:
    for one, same, other in (
        (Restart(max_delay=9), Restart(max_delay=9), Restart(max_delay=8)),
        (Fold(0, add), Fold(0, add), Fold(1, add)),
    ):
        assert (one == same, one == other, hash(one) == hash(same)) == (True, False, True)
        with pytest.raises(FrozenInstanceError):
            setattr(one, one.__slots__[0], 5)


# The policies of a source.


#: What makes no sense without another policy.
NEEDED: dict[str, dict[str, Any]] = {"on_exhausted": {"restart": Restart()}, "replay_max_age": {"replay": 3}}


def policies(name: str, value: Any) -> dict[str, Any]:
    return {**NEEDED.get(name, {}), name: value}


def source_of(policies: dict[str, Any]) -> SharedSource[Any]:
    return SharedSource(key="feed", open=numbers, **policies)


def decorated_with(policies: dict[str, Any]) -> Callable[..., SharedSource[Any]]:
    return shared_source(**policies)(numbers)


#: The decorator says at once what is wrong, and not when the source is first asked for.
in_both_forms = pytest.mark.parametrize("make", [source_of, decorated_with])


@in_both_forms
@each(REFUSED_BY_SOURCES)
def test_a_source_refuses_and_names(make: Callable[[Any], object], name: str, value: Any) -> None:
    refused(name, value, lambda: make(policies(name, value)))


@each(TAKEN_BY_SOURCES)
def test_a_source_takes(name: str, value: Any) -> None:
    for source in source_of(policies(name, value)), decorated_with(policies(name, value))():
        assert getattr(source, name) == value


@in_both_forms
@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ({"on_exhausted": "restart"}, 'on_exhausted="restart" needs restart='),
        ({"replay_max_age": 5}, "replay_max_age=5 needs replay="),
        ({"replay_max_age": 5, "replay": 0}, "replay_max_age=5 needs replay="),
    ],
)
def test_policies_that_make_no_sense_together_are_refused_and_named(
    make: Callable[[Any], object], policies: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make(policies)


@pytest.mark.parametrize("name", ["lingering", "key", "open", "function"])
def test_the_decorator_refuses_what_is_no_policy_and_names_it(name: str) -> None:
    with pytest.raises(TypeError, match=f"'{name}'"):
        decorated_with({name: 1})


def test_the_decorator_gives_its_policies_to_every_source_and_others_to_none() -> None:
    asked: dict[str, Any] = {"linger": 5, "restart": Restart(), "on_exhausted": "restart", "replay": 3, "fold": Fold(0, add)}
    decorated = decorated_with(asked)
    for source in decorated(), decorated(1):
        assert source == SharedSource(key=source.key, open=source.open, **asked)
    for plain in shared_source(numbers)(), shared_source()(numbers)():
        assert plain == SharedSource(key=decorated().key, open=plain.open)


# What is taken also works: the clocks and the containers cope with the extremes.


def extremes(longest: float) -> dict[str, Any]:
    times = dict.fromkeys(["linger", "cohort_grace", "close_timeout", "silence_timeout", "replay_max_age"], longest)
    restart = Restart(initial_delay=longest, max_delay=longest, within=longest, factor=LARGEST, max_restarts=HUGE)
    return {**times, "restart": restart, "replay": sys.maxsize, "min_subscribers": 2, "fold": Fold(0, add)}


@pytest.mark.parametrize("longest", [LARGEST, int(LARGEST)], ids=["float", "integer"])
async def test_the_longest_times_are_times_to_wait_for(longest: float) -> None:
    feed = Feed()
    source = feed.asking_for(**extremes(longest))
    async with SharedStreamManager() as manager:
        async with manager.subscribe(source) as one, manager.subscribe(source, snapshot=True) as other:
            feed.emit(7)
            assert (await one.receive(), await other.receive(), await other.receive()) == (7, Snapshot(0), 7)
        await settle()
        assert manager.statistics().groups["feed"].state == "lingering"
        async with manager.subscribe(source) as stream:
            assert stream.receive_nowait() == 7
            feed.fail(OSError())
            await settle()
            assert manager.statistics().groups["feed"].state == "restarting"
        assert idle(manager)


# Subscribing with `snapshot`.


@pytest.mark.parametrize("overflow", [Fail(), Block(1), DropOldest()], ids=repr)
async def test_a_snapshot_of_a_source_without_a_fold_is_refused_and_leaves_no_state(overflow: Any) -> None:
    async with SharedStreamManager() as manager:
        with pytest.raises(ValueError, match="'feed' has no fold, so there is nothing to give a snapshot of"):
            manager.subscribe(Feed().source, overflow=overflow, snapshot=True)
        assert idle(manager)


@pytest.mark.parametrize("snapshot", [None, 0, 1, "yes", Fold(0, add)])
async def test_a_snapshot_is_asked_for_with_true_or_false(snapshot: Any) -> None:
    async with SharedStreamManager() as manager:
        refused("snapshot", snapshot, lambda: manager.subscribe(Feed().asking_for(fold=Fold(0, add)), snapshot=snapshot))
        assert idle(manager)


def test_no_policy_is_forgotten_here() -> None:
    assert REFUSED_BY_SOURCES.keys() == TAKEN_BY_SOURCES.keys()
    assert REFUSED_BY_SOURCES.keys() == inspect.signature(SharedSource).parameters.keys() - {"key", "open"}
    assert REFUSED_BY_RESTART.keys() == TAKEN_BY_RESTART.keys() == inspect.signature(Restart).parameters.keys()
