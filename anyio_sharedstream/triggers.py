"""Triggers: watchers that name a key, open the shared stream of that key, and filter it into events of their own.

Relies on `_trigger_run` for one trigger, on `_trigger_outcomes` for what becomes of it, and on nothing but the public API of
`anyio_sharedstream` for streams; it logs, and leaves its task group, as that does. `TriggerRunner` knows which ids are live, and
holds the task group in which their triggers run.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Hashable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

from anyio import create_task_group
from anyio.abc import ObjectReceiveStream, TaskGroup
from structlog.typing import BindableLogger

from anyio_sharedstream import SharedStreamManager, SharedStreamProducer, Subscription
from anyio_sharedstream._leaving import leave
from anyio_sharedstream._logging import Log
from anyio_sharedstream._trigger_outcomes import (
    Outcomes,
    TriggerEvent,
    TriggerFailed,
    TriggerFinished,
    TriggerFired,
    TriggerOutcome,
)
from anyio_sharedstream._trigger_run import EventTrigger, OpenedStream, Run

__all__ = [
    "DEFAULT_MAX_OUTCOMES",
    "BaseEventTrigger",
    "EventTrigger",
    "TriggerEvent",
    "TriggerFailed",
    "TriggerFinished",
    "TriggerFired",
    "TriggerOutcome",
    "TriggerRunner",
]

DEFAULT_MAX_OUTCOMES = 1024
"""How many fired events a runner's `outcomes` holds unread unless it is told otherwise."""


class BaseEventTrigger(ABC):
    """Base class of triggers.

    One that shares implements `shared_stream_key`, `open_shared_stream` and `filter_shared_stream`; any other implements `run`.
    All of them run in the event loop: what blocks belongs into a thread (`anyio.to_thread.run_sync`).
    """

    @abstractmethod
    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the path of the class, and the keyword arguments that make an equal trigger."""

    def shared_stream_key(self) -> Hashable | None:
        """Return the key of the stream that this trigger shares with others; None, the default, if it shares none."""
        return None

    @classmethod
    def open_shared_stream(cls, kwargs: dict[str, Any]) -> OpenedStream:
        """Open the stream of a key, once for all triggers that share it, and for each restart; usually an async generator.

        :param kwargs: what `serialize` gave for the first of those triggers: take from it only what the key implies
        """
        raise NotImplementedError(f"{cls.__qualname__} has a shared_stream_key and must implement open_shared_stream")

    @classmethod
    def create_shared_stream_producer(cls, kwargs: dict[str, Any]) -> SharedStreamProducer[Any, Any]:
        """Create the producer of a key, in place of `open_shared_stream`, for a stream whose events are acknowledged.

        A class that implements it has an acknowledged stream (`AckSource`): the broker is told of an event when every trigger has
        gone on from it and everything that they fired because of it was confirmed (`TriggerFired.confirm`). What a trigger
        was at when it failed or was stopped has failed. Any object with the methods of `SharedStreamProducer` will do.

        :param kwargs: as for `open_shared_stream`
        """
        raise NotImplementedError(f"{cls.__qualname__} does not implement create_shared_stream_producer")

    def filter_shared_stream(self, shared_stream: Subscription[Any]) -> AsyncIterator[TriggerEvent]:
        """Turn what the shared stream gives into this trigger's own events; usually an async generator.

        It need not close *shared_stream*, and runs on when that ends only if it chooses to.
        """
        raise NotImplementedError(f"{type(self).__qualname__} has a shared_stream_key and must implement filter_shared_stream")

    def subscription_options(self) -> dict[str, Any]:
        """Return what this trigger asks of the shared stream: keyword arguments of `SharedStreamManager.subscribe`.

        ``overflow``, ``max_buffer_size``, ``where`` and so on, by default none of them. With ``where``, events that it refuses
        never reach `filter_shared_stream`.
        """
        return {}

    def shared_stream_policies(self) -> dict[str, Any]:
        """Return how the shared stream lives, the same for all triggers of a key: policies of `SharedSource`, by default none.

        With `create_shared_stream_producer`, those of `AckSource`.
        """
        return {}

    def run(self) -> AsyncIterator[TriggerEvent]:
        """Watch alone, where there is no key; usually an async generator."""
        raise NotImplementedError(f"{type(self).__qualname__} has no shared_stream_key and must implement run")


class TriggerRunner:
    """Runs triggers, each in a task of its own, and gives what becomes of them as one stream, `outcomes`.

    Entered once, with ``async with``. It holds a task group, so it belongs into ``main`` or an application's lifespan, as a
    `SharedStreamManager` does. Leaving stops the triggers that still run and waits for their clean-up; then `outcomes` ends. An
    exception that leaves the body leaves it as itself. A `KeyboardInterrupt`, or whatever else is no `Exception`, from a trigger
    stops the runner and leaves it as itself.

    :param manager: shares the streams; it is not closed here, and several runners may use it. If None, the runner has its own
    :param max_outcomes: how many fired events `outcomes` holds unread before triggers that fire must wait; `math.inf` allowed
    :param logger: a structlog logger for what fails in clean-ups, as for `SharedStreamManager`; also that of the runner's own
        manager
    :raises ValueError: *max_outcomes* is not a positive integer or `math.inf`
    """

    def __init__(
        self,
        manager: SharedStreamManager | None = None,
        *,
        max_outcomes: float = DEFAULT_MAX_OUTCOMES,
        logger: BindableLogger | None = None,
    ) -> None:
        if max_outcomes != math.inf and (type(max_outcomes) is not int or max_outcomes < 1):
            raise ValueError(f"max_outcomes must be a positive number of events or math.inf, not {max_outcomes!r}")
        self._manager = SharedStreamManager(logger=logger) if manager is None else manager
        self._log = Log(logger, self._abort)
        self._owned = self._manager if manager is None else None
        self._outcomes = Outcomes(max_outcomes)
        self._live: dict[Hashable, Run] = {}
        self._leaving: list[Run] = []
        self._stack = AsyncExitStack()
        self._tasks: TaskGroup | None = None
        self._entered = False
        self._over = False
        self._fatal: BaseException | None = None

    @property
    def outcomes(self) -> ObjectReceiveStream[TriggerOutcome]:
        """What becomes of the triggers: the events of each one in order, then its ending, unless it was stopped.

        When it is full, it holds back only the triggers that fire; one that is held back may fall behind its shared stream and
        fail with `SubscriberOverflow`. Endings never wait. A ``receive`` that is cancelled has taken nothing, and several tasks
        may receive. It ends when the runner has been left and everything before has been received. Closing it drops every
        outcome, and no trigger waits any more.
        """
        return self._outcomes

    async def __aenter__(self) -> Self:
        if self._entered:
            raise RuntimeError("a TriggerRunner can be entered only once: make another one")
        self._entered = True
        if self._owned is not None:
            await self._stack.enter_async_context(self._owned)
        self._stack.push_async_callback(self._clear)
        self._tasks = await self._stack.enter_async_context(create_task_group())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        self._over = True
        self._leaving = list(self._live.values())
        for run in self._leaving:
            run.stop()
        try:
            await leave(self._stack.__aexit__, exc_val, lambda: self._fatal)
        finally:
            self._outcomes.end()

    async def _clear(self) -> None:
        """The task group has been left: wait for the streams of what was stopped, which a given manager goes on closing."""
        for run in list(self._live.values()):
            run.end([], True)  # asyncio never runs a task that is natively cancelled before its first step
        for run in self._leaving:
            await run.upstream_closed()

    def start(self, trigger_id: Hashable, trigger: EventTrigger) -> None:
        """Start *trigger*. If it shares a stream, it misses nothing that is published from here on.

        What the trigger's own methods raise is its outcome, `TriggerFailed`, and is not raised here. The id may be used again
        as soon as the trigger has ended.

        :raises RuntimeError: a trigger of this id is live, or the runner is not running: not entered yet, stopped, or left
        :raises TypeError: *trigger_id* is not hashable
        """
        name = f"trigger {trigger_id!r}"
        try:
            live = trigger_id in self._live
        except TypeError as exc:
            raise TypeError(f"a trigger's id must be hashable, and {trigger_id!r} is not ({exc}); use a string") from None
        if self._tasks is None or self._over:
            state = "has not been entered" if self._tasks is None else "has been stopped or left"
            raise RuntimeError(f"the TriggerRunner {state}: start {name} inside its `async with` block")
        if live:
            raise RuntimeError(f"{name} is live: stop it first, wait until it has ended, or choose another id")
        run = Run(trigger_id, self._outcomes, self._ended, self._abort, self._log)
        self._live[trigger_id] = run  # first, for the trigger's methods are foreign code, and may start others
        try:
            run.prepare(trigger, self._manager)
        except BaseException as exc:
            del self._live[trigger_id]
            run.closed.set()
            if not isinstance(exc, Exception):
                raise
            self._outcomes.put(TriggerFailed(trigger_id, exc))
        else:
            self._tasks.start_soon(run.run, name=name)

    async def stop(self, trigger_id: Hashable) -> None:
        """Cancel a trigger; wait until its clean-up is done, and until its shared stream has closed if nobody else uses that.

        There is no outcome of it; events that had fired before can still be received, and need not be. What the clean-up raises
        is logged. If the wait is cancelled, the trigger is stopped all the same.

        :raises KeyError: no trigger of this id is live
        """
        run = self._live.get(trigger_id)
        if run is None:
            raise KeyError(f"no trigger {trigger_id!r} is live")
        run.stop()
        await run.closed.wait()
        await run.upstream_closed()

    # What runs report.

    def _ended(self, run: Run) -> None:
        del self._live[run.trigger_id]

    def _abort(self, error: BaseException) -> None:
        assert self._tasks is not None
        self._over = True
        if self._fatal is None:
            self._fatal = error
        self._tasks.cancel_scope.cancel()
