"""How properties are tried: the same programs in every run, however slow the machine, and nothing remembered between runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

# hypothesis asks the garbage collector who refers to its random generator. Older versions do so only within a test, when
# `conftest` has taken what would be found out of the collector's sight. Nothing is wrong.
_MARK = pytest.mark.filterwarnings("ignore:It looks like `register_random`:hypothesis.errors.HypothesisWarning")


def on_each(backends: Sequence[Any], *, max_examples: int) -> Callable[[Any], Any]:
    """Try a property, which takes its ``backend``, so many times on each."""

    def decorate(test: Any) -> Any:
        tried = settings(
            derandomize=True,
            database=None,
            deadline=None,
            max_examples=max_examples,
            phases=[Phase.explicit, Phase.generate, Phase.shrink],
            suppress_health_check=[HealthCheck.too_slow],
        )(test)
        return _MARK(pytest.mark.parametrize("backend", backends)(tried))

    return decorate
