"""Check that a LoRA is restored exactly, in every family and format, by postgen's loader and by diffusers' own.

    python -m benchmarks.faults_lora

The benchmark adds the trainer's default adapters to tiny random models of the real classes. It writes them as the
export of a run, with `postgen export-lora` in each format, and converts each of these files to each other format. Then
it loads the files and compares the change of every layer's weight, in float64 and bit by bit. diffusers reads the
fused layers of FLUX and HunyuanVideo only for a model width of 3,072. For these, diffusers' conversion is tested on a
file of that width, without a model.
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
"""Pairs (family, format) that `export_lora` must refuse, because Kohya's tools have no keys for these families."""
OWN_ONLY = {
    ("LTX", "kohya"): "its loader knows no kohya keys",
    ("HunyuanVideo", "kohya"): "its loader knows no kohya keys",
    ("HunyuanVideo", "comfyui"): "it cuts the rank of the token refiner's layers; the other layers are exact",
}
"""Pairs (family, format) that diffusers' own loader cannot read exactly, and the reason."""
WIDE = {("FLUX", "comfyui"), ("FLUX", "kohya"), ("HunyuanVideo", "comfyui")}
"""Pairs (family, format) that diffusers' own loader reads only for a model width of 3,072."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Result of loading the LoRA of one family from one format."""

    family: str
    format: str
    postgen: str
    """Result of postgen's loader: `exact`, `refused`, or a description of the fault."""
    diffusers: str
    """Result of diffusers' loader: `exact`, `refused`, the known reason of `OWN_ONLY`, or a description of the fault.

    For files that are converted twice it is `not asked`, because diffusers' loader is not tested with them.
    """

    @property
    def refused(self) -> bool:
        """Whether the export refuses the format for this family, as `REFUSED` expects."""
        return self.postgen == "refused" and (self.family, self.format) in REFUSED

    @property
    def holds(self) -> bool:
        """Whether every loader that can read the format restores the LoRA exactly."""
        known = OWN_ONLY.get((self.family, self.format), "exact")
        return self.postgen == "exact" and self.diffusers in ("exact", known, "not asked")


def outcomes(family: str, folder: Path, *, twice: bool = True) -> Iterator[Outcome]:
    """Yield the outcome of a family's LoRA for the export of a run and then for every format.

    Args:
        family: key of `FAMILIES`.
        folder: folder in which the files are written.
        twice: whether to convert the file of each format also to each other format.
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
    """Convert a converted file to a second format, and load the result with postgen."""
    again = {name: folder / f"{'-'.join(formats)}-{name}.safetensors" for name in files}
    for name, file in files.items():
        export_lora(file, again[name], formats[1])  # type: ignore[arg-type]
    ours = _state(lambda: read_by_postgen(pipe, *(str(file) for file in again.values())), pipe, expected)
    return Outcome(family=family, format=" to ".join(formats), postgen=ours, diffusers="not asked")


def _state(read: Callable[[], Changes], pipe: Any, expected: Changes) -> str:
    try:
        found = read()
    except Exception as error:  # any exception of a loader means that it cannot read the file
        pipe.unload_lora_weights()
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if same(found, expected):
        return "exact"
    count = sum(len(layers) for layers in found.values())
    return f"{count} layers changed; they differ from the {sum(len(layers) for layers in expected.values())} expected"


def _wide(family: str, format: str, folder: Path) -> str:
    """Return the result of diffusers' conversion on a file of the model width that the conversion expects."""
    found, expected = converted_by_diffusers(family, format, folder / "wide")
    if found.keys() != expected.keys():
        return f"{len(found)} layers instead of the {len(expected)} expected, or layers with other names"
    if not all(torch.equal(found[name], expected[name]) for name in expected):
        return "the changes of the weights differ"
    return OWN_ONLY.get((family, format), "exact")


def _file(path: Path) -> Path:
    from postgen.families.lora_export import find_lora

    return find_lora(path)


def all_outcomes() -> list[Outcome]:
    """Return the outcomes of all families in all formats."""
    found = []
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        for number, family in enumerate(FAMILIES):
            found += outcomes(family, Path(folder) / str(number))
    return found


def main() -> None:
    """Print the outcome of every family and format."""
    found = all_outcomes()
    for each in found:
        print(f"{each.family}, {each.format}: postgen {each.postgen}, diffusers {each.diffusers}")
    print(f"{sum(each.holds for each in found)} of {sum(not each.refused for each in found)} are restored exactly")


if __name__ == "__main__":
    main()
