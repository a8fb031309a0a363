"""Reading and checking of the data sets of a run: items, clips, weights, and what is held out."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError, is_number, is_whole, shown
from postgen.families import Denoiser

from .batches import Batches
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
from .inspection import Inspector, MediaInfo
from .items import Item, read_items


@dataclass(frozen=True, slots=True)
class Checked:
    """A file that can be used."""

    item: Item
    info: MediaInfo
    weight: float
    """Sampling weight."""


@dataclass(frozen=True, slots=True)
class Sources:
    """The checked data sets of a run, read before a model is loaded. `read_sources` makes them."""

    config: SftDataConfig
    train: list[Checked]
    evaluation: list[Checked] | None
    """Files of `eval_dataset`; None without one."""
    faults: list[Fault]
    """Files that are left out."""

    def clips(self, buckets: Buckets) -> tuple[list[Clip], list[Clip]]:
        """Return the training clips and the held-out clips in buckets.

        Raises:
            UserError: `eval_share` needs more files.
        """
        clips = _clips(self.train, buckets, self.config)
        if self.evaluation is None:
            return split(clips, self.config.eval_share)
        return clips, _clips(self.evaluation, buckets, self.config)


def cache_folder(config: SftDataConfig, folder: Path) -> Path:
    """Return the folder of the cache of a run in `folder`."""
    return Path(os.path.expanduser(config.cache_dir)) if config.cache_dir else folder / "cache"


def read_sources(
    config: SftDataConfig,
    folder: Path,
    *,
    main: bool = True,
    processes: int = 1,
    rank: int = 0,
    skip: bool | None = None,
    train: Any = None,
    evaluation: Any = None,
    weights: Tensor | None = None,
) -> Sources:
    """Read and check the data sets of a run. This needs no model: sizes of buckets do not decide what can be used.

    The arguments are those of `SftData.build`.

    Raises:
        UserError: files cannot be used (one message about all of them), `eval_share` or `image_share` needs other
            files, all weights are 0, or the cache cannot be written.
    """
    if train is None and config.train_dataset is None:
        raise UserError("train_dataset is missing: name a folder of images and videos with captions")
    reader = _Reader(config, folder, skip=config.skip_bad if skip is None else skip)
    reader.inspector = Inspector(reader.cache, processes=processes, rank=rank, shown=main)
    given = reader.read(config.train_dataset if train is None else train, "train_dataset", weights)
    source = config.eval_dataset if evaluation is None else evaluation
    held_out = None if source is None else reader.read(source, "eval_dataset", weighed=False)
    _check_columns(given, held_out or [], config)
    sources = Sources(config, given, held_out, reader.faults)
    clips, _ = sources.clips(reader.buckets)
    batches_of(clips, config)
    return sources


def batches_of(
    clips: Sequence[Clip],
    config: SftDataConfig,
    *,
    batch_size: int = 1,
    seed: int = 0,
    processes: int = 1,
    accumulation: int = 1,
) -> Batches:
    """Return the order of the batches of clips, see `Batches`.

    Raises:
        UserError: the sum of the weights is 0, or `image_share` needs other clips.
    """
    return Batches(
        [clip.bucket for clip in clips],
        batch_size=batch_size,
        seed=seed,
        processes=processes,
        accumulation=accumulation,
        weights=torch.tensor([clip.weight for clip in clips], dtype=torch.float64),
        image_share=config.image_share,
    )


class _Reader:
    """Reads and checks data sets, and collects the files that cannot be used."""

    inspector: Inspector

    def __init__(self, config: SftDataConfig, folder: Path, *, skip: bool) -> None:
        self.config, self.skip = config, skip
        self.cache = cache_folder(config, folder)
        self.faults: list[Fault] = []
        """Files that are left out."""
        self.buckets = Buckets(_plain_buckets(config))
        """Buckets of one size. Which files can be used depends on their numbers of frames only."""

    def read(self, source: Any, where: str, weights: Tensor | None = None, *, weighed: bool = True) -> list[Checked]:
        """Return the files of a data set that can be used.

        Args:
            source: the source, see `read_items`.
            where: name of the data set in messages.
            weights: (N,) weight of each row; None: the columns of the configuration.
            weighed: whether the files have weights.

        Raises:
            UserError: files cannot be used, or with `skip` all of them.
        """
        config, faults, found = self.config, list[Fault](), list[Checked]()
        items = read_items(
            source, caption_column=config.caption_column, where=where, faults=faults, files=self.cache / "files"
        )
        total = len(items) + len(faults)
        if weighed and weights is None:
            _check_weights(items, config)
        if weights is not None:
            check_faults(faults, total, where)  # the weights of further rows would belong to other items
            if len(weights) != total:
                raise UserError(f"weights has {len(weights)} values for {total} rows of {where}: give one for each")
        for number, (item, info) in enumerate(zip(items, self.inspector.inspect(items), strict=True)):
            made = info if isinstance(info, str) else clips_of(item, info, self.buckets, config)
            weight = float(weights[number]) if weights is not None else _weight(item, config) if weighed else 1.0
            wrong = next((reason for reason in (made, weight) if isinstance(reason, str)), None)
            if wrong is None and not isinstance(info, str) and not isinstance(weight, str):
                found.append(Checked(item, info, weight))
            else:
                faults.append(Fault(item.key, str(wrong)))
        if not self.skip or not found:
            check_faults(faults, total, where)
        self.faults += faults
        return found


def _clips(files: Sequence[Checked], buckets: Buckets, config: SftDataConfig) -> list[Clip]:
    found: list[Clip] = []
    for file in files:
        made = clips_of(file.item, file.info, buckets, config)
        assert not isinstance(made, str), made
        found += [replace(clip, weight=file.weight) for clip in made]
    return found


def _check_weights(items: Sequence[Item], config: SftDataConfig) -> None:
    """Check that some row has the column of weights: without it, every file would be wrong for the same reason."""
    name = config.weight_column
    if name is not None and items and not any(name in item.row for item in items):
        raise UserError(f"weight_column: no row has a column {shown(name)}: correct it, or leave it out")


def _check_columns(train: Sequence[Checked], evaluation: Sequence[Checked], config: SftDataConfig) -> None:
    """Check that some row has the column of repeats, which a row may lack, and that of captions."""
    name = config.repeats_column
    if name is not None and not any(name in file.item.row for file in train):
        raise UserError(f"repeats_column: no row has a column {shown(name)}: correct it, or leave it out")
    name = config.caption_column
    if name is not None and not any(name in file.item.row for file in (*train, *evaluation)):
        raise UserError(
            f"caption_column {shown(name)}: all captions are text files beside their clips: leave caption_column out"
        )


def _plain_buckets(config: SftDataConfig) -> list[Bucket]:
    """Return the configured buckets, or those of `height` x `width`, with those for images."""
    given = [parsed_bucket(text) for text in config.buckets]
    given = given or [Bucket(config.height, config.width, count) for count in config.frame_counts]
    return [*given, *(Bucket(bucket.height, bucket.width, 1) for bucket in given)]


def buckets_of(config: SftDataConfig, pipe: Any, denoiser: Denoiser) -> Buckets:
    """Return the configured buckets, or automatic ones, with those for images.

    Raises:
        UserError: the model cannot make a bucket.
    """
    plain = _plain_buckets(config)
    check_buckets(plain, pipe, denoiser)
    if config.buckets:
        return Buckets(plain)
    aspects = [parsed_aspect(text) for text in config.aspects]
    size = config.height, config.width
    buckets = automatic_buckets(*size, config.frame_counts, aspects, multiples_of(pipe, denoiser))
    return Buckets(bucket for bucket in buckets if why_unsuited(bucket, denoiser) is None)


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
