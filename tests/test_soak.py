"""A small soak keeps every promise, a round that is played again alone does the same again, and planted bugs are found.

Relies on `tests.soak`, which `python -m tests.soak` runs for as long as one likes.
"""

from __future__ import annotations

import re
import runpy
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest

from anyio_sharedstream import AckSubscription, AdvanceOutcome, SharedStreamManager
from anyio_sharedstream import _drive as drive
from anyio_sharedstream import _workers as workers
from anyio_sharedstream._ack_publisher import AckPublisher
from anyio_sharedstream._audience import Audience
from anyio_sharedstream._exceptions import Terminal
from anyio_sharedstream._group import Group
from anyio_sharedstream._history import History
from anyio_sharedstream._mailbox import Mailbox
from anyio_sharedstream._publisher import Publisher
from anyio_sharedstream._registry import Registry
from tests.soak.__main__ import main
from tests.soak.play import SMALL, Soak

Patch = pytest.MonkeyPatch
on_both = pytest.mark.parametrize("backend", ["asyncio", "trio"])
#: As little as it takes.
TINY = [replace(SMALL[0], keys=12, actors=25, triggers=5, seconds=30)]


@on_both
def test_a_soak_in_virtual_time_keeps_every_promise(backend: str) -> None:
    soak = Soak(backend, 4, SMALL)
    soak.play([1])
    assert soak.broken is None
    assert soak.tally.seconds > 1000
    assert soak.tally.done["subscriptions"] > 500
    assert soak.tally.done["events"] > 10_000
    assert len(soak.tally.faults) > 15


def counted(soak: Soak, *numbers: int) -> list[Counter[str]]:
    """What is counted in the last of these rounds."""
    soak.play(numbers[:-1])
    before = deepcopy(soak.tally)
    soak.play(numbers[-1:])
    assert soak.broken is None
    assert soak.tally.done["rounds"] == len(numbers)
    return [getattr(soak.tally, name) - getattr(before, name) for name in ("done", "faults", "checked", "logged")]


@on_both
def test_a_round_that_is_played_alone_does_what_it_did_among_others(backend: str) -> None:
    assert counted(Soak(backend, 5, TINY), 1, 2) == counted(Soak(backend, 5, TINY), 2)


def test_the_command_says_what_was_done(capsys: pytest.CaptureFixture[str], monkeypatch: Patch) -> None:
    monkeypatch.setattr(sys, "argv", ["soak", "--minutes", "0", "--backend", "trio", "--seed", "2", "--small"])
    monkeypatch.delitem(sys.modules, "tests.soak.__main__")
    # In another thread, for on Python 3.11 coverage loses track of the frame that an event loop was run from.
    with ThreadPoolExecutor() as threads:
        running = threads.submit(runpy.run_module, "tests.soak", None, "__main__")
    left = running.exception()
    assert isinstance(left, SystemExit)
    assert left.code == 0
    printed = capsys.readouterr().out
    assert re.search(r"\d subscriptions\n", printed)
    assert re.search(r"blocks per subscription", printed)


def test_the_command_fails_if_a_promise_is_broken_and_says_how_to_see_that_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: Patch
) -> None:
    lose_an_event(monkeypatch)
    arguments = ["--backend", "trio", "--seed", "2", "--small"]
    assert main([*arguments, "--minutes", "1"]) == 1
    printed = capsys.readouterr().out
    found = re.search(r"BROKEN PROMISE: a contiguous run \(seed 2, round 1, at [\d.]+ seconds\)", printed)
    again = re.search(r"replay: python -m tests.soak (--backend trio --seed 2 --round 1 --small)\n", printed)
    assert found is not None
    assert again is not None
    assert main(again[1].split()) == 1
    assert found[0] in capsys.readouterr().out


# Bugs to be found.


def lose_an_event(monkeypatch: Patch) -> None:
    gather = Publisher.gather

    def losing(publisher: Publisher, event: Any) -> int:
        return 0 if type(publisher) is Publisher and event.number % 20 == 19 else gather(publisher, event)

    monkeypatch.setattr(Publisher, "gather", losing)


def give_an_event_twice(monkeypatch: Patch) -> None:
    gather = Publisher.gather

    def twice(publisher: Publisher, event: Any) -> int:
        if type(publisher) is Publisher and event.number % 20 == 19:
            gather(publisher, event)
        return gather(publisher, event)

    monkeypatch.setattr(Publisher, "gather", twice)


def keep_subscriptions(monkeypatch: Patch) -> None:
    subscribe, kept = SharedStreamManager.subscribe, []

    def keeping(manager: Any, *args: Any, **options: Any) -> Any:
        kept.append(subscribe(manager, *args, **options))
        return kept[-1]

    monkeypatch.setattr(SharedStreamManager, "subscribe", keeping)


def leak_memory(monkeypatch: Patch) -> None:
    discard, leaked = Audience.discard, []

    def leaking(audience: Audience, mailbox: Any) -> bool:
        leaked.append(bytearray(100))
        return discard(audience, mailbox)

    monkeypatch.setattr(Audience, "discard", leaking)


def leave_routes_in_the_index(monkeypatch: Patch) -> None:
    """Not the subscribers; only that there was such a route."""
    discard = Audience.discard

    def leaving(audience: Audience, mailbox: Any) -> bool:
        routes = dict(audience._routes)
        discarded = discard(audience, mailbox)
        audience._routes.update(routes)
        return discarded

    monkeypatch.setattr(Audience, "discard", leaving)


def leave_subscribers_in_the_index(monkeypatch: Patch) -> None:
    discard = Audience.discard

    def leaving(audience: Audience, mailbox: Any) -> bool:
        places = audience._places.get(mailbox, {})
        discarded = discard(audience, mailbox)
        if mailbox._routes is not None:
            audience._routes.update(places)
            for place in places.values():
                place[mailbox] = None
        return discarded

    monkeypatch.setattr(Audience, "discard", leaving)


def leave_upstreams_open(monkeypatch: Patch) -> None:
    async def leave_open(_group: Any, _opened: Any) -> None: ...

    monkeypatch.setattr(drive, "close_quietly", leave_open)


def open_beside_the_earlier_one(monkeypatch: Patch) -> None:
    monkeypatch.setattr(Registry, "_last_to_open", lambda _registry, _key: None)


def share_the_exception(monkeypatch: Patch) -> None:
    monkeypatch.setattr(Terminal, "exception", lambda terminal: terminal._exception)


def fail_inside(monkeypatch: Patch) -> None:
    monkeypatch.setattr(Group, "stop", None)


def call_a_failure_clean(monkeypatch: Patch) -> None:
    def clean(record: Any) -> AdvanceOutcome:
        return AdvanceOutcome(acked=record.acked + record.failed, failed=0, rejected=record.rejected, released=record.released)

    monkeypatch.setattr(workers, "_outcome", clean)


def count_a_crash_as_an_acknowledgement(monkeypatch: Patch) -> None:
    leave = AckSubscription.__aexit__

    async def leave_well(stream: AckSubscription[Any], *_why: Any) -> None:
        await leave(stream, None, None, None)

    monkeypatch.setattr(AckSubscription, "__aexit__", leave_well)


def advance_twice(monkeypatch: Patch) -> None:
    gather = AckPublisher.gather

    def twice(publisher: AckPublisher, item: Any) -> int:
        gathered = gather(publisher, item)
        publisher._payloads[-1:] = [max(0, item[1] - 1)]
        return gathered

    monkeypatch.setattr(AckPublisher, "gather", twice)


def forget_a_wake_up(monkeypatch: Patch) -> None:
    dismiss = Mailbox._dismiss_reader

    def forget(mailbox: Mailbox[Any]) -> None:
        if mailbox._received % 7 != 3:
            dismiss(mailbox)

    monkeypatch.setattr(Mailbox, "_dismiss_reader", forget)


def forget_an_event_of_the_state(monkeypatch: Patch) -> None:
    step = History.step

    def forgetful(history: History, event: Any) -> None:
        if event.number % 10 != 9:
            step(history, event)

    monkeypatch.setattr(History, "step", forgetful)


@on_both
@pytest.mark.parametrize(
    ("plant", "promise"),
    [
        (lose_an_event, "a contiguous run|gaps account for what is missing"),
        (give_an_event_twice, "in order, without repetition"),
        (keep_subscriptions, "quiet: no object of the library"),
        (leave_subscribers_in_the_index, "quiet: no object of the library|an outcome counts who"),
        (leave_upstreams_open, "one upstream of a key at once|every operation ends in time"),
        (open_beside_the_earlier_one, "one upstream of a key at once"),
        (share_the_exception, "an exception of one's own|exactly one terminal, which repeats"),
        (fail_inside, "nothing unexpected is raised"),
        (call_a_failure_clean, "clean only if all who took it have acknowledged it"),
        (count_a_crash_as_an_acknowledgement, "clean only if all who took it have acknowledged it|an outcome counts who failed"),
        (advance_twice, "advanced in lane order, once per opening|clean only if all who took it have acknowledged it"),
        (forget_a_wake_up, "nobody who waits is forgotten|every operation ends in time"),
        (forget_an_event_of_the_state, "a snapshot equals the fold"),
    ],
)
def test_a_planted_bug_is_found(backend: str, plant: Callable[[Patch], None], promise: str, monkeypatch: Patch) -> None:
    plant(monkeypatch)
    soak = Soak(backend, 3, TINY)
    soak.play(range(1, 5))
    assert soak.broken is not None
    assert re.match(promise, str(soak.broken))


@on_both
@pytest.mark.parametrize("plant", [leak_memory, leave_routes_in_the_index])
def test_memory_that_leaks_is_found_within_a_round(backend: str, plant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    plant(monkeypatch)
    soak = Soak(backend, 3, [replace(SMALL[0], keys=1)])
    soak.play([1])
    assert re.match("quiet: memory does not grow", str(soak.broken))
