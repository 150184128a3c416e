"""How many orders of its tasks a scenario is explored under: as many as the environment variable ``SCHEDULES`` says, or 1,000."""

from __future__ import annotations

import os

SCHEDULES = int(os.environ.get("SCHEDULES", "1000"))
