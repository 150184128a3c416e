"""What to open, under which key: `SharedSource`, the `shared_source` decorator, and opening a source.

Relies on `_lifecycle` for the policies. A source is a value and holds no connection, so it may be made as often as convenient.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterable, AsyncIterator, Callable, Hashable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Generic, ParamSpec, TypeVar, Unpack, cast, overload

from anyio_sharedstream._lifecycle import Fold, OnExhausted, Restart, SourcePolicies, check_policies

__all__ = [
    "POLICIES",
    "OpenedSource",
    "SharedSource",
    "check_key",
    "check_same_policies",
    "discard",
    "iterate",
    "open_source",
    "shared_source",
]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
P = ParamSpec("P")

OpenedSource = AsyncIterable[T] | AbstractAsyncContextManager[AsyncIterable[T]]


@dataclass(frozen=True, kw_only=True)
class SharedSource(Generic[T_co]):
    """What to open, and under which key; subscribers whose keys compare equal share one upstream.

    The policies say how the upstream lives; sources of one key must agree in them. ``docs/lifecycle.md`` has the details.

    :raises ValueError: the key is None, or a policy is out of range or makes no sense without another
    :raises TypeError: the key is not hashable, *open* cannot be called, or a policy is of the wrong kind
    """

    key: Hashable
    """hashable and not None"""
    open: Callable[[], OpenedSource[T_co]]
    """Called without arguments, once per opening (again for each restart), in the manager's tasks and context. It returns an
    async iterable (a generator, an anyio receive stream, ...) or an async context manager that gives one. What it returns is
    closed by the library."""
    route_by: Callable[[T_co], Hashable] | None = None
    """Gives the route of an event, for subscribers that ask for some routes only. What it raises is a failure of the upstream,
    and so is a route that is not hashable."""
    linger: float = 0.0
    """For how many seconds the upstream outlives its last subscriber; who joins meanwhile adopts it. `math.inf` allowed. Neither
    stopping nor leaving the manager waits for it."""
    cohort_grace: float | None = None
    """For how many seconds after the first subscriber the opening waits for others, that all may have every event."""
    min_subscribers: int = 1
    """How many subscribers the opening waits for, but no longer than ``cohort_grace`` if that is given."""
    restart: Restart | None = None
    """Whether a failed upstream is opened again, and when. Its subscribers stay, and those with ``gaps=True`` receive a `Gap`."""
    on_exhausted: OnExhausted = "fail"
    """What it means that the upstream returns: `PollTerminated` ("fail", which no restart follows), the end of the stream
    ("end"), or a restart ("restart"), whatever the errors are after which ``restart`` asks for one."""
    replay: int = 0
    """How many of the latest events of this opening a joiner receives first, less those that its ``where`` and ``routes``
    refuse."""
    replay_max_age: float | None = None
    """the age in seconds above which events are not replayed"""
    fold: Fold | None = None
    """The state to keep, for subscribers that ask for ``snapshot=True``."""
    silence_timeout: float | None = None
    """After how many seconds without an event, or without having opened, the upstream is closed and has failed with
    `UpstreamSilent`. Time for which a `Block` holds it does not count."""
    close_timeout: float | None = None
    """For how many seconds the clean-up of the upstream is waited for, before the next one of the key may be opened beside it;
    None for as long as it takes. Nothing is abandoned: leaving the manager waits all the same."""
    _plain: bool = field(init=False, repr=False, compare=False)  # whether it has no policies at all

    _policies: ClassVar[tuple[str, ...]]  # the names of those in which all sources of one key must agree

    def __post_init__(self) -> None:
        check_key(self.key)
        if not callable(self.open):
            raise TypeError(f"open must be a callable without arguments, not {self.open!r}")
        policies = {name: getattr(self, name) for name, default in _POLICIES.items() if getattr(self, name) is not default}
        if policies:
            check_policies({**_POLICIES, **policies})
        object.__setattr__(self, "_plain", not policies)


#: The policies, with their defaults.
_POLICIES = {each.name: each.default for each in fields(SharedSource) if each.name not in ("key", "open", "_plain")}
SharedSource._policies = POLICIES = tuple(_POLICIES)


def _same(mine: object, theirs: object) -> bool:
    try:
        return mine is theirs or bool(mine == theirs)
    except Exception:  # the initial state of a fold is foreign, and may know no answer
        return False


def check_same_policies(one: SharedSource[Any], other: SharedSource[Any]) -> None:
    """Raise `ValueError` if two sources of one key differ in more than what they open."""
    if one._policies is not other._policies:
        kinds = [type(source).__name__ for source in (one, other)]
        raise ValueError(
            f"{one.key!r} is open as a {kinds[0]}, so it cannot be subscribed to as a {kinds[1]}: choose another key"
        )
    for name in one._policies:
        mine, theirs = getattr(one, name), getattr(other, name)
        if not _same(mine, theirs):
            raise ValueError(
                f"{one.key!r} is open with {name}={mine!r}, so it cannot be subscribed to with {name}={theirs!r}: "
                "all sources of one key must have the same policies; a function among them must be the same object"
            )


def check_key(key: Hashable) -> None:
    """Raise what is wrong with a key."""
    if key is None:
        raise ValueError("key must not be None: it names the upstream that subscribers share")
    try:
        hash(key)
    except TypeError as exc:
        raise TypeError(f"key must be hashable, and {key!r} is not ({exc}); use a tuple or a string") from None


@dataclass(frozen=True, slots=True)
class _Call:
    """The key of a decorated function's source: the function and its bound arguments."""

    function: Callable[..., Any]
    arguments: tuple[tuple[str, Hashable], ...]

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments)
        return f"{_name(self.function)}({arguments})"


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", None) or repr(function)  # a `functools.partial` has no name


@overload
def shared_source(function: Callable[P, OpenedSource[T]], /) -> Callable[P, SharedSource[T]]: ...
@overload
def shared_source(
    **policies: Unpack[SourcePolicies],
) -> Callable[[Callable[P, OpenedSource[T]]], Callable[P, SharedSource[T]]]: ...
def shared_source(
    function: Callable[..., OpenedSource[Any]] | None = None, /, **policies: Unpack[SourcePolicies]
) -> Callable[..., Any]:
    """Turn an async generator function into a factory of sources; used as ``@shared_source`` or ``@shared_source(...)``.

    The key is the function and its bound arguments with defaults applied, so ``prices("BTC")`` and ``prices(symbol="BTC")``
    share one upstream. Any function that returns what `SharedSource.open` may return can be decorated, one made by
    `contextlib.asynccontextmanager` included; a method's key contains its instance. The factory raises `TypeError` for arguments
    that do not bind or are not hashable.

    The policies are those of `SharedSource`.

    :raises TypeError: *function* cannot be called, has no signature, or is a coroutine function or a plain generator function; or
        a policy is of the wrong kind
    :raises ValueError: a policy is out of range, or makes no sense without another
    """
    unknown: Any = dict  # any function will do: what is wrong with the policies is said now
    SharedSource(key="", open=unknown, **policies)
    make: Callable[..., Any] = functools.partial(_factory, policies=policies)
    return make if function is None else make(function)


def _factory(function: Callable[P, OpenedSource[T]], policies: SourcePolicies) -> Callable[P, SharedSource[T]]:
    if not callable(function) or inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise TypeError(f"shared_source decorates an async generator function (`async def` with `yield`), not {function!r}")
    try:
        signature = inspect.signature(function)
    except ValueError as exc:
        raise TypeError(f"shared_source cannot tell the parameters of {function!r} ({exc}); wrap it in a function") from None

    @functools.wraps(function)
    def source(*args: P.args, **kwargs: P.kwargs) -> SharedSource[T]:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as exc:
            raise TypeError(f"{_name(function)}{signature} cannot be called so: {exc}") from None
        bound.apply_defaults()
        arguments = tuple((name, _hashable(name, value, signature)) for name, value in bound.arguments.items())
        open_ = functools.partial(function, *bound.args, **bound.kwargs)
        return SharedSource(key=_Call(function, arguments), open=open_, **policies)

    return source


def _hashable(name: str, value: Any, signature: inspect.Signature) -> Hashable:
    if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
        # A dictionary, in the order in which the caller happened to write it.
        value = tuple(sorted(value.items()))
    try:
        hash(value)
    except TypeError as exc:
        raise TypeError(f"argument {name}={value!r} is part of the key and must be hashable ({exc})") from None
    return cast(Hashable, value)


def open_source(source: SharedSource[T]) -> OpenedSource[T]:
    """Call the source's ``open``; a `TypeError` if that gives something that cannot be iterated or entered."""
    opened = source.open()
    if not isinstance(opened, AbstractAsyncContextManager | AsyncIterable):
        raise _unusable(opened, f"open() of {source.key!r}")
    return opened


def iterate(iterable: AsyncIterable[T], key: Hashable) -> AsyncIterator[T]:
    """Get the iterator of what was opened; a `TypeError` if a context manager gave something else."""
    if not isinstance(iterable, AsyncIterable):
        raise _unusable(iterable, f"the context manager that open() of {key!r} returned")
    return aiter(iterable)


def discard(given: object) -> None:
    """Forget what cannot be used."""
    if inspect.iscoroutine(given):
        given.close()  # it will never be awaited, and need not warn of that as well


def _unusable(given: object, giver: str) -> TypeError:
    discard(given)
    return TypeError(f"{giver} must give an async iterable or an async context manager that gives one, not {given!r}")
