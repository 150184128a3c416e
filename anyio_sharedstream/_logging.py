"""Where the library's few log lines go.

Relies on structlog. A line never harms what it reports on: it is written after the state has changed, and a logger that
fails is reported, not raised into the middle of a publication. What is no `Exception` (a `KeyboardInterrupt`) goes to the owner.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any, Literal

import structlog
from structlog.typing import BindableLogger, EventDict

__all__ = ["Level", "Lines", "Log"]

Level = Literal["debug", "info", "warning", "error"]

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_standard_logger = logging.getLogger("anyio_sharedstream")


class Log:
    """Writes to the logger that the application gave; else to structlog's own, if configured; else to the standard one."""

    __slots__ = ("_given", "_on_fatal")

    def __init__(self, given: BindableLogger | None, on_fatal: Callable[[BaseException], None]) -> None:
        self._given = given
        self._on_fatal = on_fatal

    def wants(self, level: Level) -> bool:
        """False if it is certain that nobody reads such a line: making one costs more than much of what a group does."""
        return self._given is not None or structlog.is_configured() or _standard_logger.isEnabledFor(_LEVELS[level])

    def write(self, level: Level, event: str, **values: object) -> None:
        try:
            getattr(self._logger(), level)(event, **values)
        except Exception:
            # Said once more elsewhere; and if that is what failed, there is nobody left to tell.
            with suppress(Exception):
                _standard_logger.exception("the application's logger failed on %r", event)
        except BaseException as exc:
            self._on_fatal(exc)

    def _logger(self) -> Any:
        if self._given is not None:
            return self._given
        # Asked at every line, for an application may configure structlog after it has made the manager. Unconfigured,
        # structlog prints to standard output, which may be somebody's data.
        return structlog.get_logger("anyio_sharedstream") if structlog.is_configured() else _standard


class Lines:
    """The lines about one key: collected while its state changes, and written last of all, for a logger may call back."""

    __slots__ = ("_key", "_log", "_unwritten")

    def __init__(self, log: Log, key: Hashable) -> None:
        self._log = log
        self._key = key
        self._unwritten: list[tuple[Level, str, dict[str, object]]] = []

    def add(self, level: Level, event: str, **values: object) -> None:
        if self._log.wants(level):
            self._unwritten.append((level, event, values))

    def write(self) -> None:
        while self._unwritten:
            level, event, values = self._unwritten.pop(0)
            self._log.write(level, event, key=self._key, **values)


def _to_standard_library(_logger: Any, _method: str, event_dict: EventDict) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Give the standard library a message that can be read as it is, and the values as attributes of the record."""
    exc_info = event_dict.pop("exc_info", None)
    event = event_dict.pop("event")
    text = " ".join(f"{name}={value!r}" for name, value in event_dict.items())
    return ("%s %s", event, text), {"exc_info": exc_info, "extra": dict(event_dict)}


_standard: Any = structlog.wrap_logger(
    _standard_logger,
    processors=[structlog.stdlib.filter_by_level, _to_standard_library],
    wrapper_class=structlog.stdlib.BoundLogger,
    context_class=dict,
)
