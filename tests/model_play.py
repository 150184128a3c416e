"""Plays a program on the library and on its model, `tests.model`, at once, and compares the two after every action."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import pytest
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from anyio_sharedstream import PollTerminated, SharedSource, SharedStreamManager, SubscriberOverflow, Subscription
from tests.model import TURN, Event, Model, Opening, SourceError, Sub, seen_group, seen_subscription
from tests.support import settle, until
from tests.sweep import noted

KEYS = (0, 1)
ENDINGS = (anyio.EndOfStream, anyio.ClosedResourceError, PollTerminated, SubscriberOverflow, SourceError, StopAsyncIteration)

Way = str | int  # how to receive: by the name of a method, or in batches of a size
WAYS: list[Way] = ["receive", "receive_nowait", "__anext__", 1, 7, 100]
Action = tuple[Any, ...]  # the name of a method of `Play`, and its arguments
Step = int | str | Action  # what a source does: yield so many events, something that has a name, or an action


class Upstream:
    """A source that plays a script, tells the model of it, and goes on where the opening before it was left.

    It cleans up inside the generator, where its end cannot be seen until that is done, or *apart*: after the generator has ended.
    """

    def __init__(self, key: int, play: Play, apart: bool) -> None:
        self.source = SharedSource(key=key, open=self._connect if apart else self._run)
        self.script: list[Step] = []
        self.news = anyio.Event()
        self.gate: anyio.Event | None = None
        self.held = False
        self.left_by: list[BaseException] = []
        self._key = key
        self._play = play
        self._apart = apart
        self._opening: Opening

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[AsyncIterator[Event]]:
        try:
            yield self._run()
        finally:
            await self._clean_up()

    async def _clean_up(self) -> None:
        if self.gate is not None:
            self.held = True
            self._play.model.suspend(self._opening)
            with anyio.CancelScope(shield=True):
                await self.gate.wait()
        self._opening.open = False

    async def _run(self) -> AsyncGenerator[Event, None]:
        model = self._play.model
        try:
            self._opening = opening = model.opens(self._key)
            how: BaseException | None = None
            try:
                while "return" not in self.script[:1]:
                    step = self.script.pop(0) if self.script else "wait"
                    if isinstance(step, int):
                        for _ in range(step):
                            yield model.gather(opening)
                    elif isinstance(step, tuple):
                        await self._play.act(step)
                    elif step == "fail":
                        raise SourceError(opening.number)
                    else:
                        model.suspend(opening)
                        self.news = anyio.Event()
                        await (checkpoint() if step == "suspend" else self.news.wait())
                del self.script[0]
            except BaseException as exc:
                how = exc
                raise
            finally:
                if not self._apart:
                    await self._clean_up()
                model.ends(opening, how)
        except BaseException as exc:
            self.left_by.append(exc)  # an assertion that has failed in here must not pass for an ending
            raise


@dataclass(eq=False)
class Handle:
    """A subscription, what the model knows of it, and the scope of whoever is receiving from it."""

    stream: Subscription[Event]
    sub: Sub
    receiver: anyio.CancelScope | None = None
    last: bool = False


class Play:
    """Plays a program. The public methods but `check` are its actions."""

    def __init__(self, manager: SharedStreamManager, tasks: TaskGroup) -> None:
        self.model = Model()
        self.left = False
        self.handles: list[Handle] = []
        self.upstreams = [Upstream(key, self, apart=key == 1) for key in KEYS]
        self._manager = manager
        self._tasks = tasks

    async def act(self, action: Action) -> None:
        with noted(action):
            await getattr(self, action[0])(*action[1:])
            self.check()

    def check(self) -> None:
        statistics = self._manager.statistics()
        groups = {key: seen_group(group) for key, group in statistics.groups.items()}
        assert groups == {key: opening.seen() for key, opening in self.model.accepting.items()}
        closing = Counter(map(seen_group, statistics.closing))
        assert closing <= Counter(opening.seen() for opening in self.model.evicted())
        assert closing >= Counter(opening.seen() for opening in self.model.evicted() if opening.open)
        for handle in self.handles:
            handle.sub.check()
            assert seen_subscription(handle.stream.statistics()) == handle.sub.seen()
        left_by = [exc for upstream in self.upstreams for exc in upstream.left_by]
        assert all(isinstance(exc, (SourceError, anyio.get_cancelled_exc_class())) for exc in left_by)

    def _handle(self, index: int) -> Handle:
        return self.handles[index % len(self.handles)]

    # Subscribers.

    async def enter(self, key: int, name: int, bound: int) -> None:
        stream = self._manager.subscribe(self.upstreams[key].source, subscriber_id=name, max_buffer_size=bound)
        sub = None if self.left else self.model.enter(key, name, bound)
        if sub is None:
            # While the manager is being left, it is a source that comes here. For one that is cancelled, refusal is a checkpoint.
            for opening in self.model.evicted():
                self.model.suspend(opening)
            with pytest.raises(RuntimeError, match="being left" if self.left else "already has a subscriber"):
                await stream.__aenter__()
        else:
            await stream.__aenter__()
            self.handles.append(Handle(stream, sub))

    async def close(self, index: int) -> None:
        handle = self._handle(index)
        handle.last |= self.model.close(handle.sub)
        handle.stream.close()

    async def aclose(self, index: int) -> None:
        """Beside the program, for whoever leaves last waits for the upstream, which may be held back."""
        self._tasks.start_soon(self._aclose, self._handle(index))

    async def _aclose(self, handle: Handle) -> None:
        handle.last |= self.model.close(handle.sub)
        await handle.stream.aclose()
        if handle.last:
            assert not handle.sub.opening.open
            self.model.told(handle.sub.opening)
        self.check()

    # Receiving.

    async def receive(self, index: int, way: Way, count: int, impatient: bool = False) -> None:
        """Receive what there is, so many times at most; *impatient* inside a scope that is cancelled already."""
        with anyio.CancelScope() as scope:
            if impatient:
                scope.cancel()
            await self._receive(self._handle(index), way, scope, count)

    async def read(self, index: int, way: Way) -> None:
        """Have a task receive until the subscription ends, or the task is cancelled."""
        self._tasks.start_soon(self._read, self._handle(index), way)

    async def _read(self, handle: Handle, way: Way) -> None:
        with anyio.CancelScope() as scope:
            await self._receive(handle, way, scope)

    async def cancel(self, index: int) -> None:
        """Cancel the task that is receiving."""
        handle = self._handle(index)
        if handle.receiver is not None:
            handle.receiver.cancel()
            handle.sub.keeps_up = False

    async def _receive(self, handle: Handle, way: Way, scope: anyio.CancelScope, count: int | None = None) -> None:
        if handle.receiver is None:
            handle.receiver = scope
            try:
                while count != 0 and await self._take(handle, way, scope, wait=count is None):
                    count = None if count is None else count - 1
            finally:
                handle.receiver = None
                handle.sub.keeps_up = False
        elif not handle.receiver.cancel_called:
            # It lets nobody else run unless it waits. (One that is cancelled may be about to go on for its cancellation only.)
            with pytest.raises(anyio.BusyResourceError):
                await by(handle.stream, way)

    async def _take(self, handle: Handle, way: Way, scope: anyio.CancelScope, *, wait: bool) -> bool:
        """Receive once; False if that was the end, or there was nothing."""
        sub = handle.sub
        if not sub.buffer:
            if not (wait or sub.ended or way == "receive_nowait"):
                scope.cancel()  # nobody may ever come to wake it
            sub.keeps_up = not scope.cancel_called
        try:
            events = await by(handle.stream, way)
        except anyio.WouldBlock:
            assert way == "receive_nowait"
            assert not sub.buffer
            assert not sub.ended
            return False
        except ENDINGS as exc:
            self._see_end(sub, exc)
            return False
        sub.take(events, way if isinstance(way, int) else 1)
        return True

    def _see_end(self, sub: Sub, exc: Exception) -> None:
        kind = anyio.EndOfStream if isinstance(exc, StopAsyncIteration) else type(exc)
        assert (kind, *exc.args, None)[:2] == sub.ending
        assert not sub.buffer
        if not sub.ended:
            self.model.told(sub.opening)  # one knows, so all know
        self.check()

    # Upstreams.

    async def source(self, key: int, *steps: Step) -> None:
        """Give the source of a key something to do, at the latest when it is opened next."""
        self.upstreams[key].script += steps
        self.upstreams[key].news.set()

    async def hold(self, key: int) -> None:
        """Let clean-ups of the key wait from now on."""
        upstream = self.upstreams[key]
        upstream.gate = upstream.gate or anyio.Event()

    async def release(self, *keys: int) -> None:
        for key in keys:
            upstream = self.upstreams[key]
            if upstream.gate is not None:
                upstream.gate.set()
                upstream.gate = None
                upstream.held = False

    async def stop(self, *keys: int) -> None:
        """Stop a key, or all if none is given; beside the program, as `aclose`."""
        self._tasks.start_soon(self.stop_and_wait, *keys)

    async def stop_and_wait(self, *keys: int) -> None:
        """Stop; by itself this is for sources, which may stop themselves."""
        self.model.stop(*(keys or KEYS))
        stopped = [opening for opening in self.model.evicted() if opening.key in (keys or KEYS)]
        await (self._manager.stop(*keys) if keys else self._manager.stop_all())
        for opening in stopped:
            assert not opening.open
            self.model.told(opening)
        self.check()

    # The loop.

    async def turns(self, count: int) -> None:
        await settle(count)

    async def rest(self) -> None:
        """Let everything come about that is to come about; nothing is on its way afterwards."""
        await until(lambda: all(self._rests(opening) for opening in self.model.openings))
        await settle()
        for opening in self.model.evicted():
            if not opening.open:
                self.model.told(opening)

    def _rests(self, opening: Opening) -> bool:
        """Whether an upstream that can open is open, has nothing more to do, and has closed if it is to; or is held back."""
        upstream = self.upstreams[opening.key]
        if opening.open:
            return upstream.held or not (opening.evicted or upstream.script)
        return opening.evicted or bool(self.model.open_upstreams(opening.key))

    def leave(self) -> None:
        """The manager is about to be left, which stops everything."""
        self.left = True
        self.model.stop(*KEYS)


async def by(stream: Subscription[Event], way: Way) -> list[Event]:
    if isinstance(way, int):
        return list(await (stream.receive_batch(way) if way < TURN else anext(stream.batches(way))))
    event = getattr(stream, way)()
    return [event if way == "receive_nowait" else await event]
