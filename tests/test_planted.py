"""The proof finds bugs: each of those that would be easiest to make makes the state machine fail, on every backend.

Others, one for each lesson, are planted for exploration in `test_explore_planted`, and some for the soak in `test_soak`.
"""

from __future__ import annotations

from itertools import chain, repeat

import pytest

from tests import plants
from tests.effort import PROGRAMS
from tests.plants import Plant
from tests.test_machine import BACKENDS, failure, written

PLANTED: list[Plant] = [
    plants.evict_after_an_await,
    plants.hand_events_over_as_the_value_of_the_wake_up,
    plants.forget_the_wake_up_on_overflow,
    plants.raise_one_shared_exception_object,
    plants.open_before_the_old_one_has_closed,
    plants.count_a_crash_as_an_acknowledgement,
    plants.drop_the_flush_before_a_suspension,
    plants.leave_a_route_in_the_index,
]

#: How often the programs are played, until one fails. trio draws lots for the order of what is ready together, and some bugs show
#: in a few programs only, and in each of these every other time: once in a while all of them miss it.
ROUNDS = 20


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_makes_the_state_machine_fail(plant: Plant, backend: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        numbers = chain.from_iterable(repeat(range(PROGRAMS), ROUNDS))
        found = next((number for number in numbers if failure(backend, *written(backend, number)) is not None), None)
    assert found is not None
    assert failure(backend, *written(backend, found)) is None  # which the library stands
