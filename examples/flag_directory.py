"""One loop scans a directory for any number of triggers; each waits for a flag file of its own, which it removes when it fires.

python examples/flag_directory.py --backend asyncio|trio                     20 triggers in a temporary directory
python examples/flag_directory.py --directory /some/where --flag go stop     your own flags, until interrupted with Ctrl-C
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
from anyio.to_thread import run_sync

from anyio_sharedstream import Subscription
from anyio_sharedstream.triggers import BaseEventTrigger, TriggerEvent, TriggerFailed, TriggerFired, TriggerRunner

SCANS: Counter[str] = Counter()


class FlagTrigger(BaseEventTrigger):
    """Fires each time a file of this name appears in the directory."""

    def __init__(self, directory: str, name: str, interval: float) -> None:
        self.directory, self.name, self.interval = directory, name, interval

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return f"{__name__}.FlagTrigger", {"directory": self.directory, "name": self.name, "interval": self.interval}

    def shared_stream_key(self) -> tuple[str, str, float]:
        return "flags", self.directory, self.interval  # what the scan depends on, and so not the name

    @classmethod
    async def open_shared_stream(cls, kwargs: dict[str, Any]) -> AsyncIterator[frozenset[str]]:
        while True:
            names = await run_sync(os.listdir, kwargs["directory"])
            SCANS["made"] += 1
            yield frozenset(names)
            await anyio.sleep(kwargs["interval"])

    async def filter_shared_stream(self, shared_stream: Subscription[frozenset[str]]) -> AsyncIterator[TriggerEvent]:
        async for names in shared_stream:
            SCANS["by separate loops"] += 1  # for this trigger would have needed one here
            if self.name in names:
                path = anyio.Path(self.directory, self.name)
                try:
                    await path.unlink()
                except FileNotFoundError:
                    continue  # it was removed after it had been seen
                yield TriggerEvent(str(path))


async def drop_flags(directory: str, names: list[str]) -> None:
    for name in random.sample(names, len(names)):
        await anyio.sleep(0.05)
        await anyio.Path(directory, name).touch()


async def watch(directory: str, names: list[str], interval: float, demonstrate: bool) -> bool:
    """Print what happens; return when no trigger is left to wait for: whether all went well."""
    ok, waiting = True, set(names)
    async with TriggerRunner() as runner, anyio.create_task_group() as tasks:
        for name in waiting:
            runner.start(name, FlagTrigger(directory, name, interval))
        print(f"{len(waiting)} triggers watch {directory}", flush=True)
        if demonstrate:
            tasks.start_soon(drop_flags, directory, names)
        while waiting:
            outcome = await runner.outcomes.receive()
            if isinstance(outcome, TriggerFired):
                print(f"{outcome.trigger_id} fired", flush=True)
            if isinstance(outcome, TriggerFailed):
                print(f"{outcome.trigger_id} failed: {outcome.error!r}", flush=True)
                ok = False
            if demonstrate or not isinstance(outcome, TriggerFired):
                waiting.discard(str(outcome.trigger_id))
    return ok


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio")
    parser.add_argument("--directory", type=Path, help="an existing directory to watch; needs --flag")
    parser.add_argument("--flag", nargs="+", metavar="NAME", help="names of files to wait for; needs --directory")
    parser.add_argument("--interval", type=float, default=0.1, help="seconds between two scans (0.1)")
    options = parser.parse_args()
    if (options.directory is None) != (options.flag is None):
        parser.error("--directory and --flag need each other")
    if options.directory is not None and not options.directory.is_dir():
        parser.error(f"there is no directory {options.directory}")
    demonstrate = options.directory is None
    names = [f"flag-{number:02}" for number in range(1, 21)] if demonstrate else options.flag
    ok = True
    with TemporaryDirectory() as temporary:
        directory = str((options.directory or Path(temporary)).resolve())
        try:
            backend_options = {"restrict_keyboard_interrupt_to_checkpoints": True} if options.backend == "trio" else {}
            arguments = directory, names, options.interval, demonstrate
            ok = anyio.run(watch, *arguments, backend=options.backend, backend_options=backend_options)
        except* KeyboardInterrupt:  # trio raises it inside of the task group
            print("interrupted")
    print(f"{SCANS['made']} scans were made; separate loops would have made {SCANS['by separate loops']}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
