"""`examples/flag_directory.py`, run as its user runs it: as a program, on both backends."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent.parent / "examples" / "flag_directory.py"
TIMEOUT = 60  # seconds; far more than it takes, for it must not fail on a busy machine

backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@contextmanager
def program(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-W", "error", str(PROGRAM), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        limit = threading.Timer(TIMEOUT, process.kill)
        limit.start()
        try:
            yield process
        finally:
            limit.cancel()
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def rest(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What else it prints until it ends. Not `communicate`, which does not see what `readline` has read ahead."""
    assert process.stdout is not None
    assert process.stderr is not None
    output, errors = process.stdout.read(), process.stderr.read()
    process.wait()
    return output, errors


def scans(output: str) -> tuple[int, int]:
    counted = re.search(r"^(\d+) scans were made; separate loops would have made (\d+)$", output, re.MULTILINE)
    assert counted is not None
    return int(counted[1]), int(counted[2])


@backends
def test_demonstration(backend: str) -> None:
    with program("--backend", backend) as process:
        output, errors = rest(process)
    assert errors == ""
    assert process.returncode == 0
    first, *fired, last = output.splitlines()
    assert first.startswith("20 triggers watch ")
    assert sorted(fired) == [f"flag-{number:02} fired" for number in range(1, 21)]
    made, separately = scans(last)
    # The last scan may end the program before every trigger has looked at it.
    assert made > 1
    assert 20 * (made - 1) <= separately <= 20 * made
    assert not Path(first.removeprefix("20 triggers watch ")).exists()


@backends
def test_a_directory_of_ones_own_until_interrupted(backend: str, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    with program("--backend", backend, "--directory", tmp_path, "--flag", "go", "stop", "--interval", 0.01) as process:
        assert line(process) == f"2 triggers watch {tmp_path.resolve()}"
        for name in ("go", "stop", "go"):
            (tmp_path / name).touch()
            assert line(process) == f"{name} fired"
            assert not (tmp_path / name).exists()
        process.send_signal(signal.SIGINT)
        output, errors = rest(process)
    assert errors == ""
    assert process.returncode == 0
    assert output.startswith("interrupted\n")
    made, separately = scans(output)
    assert made < separately <= 2 * made
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@backends
def test_a_failing_trigger_and_a_failing_scan(backend: str, tmp_path: Path) -> None:
    directory = tmp_path / "watched"
    directory.mkdir()
    with program("--backend", backend, "--directory", directory, "--flag", "folder", "other", "--interval", 0.01) as process:
        assert line(process) == f"2 triggers watch {directory.resolve()}"
        # It cannot be removed as a file, which is the problem of the trigger that tries.
        (directory / "folder").mkdir()
        assert re.fullmatch(r"folder failed: \w*Error\(.*\)", line(process))
        (directory / "other").touch()
        assert line(process) == "other fired"
        (directory / "folder").rmdir()
        directory.rmdir()
        assert re.fullmatch(r"other failed: FileNotFoundError\(.*\)", line(process))
        output, errors = rest(process)
    assert "poll failed" in errors
    assert process.returncode == 1
    assert output.startswith(f"{scans(output)[0]} scans")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--flag", "go"], "need each other"),
        (["--directory", "."], "need each other"),
        (["--directory", "no such directory", "--flag", "go"], "no such directory"),
    ],
)
def test_arguments_that_make_no_sense(arguments: list[str], complaint: str) -> None:
    with program(*arguments) as process:
        output, errors = rest(process)
    assert process.returncode == 2
    assert complaint in errors
    assert output == ""
