"""`cancel_sweep`: cancel a scenario before its k-th step, for every k and in every way.

Relies on anyio alone. A step is what a scenario does between two suspensions. The scenario is driven by hand inside a real
task, so that it is known when it is about to suspend and about to go on, and a cancellation can be placed exactly there.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Collection, Coroutine, Generator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import anyio

from anyio_sharedstream.testing._waiting import driven_by_hand, keep

__all__ = ["CancelWay", "Scenario", "SweptRun", "cancel_sweep"]

CancelWay: TypeAlias = Literal["scope", "scope-woken", "native", "native-woken"]
"""How a scenario is cancelled: its cancel scope as it suspends, or as it goes on; its asyncio task while it is suspended, or
between its wake-up and its next step."""

_WORDS: dict[CancelWay, str] = {
    "scope": "its cancel scope, as it suspends",
    "scope-woken": "its cancel scope, as it goes on",
    "native": "its asyncio task, while it is suspended",
    "native-woken": "its asyncio task, after its wake-up",
}

Body: TypeAlias = Callable[[], Coroutine[Any, Any, object]]
Scenario: TypeAlias = Callable[[], Coroutine[Any, Any, object] | AbstractAsyncContextManager[Body]]
"""What is swept: an async function without arguments, or one made with `contextlib.asynccontextmanager` that yields such a
function. What such a manager does before and after its ``yield`` is run each time, and not cancelled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweptRun:
    """One run of a scenario."""

    way: CancelWay
    """how it was cancelled"""
    step: int
    """before which of its steps, counted from 1"""
    completed: bool
    """whether it ran to its end: because it is shorter, or because the cancellation did not stop it"""
    cancelled: bool
    """whether it got as far as to be cancelled"""


async def cancel_sweep(
    scenario: Scenario,
    check: Callable[[SweptRun], object] | None = None,
    *,
    ways: Collection[CancelWay] | None = None,
    max_steps: int = 1000,
) -> int:
    """Run a scenario again and again, cancelled before its first step, its second, and so on, in every way there is.

    For each way to cancel, it goes on until a run completes that was not cancelled. A step is what the scenario's own task does
    between two suspensions; tasks that the scenario starts run as ever. Whatever a run raises leaves the sweep as itself, with
    a note that says which run it was. Called from a task of a running event loop; if what is swept waits for time to pass,
    `run` makes that quick, and turns a scenario that hangs into a `Deadlock`.

    :param scenario: an async function without arguments, called for each run; or an async context manager that yields one, for
        a scenario with a set-up and a tear-down that are not cancelled
    :param check: called after each run, and awaited if it gives something to await; it raises if something is wrong
    :param ways: some of "scope", "scope-woken", "native" and "native-woken"; None for all that the event loop has. The native
        ones, `asyncio.Task.cancel`, are those of asyncio alone
    :param max_steps: how many steps a scenario may have, and how many it may take after it was cancelled
    :returns: how many steps the completed run took that took the fewest, so that a test can show that it has swept something
    :raises ValueError: there is no such way, or not on this event loop
    :raises AssertionError: the scenario has more than *max_steps* steps, or goes on for so many after it was cancelled
    """
    steps = [await _sweep(scenario, check, way, max_steps) for way in _choose(ways)]
    return min(steps)


def _choose(ways: Collection[CancelWay] | None) -> list[CancelWay]:
    on_asyncio = anyio.get_cancelled_exc_class() is asyncio.CancelledError
    known: list[CancelWay] = [way for way in get_args(CancelWay) if on_asyncio or not way.startswith("native")]
    if ways is None:
        return known
    unknown = [way for way in ways if way not in known]
    if unknown or not ways or isinstance(ways, str):
        raise ValueError(f"ways must be some of {known} on this event loop, not {ways!r}")
    return [way for way in known if way in ways]


async def _sweep(scenario: Scenario, check: Callable[[SweptRun], object] | None, way: CancelWay, max_steps: int) -> int:
    for step in range(1, max_steps + 2):
        cut = Cut(way, step, max_steps)
        try:
            await _try(scenario, check, cut)
        except BaseException as exc:
            exc.add_note(
                f"cancelled before step {step}: {_WORDS[way]}" if cut.reached else f"not cancelled: it had no step {step}"
            )
            raise
        if not cut.reached:
            return cut.steps
    raise AssertionError(f"the scenario has more than max_steps={max_steps} steps")


async def _try(scenario: Scenario, check: Callable[[SweptRun], object] | None, cut: Cut) -> None:
    made = scenario()
    if isinstance(made, AbstractAsyncContextManager):
        async with made as body:
            await cut.run(_coroutine(body()))
    else:
        await cut.run(_coroutine(made))
    if check is not None:
        answer = check(SweptRun(way=cut.way, step=cut.step, completed=cut.completed, cancelled=cut.reached))
        if inspect.isawaitable(answer):
            await answer


def _coroutine(made: object) -> Coroutine[Any, Any, object]:
    if not isinstance(made, Coroutine):
        raise TypeError(f"a scenario is an async function, or an async context manager that yields one; this one gave {made!r}")
    return made


class Cut:
    """One run of a scenario, cancelled before the given step if it gets that far."""

    def __init__(self, way: CancelWay, step: int, patience: int = 1000) -> None:
        self.way = way
        self.step = step
        self._patience = patience
        self._stuck: AssertionError | None = None
        self.steps = 0
        """steps that the scenario has begun"""
        self.reached = False
        """whether the cancellation has been requested"""
        self.completed = False
        """whether the scenario ran to its end"""

    async def run(self, scenario: Coroutine[Any, Any, object]) -> None:
        """Run the scenario to its end or its cancellation."""
        try:
            if self.way in ("native", "native-woken"):
                self._task = asyncio.get_running_loop().create_task(self._watch(scenario))
                await _finish(self._task)
            elif anyio.get_cancelled_exc_class() is asyncio.CancelledError:
                # In a task of its own as well: one that is given up may leave it in a scope that nobody can leave any more.
                task = asyncio.get_running_loop().create_task(self._scoped(scenario))
                await _finish(task)
                task.result()  # also a cancellation, if that is not of the scope
            else:
                await self._scoped(scenario)
        except BaseException:
            if self._stuck is not None:
                raise self._stuck from None  # what leaving the scope says of scopes within it follows from that
            raise

    async def _scoped(self, scenario: Coroutine[Any, Any, object]) -> None:
        with anyio.CancelScope() as self._scope:
            await self._watch(scenario)

    async def _watch(self, scenario: Coroutine[Any, Any, object]) -> None:
        await _Driven(self, scenario)
        self.completed = True

    def suspends(self, signal: Any) -> None:
        """The scenario is about to suspend (or to start)."""
        if self.steps + 1 != self.step or self.way == "scope-woken":
            return
        self.reached = True
        if self.way == "scope":
            self._scope.cancel()
        elif self.steps == 0:
            self._task.cancel()
        elif self.way == "native-woken" and signal is not None:
            # Added before the task's own callback, so that this runs between its wake-up and its next step.
            signal.add_done_callback(lambda _: self._task.cancel())
        else:
            asyncio.get_running_loop().call_soon(self._task.cancel)

    def goes_on(self) -> None:
        """The scenario is about to take a step."""
        self.steps += 1
        if self.reached and self.steps > self.step + self._patience:
            self._stuck = AssertionError(
                f"the scenario has gone on for {self._patience} steps after it was cancelled: does it swallow the cancellation?"
            )
            raise self._stuck
        if self.steps == self.step and self.way == "scope-woken":
            self.reached = True
            self._scope.cancel()


async def _finish(task: asyncio.Task[None]) -> None:
    """Wait for a task; raises what that raises, cancellations aside. If this is cancelled, so is the task."""
    try:
        await asyncio.wait([task])
    except BaseException:
        task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.wait([task])
        raise
    if not task.cancelled():
        task.result()


class _Driven(Awaitable[None]):
    def __init__(self, cut: Cut, scenario: Coroutine[Any, Any, object]) -> None:
        self._cut = cut
        self._scenario = scenario

    def __await__(self) -> Generator[Any, Any, None]:
        scenario = self._scenario
        resume: Callable[[], Any] = partial(scenario.send, None)
        self._cut.suspends(None)
        while True:
            try:
                self._cut.goes_on()
            except AssertionError:
                _abandon(scenario)
                raise
            try:
                signal = resume()
            except StopIteration:
                return
            self._cut.suspends(signal)
            try:
                resume = partial(scenario.send, (yield signal))
            except BaseException as exc:
                resume = partial(scenario.throw, exc)


def _abandon(scenario: Coroutine[Any, Any, object]) -> None:
    try:
        scenario.close()
    except RuntimeError:  # it goes on even now
        keep([scenario])


driven_by_hand(_Driven.__await__.__code__, "scenario")
