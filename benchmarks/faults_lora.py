"""Does a LoRA come back exactly, in every family and format, by postgen's loader and by diffusers' own?

    python -m benchmarks.faults_lora

Puts the trainer's default adapters into tiny random models of the real classes, writes them as a run's export, as
`postgen export-lora` does in each format, and each of these files in each other format; then loads them and compares
what every layer's weight is changed by, in float64 and to the bit. diffusers reads the fused layers of FLUX and
HunyuanVideo only where the model is 3,072 wide: there a file of that width, without a model, goes through its own
conversion.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from postgen.compat import quiet_libraries
from postgen.errors import UserError
from postgen.families.lora_export import FORMATS, export_lora
from tests.families.lora_cases import (
    FAMILIES,
    Changes,
    changes,
    converted_by_diffusers,
    read_by_diffusers,
    read_by_postgen,
    same,
    save,
    trained,
)

REFUSED = {("CogVideoX", "kohya"), ("Stable Diffusion 3", "kohya")}
"""Kohya's tools have no keys for them, so there is nothing that could be written."""
OWN_ONLY = {
    ("LTX", "kohya"): "its loader knows no kohya keys",
    ("HunyuanVideo", "kohya"): "its loader knows no kohya keys",
    ("HunyuanVideo", "comfyui"): "it cuts the rank of the token refiner's layers; the other layers are exact",
}
"""What diffusers' own loader cannot read, and why."""
WIDE = {("FLUX", "comfyui"), ("FLUX", "kohya"), ("HunyuanVideo", "comfyui")}
"""What it reads at one width only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a LoRA came back."""

    family: str
    format: str
    postgen: str
    """`exact`, `refused`, or what went wrong."""
    diffusers: str
    """`exact`, why it is not asked for more, or what went wrong; `not asked` of files converted twice."""

    @property
    def refused(self) -> bool:
        """Whether the format is refused by name, and is known not to carry the family."""
        return self.postgen == "refused" and (self.family, self.format) in REFUSED

    @property
    def holds(self) -> bool:
        """Whether all came back exactly, by every reader that can read it."""
        known = OWN_ONLY.get((self.family, self.format), "exact")
        return self.postgen == "exact" and self.diffusers in ("exact", known, "not asked")


def outcomes(family: str, folder: Path, *, twice: bool = True) -> Iterator[Outcome]:
    """Yield what becomes of a family's LoRA in every format, the export of a run first.

    Args:
        family: a key of `FAMILIES`.
        folder: where to write.
        twice: whether files in each format are converted to each other one as well.
    """
    torch.manual_seed(0)
    pipe = FAMILIES[family]()
    adapter = trained(pipe)
    save(pipe, folder / "export", adapter)
    expected = changes(pipe)
    pipe.unload_lora_weights()
    networks = list(expected)
    sources = {name: folder / "export" / (name if len(networks) > 1 else "") for name in networks}
    theirs = _state(lambda: read_by_diffusers(pipe, {n: _file(path) for n, path in sources.items()}), pipe, expected)
    ours = _state(lambda: read_by_postgen(pipe, str(folder / "export")), pipe, expected)
    yield Outcome(family=family, format="export of a run", postgen=ours, diffusers=theirs)
    written: dict[str, dict[str, Path]] = {}
    for format in FORMATS:
        files = {name: folder / f"{format}-{name}.safetensors" for name in networks}
        try:
            for name, file in files.items():
                export_lora(sources[name], file, format)
        except UserError as error:
            state = "refused" if family in str(error) or "no keys for" in str(error) else str(error)
            yield Outcome(family=family, format=format, postgen=state, diffusers="refused")
            continue
        written[format] = files
        yield _outcome(pipe, family, format, files, expected)
    for source, format in itertools.permutations(written, 2) if twice else ():
        yield _again(pipe, family, (source, format), written[source], folder, expected)


def _outcome(pipe: Any, family: str, format: str, files: dict[str, Path], expected: Changes) -> Outcome:
    ours = _state(lambda: read_by_postgen(pipe, *(str(file) for file in files.values())), pipe, expected)
    if (family, format) in WIDE:
        theirs = _wide(family, format, files["transformer"].parent)
    elif (family, format) in OWN_ONLY:
        theirs = OWN_ONLY[family, format]
    else:
        theirs = _state(lambda: read_by_diffusers(pipe, files), pipe, expected)
    return Outcome(family=family, format=format, postgen=ours, diffusers=theirs)


def _again(
    pipe: Any, family: str, formats: tuple[str, str], files: dict[str, Path], folder: Path, expected: Changes
) -> Outcome:
    """Convert a converted file once more and load that."""
    again = {name: folder / f"{'-'.join(formats)}-{name}.safetensors" for name in files}
    for name, file in files.items():
        export_lora(file, again[name], formats[1])  # type: ignore[arg-type]
    ours = _state(lambda: read_by_postgen(pipe, *(str(file) for file in again.values())), pipe, expected)
    return Outcome(family=family, format=" to ".join(formats), postgen=ours, diffusers="not asked")


def _state(read: Callable[[], Changes], pipe: Any, expected: Changes) -> str:
    try:
        found = read()
    except Exception as error:  # whatever a loader raises, the file was not read
        pipe.unload_lora_weights()
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if same(found, expected):
        return "exact"
    count = sum(len(layers) for layers in found.values())
    return f"{count} layers changed, and not as the {sum(len(layers) for layers in expected.values())} were"


def _wide(family: str, format: str, folder: Path) -> str:
    """Return what diffusers' conversion makes of a file of the width that it is written for."""
    found, expected = converted_by_diffusers(family, format, folder / "wide")
    if found.keys() != expected.keys():
        return f"{len(found)} layers, not {len(expected)}"
    if not all(torch.equal(found[name], expected[name]) for name in expected):
        return "other changes"
    return OWN_ONLY.get((family, format), "exact")


def _file(path: Path) -> Path:
    from postgen.families.lora_export import find_lora

    return find_lora(path)


def all_outcomes() -> list[Outcome]:
    """Return what becomes of every family in every format."""
    found = []
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        for number, family in enumerate(FAMILIES):
            found += outcomes(family, Path(folder) / str(number))
    return found


def main() -> None:
    """Print how every LoRA came back."""
    found = all_outcomes()
    for each in found:
        print(f"{each.family}, {each.format}: postgen {each.postgen}, diffusers {each.diffusers}")
    print(f"{sum(each.holds for each in found)} of {sum(not each.refused for each in found)} come back exactly")


if __name__ == "__main__":
    main()
