"""Write the table of docs/pipelines.md: which plug-ins each drop-in pipeline accepts, and on which transformers.

python -m benchmarks.plug_in_table  # replaces the table; a test checks that it is up to date

The table follows from the registries: the layout rows of transformers, the classes of `postgen.pipelines` and the
checks of the plug-ins. It needs no GPU and no weights.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import diffusers

import postgen.pipelines as drop_ins
from benchmarks.docs_tables import write
from postgen.compat import quiet_libraries
from postgen.errors import UserError
from postgen.families.registry import known_layouts
from postgen.plug_ins import known_plug_ins, resolve

PAGE = Path(__file__).resolve().parents[1] / "docs" / "pipelines.md"
NAME = "plug_ins"


def transformers_in(pipeline: str) -> dict[str, str]:
    """Return the video transformers of a pipeline class: component -> class name, from the types of `__init__`."""
    known = {row.transformer for row in known_layouts() if row.video is not None}
    parameters = inspect.signature(getattr(diffusers, pipeline).__init__).parameters
    words = {name: re.findall(r"\w+", str(one.annotation)) for name, one in parameters.items()}
    return {name: word for name, found in words.items() for word in found if word in known}


def accepts(check: str, transformer: str) -> bool:
    """Return whether a plug-in accepts a transformer class; `check` is the `check` of its row."""
    try:
        resolve(check)(transformer)
    except UserError:
        return False
    return True


def table() -> Iterator[str]:
    """Yield the lines of the table: one row for all pipelines with the same transformers, sorted by transformer."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for pipeline in drop_ins.__all__:
        groups.setdefault(tuple(transformers_in(pipeline).values()), []).append(pipeline)
    rows = known_plug_ins()
    yield f"| Pipelines (transformer) | {' | '.join(f'`{row.name}=`' for row in rows)} |"
    yield "|---" * (len(rows) + 1) + "|"
    for transformers, pipelines in sorted(groups.items()):
        both = ", 2 experts" if len(transformers) == 2 else ""
        names = ", ".join(f"`{name}`" for name in pipelines)
        cells = ["yes" if accepts(row.check, transformers[0]) else "no" for row in rows]
        yield f"| {names} (`{transformers[0]}`{both}) | {' | '.join(cells)} |"


if __name__ == "__main__":
    with quiet_libraries():
        write(PAGE, {NAME: table()})
