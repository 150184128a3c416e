"""Mutation testing of the core: which small changes of the code does no test notice? docs/mutants.md says how to run this.

Relies on mutmut for the mutants, and on pytest for the tests. mutmut can run them, too, but starts pytest anew for each mutant,
and collecting thousands of tests takes longer than running the few that matter. Here they are collected once, and each mutant is
tried in a fork of that process, by those tests that call the function: first those that have killed its neighbours.
"""

from __future__ import annotations

import argparse
import gc
import json
import mmap
import os
import random
import resource
import signal
import struct
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mutmut.__main__ as generator
import mutmut.mutation.trampoline as trampoline
import pytest
from _pytest.runner import runtestprotocol

#: What is not about the core, starts processes, measures, or reads sources: a module with its mutants is many times as long.
OTHERS = (
    *("examples", "example_*", "redis_streams", "scale", "at_least_once", "docs*", "readme", "layering"),
    *("public_api", "explore*", "testing*", "virtual_time", "planted", "soak"),
)
MEASURED, RESULTS = Path("measured.json"), Path("results.jsonl")  # inside mutants/
ALIVE = ("survived", "no tests")


def make(processes: int) -> None:
    """Write the mutants, all those of a module into one file."""
    trampoline.set_mutant_under_test("mutant_generation")
    Path("mutants").mkdir(exist_ok=True)
    generator.copy_src_dir()
    generator.copy_also_copy_files()  # tests that were written since are tried, too
    generator.setup_source_paths()
    generator.create_mutants(processes)  # of what has not changed, there are some already


def function_of(mutant: str) -> str:
    return mutant.rpartition("__mutmut_")[0]


def results() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def verdicts() -> dict[str, str]:
    """The latest verdict on each mutant."""
    names = [
        name
        for path in sorted(Path("anyio_sharedstream").glob("*.meta"))
        for name in json.loads(path.read_text())["exit_code_by_key"]
    ]
    latest = {result["mutant"]: result["verdict"] for result in results()}
    return {name: latest.get(name, "not tried") for name in names}


def run(item: pytest.Item, following: pytest.Item | None) -> tuple[bool, float]:
    began = time.perf_counter()
    try:
        passed = not any(report.failed for report in runtestprotocol(item, nextitem=following, log=False))
    except BaseException:  # what a mutant lets through
        passed = False
    return passed, time.perf_counter() - began


class Trials:
    """Takes the place of pytest's loop over the tests."""

    def __init__(self, processes: int, seconds: float, wanted: list[str]) -> None:
        self.processes = processes
        self.seconds = seconds
        self.wanted = wanted
        self.active = ""  # the mutant that runs
        self.called: set[str] = set()
        trampoline.get_mutant_under_test = lambda: self.active
        trampoline.record_trampoline_hit = lambda name, caller=None: self.called.add(name)
        # Its context variable would not survive what some tests do with contexts.
        trampoline.MutmutCallStack.get = staticmethod(lambda: (None, 0))
        trampoline.MutmutCallStack.set = staticmethod(lambda _: None)
        trampoline.MutmutCallStack.reset = staticmethod(lambda _: None)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        assert not session.testsfailed, "collecting failed"
        self.items = {item.nodeid: item for item in session.items if "uvloop" not in item.nodeid}
        gc.collect()
        gc.freeze()  # so that no fork copies what it only looks at
        self.measure()
        self.try_all()
        return True

    def fork(self) -> int:
        pid = os.fork()
        if not pid:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        return pid

    def measure(self) -> None:
        """Find out which test calls which functions, how long it takes, and whether it passes here at all."""
        known = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
        items = [item for test, item in self.items.items() if test not in known]
        parts = [Path(f"measured.{part}") for part in range(self.processes)]
        for part, path in enumerate(parts):
            if not self.fork():
                self.active = "stats"
                mine = items[part :: self.processes]
                found = {}
                for item, following in zip(mine, [*mine[1:], None], strict=False):
                    self.called.clear()
                    passed, seconds = run(item, following)
                    found[item.nodeid] = (seconds, sorted(self.called) if passed else [])
                path.write_text(json.dumps(found))
                os._exit(0)
        for _ in parts:
            os.wait()
        for path in parts:
            known |= json.loads(path.read_text())
        MEASURED.write_text(json.dumps(known))

    def load(self) -> None:
        measured = json.loads(MEASURED.read_text())
        self.numbers = {test: number for number, test in enumerate(measured)}
        self.durations = {test: seconds for test, (seconds, _) in measured.items()}
        self.tests: defaultdict[str, list[str]] = defaultdict(list)
        for test, (_, functions) in measured.items():
            for function in functions:
                self.tests[function].append(test)
        self.killers: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.files: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.tried: defaultdict[str, set[int]] = defaultdict(set)
        for result in results():
            self.learn(result)
        self.wrappers = list(wrappers())

    def learn(self, result: dict[str, Any]) -> None:
        self.tried[result["mutant"]].update(result["passed"])
        if result["by"]:
            function = function_of(result["mutant"])
            self.killers[function][result["by"]] += 1
            self.killers[function.split(".")[1]][result["by"]] += 1
            self.files[function.split(".")[1]][result["by"].partition("::")[0]] += 1

    def order(self, mutant: str) -> list[str]:
        """Which tests to run: those that have killed its neighbours; then some of each file, more of those that kill many.

        None takes more than a part of the time, so that it comes to several.
        """
        function = function_of(mutant)
        files: defaultdict[str, list[str]] = defaultdict(list)
        for test in self.tests[function]:
            files[test.partition("::")[0]].append(test)
        for tests in files.values():
            random.Random(mutant).shuffle(tests)
            tests.sort(key=lambda test: (len(test.split("trio")), round(4 * self.durations[test])))
        module = function.split(".")[1]
        good = self.files[module]
        turns = sorted(
            (place / (1 + good[file]) ** 2, file, test) for file, tests in files.items() for place, test in enumerate(tests)
        )
        mine = set(self.tests[function])
        likely = [test for key in (function, module) for test, _ in self.killers[key].most_common(25) if test in mine]
        chosen, total = [], 0.0
        for test in dict.fromkeys([*likely, *(test for *_, test in turns)]):
            takes = self.durations[test]
            if self.numbers[test] not in self.tried[mutant] and takes <= self.seconds / 4 and total + takes <= self.seconds:
                chosen.append(test)
                total += takes
        return chosen

    def try_all(self) -> None:
        self.load()
        mutants = [name for name, verdict in verdicts().items() if verdict in ("not tried", *ALIVE)]
        mutants = [name for name in mutants if not self.wanted or any(part in name for part in self.wanted)]
        random.Random(0).shuffle(mutants)  # so that a run that was broken off is a sample
        place = mmap.mmap(-1, 8 * self.processes)  # in which test each process is
        free = list(range(self.processes))
        running: dict[int, tuple[str, list[str], int]] = {}
        with RESULTS.open("a") as file:
            while mutants or running:
                if not mutants or not free:
                    pid, status = os.wait()
                    mutant, order, slot = running.pop(pid)
                    free.append(slot)
                    self.note(file, mutant, order, struct.unpack_from("i", place, 8 * slot)[0], os.waitstatus_to_exitcode(status))
                    continue
                mutant = mutants.pop()
                order = self.order(mutant)
                slot = free.pop()
                pid = self.fork()
                if not pid:
                    self.child(mutant, order, place, slot)
                running[pid] = (mutant, order, slot)

    def note(self, file: Any, mutant: str, order: list[str], place: int, code: int) -> None:
        verdict = {0: "survived", -signal.SIGALRM: "timed out"}.get(code, "killed")
        if not self.tests[function_of(mutant)]:
            verdict = "no tests"
        passed = [self.numbers[test] for test in (order if not code else order[:place])]
        result = {"mutant": mutant, "verdict": verdict, "by": order[place] if code else None, "passed": passed}
        self.learn(result)
        file.write(json.dumps(result) + "\n")
        file.flush()

    def child(self, mutant: str, order: list[str], place: mmap.mmap, slot: int) -> None:
        self.active = mutant
        for owner, name, original, function in self.wrappers:
            if function != function_of(mutant):
                setattr(owner, name, original)  # mutmut's wrappers, which ask for the mutant at each call, take a while
        for number, (test, following) in enumerate(zip(order, [*order[1:], None], strict=False)):
            struct.pack_into("i", place, 8 * slot, number)
            signal.setitimer(signal.ITIMER_REAL, max(2.5, 5 * self.durations[test]))
            if not run(self.items[test], self.items[following] if following else None)[0]:
                os._exit(1)
        os._exit(0)


def wrappers() -> Iterator[tuple[Any, str, Any, str]]:
    """Where mutmut's wrappers are: their owners and names, what they wrap, and mutmut's name for that."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(("anyio_sharedstream", "tests"))]
    classes = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    for owner in (*modules, *(each for each in classes if each.__module__.startswith("anyio_sharedstream"))):
        for name, value in list(vars(owner).items()):
            if type(value).__name__ == "function" and value.__code__.co_name == "_trampoline_wrapper":
                original = value.__wrapped__
                names = original.__qualname__.split(".")
                mangled = f"x_{names[0]}" if len(names) == 1 else "x\u01c1" + "\u01c1".join(names)
                yield owner, name, original, f"{original.__module__}.{mangled}"


def report() -> None:
    table: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for mutant, verdict in verdicts().items():
        table[mutant.split(".")[1]][verdict] += 1
        if verdict in ALIVE:
            print(verdict, mutant)
    columns = ("killed", "timed out", "survived", "no tests", "not tried")
    for module, counts in (*table.items(), ("all", sum(table.values(), Counter()))):
        print("|", module, "|", counts.total(), "|", " | ".join(str(counts[column]) for column in columns), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of the names of the mutants to try; all if none are given")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8, help="tests to try for a mutant; more of them each time this runs")
    arguments = parser.parse_args()
    make(arguments.processes)
    os.chdir("mutants")
    sys.path.insert(0, os.getcwd())
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:timeout", "--capture=sys", "-o", "faulthandler_timeout=0", "--rootdir=."]
    options += [f"--ignore-glob=*/test_{name}.py" for name in OTHERS]
    pytest.main([*options, "tests"], plugins=[Trials(arguments.processes, arguments.seconds, arguments.names)])
    report()


if __name__ == "__main__":
    main()
