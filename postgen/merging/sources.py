"""What the sources of a merge are: model folders, single networks, weight files, checkpoints of runs, LoRA files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from postgen.assets import model_folder
from postgen.errors import UserError
from postgen.families.lora_file import EXPERTS, find_loras
from postgen.reading import check_name
from postgen.tensor_files import opened
from postgen.training.checkpoint import find, named
from postgen.training.checkpoint_head import NAME, check_contents, in_spans, read_head

Kind = Literal["folder", "file", "checkpoint", "lora"]

WEIGHTS = "weights.safetensors"
"""File of the trained weights in a checkpoint."""

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})(?=\.|$)")
OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
"""Suffixes of weight files in other formats, which are not read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSet:
    """The tensors of one network of a source: one file, several shards, or a part of a file."""

    files: tuple[Path, ...]
    prefix: str = ""
    """Beginning of the names of the tensors in the file, which is not part of their names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One source of a merge."""

    path: Path
    kind: Kind
    sets: Mapping[str, WeightSet] = field(default_factory=dict)
    """Network -> tensors; the key of a single network without a name is empty."""

    loras: Mapping[str | None, Path] = field(default_factory=dict)
    """Network -> LoRA file, see `find_loras`."""

    step: int | None = None
    """Optimiser step, for a checkpoint."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the run, for a checkpoint."""

    @property
    def label(self) -> str:
        """Name of the source in messages."""
        return str(self.path)

    @property
    def is_lora(self) -> bool:
        """Whether the source is a LoRA: a file, or a checkpoint that holds adapters."""
        return self.kind == "lora" or bool(self.settings.get("adapters"))


def find_sources(paths: Sequence[str | Path], last: int | None = None) -> list[Source]:
    """Return the sources at paths.

    Args:
        paths: model folders, networks, safetensors files, LoRA files, checkpoints, and folders of runs, which stand
            for their checkpoints in the order of their steps.
        last: number of checkpoints of each run; None takes all of them.

    Raises:
        UserError: a path is none of these, a run has too few checkpoints, `last` is given without a run, a file is
            given twice, or full weights and LoRAs are mixed.
    """
    sources: list[Source] = []
    runs = 0
    for text in paths:
        path = _place(text)
        checkpoints = _checkpoints(path)
        if checkpoints is None:
            sources.append(_source(path))
            continue
        runs += 1
        if last is not None and len(checkpoints) < last:
            raise UserError(f"{path} has {len(checkpoints)} complete checkpoints, --last asks for {last}")
        sources += [_checkpoint(folder) for folder in checkpoints[-last if last else 0 :]]
    if last is not None and not runs:
        raise UserError("--last needs the folder of a run, none of the sources is one")
    _check_apart(sources)
    return sources


def find_base(text: str | Path) -> Source:
    """Return the source that is the base of a merge.

    Raises:
        UserError: there is none at this path, or it is a folder of a run or a LoRA.
    """
    path = _place(text)
    if _checkpoints(path) is not None:
        raise UserError(f"{path} is the folder of a run: give one of its checkpoints, or the model it began from")
    source = _source(path)
    if source.is_lora:
        raise UserError(f"the base {path} is a LoRA: the base is a model; --eta scales a LoRA without a base")
    return source


def _place(text: str | Path) -> Path:
    check_name(str(text), "cannot read a source")
    path = model_folder(str(text)).expanduser()
    if not path.exists():
        raise UserError(
            f"there is no {text}: give a model folder, a network, a .safetensors file, a checkpoint or a run folder"
            " (models of the hub: download them first)"
        )
    return path


def _checkpoints(path: Path) -> list[Path] | None:
    """Return the complete checkpoints in the folder of a run; None if the folder is not one.

    Those of spikes from which the run was rescued are left out.
    """
    if not path.is_dir() or not (every := named(path)):
        return None
    complete = find(path)
    if not complete:
        raise UserError(f"{path} has no complete checkpoint: {every[-1].name} lacks files")
    spiked = read_head(complete[-1]).spiked
    sound = [folder for folder in complete if not in_spans(int(folder.name.rpartition("-")[2]), spiked)]
    return sound or complete


def _source(path: Path) -> Source:
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        raise UserError(f"{path} is neither a file nor a folder")
    if (path / "state.json").is_file() or NAME.fullmatch(path.name):
        return _checkpoint(path)
    sets = _sets(path)
    whole = any((path / name).is_file() for name in ("model_index.json", "base.json", "config.json"))
    if not whole and (loras := _loras(path)):
        return Source(path=path, kind="lora", loras=loras)
    if not sets:
        others = sorted(file for file in path.rglob("*") if file.suffix in OTHER_FORMATS)
        more = f"; it has {others[0].name}, but only safetensors are read" if others else ""
        raise UserError(f"{path} holds no *.safetensors{more}")
    return Source(path=path, kind="folder", sets=sets)


def _file(path: Path) -> Source:
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is not a .safetensors file: only safetensors are read")
    if _keys_of_lora(path):
        return Source(path=path, kind="lora", loras=find_loras(path))
    shard = _SHARD.search(path.stem)
    if shard is not None and int(shard[2]) > 1:
        raise UserError(f"{path} is one of {int(shard[2])} shards: give their folder {path.parent}")
    return Source(path=path, kind="file", sets={"": WeightSet(files=(path,))})


def _loras(path: Path) -> dict[str | None, Path]:
    try:
        found = find_loras(path)
    except UserError:
        if sum(map(_keys_of_lora, path.glob("*.safetensors"))) > 1:
            raise UserError(f"{path} holds several LoRA files: give one of them, or each as a source") from None
        return {}
    return found if all(_keys_of_lora(file) for file in found.values()) else {}


def _keys_of_lora(path: Path) -> bool:
    with opened(path, framework="numpy") as content:
        return any("lora" in name or ".lokr_" in name for name in content.keys())  # noqa: SIM118


def _sets(folder: Path) -> dict[str, WeightSet]:
    """Return the networks of a folder: those of its subfolders, and one in the folder itself."""
    sets: dict[str, WeightSet] = {}
    for place in (folder, *sorted(inner for inner in folder.iterdir() if inner.is_dir() and inner.name[0] != ".")):
        groups: dict[str, list[Path]] = {}
        for file in sorted(place.glob("*.safetensors")):
            groups.setdefault(_SHARD.sub("", file.stem), []).append(file)
        for stem, files in groups.items():
            _check_shards(files)
            own = "" if place == folder else place.name
            name = own if len(groups) == 1 else f"{own}/{stem}"
            sets[name] = WeightSet(files=tuple(files))
    return sets


def _check_shards(files: Sequence[Path]) -> None:
    """Check that all shards of a network are there."""
    counts = {int(match[2]) for file in files if (match := _SHARD.search(file.stem))}
    if counts and counts != {len(files)}:
        raise UserError(f"{files[0].parent} has {len(files)} of {max(counts)} shards: copy the whole folder")


def _checkpoint(folder: Path) -> Source:
    head = read_head(folder)
    check_contents(folder, head)
    path = folder / WEIGHTS
    with opened(path, framework="numpy") as content:
        names = list(content.keys())
    models = sorted({name.split(".")[0] for name in names})
    if not models:
        raise UserError(f"{folder} holds no weights")
    sets = {model: WeightSet(files=(path,), prefix=f"{model}.") for model in models}
    adapters = any(".lora_" in name for name in names)
    settings = {"adapters": adapters, **_flat(head.meta["config"])}
    return Source(path=folder, kind="checkpoint", sets=sets, step=head.step, settings=settings)


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "adapters"}


def _check_apart(sources: Sequence[Source]) -> None:
    """Refuse sources that are given twice, and a mixture of full weights and LoRAs."""
    if not sources:
        raise UserError("there is nothing to merge: give at least one source")
    seen: set[Path] = set()
    for source in sources:
        if (real := source.path.resolve()) in seen:
            raise UserError(f"{source.path} is given twice: give each source once, with --weights for its share")
        seen.add(real)
    loras = [source for source in sources if source.is_lora]
    whole = [source for source in sources if not source.is_lora]
    if loras and whole:
        raise UserError(f"{loras[0].path} is a LoRA and {whole[0].path} holds full weights: they cannot be merged")
    kinds = [{*source.loras} for source in loras if source.kind == "lora"]
    if any(kind != kinds[0] for kind in kinds):
        raise UserError(f"some sources have a LoRA for each of {' and '.join(EXPERTS)}, others have one LoRA only")
