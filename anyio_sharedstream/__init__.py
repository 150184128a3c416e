"""One live upstream, shared by many consumers in one process, on asyncio and on trio."""

from anyio_sharedstream._acknowledging import AckSubscription
from anyio_sharedstream._exceptions import AckTimeout, PollTerminated, SharedStreamError, SubscriberOverflow, UpstreamSilent
from anyio_sharedstream._lifecycle import Fold, Restart
from anyio_sharedstream._manager import DEFAULT_MAX_BUFFER_SIZE, SharedStreamManager
from anyio_sharedstream._pending import Pending
from anyio_sharedstream._policies import Block, Conflate, DropNewest, DropOldest, Fail, Gap, Latest, Snapshot
from anyio_sharedstream._producer import AckSource, AdvanceItem, AdvanceOutcome, SharedStreamProducer
from anyio_sharedstream._source import SharedSource, shared_source
from anyio_sharedstream._statistics import AckStatistics, GroupStatistics, ManagerStatistics, SubscriptionStatistics
from anyio_sharedstream._subscription import LossySubscription, Subscription

__all__ = [
    "DEFAULT_MAX_BUFFER_SIZE",
    "AckSource",
    "AckStatistics",
    "AckSubscription",
    "AckTimeout",
    "AdvanceItem",
    "AdvanceOutcome",
    "Block",
    "Conflate",
    "DropNewest",
    "DropOldest",
    "Fail",
    "Fold",
    "Gap",
    "GroupStatistics",
    "Latest",
    "LossySubscription",
    "ManagerStatistics",
    "Pending",
    "PollTerminated",
    "Restart",
    "SharedSource",
    "SharedStreamError",
    "SharedStreamManager",
    "SharedStreamProducer",
    "Snapshot",
    "SubscriberOverflow",
    "Subscription",
    "SubscriptionStatistics",
    "UpstreamSilent",
    "shared_source",
]
