"""What README.md shows is run as it stands there, with stubs for what is not this library's."""

from __future__ import annotations

import re
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import anyio
import pytest

from anyio_sharedstream import SharedStreamManager, testing
from anyio_sharedstream.testing import run
from tests.support import Feed, idle, until

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return found


def execute(code: str, **names: Any) -> dict[str, Any]:
    # Compiled on its own terms: without `dont_inherit` it would have this module's `from __future__ import annotations`.
    exec(compile(code, "README.md", "exec", dont_inherit=True), names)
    return names


def show(code: str, **names: Any) -> dict[str, Any]:
    """Execute an example that runs event loops, in a thread of its own.

    Coverage does not trace it, and loses its place in whoever calls it when exceptions are thrown into untraced coroutines.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(execute, code, **names).result()


class FeedClosedError(Exception):
    """How the stub of a feed ends."""


async def test_the_first_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    connected: list[str] = []

    @asynccontextmanager
    async def connect(symbol: str) -> AsyncIterator[AsyncIterator[float]]:
        async def feed() -> AsyncGenerator[float, None]:
            yield 1.5
            yield 2.5
            raise FeedClosedError

        connected.append(symbol)
        yield feed()

    programs: list[Callable[[], Coroutine[Any, Any, None]]] = []
    monkeypatch.setattr(anyio, "run", programs.append)
    execute(blocks("python")[0], connect=connect)
    (main,) = programs
    with pytest.raises(FeedClosedError):
        await main()
    assert connected == ["BTC"]
    assert capsys.readouterr().out == "1.5\n2.5\n"


def test_the_first_example_has_ten_lines_and_its_imports() -> None:
    lines = [line for line in blocks("python")[0].splitlines() if line]
    assert sum("import" not in line for line in lines) == 10


class StubResponse:
    """The part of Starlette's streaming response that the example builds upon."""

    def __init__(self, content: AsyncIterator[str], media_type: str) -> None:
        self.content = content

    async def __call__(self, scope: Any, receive: Any, send: Callable[[str], Coroutine[Any, Any, None]]) -> None:
        async for part in self.content:
            await send(part)


async def test_the_web_application(monkeypatch: pytest.MonkeyPatch) -> None:
    def stub(name: str, **contents: Any) -> None:
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)

    stub("starlette")
    stub("starlette.applications", Starlette=SimpleNamespace)
    stub("starlette.responses", StreamingResponse=StubResponse)
    stub("starlette.routing", Route=lambda path, endpoint: endpoint)
    feed = Feed("BTC")
    app = execute(blocks("python")[1], prices=lambda symbol: feed.source)["app"]
    lifespan: AbstractAsyncContextManager[dict[str, SharedStreamManager]] = app.lifespan(app)
    sent: list[str] = []

    async def send(part: str) -> None:
        sent.append(part)

    async def client(state: dict[str, Any], scope: anyio.CancelScope) -> None:
        response = await app.routes[0](SimpleNamespace(state=SimpleNamespace(**state), path_params={"symbol": "BTC"}))
        with scope:  # as a framework does to a response whose client has gone
            await response({}, None, send)

    async with lifespan as state, anyio.create_task_group() as tasks:
        scopes = [anyio.CancelScope(), anyio.CancelScope()]
        for scope in scopes:
            tasks.start_soon(client, state, scope)
        await until(lambda: feed.opened)
        feed.emit(7)
        await until(lambda: len(sent) == 2)
        scopes[0].cancel()
        await until(lambda: len(state["manager"].statistics().groups[feed.key].subscriptions) == 1)
        assert feed.open_now == 1
        scopes[1].cancel()
    assert sent == ["data: 7\n\n"] * 2
    assert (feed.opened, feed.closed) == (1, 1)
    assert idle(state["manager"])


def test_the_example_of_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    backends: list[str] = []

    def note_and_run(function: Callable[[], Coroutine[Any, Any, None]], *, backend: str) -> None:
        backends.append(backend)
        run(function, backend=backend)

    monkeypatch.setattr(testing, "run", note_and_run)
    show(blocks("python")[2])
    assert backends == ["asyncio", "trio"]


def test_there_are_two_commands() -> None:
    # `.ci/run` takes the first and the second block for them, and runs them as they stand.
    run, test = blocks("bash")
    assert "examples/flag_directory.py --backend asyncio" in run
    assert "examples/flag_directory.py --backend trio" in run
    assert test.rstrip().endswith("-m pytest")


def test_what_the_readme_links_to_is_there() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert targets
    assert [target for target in targets if not (Path(__file__).parent.parent / target).is_file()] == []
