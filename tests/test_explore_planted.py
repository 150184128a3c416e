"""Bugs that are planted in the library are found by exploring the scenario of the lesson that says how others have had them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Literal, TypeAlias

import pytest
from anyio import CancelScope, get_cancelled_exc_class
from anyio.lowlevel import checkpoint

from anyio_sharedstream import SubscriberOverflow, _drive
from anyio_sharedstream._ack_publisher import AckPublisher
from anyio_sharedstream._advancing import Advancing
from anyio_sharedstream._buffer import Buffer
from anyio_sharedstream._exceptions import Terminal
from anyio_sharedstream._group import Group
from anyio_sharedstream._mailbox import Mailbox
from anyio_sharedstream._publisher import Publisher
from anyio_sharedstream._registry import Registry
from anyio_sharedstream._states import State
from anyio_sharedstream._subscription import Receiver
from anyio_sharedstream.testing import Deadlock, ScheduleFailure, explore
from tests import test_explore_acknowledgement as acknowledgement
from tests import test_explore_lessons as lessons
from tests import test_explore_subscribers as subscribers
from tests.explore_support import Scenario
from tests.plants import (
    Plant,
    count_a_crash_as_an_acknowledgement,
    evict_after_an_await,
    later,
    open_before_the_old_one_has_closed,
    raise_one_shared_exception_object,
)

Backend: TypeAlias = Literal["asyncio", "trio"]

#: In so many schedules each of them is found; most in the first few.
ENOUGH = 1000

pytestmark = pytest.mark.usefixtures("unlogged")
on_both = pytest.mark.parametrize("backend", ["asyncio", "trio"])


def enter_the_key_after_an_await(patch: pytest.MonkeyPatch) -> None:
    start = Registry._start

    def start_and_enter_later(self: Registry, source: Any, first: Any) -> Group:
        group = start(self, source, first)
        del self.groups[group.key]
        later(self, lambda: self.groups.setdefault(group.key, group))
        return group

    patch.setattr(Registry, "_start", start_and_enter_later)


def keep_who_leaves_before_the_upstream_is_open(patch: pytest.MonkeyPatch) -> None:
    leave = Group.leave
    patch.setattr(Group, "leave", lambda self, mailbox: self.state is not State.WAITING and leave(self, mailbox))


def evict_only_when_the_upstream_has_closed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Group, "_begin_to_close", lambda self, epoch: None)


def tell_nobody_of_the_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Publisher, "dismiss", lambda self, reason: None)


def stop_with_the_first_subscriber(patch: pytest.MonkeyPatch) -> None:
    leave = Group.leave

    def leave_or_stop(self: Group, mailbox: Any) -> bool:
        if mailbox is next(iter(self.publisher.members.values()), None):
            self.stop()
        return leave(self, mailbox)

    patch.setattr(Group, "leave", leave_or_stop)


def wait_for_the_upstream_whatever_happens(patch: pytest.MonkeyPatch) -> None:
    aclose = Receiver.aclose

    async def aclose_shielded(self: Any) -> None:
        with CancelScope(shield=True):
            await aclose(self)

    patch.setattr(Receiver, "aclose", aclose_shielded)


def keep_the_keys(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Registry, "closed", lambda self, group: None)


def register_after_an_await(patch: pytest.MonkeyPatch) -> None:
    join = Group.join

    def join_later(self: Group, mailbox: Mailbox[Any], source: Any) -> None:
        if self.state is State.LIVE:
            mailbox._register(self.backend)
            later(self._owner, lambda: join(self, mailbox, source))
        else:
            join(self, mailbox, source)

    patch.setattr(Group, "join", join_later)


def give_nobody_a_turn(patch: pytest.MonkeyPatch) -> None:
    async def go_on(group: Any, epoch: Any, interruptible: bool) -> None: ...

    patch.setattr(_drive, "_pause", go_on)


def keep_whoever_overflows(patch: pytest.MonkeyPatch) -> None:
    def fail(self: Publisher, failed: Any) -> None:
        for mailbox, _ in failed:
            mailbox._fail(Terminal(SubscriberOverflow(self.key, mailbox._subscriber_id, mailbox._max_buffer_size, "")))

    patch.setattr(Publisher, "_fail", fail)


def swallow_the_cancellation_of_the_wait(patch: pytest.MonkeyPatch) -> None:
    aclose = Receiver.aclose

    async def aclose_uncancelled(self: Any) -> None:
        with suppress(get_cancelled_exc_class()):
            await aclose(self)

    patch.setattr(Receiver, "aclose", aclose_uncancelled)


def fail_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Mailbox, "_end", Mailbox._fail)


def hand_over_what_is_taken(patch: pytest.MonkeyPatch) -> None:
    receive = Receiver.receive

    async def receive_and_wait(self: Any) -> Any:
        event = await receive(self)
        await checkpoint()
        return event

    patch.setattr(Receiver, "receive", receive_and_wait)


def let_nobody_overflow(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Buffer, "_is_behind", lambda self, untaken, size, earlier: False)


def fail_everybody_with_one(patch: pytest.MonkeyPatch) -> None:
    fail = Publisher._fail

    def fail_all(self: Publisher, failed: Any) -> None:
        error = failed[0][1]
        fail(self, [(mailbox, error) for mailbox in list(self.members.values())])

    patch.setattr(Publisher, "_fail", fail_all)


def give_up_what_is_on_its_way(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Advancing, "wait_for_the_rest", Advancing._give_up)


def forget_the_bound(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AckPublisher, "room", lambda self: 64)


PLANTED: list[tuple[Plant, Scenario]] = [
    (enter_the_key_after_an_await, lessons.lesson_01_first_join_race),
    (evict_after_an_await, lessons.lesson_02_last_leave_against_new_join),
    (keep_who_leaves_before_the_upstream_is_open, lessons.lesson_03_leave_during_join),
    (evict_only_when_the_upstream_has_closed, lessons.lesson_04_joining_at_the_instant_of_the_terminal),
    (tell_nobody_of_the_end, lessons.lesson_05_dead_upstream),
    (stop_with_the_first_subscriber, lessons.lesson_07_no_consumer_owns_the_upstream),
    (wait_for_the_upstream_whatever_happens, lessons.lesson_08_leaving_never_blocks),
    (keep_the_keys, lessons.lesson_10_keys_that_nobody_holds_are_forgotten),
    (register_after_an_await, lessons.lesson_11_registered_means_registered),
    (give_nobody_a_turn, lessons.lesson_15_a_source_that_never_waits_starves_nobody),
    (keep_whoever_overflows, lessons.lesson_16_a_dead_subscriber_does_not_keep_the_upstream_busy),
    (open_before_the_old_one_has_closed, lessons.lesson_18_two_upstreams_of_a_key_never_overlap),
    (fail_at_once, lessons.lesson_19_a_failure_does_not_overtake_data),
    (hand_over_what_is_taken, lessons.lesson_20_an_event_is_not_lost_with_the_task_that_was_woken_for_it),
    (let_nobody_overflow, subscribers.lesson_06_a_slow_consumer_is_bounded_told_and_alone),
    (fail_everybody_with_one, subscribers.lesson_09_what_a_subscriber_does_with_an_event_reaches_no_sibling),
    (raise_one_shared_exception_object, subscribers.lesson_13_every_subscriber_has_an_exception_of_its_own),
    (hand_over_what_is_taken, subscribers.lesson_21_a_receiver_is_not_slowed_to_one_item_per_turn_of_the_loop),
    (
        count_a_crash_as_an_acknowledgement,
        acknowledgement.lesson_22_a_consumer_that_crashes_in_the_middle_of_an_event_has_not_acknowledged_it,
    ),
    (
        give_up_what_is_on_its_way,
        acknowledgement.lesson_24_who_takes_one_event_and_leaves_gets_it_committed_before_the_group_stops,
    ),
    (forget_the_bound, acknowledgement.lesson_29_behind_a_hung_commit_there_is_never_more_than_the_bound),
]

#: A scope's cancellation that is swallowed comes again. That of a single task does not, and only asyncio has that.
PLANTED_ON_ASYNCIO: list[tuple[Plant, Scenario]] = [
    (swallow_the_cancellation_of_the_wait, lessons.lesson_17_nor_is_a_native_one),
    (hand_over_what_is_taken, lessons.lesson_20_nor_with_one_that_is_cancelled_natively),
]


def find(plant: Plant, scenario: Scenario, backend: Backend) -> ScheduleFailure:
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        with pytest.raises(ScheduleFailure) as found:
            explore(scenario, schedules=ENOUGH, backend=backend)
        with pytest.raises(ScheduleFailure) as again:
            explore(scenario, schedules=1, seed=found.value.seed, backend=backend)
    assert type(again.value.error) is type(found.value.error)
    assert not hasattr(found.value, "__notes__")
    explore(scenario, schedules=1, seed=found.value.seed, backend=backend)  # which the library stands
    return found.value


@on_both
@pytest.mark.parametrize(("plant", "scenario"), PLANTED)
def test_a_planted_bug_is_found_and_replayed(plant: Plant, scenario: Scenario, backend: Backend) -> None:
    find(plant, scenario, backend)


@pytest.mark.parametrize(("plant", "scenario"), PLANTED_ON_ASYNCIO)
def test_a_planted_bug_about_native_cancellation_is_found_and_replayed(plant: Plant, scenario: Scenario) -> None:
    find(plant, scenario, "asyncio")


@on_both
def test_a_hang_is_found_as_a_deadlock(backend: Backend) -> None:
    assert isinstance(find(tell_nobody_of_the_end, lessons.lesson_05_dead_upstream, backend).error, Deadlock)
