"""`check_source`: whether a user's own source does what the library relies on.

Relies on `_life` for one opening and on `_watchdog` for real time. Everything that is waited for has a limit in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import anyio
from anyio.lowlevel import checkpoint

from anyio_sharedstream import AckSource, SharedSource
from anyio_sharedstream._exceptions import without
from anyio_sharedstream.testing._life import InjectedFailureError, Life
from anyio_sharedstream.testing._watchdog import Interrupted, Watchdog

__all__ = ["Finding", "Openable", "Rule", "SourceNonconformance", "check_source"]

Rule: TypeAlias = Literal["opens", "reopens", "closes", "cancels", "cleans-up", "does-not-block", "takes-turns"]
"""What is asked of a source."""

_REMEDIES: dict[Rule, str] = {
    "opens": "check it against an upstream that is there, and give it more time with patience= if it needs that",
    "reopens": "let open() make everything anew: a generator, connection or stream for each call, and no state that outlives it",
    "closes": "bound its clean-up, for instance with anyio.move_on_after(seconds, shield=True)",
    "cancels": "let cancellations pass: catch Exception rather than BaseException, and raise "
    "anyio.get_cancelled_exc_class() again wherever it is caught",
    "cleans-up": "catch in the clean-up what may fail there; while it is cancelled, it may await only what is shielded",
    "does-not-block": "await an asynchronous call instead, or move the blocking one into anyio.to_thread.run_sync()",
    "takes-turns": "await something between events, for instance anyio.lowlevel.checkpoint()",
}


class Openable(Protocol):
    """Anything with the ``open`` of a `SharedSource`."""

    @property
    def open(self) -> Callable[[], Any]:
        """What `SharedSource.open` is."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong with a source."""

    rule: Rule
    """what it does not keep to"""
    detail: str
    """what was seen, and where"""
    remedy: str
    """what to do about it"""

    def __str__(self) -> str:
        return f"[{self.rule}] {self.detail}. Remedy: {self.remedy}."


class SourceNonconformance(AssertionError):  # noqa: N818  # the name says what it is
    """A source does not do what the library relies on. The message lists what was found, each with its remedy."""

    findings: tuple[Finding, ...]
    """what was found, no more than one for each rule"""

    def __init__(self, key: Hashable, findings: tuple[Finding, ...]) -> None:
        self.findings = findings
        super().__init__(f"the source {key!r} is not sound:" + "".join(f"\n- {finding}" for finding in findings))


async def check_source(
    source: SharedSource[Any] | Openable,
    *,
    events: int = 3,
    patience: float = 1.0,
    close_within: float = 1.0,
    max_block: float = 0.1,
    interrupt_after: float = 5.0,
    max_ready: int = 1000,
) -> None:
    """Open a source three times, one after the other, and raise if it does something that the library cannot cope with.

    The first opening is cancelled after some events or some time. The second is made to fail: an error is thrown into the
    generator at its ``yield``, or leaves the context manager. The third shows that it can be opened after that. A source must

    - open, and give events again if it has given any ("opens", "reopens");
    - end within *close_within* seconds when it is cancelled, or has failed ("closes");
    - neither give events nor go on waiting after it was cancelled ("cancels"), nor fail then ("cleans-up");
    - return to the event loop within *max_block* seconds, whenever it is resumed ("does-not-block");
    - give no more than *max_ready* events without a suspension ("takes-turns").

    If this call is cancelled, so is the source, which has *close_within* seconds then as well.

    :param source: a `SharedSource`, whose policies do not matter here, or anything with its ``open``
    :param events: how many events of the first opening are awaited
    :param patience: for how many seconds an opening is given time to open, and to yield its events
    :param close_within: after how many seconds an upstream that does not end is abandoned: its task is ended by force where that
        is possible, and otherwise left behind
    :param max_block: for how many seconds of real time it may keep the event loop
    :param interrupt_after: after how many seconds of real time a step that does not return is interrupted. A call of C code
        cannot be, so one that never returns is the one thing that this function does not survive
    :raises SourceNonconformance: with everything that was found
    :raises TypeError: it is no source, or an `AckSource`, which gives producers and not events
    """
    source = _plain(source)
    with Watchdog(max_block, interrupt_after) as watchdog:
        examination = _Examination(source, watchdog, patience, close_within)
        await examination.run(events, max_ready)
    examination.conclude(max_block)


def _plain(source: SharedSource[Any] | Openable) -> SharedSource[Any]:
    if isinstance(source, AckSource):
        raise TypeError(
            f"{source!r} gives producers: check what a producer's open_stream() gives, as a SharedSource with that open"
        )
    if isinstance(source, SharedSource):
        return source
    if not hasattr(source, "open"):
        raise TypeError(f"a source is a SharedSource, or has its open, unlike {source!r}")
    return SharedSource(key=getattr(source, "key", None) or repr(source), open=source.open)


class _Examination:
    def __init__(self, source: SharedSource[Any], watchdog: Watchdog, patience: float, close_within: float) -> None:
        self.findings: dict[Rule, Finding] = {}
        self._source = source
        self._watchdog = watchdog
        self._patience = patience
        self._close_within = close_within

    def found(self, rule: Rule, detail: str) -> None:
        self.findings.setdefault(rule, Finding(rule, detail, _REMEDIES[rule]))

    async def run(self, events: int, max_ready: int) -> None:
        first = await self._try(Life(self._source, self._watchdog, wanted=events, fail=False, max_ready=max_ready))
        if not first.open or (_failure(first) is not None and not first.events):
            self.found("opens", _what_came(first, self._patience))
            return
        previous = first
        for fail, when in ((True, "it was cancelled"), (False, "it has failed")):
            life = await self._try(Life(self._source, self._watchdog, wanted=1, fail=fail, max_ready=max_ready))
            if life.opened is not None and life.opened is previous.opened:
                self.found("reopens", f"open() returned the object again that it had returned before, {life.opened!r}")
            elif not life.open or life.events < min(first.events, 1) or (_failure(life) is not None and not life.events):
                self.found("reopens", f"opened again after {when}, {_what_came(life, self._patience)}")
            previous = life

    def conclude(self, max_block: float) -> None:
        """Raise what was found, the steps that took too long included."""
        for block in self._watchdog.blocks:
            kept = f"kept the event loop for {block.seconds:.3g} s of real time, more than max_block={max_block} s"
            self.found("does-not-block", f"it {kept}{', and was interrupted' * block.interrupted}: {block.where}")
        if self.findings:
            raise SourceNonconformance(self._source.key, tuple(self.findings.values()))

    async def _try(self, life: Life) -> Life:
        life.start()
        try:
            with anyio.move_on_after(self._patience):
                await life.enough.wait()
        finally:
            if not life.failed:
                life.cancel()
            with anyio.CancelScope(shield=True):
                await self._end(life)
        self._judge(life)
        return life

    async def _end(self, life: Life) -> None:
        """Wait for its end, and end what does not end by itself."""
        with anyio.move_on_after(self._close_within):
            await life.done.wait()
            return
        life.cancel()
        life.abandon()
        steps = life.driven.steps
        await _turns()
        if not life.done.is_set() and life.driven.steps == steps:
            life.wake()
            await _turns()
        waits = f"{self._close_within} s after it {'had failed' if life.failed else 'was cancelled'} it still waits: {life.where}"
        if not life.done.is_set():
            life.driven.abandoned = False  # if what it waits for comes after all, it may end properly
            waits += "; it cannot be ended, and still runs"
        self.found("closes", waits)

    def _judge(self, life: Life) -> None:
        driven = life.driven
        if isinstance(life.error, KeyboardInterrupt | SystemExit):
            raise life.error
        if life.rushed:
            self.found("takes-turns", "it gave so many events without a suspension that nothing else can run")
        if life.yielded_on:
            self.found("cancels", "it gave another event after it was cancelled")
        elif driven.stubborn:
            self.found("cancels", f"it went on after it was cancelled {driven.cancellations} times")
        failure = _failure(life)
        if failure is not None and driven.cancellations and not driven.abandoned:
            self.found("cleans-up", f"it raised {failure!r} after it was cancelled")


async def _turns() -> None:
    # Trio may run what is ready in any order, so one turn does not show that a task is not ready.
    for _ in range(5):
        await checkpoint()


def _failure(life: Life) -> BaseException | None:
    """What left it, cancellations and our own doing aside."""
    ours = (anyio.get_cancelled_exc_class(), GeneratorExit, InjectedFailureError, Interrupted)
    return None if life.error is None else without(life.error, *ours)


def _what_came(life: Life, patience: float) -> str:
    failure = _failure(life)
    if failure is not None:
        return f"it failed with {failure!r}"
    if life.ended:
        return "it ended without an event"
    return f"it had not {'given an event' if life.open else 'opened'} within {patience} s"
