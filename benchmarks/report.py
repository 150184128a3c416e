"""What the samples say: medians, spreads, and the ratios that count."""

from __future__ import annotations

from statistics import median
from typing import Any

Figures = dict[str, float]
#: Work, loop, competitor, and size or name of the figure.
Case = tuple[str, str, str, str]
Samples = dict[Case, list[float]]

OURS = "shared stream"
BATCHES = "shared stream, in batches"

#: What is promised: a name, two cases whose ratio it is, and what it may be at most.
Target = tuple[str, Case, Case, float]
QUEUES, LIMIT, MEMORY = "asyncio queues", "limit", "memory streams"


def _acked(name: str, size: str) -> Case:
    return "acknowledged", "asyncio", name, size


def _resolving(size: str) -> Case:
    return "resolving", "asyncio", "acknowledged", f"resolution, {size}"


TARGETS: list[Target] = [
    ("woken, 1,000, asyncio: of queues", ("woken", "asyncio", OURS, "1000"), ("woken", "asyncio", QUEUES, "1000"), 0.78),
    ("woken, 1,000, asyncio: of the limit", ("woken", "asyncio", OURS, "1000"), ("woken", "asyncio", LIMIT, "1000"), 1.30),
    ("woken, 10,000, asyncio: of queues", ("woken", "asyncio", OURS, "10000"), ("woken", "asyncio", QUEUES, "10000"), 0.85),
    ("woken, 10,000, asyncio: of the limit", ("woken", "asyncio", OURS, "10000"), ("woken", "asyncio", LIMIT, "10000"), 1.6),
    ("woken, 1,000, uvloop: of queues", ("woken", "uvloop", OURS, "1000"), ("woken", "uvloop", QUEUES, "1000"), 0.80),
    ("woken, 1,000, uvloop: of the limit", ("woken", "uvloop", OURS, "1000"), ("woken", "uvloop", LIMIT, "1000"), 1.30),
    ("woken, 1,000, trio: of the limit", ("woken", "trio", OURS, "1000"), ("woken", "trio", LIMIT, "1000"), 1.20),
    ("woken, 1,000, trio: of memory streams", ("woken", "trio", OURS, "1000"), ("woken", "trio", MEMORY, "1000"), 0.25),
    ("burst, 100, asyncio: of queues", ("burst", "asyncio", OURS, "100"), ("burst", "asyncio", QUEUES, "100"), 0.32),
    ("burst, 100, trio: of asyncio's queues", ("burst", "trio", OURS, "100"), ("burst", "asyncio", QUEUES, "100"), 0.36),
    (
        "burst, 100, asyncio, in batches: of queues",
        ("burst", "asyncio", BATCHES, "100"),
        ("burst", "asyncio", QUEUES, "100"),
        0.10,
    ),
    (
        "burst, 100, asyncio: with a sibling whose bound is 1",
        ("tight", "asyncio", "one more with a bound of 1", "100"),
        ("tight", "asyncio", OURS, "100"),
        1.10,
    ),
    (
        "join and leave: of one woken delivery",
        ("lifetimes", "asyncio", OURS, "join and leave, 1000 others"),
        ("woken", "asyncio", OURS, "1000"),
        3.0,
    ),
    (
        "join and leave: 1,000 others, of alone",
        ("lifetimes", "asyncio", OURS, "join and leave, 1000 others"),
        ("lifetimes", "asyncio", OURS, "join and leave, alone"),
        1.10,
    ),
    (
        "an event to 10 of 10,000 by its route: of one to all",
        ("routing", "asyncio", OURS, "10,000 on 1,000 routes"),
        ("routing", "asyncio", OURS, "10,000 without routes"),
        0.01,
    ),
    (
        "the same: of one to 10 who are alone",
        ("routing", "asyncio", OURS, "10,000 on 1,000 routes"),
        ("routing", "asyncio", OURS, "10 alone"),
        3.0,
    ),
    *(
        (f"acknowledged, {size}, asyncio: of {other}", _acked(one, size), _acked(other, size), most)
        for size, one, other, most in [
            ("woken", "acknowledged", "Airflow, acknowledged", 0.52),
            ("bursts of 64", "acknowledged", "Airflow, acknowledged", 0.10),
            ("woken", "acknowledged", "shared stream", 1.25),
            ("bursts of 64", "acknowledged", "shared stream", 1.2),
            ("bursts of 64", "acknowledged, suspending", "shared stream, suspending", 1.6),
        ]
    ),
    ("resolution: 4,000 lanes, of 1", _resolving("4,000 lanes"), _resolving("1 lane"), 2.5),
    ("resolution: 50,000 outstanding, of 10", _resolving("50,000 outstanding"), _resolving("10 outstanding"), 1.3),
]

#: What is promised of acknowledgement in figures of its own.
BOUNDS = {
    "1,000 leavers, 4,000 outstanding (ms)": 20,
    "bytes per subscriber and event, one by one": 12,
    "bytes per subscriber and event, in bursts": 2,
    "bytes per Pending": 200,
}


def ratio(samples: Samples, one: Case, other: Case) -> tuple[float, float, float] | None:
    """The ratio of the medians, and the least and the greatest ratio within one alternation; None if one was not measured."""
    if one not in samples or other not in samples:
        return None
    each = [a / b for a, b in zip(samples[one], samples[other], strict=True)]
    return median(samples[one]) / median(samples[other]), min(each), max(each)


def table(samples: Samples) -> str:
    """Everything that was measured beside what it is compared with, then the targets."""
    heads = f"{'median':>10}  {'least to most':>21}  {'of queues':>9} {'of limit':>9}"
    lines = [f"{'work':10} {'loop':8} {'competitor':28} {'what':28} {heads}"]
    for case, figures in samples.items():
        work, loop, name, size = case
        row = f"{work:10} {loop:8} {name:28} {size:28} {median(figures):10.3f}  {min(figures):10.3f} {max(figures):10.3f}"
        for rival in (QUEUES, LIMIT):
            found = ratio(samples, case, (work, loop, rival, size))
            row += f"  {found[0]:8.2f}" if found else " " * 10
        lines.append(row)
    lines += ["", f"{'ratio of medians':56} {'measured':>8}  {'least to most':>15}  {'at most':>7}"]
    for name, one, other, most in TARGETS:
        found = ratio(samples, one, other)
        if found:
            lines.append(
                f"{name:56} {found[0]:8.3f}  {found[1]:7.2f} {found[2]:7.2f}  {most:7.2f}  {'' if found[0] <= most else 'missed'}"
            )
    for name, most in BOUNDS.items():
        measured = samples.get(("resolving", "asyncio", "acknowledged", name))
        if measured:
            lines.append(f"acknowledged, {name}: {median(measured):.2f} (at most {most})")
    for loop in ("asyncio", "trio"):
        idle = samples.get(("memory", loop, OURS, "idle")), samples.get(("memory", loop, LIMIT, "idle"))
        lagging = samples.get(("memory", loop, OURS, "lagging"))
        if idle[0] and idle[1] and lagging:
            beyond = median(idle[0]) - median(idle[1])
            lines.append(f"memory on {loop}: an idle subscriber {beyond:.0f} bytes beyond its task (at most 2048),")
            lines.append(f"    and {median(lagging):.2f} bytes per subscriber and event that it has yet to take (at most 2)")
    return "\n".join(lines)


def as_json(samples: Samples, about: dict[str, Any]) -> dict[str, Any]:
    """The samples with their medians, and the ratios."""
    ratios = {name: ratio(samples, one, other) for name, one, other, _ in TARGETS}
    return about | {
        "figures": [
            {"work": work, "loop": loop, "competitor": name, "size": size, "median": median(figures), "samples": figures}
            for (work, loop, name, size), figures in samples.items()
        ],
        "ratios": {name: found[0] for name, found in ratios.items() if found},
    }
