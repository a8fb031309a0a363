"""Read and encode a user's videos with their depth. Processes share the work through `pool_dir`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm.auto import tqdm

from postgen.errors import UserError, shown
from postgen.sampling.conditions import Row
from postgen.tensor_files import read_tensors
from postgen.training.digests import digest
from postgen.training.logging import say
from postgen.training.prompts import Prompts
from postgen.training.video_rows import first_frames, read_clip, video_path
from postgen.video import iter_video

from .clips import CORRUPTED, ClipPool, ClipsConfig, encoded
from .depth import GREYS
from .depth_sources import DepthSource, TransformersDepth
from .model import WorldWeaverModel
from .pool_files import encoder_key, lock_of, read_latents, unwritable, write_latents
from .texts import Texts

_BLOCKS, _BLOCK = 16, 2**16
"""Number and size in bytes of the evenly spaced pieces of a file that are hashed. Small files are hashed whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Video:
    """A checked row of the dataset."""

    where: str
    path: str
    depth: str | None


def video_pool(
    config: ClipsConfig,
    model: WorldWeaverModel,
    texts: Texts,
    source: str | Sequence[Mapping[str, Any]],
    name: str,
    *,
    wrong: bool,
    bf16: bool = False,
    depth_source: DepthSource | None = None,
    part: int = 0,
    parts: int = 1,
) -> ClipPool:
    """Read and encode a user's videos. The latents are kept on the CPU.

    With `config.pool_dir` there is a file for each clip and modality, named by a hash of everything that it depends
    on. A process encodes the missing clips of its own share, then missing clips that no other process is encoding,
    and reads all other clips from their files.

    Args:
        config: length and size of the clips, the depth estimator, and the folder for encoded clips.
        model: encodes the clips and determines the modalities.
        texts: receives the prompts.
        source: the rows, or the path of a dataset.
        name: name of the dataset in error messages.
        wrong: whether to make corrupted RGB.
        bf16: encode in bfloat16.
        depth_source: depth source to use instead of `config.depth_model`; not allowed with `pool_dir`.
        part: rank of the process.
        parts: number of processes that call this function with the same rows.

    Raises:
        UserError: a row without video, a video that is too short, or missing depth; a model with flow; a `pool_dir`
            that cannot be written or read.
    """
    if "flow" in model.modalities:
        raise UserError(f"{name}: videos have no optical flow, only scenes of the world have: omit flow from aux")
    if config.pool_dir is not None and depth_source is not None:
        raise UserError("pool_dir cannot be used with depth_source: give depth_model instead, or omit pool_dir")
    rows = Prompts(source, name, seed=0, shuffle=False).rows
    wants = "depth" in model.modalities
    none = wants and depth_source is None and config.depth_model is None
    videos = [_checked(row, f"row {number} of {name}", wants, none) for number, row in enumerate(rows)]

    @cache  # loads the estimator only if a row needs it
    def estimator() -> DepthSource:
        return depth_source or TransformersDepth(str(config.depth_model), device=model.transformer.device)

    names = [*model.modalities, *([CORRUPTED] if wrong else [])]
    made = _Encoder(config, model, names, estimator, bf16)
    if config.pool_dir is None and parts > 1 and part == 0:
        say(f"{name}: each of {parts} processes encodes all {len(rows)} videos; set pool_dir to share the work")
    if config.pool_dir is not None:
        made.share(videos, part, parts)
    latents: dict[str, Tensor] = {}
    bar = tqdm(videos, desc=f"{name}: {len(rows)} videos", disable=part != 0 or len(rows) < 4, leave=False)
    for number, video in enumerate(bar):
        for key, value in made.clip(video).items():
            # Write into one tensor: concatenating a list at the end would need twice the memory.
            latents.setdefault(key, value.new_empty(len(rows), *value.shape[1:]))[number] = value[0]
    texts.add(row["prompt"] for row in rows)
    frames = latents["rgb"].shape[2]
    told = torch.tensor([texts.numbers[row["prompt"]] for row in rows])[:, None].expand(-1, frames)
    return ClipPool({name: latents[name] for name in model.modalities}, latents.get(CORRUPTED), None, told)


class _Encoder:
    """Encodes clips, or reads their latents from files."""

    def __init__(
        self,
        config: ClipsConfig,
        model: WorldWeaverModel,
        names: Sequence[str],
        estimator: Callable[[], DepthSource],
        bf16: bool,
    ) -> None:
        self.config, self.model, self.names, self.bf16 = config, model, names, bf16
        self.estimator = estimator
        self.told = [config.num_frames, *config.size, *encoder_key(model, bf16=bf16)]
        self._files: dict[_Video, dict[str, Path]] = {}
        self._content = cache(_content)

    def share(self, videos: Sequence[_Video], part: int, parts: int) -> None:
        """Encode the missing clips of the own share, then missing clips that no other process is encoding."""
        own = videos[part::parts]
        for video in tqdm(own, desc=f"encoding {len(own)} videos", disable=part != 0 or len(own) < 4, leave=False):
            self._make(video)
        for later in range(1, parts):
            for video in videos[(part + later) % parts :: parts]:
                self._make(video, wait=False)

    def clip(self, video: _Video) -> dict[str, Tensor]:
        """Return the latents (1, C, T, h, w) of a clip by name, on the CPU."""
        if self.config.pool_dir is None:
            return self._encoded(video, self.names)
        self._make(video)
        return {name: read_latents(place) for name, place in self.files(video).items()}

    def files(self, video: _Video) -> dict[str, Path]:
        """Return the files for the latents of a clip by name."""
        if video not in self._files:
            assert self.config.pool_dir is not None
            said: list[Any] = [self._content(video.path, video.where), *self.told]
            more = {"depth": [*GREYS, *self._depth_key(video)]}
            folder = Path(self.config.pool_dir).expanduser()
            self._files[video] = {
                name: folder / f"video-{name}-{digest([*said, name, *more.get(name, [])])}.safetensors"
                for name in self.names
            }
        return self._files[video]

    def _depth_key(self, video: _Video) -> list[str]:
        if "depth" not in self.names:
            return []
        if video.depth is not None:
            return ["file", self._content(video.depth, video.where)]
        model = str(self.config.depth_model)
        return ["model", self._content(model, "depth_model") if Path(model).is_dir() else model]

    def _make(self, video: _Video, *, wait: bool = True) -> None:
        """Write the missing files of a clip. With `wait=False` skip a clip that another process is encoding."""
        files = self.files(video)
        if all(place.is_file() for place in files.values()):
            return
        rgb = files["rgb"]
        lock = lock_of(rgb)
        try:
            if wait:
                lock.wait(say, f"encodes {video.path}")
            else:
                lock.acquire()
        except UserError:
            return
        except OSError as error:
            raise unwritable(rgb, error) from error
        try:
            # Another process may have written the files before this process got the lock.
            missing = [name for name, place in files.items() if not place.is_file()]
            for name, value in self._encoded(video, missing).items() if missing else ():
                write_latents(files[name], value)
            # The lock file is no longer needed: a process that waits for it will find the files.
            (lock.folder / f".{rgb.stem}.lock").unlink(missing_ok=True)
        finally:
            lock.release()

    def _encoded(self, video: _Video, names: Sequence[str]) -> dict[str, Tensor]:
        config = self.config
        rgb = read_clip(video.path, config.num_frames, config.size, video.where)
        disparity = _disparity(video, rgb, self.estimator)[None] if "depth" in names else None
        # Seed with the content of the video, so that its corruption is the same in every process and dataset.
        noise = torch.Generator().manual_seed(int(self._content(video.path, video.where)[:15], 16))
        found = encoded(self.model, names, rgb[None], disparity, None, noise, bf16=self.bf16)
        return {name: value.cpu() for name, value in found.items()}


def _checked(row: Row, where: str, wants: bool, none: bool) -> _Video:
    """Check a row before any video is read."""
    path, depth = video_path(row, where), row.get("depth") if wants else None
    if depth is None and none:
        raise UserError(f"{where} has no depth: add a column depth, or set depth_model")
    if depth is not None and (not isinstance(depth, str) or not depth):
        raise UserError(f"{where}: depth must be the path of a file or of a folder of pictures, got {shown(depth)}")
    return _Video(where=where, path=path, depth=depth)


def _content(path: str, where: str) -> str:
    """Return a short digest of a file, or of all files in a folder, from their sizes and sampled pieces."""
    place, said = Path(path), hashlib.sha256()
    try:
        for file in sorted(each for each in place.rglob("*") if each.is_file()) if place.is_dir() else [place]:
            size = file.stat().st_size
            said.update(f"{file.relative_to(place)} {size} ".encode())
            with file.open("rb") as data:
                for number in range(_BLOCKS):
                    data.seek(max(0, size - _BLOCK) * number // (_BLOCKS - 1))
                    said.update(data.read(_BLOCK))
    except OSError as error:
        raise UserError(f"{where}: {path} cannot be read: {error.strerror}") from error
    return said.hexdigest()[:16]


def _disparity(video: _Video, rgb: Tensor, estimator: Callable[[], DepthSource]) -> Tensor:
    """Return the disparity of a video (F, H, W): from the file of its row, or else from the estimator."""
    if video.depth is None:
        return _finite(estimator()(rgb.movedim(1, -1)), f"{video.where}: the estimated depth")
    where = f"{video.where}: {video.depth}"
    if Path(video.depth).suffix == ".safetensors":
        tensors = read_tensors(Path(video.depth), f"{video.where}: depth {video.depth} cannot be read")
        if "disparity" not in tensors or tensors["disparity"].dim() != 3 or not tensors["disparity"].numel():
            raise UserError(f"{where} needs a tensor named disparity of shape (frames, height, width)")
        parts = [tensors["disparity"][: len(rgb)].float()]
    else:
        parts = [frames.mean(1) for frames in iter_video(video.depth, count=len(rgb))]
    stored = [_finite(part, where)[:, None] for part in parts]
    sized = [interpolate(part, rgb.shape[-2:], mode="bilinear", antialias=True)[:, 0] for part in stored]
    return first_frames(torch.cat(sized), len(rgb), where)


def _finite(disparity: Tensor, where: str) -> Tensor:
    if not bool(disparity.isfinite().all()):
        raise UserError(f"{where} has values that are not finite: disparity is 1 / depth, 0 where there is no depth")
    return disparity
