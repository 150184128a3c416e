"""One step of an iterator, watched: what was gathered is published before the step suspends the poll task.

Relies on nothing else in the package. Events that a source yields without suspending can be published together: no other task
runs in between, so nobody can tell, except by the cost. That holds only if nothing stays unpublished when the poll task lets
go, and only the suspension itself says when that is. So a `Step` stands between the task and the awaitable of ``__anext__``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from functools import partial
from types import GeneratorType
from typing import Any, Generic, TypeVar

from anyio.lowlevel import cancel_shielded_checkpoint

__all__ = ["Step"]

T = TypeVar("T")


class Step(Generic[T]):
    """An awaitable that behaves as *awaitable*, and calls *before_suspending* once before the first suspension.

    If *before_suspending* returns true, the first suspension is followed by one more turn of the event loop.
    """

    __slots__ = ("_awaitable", "_before_suspending", "suspended")

    def __init__(self, awaitable: Awaitable[T], before_suspending: Callable[[], bool]) -> None:
        self._awaitable = awaitable
        self._before_suspending = before_suspending
        self.suspended = False

    def __await__(self) -> Generator[Any, Any, T]:
        # A generator may be awaited if `types.coroutine` made it, and then has no `__await__`.
        inner: Any = self._awaitable if isinstance(self._awaitable, GeneratorType) else self._awaitable.__await__()
        try:
            signal = next(inner)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        self.suspended = True
        settle: bool | None = None
        # From here on this is `yield from inner` as PEP 380 spells it out: an iterator need have neither `send` nor `throw`.
        resume: Callable[[], Any] | None = None
        try:
            while True:
                try:
                    if settle is None:
                        # In here, for the iterator has suspended: what this raises must be raised inside it, not leave it behind.
                        settle = False
                        settle = self._before_suspending()
                    sent = yield signal
                    if settle:
                        # The extra turn comes before the source sees what it was sent, be that a cancellation (on trio, a value).
                        settle = False
                        yield from cancel_shielded_checkpoint().__await__()
                except GeneratorExit:
                    if hasattr(inner, "close"):
                        inner.close()
                    raise
                except BaseException as exc:
                    resume = _throwing(inner, exc)
                else:
                    resume = inner.__next__ if sent is None else partial(inner.send, sent)
                try:
                    signal = resume()
                except StopIteration as done:
                    return done.value  # type: ignore[no-any-return]
        finally:
            del resume  # it holds what was thrown, and that, with its traceback, this frame


def _throwing(inner: Any, exc: BaseException) -> Callable[[], Any]:
    if not hasattr(inner, "throw"):
        raise exc
    return partial(inner.throw, exc)
