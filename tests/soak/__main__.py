"""Soak for so many minutes, print what was done, and fail if a promise was broken: ``python -m tests.soak --minutes N``."""

from __future__ import annotations

import argparse
import sys
import time
from itertools import chain, count, takewhile
from random import SystemRandom

from tests.soak.play import BACKENDS, LARGE, SMALL, Soak


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long to soak, in minutes of real time for each backend")
    parser.add_argument("--seed", type=int, default=SystemRandom().randrange(10**9), help="what was done with it is done again")
    parser.add_argument("--round", type=int, help="the only round to play")
    parser.add_argument("--backend", choices=[*BACKENDS, "all"], default="all")
    parser.add_argument("--small", action="store_true", help="with less of everything at once")
    asked = parser.parse_args(arguments)
    backends = BACKENDS if asked.backend == "all" else [asked.backend]
    return int(sum([soak_on(backend, asked) for backend in backends]) < len(backends))


def soak_on(backend: str, asked: argparse.Namespace) -> bool:
    """Returns whether every promise was kept."""
    print(f"soaking on {backend}, seed {asked.seed}", flush=True)
    soak = Soak(backend, asked.seed, SMALL if asked.small else LARGE)
    started = time.monotonic()
    in_time = takewhile(lambda _: time.monotonic() - started < 60 * asked.minutes, count(2))
    soak.play(chain([1], in_time) if asked.round is None else [asked.round])
    return report(soak, " --small" * asked.small)


def report(soak: Soak, options: str) -> bool:
    memory = "; ".join(f"{blocks:,} after {subscriptions:,}" for subscriptions, blocks in soak.memory.blocks)
    print(soak.tally)
    print(f"  memory, in blocks after so many subscriptions: {memory}")
    print(f"  which grows by {soak.memory.slope():.4f} blocks per subscription", flush=True)
    if soak.broken is not None:
        again = f"python -m tests.soak --backend {soak.backend} --seed {soak.seed} --round {soak.round}{options}"
        print(f"BROKEN PROMISE: {soak.broken}\nreplay: {again}", flush=True)
    return soak.broken is None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
