"""The examples as a user runs them: programs of their own, on either backend, and they write nothing but what they say."""

from __future__ import annotations

import ast
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
#: Far more than any of them takes: it ends a test that hangs, and measures nothing.
PATIENCE = 60

pytestmark = pytest.mark.parametrize("backend", ["asyncio", "trio"])


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments]


def run(name: str, backend: str) -> tuple[list[str], str]:
    """Run an example to its end, and return its lines and what it wrote to standard error."""
    done = subprocess.run(
        command(name, "--backend", backend), capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def test_quickstart_opens_one_source_for_three(backend: str) -> None:
    lines, errors = run("quickstart.py", backend)
    assert errors == ""
    assert lines[0] == "source: opened"
    assert lines[-2:] == ["source: closed", "Cleo: has left"]
    for name, how_many in ("Ada", 2), ("Bob", 3), ("Cleo", 4):
        assert [line for line in lines if line.startswith(name)] == [
            *(f"{name}: tick {number}" for number in range(1, how_many + 1)),
            f"{name}: has left",
        ]
    assert len(lines) == 14


def test_slow_consumer_fails_alone_and_is_told(backend: str) -> None:
    lines, errors = run("slow_consumer.py", backend)
    (slow,) = [line for line in lines if line.startswith("slow: ")]
    (fast,) = [line for line in lines if line.startswith("fast: ")]
    assert len(lines) == 2
    assert fast == "fast: received 50 readings, 0 missing"
    assert "subscriber 'slow' of readings() fell more than 8 events behind" in slow
    # Nobody has configured logging, so Python writes warnings to standard error, and standard output is the program's own.
    assert errors == "subscriber overflowed key=readings() subscriber='slow' bound=8\n"


def test_mixed_consumers_each_get_what_they_asked_for(backend: str) -> None:
    lines, errors = run("mixed_consumers.py", backend)
    assert errors == ""
    told = {line.split()[0]: line for line in lines}
    assert len(lines) == len(told) == 5
    assert "received 100, missed   0, refused 200,  0 gaps, held the feed never" in told["alarm"]
    assert "received 300, missed   0, refused   0,  0 gaps, held the feed often" in told["ledger"]
    received = {name: int(line.split("received")[1].split(",")[0]) for name, line in told.items()}
    missed = {name: int(line.split("missed")[1].split(",")[0]) for name, line in told.items()}
    assert received["dashboard"] + missed["dashboard"] == received["logger"] + missed["logger"] == 300
    assert received["euro"] + missed["euro"] == 100
    assert " 0 gaps" not in told["logger"]


@cache
def reconnecting_feed(backend: str) -> list[str]:
    """What it prints, for the tests that look at it: it takes its time."""
    lines, errors = run("reconnecting_feed.py", backend)
    assert errors == ""
    return lines


def prices_of(lines: list[str], who: str) -> list[list[int]]:
    """The prices in each line of a consumer's that lists some."""
    return [[int(price) for price in re.findall(r"\d+", line)] for line in lines if line.startswith(f"{who}: [")]


def test_reconnecting_feed_survives_what_its_server_does(backend: str) -> None:
    lines = reconnecting_feed(backend)
    states = [line.removeprefix("feed: ") for line in lines if line.startswith("feed: ")]
    failures = [state.split("(")[0] for state in states if "poll failed" in state]
    # One connection for all of them, whatever became of the one before; on a machine that sleeps, more may fall silent.
    restarts = states.count("restarting")
    assert failures[:3] == ["poll failed: IncompleteRead", "poll failed: IncompleteRead", "poll failed: UpstreamSilent"]
    assert restarts == len(failures) >= 3
    assert [line for line in lines if "server" in line] == [
        *(f"server: connection {number}" for number in range(1, restarts + 2)),
        f"the server saw {restarts + 1} connections",
    ]
    assert states[:4] == ["started", "opening", "live", "restarting"]
    assert states[-6:] == ["live", "lingering", "live", "lingering", "closing", "stopped"]
    assert states.count("lingering") == 2
    gaps = [line for line in lines if "a gap after" in line]
    assert gaps[:2] == [f"follower: a gap after {prices} prices, because of a restart" for prices in (4, 8)]
    assert len(gaps) == restarts


def test_reconnecting_feed_gives_each_subscriber_what_it_asked_for(backend: str) -> None:
    lines = reconnecting_feed(backend)
    left, back = lines.index("everybody has left"), lines.index("everybody comes back")
    assert lines[left + 1 : back] == []
    first, second = prices_of(lines, "follower")
    assert first[:8] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert second == list(range(second[0], second[-1] + 1))
    for replayed, (*_, newest) in zip(prices_of(lines, "latecomer"), [first, second], strict=True):
        assert len(replayed) == 6
        assert replayed == list(range(replayed[0], replayed[0] + 6))
        assert replayed[0] <= newest <= replayed[4]
    begins = [ast.literal_eval(line.split("with ")[1]) for line in lines if line.startswith("dashboard: begins")]
    assert begins[:-1] == [{}] * lines.count("feed: opening")
    assert sorted(begins[-1]) == ["EUR", "JPY", "USD"]
    # It knows what the follower has received of each symbol.
    ends = [ast.literal_eval(line.split("with ")[1]) for line in lines if line.startswith("dashboard: ends")]
    assert [sorted(known.values()) for known in ends] == [first[-3:], second[-3:]]


def test_http_poll_makes_the_same_requests_for_any_number_of_consumers(backend: str) -> None:
    lines, errors = run("http_poll.py", backend)
    assert errors == ""
    assert lines == [
        line
        for consumers in (1, 10, 100)
        for line in (
            *(f"consumer 1 of {consumers}: {number}" for number in range(3)),
            "the server counted 5 requests, 2 answered 304 Not Modified",
        )
    ]


class Unchanging(BaseHTTPRequestHandler):
    """A JSON endpoint that knows no ETag."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"answer": 42}')

    def log_message(self, *_: object) -> None:
        """Write no line per request."""


@pytest.fixture
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Unchanging) as server:
        thread = Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A program started by one that ignores SIGINT, as a shell's background jobs do, would ignore it too."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.skipif(sys.platform == "win32", reason="a signal cannot be sent to one process there")
def test_http_poll_of_another_url_runs_until_it_is_interrupted(backend: str, address: str) -> None:
    arguments = command("http_poll.py", "--backend", backend, "--url", address, "--interval", "0.01")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["consumer 1 of 3: {'answer': 42}\n"] * 2
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (0, "")
    assert output.endswith("interrupted\n")
