"""The tasks that tell a producer of what everybody is done with: they settle, sort and advance.

Relies on `_advancing` for everything that they find and change. They live in the poll task's task group, so none of them can
outlive the upstream or be forgotten, and whatever a producer raises is told to the group and ends none of them.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from anyio import Event, get_cancelled_exc_class
from anyio.abc import TaskGroup

from anyio_sharedstream._advancing import Advancing
from anyio_sharedstream._clock import Timer
from anyio_sharedstream._exceptions import consists_of
from anyio_sharedstream._lanes import Lane
from anyio_sharedstream._leaving import being_cancelled
from anyio_sharedstream._ledger import Record
from anyio_sharedstream._producer import AdvanceItem, AdvanceOutcome
from anyio_sharedstream._restarts import Restarts

__all__ = ["Workers"]


class Workers:
    """One task that looks at what has passed, and as many that advance it as there are lanes for, up to the bound."""

    def __init__(self, acks: Advancing) -> None:
        self._acks = acks
        self._idle: list[Event] = []  # those that wait for something to do
        self._workers = 0

    async def run(self, tasks: TaskGroup) -> None:
        """Advance whatever passes, until it is cancelled."""
        while True:
            await self._acks.news.wait()
            self._acks.news = Event()
            self._acks.turn = self._acks.now()
            self._acks.ledger.settle()
            self._sort()
            # A worker that has been woken, and has yet to run, may be counted twice; then it finds nothing to do.
            for _ in range(self._acks.lanes.ready):
                if self._idle:
                    self._idle.pop().set()
                elif self._workers < self._acks.source.max_concurrent_advances:
                    self._workers += 1
                    tasks.start_soon(self._work, name=f"advancing {self._acks.source.key!r}")
                else:
                    break

    def _sort(self) -> None:
        """Put what has passed into its lane."""
        passed = self._acks.ledger.passed
        if passed:
            self._acks.sorting()
        while passed and not self._acks.dead:
            record = passed.popleft()
            try:
                self._acks.lanes.add(record, self._lane_of(record.payload))
            except BaseException as exc:  # of the producer's own, or of hashing and comparing what that has returned
                self._acks.failed(exc)

    def _lane_of(self, payload: Any) -> Hashable:
        get_advance_lane = getattr(self._acks.producer, "get_advance_lane", None)
        lane: Hashable = None if get_advance_lane is None else get_advance_lane(payload)
        return lane

    async def _work(self) -> None:
        while True:
            while self._acks.lanes.ready and not self._acks.dead:
                lane, batch = self._acks.lanes.take()
                self._acks.advancing += 1
                try:
                    error = await self._advance(batch)
                finally:
                    self._acks.advancing -= 1
                if not self._acks.dead:
                    self._tried(lane, batch, error)
                elif error is not None:
                    self._acks.failed_late(error)
                del error, batch
            something = Event()
            self._idle.append(something)
            await something.wait()

    async def _advance(self, batch: list[Record]) -> BaseException | None:
        """Tell the producer; returns what it raises, for whatever that is, it must not end the task, nor anybody else's."""
        try:
            await self._acks.producer.advance([AdvanceItem(record.payload, _outcome(record)) for record in batch])
        except BaseException as exc:
            if being_cancelled() and consists_of(exc, get_cancelled_exc_class()):
                raise
            return exc
        return None

    def _tried(self, lane: Lane, batch: list[Record], error: BaseException | None) -> None:
        try:
            if error is None:
                self._acks.lanes.advanced(lane)
            elif not self._try_again(lane, batch, error):
                self._acks.failed(error)
        except BaseException as exc:  # hashing a lane is foreign code, and so may be what says whether to try again
            exc.__cause__ = exc.__cause__ or error
            self._acks.failed(exc)
        if error is None:
            self._acks.advanced(len(batch))

    def _try_again(self, lane: Lane, batch: list[Record], error: BaseException) -> bool:
        """Say whether it is tried again; the lane waits for that, and no worker does."""
        policy = self._acks.source.advance_retry
        if policy is None or not isinstance(error, Exception):
            return False
        lane.retries = lane.retries or Restarts(policy, "fail")
        now = self._acks.now()
        delay = lane.retries.delay_after(error, now)
        if delay is None:
            return False
        self._acks.lanes.put_back(lane, batch)
        self._acks.retries[lane] = timer = Timer(self._acks.clock, lambda: self._retry(lane))
        timer.start_at(now + delay)
        self._acks.lines.add("warning", "advance failed", exc_info=error, events=len(batch), retry_in=delay)
        self._acks.lines.write()
        return True

    def _retry(self, lane: Lane) -> None:
        del self._acks.retries[lane]
        self._acks.lanes.again(lane)


def _outcome(record: Record) -> AdvanceOutcome:
    return AdvanceOutcome(acked=record.acked, failed=record.failed, rejected=record.rejected, released=record.released)
