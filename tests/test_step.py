"""`Step` behaves as the awaitable that it watches, as PEP 380 says of ``yield from``."""

from __future__ import annotations

from collections.abc import Callable, Generator
from types import coroutine
from typing import Any, NoReturn

import pytest
from anyio.lowlevel import checkpoint

from anyio_sharedstream._step import Step


class Awaitable:
    """Awaits whatever iterator it is given."""

    def __init__(self, iterator: Any) -> None:
        self._iterator = iterator

    def __await__(self) -> Any:
        return self._iterator


class Watch:
    """Counts the calls before a suspension, and answers as told."""

    def __init__(self, published: bool = False) -> None:
        self.calls = 0
        self._published = published

    def __call__(self) -> bool:
        self.calls += 1
        return self._published


class Bare:
    """An iterator that gives *signals* and then returns *result*; it has neither ``send`` nor ``throw`` nor ``close``."""

    def __init__(self, *signals: Any, result: Any = None) -> None:
        self._signals = list(signals)
        self._result = result

    def __next__(self) -> Any:
        if self._signals:
            return self._signals.pop(0)
        raise StopIteration(self._result)


def driven(iterator: Any, watch: Callable[[], bool] | None = None) -> Generator[Any, Any, Any]:
    return Step[Any](Awaitable(iterator), watch or Watch()).__await__()


def result_of(resume: Callable[..., Any], *args: Any) -> Any:
    """Resume to the end, and give what is returned."""
    with pytest.raises(StopIteration) as caught:
        resume(*args)
    return caught.value.value


def echo() -> Generator[Any, Any, Any]:
    """Gives back what it was sent, or what was thrown into it."""
    answer: Any = "first"
    while answer != "enough":
        try:
            answer = yield answer
        except ValueError as exc:
            answer = exc
    return "result"


def test_what_returns_at_once_does_not_suspend_and_publishes_nothing() -> None:
    watch = Watch()
    step = Step[str](Awaitable(Bare(result="result")), watch)
    assert result_of(next, step.__await__()) == "result"
    assert not step.suspended
    assert watch.calls == 0


def test_what_raises_at_once_does_not_suspend_and_publishes_nothing() -> None:
    def broken() -> Generator[None, None, None]:
        yield throw()

    def throw() -> NoReturn:
        raise ValueError("broken")

    watch = Watch()
    step = Step[None](Awaitable(broken()), watch)
    with pytest.raises(ValueError, match="broken"):
        next(step.__await__())
    assert not step.suspended
    assert watch.calls == 0


def test_a_generator_that_may_be_awaited_is_one_without_an_await_of_its_own() -> None:
    @coroutine
    def waits() -> Generator[str, None, str]:
        yield "signal"
        return "result"

    generator = Step[str](waits(), Watch()).__await__()
    assert next(generator) == "signal"
    assert result_of(next, generator) == "result"


def test_it_publishes_once_and_before_the_first_suspension() -> None:
    order: list[str] = []

    def watch() -> bool:
        order.append("published")
        return False

    step = Step[str](Awaitable(Bare("one", "two", result="result")), watch)
    generator = step.__await__()
    order += [next(generator), next(generator), result_of(next, generator)]
    assert order == ["published", "one", "two", "result"]
    assert step.suspended


def test_what_is_sent_and_thrown_reaches_the_awaitable() -> None:
    generator = driven(echo())
    assert next(generator) == "first"
    assert generator.send("sent") == "sent"
    error = ValueError("thrown")
    assert generator.throw(error) is error
    assert next(generator) is None
    assert result_of(generator.send, "enough") == "result"


def test_an_error_that_the_awaitable_does_not_handle_is_raised() -> None:
    generator = driven(echo())
    next(generator)
    error = KeyError("thrown")
    with pytest.raises(KeyError) as caught:
        generator.throw(error)
    assert caught.value is error


def test_what_the_awaitable_returns_on_an_error_is_the_result() -> None:
    def forgiving() -> Generator[None, None, str]:
        with pytest.raises(ValueError, match="thrown"):
            yield
        return "forgiven"

    generator = driven(forgiving())
    next(generator)
    assert result_of(generator.throw, ValueError("thrown")) == "forgiven"


def test_what_the_awaitable_raises_after_its_suspension_is_raised() -> None:
    def broken() -> Generator[None, None, None]:
        yield
        raise ValueError("broken")

    generator = driven(broken())
    next(generator)
    with pytest.raises(ValueError, match="broken"):
        next(generator)


def test_an_iterator_without_send_is_driven_on_by_next() -> None:
    generator = driven(Bare("one", "two", result="result"))
    assert [next(generator), next(generator)] == ["one", "two"]
    assert result_of(generator.send, None) == "result"


def test_an_iterator_without_send_cannot_be_sent_anything() -> None:
    generator = driven(Bare("one", "two"))
    next(generator)
    with pytest.raises(AttributeError, match="send"):
        generator.send("something")


def test_an_error_thrown_into_an_iterator_without_throw_is_raised() -> None:
    generator = driven(Bare("one", "two"))
    next(generator)
    error = ValueError("thrown")
    with pytest.raises(ValueError, match="thrown") as caught:
        generator.throw(error)
    assert caught.value is error


def test_closing_closes_the_awaitable_and_does_not_throw_into_it() -> None:
    class Closable(Bare):
        closed = 0

        def close(self) -> None:
            self.closed += 1

    iterator = Closable("one")
    generator = driven(iterator)
    next(generator)
    generator.close()
    assert iterator.closed == 1


def test_closing_one_that_has_no_close_is_no_error() -> None:
    generator = driven(Bare("one"))
    next(generator)
    generator.close()
    with pytest.raises(StopIteration):
        next(generator)


def test_what_closing_raises_is_raised() -> None:
    def stubborn() -> Generator[None, None, None]:
        try:
            yield
        finally:
            raise ValueError("on closing")

    generator = driven(stubborn())
    next(generator)
    with pytest.raises(ValueError, match="on closing"):
        generator.close()


class Turns:
    """Counts turns of the event loop while something is awaited."""

    def __init__(self) -> None:
        self.suspensions = 0

    async def twice(self) -> str:
        await checkpoint()
        await checkpoint()
        return "result"

    def counted(self, generator: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        try:
            signal = next(generator)
            while True:
                self.suspensions += 1
                signal = generator.send((yield signal))
        except StopIteration as done:
            return done.value

    async def of(self, published: bool) -> int:
        step = Step[str](Awaitable(self.twice().__await__()), Watch(published))
        assert await Awaitable(self.counted(step.__await__())) == "result"
        return self.suspensions


async def test_a_publication_may_ask_for_one_turn_more() -> None:
    assert await Turns().of(published=True) == await Turns().of(published=False) + 1


def test_what_publishing_raises_is_raised_inside_the_awaitable() -> None:
    def watch() -> bool:
        raise ValueError("broken")

    generator = driven(echo(), watch)
    answer = next(generator)
    assert isinstance(answer, ValueError)
    assert result_of(generator.send, "enough") == "result"


async def test_one_that_was_cancelled_while_it_settled_is_closed() -> None:
    closed: list[bool] = []

    class Closable(Bare):
        def close(self) -> None:
            closed.append(True)

    generator = driven(Closable("one", "two"), Watch(published=True))
    assert next(generator) == "one"
    signal = next(generator)  # a turn of the event loop
    assert signal != "two"
    generator.close()
    assert closed == [True]
