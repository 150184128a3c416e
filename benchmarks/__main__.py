"""Measure everything, print the table, and write the figures and plots into ``docs/``: ``python -m benchmarks [--quick]``.

Each measurement runs in a process of its own, and the competitors take turns: a machine that grows slower in the meantime is
slower for all of them. What counts are ratios of medians within one run.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from itertools import product
from pathlib import Path
from time import perf_counter

from benchmarks import acknowledged, competitors, plots, report

DOCS = Path(__file__).parents[1] / "docs"
ROOT = DOCS.parent

#: The work, the competitors that do it (all that the loop has if there are none), and on which loops.
PLAN: list[tuple[str, list[str], list[str]]] = [
    ("woken", [], ["asyncio", "uvloop", "trio"]),
    ("burst", [], ["asyncio", "uvloop", "trio"]),
    ("mix", ["shared stream", "shared stream, in batches", "asyncio queues"], ["asyncio"]),
    ("tight", ["shared stream", "one more with a bound of 1"], ["asyncio", "trio"]),
    ("latency", ["shared stream", "asyncio queues", "memory streams"], ["asyncio", "uvloop"]),
    ("latency", ["shared stream", "memory streams"], ["trio"]),
    ("memory", ["shared stream", "asyncio queues", "memory streams", "limit"], ["asyncio"]),
    ("memory", ["shared stream", "memory streams", "limit"], ["trio"]),
    ("lifetimes", ["shared stream"], ["asyncio", "trio"]),
    ("routing", ["shared stream"], ["asyncio", "trio"]),
    ("acknowledged", list(acknowledged.COMPETITORS), ["asyncio"]),
    ("acknowledged", ["acknowledged", "shared stream"], ["uvloop", "trio"]),
    ("resolving", ["acknowledged"], ["asyncio", "trio"]),
]


def measurements(quick: bool) -> list[tuple[str, str, str]]:
    """Work, loop and competitor of everything that is to be measured, neighbours in time being those that are compared."""
    found = []
    for work, names, loops in PLAN:
        for loop in loops:
            every = [*(competitors.ON_TRIO if loop == "trio" else competitors.ON_ASYNCIO)]
            if work == "burst":
                every.remove("limit")  # it hands over no events, so it cannot have several at once
            found += [(work, loop, name) for name in names or every if not competitors.missing(name)]
    if quick:
        return [one for one in found if one[1] != "uvloop" and one[2] not in competitors.NEEDS]
    return found


def measure(work: str, loop: str, name: str, scale: float) -> report.Figures:
    command = [sys.executable, "-m", "benchmarks.measure", work, name, loop, str(scale)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{work} of {name} on {loop} failed:\n{done.stderr}")
    figures: report.Figures = json.loads(done.stdout)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure this library beside its competitors.")
    parser.add_argument("--quick", action="store_true", help="a rough idea within a minute; nothing is written")
    parser.add_argument("--alternations", type=int, default=None, help="how often everything is measured (5; quick: 2)")
    parser.add_argument("--output", type=Path, default=DOCS, help="where the figures and the plots are written (docs)")
    options = parser.parse_args()
    alternations = options.alternations or (2 if options.quick else 5)
    scale = 0.1 if options.quick else 0.4  # below `measure.QUICK` the largest numbers of subscribers are left out
    for name, module in competitors.NEEDS.items():
        if competitors.missing(name):
            print(f"{name} is left out: {module} is not installed")
    began = perf_counter()
    samples: report.Samples = {}
    for number, (work, loop, name) in product(range(alternations), measurements(options.quick)):
        print(f"\r{number + 1} of {alternations}: {work} on {loop}: {name}".ljust(79), end="", file=sys.stderr, flush=True)
        for size, figure in measure(work, loop, name, scale).items():
            samples.setdefault((work, loop, name, size), []).append(figure)
    print(f"\r{perf_counter() - began:.0f} s".ljust(79), file=sys.stderr)
    print(report.table(samples))
    if not options.quick:
        about = {
            "date": date.today().isoformat(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("anyio", "trio", "uvloop", "anyio-sharedstream")},
            "alternations": alternations,
        }
        (options.output / "benchmarks.json").write_text(json.dumps(report.as_json(samples, about), indent=1) + "\n")
        plots.draw(samples, options.output)


if __name__ == "__main__":
    main()
