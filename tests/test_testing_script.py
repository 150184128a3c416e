"""`ScriptedSource` plays what its script says, and remembers what was done with it."""

from __future__ import annotations

import math
import threading
from typing import Any

import anyio
import pytest

from anyio_sharedstream import PollTerminated, Restart, SharedStreamManager
from anyio_sharedstream.testing import End, Pause, Raise, ScriptedSource, run

on_both = pytest.mark.parametrize("backend", ["asyncio", "trio"])


async def take(manager: SharedStreamManager, source: ScriptedSource, **policies: Any) -> tuple[list[tuple[float, Any]], Any]:
    """Everything that a subscriber gets, with the time of each event, and what ended it."""
    got: list[tuple[float, Any]] = []
    async with manager.subscribe(source.source(**policies)) as stream:
        while True:
            try:
                event = await stream.receive()
            except Exception as exc:
                return got, exc
            got.append((anyio.current_time(), event))


@on_both
def test_events_pauses_and_the_end_are_played_in_their_order(backend: str) -> None:
    source = ScriptedSource("a", "b", Pause(2), "c", Pause(0.5), None, End(), "never")

    async def main() -> None:
        async with SharedStreamManager() as manager:
            got, error = await take(manager, source)
            assert got == [(0, "a"), (0, "b"), (2, "c"), (2.5, None)]
            assert isinstance(error, PollTerminated)

    run(main, backend=backend)
    assert (source.opened, source.closed, source.open_now, source.most_open, source.yielded) == (1, 1, 0, 1, 4)


@on_both
def test_a_script_without_an_end_goes_on_until_it_is_cancelled(backend: str) -> None:
    source = ScriptedSource(1, key="prices")

    async def main() -> None:
        async with SharedStreamManager() as manager:
            with anyio.move_on_after(50):
                await take(manager, source)
            assert anyio.current_time() == 50
            assert not manager.statistics().groups

    run(main, backend=backend)
    assert source.key == "prices"
    assert (source.opened, source.closed) == (1, 1)


@on_both
def test_a_pause_may_wait_for_a_gate(backend: str) -> None:
    async def main() -> None:
        gate = anyio.Event()
        source = ScriptedSource(Pause(gate), 1)
        async with SharedStreamManager() as manager, manager.subscribe(source.source()) as stream:
            await anyio.sleep(7)
            with pytest.raises(anyio.WouldBlock):
                stream.receive_nowait()
            assert source.open_now == 1
            gate.set()
            assert await stream.receive() == 1

    run(main, backend=backend)


@on_both
def test_each_opening_plays_the_next_script_and_then_the_last_again(backend: str) -> None:
    error = OSError("no connection")
    source = ScriptedSource(opening=[Pause(1), Raise(error)]).then(1, Raise(error)).then(2, Pause(1), Raise(error))

    async def main() -> None:
        async with SharedStreamManager() as manager:
            restart = Restart(initial_delay=1, factor=1, jitter=0, max_restarts=3)
            got, terminal = await take(manager, source, restart=restart)
            # One second for the opening that fails, and one before each restart.
            assert got == [(2, 1), (3, 2), (5, 2)]
            assert type(terminal) is OSError

    run(main, backend=backend)
    assert (source.opened, source.closed, source.most_open) == (4, 4, 1)


@on_both
def test_an_error_that_is_raised_again_and_again_does_not_grow(backend: str) -> None:
    error = OSError("no connection")
    source = ScriptedSource(Raise(error))

    async def depth() -> int:
        async with SharedStreamManager() as manager:
            await take(manager, source)
        count, traceback = 0, error.__traceback__
        while traceback is not None:
            count, traceback = count + 1, traceback.tb_next
        return count

    assert run(depth, backend=backend) == run(depth, backend=backend) > 0


@on_both
@pytest.mark.parametrize("fails", [False, True])
def test_a_slow_or_failing_clean_up_takes_its_time_and_counts_as_closed_then(backend: str, fails: bool) -> None:
    source = ScriptedSource(1, closing=[Pause(5), *[Raise(OSError("while closing"))] * fails])

    async def main() -> None:
        async with SharedStreamManager() as manager:
            stream = await manager.subscribe(source.source()).__aenter__()
            await stream.receive()
            with anyio.move_on_after(2):
                await stream.aclose()
            assert anyio.current_time() == 2
            assert (source.open_now, source.closed) == (1, 0)
        assert anyio.current_time() == 5
        assert (source.open_now, source.closed) == (0, 1)

    run(main, backend=backend)


def test_sources_without_a_key_share_nothing() -> None:
    one, other = ScriptedSource(), ScriptedSource()
    assert one.source() == one.source()
    assert one.source().key != other.source().key


def test_how_many_are_open_at_once_is_known() -> None:
    source = ScriptedSource(1)

    async def main() -> None:
        async with source.source().open() as first, source.source().open() as second:  # type: ignore[union-attr]
            assert [await anext(aiter(first)), await anext(aiter(second))] == [1, 1]
            assert source.open_now == 2

    run(main)
    assert (source.most_open, source.open_now) == (2, 0)


def test_what_is_no_step_is_refused_where_events_have_no_place() -> None:
    with pytest.raises(TypeError, match="not of 5"):
        ScriptedSource(opening=[Pause(1), 5])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="not of End"):
        ScriptedSource().then(closing=[End()])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="not of ValueError"):
        ScriptedSource(opening=ValueError())  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [Pause, Raise, End])
def test_a_class_is_no_step(step: Any) -> None:
    with pytest.raises(TypeError, match=rf"write {step.__name__}\(\.\.\.\)"):
        ScriptedSource(1, step)
    assert ScriptedSource(int, str).then(float).opened == 0  # of other classes it is an event


@pytest.mark.parametrize("error", [ValueError, "lost", None])
def test_what_cannot_be_raised_is_refused_at_once(error: Any) -> None:
    with pytest.raises(TypeError, match="an instance of an exception"):
        Raise(error)


@pytest.mark.parametrize("until", [-1, math.nan])
def test_a_pause_that_cannot_be_is_refused_at_once(until: float) -> None:
    with pytest.raises(ValueError, match="at least 0 seconds"):
        Pause(until)


@pytest.mark.parametrize("until", ["1", None, anyio.Event, threading.Event()])
def test_what_cannot_be_waited_for_is_refused_at_once(until: Any) -> None:
    with pytest.raises(TypeError, match="something with an asynchronous wait"):
        Pause(until)
