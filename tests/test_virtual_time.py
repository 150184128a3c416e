"""Tests that run in virtual time: once on each backend, with their own arguments, and not beyond a deadlock."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from anyio_sharedstream.testing import Deadlock
from tests.virtual_time import in_virtual_time


@in_virtual_time
@pytest.mark.parametrize("days", [1, 100])
async def test_days_pass_at_once_in_a_test_that_takes_arguments(days: int, tmp_path: Path) -> None:
    assert tmp_path.is_absolute()
    await anyio.sleep(days * 86_400)
    assert anyio.current_time() == days * 86_400


def test_a_test_is_run_on_both_backends() -> None:
    (mark,) = vars(in_virtual_time(anyio.sleep_forever))["pytestmark"]
    assert mark.args == ("backend", ["asyncio", "trio"])


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_test_that_hangs_fails(backend: str) -> None:
    with pytest.raises(Deadlock, match="sleep_forever"):
        in_virtual_time(anyio.sleep_forever)(backend=backend)
