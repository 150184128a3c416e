"""The errors that subscribers see, and the copy that each of them gets.

Relies on nothing else in the package. One upstream failure is raised in every subscriber's task, and raising writes to an
exception: its traceback grows, its context is replaced, notes are added. So each raise works on a copy of its own
(`private_copy`), kept for a subscription by its `Terminal`.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from types import MemberDescriptorType
from typing import Any

from anyio import BusyResourceError, ClosedResourceError, EndOfStream, WouldBlock

__all__ = [
    "STREAM_SIGNALS",
    "AckTimeout",
    "PollTerminated",
    "SharedStreamError",
    "SubscriberOverflow",
    "Terminal",
    "UpstreamSilent",
    "bare",
    "consists_of",
    "own_failure",
    "private_copy",
    "without",
]


class SharedStreamError(Exception):
    """Base class of the errors that this library raises of its own accord."""


class PollTerminated(SharedStreamError):
    """The upstream stopped without an error of its own that could be reported.

    A source runs for the lifetime of its group, so returning is a failure, unless its ``on_exhausted`` says otherwise. It is also
    raised, with the original as its ``__cause__``, for what must not be raised in a subscriber as itself: a cancellation that
    nobody asked for, an `anyio.EndOfStream` that leaked from the source, a `KeyboardInterrupt`.
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
    reason: str
    """what it was too slow for; that depends on its policy"""

    def __init__(self, key: Hashable, subscriber_id: Hashable, max_buffer_size: float, reason: str | None = None) -> None:
        reason = f"fell more than {max_buffer_size} events behind" if reason is None else reason
        super().__init__(key, subscriber_id, max_buffer_size, reason)
        self.key = key
        self.subscriber_id = subscriber_id
        self.max_buffer_size = max_buffer_size
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"subscriber {self.subscriber_id!r} of {self.key!r} {self.reason}; "
            "receive faster, or subscribe with a larger max_buffer_size"
        )


class UpstreamSilent(SharedStreamError):
    """The upstream yielded nothing for longer than the source's ``silence_timeout``, and was closed."""

    key: Hashable
    """the key of the upstream"""
    seconds: float
    """the timeout, in seconds"""

    def __init__(self, key: Hashable, seconds: float) -> None:
        super().__init__(key, seconds)
        self.key = key
        self.seconds = seconds

    def __str__(self) -> str:
        return f"the upstream of {self.key!r} yielded nothing for {self.seconds} seconds; is its connection still alive?"


class AckTimeout(SharedStreamError):
    """This subscriber was busy with an event for longer than the source's ``ack_timeout``, or held everybody up for so long."""

    key: Hashable
    """the key of the upstream"""
    subscriber_id: Hashable
    """the id of the subscriber that was late"""
    seconds: float
    """the timeout"""

    def __init__(self, key: Hashable, subscriber_id: Hashable, seconds: float) -> None:
        super().__init__(key, subscriber_id, seconds)
        self.key = key
        self.subscriber_id = subscriber_id
        self.seconds = seconds

    def __str__(self) -> str:
        return (
            f"subscriber {self.subscriber_id!r} of {self.key!r} has not finished an event within {self.seconds} seconds; "
            "finish faster, defer() what takes long, or raise ack_timeout"
        )


#: What a stream raises to speak of itself. Leaked from a source, one of these would be taken for the subscription's own
#: word: a quiet end, or "nothing yet" for ever.
STREAM_SIGNALS = (EndOfStream, WouldBlock, StopIteration, StopAsyncIteration)


_TRACEBACK: Any = vars(BaseException)["__traceback__"]  # whatever a class may define by this name


def own_failure(error: BaseException) -> Exception:
    """What a subscriber's own function has raised, unless a stream would say that of itself, or it is no `Exception`."""
    # The last two a source may well mean, of what it receives from. A function of events has no such streams.
    signals = (*STREAM_SIGNALS, ClosedResourceError, BusyResourceError)
    if isinstance(error, Exception) and not isinstance(error, signals):
        return error
    failure = SharedStreamError(f"a function of this subscriber's own raised {type(error).__name__}")
    failure.__cause__ = error
    return failure


class Terminal:
    """How a subscription ended: gives a fresh exception for each raise, so that repeating it does not grow it."""

    __slots__ = ("_exception", "_traceback")

    def __init__(self, exception: BaseException) -> None:
        self._exception = exception
        self._traceback = _TRACEBACK.__get__(exception)

    def exception(self) -> BaseException:
        # `with_traceback` matters for an exception that could not be copied: raising it has grown the original.
        return BaseException.with_traceback(private_copy(self._exception), self._traceback)


def bare(exception: BaseException) -> BaseException:
    """A copy for looking at: without traceback, cause and context, and so without all that these keep alive."""
    twin = private_copy(exception)
    _strip(twin, exception)
    return twin


def _strip(twin: BaseException, original: BaseException) -> None:
    if twin is original:
        return  # it could not be copied, and is others' as well
    for name in ("__cause__", "__context__", "__traceback__"):
        _set(twin, name, None)
    if isinstance(twin, BaseExceptionGroup) and isinstance(original, BaseExceptionGroup):
        for copied, member in zip(twin.exceptions, original.exceptions, strict=True):
            _strip(copied, member)


def consists_of(exception: BaseException | None, *kinds: type[BaseException]) -> bool:
    """Whether *exception* is of the given kinds; for a group, whether all of its members are."""
    if isinstance(exception, BaseExceptionGroup):
        return all(consists_of(member, *kinds) for member in exception.exceptions)
    return isinstance(exception, kinds)


def without(exception: BaseException | None, *kinds: type[BaseException]) -> BaseException | None:
    """Return *exception* less the given kinds, the members of its groups included; None if nothing else is left."""
    if not isinstance(exception, BaseExceptionGroup):
        return None if isinstance(exception, kinds) else exception
    if not _contains(exception, kinds):
        return exception  # as it is: splitting makes another group, of another class unless that says how to be derived from
    try:
        return exception.split(kinds)[1]
    except Exception:  # `derive` is foreign code
        rest = [member for member in (without(member, *kinds) for member in exception.exceptions) if member is not None]
        return BaseExceptionGroup(exception.message, rest).with_traceback(exception.__traceback__) if rest else None


def _contains(exception: BaseException, kinds: tuple[type[BaseException], ...]) -> bool:
    if isinstance(exception, BaseExceptionGroup):
        return any(_contains(member, kinds) for member in exception.exceptions)
    return isinstance(exception, kinds)


def private_copy(exception: BaseException) -> BaseException:
    """Copy *exception* with its traceback, cause, context and notes; the original where no faithful copy can be made.

    Members of exception groups are copied too. Faithful means: same type, same arguments, same attributes.
    """
    try:
        twin = _rebuilt(exception) or _copied(exception)
        if twin is None:
            return exception
        for name in ("__cause__", "__context__", "__suppress_context__", "__traceback__"):  # in this order: a cause suppresses
            _set(twin, name, getattr(exception, name))
        notes = exception.__dict__.get("__notes__")
        if isinstance(notes, list):
            twin.__dict__["__notes__"] = list(notes)
    except Exception:  # a class may define any of these names as something else
        return exception
    return twin


#: Past a class's own ``__setattr__``, which may refuse: a frozen dataclass can be an exception, too.
_set = BaseException.__setattr__


def _rebuilt(exception: BaseException) -> BaseException | None:
    """Build a twin through the built-in base class alone.

    No foreign ``__init__`` runs: one with keyword-only parameters could not be called, one that computes the message
    would compute it twice, and any of them may have side effects.
    """
    cls = type(exception)
    builtin: Any = next(base for base in cls.__mro__ if base.__module__ == "builtins")
    try:
        if isinstance(exception, BaseExceptionGroup):
            members = [private_copy(member) for member in exception.exceptions]
            arguments: Any = (exception.message, members, *exception.args[2:])
            twin: BaseException = builtin.__new__(cls, *arguments[:2])
        else:
            # Not `args`: an OSError's lack the file name, its reduction has it.
            arguments = builtin.__reduce__(exception)[1]
            twin = builtin.__new__(cls, *arguments)
        builtin.__init__(twin, *arguments)
        twin.__dict__.update(exception.__dict__)
        for base in cls.__mro__:
            # Slots, and the fields that built-in classes keep in C (`AttributeError.name`): neither is in the dictionary.
            for name, member in vars(base).items():
                if isinstance(member, MemberDescriptorType) and base is not BaseExceptionGroup:
                    value = getattr(exception, name, None)
                    if getattr(twin, name, None) is not value:
                        _set(twin, name, value)
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
        return True  # its members are copies of the original's, where they could be copied
    # Identity, for comparing foreign values may fail or answer with something other than a truth value.
    return all(one is other for one, other in zip(twin.args, original.args, strict=True))
