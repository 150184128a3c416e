"""Tools for testing what is built on this library, on asyncio and on trio, and the sources that it is given."""

from anyio_sharedstream.testing._conformance import Finding, SourceNonconformance, check_source
from anyio_sharedstream.testing._deadlock import Deadlock
from anyio_sharedstream.testing._explore import Exploration, ScheduleFailure, explore
from anyio_sharedstream.testing._explore_schedule import Livelock
from anyio_sharedstream.testing._script import End, Pause, Raise, ScriptedSource
from anyio_sharedstream.testing._sweep import SweptRun, cancel_sweep
from anyio_sharedstream.testing._virtual_time import run
from anyio_sharedstream.testing._waiting import WaitingTask

__all__ = [
    "Deadlock",
    "End",
    "Exploration",
    "Finding",
    "Livelock",
    "Pause",
    "Raise",
    "ScheduleFailure",
    "ScriptedSource",
    "SourceNonconformance",
    "SweptRun",
    "WaitingTask",
    "cancel_sweep",
    "check_source",
    "explore",
    "run",
]
