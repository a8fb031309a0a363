"""`merge`: one function for all kinds of sources."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from postgen.errors import UserError
from postgen.files import check_apart, check_place, files_of, replacing_all

from .adapters import check_loras, write_loras
from .checks import check_models, check_order
from .methods import LORA_ONLY, MergeConfig
from .report import NAME, MergeReport, Progress
from .sources import Source, find_base, find_sources
from .whole import WholeMerge, check_base, copy_others, prepare


def merge(
    sources: str | Path | Sequence[str | Path],
    output: str | Path,
    config: MergeConfig | None = None,
    *,
    base: str | Path | None = None,
    last: int | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge models, checkpoints or LoRAs into one, and write it with a report.

    Full weights are read and written in blocks, so that the memory does not grow with the model. The output replaces
    an earlier one only when it is complete.

    Args:
        sources: folders of models in diffusers' format, of single networks, of runs (their checkpoints) or of LoRAs;
            safetensors files; or one of them. Checkpoints of one run must be in the order of their steps.
        output: folder of the merged model or LoRA, or a .safetensors file if the sources are single files or LoRAs.
        config: the settings; None is the mean (`sma`).
        base: the model that the sources began from, for `eta`, `add`, `negate` and `slerp`.
        last: number of checkpoints of each run; None takes all.
        progress: called with the percentage of the work that is done, and 100.

    Returns:
        The report, which is also written: `merge.json` in a folder, NAME.merge.json beside a file.

    Raises:
        UserError: a source cannot be read, the sources do not fit together, the settings do not fit them, or the
            output cannot be written. Then nothing is written.
    """
    config = config or MergeConfig()
    found = find_sources([sources] if isinstance(sources, str | Path) else sources, last)
    check_models(found)
    check_order(found, config.method)
    root = find_base(base) if base is not None else None
    target = Path(output)
    _check_output(target, found, root)
    _check_settings(config, found[0].is_lora, root)
    with ExitStack() as stack:
        ready = None if found[0].is_lora else prepare(found, root, config, stack)
        try:
            return _write(found, target, config, ready, progress)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror or error}") from error


def _check_settings(config: MergeConfig, lora: bool, base: Source | None) -> None:
    """Check that the settings fit the kind of the sources.

    Raises:
        UserError: they do not.
    """
    if lora:
        check_loras(config, base)
    elif config.method in LORA_ONLY:
        raise UserError(f"method {config.method} is for LoRA files, the sources hold full weights")
    elif config.rank is not None:
        raise UserError("rank is for LoRA files, the sources hold full weights")
    else:
        check_base(config, base)


def _write(
    sources: Sequence[Source],
    target: Path,
    config: MergeConfig,
    ready: WholeMerge | None,
    progress: Progress | None,
) -> MergeReport:
    began = time.monotonic()
    single = target.suffix == ".safetensors"
    told = target.with_name(f"{target.stem}.{NAME}") if single else None
    with replacing_all([target, *([told] if told else [])]) as (part, *beside), tempfile.TemporaryDirectory() as inner:
        if ready is None:
            if not single:
                part.mkdir()
            report = _loras(sources, part, target, Path(inner), config, progress)
        else:
            _check_space(target, ready)
            folder = part if not single else part.parent
            folder.mkdir(exist_ok=True)
            if single:  # the one file of the layout is the output itself
                ready.layout.shards = {name: [part.name] for name in ready.layout.shards}
            report = ready.write(folder, str(target), progress)
            if not single:
                copy_others(ready.layout, part, report)
        report = replace(report, seconds=round(time.monotonic() - began, 3))
        (beside[0] if beside else part / NAME).write_text(report.to_json(), encoding="utf-8")
    return report


def _loras(
    sources: Sequence[Source],
    part: Path,
    target: Path,
    scratch: Path,
    config: MergeConfig,
    progress: Progress | None,
) -> MergeReport:
    # `write_lora` replaces its target, a folder or a file with the suffix .safetensors.
    written = scratch / ("lora.safetensors" if target.suffix == ".safetensors" else "lora")
    report = write_loras(sources, written, target, scratch / "sources", config, progress)
    if written.is_file():
        shutil.copyfile(written, part)
    else:
        shutil.copytree(written, part, dirs_exist_ok=True)
    return report


def _check_output(target: Path, sources: Sequence[Source], base: Source | None) -> None:
    """Check that the output can be written, suits the kind of the sources, and replaces nothing but an earlier merge.

    Raises:
        UserError: it does not.
    """
    single = target.suffix == ".safetensors"
    files = all(source.kind == "file" for source in sources)
    check_place(target, folder=not single)
    if files and not single:
        raise UserError(f"the sources are files: give the name of a .safetensors file with -o, got {target}")
    if single and not files and not sources[0].is_lora:
        raise UserError(f"the sources are folders: give a folder with -o, got {target}")
    if target.is_dir() and any(target.iterdir()) and not (target / NAME).is_file():
        raise UserError(f"{target} is not empty and not an earlier merge: give another output, or empty it")
    read = [file for source in (*sources, *([base] if base else [])) for file in files_of(source.path)]
    check_apart([target], read)
    for source in sources:
        if target.resolve() in source.path.resolve().parents or source.path.resolve() in target.resolve().parents:
            raise UserError(f"{target} is inside of {source.path}, which this call reads: give another output")


def _check_space(target: Path, ready: WholeMerge) -> None:
    """Check that the disk has room for the output, before hours of merging.

    Raises:
        UserError: it has not.
    """
    needed = ready.size + sum(file.stat().st_size for file in ready.layout.copies.values())
    home = next(parent for parent in target.absolute().parents if parent.exists())
    if (free := shutil.disk_usage(home).free) < needed:
        raise UserError(f"cannot write {target}: it needs {needed / 1e9:.2f} GB, {home} has {free / 1e9:.2f} GB free")
