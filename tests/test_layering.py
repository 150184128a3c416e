"""The house: imports point down one list, and no module or function grows beyond what can be read at a sitting."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import anyio_sharedstream

PACKAGE = "anyio_sharedstream"

#: From top to bottom: a module may import from those below it, and from no other.
CORE = [
    "__init__",
    "_manager",
    "_registry",
    "_contract",
    "_poll",
    "_producing",
    "_workers",
    "_drive",
    "_ack_group",
    "_group",
    "_upstream",
    "_timers",
    "_ack_publisher",
    "_publisher",
    "_hold",
    "_audience",
    "_conflating",
    "_lossy",
    "_entries",
    "_history",
    "_acknowledging",
    "_answering",
    "_pending",
    "_accounts",
    "_advancing",
    "_lanes",
    "_ledger",
    "_restarts",
    "_epoch",
    "_clock",
    "_states",
    "_subscription",
    "_mailbox",
    "_buffer",
    "_parking",
    "_parking_trio",
    "_step",
    "_producer",
    "_source",
    "_statistics",
    "_policies",
    "_lifecycle",
    "_leaving",
    "_logging",
    "_exceptions",
]

#: The triggers are a user of the package like any other: they import its public names, each other downwards, and what knows of
#: no stream at all.
TRIGGERS = ["triggers", "_trigger_run", "_trigger_confirm", "_trigger_outcomes"]

#: The brokers are users of the package, too.
ADAPTERS = ["adapters.redis_streams", "adapters._redis_consumer", "adapters._redis_group"]

#: So is the kit for testing what is built on the package. It looks into it here and there, where a source is opened and driven.
TESTING = [
    "testing.pytest_plugin",
    "testing",
    "testing._conformance",
    "testing._life",
    "testing._life_trio",
    "testing._watchdog",
    "testing._explore",
    "testing._explore_trio",
    "testing._explore_asyncio",
    "testing._explore_schedule",
    "testing._sweep",
    "testing._script",
    "testing._virtual_time",
    "testing._virtual_trio",
    "testing._virtual_asyncio",
    "testing._deadlock",
    "testing._waiting",
]

ROOT = Path(anyio_sharedstream.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in sorted(ROOT.rglob("*.py"))
}
LONGEST_MODULE = 300
LONGEST_FUNCTION = 40

every_module = pytest.mark.parametrize("module", MODULES)


def imports(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """What is imported, anywhere in a module: from which module, and which names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), [alias.name for alias in node.names]


def imported_modules(source: str) -> set[str]:
    """The modules of this package that *source* imports."""
    found: set[str] = set()
    for module, names in imports(ast.parse(source)):
        assert not module.startswith("."), "imports are absolute"
        package, _, rest = module.partition(".")
        if package == PACKAGE:
            # `from anyio_sharedstream import _group` imports a module too.
            found |= {rest} if rest else {name if name in CORE + TRIGGERS else "__init__" for name in names or ["__init__"]}
    return found


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def importable(module: str) -> set[str]:
    """The modules of this package that *module* may import."""
    if module in TRIGGERS:
        return {
            "__init__",
            "_advancing",
            "_clock",
            "_leaving",
            "_logging",
            "_subscription",
            "_exceptions",
            *TRIGGERS[TRIGGERS.index(module) + 1 :],
        }
    if module in ADAPTERS:
        return {"__init__", "_lifecycle", "_logging", "_producer", *ADAPTERS[ADAPTERS.index(module) + 1 :]}
    if module in TESTING:
        return {"__init__", "_exceptions", "_lifecycle", "_source", "_step", *TESTING[TESTING.index(module) + 1 :]}
    return set() if module == "adapters" else set(CORE[CORE.index(module) + 1 :])


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import anyio", set()),
        ("import anyio_sharedstream", {"__init__"}),
        ("import anyio_sharedstream._group", {"_group"}),
        ("from anyio_sharedstream import SharedSource, _group", {"__init__", "_group"}),
        ("from anyio_sharedstream._group import Group", {"_group"}),
        ("def later():\n    from anyio_sharedstream._group import Group", {"_group"}),
    ],
)
def test_every_form_of_import_is_seen(source: str, found: set[str]) -> None:
    assert imported_modules(source) == found


def test_every_module_has_its_place() -> None:
    assert set(MODULES) <= {*CORE, *TRIGGERS, "adapters", *ADAPTERS, *TESTING}


@every_module
def test_no_module_imports_upwards(module: str) -> None:
    assert imported_modules(MODULES[module].read_text()) <= importable(module)


@every_module
def test_every_module_begins_with_a_docstring(module: str) -> None:
    assert ast.get_docstring(ast.parse(MODULES[module].read_text()))


@every_module
def test_no_module_is_too_long(module: str) -> None:
    assert len(MODULES[module].read_text().splitlines()) <= LONGEST_MODULE


@every_module
def test_no_function_is_too_long(module: str) -> None:
    lengths = {function.name: length(function) for function in functions(ast.parse(MODULES[module].read_text()))}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION} == {}
