"""Reading and checking of the data sets of a run: items, clips, weights, and what is held out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from postgen.errors import UserError, is_number, is_whole, shown
from postgen.families import Denoiser

from .buckets import (
    Bucket,
    Buckets,
    automatic_buckets,
    check_buckets,
    multiples_of,
    parsed_aspect,
    parsed_bucket,
    why_unsuited,
)
from .clips import Clip, clips_of
from .data_config import SftDataConfig
from .faults import Fault, check_faults
from .inspection import Inspector
from .items import Item, read_items


class Reader:
    """Reads and checks data sets, and collects the files that cannot be used.

    Args:
        config: settings.
        pipe: the pipeline.
        denoiser: its denoiser; the model must support all buckets.
        folder: folder of the run.
        main: whether this process shows progress.
        processes: number of processes of the run.
        rank: number of this process.

    Raises:
        UserError: the model cannot make a bucket, or the cache cannot be written.
    """

    def __init__(
        self,
        config: SftDataConfig,
        pipe: Any,
        denoiser: Denoiser,
        folder: Path,
        *,
        main: bool = True,
        processes: int = 1,
        rank: int = 0,
    ) -> None:
        self.config = config
        self.faults: list[Fault] = []
        """Files that are left out."""
        self.buckets = Buckets(_made_buckets(config, pipe, denoiser))
        self.cache = Path(config.cache_dir).expanduser() if config.cache_dir else folder / "cache"
        self._inspector = Inspector(self.cache, processes=processes, rank=rank, shown=main)

    def clips(
        self, source: Any, where: str, skip: bool, weights: Tensor | None = None, *, weighed: bool = True
    ) -> list[Clip]:
        """Return the clips of a data set.

        Args:
            source: the source, see `read_items`.
            where: name of the data set in messages.
            skip: whether to continue without files that cannot be used.
            weights: (N,) weight of each row; None: the columns of the configuration.
            weighed: whether the clips have weights.

        Raises:
            UserError: files cannot be used, or with `skip` all of them.
        """
        faults: list[Fault] = []
        items = read_items(
            source,
            caption_column=self.config.caption_column,
            where=where,
            faults=faults,
            files=self.cache / "files",
        )
        total = len(items) + len(faults)
        if weights is not None:
            check_faults(faults, total, where)  # the weights of further rows would belong to other items
            if len(weights) != total:
                raise UserError(f"weights has {len(weights)} values for {total} rows of {where}: give one for each")
        found: list[Clip] = []
        for number, (item, info) in enumerate(zip(items, self._inspector.inspect(items), strict=True)):
            made = info if isinstance(info, str) else clips_of(item, info, self.buckets, self.config)
            weight = float(weights[number]) if weights is not None else _weight(item, self.config) if weighed else 1.0
            if isinstance(made, str) or isinstance(weight, str):
                faults.append(Fault(item.key, made if isinstance(made, str) else str(weight)))
                continue
            found += [replace(clip, weight=weight) for clip in made]
        if not skip or not found:
            check_faults(faults, total, where)
        self.faults += faults
        return found


def _made_buckets(config: SftDataConfig, pipe: Any, denoiser: Denoiser) -> list[Bucket]:
    """Return the configured buckets, or automatic ones, with those for images."""
    if config.buckets:
        given = [parsed_bucket(text) for text in config.buckets]
        buckets = [*given, *(Bucket(bucket.height, bucket.width, 1) for bucket in given)]
        check_buckets(buckets, pipe, denoiser)
        return buckets
    size = config.height, config.width
    check_buckets([Bucket(*size, count) for count in (*config.frame_counts, 1)], pipe, denoiser)
    aspects = [parsed_aspect(text) for text in config.aspects]
    buckets = automatic_buckets(*size, config.frame_counts, aspects, multiples_of(pipe, denoiser))
    return [bucket for bucket in buckets if why_unsuited(bucket, denoiser) is None]


def _weight(item: Item, config: SftDataConfig) -> float | str:
    """Return the weight of an item, or what is wrong with it: its weight times its number of repeats."""
    weight, repeats = 1.0, 1
    if config.weight_column is not None:
        if config.weight_column not in item.row:
            return f"it has no column {config.weight_column}, which weight_column names"
        given = _as_number(item.row[config.weight_column])
        if not is_number(given) or not 0 <= given < 1e9:
            return f"its {config.weight_column} is {shown(given)}, it must be a number of at least 0"
        weight = float(given)
    if config.repeats_column is not None:
        repeats = _as_number(item.row.get(config.repeats_column, 1))
        if not is_whole(repeats, 1):
            return f"its {config.repeats_column} is {shown(repeats)}, it must be a whole number of at least 1"
    return weight * repeats


def _as_number(value: Any) -> Any:
    """Return the number in a text, as tables have it; other values are returned unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return int(value) if re.fullmatch(r"\s*\d+\s*", value) else float(value)
    except ValueError:
        return value


def split(clips: Sequence[Clip], share: float) -> tuple[list[Clip], list[Clip]]:
    """Return training and held-out clips.

    All clips of a file, of equal files, and of the shots that `postgen curate` cut from one video are on the same
    side.

    Args:
        clips: all clips.
        share: share of the files that are held out, decided by the hash of their keys; at least one file is on each
            side, except that 0 holds out none.

    Raises:
        UserError: there are fewer than two different files.
    """
    if not share:
        return list(clips), []
    names: dict[str, str] = {}
    for clip in clips:
        names[clip.content] = min(names.get(clip.content, _origin(clip)), _origin(clip))
    places = {name: _place(name) for name in names.values()}
    if len(places) < 2:
        raise UserError("eval_share needs at least two different files in train_dataset: add some, or set it to 0")
    order = sorted(places, key=lambda name: places[name])
    held = {order[0], *(name for name in order[:-1] if places[name] < share)}
    sides: tuple[list[Clip], list[Clip]] = [], []
    for clip in clips:
        sides[names[clip.content] in held].append(clip)
    return sides


def _origin(clip: Clip) -> str:
    """Return the name of the file of a clip, or of the video from which its file was cut."""
    row = clip.item.row
    if "first_frame" in row and isinstance(row.get("source"), str):
        return str(row["source"])
    return re.sub(r"@\d+$", "", clip.item.key)  # several captions of a file


def _place(name: str) -> float:
    """Return a number in [0, 1) that depends on a name alone."""
    return int(hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:12], 16) / 16**12
