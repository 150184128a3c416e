"""The errors that subscribers see, and the copies that are made of a source's own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from anyio_sharedstream import AckTimeout, PollTerminated, SharedStreamError, SubscriberOverflow, UpstreamSilent
from anyio_sharedstream._exceptions import Terminal, private_copy, without


def raised(error: BaseException) -> BaseException:
    """The exception, raised once, so that it has a traceback and what else raising gives it."""
    try:
        raise error
    except BaseException as exc:
        return exc


def terminated() -> PollTerminated:
    return PollTerminated(("prices", "BTC"), "it returned")


def overflow() -> SubscriberOverflow:
    return SubscriberOverflow(("prices", "BTC"), "dashboard", 8)


def silent() -> UpstreamSilent:
    return UpstreamSilent(("prices", "BTC"), 30)


def late() -> AckTimeout:
    return AckTimeout(("prices", "BTC"), "ledger", 5)


every_error = pytest.mark.parametrize("make", [terminated, overflow, silent, late], ids=lambda make: make.__name__)


@every_error
def test_the_librarys_errors_have_one_base_class(make: Callable[[], Exception]) -> None:
    assert isinstance(make(), SharedStreamError)
    assert issubclass(SharedStreamError, Exception)


def test_poll_terminated_names_the_key_the_reason_and_what_to_do() -> None:
    error = terminated()
    assert (error.key, error.reason) == (("prices", "BTC"), "it returned")
    assert str(error) == "the upstream of ('prices', 'BTC') has terminated: it returned; subscribe again to open it anew"


def test_subscriber_overflow_names_the_key_the_subscriber_the_bound_and_what_to_do() -> None:
    error = overflow()
    assert (error.key, error.subscriber_id, error.max_buffer_size) == (("prices", "BTC"), "dashboard", 8)
    assert str(error) == (
        "subscriber 'dashboard' of ('prices', 'BTC') fell more than 8 events behind; "
        "receive faster, or subscribe with a larger max_buffer_size"
    )


def test_the_timeouts_name_the_key_the_subscriber_and_the_seconds() -> None:
    error = silent()
    assert (error.key, error.seconds, error.args) == (("prices", "BTC"), 30, (("prices", "BTC"), 30))
    timeout = late()
    assert (timeout.key, timeout.subscriber_id, timeout.seconds, timeout.args) == (
        ("prices", "BTC"),
        "ledger",
        5,
        (("prices", "BTC"), "ledger", 5),
    )


def test_subscriber_overflow_says_what_the_subscriber_was_too_slow_for() -> None:
    assert str(SubscriberOverflow("prices", "ledger", 8, "was asleep")) == (
        "subscriber 'ledger' of 'prices' was asleep; receive faster, or subscribe with a larger max_buffer_size"
    )


@every_error
def test_the_librarys_errors_survive_copying_and_pickling(make: Callable[[], Exception]) -> None:
    error = make()
    for twin in (copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error)), private_copy(error)):
        assert twin is not error
        assert (type(twin), twin.args, vars(twin), str(twin)) == (type(error), error.args, vars(error), str(error))


def test_making_an_error_does_not_run_the_keys_code() -> None:
    class Key:
        def __repr__(self) -> str:
            raise RuntimeError("a key's repr is foreign code")

    error = SubscriberOverflow(Key(), "dashboard", 8)
    with pytest.raises(RuntimeError, match="foreign"):
        str(error)


class TestPrivateCopy:
    def test_it_carries_traceback_cause_context_and_notes(self) -> None:
        error = raised(ValueError("broken", 1))
        error.__cause__, error.__context__, error.__suppress_context__ = OSError(1), OSError(2), False
        error.add_note("a note")
        twin = private_copy(error)
        assert twin is not error
        assert (type(twin), twin.args) == (ValueError, ("broken", 1))
        assert twin.__traceback__ is error.__traceback__ is not None
        assert twin.__cause__ is error.__cause__
        assert twin.__context__ is error.__context__
        assert twin.__suppress_context__ is False
        twin.add_note("another")
        assert error.__notes__ == ["a note"]

    def test_odd_notes_are_left_as_they_are(self) -> None:
        error = ValueError("broken")
        error.__notes__ = "no list"  # type: ignore[assignment]
        assert private_copy(error).__notes__ == "no list"  # type: ignore[comparison-overlap]

    def test_it_runs_no_constructor(self) -> None:
        calls: list[tuple[Any, ...]] = []

        class CountingError(Exception):
            def __init__(self, *args: Any) -> None:
                calls.append(args)
                super().__init__(*args)

        private_copy(CountingError("once"))
        assert calls == [("once",)]

    def test_it_keeps_arguments_that_cannot_be_compared(self) -> None:
        class Incomparable:
            __eq__ = None  # type: ignore[assignment]
            __hash__ = None  # type: ignore[assignment]

        error = ValueError(Incomparable())
        twin = private_copy(error)
        assert twin is not error
        assert twin.args[0] is error.args[0]

    def test_it_keeps_what_system_exit_and_stop_iteration_carry(self) -> None:
        twin = private_copy(SystemExit(3))
        assert isinstance(twin, SystemExit)
        assert twin.code == 3
        twin = private_copy(StopIteration("value"))
        assert isinstance(twin, StopIteration)
        assert twin.value == "value"

    def test_it_copies_the_members_of_groups_deep_down(self) -> None:
        leaf = raised(ValueError("leaf"))
        group = BaseExceptionGroup("outer", [BaseExceptionGroup("inner", [leaf]), KeyboardInterrupt()])
        twin = private_copy(group)
        assert isinstance(twin, BaseExceptionGroup)
        inner, interrupt = twin.exceptions
        assert isinstance(inner, BaseExceptionGroup)
        (twin_leaf,) = inner.exceptions
        assert repr(twin) == repr(group)
        assert twin_leaf is not leaf
        assert twin_leaf.__traceback__ is leaf.__traceback__
        assert interrupt is not group.exceptions[1]

    def test_it_copies_the_members_of_a_group_whose_constructor_takes_more(self) -> None:
        class CodedGroup(ExceptionGroup[Exception]):
            code: int

            def __new__(cls, message: str, errors: list[Exception], code: int) -> CodedGroup:  # noqa: PYI034 - local
                group = super().__new__(cls, message, errors)
                group.code = code
                return group

        group = CodedGroup("several", [ValueError("leaf")], 7)
        twin = private_copy(group)
        assert isinstance(twin, CodedGroup)
        assert (twin.code, twin.message, repr(twin.exceptions)) == (7, "several", repr(group.exceptions))
        assert twin is not group
        assert twin.exceptions[0] is not group.exceptions[0]

    def test_it_falls_back_on_the_exceptions_own_way_to_be_copied(self) -> None:
        class RegisteredError(UnicodeDecodeError):
            """Its arguments are not those of its built-in base class, so it knows itself how it is made."""

            def __init__(self, name: str) -> None:
                super().__init__("utf-8", b"", 0, 1, name)
                self.args = (name,)

        error = raised(RegisteredError("feed"))
        twin = private_copy(error)
        assert twin is not error
        assert isinstance(twin, RegisteredError)
        assert twin.args == ("feed",)
        assert twin.reason == "feed"
        assert twin.__traceback__ is error.__traceback__

    def test_it_runs_no_constructor_of_an_os_error_either(self) -> None:
        calls: list[tuple[Any, ...]] = []

        class CountingError(OSError):
            """An `OSError` takes its arguments in ``__new__`` if its class has one, and in ``__init__`` if not."""

            def __new__(cls, *args: Any) -> CountingError:  # noqa: PYI034 - local
                calls.append(args)
                return super().__new__(cls, *args)

        error = CountingError(2, "no such file", "feed.toml")
        twin = private_copy(error)
        assert calls == [(2, "no such file", "feed.toml")]
        assert isinstance(twin, CountingError)
        assert twin is not error
        assert (twin.args, twin.filename, str(twin)) == (error.args, "feed.toml", str(error))

    def test_an_attribute_that_was_taken_away_is_not_made_again_of_the_arguments(self) -> None:
        error = OSError(2, "no such file")
        error.strerror = None
        twin = private_copy(error)
        assert isinstance(twin, OSError)
        assert twin is not error
        assert (twin.errno, twin.strerror, twin.args) == (2, None, (2, "no such file"))

    def test_a_twin_that_has_lost_an_argument_is_not_used(self) -> None:
        class MissingError(OSError):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                self.args = args  # an OSError itself keeps the name of the file elsewhere

        error = MissingError(2, "no such file", "feed.toml")
        twin = private_copy(error)
        assert twin is not error
        assert isinstance(twin, MissingError)
        assert twin.args == (2, "no such file", "feed.toml")

    @pytest.mark.parametrize("answer", ["itself", "another type", "other arguments", "fewer arguments"])
    def test_a_copy_that_is_not_faithful_is_not_used(self, answer: str) -> None:
        class OddError(UnicodeDecodeError):
            def __init__(self, *names: str) -> None:
                super().__init__("utf-8", b"", 0, 1, "broken")
                self.args = names

            def __copy__(self) -> BaseException:
                return {
                    "itself": self,
                    "another type": ValueError(*self.args),
                    "other arguments": OddError("other"),
                    "fewer arguments": OddError(),
                }[answer]

        error = OddError("the only one")
        assert private_copy(error) is error


class TestTerminal:
    def test_each_raise_has_an_exception_of_its_own_with_the_same_traceback(self) -> None:
        error = raised(ValueError("broken"))
        terminal = Terminal(error)
        first, second = raised(terminal.exception()), raised(terminal.exception())
        assert len({id(error), id(first), id(second)}) == 3
        assert terminal.exception().__traceback__ is error.__traceback__

    def test_what_cannot_be_copied_does_not_grow(self) -> None:
        class SoleError(UnicodeDecodeError):
            def __init__(self) -> None:
                super().__init__("utf-8", b"", 0, 1, "broken")
                self.args = ("the only one",)

        error = raised(SoleError())
        traceback = error.__traceback__
        terminal = Terminal(error)
        for _ in range(3):
            assert raised(terminal.exception()) is error
        assert terminal.exception().__traceback__ is traceback


class TestWithout:
    def test_nothing_stays_nothing(self) -> None:
        assert without(None, KeyError) is None

    def test_the_kinds_go_and_all_else_stays_as_itself(self) -> None:
        error = ValueError()
        assert without(error, KeyError) is error
        assert without(error, KeyError, ValueError) is None
        assert without(error, Exception) is None

    def test_members_of_groups_go(self) -> None:
        group = ExceptionGroup("outer", [KeyError(), ExceptionGroup("inner", [KeyError(), ValueError("stays")])])
        rest = without(group, KeyError)
        assert repr(rest) == "ExceptionGroup('outer', [ExceptionGroup('inner', [ValueError('stays')])])"
        assert without(group, KeyError, ValueError) is None

    def test_a_group_says_itself_what_is_made_of_the_rest(self) -> None:
        class OwnGroup(ExceptionGroup[Exception]):
            def derive(self, excs: Any, /) -> Any:
                return OwnGroup("derived", excs)

        group = raised(OwnGroup("outer", [KeyError(), ValueError("stays")]))
        group.add_note("a note")
        rest = without(group, KeyError)
        assert isinstance(rest, OwnGroup)
        assert (rest.message, repr(rest.exceptions), rest.__notes__) == ("derived", "(ValueError('stays'),)", ["a note"])
        assert rest.__traceback__ is group.__traceback__

    def test_a_group_that_loses_no_member_stays_as_itself(self) -> None:
        group = ExceptionGroup("outer", [ValueError()])
        assert without(group, KeyError) is group

    def test_a_group_that_cannot_be_derived_from_becomes_a_plain_one(self) -> None:
        class StubbornGroup(ExceptionGroup[Exception]):
            def derive(self, excs: object, /) -> NoReturn:
                raise TypeError("cannot be derived from")

        group = raised(StubbornGroup("outer", [KeyError(), ValueError("stays")]))
        rest = without(group, KeyError)
        assert repr(rest) == "ExceptionGroup('outer', [ValueError('stays')])"
        assert rest is not None
        assert rest.__traceback__ is group.__traceback__
        assert without(group, KeyError, ValueError) is None
