"""Whatever subscribers say, and whatever becomes of the upstream: each event is advanced as `tests.ack_model` says, and then."""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from math import inf
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from tests.ack_model import ACK, DRAIN, LINGER, LONG_DRAIN, Terms, Wish
from tests.ack_play import Action, Scene, play
from tests.properties import on_each
from tests.virtual_time import run


def weighted(*choices: tuple[int, Any]) -> st.SearchStrategy[Any]:
    return st.sampled_from([choice for weight, choice in choices for _ in range(weight)])


def consistent(terms: dict[str, Any]) -> Terms:
    if terms["exhausted"] == "restart" and not terms["restart"]:
        terms["exhausted"] = "fail"
    return Terms(**terms)


terms_ = st.fixed_dictionaries(
    {
        "window": st.sampled_from([1, 2, 3, 6]),
        "workers": st.sampled_from([1, 2, 8]),
        "lanes": st.sampled_from([1, 2, 3]),
        "patience": weighted((1, inf), (2, ACK)),
        "drain": st.sampled_from([DRAIN, LONG_DRAIN]),
        "retries": weighted((1, None), (3, 2)),
        "restart": st.booleans(),
        "exhausted": st.sampled_from(["fail", "end", "restart"]),
        "linger": weighted((2, 0.0), (1, LINGER)),
    }
).map(consistent)
indices = st.integers(-1, 4)
lanes = st.integers(0, 2)
wishes = st.builds(
    Wish, reads=weighted((2, False), (1, True)), even=weighted((2, False), (1, True)), bounded=weighted((3, False), (1, True))
).map(lambda wish: Wish(reads=wish.reads and not wish.even, even=wish.even, bounded=wish.bounded and not wish.reads))


def action(name: str, *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Action]:
    return st.tuples(st.just(name), *arguments)


hows = st.sampled_from(["well", "badly", "close"])
joins = action("join", wishes)
takes = action("take", indices, st.sampled_from([1, 1, 2, 1000]))
defers = action("defer", indices)
resolves = action("resolve", indices, st.sampled_from(["acked", "acked", "failed", "rejected", "forgotten"]))
emits = action("emit", st.integers(1, 5))
actions = weighted(
    (3, joins),
    (2, action("leave", indices, hows)),
    (8, takes),
    (3, action("batch", indices, st.sampled_from([1, 2, 5]))),
    (3, action("wait", indices)),
    (1, action("cancel", indices)),
    (2, action("say", indices, st.sampled_from(["failed", "rejected"]))),
    (2, defers),
    (4, resolves),
    (8, emits),
    (1, action("fail")),
    (1, action("exhaust")),
    (2, action("block", lanes)),
    (2, action("unblock", lanes)),
    (2, action("refuse", lanes)),
    (2, action("accept", lanes)),
    (1, action("stop")),
).flatmap(lambda one: one)
everybody_takes: list[Action] = [("take", index, 1000) for index in range(4)]
everybody_leaves: list[Action] = [("leave", index, "well") for index in range(8)]
# What hardly ever happens one after the other if all is left to chance.
phrases = weighted(
    (12, st.tuples(actions).map(list)),
    (2, st.tuples(takes, defers).map(list)),
    (1, st.builds(lambda lane, emit: [("block", lane), emit, *everybody_takes, ("unblock", lane)], lanes, emits)),
    (1, st.builds(lambda lane, emit: [("refuse", lane), emit, *everybody_takes], lanes, emits)),
    (1, st.builds(lambda index: [("take", index, 1), ("defer", index), *everybody_leaves], indices)),
    (1, st.just(everybody_takes)),
).flatmap(lambda phrase: phrase)
pauses = weighted((8, 0.25), (4, 0.5), (2, 1.0), (2, 2.0), (1, 4.0), (1, 10.0))


def program_of(first: list[Wish], others: list[tuple[float, list[Action]]]) -> list[Scene]:
    beginning: list[tuple[float, list[Action]]] = [(0.25, [("join", wish)]) for wish in first]
    scenes = [(pause, one) for pause, phrase in [*beginning, (0.25, [("emit", 3)]), *others] for one in phrase]
    return [(time, scene) for time, (_, scene) in zip(accumulate(pause for pause, _ in scenes), scenes, strict=True)]


programs = st.builds(
    program_of, st.lists(wishes, min_size=1, max_size=3), st.lists(st.tuples(pauses, phrases), min_size=10, max_size=30)
)


def alone_in_time(*entries: Any) -> list[Scene]:
    """A program of actions, each behind its time."""
    return list(zip(entries[::2], entries[1::2], strict=True))


JOIN: Action = ("join", Wish())
# One stands at the second event when the other finishes both.
OVERTAKEN = alone_in_time(1, JOIN, 2, JOIN, 3, ("emit", 2), 4, ("take", 0, 2), 5, ("batch", 1, 2), 6, ("wait", 1))
# The first is late when there has been no room for as long; whoever is at the next event has some time left.
BOTH_AT_ONCE = alone_in_time(1, JOIN, 2, ("emit", 3), 2.5, JOIN, 3, ("take", 0, 2), 3.25, ("take", 1, 1), 5.5, ("emit", 1))
# It was asked for an event when nobody was left.
ADOPTED = alone_in_time(1, JOIN, 2, ("leave", 0, "well"), 3, ("emit", 3), 4, JOIN, 5, ("take", 1, 1))
DRAINING = alone_in_time(
    *(1, JOIN, 2, ("emit", 3), 2.25, ("take", 0, 1), 2.5, ("defer", 0), 2.75, ("leave", 0, "well"), 3, JOIN, 6.5, ("emit", 1)),
    *(
        7,
        ("take", 1, 1),
        7.25,
        ("defer", 1),
        7.5,
        ("leave", 1, "close"),
        8,
        ("resolve", 0, "forgotten"),
        8.5,
        ("resolve", 1, "acked"),
    ),
)
OVERFLOW = alone_in_time(
    *(1, JOIN, 1.25, ("join", Wish(bounded=True)), 1.5, ("emit", 1), 2, ("take", 1, 1), 2.25, ("emit", 2), 2.5, ("emit", 1)),
    *(3, ("take", 0, 1000), 3.25, ("take", 1, 1)),
)
# What is asked for when it ends comes in vain.
IN_VAIN = alone_in_time(1, JOIN, 2, ("emit", 1), 3, ("stop",), 3.25, ("fail",), 3.5, JOIN, 4, ("emit", 1))
CANCELLED = alone_in_time(1, JOIN, 2, ("wait", 0), 3, ("cancel", 0), 4, ("emit", 1), 5, ("wait", 0), 6, ("leave", 0, "badly"))


@on_each(["asyncio", "trio"], max_examples=300)
@given(terms=terms_, program=programs)
@example(terms=Terms(window=2), program=OVERTAKEN)
@example(terms=Terms(window=2, lanes=1, patience=ACK), program=BOTH_AT_ONCE)
@example(terms=Terms(window=1, linger=LINGER), program=ADOPTED)
@example(terms=Terms(patience=ACK), program=DRAINING)
@example(terms=Terms(patience=ACK, linger=LINGER), program=DRAINING)
@example(terms=Terms(), program=OVERFLOW)
@example(terms=Terms(), program=IN_VAIN)
@example(terms=Terms(), program=CANCELLED)
def test_each_event_is_advanced_when_everybody_is_done_with_it_and_as_the_model_says(
    backend: str, terms: Terms, program: list[Scene]
) -> None:
    run(partial(play, terms, program), backend=backend)
