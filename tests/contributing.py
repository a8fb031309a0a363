"""Read the worked examples of CONTRIBUTING.md."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"


def blocks(heading: str) -> list[str]:
    """Return the Python blocks of a section, up to the next heading of the same level."""
    level, _, _ = heading.partition(" ")
    section = re.split(rf"^{level} ", PAGE.read_text(encoding="utf-8").partition(f"\n{heading}\n")[2], flags=re.M)[0]
    found: list[str] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert found, f"CONTRIBUTING.md has no example under {heading!r}"
    return found
