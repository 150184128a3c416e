"""The event loops that every test runs on, and what no test may leave behind."""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from structlog.testing import LogCapture

from anyio_sharedstream import SharedStreamManager
from tests.redis_support import broker as broker
from tests.redis_support import server_port as server_port

# A shell without job control has its background jobs ignore SIGINT, which they hand on to their own; here, some send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

BACKENDS = [
    pytest.param(("asyncio", {"debug": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    pytest.param(("trio", {"restrict_keyboard_interrupt_to_checkpoints": True}), id="trio"),
]


#: For what trio does not have: the cancellation of a single task.
on_asyncio = pytest.mark.parametrize("anyio_backend", BACKENDS[:2])


@pytest.fixture(params=BACKENDS)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def backend_name(anyio_backend: tuple[str, dict[str, Any]]) -> str:
    return anyio_backend[0]


@pytest.fixture
def unlogged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the library log nothing. For explorations: pytest would keep every exception of every schedule, and that is slow."""
    monkeypatch.setattr(logging.getLogger("anyio_sharedstream"), "disabled", True)


@pytest.fixture
def lines() -> LogCapture:
    """What the fixture ``manager`` logs."""
    return LogCapture()


@pytest.fixture
def manager(lines: LogCapture) -> SharedStreamManager:
    """One that is still to be entered, and whose log lines are kept."""
    return SharedStreamManager(logger=structlog.wrap_logger(None, processors=[lines]))


@pytest.fixture(scope="session", autouse=True)
def thaw_in_the_end() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_garbage() -> Iterator[None]:
    """Collect after each test, so that an unclosed resource fails the test that left it and not a later one."""
    yield
    gc.collect()
    # What is alive now stays: modules, and pytest's reports. Looking through them after every test would take most of the time.
    gc.freeze()
