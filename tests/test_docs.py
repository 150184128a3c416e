"""What the pages in ``docs/`` say is so."""

from __future__ import annotations

import re
from pathlib import Path

from anyio_sharedstream._states import TRANSITIONS, State

LIFECYCLE = (Path(__file__).parent.parent / "docs" / "lifecycle.md").read_text(encoding="utf-8")


def test_the_picture_of_the_states_shows_exactly_the_table() -> None:
    drawn = re.findall(r"^    (\w+) --> (\w+) : (\w+)$", LIFECYCLE, re.MULTILINE)
    assert sorted(drawn) == sorted((before.name, after.name, move.name) for (before, move), after in TRANSITIONS.items())


def test_every_state_is_described_with_its_public_name() -> None:
    rows = re.findall(r"^\| ((?:`[A-Z_]+`(?:, )?)+) \| \"(\w+)\" \|", LIFECYCLE, re.MULTILINE)
    described = {name: public for names, public in rows for name in re.findall(r"[A-Z_]+", names)}
    assert described == {state.name: state.public for state in State}
