"""One trigger in a runner: the task that drives it, and how its end is decided.

Relies on `_trigger_outcomes` to report and on the public API of `anyio_sharedstream` to share. A run is *live* from its start
until `Run.end`, which decides, frees the id and reports in one synchronous step: whoever sees an ending may use the id again.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Coroutine, Hashable
from contextlib import AbstractAsyncContextManager
from functools import partial
from inspect import iscoroutine
from typing import Any, Protocol, TypeAlias, runtime_checkable

from anyio import CancelScope, Event, current_effective_deadline, get_cancelled_exc_class
from anyio.lowlevel import checkpoint

from anyio_sharedstream import AckSource, SharedSource, SharedStreamError, SharedStreamManager, Subscription
from anyio_sharedstream._exceptions import without
from anyio_sharedstream._logging import Log
from anyio_sharedstream._trigger_confirm import ConfirmedStream
from anyio_sharedstream._trigger_outcomes import (
    Outcomes,
    TriggerEvent,
    TriggerFailed,
    TriggerFinished,
    TriggerFired,
    TriggerOutcome,
)

__all__ = ["EventTrigger", "OpenedStream", "Run"]

OpenedStream: TypeAlias = AsyncIterable[Any] | AbstractAsyncContextManager[AsyncIterable[Any]]


@runtime_checkable
class EventTrigger(Protocol):
    """What `TriggerRunner` takes for a trigger. `BaseEventTrigger` says what each method is for; it need not be inherited.

    A trigger may also have ``subscription_options`` and ``shared_stream_policies``; without them, nothing is asked for. With
    ``create_shared_stream_producer``, its shared stream is an acknowledged one.
    This is for type checkers, and for `isinstance` where somebody needs it; the runner calls no method without need.
    """

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """See `BaseEventTrigger.serialize`."""
        ...

    def shared_stream_key(self) -> Hashable | None:
        """See `BaseEventTrigger.shared_stream_key`."""
        ...

    @classmethod
    def open_shared_stream(cls, kwargs: dict[str, Any], /) -> OpenedStream:
        """See `BaseEventTrigger.open_shared_stream`."""
        ...

    def filter_shared_stream(self, shared_stream: Subscription[Any], /) -> AsyncIterable[TriggerEvent]:
        """See `BaseEventTrigger.filter_shared_stream`."""
        ...

    def run(self) -> AsyncIterable[TriggerEvent]:
        """See `BaseEventTrigger.run`."""
        ...


class Run:
    """A trigger from its start to its end.

    It is also its subscription's id, so that the id equals no other and can still be read in a log.

    :param on_end: called when the id is free
    :param on_fatal: called with what must stop everything and leave the runner as itself
    """

    def __init__(
        self,
        trigger_id: Hashable,
        outcomes: Outcomes,
        on_end: Callable[[Run], None],
        on_fatal: Callable[[BaseException], None],
        log: Log,
    ) -> None:
        self.trigger_id = trigger_id
        self.stopped = False
        self.closed = Event()
        self._outcomes = outcomes
        self._on_end = on_end
        self._on_fatal = on_fatal
        self._log = log
        self._confirmed: ConfirmedStream | None = None
        self._scope = CancelScope()
        self._stream: Subscription[Any] | None = None
        self._iterate: Callable[[], AsyncIterable[TriggerEvent]]

    def __repr__(self) -> str:
        return f"<trigger {self.trigger_id!r}>"

    def prepare(self, trigger: EventTrigger, manager: SharedStreamManager) -> None:
        """Ask the trigger what it needs, and subscribe. What this raises leaves no state."""
        key = trigger.shared_stream_key()
        if key is None:
            self._iterate = trigger.run
            return
        filter_shared_stream = trigger.filter_shared_stream
        policies: dict[str, Any] = getattr(trigger, "shared_stream_policies", dict)()
        source = _source(type(trigger), key, trigger.serialize()[1], policies)
        # The policy decides the class of the stream, and this runner cannot know it.
        options: dict[str, Any] = getattr(trigger, "subscription_options", dict)()
        stream: Any = manager.subscribe(source, subscriber_id=self, **options)
        # Entering registers without yielding to the event loop. So it can be done here, where nothing can be awaited; in the
        # trigger's task it would come too late for what is published before that task first runs.
        entering = stream.__aenter__()
        try:
            entering.send(None)
        except StopIteration:
            pass
        else:
            _raise_why(entering)
        self._stream = stream
        if isinstance(source, AckSource):
            self._confirmed = stream = ConfirmedStream(stream)
        self._iterate = partial(filter_shared_stream, stream)

    def stop(self) -> None:
        """Request the end. From here on the trigger has no outcome."""
        self.stopped = True
        self._scope.cancel()
        self._outcomes.withdraw(self)

    async def upstream_closed(self) -> None:
        """Wait until the shared stream has closed, if this was the last to use it."""
        if self._stream is not None:
            await self._stream.aclose()

    async def run(self) -> None:
        """Run the trigger in this task. Whatever happens, this does not raise: a trigger's end is nobody else's."""
        # On asyncio a KeyboardInterrupt raised from here would leave the event loop by its shortest way out, and a stray
        # cancellation would cancel every other trigger.
        errors: list[BaseException] = []
        cancelled = False
        with self._scope:
            iterator: AsyncIterator[TriggerEvent] | None = None
            try:
                if not self.stopped:
                    iterator = _iterator(self._iterate())
                    await self._drive(iterator)
            except BaseException as exc:
                errors.append(exc)
            try:
                aclose = getattr(iterator, "aclose", None)
                if aclose is not None:
                    await aclose()
            except BaseException as exc:
                errors.append(exc)
            cancelled = current_effective_deadline() == -math.inf
        self.end(errors, cancelled)
        errors.clear()  # their tracebacks refer to this frame

    async def _drive(self, iterator: AsyncIterator[TriggerEvent]) -> None:
        """Report what the iterator yields; return when it is exhausted, or rests at a yield and should be closed."""
        awaitable = iterator.__anext__()
        told = False
        while True:
            try:
                event = await awaitable
            except StopAsyncIteration:
                return
            if told:
                return  # it was told to stop, and yields again
            # The iterator rests at a yield, inside whatever scopes it holds there, and what is raised here may be one of theirs.
            # So it is raised where it belongs. Closing a generator instead would turn an ordinary stop into a
            # BaseExceptionGroup([GeneratorExit]) wherever a task group is held over the yield. What cannot be thrown into meets
            # a cancellation at its next await, and it is kept off until then.
            generator = iterator if isinstance(iterator, AsyncGenerator) else None
            try:
                with CancelScope(shield=generator is None):
                    await self._report(event)
            except BaseException as exc:
                if generator is None:
                    raise
                told = self.stopped
                awaitable = generator.athrow(exc)
            else:
                if self.stopped:
                    return  # it cannot be told, or shields its yield
                awaitable = iterator.__anext__()

    async def _report(self, event: TriggerEvent) -> None:
        if self.stopped:
            await checkpoint()
        else:
            confirm = None if self._confirmed is None else self._confirmed._fire()
            await self._outcomes.fire(self, TriggerFired(self.trigger_id, event, confirm))

    def end(self, errors: list[BaseException], cancelled: bool) -> None:
        """The trigger has cleaned up, and nothing of it runs any more.

        :param errors: what it raised, what it raised when it was closed
        :param cancelled: whether it was stopped, or what surrounds the runner was cancelled
        """
        if self._confirmed is not None and (errors or cancelled or self.stopped):
            self._confirmed._break_off()
        elif self._confirmed is not None:
            self._confirmed._finish()
        if self._stream is not None:
            self._stream.close()  # without waiting: the outcome need not wait for how the upstream closes
        self._on_end(self)
        failures = [failure for failure in map(_failure, errors) if failure is not None]
        fatal = [failure for failure in failures if not isinstance(failure, Exception)]
        plain = [failure for failure in failures if isinstance(failure, Exception)]
        if fatal:
            self._on_fatal(fatal[0])
        elif not (self.stopped or cancelled):
            self._outcomes.put(self._ending(errors, plain))
        self.closed.set()
        for failure in plain:
            self._log.write("error", "clean-up failed", trigger=self.trigger_id, exc_info=failure)

    def _ending(self, errors: list[BaseException], failures: list[Exception]) -> TriggerOutcome:
        if failures:
            return TriggerFailed(self.trigger_id, failures.pop(0))
        if not errors:
            return TriggerFinished(self.trigger_id)
        stray = SharedStreamError(f"trigger {self.trigger_id!r} was cancelled, and nobody had asked for that")
        stray.__cause__ = errors[0]
        return TriggerFailed(self.trigger_id, stray)


def _source(cls: Any, key: Hashable, kwargs: dict[str, Any], policies: dict[str, Any]) -> SharedSource[Any]:
    """What a trigger's class opens: with acknowledgement, if it or one of its own bases says how to create a producer."""
    # As Airflow does it: what its base class, or ours, says of that is only how to say it.
    own = next((base for base in cls.__mro__ if "create_shared_stream_producer" in vars(base)), None)
    if own is None or own.__name__ == "BaseEventTrigger":
        return SharedSource(key=key, open=partial(cls.open_shared_stream, kwargs), **policies)
    return AckSource(key, partial(cls.create_shared_stream_producer, kwargs), **policies)


def _iterator(given: AsyncIterable[TriggerEvent]) -> AsyncIterator[TriggerEvent]:
    if not isinstance(given, AsyncIterable):
        if iscoroutine(given):
            given.close()  # it will never be awaited, and need not warn of that as well
        raise TypeError(f"a trigger's events must be an async iterable (`async def` with `yield`), not {given!r}")
    return aiter(given)


def _failure(error: BaseException) -> BaseException | None:
    """Return *error* less its cancellations, and what closing a generator leaves in a task group held over the yield."""
    return without(error, get_cancelled_exc_class(), GeneratorExit)


def _raise_why(entering: Coroutine[Any, Any, Any]) -> None:
    """Raise why a stream could not be entered: it waits only to be cancelled first, if that is about to happen."""
    try:
        entering.throw(InterruptedError)
    except InterruptedError as exc:
        raise exc.__context__ or exc from None
