"""The pytest plugin runs marked tests, and their fixtures, in virtual time on every backend that has it."""

from __future__ import annotations

import re

import hypothesis
import pytest

pytest_plugins = ["pytester"]

#: What a session inside this one imports first is imported again afterwards, and hypothesis does not like that.
assert hypothesis.__name__

CONFTEST = """
import pytest

pytest_plugins = ["anyio_sharedstream.testing.pytest_plugin"]

@pytest.fixture(params=["asyncio", ("trio", {}), ("asyncio", {"use_uvloop": True})])
def anyio_backend(request):
    return request.param
"""

HEAD = """
import anyio, pytest
pytestmark = pytest.mark.virtual_time
"""


@pytest.fixture
def outcomes(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest(CONFTEST)
    return pytester


def run(pytester: pytest.Pytester, test: str, *arguments: str, **expected: int) -> str:
    """Run a module of tests; returns what pytest prints."""
    pytester.makepyfile(HEAD + test)
    result = pytester.runpytest_inprocess("--strict-markers", "-p", "no:cacheprovider", *arguments)
    result.assert_outcomes(**expected)
    return result.stdout.str()


def test_a_marked_test_runs_in_virtual_time_where_there_is_such_a_thing(outcomes: pytest.Pytester) -> None:
    output = run(
        outcomes,
        """
async def test_sleep():
    assert anyio.current_time() == 0
    await anyio.sleep(86400)
    assert anyio.current_time() == 86400
""",
        "-rs",
        passed=2,
        skipped=1,
    )
    assert "there is no virtual time on uvloop" in output


@pytest.mark.parametrize("arguments", [(), ("-o", "anyio_mode=auto")])
def test_only_what_is_marked_is_changed(outcomes: pytest.Pytester, arguments: tuple[str, ...]) -> None:
    test = """
pytestmark = []

@pytest.fixture
async def now():
    return anyio.current_time()

@pytest.mark.virtual_time
async def test_marked(now):
    await anyio.sleep(9)
    assert anyio.current_time() == now + 9 == 9

@pytest.mark.anyio
async def test_not_marked(now):
    await anyio.sleep(0)
    assert anyio.current_time() - now < 1

@pytest.mark.virtual_time
def test_not_asynchronous():
    pass
"""
    run(outcomes, test, *arguments, passed=2 + 3 + 1, skipped=1)


def test_asynchronous_fixtures_are_set_up_and_torn_down_in_the_same_time(outcomes: pytest.Pytester) -> None:
    test = """
order = []

@pytest.fixture
def plain():
    return 0.5

@pytest.fixture(autouse=True)
async def always():
    order[:] = ["always"]

@pytest.fixture
async def slow(plain):
    await anyio.sleep(1)
    order.append("slow")
    return plain

@pytest.fixture
async def tasks(slow):
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.sleep, 100)
        yield tasks
        tasks.cancel_scope.cancel()
    assert anyio.current_time() == 4
    assert order == ["always", "slow", "test"]

class TestMethods:
    @pytest.fixture
    async def remembered(self, slow):
        self.value = slow

    async def test_fixtures(self, tasks, slow, remembered):
        assert self.value == slow == 0.5
        order.append("test")
        assert anyio.current_time() == 1
        await anyio.sleep(3)
"""
    run(outcomes, test, passed=2, skipped=1)


def test_a_deadlock_is_a_failure_that_lists_the_waiting_tasks_and_other_tests_go_on(outcomes: pytest.Pytester) -> None:
    test = """
@pytest.fixture
async def stuck():
    await anyio.Event().wait()

async def test_stuck():
    await anyio.Event().wait()

async def test_with_a_stuck_fixture(stuck):
    pass

async def test_that_goes_on():
    await anyio.sleep(1)
"""
    output = run(outcomes, test, failed=4, passed=2, skipped=3)
    # In the traceback, where it stands whole: how much of it the summary repeats depends on the width of the terminal, and on CI.
    assert len(re.findall(r"^E +test_stuck: /.*\.py:9 in test_stuck$", output, re.MULTILINE)) == 2
    assert len(re.findall(r"^E +test_with_a_stuck_fixture: /.*\.py:6 in stuck$", output, re.MULTILINE)) == 2


def test_hypothesis_runs_each_example_from_the_beginning_of_time(outcomes: pytest.Pytester) -> None:
    test = """
from hypothesis import HealthCheck, given, settings, strategies

@pytest.fixture
async def later():
    await anyio.sleep(1)

@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=5)
@given(seconds=strategies.integers(1, 1000))
async def test_sleep(seconds, later):
    await anyio.sleep(seconds)
    assert anyio.current_time() == 1 + seconds
"""
    run(outcomes, test, passed=2, skipped=1)


def test_a_test_that_is_not_asynchronous_is_given_a_way_to_run_something(outcomes: pytest.Pytester) -> None:
    test = """
def test_run(run_in_virtual_time):
    async def double(number):
        await anyio.sleep(number)
        return 2 * number

    assert run_in_virtual_time(double, 500) == 1000
"""
    run(outcomes, test, passed=2, skipped=1)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_event_loop_that_anyio_keeps_for_other_tests_is_not_in_the_way(outcomes: pytest.Pytester, backend: str) -> None:
    outcomes.makepyfile(
        f"""
import anyio, pytest

@pytest.fixture(scope="module")
def anyio_backend():
    return "{backend}"

@pytest.fixture(scope="module")
async def server():
    yield 1

@pytest.mark.anyio
async def test_before(server):
    assert server

@pytest.mark.virtual_time
async def test_virtual():
    await anyio.sleep(86400)

def test_run(run_in_virtual_time):
    run_in_virtual_time(anyio.sleep, 86400)

def test_failing(run_in_virtual_time):
    async def fail():
        raise RuntimeError("its own")
    with pytest.raises(RuntimeError, match="its own"):
        run_in_virtual_time(fail)

@pytest.mark.anyio
async def test_after(server):
    assert server
"""
    )
    outcomes.runpytest_inprocess("--strict-markers", "-p", "no:cacheprovider").assert_outcomes(passed=5)


def test_an_error_of_the_tests_own_is_raised_once(outcomes: pytest.Pytester) -> None:
    test = """
def test_failing(run_in_virtual_time):
    began = []
    async def fail():
        began.append(anyio.current_time())
        raise RuntimeError("its own")
    with pytest.raises(RuntimeError, match="its own"):
        run_in_virtual_time(fail)
    assert began == [0]
"""
    run(outcomes, test, passed=2, skipped=1)


def test_fixtures_that_cannot_be_in_virtual_time_are_refused(outcomes: pytest.Pytester) -> None:
    test = """
@pytest.fixture
async def late():
    return 1

@pytest.fixture
def early(request, late):
    return late

@pytest.fixture(scope="module")
def anyio_backend():
    return "asyncio"

@pytest.fixture(scope="module")
async def wide():
    return 1

async def test_early(early):
    pass

async def test_wide(wide):
    pass
"""
    output = run(outcomes, test, errors=1, failed=1)
    assert "the fixture 'early' is not asynchronous and asks for 'late', which is" in output
    assert "the asynchronous fixture 'wide' has the scope 'module'" in output


def test_a_test_may_be_given_arguments_by_what_decorates_it_and_need_no_instance(outcomes: pytest.Pytester) -> None:
    test = """
from unittest import mock

@mock.patch("os.getcwd")
async def test_patched(getcwd, request):
    await anyio.sleep(1)
    assert isinstance(getcwd, mock.Mock)
    assert request.node.name.startswith("test_patched")

class TestMethods:
    @staticmethod
    async def test_static():
        await anyio.sleep(86400)

    @classmethod
    async def test_class(cls):
        await anyio.sleep(86400)
        assert cls is TestMethods
"""
    run(outcomes, test, passed=6, skipped=3)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_beside_an_event_loop_of_anyios_a_test_has_the_context_of_its_fixtures(outcomes: pytest.Pytester, backend: str) -> None:
    outcomes.makepyfile(
        f"""
import anyio, pytest
from contextvars import ContextVar

name = ContextVar("name", default=None)

@pytest.fixture(scope="module")
def anyio_backend():
    return "{backend}"

@pytest.fixture(scope="module")
async def server():
    yield 1

@pytest.fixture
def named():
    token = name.set("Ada")
    yield
    name.reset(token)

@pytest.mark.anyio
async def test_before(server):
    assert server

@pytest.mark.virtual_time
async def test_virtual(named):
    await anyio.sleep(1)
    assert name.get() == "Ada"
"""
    )
    outcomes.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=2)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_test_beside_an_event_loop_of_anyios_can_be_interrupted(outcomes: pytest.Pytester, backend: str) -> None:
    outcomes.makepyfile(
        f"""
import os, signal, anyio, pytest

@pytest.fixture(scope="module")
def anyio_backend():
    return "{backend}"

@pytest.fixture(scope="module")
async def server():
    yield 1

@pytest.mark.anyio
async def test_before(server):
    assert server

@pytest.mark.virtual_time
async def test_for_ever():
    os.kill(os.getpid(), signal.SIGINT)
    while True:
        await anyio.sleep(1)
"""
    )
    done = outcomes.runpytest_subprocess("-p", "no:cacheprovider", timeout=60)
    assert done.ret == pytest.ExitCode.INTERRUPTED
    done.assert_outcomes(passed=1)


def test_an_asynchronous_fixture_that_is_asked_for_while_the_test_runs_is_refused(outcomes: pytest.Pytester) -> None:
    test = """
@pytest.fixture
async def late():
    return 1

async def test_late(request):
    request.getfixturevalue("late")

def test_other(run_in_virtual_time):
    run_in_virtual_time(anyio.sleep, 1)
"""
    output = run(outcomes, test, failed=2, passed=2, skipped=2)
    assert "the asynchronous fixture 'late' is too late: in virtual time, a test names its fixtures" in output
