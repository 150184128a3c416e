"""A thread that watches how long an event loop's thread is kept by one step, says where, and interrupts it in the end.

Relies on `_waiting` to describe the place. Times are seconds of real time, whatever the event loop's clock says.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from types import FrameType
from typing import Any, Self

from anyio_sharedstream.testing._waiting import most_telling

__all__ = ["Block", "Interrupted", "Watchdog"]


class Interrupted(BaseException):
    """A step took too long, and was ended by force."""


@dataclass(frozen=True, slots=True)
class Block:
    """A step that did not return to the event loop in time."""

    seconds: float
    where: str
    interrupted: bool


class Watchdog:
    """Measures steps given to `step`; those that take longer than *max_block* seconds are in `blocks`.

    A step that takes longer than *interrupt_after* seconds is interrupted: `Interrupted` is raised in it, wherever it is. A call
    of C that does not return cannot be interrupted.
    """

    def __init__(self, max_block: float, interrupt_after: float) -> None:
        self.blocks: list[Block] = []
        self._max_block = max_block
        self._interrupt_after = interrupt_after
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._began: float | None = None
        self._where: str | None = None
        self._interrupted = False
        self._watched = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="check_source", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def step(self, resume: Callable[[], Any]) -> Any:
        """Measure a call, and return or raise what it does."""
        self._began = perf_counter()
        try:
            return resume()
        finally:
            try:
                self._end()
            except Interrupted:  # raised late, on the way out of the step
                self._end()

    def _end(self) -> None:
        now = perf_counter()
        with self._lock:  # nobody interrupts any more afterwards
            began, self._began = self._began, None
            interrupted, self._interrupted = self._interrupted, False
            where, self._where = self._where, None
        if interrupted:
            _let_it_be_raised()
        if began is not None and now - began > self._max_block:
            self.blocks.append(Block(now - began, where or "a place that was left too soon to be seen", interrupted))

    def _watch(self) -> None:
        while not self._stop.wait(self._max_block / 4):
            with self._lock:
                if self._began is not None:
                    self._look(perf_counter() - self._began)

    def _look(self, seconds: float) -> None:
        if self._where is None and seconds > self._max_block / 2:
            self._where = most_telling(_stack(sys._current_frames()[self._watched]))
        if seconds > self._interrupt_after and not self._interrupted:
            self._interrupted = True
            _raise_in(self._watched, Interrupted)


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    if frame is not None:
        yield from _stack(frame.f_back)
        yield frame


def _raise_in(thread: int, exception: type[BaseException]) -> None:
    # The only way to raise something in another thread. It is raised between two bytecodes, so never inside a call of C.
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(exception))


def _let_it_be_raised() -> None:
    # What is still to be raised is raised when a function is entered. To take it back instead leaves CPython 3.11 in a state in
    # which a traced program makes no more progress.
    with suppress(Interrupted):
        _nothing()


def _nothing() -> None: ...
