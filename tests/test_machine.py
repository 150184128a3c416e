"""Whatever is done to the whole library at once, by whomever and whenever: it is what `tests.machine_world` says.

`try_programs` is for longer runs as well: it plays as many programs as it is told to, each from a number of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import anyio
import pytest

from anyio_sharedstream._buffer import Buffer
from tests import ack_model
from tests.ack_model import Wish
from tests.effort import PROGRAMS
from tests.machine_contract import Contract
from tests.machine_life import Terms
from tests.machine_play import play
from tests.machine_programs import Writer
from tests.machine_world import Action, AnyTerms, Scene
from tests.sweep import noted
from tests.virtual_time import run

#: uvloop has no virtual time, so there nothing is played that has to be waited for.
BACKENDS = ["asyncio", "uvloop", "trio"]

#: The fewest steps of a program of the suite.
STEPS = 40


async def attempt(terms: Sequence[AnyTerms], scenes: Sequence[Scene], *, timeless: bool) -> Exception | None:
    try:
        await play(terms, scenes, timeless=timeless)
    except Exception as exc:
        return exc
    return None


def failure(backend: str, terms: Sequence[AnyTerms], scenes: Sequence[Scene]) -> Exception | None:
    """Play a program; returns what it raises."""
    playing = partial(attempt, terms, scenes, timeless=backend == "uvloop")
    if backend == "uvloop":
        played = partial(anyio.run, playing, backend="asyncio", backend_options={"use_uvloop": True})
    else:
        played = partial(run, playing, backend=backend)
    # In a thread of its own. CPython 3.11 tells a tracer more often that a coroutine returns than that it is entered, if it is
    # thrown into; with the stack that coverage keeps for a thread, whoever plays on would look as if it were never run.
    with ThreadPoolExecutor(1) as thread:
        error: Exception | None = thread.submit(played).result()
    return error


def shorten(backend: str, terms: list[AnyTerms], scenes: list[Scene]) -> list[Scene]:
    """Leave out of a program that fails whatever it fails without; but not the first to come, of whom the others speak."""
    first, scenes = scenes[: len(terms)], scenes[len(terms) :]
    size = len(scenes)
    while size:
        place = 0
        while place < len(scenes):
            shorter = scenes[:place] + scenes[place + size :]
            if failure(backend, terms, first + shorter) is not None:
                scenes = shorter
            else:
                place += size
        size //= 2
    return first + scenes


def written(backend: str, number: int, *, steps: int = STEPS) -> tuple[list[AnyTerms], list[Scene]]:
    """The program of this number."""
    writer = Writer(number, steps=steps, timeless=backend == "uvloop")
    return writer.terms, writer.scenes


def try_programs(backend: str, numbers: Iterable[int], *, steps: int = STEPS) -> int:
    """Play programs of so many steps at least, each known by its number; returns how many steps that were.

    A note on what a program raises has its number, and as little of it as fails, too.
    """
    taken = 0
    for number in numbers:
        terms, scenes = written(backend, number, steps=steps)
        with noted(f"program {number} of {steps} steps on {backend}"):
            error = failure(backend, terms, scenes)
            if error is not None:
                error.add_note(f"in short: {terms}, {shorten(backend, terms, scenes)}")
                raise error
        taken += len(scenes)
    return taken


EXIT: Action = ("exit",)


def alone(terms: AnyTerms, *actions: Any) -> tuple[AnyTerms, list[Scene]]:
    """A program of single actions on one key, each behind its time; that the manager is left is nothing that is done to a key."""
    scenes: list[Scene] = []
    for time, action in zip(actions[::2], actions[1::2], strict=True):
        scenes.append((time, None if action == EXIT else 0, [action]))
    return terms, scenes


def wants(policy: str, bound: int = 2, **contract: Any) -> Action:
    return ("join", Contract(policy, bound, **contract))


TAKE: Action = ("take", 0, 1000, "receive_nowait")
RESTARTS = Terms(restart=True)
#: What hardly ever happens if all is left to chance, and programs that have found something.
RARE = {
    "nothing but an overflow after a restart": alone(RESTARTS, 1, wants("latest", gaps=True), 2, ("fail",), 5, ("emit", 3)),
    "a restart on both sides of the last event to be dropped": alone(
        RESTARTS, 1, wants("oldest", 1, gaps=True), 2, ("emit", 1), 3, ("fail",), 6, ("emit", 1), 7, ("fail",), 11, ("emit", 1)
    ),
    "a state is owed in the end": alone(
        Terms(restart=True, fold=True, apart=True),
        *(1, wants("oldest", gaps=True, snapshot=True), 2, ("emit", 3), 3, ("emit", 1)),
        *(4, ("hold",), 5, ("fail",), 6, TAKE, 7, ("stop",), 8, TAKE, 9, ("let_go",), 10, TAKE),
    ),
    "a restart while everything is lost": alone(
        Terms(restart=True, fold=True),
        *(1, wants("newest", gaps=True, snapshot=True), 2, ("emit", 3), 3, ("emit", 1), 4, ("fail",), 8, ("emit", 1), 9, TAKE),
    ),
    "somebody comes too late": alone(Terms(), 1, wants("fail"), 2, ("hold",), 3, EXIT, 4, wants("fail"), 5, ("let_go",)),
    "somebody comes too late to acknowledge": alone(ack_model.Terms(), 1, ("join", Wish()), 2, EXIT, 3, ("join", Wish())),
    "one of two that hold is patient": alone(Terms(), 1, wants("block", 1), 2, wants("patient", 1), 3, ("emit", 5), 20, TAKE),
}


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("name", RARE)
def test_what_is_rare_is_what_the_model_says(name: str, backend: str) -> None:
    terms, scenes = RARE[name]
    assert failure(backend, [terms], scenes) is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_whole_library_is_what_the_model_says(backend: str) -> None:
    assert try_programs(backend, range(PROGRAMS)) > PROGRAMS * STEPS


def test_what_is_planted_is_found_and_the_program_that_finds_it_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Buffer, "_replay_left", lambda buffer: 0)
    with pytest.raises(ExceptionGroup, match="unhandled errors") as caught:
        try_programs("asyncio", range(200))
    note = str(caught.value.__notes__)
    assert "in short:" in note
    assert len(re.findall(r"\(\d+\.\d+, \d, \[", note)) < 12  # scenes, of more than forty
