"""The table of states: every way in it is walked, each change is told, and what is not in it does not happen."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise, product
from typing import Any, TypeAlias, get_args

import anyio
import pytest
import structlog
from structlog.testing import LogCapture

from anyio_sharedstream import Restart, SharedSource, SharedStreamManager, Subscription, UpstreamSilent
from anyio_sharedstream._states import TRANSITIONS, Move, State
from anyio_sharedstream._statistics import GroupState, GroupStatistics
from tests.support import Feed, idle, settle
from tests.sweep import noted
from tests.test_states_draining import DRAINING
from tests.virtual_time import in_virtual_time

KEY = ("prices", "BTC")
CHANGES = {f"group {state.public}" for state in State}
RESTART = Restart(initial_delay=5, max_delay=5, jitter=0, on=(ConnectionError, UpstreamSilent))

Transition: TypeAlias = tuple[State, Move]


class Stage:
    """One upstream that opens, fails and closes when it is told to, its subscribers, and what is logged."""

    def __init__(self) -> None:
        self.lines = LogCapture()
        self.manager = SharedStreamManager(logger=structlog.wrap_logger(None, processors=[self.lines]))
        self.source = SharedSource(key=KEY, open=self._open, cohort_grace=1, linger=10, silence_timeout=100, restart=RESTART)
        self.streams: list[Subscription[int]] = []
        self.may_open, self.may_fail, self.may_close = anyio.Event(), anyio.Event(), anyio.Event()

    @asynccontextmanager
    async def _open(self) -> AsyncGenerator[Stage, None]:
        self.may_open, self.may_fail, self.may_close = anyio.Event(), anyio.Event(), anyio.Event()
        try:
            await self.may_open.wait()
            yield self
        finally:
            with anyio.CancelScope(shield=True):
                await self.may_close.wait()

    def __aiter__(self) -> Stage:
        return self

    async def __anext__(self) -> int:
        await self.may_fail.wait()
        raise ConnectionError("lost")

    async def join(self) -> None:
        self.streams.append(await self.manager.subscribe(self.source).__aenter__())

    def group(self) -> GroupStatistics:
        statistics = self.manager.statistics()
        [group] = [*statistics.groups.values(), *statistics.closing]
        assert (group.state != "closing") == (KEY in statistics.groups)
        return group

    def check(self, walked: list[Transition]) -> None:
        """The state is the one that the table leads to, and each change up to here has been told once."""
        moves = [move for _, move in walked]
        states = [State.WAITING, *(TRANSITIONS[transition] for transition in walked)]
        group = self.group()
        assert group.state == states[-1].public
        assert group.epoch == moves.count(Move.OPEN)
        assert group.restarts == moves.count(Move.BACK_OFF)
        if states[-1] is not State.CLOSING:
            assert (group.opened_at is None) == (Move.OPENED not in since_opening(moves))
        names = [state.public for state in states]
        told = [(line["event"], line["key"]) for line in self.lines.entries if line["event"] in CHANGES]
        assert told == [(f"group {name}", KEY) for before, name in pairwise(names) if name != before]


def since_opening(moves: list[Move]) -> list[Move]:
    """The moves since the latest opening began, or, if it has closed since, none."""
    latest = max((index for index, move in enumerate(moves) if move in (Move.OPEN, Move.BACK_OFF)), default=0)
    return moves[latest:]


# How to make each move. A leave is not followed by anything that awaits: some groups have nothing to close.


async def time_passes(seconds: float) -> None:
    await anyio.sleep(seconds)
    await settle()


async def grace_is_over(_stage: Stage) -> None:
    await time_passes(1)


async def back_off_is_over(_stage: Stage) -> None:
    await time_passes(5)


async def nobody_has_come(_stage: Stage) -> None:
    await time_passes(10)


async def nothing_has_come(_stage: Stage) -> None:
    await time_passes(100)


async def opens(stage: Stage) -> None:
    stage.may_open.set()
    await settle()


async def fails(stage: Stage) -> None:
    stage.may_fail.set()
    await settle()


async def closes(stage: Stage) -> None:
    stage.may_close.set()
    await settle()


async def all_leave(stage: Stage) -> None:
    while stage.streams:
        stage.streams.pop().close()


async def one_comes(stage: Stage) -> None:
    await stage.join()


async def is_stopped(stage: Stage) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()  # it is not waited for
        await stage.manager.stop(KEY)


ACTIONS: dict[Transition, Callable[[Stage], Awaitable[None]]] = {
    (State.WAITING, Move.OPEN): grace_is_over,
    (State.WAITING, Move.END): all_leave,
    (State.OPENING, Move.OPENED): opens,
    (State.OPENING, Move.LINGER): all_leave,
    (State.OPENING, Move.FAIL): nothing_has_come,
    (State.OPENING, Move.END): is_stopped,
    (State.LIVE, Move.LINGER): all_leave,
    (State.LIVE, Move.FAIL): fails,
    (State.LIVE, Move.END): is_stopped,
    (State.LINGERING_OPENING, Move.OPENED): opens,
    (State.LINGERING_OPENING, Move.ADOPT): one_comes,
    (State.LINGERING_OPENING, Move.END): nobody_has_come,
    (State.LINGERING, Move.ADOPT): one_comes,
    (State.LINGERING, Move.END): nobody_has_come,
    (State.FAILING, Move.BACK_OFF): closes,
    (State.FAILING, Move.END): all_leave,
    (State.BACKING_OFF, Move.OPEN): back_off_is_over,
    (State.BACKING_OFF, Move.END): all_leave,
}


def walks(state: State, length: int) -> Iterator[list[Transition]]:
    """All ways through the table from a state: to the end, or so many moves long."""
    following = [transition for transition in ACTIONS if transition[0] is state] if length else []
    if not following:
        yield []
    for transition in following:
        for rest in walks(TRANSITIONS[transition], length - 1):
            yield [transition, *rest]


async def walk(transitions: list[Transition]) -> None:
    stage = Stage()
    async with stage.manager:
        await stage.join()
        stage.check([])
        try:
            for number, transition in enumerate(transitions, 1):
                await ACTIONS[transition](stage)
                stage.check(transitions[:number])
        finally:
            stage.may_close.set()
    assert idle(stage.manager)


def named(value: object) -> str:
    return " ".join(part.name for part in value) if isinstance(value, tuple) else str(value)


def test_every_transition_has_its_scenario() -> None:
    assert set(ACTIONS) | set(DRAINING) == set(TRANSITIONS)


@pytest.mark.parametrize("transition", ACTIONS, ids=named)
@in_virtual_time
async def test_each_transition_by_the_shortest_way(transition: Transition) -> None:
    ways = (way[: way.index(transition) + 1] for way in walks(State.WAITING, 6) if transition in way)
    await walk(min(ways, key=len))


@in_virtual_time
async def test_all_ways_through_the_table() -> None:
    ways = list(walks(State.WAITING, 7))
    assert {transition for way in ways for transition in way} == set(ACTIONS)
    for way in ways:
        with noted([named(transition) for transition in way]):
            await walk(way)


# Other things that make the same moves.


@pytest.mark.parametrize(
    "way", [way for way in walks(State.WAITING, 5) if way[-1][1] is Move.END], ids=lambda way: named(way[-1])
)
@in_virtual_time
async def test_a_stop_ends_it_in_every_state(way: list[Transition]) -> None:
    stage = Stage()
    async with stage.manager:
        await stage.join()
        for transition in way[:-1]:
            await ACTIONS[transition](stage)
        await is_stopped(stage)
        assert KEY not in stage.manager.statistics().groups
        assert [line["event"] for line in stage.lines.entries].count("group closing") == 1
        stage.may_close.set()
        await settle()
        assert idle(stage.manager)
    assert [line["event"] for line in stage.lines.entries].count("group closing") == 1


async def changes(*, leave: bool = False, error: Exception | None = None, **policies: Any) -> list[str]:
    """What is told of a group that ends because its subscriber has left, or its upstream failed."""
    feed, lines = Feed(), LogCapture()
    async with SharedStreamManager(logger=structlog.wrap_logger(None, processors=[lines])) as manager:
        async with manager.subscribe(feed.asking_for(**policies)) as stream:
            await settle(20 * leave)
            if error is not None:
                feed.fail(error)
                with pytest.raises(type(error)):
                    await stream.receive()
        assert idle(manager)
    return [line["event"] for line in lines.entries if line["event"] in CHANGES]


async def test_the_last_to_leave_ends_what_does_not_linger() -> None:
    assert await changes(leave=True) == ["group opening", "group live", "group closing"]


async def test_who_leaves_before_anything_has_run_ends_it_unopened() -> None:
    assert await changes() == ["group closing"]
    assert await changes(linger=10) == ["group closing"]


async def test_a_failure_that_no_restart_follows_ends_it_without_a_word_of_restarting() -> None:
    expected = ["group opening", "group live", "group closing"]
    assert await changes(error=ValueError()) == expected
    assert await changes(error=ValueError(), restart=RESTART) == expected
    assert await changes(error=ConnectionError(), restart=Restart(max_restarts=0)) == expected


async def test_an_opening_that_fails_for_good_ends_it() -> None:
    stage = Stage()
    stage.source = SharedSource(key=KEY, open=lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    async with stage.manager:
        await stage.join()
        with pytest.raises(ZeroDivisionError):
            await stage.streams[0].receive()
    assert [line["event"] for line in stage.lines.entries if line["event"] in CHANGES] == ["group opening", "group closing"]


# The table itself.


@pytest.mark.parametrize("pair", sorted(set(product(State, Move)) - set(TRANSITIONS), key=named), ids=named)
def test_what_is_not_in_the_table_is_a_key_error(pair: Transition) -> None:
    with pytest.raises(KeyError):
        TRANSITIONS[pair]


async def test_a_step_that_the_table_does_not_know_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = Feed()
    async with SharedStreamManager() as manager, manager.subscribe(feed.asking_for(linger=10)) as stream:
        await settle()
        with monkeypatch.context() as patch:
            patch.delitem(TRANSITIONS, (State.LIVE, Move.LINGER))
            with pytest.raises(KeyError, match="LINGER"):
                stream.close()
        assert manager.statistics().groups["feed"].state == "live"
        await manager.stop_all()
    assert feed.closed == 1


def test_every_state_has_a_public_name() -> None:
    names = {state.name: state.public for state in State}
    assert names == {
        "WAITING": "waiting",
        "OPENING": "opening",
        "LIVE": "live",
        "LINGERING_OPENING": "lingering",
        "LINGERING": "lingering",
        "DRAINING": "draining",
        "FAILING": "restarting",
        "BACKING_OFF": "restarting",
        "CLOSING": "closing",
    }
    assert set(names.values()) == set(get_args(GroupState))


def test_there_is_no_way_out_of_closing_and_one_into_it_from_everywhere_else() -> None:
    assert State.CLOSING not in {state for state, _ in TRANSITIONS}
    assert {state for state, move in TRANSITIONS if move is Move.END} == set(State) - {State.CLOSING}
    assert {move for state, move in TRANSITIONS if TRANSITIONS[state, move] is State.CLOSING} == {Move.END}


def test_every_state_can_be_reached_and_every_move_can_be_made() -> None:
    walked = {transition for way in walks(State.WAITING, len(State)) for transition in way} | set(DRAINING)
    assert {State.WAITING, *(TRANSITIONS[transition] for transition in walked)} == set(State)
    assert {move for _, move in walked} == set(Move)
