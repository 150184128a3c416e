"""The example of docs/acknowledgement.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import anyio
import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "acknowledgement.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_example_commits_what_both_have_printed(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, "acknowledgement.md", "exec", dont_inherit=True), names)
    anyio.run(names["main"], backend=backend)
    *lines, last = capsys.readouterr().out.splitlines()
    assert sorted(lines) == [f"{name}: {entry}" for name in ("first", "second") for entry in ("one", "three", "two")]
    assert last == "committed: 3"
