"""Where the log lines go, what they say, and that a logger harms nobody."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, cast

import anyio
import pytest
import structlog
from structlog.testing import LogCapture

from anyio_sharedstream import (
    DropNewest,
    DropOldest,
    Fold,
    Latest,
    Restart,
    SharedSource,
    SharedStreamManager,
    SubscriberOverflow,
)
from tests.policies_support import publish
from tests.support import Feed, failing_to_close, idle, settle, until
from tests.virtual_time import in_virtual_time


@pytest.fixture
def lines() -> LogCapture:
    return LogCapture()


@pytest.fixture
def logger(lines: LogCapture) -> Any:
    return structlog.wrap_logger(None, processors=[lines])


@pytest.fixture
def configured(lines: LogCapture) -> Iterator[LogCapture]:
    """An application that has configured structlog."""
    structlog.configure(processors=[lines])
    yield lines
    structlog.reset_defaults()


async def come_and_go(manager: SharedStreamManager, key: Any = "feed") -> None:
    feed = Feed(key)
    async with manager.subscribe(feed.source):
        await until(lambda: feed.opened)


async def fail(manager: SharedStreamManager, error: Exception, key: Any = "feed") -> None:
    feed = Feed(key)
    feed.fail(error)
    async with manager.subscribe(feed.source) as stream:
        with pytest.raises(type(error)):
            await stream.receive()
        await until(lambda: idle(manager))


async def overflow(manager: SharedStreamManager) -> None:
    feed = Feed()
    async with (
        manager.subscribe(feed.source) as healthy,
        manager.subscribe(feed.source, subscriber_id="slow", max_buffer_size=1) as slow,
    ):
        await until(lambda: feed.opened)
        for event in range(3):
            feed.emit(event)
            assert await healthy.receive() == event
        with pytest.raises(SubscriberOverflow):
            await slow.receive()


async def fail_to_clean_up(manager: SharedStreamManager, error: BaseException) -> None:
    async with manager.subscribe(failing_to_close(error)) as stream:
        assert await stream.receive() == "event"


def told(lines: LogCapture) -> list[Any]:
    """What is said apart from the changes of state that every group goes through."""
    return [line for line in lines.entries if line["log_level"] != "debug"]


def events(lines: LogCapture) -> list[str]:
    return [line["event"] for line in told(lines)]


# What is said.


async def test_a_group_is_started_and_stopped(lines: LogCapture, logger: Any) -> None:
    async with SharedStreamManager(logger=logger) as manager:
        await come_and_go(manager, ("prices", "BTC"))
    assert told(lines) == [
        {"event": "group started", "key": ("prices", "BTC"), "log_level": "info"},
        {"event": "group stopped", "key": ("prices", "BTC"), "log_level": "info"},
    ]


async def test_a_stopped_group_is_no_failure(lines: LogCapture, logger: Any) -> None:
    feed = Feed()
    async with SharedStreamManager(logger=logger) as manager, manager.subscribe(feed.source):
        await until(lambda: feed.opened)
        await manager.stop("feed")
    assert events(lines) == ["group started", "group stopped"]


@in_virtual_time
async def test_that_an_upstream_lingers_or_is_opened_again_is_told_and_its_other_states_are_for_debugging(
    lines: LogCapture, logger: Any
) -> None:
    feed, error = Feed(), ValueError("broken")
    async with SharedStreamManager(logger=logger) as manager:
        async with manager.subscribe(feed.asking_for(linger=5, restart=Restart(initial_delay=1, jitter=0))) as stream:
            await until(lambda: feed.opened)
            feed.fail(error)
            await anyio.sleep(2)
            feed.emit("event")
            assert await stream.receive() == "event"
        await anyio.sleep(6)
    failed = {"event": "poll failed", "key": "feed", "exc_info": error, "restart_in": 1, "log_level": "warning"}
    assert [line for line in lines.entries if line["event"] == "poll failed"] == [failed]
    states = [(line["log_level"], line["event"]) for line in lines.entries if line["event"] != "poll failed"]
    assert states == [
        ("info", "group started"),
        ("debug", "group opening"),
        ("debug", "group live"),
        ("info", "group restarting"),
        ("debug", "group opening"),
        ("debug", "group live"),
        ("info", "group lingering"),
        ("debug", "group closing"),
        ("info", "group stopped"),
    ]


async def test_a_failed_poll_is_told_with_its_exception(lines: LogCapture, logger: Any) -> None:
    error = ValueError("broken")
    async with SharedStreamManager(logger=logger) as manager:
        await fail(manager, error)
    assert events(lines) == ["group started", "poll failed", "group stopped"]
    assert told(lines)[1] == {"event": "poll failed", "key": "feed", "exc_info": error, "log_level": "error"}
    assert told(lines)[1]["exc_info"] is error


async def test_a_subscriber_that_overflowed_is_named(lines: LogCapture, logger: Any) -> None:
    async with SharedStreamManager(logger=logger) as manager:
        await overflow(manager)
    assert events(lines) == ["group started", "subscriber overflowed", "group stopped"]
    assert told(lines)[1] == {
        "event": "subscriber overflowed",
        "key": "feed",
        "subscriber": "slow",
        "bound": 1,
        "log_level": "warning",
    }


@pytest.mark.parametrize(
    ("policy", "gaps", "lines_logged"),
    [(DropOldest(), False, 2), (DropNewest(), False, 2), (DropOldest(), True, 0), (Latest(), False, 0)],
)
async def test_that_a_subscriber_begins_to_miss_events_is_told_once_until_it_has_caught_up(
    lines: LogCapture, logger: Any, policy: Any, gaps: Any, lines_logged: int
) -> None:
    feed = Feed()
    async with (
        SharedStreamManager(logger=logger) as manager,
        manager.subscribe(feed.source, subscriber_id="me", max_buffer_size=1, overflow=policy, gaps=gaps) as stream,
    ):
        for _ in range(2):
            for number in range(4):
                feed.emit(number)
                await settle()
            while stream.statistics().current_buffer_used:
                await stream.receive()
    told = [line for line in lines.entries if line["event"] == "subscriber misses events"]
    assert [(line["key"], line["subscriber"], line["log_level"]) for line in told] == [(feed.key, "me", "warning")] * lines_logged


async def test_that_events_are_missed_is_not_told_again_by_those_for_which_there_is_room(lines: LogCapture, logger: Any) -> None:
    feed = Feed()
    async with (
        SharedStreamManager(logger=logger) as manager,
        manager.subscribe(feed.source, max_buffer_size=2, overflow=DropOldest()) as stream,
    ):
        for number in range(3):
            feed.emit(number)
            await settle()
        assert await stream.receive() == 1
        feed.emit(3)
        await settle()
        assert stream.statistics().events_missed == 1
    assert [line["missed"] for line in lines.entries if line["event"] == "subscriber misses events"] == [1]


@pytest.mark.parametrize(
    ("policy", "gaps", "lines_logged"),
    [(DropOldest(), False, [("me", 2)]), (DropOldest(), True, []), (Latest(), False, []), (Latest(), True, [])],
)
async def test_that_events_are_missed_behind_a_replay_is_told_where_nothing_else_tells(
    lines: LogCapture, logger: Any, policy: Any, gaps: Any, lines_logged: list[tuple[str, int]]
) -> None:
    feed = Feed()
    source = feed.asking_for(replay=1)
    asked: Any = {"subscriber_id": "me", "max_buffer_size": 1, "overflow": policy, "gaps": gaps}
    async with SharedStreamManager(logger=logger) as manager, manager.subscribe(source):
        await publish(feed, 0)
        async with manager.subscribe(source, **asked):
            await publish(feed, 1, 2, 3)
    told = [line for line in lines.entries if line["event"] == "subscriber misses events"]
    assert [(line["subscriber"], line["missed"]) for line in told] == lines_logged


@pytest.mark.parametrize("gaps", [True, False])
async def test_that_one_that_wants_snapshots_misses_events_is_told_unless_a_gap_tells(
    lines: LogCapture, logger: Any, gaps: Any
) -> None:
    feed = Feed()
    source = feed.asking_for(fold=Fold(0, lambda state, event: state + 1))
    asked: Any = {"max_buffer_size": 1, "overflow": DropOldest(), "snapshot": True, "gaps": gaps}
    async with SharedStreamManager(logger=logger) as manager, manager.subscribe(source, **asked):
        await publish(feed, 1, 2, 3)
    told = [line["missed"] for line in lines.entries if line["event"] == "subscriber misses events"]
    assert told == ([] if gaps else [2])


async def test_a_function_of_a_subscribers_own_that_fails_is_told_with_its_exception(lines: LogCapture, logger: Any) -> None:
    feed = Feed()
    async with (
        SharedStreamManager(logger=logger) as manager,
        manager.subscribe(feed.source, subscriber_id="me", where=lambda number: 1 / number) as stream,
    ):
        feed.emit(0)
        with pytest.raises(ZeroDivisionError):
            await stream.receive()
    (line,) = [line for line in lines.entries if line["event"] == "subscriber failed"]
    assert (line["subscriber"], type(line["exc_info"])) == ("me", ZeroDivisionError)


async def test_a_failed_clean_up_is_told_with_its_exception(lines: LogCapture, logger: Any) -> None:
    error = OSError("clean-up")
    async with SharedStreamManager(logger=logger) as manager:
        await fail_to_clean_up(manager, error)
    assert events(lines) == ["group started", "clean-up failed", "group stopped"]
    assert told(lines)[1] == {"event": "clean-up failed", "key": "feed", "exc_info": error, "log_level": "error"}


async def test_a_failed_closing_is_told_beside_the_failure_that_led_to_it(lines: LogCapture, logger: Any) -> None:
    class Source:
        def __aiter__(self) -> Source:
            return self

        async def __anext__(self) -> str:
            raise ValueError("broken")

        async def aclose(self) -> None:
            raise OSError("clean-up")

    async with SharedStreamManager(logger=logger) as manager, manager.subscribe(SharedSource(key="feed", open=Source)) as stream:
        with pytest.raises(ValueError, match="broken"):
            await stream.receive()
    failures = [(line["event"], repr(line.get("exc_info"))) for line in told(lines)[1:-1]]
    assert failures == [("clean-up failed", "OSError('clean-up')"), ("poll failed", "ValueError('broken')")]


async def test_what_is_iterated_over_is_closed_beside_what_makes_the_iterator(lines: LogCapture, logger: Any) -> None:
    closed: list[str] = []

    class Iterator:
        async def __anext__(self) -> str:
            raise ValueError("broken")

        async def aclose(self) -> None:
            closed.append("iterator")
            raise OSError("clean-up")

    class Source:
        def __aiter__(self) -> Iterator:
            return Iterator()

        async def aclose(self) -> None:
            closed.append("source")

    opened: Any = Source
    source: SharedSource[str] = SharedSource(key="feed", open=opened)
    async with SharedStreamManager(logger=logger) as manager, manager.subscribe(source) as stream:
        with pytest.raises(ValueError, match="broken"):
            await stream.receive()
    assert closed == ["iterator", "source"]
    failures = [(line["event"], repr(line.get("exc_info"))) for line in told(lines)[1:-1]]
    assert failures == [("clean-up failed", "OSError('clean-up')"), ("poll failed", "ValueError('broken')")]


async def test_that_an_iterator_has_no_way_to_be_closed_is_no_failure(lines: LogCapture, logger: Any) -> None:
    class Source:
        def __aiter__(self) -> Source:
            return self

        async def __anext__(self) -> str:
            raise ValueError("broken")

    async with SharedStreamManager(logger=logger) as manager, manager.subscribe(SharedSource(key="feed", open=Source)) as stream:
        with pytest.raises(ValueError, match="broken"):
            await stream.receive()
    assert events(lines) == ["group started", "poll failed", "group stopped"]


# Where it is said.


async def test_values_that_the_application_has_bound_to_its_logger_are_kept(lines: LogCapture, logger: Any) -> None:
    async with SharedStreamManager(logger=logger.bind(application="shop")) as manager:
        await come_and_go(manager)
    assert [line["application"] for line in told(lines)] == ["shop", "shop"]


async def test_without_a_logger_the_lines_go_to_the_structlog_that_the_application_has_configured(
    configured: LogCapture, caplog: pytest.LogCaptureFixture
) -> None:
    async with SharedStreamManager() as manager:
        await fail(manager, ValueError("broken"))
    assert events(configured) == ["group started", "poll failed", "group stopped"]
    assert not caplog.records


async def test_an_application_may_configure_structlog_after_it_has_made_the_manager(lines: LogCapture) -> None:
    async with SharedStreamManager() as manager:
        structlog.configure(processors=[lines])
        try:
            await come_and_go(manager)
        finally:
            structlog.reset_defaults()
    assert events(lines) == ["group started", "group stopped"]


async def test_a_structlog_that_makes_standard_loggers_is_asked_for_the_one_of_the_librarys_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "anyio_sharedstream")
    structlog.configure(
        processors=[structlog.stdlib.render_to_log_kwargs],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    try:
        async with SharedStreamManager() as manager:
            await come_and_go(manager)
    finally:
        structlog.reset_defaults()
    told = [(record.name, record.getMessage()) for record in caplog.records if record.levelno > logging.DEBUG]
    assert told == [("anyio_sharedstream", "group started"), ("anyio_sharedstream", "group stopped")]


async def test_a_logger_that_is_given_goes_before_the_one_that_is_configured(logger: Any, configured: LogCapture) -> None:
    own = LogCapture()
    async with SharedStreamManager(logger=structlog.wrap_logger(None, processors=[own])) as manager:
        await come_and_go(manager)
    assert events(own) == ["group started", "group stopped"]
    assert not configured.entries


async def test_with_nothing_configured_the_lines_go_to_the_standard_library_and_not_to_standard_output(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "anyio_sharedstream")
    error = ValueError("broken")
    async with SharedStreamManager() as manager:
        await overflow(manager)
        await fail(manager, error)
    assert {record.name for record in caplog.records} == {"anyio_sharedstream"}
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "group started key='feed'"),
        ("WARNING", "subscriber overflowed key='feed' subscriber='slow' bound=1"),
        ("INFO", "group stopped key='feed'"),
        ("INFO", "group started key='feed'"),
        ("ERROR", "poll failed key='feed'"),
        ("INFO", "group stopped key='feed'"),
    ]
    assert {vars(record)["key"] for record in caplog.records} == {"feed"}
    assert vars(caplog.records[1])["subscriber"] == "slow"
    assert caplog.records[4].exc_info is not None
    assert caplog.records[4].exc_info[1] is error
    assert capfd.readouterr().out == ""


async def test_the_standard_librarys_levels_are_respected(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "anyio_sharedstream")
    async with SharedStreamManager() as manager:
        await overflow(manager)
        await fail(manager, ValueError("broken"))
    assert [record.getMessage() for record in caplog.records] == ["poll failed key='feed'"]


PROGRAM = """
import sys

import anyio

from anyio_sharedstream import SharedSource, SharedStreamManager


async def source():
    yield "event"
    raise ValueError("broken")


async def main():
    async with SharedStreamManager() as manager, manager.subscribe(SharedSource(key="feed", open=source)) as stream:
        assert await stream.receive() == "event"
        try:
            await stream.receive()
        except ValueError:
            pass


anyio.run(main, backend=sys.argv[1])
"""


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_program_that_has_configured_nothing_has_nothing_on_its_standard_output(backend: str) -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM, backend], capture_output=True, text=True, check=True)
    assert run.stdout == ""
    assert run.stderr.startswith("poll failed key='feed'\nTraceback")
    assert "group started" not in run.stderr


# A logger is foreign code.


class Broken:
    """A logger that always fails."""

    def __init__(self) -> None:
        self.calls = 0

    def _fail(self, event: str, **values: object) -> None:
        self.calls += 1
        raise RuntimeError("the disk is full")

    debug = info = warning = error = _fail


async def test_a_logger_that_fails_harms_nobody_and_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    broken: Any = Broken()
    async with SharedStreamManager(logger=broken) as manager:
        await come_and_go(manager)
        await overflow(manager)
        await fail(manager, ValueError("broken"))
        await fail_to_clean_up(manager, OSError("clean-up"))
        assert idle(manager)
    told = [record for record in caplog.records if record.name == "anyio_sharedstream"]
    assert len(told) == broken.calls == 23
    assert told[0].getMessage() == "the application's logger failed on 'group started'"
    assert {repr(record.exc_info and record.exc_info[1]) for record in told} == {"RuntimeError('the disk is full')"}


async def test_if_the_log_fails_in_which_a_failing_logger_is_told_of_nobody_is_harmed_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Full(logging.Filter):
        refused = 0

        def filter(self, record: logging.LogRecord) -> bool:
            self.refused += 1
            raise OSError("the other disk is full as well")

    full, broken = Full(), cast(Any, Broken())
    monkeypatch.setattr(logging.getLogger("anyio_sharedstream"), "filters", [full])
    async with SharedStreamManager(logger=broken) as manager:
        await fail(manager, ValueError("broken"))
        assert idle(manager)
    assert full.refused == broken.calls > 2


async def test_a_key_that_cannot_be_shown_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class Key:
        shown = False

        def __repr__(self) -> str:
            if self.shown:
                raise RuntimeError("a key's repr is foreign code")
            return "a key"

    caplog.set_level(logging.INFO, "anyio_sharedstream")
    key = Key()
    feed = Feed(key)
    async with SharedStreamManager() as manager, manager.subscribe(feed.source) as stream:
        key.shown = True
        feed.emit("event")
        assert await stream.receive() == "event"
        feed.fail(ValueError("broken"))
        with pytest.raises(ValueError, match="broken"):
            await stream.receive()
        await until(lambda: idle(manager))
    assert "the application's logger failed on 'poll failed'" in [record.getMessage() for record in caplog.records]


async def test_a_logger_that_calls_back_finds_the_state_already_changed(lines: LogCapture) -> None:
    seen: list[tuple[str, bool, int]] = []
    feed = Feed()

    def look(logger: Any, method: str, event: Any) -> Any:
        statistics = manager.statistics()
        subscribers = [each for group in statistics.groups.values() for each in group.subscriptions]
        seen.append((event["event"], "feed" in statistics.groups, len(subscribers)))
        return lines(logger, method, event)

    manager = SharedStreamManager(logger=structlog.wrap_logger(None, processors=[look]))
    async with manager, manager.subscribe(feed.source), manager.subscribe(feed.source, max_buffer_size=1):
        await until(lambda: feed.opened)
        for event in range(2):
            feed.emit(event)
            await settle()
        feed.fail(ValueError("broken"))
        await until(lambda: idle(manager))
    assert seen == [
        ("group started", True, 2),
        ("group opening", True, 2),
        ("group live", True, 2),
        ("subscriber overflowed", True, 1),
        ("group closing", False, 0),
        ("poll failed", False, 0),
        ("group stopped", False, 0),
    ]
