"""Whatever is published and however it is received, each policy gives its subscriber exactly what `tests.policies_model` says."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import anyio
import pytest
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint
from hypothesis import example, given
from hypothesis import strategies as st

from anyio_sharedstream import Conflate, DropNewest, DropOldest, Fail, Latest, PollTerminated, SharedSource, SharedStreamManager
from tests.conftest import BACKENDS
from tests.policies_model import POISON, POLICIES, Event, Expected, even, seen, symbol
from tests.properties import on_each
from tests.support import idle, settle, until
from tests.sweep import noted, nothing_left

TURN = 64
BOUNDS = [1, 2, 8, 64, 100]
Way = str | int  # how to receive: by the name of a method, or in batches of a size
WAYS: list[Way] = ["receive", "receive_nowait", "__anext__", 1, 7, 100]
Action = tuple[Any, ...]  # the name of a method of `Play`, and its arguments


class SourceError(Exception):
    """What the source raises."""


@dataclass(eq=False)
class Handle:
    """A subscription, what it must do, and the scope of the task that reads it."""

    stream: Any
    expected: Expected
    reader: anyio.CancelScope | None = None
    waits: bool = False
    """whether that is receiving just now"""


class Play:
    """Plays a program on the library and on the model at once. The public methods are its actions."""

    def __init__(self, manager: SharedStreamManager, tasks: TaskGroup) -> None:
        self.handles: list[Handle] = []
        self._manager = manager
        self._tasks = tasks
        self._source = SharedSource(key="feed", open=self._run)
        self._script: list[Any] = []
        self._news = anyio.Event()
        self._numbers = count()
        self._gathered: list[Event] = []
        self._turn = 0
        self._open = False
        self._rests = False

    async def act(self, action: Action) -> None:
        with noted(action):
            await getattr(self, action[0])(*action[1:])
            await until(lambda: self._rests or not self._open)
            await settle()
            for handle in self.handles:
                with noted(handle.expected):
                    assert seen(handle.stream.statistics()) == handle.expected.seen()

    # The source.

    async def _run(self) -> AsyncGenerator[Event, None]:
        self._open = True
        self._script.clear()
        self._news = anyio.Event()
        try:
            while True:
                self._rests = True
                await self._news.wait()
                self._rests = False
                self._news = anyio.Event()
                yielded = 0
                while self._script:
                    match self._script.pop(0):
                        case "suspend":
                            self._publish(turn_ends=True)
                            yielded = 0
                            await checkpoint()
                        case "fail":
                            self._end(SourceError("feed"))
                            raise SourceError("feed")
                        case "return":
                            self._end(PollTerminated("feed", ""))
                            return
                        case Expected() as expected:
                            await self._enter(expected)
                        case burst:
                            times, spread = burst
                            for number in [next(self._numbers) for _ in range(times)]:
                                event = number % spread if spread else POISON, number
                                self._gathered.append(event)
                                if (yielded := yielded + 1) % TURN == 0:  # it is made to let the others run
                                    self._publish(turn_ends=True)
                                yield event
                self._publish(turn_ends=True)
        finally:
            self._open = False

    def _publish(self, *, turn_ends: bool) -> None:
        for handle in self.handles:
            handle.expected.publish(self._gathered, self._turn)
        self._gathered.clear()
        self._turn += turn_ends

    def _end(self, ending: BaseException) -> None:
        self._publish(turn_ends=True)
        for handle in self.handles:
            handle.expected.end(ending)

    async def publish(self, *script: Any) -> None:
        if self._open:
            self._script += script
            self._news.set()

    # Subscribers.

    async def enter(self, *contract: Any) -> None:
        await self._enter(Expected(*contract))
        await until(lambda: self._open)

    async def _enter(self, expected: Expected) -> None:
        """Register, unless that would open another upstream in the middle of a step of this one."""
        self._publish(turn_ends=False)  # who joins starts after that, if anybody is left by then
        if self._rests or not self._open or any(handle.expected.ending is None for handle in self.handles):
            expected = replace(expected, buffer=[])  # hypothesis plays the same program again
            asked: Any = {"where": expected.where, "gaps": expected.gaps, "overflow": expected.policy}
            stream: Any = self._manager.subscribe(self._source, max_buffer_size=expected.bound, **asked)
            await stream.__aenter__()
            self.handles.append(Handle(stream, expected))

    async def close(self, index: int) -> None:
        handle = self._handle(index)
        handle.expected.end(anyio.ClosedResourceError(), drop=True)
        handle.expected.ending = anyio.ClosedResourceError()
        await handle.stream.aclose()

    async def stop(self) -> None:
        self._end(anyio.EndOfStream())
        await self._manager.stop("feed")

    def _handle(self, index: int) -> Handle:
        return self.handles[index % len(self.handles)]

    # Receiving.

    async def receive(self, index: int, way: Way, times: int) -> None:
        """Receive what there is, so many times at most."""
        handle = self._handle(index)
        if handle.waits:
            with pytest.raises(anyio.BusyResourceError):
                await by(handle.stream, way)
            return
        with anyio.CancelScope() as scope:
            for _ in range(times):
                if not handle.expected.buffer and handle.expected.ending is None and way != "receive_nowait":
                    scope.cancel()  # there is nothing, and cancelling takes nothing
                if not await self._take(handle, way):
                    break

    async def read(self, index: int, way: Way, pace: int) -> None:
        """Have a task receive until the end, which lets the others run so many times after each reception."""
        handle = self._handle(index)
        if handle.reader is None and handle.expected.ending is None:
            handle.reader = anyio.CancelScope()
            self._tasks.start_soon(self._read, handle, handle.reader, way, pace)

    async def _read(self, handle: Handle, scope: anyio.CancelScope, way: Way, pace: int) -> None:
        try:
            with scope:
                while await self._take(handle, "receive" if way == "receive_nowait" else way):
                    for _ in range(pace):
                        await checkpoint()
        finally:
            handle.reader = None

    async def cancel(self, index: int) -> None:
        reader = self._handle(index).reader
        if reader is not None:
            reader.cancel()

    async def _take(self, handle: Handle, way: Way) -> bool:
        """Receive once; False if that was the end, or there was nothing."""
        expected = handle.expected
        handle.waits = True
        try:
            got = await by(handle.stream, way)
        except anyio.WouldBlock:
            assert not expected.buffer
            assert expected.ending is None
            return False
        except Exception as exc:
            assert not expected.buffer
            end = anyio.EndOfStream() if isinstance(exc, StopAsyncIteration) else exc
            assert type(end) is type(expected.ending)
            return False
        finally:
            handle.waits = False
        assert got == expected.take(way if isinstance(way, int) else 1)
        return True


async def by(stream: Any, way: Way) -> list[Any]:
    if isinstance(way, int):
        return list(await (stream.receive_batch(way) if way < TURN else anext(stream.batches(way))))
    item = getattr(stream, way)()
    return [item if way == "receive_nowait" else await item]


async def play(program: list[Action]) -> None:
    async with nothing_left():
        async with anyio.create_task_group() as tasks:
            async with SharedStreamManager() as manager:
                playing = Play(manager, tasks)
                for action in program:
                    await playing.act(action)
                await playing.act(("stop",))
                for index in range(len(playing.handles)):
                    await until(lambda handle=playing.handles[index]: handle.reader is None)  # type: ignore[misc]
                    for way in WAYS:
                        await playing.act(("receive", index, way, 1000))
            tasks.cancel_scope.cancel()
        assert idle(manager)


def action(name: str, *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Action]:
    return st.tuples(st.just(name), *arguments)


contracts = (st.sampled_from(POLICIES), st.sampled_from(BOUNDS), st.sampled_from([None, even]), st.booleans())
indices = st.integers(0, 7)
ways = st.sampled_from(WAYS)
bursts = st.tuples(st.sampled_from([1, 1, 2, 3, 7, 20, 63, 64, 65, 130]), st.sampled_from([1, 2, 5, 60, 1000]))
rare = st.sampled_from(["fail", "return", (1, 0)])
joins = st.builds(Expected, *contracts)
# Mostly small, or else all who may fail have failed soon.
steps = st.one_of(bursts, bursts, bursts, st.just("suspend"), st.just("suspend"), joins)
publications = st.lists(steps, min_size=1, max_size=6).map(lambda script: ("publish", *script))
endings = st.tuples(bursts, rare).map(lambda script: ("publish", *script))
receptions = action("receive", indices, ways, st.sampled_from([1, 2, 5, 64, 65, 1000]))
actions = st.one_of(
    *(6 * [publications]),
    *(4 * [receptions]),
    *(2 * [action("read", indices, ways, st.sampled_from([0, 0, 1, 5]))]),
    action("cancel", indices),
    action("enter", *contracts),
    st.sampled_from([0, 1, 2, 3, 4, 5, None]).map(lambda index: ("cancel", 0) if index is None else ("close", index)),
    endings,
    action("stop"),
)
programs = st.builds(
    lambda first, others: [*first, *others],
    st.tuples(*(action("enter", st.just(policy), *contracts[1:]) for policy in POLICIES)),
    st.lists(actions, min_size=5, max_size=25),
)


BUSY: list[Action] = [("enter", Latest(), 1, None, True), ("read", 0, "receive", 0), ("receive", 0, 7, 1), ("cancel", 0)]
# What was published in the same turn, and not yet given to anybody, is the end of the only one there is.
LEFT: list[Action] = [("enter", Conflate(symbol), 1, None, True), ("publish", (1, 1), "suspend", (2, 9), Expected(Fail(), 1))]
# Programs that found something: a hole in a full buffer, a turn in two parts, a refusal before a predicate that raises.
HOLE: list[Action] = [("enter", DropNewest(), 64, None, True), ("publish", (1, 1), "suspend", (64, 1), "suspend", (64, 1))]
PARTS: list[Action] = [
    ("enter", DropOldest(), 2, None, True),
    ("publish", (1, 1), "suspend", (4, 1), Expected(Fail(), 1), (4, 1)),
    ("receive", 0, 7, 1),
]
REFUSED: list[Action] = [("enter", DropOldest(), 8, even, True), ("publish", (2, 2), (1, 0))]


@on_each(BACKENDS, max_examples=100)
@given(program=programs)
@example(program=BUSY)
@example(program=LEFT)
@example(program=HOLE)
@example(program=PARTS)
@example(program=REFUSED)
def test_a_program_receives_what_the_model_says(backend: tuple[str, dict[str, Any]], program: list[Action]) -> None:
    name, options = backend
    anyio.run(partial(play, program), backend=name, backend_options=options)
