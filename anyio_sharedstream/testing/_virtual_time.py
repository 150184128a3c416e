"""Running an async function in virtual time, on the backend of one's choice.

Relies on the two modules that know how to, and imports trio's only where it is wanted.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar, TypeVarTuple, Unpack

from anyio_sharedstream.testing._virtual_asyncio import run_on_asyncio
from anyio_sharedstream.testing._waiting import name_of

__all__ = ["run"]

T = TypeVar("T")
Args = TypeVarTuple("Args")


def run(function: Callable[[Unpack[Args]], Awaitable[T]], *args: *Args, backend: str = "asyncio") -> T:
    """Run an async function to its end in virtual time, as `anyio.run` does in real time, and return its result.

    The clock begins at 0 seconds. Whenever no task can run it goes to the next deadline at once, so a sleep of a day takes no
    time, and ends after exactly a day. When nothing is left to wait for, that is a `Deadlock`: everything is cancelled, and once
    the function has ended, `Deadlock` is raised.

    Time stands still while a thread of `anyio.to_thread`, or of an asyncio executor, is under way, for up to 30 seconds of
    real time; then that is a `Deadlock` as well. Of other threads, sockets and processes nothing is known: what waits for them
    waits for nothing, as far as the clock is concerned.

    :param backend: "asyncio" (its own event loop) or "trio"
    :raises Deadlock: nothing can ever run again; the message lists the waiting tasks
    :raises ValueError: there is no virtual time on this backend
    :raises RuntimeError: an event loop is running in this thread
    """
    if backend not in ("asyncio", "trio"):
        hint = ": its timers are not within reach of Python" if backend == "uvloop" else ""
        raise ValueError(f'there is virtual time on "asyncio" and "trio", but not on {backend!r}{hint}')
    name = name_of(function)
    if backend == "asyncio":
        return run_on_asyncio(name, function, args)  # type: ignore[no-any-return]
    # Imported here because trio is an extra.
    from anyio_sharedstream.testing._virtual_trio import run_on_trio

    return run_on_trio(name, function, args)  # type: ignore[no-any-return]
