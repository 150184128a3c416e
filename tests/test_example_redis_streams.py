"""`examples/redis_streams.py`, run as its user runs it: as a program, on both backends."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.redis_support import PATIENCE, Broker, needs_server

PROGRAM = Path(__file__).parent.parent / "examples" / "redis_streams.py"
ORDERS = [str(number) for number in range(1, 9)]

pytestmark = [needs_server, pytest.mark.parametrize("backend", ["asyncio", "trio"])]


def run(*arguments: str) -> str:
    """Run it to its end, and return what it prints."""
    command = [sys.executable, "-W", "error", str(PROGRAM), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def check(output: str) -> None:
    """Check that one has died, and that the other has done all that was left."""
    ((victim, order),) = re.findall(r"^(\w+): dies in the middle of order (\d)$", output, re.MULTILINE)
    begun = re.findall(r"^(\w+): begins order (\d)(.*)$", output, re.MULTILINE)
    (survivor,) = {name for name, _, _ in begun} - {victim}
    assert (victim, order, "") in begun
    assert (survivor, order, ", which somebody has begun before") in begun
    packed = re.findall(r"^(\w+): has packed order (\d)$", output, re.MULTILINE)
    assert sorted(number for _, number in packed) == ORDERS
    assert (survivor, order) in packed
    assert output.endswith("packed: [1, 2, 3, 4, 5, 6, 7, 8]\nunfinished: 0\n")


def test_one_dies_in_the_middle_of_an_order_and_nothing_is_lost(backend: str) -> None:
    check(run("--backend", backend))


def test_another_server_is_left_as_it_was(backend: str, broker: Broker) -> None:
    before = broker.client.keys()
    check(run("--backend", backend, "--url", broker.url))
    assert broker.client.keys() == before
