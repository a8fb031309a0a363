"""Merge LoRAs: files and folders in any format, and checkpoints of runs that train a LoRA."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from postgen.errors import UserError
from postgen.families.lora_file import EXPERTS, NOTE, WEIGHTS, find_loras
from postgen.tensor_files import opened, read_tensors

from .lora import merge_loras
from .lora_angles import distance, gram_of, turn
from .lora_report import LoraMergeReport, write_lora
from .methods import LORA_ONLY, WHOLE_ONLY, MergeConfig, source_factors
from .report import MergedSource, MergeReport, Progress, emulated, mean_cosine, settings_of
from .sources import WEIGHTS as CHECKPOINT
from .sources import Source

_ADAPTER = re.compile(r"(.*\.lora_(?:A|B|magnitude_vector|embedding_[AB]))\.[^.]+((?:\.weight|\.bias)?)")
"""Name of a factor in a network: with the name of the adapter, which files do not have."""


def check_loras(config: MergeConfig, base: object) -> None:
    """Check that the settings fit LoRAs.

    Raises:
        UserError: they do not.
    """
    if config.method in WHOLE_ONLY:
        raise UserError(f"method {config.method} is for full weights only, not for LoRAs")
    if base is not None:
        raise UserError("a merge of LoRAs needs no base: --eta scales the merged LoRA itself. Leave --base out")
    if config.dtype is not None:
        raise UserError("dtype is for full weights: a merged LoRA is float32")


def write_loras(
    sources: Sequence[Source],
    target: Path,
    output: Path,
    scratch: Path,
    config: MergeConfig,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge LoRAs, write the result, and return the report.

    Args:
        sources: the sources, which are LoRAs.
        target: the file or folder to write, under its temporary name.
        output: its final path.
        scratch: an empty folder for temporary files.
        config: the settings.
        progress: called with the percentage of the merged layers, and 100.

    Raises:
        UserError: the LoRAs do not fit together, or the settings do not fit them.
    """
    steps = [source.step for source in sources]
    factors = source_factors(config, len(sources), steps)
    every = [_files(source, scratch / str(number)) for number, source in enumerate(sources)]
    if any(found.keys() != every[0].keys() for found in every):
        raise UserError(f"some sources have a LoRA for each of {' and '.join(EXPERTS)}, others have one LoRA only")
    single = output.suffix == ".safetensors"
    if single and len(every[0]) > 1:
        raise UserError(f"{output} would hold the LoRAs of two networks: give a folder with -o")
    reports: dict[str, LoraMergeReport] = {}
    grams = []
    for network in every[0]:
        files = [found[network] for found in every]
        labels = [source.label for source in sources]
        tensors, reports[network or "lora"] = _merge(files, factors, config, labels, progress)
        # The LoRA of the only network is in the folder itself, as diffusers writes it.
        place = target if single or network is None else target / network
        write_lora(place, tensors, reports[network or "lora"])
        grams.append(gram_of([*files, place if single else place / WEIGHTS]))
    return _report(sources, factors, reports, grams, output, config)


def _merge(
    files: Sequence[Path],
    factors: Sequence[float],
    config: MergeConfig,
    labels: Sequence[str],
    progress: Progress | None,
) -> tuple[dict[str, Tensor], LoraMergeReport]:
    def track(layers: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str]]:
        every = list(layers)
        for number, layer in enumerate(every, 1):
            yield layer
            if progress is not None:
                progress(100 * number // len(every), 100)

    options: dict[str, Any] = {
        name: value for name in ("density", "seed") if (value := getattr(config, name)) is not None
    }
    method = config.method if config.method in LORA_ONLY else "exact"
    try:
        return merge_loras(files, factors, rank=config.rank, method=method, track=track, **options)
    except UserError as error:
        text = str(error)
        for file, label in zip(files, labels, strict=True):  # temporary files of checkpoints
            text = text.replace(str(file), label)
        raise UserError(text) from error


def _files(source: Source, scratch: Path) -> Mapping[str | None, Path]:
    """Return the LoRA file of each network of a source; for a checkpoint they are written into `scratch`."""
    if source.kind == "lora":
        return source.loras
    tensors = read_tensors(source.path / CHECKPOINT)
    _check_only_adapters(source.path, tensors)
    alone = len(source.sets) == 1
    files: dict[str | None, Path] = {}
    for network in source.sets:
        part = "unet" if network == "unet" else "transformer"
        own = {}
        for key, value in tensors.items():
            if key.startswith(f"{network}.") and (match := _ADAPTER.fullmatch(key.removeprefix(f"{network}."))):
                own[f"{part}.{match[1]}{match[2]}"] = value
        settings, note = _described(source, None if alone else network, part)
        home = scratch if alone else scratch / network
        home.mkdir(parents=True)
        save_file(own, home / WEIGHTS, metadata={"format": "pt", "lora_adapter_metadata": settings})
        if note:
            (home / NOTE).write_text(note, encoding="utf-8")
        files[None if alone else network] = home / WEIGHTS
    return files


def _check_only_adapters(checkpoint: Path, names: Iterable[str]) -> None:
    """Refuse a checkpoint of a run that trains more than adapters, which a LoRA file cannot hold.

    Other tensors of a checkpoint are buffers, for which the optimiser has no state.
    """
    with opened(checkpoint / "optimizer.safetensors", framework="numpy") as content:
        trained = {name.partition("|")[0] for name in content.keys()}  # noqa: SIM118
    if others := sorted(name for name in names if name in trained and not _ADAPTER.fullmatch(name)):
        raise UserError(
            f"the run of {checkpoint} trains more than a LoRA, such as {others[0]}, which a LoRA file cannot hold:"
            " merge while training, with merge_last"
        )


def _described(source: Source, network: str | None, part: str) -> tuple[str, str]:
    """Return the settings of peft and the note for the adapters of a checkpoint, as JSON texts.

    The export of the run has both. A run that is not finished has none; then its settings tell rank and alpha.

    Raises:
        UserError: the scale of the adapters is unknown.
    """
    export = source.path.parent / "export"
    if export.is_dir() and (found := find_loras(export).get(network)) is not None:
        with opened(found, framework="numpy") as content:
            settings = (content.metadata() or {}).get("lora_adapter_metadata")
        if settings:
            note = found.parent / NOTE
            return settings, note.read_text(encoding="utf-8") if note.is_file() else ""
    given = source.settings
    if given.get("lora_path") or not all(isinstance(given.get(name), int) for name in ("lora_r", "lora_alpha")):
        raise UserError(
            f"the scale of the LoRA in {source.path} is unknown, because the run has no export yet: finish the run"
        )
    return json.dumps({f"{part}.r": given["lora_r"], f"{part}.lora_alpha": given["lora_alpha"]}), ""


def _report(
    sources: Sequence[Source],
    factors: Sequence[float],
    reports: Mapping[str, LoraMergeReport],
    grams: Sequence[Tensor | None],
    output: Path,
    config: MergeConfig,
) -> MergeReport:
    first = next(iter(reports.values()))
    whole = sum(gram for gram in grams if gram is not None) if None not in grams else None
    gram = whole if isinstance(whole, Tensor) else None
    count = len(sources)
    rows = [
        MergedSource(
            path=source.label,
            digest=first.digests[number],
            step=source.step,
            weight=factors[number],
            length=None if gram is None else float(gram[number, number]) ** 0.5,
            to_merged=None if gram is None else distance(gram, number, count),
            to_next=None if gram is None or number + 1 == count else distance(gram, number, number + 1),
            cosine=None if gram is None or number + 2 >= count else turn(gram, number),
        )
        for number, source in enumerate(sources)
    ]
    told = {}
    for name, report in reports.items():
        told[name] = {key: value for key, value in report.to_dict().items() if key not in ("files", "weights")}
    return MergeReport(
        output=str(output),
        kind="lora",
        settings=settings_of(config),
        sources=rows,
        mean_cosine=mean_cosine(rows),
        relative_change=None
        if gram is None or not gram[0, 0]
        else distance(gram, 0, count) / float(gram[0, 0]) ** 0.5,
        curve=emulated(factors),
        tensors=2 * sum(report.layers for report in reports.values()),
        lora=told,
    )
