"""What can be seen from outside: frozen snapshots, taken when somebody asks and costing nothing before.

Relies on `_policies` for a type alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Literal

from anyio_sharedstream._policies import OverflowPolicy

__all__ = ["AckStatistics", "GroupState", "GroupStatistics", "ManagerStatistics", "SubscriptionStatistics"]

GroupState = Literal["waiting", "opening", "live", "lingering", "restarting", "draining", "closing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscriptionStatistics:
    """One subscriber's buffer at one moment."""

    subscriber_id: Hashable
    """the caller's id, or the one that was generated"""
    current_buffer_used: int
    """events published to this subscriber that it has not taken yet"""
    peak_buffer_used: int
    """the largest number that `current_buffer_used` has had"""
    max_buffer_size: float
    """the bound, in events; a turn of the source may exceed it when everything before had been taken"""
    events_received: int
    """events that this subscriber has taken"""
    policy: OverflowPolicy
    """what it asked for if it should fall behind"""
    events_missed: int
    """events that it will never receive, because its policy gave them up"""
    events_refused: int
    """events that its ``where`` refused"""
    held_seconds: float
    """for how long the upstream was held for it (`Block`)"""
    events_current: int = 0
    """events that it has taken and said nothing of (`AckSubscription`)"""
    events_deferred: int = 0
    """events that it has deferred, of this or an earlier opening, and that nobody has resolved yet"""


@dataclass(frozen=True, slots=True, kw_only=True)
class AckStatistics:
    """What is on its way back to the broker of an `AckSource` at one moment; all of the present opening."""

    in_flight: int
    """events published and not yet advanced"""
    max_in_flight: int
    """the bound, in events"""
    waiting: bool
    """whether the upstream waits, for room or for a subscriber"""
    deferred: int
    """resolutions that are still to come from a `Pending`; several subscribers may have deferred one event"""
    lanes: int
    """lanes in which there are events that every subscriber is done with, or has deferred"""
    advancing: int
    """lanes that are being advanced"""
    retrying: int
    """lanes whose ``advance`` has failed, and will be tried again"""
    events_advanced: int
    """events that the producer was told of, with success"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStatistics:
    """One key's upstream and its subscribers at one moment."""

    key: Hashable
    """the key that the subscribers share"""
    state: GroupState
    """"waiting" for the key's earlier upstream to close or for a cohort, "opening", "live", "lingering" without subscribers,
    "draining" while resolutions are still to come from those who have left, "restarting" after a failure, or "closing" """
    epoch: int
    """how often the upstream has been opened"""
    restarts: int
    """how often it has failed or returned and was, or will be, opened again"""
    last_error: BaseException | None
    """what ended it last, as a copy without traceback, cause and context; None if nothing has"""
    opened_at: float | None
    """since when this opening has been live, in the event loop's seconds (`anyio.current_time`); None if it has not been"""
    last_event_at: float | None
    """when events were last published, in the same seconds; None before the first"""
    events_published: int
    """events published since the group started"""
    subscriptions: tuple[SubscriptionStatistics, ...]
    """the registered subscribers, in the order in which they joined"""
    acknowledgement: AckStatistics | None = None
    """what is on its way back, if the source is an `AckSource`"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerStatistics:
    """Everything that a manager runs at one moment."""

    groups: Mapping[Hashable, GroupStatistics]
    """the groups that accept subscribers, by key"""
    closing: tuple[GroupStatistics, ...]
    """The groups on their way out, and what of those in `groups` takes longer than its ``close_timeout`` to close; a key may have
    several, and a group in `groups` besides."""
