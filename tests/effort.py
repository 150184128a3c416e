"""How much the proof tries: as much as these environment variables say. The tests take the defaults, and longer runs more."""

from __future__ import annotations

import os

#: Under how many orders of its tasks a scenario is explored, on each backend.
SCHEDULES = int(os.environ.get("SCHEDULES", "1000"))

#: How many programs the state machine plays, on each backend.
PROGRAMS = int(os.environ.get("PROGRAMS", "200"))
