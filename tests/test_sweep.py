"""The sweep itself: one that swept nothing would let everything pass."""

from __future__ import annotations

import pytest
from anyio.lowlevel import checkpoint

from tests.sweep import SCOPE, Cut, sweep


async def test_a_scenario_is_cancelled_before_each_of_its_steps_and_then_completes() -> None:
    cuts: dict[str, list[tuple[int, bool]]] = {}

    async def scenario(steps: list[int]) -> None:
        for step in (2, 3, 4):
            await checkpoint()
            steps.append(step)

    async def trial(cut: Cut) -> None:
        steps = [1]
        await cut.run(scenario(steps))
        assert cut.completed == (steps == [1, 2, 3, 4])
        cuts.setdefault(cut.way, []).append((steps[-1], cut.completed))

    assert await sweep(trial) == 4
    # Cancelled before its first step, a scenario still runs up to its first suspension, if it runs at all.
    assert cuts[SCOPE] == [(1, False), (1, False), (2, False), (3, False), (4, True)]
    assert all(len(trials) > 4 and trials[0] == (1, False) and trials[-1] == (4, True) for trials in cuts.values())


async def test_a_failing_trial_says_which_of_many_it_was() -> None:
    async def trial(cut: Cut) -> None:
        await cut.run(checkpoint())
        assert cut.step == 1

    with pytest.raises(AssertionError) as caught:
        await sweep(trial)
    assert caught.value.__notes__ == [f"cancelled before step 2: {SCOPE}"]
