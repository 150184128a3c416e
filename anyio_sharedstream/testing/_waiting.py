"""Where tasks wait: the chain of what a coroutine awaits, and the line in it that says most to a reader.

Relies on Python's introspection of coroutines alone, so it is the same on both backends.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from types import CodeType, FrameType
from typing import Any

from anyio_sharedstream._step import Step

__all__ = [
    "WaitingTask",
    "await_chain",
    "describe_frame",
    "driven_by_hand",
    "keep",
    "most_telling",
    "name_of",
    "threads_under_way",
    "where",
]

#: Packages in which every task waits in the end, so that it says nothing; and this one, which says a little.
_LOOPS = {"anyio", "asyncio", "contextlib", "outcome", "trio"}
_INTERNALS = {*_LOOPS, "anyio_sharedstream"}
_KIT = "anyio_sharedstream.testing."

#: What Python puts between a coroutine and what it awaits, without an attribute that says what that is.
_WRAPPERS = {"anext_awaitable", "async_generator_asend", "async_generator_athrow", "coroutine_wrapper"}

#: Generators that drive something by hand, and the local variable that holds it.
_DRIVERS: dict[CodeType, str] = {Step.__await__.__code__: "inner"}

_KINDS = (("cr_frame", "cr_await"), ("gi_frame", "gi_yieldfrom"), ("ag_frame", "ag_await"))


@dataclass(frozen=True, slots=True)
class WaitingTask:
    """A task that waits."""

    name: str
    """the name of the task, as its event loop has it"""
    where: str
    """``file:line in function``: the innermost line that is not of the event loop, anyio or this library, if there is one"""

    def __str__(self) -> str:
        return f"{self.name}: {self.where}"


def keep(tasks: Iterable[object]) -> None:
    """Have tasks that do not end, or their coroutines, live for ever.

    Python closes a coroutine that is collected, also when Python itself ends. One that swallows every exception in a loop would
    go on there without end.
    """
    for task in tasks:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(task))


def name_of(function: Any) -> str:
    """Give the name of the task that runs a function."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__qualname__", None) or repr(function)


def driven_by_hand(code: CodeType, local: str) -> None:
    """Make known a generator, in most cases an ``__await__``, that drives what one of its local variables holds."""
    _DRIVERS[code] = local


def await_chain(awaitable: Any) -> Iterator[FrameType]:
    """Give the frames of a suspended coroutine and of what it awaits, the outermost first."""
    while awaitable is not None:
        for frame_name, next_name in _KINDS:
            frame = getattr(awaitable, frame_name, None)
            if frame is not None:
                yield frame
                local = _DRIVERS.get(frame.f_code)
                awaitable = getattr(awaitable, next_name) if local is None else frame.f_locals.get(local)
                break
        else:
            awaitable = _unwrapped(awaitable)


def _unwrapped(awaitable: object) -> object:
    if type(awaitable).__name__ not in _WRAPPERS:
        return None
    return next((each for each in gc.get_referents(awaitable) if _is_link(each)), None)


def _is_link(candidate: object) -> bool:
    return type(candidate).__name__ in _WRAPPERS or any(hasattr(candidate, name) for name, _ in _KINDS)


def most_telling(frames: Iterable[FrameType]) -> str:
    """Describe the innermost frame (the last) that is not internal, or else the innermost of all."""
    known = list(frames)
    for internals in (_INTERNALS, _LOOPS, set[str]()):
        telling = [frame for frame in known if _package(frame) not in internals]
        if telling:
            return describe_frame(telling[-1])
    return "nowhere: it has ended"


def _package(frame: FrameType) -> str:
    name: str = frame.f_globals.get("__name__", "")
    return "anyio" if name.startswith(_KIT) else name.partition(".")[0]


def describe_frame(frame: FrameType) -> str:
    """Describe a frame as ``file:line in function``."""
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}"


def where(coroutine: object) -> str:
    """Describe where a suspended coroutine waits."""
    return most_telling(await_chain(coroutine))


def threads_under_way(coroutines: Iterable[object]) -> int:
    """Count the tasks that wait for a thread of anyio's or trio's ``to_thread``, less those that such a thread waits for.

    It need not be exact, for nobody waits for a thread without a limit.
    """
    count = 0
    for coroutine in coroutines:
        frames = list(await_chain(coroutine))
        waits = [frame for frame in frames if frame.f_code.co_name not in _TRAPS]
        # The backend's function awaits the thread itself; while it awaits a token of the limiter, the chain goes on.
        if waits and waits[-1].f_code.co_name in _FOR_A_THREAD and _package(waits[-1]) in _LOOPS:
            count += 1
        elif any(frame.f_code.co_qualname.startswith(_FROM_A_THREAD) for frame in frames[:2]):  # newer anyios wrap theirs
            count -= 1
    return count


#: What the backends call the functions that wait for a thread, and those that run what a thread asks for.
_FOR_A_THREAD = {"run_sync_in_worker_thread", "to_thread_run_sync"}
_FROM_A_THREAD = ("AsyncIOBackend.run_async_from_thread", "BlockingPortal._call_func", "Run.unprotected_afn")
_TRAPS = {"wait_task_rescheduled", "_async_yield", "_real_async_yield"}
