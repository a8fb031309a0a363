"""The table of pipeline classes and their modules, read from the source files without importing them.

python pipelines/names.py  # writes the imports for type checkers into __init__.py; `make style` runs this
"""

from __future__ import annotations

import re
from pathlib import Path

_CLASS = re.compile(r"^class (\w+)\(DropIn, ", re.MULTILINE)
_HEAD, _FOOT = "if TYPE_CHECKING:\n", "\n_HOMES = "


def homes(folder: Path) -> dict[str, str]:
    """Return module name by class name, sorted by module, of every class whose first base is `DropIn`."""
    files = sorted(folder.glob("*.py"))
    found = {name: file.stem for file in files for name in _CLASS.findall(file.read_text(encoding="utf-8"))}
    return dict(sorted(found.items(), key=lambda item: (item[1], item[0])))


def typed(folder: Path) -> str:
    """Return the source of the folder's `__init__.py` with an up-to-date import of every class for type checkers."""
    text = (folder / "__init__.py").read_text(encoding="utf-8")
    head, foot = text.index(_HEAD) + len(_HEAD), text.index(_FOOT)
    found = homes(folder).items()
    lines = [f"    from postgen.pipelines.{home} import {name} as {name}\n" for name, home in found]
    return text[:head] + "".join(lines) + text[foot:]


if __name__ == "__main__":
    here = Path(__file__).parent
    (here / "__init__.py").write_text(typed(here), encoding="utf-8")
