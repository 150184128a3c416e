"""Run a test in virtual time, on both backends, with `anyio_sharedstream.testing.run`: for what must be exact to the second."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from functools import partial, wraps
from typing import Any

import pytest

from anyio_sharedstream.testing import run

__all__ = ["in_virtual_time", "run"]


def in_virtual_time(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Make of an async test one that runs in virtual time, once on each backend."""

    @wraps(test)
    def virtual(backend: str, **arguments: Any) -> None:
        run(partial(test, **arguments), backend=backend)

    # pytest looks here for what to pass, and `wraps` has told it of the arguments of the test alone.
    parameters = [*inspect.signature(test).parameters.values(), inspect.Parameter("backend", inspect.Parameter.KEYWORD_ONLY)]
    vars(virtual)["__signature__"] = inspect.Signature(parameters)
    on_both: Callable[[Callable[..., None]], Callable[..., None]] = pytest.mark.parametrize("backend", ["asyncio", "trio"])
    return on_both(virtual)
