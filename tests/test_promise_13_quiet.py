"""Promise 13: logs go through structlog, with key and subscriber bound; an unconfigured program prints nothing."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import anyio
import pytest
import structlog
from structlog.testing import LogCapture

from anyio_sharedstream import SharedSource, SharedStreamManager, SubscriberOverflow
from tests.support import Feed, settle, until


async def fail_to_clean_up() -> AsyncGenerator[int, None]:
    try:
        yield 1
        await anyio.sleep_forever()
    finally:
        raise ZeroDivisionError


async def live_and_die(logger: Any = None) -> None:
    """Let everything happen that is logged."""
    feed = Feed("prices")
    async with SharedStreamManager(logger=logger) as manager:
        slow = await manager.subscribe(feed.source, subscriber_id="slow", max_buffer_size=1).__aenter__()
        async with manager.subscribe(feed.source, subscriber_id="fast") as fast:
            for n in range(2):
                feed.emit(n)
                assert await fast.receive() == n
            with pytest.raises(SubscriberOverflow):
                await slow.receive()
            feed.fail(ValueError("poll"))
            with pytest.raises(ValueError, match="poll"):
                await fast.receive()
        await settle()
        async with manager.subscribe(SharedSource(key="fragile", open=fail_to_clean_up)) as stream:
            await stream.receive()


EXPECTED: list[dict[str, Any]] = [
    {"log_level": "info", "event": "group started", "key": "prices"},
    {"log_level": "warning", "event": "subscriber overflowed", "key": "prices", "subscriber": "slow", "bound": 1},
    {"log_level": "error", "event": "poll failed", "key": "prices", "exc_info": "ValueError('poll')"},
    {"log_level": "info", "event": "group stopped", "key": "prices"},
    {"log_level": "info", "event": "group started", "key": "fragile"},
    {"log_level": "error", "event": "clean-up failed", "key": "fragile", "exc_info": "ZeroDivisionError()"},
    {"log_level": "info", "event": "group stopped", "key": "fragile"},
]


def comparable(entries: list[Any]) -> list[dict[str, Any]]:
    """What is said apart from the changes of state that every group goes through."""
    told = [entry for entry in entries if entry["log_level"] != "debug"]
    return [{name: repr(value) if name == "exc_info" else value for name, value in entry.items()} for entry in told]


@pytest.fixture
def configured() -> Iterator[LogCapture]:
    """Configure structlog as an application would, for one test."""
    capture = LogCapture()
    structlog.configure(processors=[capture])
    yield capture
    structlog.reset_defaults()


async def test_a_given_logger_gets_everything_with_its_values_bound(capsys: pytest.CaptureFixture[str]) -> None:
    capture = LogCapture()
    await live_and_die(structlog.wrap_logger(None, processors=[capture], application="mine"))
    assert comparable(capture.entries) == [{**entry, "application": "mine"} for entry in EXPECTED]
    assert capsys.readouterr() == ("", "")


async def test_structlog_is_used_if_the_application_has_configured_it(
    configured: LogCapture, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "anyio_sharedstream")
    await live_and_die()
    assert comparable(configured.entries) == EXPECTED
    assert not caplog.records


async def test_a_given_logger_comes_before_a_configured_structlog(configured: LogCapture) -> None:
    capture = LogCapture()
    await live_and_die(structlog.wrap_logger(None, processors=[capture]))
    assert comparable(capture.entries) == EXPECTED
    assert not configured.entries


async def test_else_the_standard_librarys_logger_gets_everything(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "anyio_sharedstream")
    await live_and_die()
    assert {record.name for record in caplog.records} == {"anyio_sharedstream"}
    assert [record.message for record in caplog.records] == [
        "group started key='prices'",
        "subscriber overflowed key='prices' subscriber='slow' bound=1",
        "poll failed key='prices'",
        "group stopped key='prices'",
        "group started key='fragile'",
        "clean-up failed key='fragile'",
        "group stopped key='fragile'",
    ]
    assert [getattr(record, "subscriber", None) for record in caplog.records][:3] == [None, "slow", None]
    assert {getattr(record, "key", None) for record in caplog.records} == {"prices", "fragile"}
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ValueError, ZeroDivisionError]
    assert capsys.readouterr().out == ""


async def test_nothing_below_a_warning_unless_the_application_asks(caplog: pytest.LogCaptureFixture) -> None:
    await live_and_die()
    assert {record.levelname for record in caplog.records} == {"WARNING", "ERROR"}


PROGRAM = """
import sys
import anyio
from tests.test_promise_13_quiet import live_and_die

anyio.run(live_and_die, backend=sys.argv[1])
"""


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_program_that_configures_nothing_sees_nothing_on_standard_output(backend: str, pytestconfig: pytest.Config) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, backend], cwd=pytestconfig.rootpath, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "")
    assert "poll failed key='prices'" in ended.stderr  # the standard library's last resort


class Broken:
    """A logger that fails at every call."""

    def __getattr__(self, level: str) -> Any:
        raise ZeroDivisionError(level)


async def test_a_logger_that_fails_harms_nothing_and_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    await live_and_die(Broken())
    assert len(caplog.records) == len(EXPECTED) + 2 * len(["opening", "live", "closing"])
    assert caplog.records[0].message == "the application's logger failed on 'group started'"
    assert {record.exc_info[0] for record in caplog.records if record.exc_info} == {ZeroDivisionError}


async def test_an_ordinary_life_logs_no_error(caplog: pytest.LogCaptureFixture) -> None:
    feed = Feed()
    async with SharedStreamManager() as manager:
        for _ in range(2):
            async with manager.subscribe(feed.source) as stream:
                feed.emit(1)
                assert await stream.receive() == 1
        async with manager.subscribe(feed.source):
            await until(lambda: feed.opened == 3)
            await manager.stop_all()
    assert not caplog.records
