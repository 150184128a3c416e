"""The errors that subscribers see, and the copy that each of them gets.

Relies on nothing but the language. One upstream failure is raised in every subscriber's task, and raising writes to an
exception: its traceback grows, its context is replaced, notes are added. So each raise works on a copy of its own
(`private_copy`), kept for a subscription by its `Terminal`.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from types import MemberDescriptorType
from typing import Any

from anyio import EndOfStream, WouldBlock

__all__ = ["PollTerminated", "SharedStreamError", "SubscriberOverflow", "Terminal", "private_copy", "without"]


class SharedStreamError(Exception):
    """Base class of the errors that this library raises of its own accord."""


class PollTerminated(SharedStreamError):
    """The upstream stopped without an error of its own that could be reported.

    A source runs for the lifetime of its group, so returning is a failure. It is also raised, with the original as its
    ``__cause__``, for what must not be raised in a subscriber as itself: a cancellation that nobody asked for, an
    `anyio.EndOfStream` that leaked from the source, a `KeyboardInterrupt`.
    """

    key: Hashable
    """the key of the upstream"""
    reason: str
    """what happened to it"""

    def __init__(self, key: Hashable, reason: str) -> None:
        super().__init__(key, reason)
        self.key = key
        self.reason = reason

    # The messages are made when somebody reads them: a key's repr is foreign code, and must not run inside a publication.
    def __str__(self) -> str:
        return f"the upstream of {self.key!r} has terminated: {self.reason}; subscribe again to open it anew"


class SubscriberOverflow(SharedStreamError):
    """This subscriber fell further behind than its buffer allows; its backlog was dropped, its siblings never noticed."""

    key: Hashable
    """the key of the upstream"""
    subscriber_id: Hashable
    """the id of the subscriber that fell behind"""
    max_buffer_size: float
    """the bound that it exceeded, in events"""

    def __init__(self, key: Hashable, subscriber_id: Hashable, max_buffer_size: float) -> None:
        super().__init__(key, subscriber_id, max_buffer_size)
        self.key = key
        self.subscriber_id = subscriber_id
        self.max_buffer_size = max_buffer_size

    def __str__(self) -> str:
        return (
            f"subscriber {self.subscriber_id!r} of {self.key!r} fell more than {self.max_buffer_size} events behind; "
            "receive faster, or subscribe with a larger max_buffer_size"
        )


#: What a stream raises to speak of itself. Leaked from a source, one of these would be taken for the subscription's own
#: word: a quiet end, or "nothing yet" for ever.
STREAM_SIGNALS = (EndOfStream, WouldBlock, StopIteration, StopAsyncIteration)


class Terminal:
    """How a subscription ended: gives a fresh exception for each raise, so that repeating it does not grow it."""

    __slots__ = ("_exception", "_traceback")

    def __init__(self, exception: BaseException) -> None:
        self._exception = exception
        self._traceback = exception.__traceback__

    def exception(self) -> BaseException:
        # `with_traceback` matters for an exception that could not be copied: raising it has grown the original.
        return private_copy(self._exception).with_traceback(self._traceback)


def without(exception: BaseException | None, *kinds: type[BaseException]) -> BaseException | None:
    """Return *exception* less the given kinds, the members of its groups included; None if nothing else is left."""
    if isinstance(exception, BaseExceptionGroup):
        return exception.split(kinds)[1]
    return None if isinstance(exception, kinds) else exception


def private_copy(exception: BaseException) -> BaseException:
    """Copy *exception* with its traceback, cause, context and notes; the original where no faithful copy can be made.

    Members of exception groups are copied too. Faithful means: same type, same arguments, same attributes.
    """
    twin = _rebuilt(exception) or _copied(exception)
    if twin is None:
        return exception
    twin.__traceback__ = exception.__traceback__
    twin.__cause__ = exception.__cause__
    twin.__context__ = exception.__context__
    twin.__suppress_context__ = exception.__suppress_context__
    notes = getattr(exception, "__notes__", None)
    if isinstance(notes, list):
        twin.__notes__ = list(notes)
    return twin


def _rebuilt(exception: BaseException) -> BaseException | None:
    """Build a twin through the built-in base class alone.

    No foreign ``__init__`` runs: one with keyword-only parameters could not be called, one that computes the message
    would compute it twice, and any of them may have side effects.
    """
    cls = type(exception)
    builtin: Any = next(base for base in cls.__mro__ if base.__module__ == "builtins")
    try:
        if isinstance(exception, BaseExceptionGroup):
            arguments: Any = (exception.message, [private_copy(member) for member in exception.exceptions])
        else:
            # Not `args`: an OSError's lack the file name, its reduction has it.
            arguments = builtin.__reduce__(exception)[1]
        twin: BaseException = builtin.__new__(cls, *arguments)
        builtin.__init__(twin, *arguments)
        twin.__dict__.update(exception.__dict__)
        for base in cls.__mro__:
            # Slots, and the fields that built-in classes keep in C (`AttributeError.name`): neither is in the dictionary.
            for name, member in vars(base).items():
                if isinstance(member, MemberDescriptorType) and base is not BaseExceptionGroup:
                    value = getattr(exception, name, None)
                    if getattr(twin, name, None) is not value:
                        setattr(twin, name, value)
    except Exception:
        return None
    return twin if _alike(twin, exception) else None


def _copied(exception: BaseException) -> BaseException | None:
    try:
        twin = copy.copy(exception)
    except Exception:
        return None
    return twin if twin is not exception and _alike(twin, exception) else None


def _alike(twin: BaseException, original: BaseException) -> bool:
    if type(twin) is not type(original) or len(twin.args) != len(original.args):
        return False
    if isinstance(original, BaseExceptionGroup):
        return True  # its members were copied, so they cannot be identical
    # Identity, for comparing foreign values may fail or answer with something other than a truth value.
    return all(one is other for one, other in zip(twin.args, original.args, strict=True))
