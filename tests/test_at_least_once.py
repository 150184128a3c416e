"""At least once for real: a process that reads from a real server is killed again and again, and no message is lost."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from tests.at_least_once_worker import SUBSCRIBERS, live
from tests.redis_support import Broker, eventually, needs_server

pytestmark = needs_server

KILLS = 100
MESSAGES_PER_LIFE = 60
LONGEST_LIFE = 0.3  # seconds; some lives are too short to connect, and some long enough to handle everything
BACKENDS = ["asyncio", "trio"]
CONSUMERS = ["one", "one", "other"]  # so there is something to take up, and something to claim


def test_whoever_is_killed_no_subscriber_misses_a_message(
    broker: Broker,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    pytestconfig: pytest.Config,
    record_testsuite_property: Callable[[str, object], None],
) -> None:
    added: list[str] = []
    moments = Random(6)
    processes = multiprocessing.get_context("forkserver")  # whose children begin with everything imported
    processes.set_forkserver_preload(["tests.at_least_once_worker", "trio"])
    for number in range(KILLS):
        added += broker.add(*range(MESSAGES_PER_LIFE))
        backend, consumer = BACKENDS[number % len(BACKENDS)], CONSUMERS[number % len(CONSUMERS)]
        process = processes.Process(target=live, args=(backend, broker.url, broker.stream, consumer, tmp_path))
        process.start()
        time.sleep(moments.uniform(0, LONGEST_LIFE))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it has not ended by itself"
        process.close()
    left = broker.unfinished()
    assert left < len(added), "what was handled has been acknowledged"

    async def finished() -> None:
        await eventually(lambda: broker.unfinished() == 0)

    # In another thread, for on Python 3.11 coverage loses track of the frame that an event loop was run from.
    with ThreadPoolExecutor() as lives:
        for backend in BACKENDS:  # the second of them finds nothing to do
            lives.submit(live, backend, broker.url, broker.stream, "last", tmp_path, finished).result()
    assert broker.dead() == []
    for name in SUBSCRIBERS:
        handled = Counter((tmp_path / name).read_text().split())
        assert set(handled) == set(added)
        report = f"{handled.total() - len(added)} repetitions of {len(added)} messages; the last life began with {left}"
        record_testsuite_property(f"{name}, killed {KILLS} times", report)
        with capsys.disabled():
            pytestconfig.get_terminal_writer().line(f"\n{name}, killed {KILLS} times: {report}")
