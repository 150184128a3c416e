"""What ``docs/testing.md`` shows runs as it stands there, and what it says of the kit is so."""

from __future__ import annotations

import inspect
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from anyio_sharedstream import testing
from anyio_sharedstream.testing import _conformance, _deadlock, _explore_schedule, _sweep, pytest_plugin
from tests.test_readme import show

PAGE = (Path(__file__).parent.parent / "docs" / "testing.md").read_text(encoding="utf-8")
BLOCKS: list[str] = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
EXPLORE = [block for block in BLOCKS if "Prices" in block]

#: What the examples before those of exploration have imported.
IMPORTS = "\n".join(re.findall(r"^(?:import|from) .*$", "".join(BLOCKS[:3]), re.MULTILINE))


def rows(after: str) -> list[str]:
    """The first cells of the table that follows a line."""
    table = PAGE[PAGE.index(after) :]
    return re.findall(r"^\| `\"?([\w-]+)\"?` \|", table[: table.index("\n\n", table.index("|---"))], re.MULTILINE)


def test_the_examples_run_on_both_backends() -> None:
    names: dict[str, Any] = {}
    for block in BLOCKS:
        assert ("def test_" in block) == ('("asyncio", "trio")' in block)
        names |= show(block, **names)
    assert sum(name.startswith("test_") for name in names) == 4


def test_the_exploration_finds_and_prints_what_the_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    consumer, exploration = EXPLORE
    show(exploration, **show(consumer, **show(IMPORTS)))
    (example,) = [block for block in re.findall(r"^```text\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE) if "schedule" in block]
    printed = capsys.readouterr().out
    assert "on trio failed" in printed
    assert set(shapes(example)) - {"  ..."} <= set(shapes(printed))


def shapes(report: str) -> list[str]:
    """The lines of a report, without numbers, files and the names of tasks."""
    return [re.sub(r"\d+", "0", re.sub(r"^  \S+: \S+:\d+ in ", "  in ", line)) for line in report.splitlines()]


def test_the_example_of_exploration_passes_once_it_is_corrected() -> None:
    consumer, exploration = EXPLORE
    miss, wait = re.findall(r"^            (?:await self\..*\n)", consumer, re.MULTILINE)
    with pytest.raises(AssertionError, match="nothing was found"):
        show(exploration, **show(consumer.replace(miss + wait, wait + miss), **show(IMPORTS)))


def test_a_consumer_with_a_bug_fails_the_examples() -> None:
    consumer, first, sweep = BLOCKS[:3]
    names = show(consumer)
    forgetful = show(consumer.replace("self.prices.clear()", "pass"))
    with pytest.raises(ExceptionGroup) as caught:
        show(first, **forgetful)
    assert caught.group_contains(AssertionError)
    leaking = "if stream := await manager.subscribe(source).__aenter__():"
    names |= show(first, **names) | show(consumer.replace("async with manager.subscribe(source) as stream:", leaking))
    with pytest.raises(AssertionError) as failed:
        show(sweep, **names)
    assert failed.value.__notes__[0].startswith("cancelled before step ")


def test_the_plugin_is_where_the_page_says() -> None:
    (block,) = [block for block in BLOCKS if "pytest_plugins" in block]
    assert show(block)["pytest_plugins"] == [pytest_plugin.__name__]


def test_the_tables_show_all_ways_and_all_rules() -> None:
    assert rows("| way |") == list(typing.get_args(_sweep.CancelWay))
    assert rows("| rule |") == list(typing.get_args(_conformance.Rule))


@pytest.mark.parametrize("name", testing.__all__)
def test_every_public_name_is_on_the_page(name: str) -> None:
    hidden = {"Finding", "WaitingTask"}  # what one comes by, and does not make
    assert (f"`{name}" in PAGE) == (name not in hidden)


def test_the_defaults_are_those_on_the_page() -> None:
    page = PAGE[PAGE.index("## `check_source`") :]
    shown = re.findall(r"`(\w+)=([\d.]+)`", page)
    assert {name: float(value) for name, value in shown} == {
        name: parameter.default
        for name, parameter in inspect.signature(testing.check_source).parameters.items()
        if name not in ("source", "events")
    }
    assert f"max_steps={inspect.signature(testing.cancel_sweep).parameters['max_steps'].default})" in PAGE
    for name, parameter in inspect.signature(testing.explore).parameters.items():
        assert name == "scenario" or f"{name}={parameter.default}" in PAGE[PAGE.index("`explore(scenario, ") :]
    assert f"after {_explore_schedule.MAX_STEPS} steps" in PAGE
    assert f"longer than {_deadlock.PATIENCE:g} seconds of real time" in PAGE
