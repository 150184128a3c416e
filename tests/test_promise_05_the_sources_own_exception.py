"""Promise 5: every subscriber sees the source's own exception, in a copy of its own."""

from __future__ import annotations

import traceback
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import anyio
import pytest

from anyio_sharedstream import SharedSource, SharedStreamManager, Subscription


class KeywordOnlyError(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


class ComputedError(Exception):
    """Its message is made from its argument: built anew from its own message, it would say everything twice."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no such thing: {name}")


class SlottedError(Exception):
    __slots__ = ("code", "unset")

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class FrozenError(Exception):
    code: int


class UniqueError(UnicodeDecodeError):
    """Nothing can make a second one of these: its arguments are not those of any constructor."""

    def __init__(self) -> None:
        super().__init__("utf-8", b"", 0, 1, "broken")
        self.args = ("the only one",)

    def __copy__(self) -> Self:
        raise TypeError("there is only one")


class CountedGroup(ExceptionGroup[Exception]):
    """A group with a constructor and an attribute of its own."""

    code: int

    def __new__(cls, message: str, errors: list[Exception], code: int) -> Self:
        group = super().__new__(cls, message, errors)
        group.code = code
        return group


def unreadable_file() -> OSError:
    return OSError(13, "Permission denied", "prices.csv", None, "prices.bak")


KINDS: dict[str, Callable[[], Exception]] = {
    "plain": lambda: ValueError("broken", 1),
    "no arguments": lambda: ValueError(),
    "keyword-only": lambda: KeywordOnlyError(code=7),
    "computed message": lambda: ComputedError("feed"),
    "OSError": unreadable_file,
    "slots": lambda: SlottedError("broken", 7),
    "frozen": lambda: FrozenError(7),
    "AttributeError": lambda: AttributeError("no such", name="feed", obj=KINDS),
    "ImportError": lambda: ImportError("no such", name="feed", path="feed.py"),
    "UnicodeDecodeError": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    "SyntaxError": lambda: SyntaxError("bad", ("feed.py", 1, 2, "x y", 1, 3)),
    "group": lambda: ExceptionGroup(
        "several", [ValueError(1), ExceptionGroup("inner", [KeywordOnlyError(code=7), unreadable_file()])]
    ),
    "group of its own": lambda: CountedGroup("several", [ValueError(1), KeywordOnlyError(code=7)], 7),
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())


def the_frame_that_raised(error: BaseException) -> NoReturn:
    raise error


async def receive_error(stream: Subscription[Any]) -> BaseException:
    try:
        return BaseException(f"an event: {await stream.receive()!r}")
    except Exception as exc:
        return exc


async def errors_seen(error: Exception, subscribers: int = 2, times: int = 1) -> list[list[BaseException]]:
    """Let a source raise *error*, and give what each subscriber sees, time after time."""

    async def source() -> AsyncGenerator[None, None]:
        yield the_frame_that_raised(error)

    streams: list[Subscription[None]] = []
    async with SharedStreamManager() as manager:
        for _ in range(subscribers):
            streams.append(manager.subscribe(SharedSource(key="feed", open=source)))
            await streams[-1].__aenter__()
        return [[await receive_error(stream) for _ in range(times)] for stream in streams]


def members(error: BaseException) -> list[BaseException]:
    """The exception, its members, theirs, and so on."""
    return [error, *(deep for member in getattr(error, "exceptions", ()) for deep in members(member))]


def frames(error: BaseException) -> list[str]:
    return [frame.name for frame in traceback.extract_tb(error.__traceback__)]


def described(error: BaseException) -> list[Any]:
    """All that can be read off an exception without comparing identities."""
    names = ("errno", "strerror", "filename", "filename2", "name", "path", "reason", "code", "text", "end_offset", "message")
    return [
        (type(member), str(member), repr(member), [getattr(member, name, None) for name in names], repr(vars(member)))
        for member in members(error)
    ]


@every_kind
async def test_every_subscriber_sees_the_type_the_arguments_and_the_attributes(make: Callable[[], Exception]) -> None:
    error = make()
    expected = described(error)
    for (seen,) in await errors_seen(error):
        assert described(seen) == expected
        assert seen.args == error.args or isinstance(error, ExceptionGroup)


@every_kind
async def test_every_subscriber_has_an_exception_of_its_own(make: Callable[[], Exception]) -> None:
    error = make()
    (one,), (two,) = await errors_seen(error)
    everything = [*members(error), *members(one), *members(two)]
    assert len({id(member) for member in everything}) == len(everything)


@every_kind
async def test_what_one_subscriber_notes_on_its_exception_is_not_seen_in_another(make: Callable[[], Exception]) -> None:
    error = make()
    for member in members(error):
        object.__setattr__(member, "__notes__", ["the source's"])
    (one,), (two,) = await errors_seen(error)
    for member in members(one):
        member.__notes__.append("one's")
    for member in members(one):
        assert member.__notes__ == ["the source's", "one's"]
    for member in [*members(two), *members(error)]:
        assert member.__notes__ == ["the source's"]


@every_kind
async def test_the_traceback_leads_into_the_source_and_through_no_other_subscriber(make: Callable[[], Exception]) -> None:
    (one,), (two,) = await errors_seen(make())
    for seen in (one, two):
        assert frames(seen)[-1] == "the_frame_that_raised"
        assert frames(seen).count("receive_error") == 1


@every_kind
async def test_receiving_again_does_not_make_the_traceback_longer(make: Callable[[], Exception]) -> None:
    (seen,) = await errors_seen(make(), subscribers=1, times=10)
    assert len({tuple(frames(error)) for error in seen}) == 1
    assert "the_frame_that_raised" in frames(seen[-1])


async def test_an_exception_that_cannot_be_copied_is_seen_as_itself() -> None:
    error = UniqueError()
    seen = await errors_seen(error, times=10)
    assert {id(exc) for each in seen for exc in each} == {id(error)}
    assert frames(error)[-1] == "the_frame_that_raised"
    assert frames(error).count("receive_error") == 1


async def test_the_cause_is_seen() -> None:
    error, cause = ValueError("broken"), OSError("underneath")
    error.__cause__ = cause
    for (seen,) in await errors_seen(error):
        assert seen.__cause__ is cause
        assert seen.__suppress_context__


async def test_the_context_is_seen() -> None:
    error, context = ValueError("broken"), OSError("while handling this")
    error.__context__ = context
    for (seen,) in await errors_seen(error):
        assert seen.__context__ is context
        assert not seen.__suppress_context__


async def test_the_context_that_one_subscriber_adds_is_not_seen_in_another() -> None:
    def handle(error: BaseException) -> None:
        try:
            raise LookupError("one's own")
        except LookupError:
            raise error  # noqa: B904 - the context is what is looked at

    error = ValueError("broken")
    (one,), (two,) = await errors_seen(error)
    with pytest.raises(ValueError, match="broken"):
        handle(one)
    assert isinstance(one.__context__, LookupError)
    assert two.__context__ is error.__context__ is None


async def test_each_repetition_is_an_exception_of_its_own() -> None:
    ((first, second),) = await errors_seen(ValueError("broken"), subscribers=1, times=2)
    first.add_note("the first")
    assert not hasattr(second, "__notes__")


async def test_a_failure_of_a_task_group_inside_the_source_is_seen_as_its_exception_group() -> None:
    async def child() -> None:
        the_frame_that_raised(ValueError("a child's"))

    async def source() -> AsyncGenerator[str, None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child)
            yield "event"
            await anyio.sleep_forever()

    async with SharedStreamManager() as manager, manager.subscribe(SharedSource(key="feed", open=source)) as stream:
        assert await stream.receive() == "event"
        with pytest.raises(ExceptionGroup) as caught:
            await stream.receive()
    (member,) = caught.value.exceptions
    assert repr(member) == 'ValueError("a child\'s")'
    assert frames(member)[-1] == "the_frame_that_raised"
