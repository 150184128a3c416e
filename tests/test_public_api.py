"""The public names are exactly the documented ones, and each says what it is for."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio.abc
import pytest

import anyio_sharedstream

CONSTANTS = {"DEFAULT_MAX_BUFFER_SIZE"}

SUBSCRIPTION = {
    "aclose",
    "batches",
    "close",
    "epoch",
    "key",
    "receive",
    "receive_batch",
    "receive_nowait",
    "statistics",
    "subscriber_id",
}
SOURCE = {
    "key",
    "open",
    "route_by",
    "linger",
    "cohort_grace",
    "min_subscribers",
    "restart",
    "on_exhausted",
    "replay",
    "replay_max_age",
    "fold",
    "silence_timeout",
    "close_timeout",
}

#: What is documented of each public name: methods, properties and attributes beside those that its base classes document.
DOCUMENTED: dict[str, set[str]] = {
    "AckSource": {
        *SOURCE,
        "ack_timeout",
        "max_in_flight",
        "max_concurrent_advances",
        "drain_timeout",
        "advance_retry",
    },
    "AckStatistics": {
        "in_flight",
        "max_in_flight",
        "waiting",
        "deferred",
        "lanes",
        "advancing",
        "retrying",
        "events_advanced",
    },
    "AckSubscription": {*SUBSCRIPTION, "defer", "fail", "reject"},
    "AckTimeout": {"key", "subscriber_id", "seconds"},
    "AdvanceItem": {"broker_payload", "outcome"},
    "AdvanceOutcome": {"acked", "failed", "rejected", "released", "is_clean"},
    "Block": {"up_to"},
    "Conflate": {"by", "merge"},
    "DropNewest": set(),
    "DropOldest": set(),
    "Fail": set(),
    "Fold": {"initial", "step"},
    "Gap": {"missed", "cause"},
    "Latest": set(),
    "LossySubscription": SUBSCRIPTION,
    "GroupStatistics": {
        "key",
        "state",
        "epoch",
        "restarts",
        "last_error",
        "opened_at",
        "last_event_at",
        "events_published",
        "subscriptions",
        "acknowledgement",
    },
    "ManagerStatistics": {"groups", "closing"},
    "Pending": {"ack", "fail", "reject"},
    "PollTerminated": {"key", "reason"},
    "Restart": {"initial_delay", "max_delay", "factor", "jitter", "max_restarts", "within", "on"},
    "SharedSource": SOURCE,
    "SharedStreamError": set(),
    "Snapshot": {"state"},
    "SharedStreamProducer": {"aclose", "advance", "get_advance_lane", "open_stream"},
    "SharedStreamManager": {"subscribe", "stop", "stop_all", "statistics"},
    "SubscriberOverflow": {"key", "subscriber_id", "max_buffer_size", "reason"},
    "Subscription": SUBSCRIPTION,
    "SubscriptionStatistics": {
        "subscriber_id",
        "current_buffer_used",
        "peak_buffer_used",
        "max_buffer_size",
        "events_received",
        "policy",
        "events_missed",
        "events_refused",
        "held_seconds",
        "events_current",
        "events_deferred",
    },
    "UpstreamSilent": {"key", "seconds"},
    "shared_source": set(),
}
CLASSES = sorted(name for name in DOCUMENTED if name[0].isupper())


def own_names(cls: type) -> set[str]:
    """The public names that this package adds to a class."""
    own = [base for base in cls.__mro__ if base.__module__.startswith("anyio_sharedstream")]
    return {name for base in own for name in [*vars(base), *vars(base).get("__annotations__", ())] if not name.startswith("_")}


def described_attributes(cls: type) -> set[str]:
    """The annotated attributes that a string follows."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id
        for field, text in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr)
    }


def test_the_public_names_are_exactly_the_documented_ones() -> None:
    assert sorted(anyio_sharedstream.__all__) == sorted(DOCUMENTED.keys() | CONSTANTS)
    modules = {path.stem for path in Path(anyio_sharedstream.__file__).parent.iterdir()}
    present = {name for name in vars(anyio_sharedstream) if not name.startswith("_")}
    assert present - modules == set(anyio_sharedstream.__all__)


@pytest.mark.parametrize("name", CLASSES)
def test_the_public_members_of_each_class_are_exactly_the_documented_ones(name: str) -> None:
    assert own_names(getattr(anyio_sharedstream, name)) == DOCUMENTED[name]


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_every_public_name_has_a_docstring(name: str) -> None:
    thing = getattr(anyio_sharedstream, name)
    assert thing.__doc__
    assert not thing.__doc__.startswith(f"{name}("), "a dataclass without a docstring is given its signature"


@pytest.mark.parametrize("name", CLASSES)
def test_every_public_member_has_a_docstring(name: str) -> None:
    cls: Any = getattr(anyio_sharedstream, name)
    attributes = {
        name for base in cls.__mro__ if base.__module__.startswith("anyio_sharedstream") for name in described_attributes(base)
    }
    for member in DOCUMENTED[name] - attributes:
        assert getattr(cls, member).__doc__, member


@pytest.mark.parametrize("name", CLASSES)
def test_a_member_that_overrides_an_inherited_one_has_a_docstring_of_its_own(name: str) -> None:
    cls = getattr(anyio_sharedstream, name)
    functions = [member for member in vars(cls).values() if inspect.isfunction(member)]
    assert all(function.__doc__ for function in functions if not function.__name__.startswith("_"))


def test_the_constants_are_described() -> None:
    module = importlib.import_module("anyio_sharedstream._manager")
    body = ast.parse(inspect.getsource(module)).body
    described = {
        assignment.targets[0].id
        for assignment, text in pairwise(body)
        if isinstance(assignment, ast.Assign) and isinstance(assignment.targets[0], ast.Name) and isinstance(text, ast.Expr)
    }
    assert described >= CONSTANTS
    assert anyio_sharedstream.DEFAULT_MAX_BUFFER_SIZE == 1024


def test_the_package_and_its_type_marker_are_there() -> None:
    assert anyio_sharedstream.__doc__
    assert (Path(anyio_sharedstream.__file__).parent / "py.typed").is_file()


def test_a_subscription_is_a_receive_stream_of_anyios() -> None:
    assert issubclass(anyio_sharedstream.Subscription, anyio.abc.ObjectReceiveStream)


@pytest.mark.parametrize("name", ["GroupStatistics", "ManagerStatistics", "SharedSource", "SubscriptionStatistics"])
def test_values_are_frozen_and_take_keywords_only(name: str) -> None:
    cls: Any = getattr(anyio_sharedstream, name)
    assert cls.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(cls))


@pytest.mark.parametrize("name", ["GroupStatistics", "ManagerStatistics", "SubscriptionStatistics"])
def test_statistics_are_slotted(name: str) -> None:
    assert "__slots__" in vars(getattr(anyio_sharedstream, name))
