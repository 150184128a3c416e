"""Virtual time for pytest: the marker ``virtual_time`` and the fixture ``run_in_virtual_time``.

Relies on anyio's own plugin for the fixture ``anyio_backend``, which says on which backends a test is run. To use it, write
``pytest_plugins = ["anyio_sharedstream.testing.pytest_plugin"]`` into the topmost ``conftest.py``.

A test with the marker is run by `anyio_sharedstream.testing.run` rather than by anyio's test runner. That one keeps an event
loop, and a task that waits in it, from one test and fixture to the next, and with trio it would wait for ever for an event loop
that a deadlock has ended. So the test's asynchronous fixtures are not set up where pytest asks for them, but in the same run as
the test, just before it.
"""

from __future__ import annotations

import inspect
import signal
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from contextvars import Context, copy_context
from functools import partial, update_wrapper
from threading import Thread
from typing import Any

import pytest

from anyio_sharedstream.testing._virtual_time import run
from anyio_sharedstream.testing._waiting import name_of

__all__ = ["run_in_virtual_time"]

MARKER = "virtual_time"
_RUNNING = pytest.StashKey[bool]()

#: The name of sniffio's context variable, in which anyio notes the event loop where sniffio is installed.
_EVENT_LOOP = "current_async_library_cvar"
_DESCRIPTION = f"{MARKER}: run the asynchronous test, and its asynchronous fixtures, in virtual time"


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", _DESCRIPTION)


@pytest.fixture
def run_in_virtual_time(anyio_backend: Any) -> Callable[..., Any]:
    """`anyio_sharedstream.testing.run` on the backend of the test: for tests that are not asynchronous themselves."""
    return partial(_run, backend=_backend(anyio_backend))


def _run(function: Callable[..., Awaitable[Any]], *args: Any, backend: str) -> Any:
    """`run`, in a thread of its own if there is an event loop in this one.

    anyio's test runner has one for as long as there is an asynchronous fixture of a wider scope, from one test to the next.
    """
    began = False

    async def begin() -> Any:
        nonlocal began
        began = True
        return await function(*args)

    begin.__qualname__ = name_of(function)
    try:
        return run(begin, backend=backend)
    except RuntimeError:
        if began:
            raise
    outcome: Future[Any] = Future()
    context = _context()

    def work() -> None:
        try:
            outcome.set_result(context.run(lambda: run(begin, backend=backend)))
        except BaseException as exc:
            outcome.set_exception(exc)

    with _interruptible():
        # Not waited for by anybody but this: whoever interrupts a test that goes on for ever wants to be rid of it.
        Thread(target=work, name=begin.__qualname__, daemon=True).start()
        return outcome.result()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end the wait: trio's handler would keep the interrupt for the event loop that rests meanwhile."""
    handler: Any = signal.getsignal(signal.SIGINT)
    if not getattr(handler, "__module__", "").startswith("trio."):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _context() -> Context:
    """What the test's other fixtures have put into the context, and not that there is an event loop."""
    context = copy_context()
    for variable in context:
        if variable.name == _EVENT_LOOP:
            context.run(variable.set, None)
    return context


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: Any, name: str, obj: Any) -> None:
    """Have a marked asynchronous test run once on each backend, as anyio's plugin does with those that have its own marker."""
    function = obj.__func__ if isinstance(obj, staticmethod | classmethod) else obj
    if collector.istestfunction(obj, name) and inspect.iscoroutinefunction(_inner(function)):
        marks = getattr(function, "pytestmark", ())
        if collector.get_closest_marker(MARKER) or any(mark.name == MARKER for mark in marks):
            pytest.mark.usefixtures("anyio_backend")(function)


class _Deferred:
    """Stands for an asynchronous fixture until the test is run."""

    def __init__(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        self._function = function
        self._arguments = arguments
        self._value: Any = None
        self._entered = False

    async def value(self, stack: AsyncExitStack) -> Any:
        """Set it up, and what it asks for before it; the stack tears it down."""
        if not self._entered:
            self._entered = True
            stack.callback(setattr, self, "_entered", False)  # for the next run: hypothesis runs a test many times
            arguments = await _resolved(self._arguments, stack)
            if inspect.isasyncgenfunction(self._function):
                self._value = await stack.enter_async_context(asynccontextmanager(self._function)(**arguments))
            else:
                self._value = await self._function(**arguments)
        return self._value


async def _value(argument: Any, stack: AsyncExitStack) -> Any:
    return await argument.value(stack) if isinstance(argument, _Deferred) else argument


async def _resolved(arguments: Mapping[str, Any], stack: AsyncExitStack) -> dict[str, Any]:
    return {name: await _value(each, stack) for name, each in arguments.items()}


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup(fixturedef: Any, request: Any) -> Generator[None, object, object]:
    """Defer the asynchronous fixtures of a marked test."""
    original = fixturedef.func
    if request._pyfuncitem.stash.get(_RUNNING, False) and _is_asynchronous(original):
        message = f"the asynchronous fixture {fixturedef.argname!r} is too late: in virtual time, a test names its fixtures"
        fixturedef.func = partial(_refuse, message)
    elif fixturedef.scope != "function" or not _is_virtual(request.node):
        return (yield)
    elif _is_asynchronous(original):
        fixturedef.func = _deferring(original, request)
    else:
        # What is wrong is raised where the fixture would be: an error of a plugin is not the test's.
        fixturedef.func = _refusal(fixturedef, request) or original
    try:
        return (yield)
    finally:
        fixturedef.func = original


def _deferring(function: Callable[..., Any], request: Any) -> Callable[..., Any]:
    if inspect.ismethod(function) and request.instance is not None:
        function = function.__func__.__get__(request.instance)  # the instance that the test has, and not the one it was found on
    return lambda **arguments: _Deferred(function, arguments)


def _refusal(fixturedef: Any, request: Any) -> Callable[..., Any] | None:
    for name in fixturedef.argnames:
        if name != "request" and isinstance(request.getfixturevalue(name), _Deferred):
            message = (
                f"the fixture {fixturedef.argname!r} is not asynchronous and asks for {name!r}, which is: in virtual time "
                f"{name!r} is set up just before the test, so {fixturedef.argname!r} must be asynchronous as well"
            )
            return partial(_refuse, message)
    return None


def _refuse(message: str, **_: object) -> None:
    raise TypeError(message)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: Any) -> Generator[None, object, object]:
    """Make of a marked asynchronous test one that pytest can call."""
    if not _is_virtual(pyfuncitem):
        return (yield)
    _refuse_wider_scopes(pyfuncitem)
    test = _inner(pyfuncitem.obj)
    fixtures = {name: value for name, value in pyfuncitem.funcargs.items() if isinstance(value, _Deferred)}
    virtual = _in_virtual_time(test, fixtures, _backend(pyfuncitem.funcargs["anyio_backend"]))
    pyfuncitem.stash[_RUNNING] = True
    if not hasattr(pyfuncitem.obj, "hypothesis"):
        pyfuncitem.obj = virtual
        return (yield)
    pyfuncitem.obj.hypothesis.inner_test = virtual
    try:
        return (yield)
    finally:
        pyfuncitem.obj.hypothesis.inner_test = test


def _refuse_wider_scopes(item: Any) -> None:
    for name, (*_, fixturedef) in item._fixtureinfo.name2fixturedefs.items():
        if fixturedef.scope != "function" and _is_asynchronous(fixturedef.func):
            raise TypeError(
                f"the asynchronous fixture {name!r} has the scope {fixturedef.scope!r}: in virtual time every test has an "
                "event loop of its own, so it must have the scope 'function'"
            )


def _in_virtual_time(
    test: Callable[..., Awaitable[object]], fixtures: Mapping[str, _Deferred], backend: str
) -> Callable[..., None]:
    def virtual(*args: Any, **kwargs: Any) -> None:
        async def with_fixtures() -> None:
            async with AsyncExitStack() as stack:
                await _resolved(fixtures, stack)  # also those that the test does not name
                positional = [await _value(each, stack) for each in args]  # hypothesis passes them so
                await test(*positional, **await _resolved(kwargs, stack))

        _run(update_wrapper(with_fixtures, test), backend=backend)

    return virtual


def _inner(function: Any) -> Any:
    return function.hypothesis.inner_test if hasattr(function, "hypothesis") else function


def _is_asynchronous(function: object) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def _is_virtual(item: Any) -> bool:
    return item.get_closest_marker(MARKER) is not None and inspect.iscoroutinefunction(_inner(item.obj))


def _backend(anyio_backend: Any) -> str:
    name, options = (anyio_backend, {}) if isinstance(anyio_backend, str) else anyio_backend
    if options.get("use_uvloop"):
        pytest.skip("there is no virtual time on uvloop")
    return str(name)
