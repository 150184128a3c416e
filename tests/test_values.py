"""The values that the library gives and takes: what they are by default, and that nobody can change them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import anyio_sharedstream
from anyio_sharedstream import AckSource, Restart, SharedSource, SubscriptionStatistics
from tests.ack_support import Broker
from tests.support import Feed

VALUES: list[Any] = [
    cls for name in anyio_sharedstream.__all__ if dataclasses.is_dataclass(cls := getattr(anyio_sharedstream, name))
]


@pytest.mark.parametrize("cls", VALUES, ids=lambda cls: cls.__name__)
def test_a_value_cannot_be_changed_and_has_room_for_nothing_else(cls: Any) -> None:
    value = object.__new__(cls)
    for name in [field.name for field in dataclasses.fields(cls)][:1]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, None)
    assert issubclass(cls, SharedSource) or not hasattr(value, "__dict__")


@pytest.mark.parametrize(
    "cls", [cls for cls in VALUES if cls.__name__.endswith(("Statistics", "Outcome"))], ids=lambda cls: cls.__name__
)
def test_what_is_counted_is_given_by_name(cls: Any) -> None:
    with pytest.raises(TypeError, match="takes 1 positional argument"):
        cls(1)


def test_a_restart_is_by_default_what_the_docs_say() -> None:
    values = {"initial_delay": 0.1, "max_delay": 30.0, "factor": 2.0, "jitter": 0.1, "max_restarts": None, "within": 60.0}
    assert dataclasses.asdict(Restart()) == {**values, "on": Exception}


def test_an_advance_is_tried_again_by_default_as_the_docs_say() -> None:
    source: AckSource[Any] = Broker().source()
    assert source.advance_retry == Restart(initial_delay=0.1, max_delay=5.0, max_restarts=5, within=60.0)


async def test_a_subscriber_of_a_plain_source_has_nothing_in_hand() -> None:
    async with anyio_sharedstream.SharedStreamManager() as manager, manager.subscribe(Feed().source) as stream:
        statistics: SubscriptionStatistics = stream.statistics()
        assert (statistics.events_current, statistics.events_deferred) == (0, 0)
        assert manager.subscribe(Feed().source).epoch == 0
