"""Programs that nobody thought of: whatever subscribers, readers, sources and stops do, it is what `tests.model` says."""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Any

import anyio
from hypothesis import example, given
from hypothesis import strategies as st

from anyio_sharedstream import SharedStreamManager
from tests.conftest import BACKENDS
from tests.model_play import KEYS, WAYS, Action, Play, Step, Way
from tests.properties import on_each
from tests.support import idle, until
from tests.sweep import nothing_left


async def play(program: list[Action]) -> None:
    over = anyio.Event()
    async with nothing_left():
        async with anyio.create_task_group() as watch:
            watch.start_soon(until, over.is_set)  # no hang: it gives up after so many turns of the loop
            async with anyio.create_task_group() as tasks, SharedStreamManager() as manager:
                playing = Play(manager, tasks)
                try:
                    for action in program:
                        await playing.act(action)
                finally:
                    await playing.release(*KEYS)  # whatever has failed: what is held back is shielded
                playing.leave()
            over.set()
        assert idle(manager)
        await playing.rest()
        for index, handle in enumerate(playing.handles):
            assert handle.sub.ended
            for way in 2 * WAYS:
                await playing.act(("receive", index, way, 10_000))
        assert not any(opening.open for opening in playing.model.openings)


def action(name: str, *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Action]:
    return st.tuples(st.just(name), *arguments)


def weighted(*choices: tuple[int, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    return st.sampled_from([choice for weight, choice in choices for _ in range(weight)]).flatmap(lambda choice: choice)


# Most of it on one key, and few endings: else most programs would be over before anything has happened.
keys = st.sampled_from([0, 0, 0, 0, 1])
indices = st.integers(0, 4)
ways = st.sampled_from(WAYS)
counts = st.sampled_from([1, 2, 7, 60, 64, 65, 1000])
turns = action("turns", st.integers(1, 4))
enters = action("enter", keys, st.integers(0, 3), st.sampled_from([1, 2, 5, 64, 70, 200]))
closes = action("close", indices)
steps = weighted(
    (8, st.sampled_from([1, 1, 2, 3, 5, 63, 64, 65, 150])),
    (8, st.just("suspend")),
    (1, st.sampled_from(["fail", "return"])),
    (1, enters),
    (1, closes),
    (2, action("receive", indices, st.just("receive_nowait"), counts)),
)
sources = st.builds(lambda key, given: ("source", key, *given), keys, st.lists(steps, min_size=1, max_size=5))
scenes = weighted(
    (8, st.tuples(sources, turns)),
    (2, st.tuples(sources, action("rest"))),
    (2, st.tuples(sources)),
    (4, st.tuples(enters)),
    (5, st.tuples(action("receive", indices, ways, counts, st.booleans()))),
    (5, st.tuples(action("read", indices, ways))),
    (2, st.tuples(action("cancel", indices))),
    (2, st.tuples(turns)),
    (2, st.tuples(action("rest"))),
    (1, st.tuples(closes)),
    (1, st.tuples(action("aclose", indices))),
    (1, st.tuples(weighted((2, action("stop", keys)), (1, action("stop"))))),
    (1, st.tuples(action("hold", keys))),
    (1, st.tuples(action("release", keys))),
)
programs = st.builds(
    lambda first, others: [first, *chain.from_iterable(others)], enters, st.lists(scenes, min_size=20, max_size=60)
)


SUBSCRIBERS: list[Action] = [
    ("enter", 0, 0, 200),
    ("enter", 0, 0, 5),  # the id is taken
    ("enter", 1, 0, 5),
    ("source", 0, 3, "suspend", 2),
    ("rest",),
    ("receive", 0, "receive", 2, False),
    ("receive", 0, 7, 1000, False),
    ("receive", 0, "receive_nowait", 1, False),
    ("source", 0, 150),
    ("rest",),
    ("receive", 0, 100, 2, True),
    ("receive", 0, "__anext__", 1000, False),
    ("close", 0),
    ("close", 0),
    ("read", 1, "receive"),
    ("turns", 3),
    ("receive", 1, "receive", 1, False),  # somebody is receiving already
    ("cancel", 1),
    ("receive", 1, "receive", 1, False),
    ("turns", 3),
    ("cancel", 1),
    ("aclose", 1),
    ("aclose", 1),
    ("rest",),
]

ENDS: list[Action] = [
    ("enter", 0, 0, 5),
    ("enter", 0, 1, 5),
    ("enter", 1, 0, 5),
    ("hold", 1),
    ("read", 0, "__anext__"),
    ("read", 2, "receive"),
    ("source", 0, 2, "fail"),
    ("source", 1, 2, "return"),
    ("rest",),
    ("receive", 1, 7, 1000, False),
    ("stop", 1),
    ("turns", 3),
    ("release", 1),
    ("enter", 0, 0, 5),
    ("read", 3, "__anext__"),
    ("enter", 0, 1, 5),
    ("aclose", 4),  # not the last one
    ("hold", 0),
    ("rest",),
    ("stop", 0),
    ("turns", 3),
    ("enter", 0, 0, 5),  # has to wait
    ("rest",),
    ("close", 5),
    ("enter", 0, 0, 5),  # and so has this one
    ("turns", 4),
    ("stop",),
    ("rest",),
    ("enter", 0, 0, 5),
    ("release", 0),
    ("release", 0),
    ("rest",),
    ("source", 0, ("enter", 0, 3, 5)),  # too late, for the manager is being left by then
]

OVERFLOW: list[Action] = [
    ("enter", 0, 0, 1),
    ("enter", 0, 1, 70),
    ("enter", 0, 2, 5),
    ("read", 1, 7),
    ("source", 0, 3, "suspend", 2),  # too much for one, and just what the other may be behind
    ("rest",),
    ("enter", 0, 0, 1),
    ("close", 0),  # not who has that id now
    ("source", 0, 1),
    ("rest",),
    ("close", 1),
    ("source", 0, "suspend", 1, ("enter", 0, 0, 1), 1),  # who enters finds the last of the others gone
    ("rest",),
]

STOPPED_FROM_WITHIN: list[Action] = [
    ("enter", 0, 0, 5),
    ("source", 0, 2, ("stop_and_wait", 0)),
    ("rest",),
    ("receive", 0, "receive", 1000, False),
]

# A single event that lay ready at a moment when it could be seen, and was dropped: the peak must not go back.
DROPPED: list[Action] = [
    ("enter", 0, 0, 5),
    ("read", 0, "receive"),
    ("rest",),
    ("source", 0, 1, ("enter", 0, 1, 5), ("close", 0)),
    ("rest",),
]


def on_and_on(way: Way, *steps: Step) -> list[Action]:
    """A reader that takes everything as it comes; many times, for trio runs what is ready in any order."""
    return [("enter", 0, 0, 1), ("read", 0, way), ("rest",), *(8 * [("source", 0, *steps), ("rest",)])]


# Who enters splits a turn in two, though the id is taken. Neither half may cost somebody who has been keeping up.
SPLIT_TURN = on_and_on(7, 63, ("enter", 0, 0, 1), 2)
SPLIT_STEP = on_and_on("receive", 1, ("enter", 0, 0, 1), "suspend", 1)


@on_each(BACKENDS, max_examples=200)
@given(program=programs)
@example(program=SUBSCRIBERS)
@example(program=ENDS)
@example(program=OVERFLOW)
@example(program=STOPPED_FROM_WITHIN)
@example(program=DROPPED)
@example(program=SPLIT_TURN)
@example(program=SPLIT_STEP)
def test_a_program_sees_what_the_model_says(backend: tuple[str, dict[str, Any]], program: list[Action]) -> None:
    name, options = backend
    anyio.run(partial(play, program), backend=name, backend_options=options)
