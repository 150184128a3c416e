"""What the pages in ``docs/`` say is so."""

from __future__ import annotations

import re
from pathlib import Path

from anyio_sharedstream._states import TRANSITIONS, State
from tests.explore_support import Scenario
from tests.test_explore_acknowledgement import SCENARIOS as ACKNOWLEDGEMENT
from tests.test_explore_lessons import ON_ASYNCIO, ON_BOTH
from tests.test_explore_planted import PLANTED as PLANTED_FOR_ANY
from tests.test_explore_planted import PLANTED_ON_ASYNCIO
from tests.test_explore_subscribers import SCENARIOS as SUBSCRIBERS
from tests.test_planted import PLANTED

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"
LIFECYCLE = (DOCS / "lifecycle.md").read_text(encoding="utf-8")
PROOF = (DOCS / "proof.md").read_text(encoding="utf-8")


def test_the_picture_of_the_states_shows_exactly_the_table() -> None:
    drawn = re.findall(r"^    (\w+) --> (\w+) : (\w+)$", LIFECYCLE, re.MULTILINE)
    assert sorted(drawn) == sorted((before.name, after.name, move.name) for (before, move), after in TRANSITIONS.items())


def test_every_state_is_described_with_its_public_name() -> None:
    rows = re.findall(r"^\| ((?:`[A-Z_]+`(?:, )?)+) \| \"(\w+)\" \|", LIFECYCLE, re.MULTILINE)
    described = {name: public for names, public in rows for name in re.findall(r"[A-Z_]+", names)}
    assert described == {state.name: state.public for state in State}


FOUND = [*PLANTED_FOR_ANY, *PLANTED_ON_ASYNCIO]


def lesson_of(scenario: Scenario) -> int:
    return int(scenario.__name__.split("_")[1])


def test_whatever_is_said_to_prove_something_is_there() -> None:
    named = re.findall(r"`(test_\w+)`", PROOF)
    assert len(named) >= 15
    assert [name for name in named if not (TESTS / f"{name}.py").exists()] == []
    assert {lesson_of(scenario) for scenario in [*ON_BOTH, *ON_ASYNCIO, *SUBSCRIBERS, *ACKNOWLEDGEMENT]} == set(range(1, 32))


def test_what_is_planted_is_what_the_page_says() -> None:
    section = PROOF[PROOF.index("## What is planted") : PROOF.index("Exploration finds")]
    assert len(re.findall(r"^- ", section, re.MULTILINE)) == len(PLANTED)
    plants, lessons = re.findall(r"Exploration finds (\d+), .* scenarios\s+of (\d+) lessons", PROOF, re.DOTALL)[0]
    assert len({plant for plant, _ in FOUND}) == int(plants)
    assert len({lesson_of(scenario) for _, scenario in FOUND}) == int(lessons)
    by_hand = len(ON_ASYNCIO) + 2 * len(ON_BOTH + SUBSCRIBERS + ACKNOWLEDGEMENT)
    assert f"{by_hand},000 schedules" in PROOF
