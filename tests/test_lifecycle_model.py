"""Lives that nobody thought of: whatever happens to a key, and whenever, it is what `tests.lifecycle_model` says."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import accumulate, chain
from math import inf
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.lifecycle_model import CLOSE, DELAY, GRACE, LINGER, SILENCE, SLOW, Life, Terms, Wish
from tests.lifecycle_play import Action, Scene, play
from tests.properties import on_each
from tests.virtual_time import run


def weighted(*choices: tuple[int, Any]) -> st.SearchStrategy[Any]:
    return st.sampled_from([choice for weight, choice in choices for _ in range(weight)])


# Most policies are there in every other program; those that keep things from happening, less often.
terms_ = st.builds(
    Terms,
    apart=st.booleans(),
    linger=st.sampled_from([0.0, LINGER]),
    grace=weighted((3, None), (1, GRACE)),
    least=weighted((3, 1), (1, 2)),
    restart=weighted((1, False), (2, True)),
    most=weighted((3, None), (1, 3)),
    picky=weighted((4, False), (1, True)),
    exhausted=st.sampled_from(["fail", "end", "restart"]),
    replay=st.sampled_from([0, 1, 4]),
    age=weighted((2, None), (1, 3.0)),
    fold=st.booleans(),
    silence=st.sampled_from([None, SILENCE]),
    close=st.sampled_from([None, CLOSE]),
).map(Terms.consistent)
indices = st.integers(-1, 5)
wishes = st.builds(Wish, reads=st.booleans(), gaps=st.booleans(), snapshot=st.booleans(), drops=st.booleans(), even=st.booleans())
joins = st.tuples(st.just("join"), wishes)
leaves = st.tuples(st.just("leave"), indices)
takes = st.tuples(st.just("take"), indices, st.sampled_from([1, 2, 1000]))
emits = st.tuples(st.just("emit"), st.integers(1, 5))


def alone(*action: Any) -> st.SearchStrategy[list[Action]]:
    return st.just([action])


bursts = weighted(
    (12, st.lists(st.one_of(joins, joins, leaves), min_size=1, max_size=3)),
    (8, st.tuples(emits).map(list)),
    (6, st.tuples(takes).map(list)),
    (3, alone("fail")),
    (1, alone("exhaust")),
    (1, alone("poison")),
    (1, alone("stop")),
    (2, alone("hold")),
    (2, alone("let_go")),
    (1, st.tuples(st.tuples(st.just("refuse"), st.integers(1, 3))).map(list)),
    (1, alone("slow_down", True)),
    (1, alone("slow_down", False)),
).flatmap(lambda burst: burst)
pauses = weighted((4, 0.25), (4, 1.0), (3, 2.0), (2, 4.0), (1, 10.0))
scenes = st.lists(st.tuples(pauses, bursts), min_size=10, max_size=40)


def program_of(first: list[Wish], others: list[tuple[float, list[Action]]]) -> list[Scene]:
    times = accumulate(pause for pause, _ in others)
    return [(0.0, [("join", wish) for wish in first]), *((time, burst) for time, (_, burst) in zip(times, others, strict=True))]


programs = st.builds(program_of, st.lists(wishes, min_size=1, max_size=2), scenes)


def alone_in_time(*entries: Any) -> list[Scene]:
    """A program of single actions, one after the other, each behind its time."""
    return [(time, [action]) for time, action in zip(entries[::2], entries[1::2], strict=True)]


WATCH: Action = ("join", Wish(reads=True, gaps=True, snapshot=True))
JOIN: Action = ("join", Wish(gaps=True))
LOSES: Action = ("join", Wish(gaps=True, snapshot=True, drops=True))
# Just old enough to be replayed, and too old.
OLD = alone_in_time(0, JOIN, 1, ("emit", 1), 2, ("emit", 1), 4, JOIN, 4.25, JOIN, 5.25, JOIN)
# After the third restart the first is so long ago that there may be two more.
FAILURES = alone_in_time(0, WATCH, *chain.from_iterable((time, ("fail",)) for time in (0.25, 2, 5, 21, 22.75, 25)))
EXHAUSTION = alone_in_time(0, WATCH, *chain.from_iterable((time, ("exhaust",)) for time in (0.25, 2, 5, 10)))
LOSSES = alone_in_time(
    *(0, LOSES, 0.25, WATCH, 1, ("emit", 1), 2, ("emit", 5), 2.25, ("fail",)),
    *(2.5, ("take", 0, 1), 4, ("emit", 1), 4.25, ("emit", 5), 4.5, ("take", 0)),
    *(5, ("emit", 1), 5.25, ("emit", 5), 5.5, ("fail",), 8, ("emit", 1), 8.25, ("take", 0), 9, ("emit", 1)),
    *(10, ("emit", 5), 10.25, ("fail",), 10.5, ("take", 0)),
)
# Who comes third must not take the second, who never opens anything, for the one to wait for.
STILLBORN: list[Scene] = [
    *alone_in_time(0, JOIN, 1, ("hold",), 2, ("leave", 0)),
    (3, [WATCH, ("leave", -1), WATCH]),
    *alone_in_time(5, ("let_go",), 6, ("emit", 1)),
]


@on_each(["asyncio", "trio"], max_examples=300)
@given(terms=terms_, program=programs)
@example(terms=Terms(replay=4, age=3.0), program=OLD)
@example(terms=Terms(restart=True, most=3), program=FAILURES)
@example(terms=Terms(restart=True, most=3, exhausted="restart"), program=EXHAUSTION)
@example(terms=Terms(restart=True, fold=True), program=LOSSES)
@example(terms=Terms(restart=True, apart=True, fold=True), program=LOSSES)
@example(terms=Terms(), program=STILLBORN)
def test_a_life_is_what_the_model_says(backend: str, terms: Terms, program: list[Scene]) -> None:
    run(partial(play, terms, program), backend=backend)


HERE: Scene = (0, [WATCH])
OPENING: Scene = (0, [("slow_down", True), WATCH])
HOLD: Scene = (0.25, [("hold",)])
EMIT: Scene = (0.25, [("emit", 3)])
LEAVE: Scene = (0.5, [("leave", 0)])
FAIL: Scene = (0.5, [("fail",)])

#: States, each with terms and the scenes that lead to it under these, and the time at which something comes up in it.
STATES: dict[str, tuple[Terms, list[Scene], float]] = {
    "waiting for a cohort": (Terms(grace=GRACE, least=4), [HERE], GRACE),
    "waiting for an earlier one that is late": (
        Terms(close=CLOSE, replay=2, linger=LINGER),
        [HERE, HOLD, (0.5, [("stop",)]), (0.75, [WATCH])],
        0.5 + CLOSE,
    ),
    "opening, soon open": (Terms(apart=True, fold=True), [OPENING], SLOW),
    "opening, soon silent": (Terms(apart=True, silence=SLOW / 2, restart=True), [OPENING], SLOW / 2),
    "live, soon silent": (Terms(silence=SILENCE, fold=True), [HERE, HOLD], SILENCE),
    "live, soon silent, and restarted": (
        Terms(silence=SILENCE, restart=True, linger=LINGER, replay=2),
        [HERE, EMIT],
        0.25 + SILENCE,
    ),
    "lingering, soon over": (Terms(linger=LINGER, replay=2, fold=True), [HERE, EMIT, LEAVE], 0.5 + LINGER),
    "lingering, soon silent": (Terms(linger=inf, silence=SILENCE, restart=True), [HERE, LEAVE], SILENCE),
    "lingering while opening, soon open": (Terms(linger=LINGER, apart=True), [OPENING, LEAVE], SLOW),
    "lingering while opening, soon over": (Terms(linger=SLOW / 2, apart=True), [OPENING, LEAVE], 0.5 + SLOW / 2),
    "restarting, soon open": (
        Terms(restart=True, fold=True, linger=LINGER, silence=SILENCE),
        [HERE, EMIT, FAIL],
        0.5 + DELAY,
    ),
    "restarting, and closing late": (
        Terms(apart=True, restart=True, fold=True, close=CLOSE),
        [HERE, HOLD, FAIL],
        0.5 + CLOSE,
    ),
    "closing late after an error": (Terms(apart=True, fold=True, close=CLOSE), [HERE, HOLD, FAIL], 0.5 + CLOSE),
    "closing late after a leave": (Terms(close=CLOSE), [HERE, HOLD, LEAVE], 0.5 + CLOSE),
}
AFTERWARDS: list[Scene] = [
    (10, [("slow_down", False), JOIN]),
    (11, [("emit", 2)]),
    (12, [("let_go",)]),
    (18, [("emit", 1)]),
]
states = pytest.mark.parametrize("name", STATES)
backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])


def names(actions: list[Action]) -> str:
    return " and ".join(name for name, *_ in actions)


@states
def test_the_scenes_lead_to_the_state_in_which_something_comes_up(name: str) -> None:
    """Else the tests that follow would show nothing of it."""
    terms, scenes, due = STATES[name]
    life = Life(terms)
    for time, actions in scenes:
        life.advance(time)
        for action in actions:
            life.act(*action)
        life.settle()
    life.advance(due, up_to=True)
    assert name.startswith(life.groups[-1].state)
    assert [deadline for group in life.groups for deadline in group.deadlines.values() if deadline == due]


@backends
@pytest.mark.parametrize(
    "actions",
    [
        [("fail",)],
        [("exhaust",)],
        [("poison",)],
        [("stop",)],
        [("stop",), ("stop",)],
        [("refuse", 2)],
        [("hold",), ("fail",)],
        [("hold",), ("exhaust",)],
        [("hold",), ("stop",)],
        [("leave", 0), ("leave", 1), ("leave", 2)],
    ],
    ids=names,
)
@states
def test_an_end_in_every_state(name: str, actions: list[Action], backend: str) -> None:
    terms, scenes, _ = STATES[name]
    program: list[Scene] = [*scenes, (1, [JOIN]), *((1.25 + place / 4, [action]) for place, action in enumerate(actions))]
    for exhausted in ("fail", "end", "restart"):
        run(partial(play, replace(terms, exhausted=exhausted).consistent(), program + AFTERWARDS), backend=backend)


@backends
@pytest.mark.parametrize(
    "actions",
    [[JOIN], [("leave", -1)], [("leave", -1), WATCH], [WATCH, ("leave", -1)], [WATCH, ("leave", 0)], [("stop",)]],
    ids=["join", "leave", "leave and join", "come and go", "join and leave", "stop"],
)
@states
def test_what_is_done_in_the_tick_in_which_something_comes_up_comes_before_or_after_it(
    name: str, actions: list[Action], backend: str
) -> None:
    terms, scenes, due = STATES[name]
    playing = partial(play, terms, [*scenes, (due, actions), *AFTERWARDS], orders=("first", "amid", "last"))
    seen: set[str] = set()
    crowd = 0
    # Who else wakes up at the same time, changes the order on asyncio; on trio it is random.
    while "first" not in seen and crowd < 50:
        seen |= run(partial(playing, crowd=crowd, early=True), backend=backend)
        crowd += 1
    for turns in range(6):
        seen |= run(partial(playing, turns=turns), backend=backend)
    assert seen >= {"first", "last"}
