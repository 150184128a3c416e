"""The kit's public names are documented, and it imports what it needs where it needs it."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

from anyio_sharedstream import testing
from tests.test_layering import imports
from tests.test_public_api import described_attributes

MODULES = {path.stem: path for path in sorted(Path(testing.__file__).parent.glob("*.py"))}

#: What only some modules may import, and only where it is wanted.
GUARDED = {
    "detangle": {"_explore_asyncio"},
    "pytest": {"pytest_plugin"},
    "trio": {"_explore_trio", "_life", "_life_trio", "_virtual_trio"},
}

every_module = pytest.mark.parametrize("module", MODULES)
every_name = pytest.mark.parametrize("name", testing.__all__)


def test_there_are_no_other_public_names() -> None:
    public = {name for name in vars(testing) if not name.startswith("_")}
    assert public - set(MODULES) == set(testing.__all__)
    assert testing.__all__ == sorted(testing.__all__)


@every_name
def test_every_public_name_and_its_members_are_documented(name: str) -> None:
    thing: Any = getattr(testing, name)
    assert thing.__doc__
    assert not thing.__doc__.startswith(f"{name}(")
    if not inspect.isclass(thing):
        return
    members = {member for member in vars(thing) if not member.startswith("_")}
    undocumented = members - described_attributes(thing)
    assert [member for member in sorted(undocumented) if not getattr(thing, member).__doc__] == []


@every_module
@pytest.mark.parametrize("package", GUARDED)
def test_what_is_optional_is_imported_only_where_it_is_used(module: str, package: str) -> None:
    names = {name.partition(".")[0] for name, _ in imports(ast.parse(MODULES[module].read_text()))}
    assert package not in names or module in GUARDED[package]
