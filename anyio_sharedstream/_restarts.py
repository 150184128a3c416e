"""Whether a failed upstream is opened again, and when.

Relies on `_lifecycle` for what was asked for, and on `_epoch` for what has happened. No library is used for the schedule of
delays: those that know one either wait themselves, and on one event loop only, or would be a dependency for three lines of
arithmetic.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Hashable

from anyio import get_cancelled_exc_class

from anyio_sharedstream._epoch import Epoch
from anyio_sharedstream._exceptions import consists_of, without
from anyio_sharedstream._lifecycle import OnExhausted, Restart

__all__ = ["Restarts"]


class Restarts:
    """The restarts that an upstream has had."""

    def __init__(self, policy: Restart, on_exhausted: OnExhausted) -> None:
        self._policy = policy
        self._on_exhausted = on_exhausted
        self._next_delay = policy.initial_delay
        self._times: deque[float] = deque()

    def consider(self, epoch: Epoch, key: Hashable, now: float) -> None:
        """Say in the epoch after which delay the upstream is to be opened again, if it is."""
        if epoch.failure is not None and not isinstance(epoch.failure, Exception):
            return
        try:
            wanted = self._on_exhausted == "restart" if epoch.returned else self._wanted_after(epoch.terminal(key))
        except BaseException as exc:  # the policy's function has failed, and nobody knows what it would have said
            if exc is not epoch.failure:
                exc.__cause__ = exc.__cause__ or epoch.failure
                epoch.failure = without(exc, get_cancelled_exc_class())
            return
        if wanted:
            # How long it took to open and to close is no sign of health.
            lived = 0.0 if epoch.live_at is None or epoch.ended_at is None else epoch.ended_at - epoch.live_at
            epoch.delay = self._delay(lived, now)

    def delay_after(self, error: Exception, now: float) -> float | None:
        """Count a failure of what has no life of its own; says for how long to wait before the next try, or None for none."""
        return self._delay(0.0, now) if self._wanted_after(error) else None

    def _wanted_after(self, error: Exception) -> bool:
        on = self._policy.on
        if isinstance(on, tuple):
            return isinstance(error, on) or consists_of(error, *on)
        if isinstance(on, type) and issubclass(on, BaseException):
            return isinstance(error, on) or consists_of(error, on)
        function: Callable[[Exception], object] = on
        return bool(function(error))

    def _delay(self, lived: float, now: float) -> float | None:
        """Count a restart; returns for how many seconds to wait before it, or None if there have been too many.

        :param lived: for how many seconds the upstream was live
        """
        policy = self._policy
        if lived > policy.max_delay:
            self._next_delay = policy.initial_delay
        while self._times and now - self._times[0] >= policy.within:
            self._times.popleft()
        if policy.max_restarts is not None:
            if len(self._times) >= policy.max_restarts:
                return None
            self._times.append(now)
        delay = self._next_delay
        self._next_delay = min(policy.max_delay, delay * policy.factor)
        return delay * (1 - policy.jitter * random.random())  # nothing depends on its being hard to guess
