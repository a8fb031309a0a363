"""Settings of the clips that a model is fine-tuned on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from postgen.families.video_calls import RANGES
from postgen.settings import Part

from .buckets import parsed_aspect, parsed_bucket


@dataclass(kw_only=True)
class SftDataConfig(Part):
    """Settings of the training clips: their source, sizes and frames, their cache and their mixture.

    Raises:
        UserError: a value has the wrong type or lies outside its range.
    """

    part: ClassVar[str] = "data"
    files: ClassVar[tuple[str, ...]] = ("train_dataset", "eval_dataset")
    may_change: ClassVar[tuple[str, ...]] = ("cache_dir", "train_dataset", "skip_bad")

    train_dataset: str | None = None
    """Images and videos with captions: a folder (NAME.txt beside NAME.mp4, or `metadata.jsonl` / `metadata.csv`), a
    file of rows (JSONL, JSON, CSV, TSV) with `video`, `image` or `file_name` and a caption, a folder or id of
    `datasets`, or `package.module:function` that returns rows."""

    eval_dataset: str | None = None
    """Held-out images and videos, from the same kinds of source. None: see `eval_share`."""

    eval_share: float = 0.0
    """Share of the files of `train_dataset` that are held out for the evaluation. The hash of a file's key decides,
    so that the choice does not depend on other files. At least one file is held out."""

    caption_column: str | None = None
    """Column of the captions in rows. None: the first of prompt, caption, text that a row has."""

    skip_bad: bool = False
    """Continue without files that cannot be used, and list them in `skipped.jsonl`. Otherwise they are an error."""

    height: int = 480
    """Height in pixels of a clip with the aspect ratio width : height. Other buckets have about the same area."""

    width: int = 832
    """Width in pixels."""

    num_frames: int = 33
    """Largest number of frames of a clip; 1 for image models."""

    frame_buckets: list[int] = field(default_factory=list)
    """Further numbers of frames, for shorter videos. Images are always clips of one frame."""

    aspects: list[str] = field(default_factory=lambda: ["16:9", "3:2", "4:3", "1:1", "3:4", "2:3", "9:16"])
    """Aspect ratios of the buckets besides width : height. An empty list: every clip is resized and cropped to
    `height` x `width`."""

    buckets: list[str] = field(default_factory=list)
    """Buckets to use instead of the automatic ones: HEIGHTxWIDTHxFRAMES, such as 480x832x33. Images use the same
    sizes with one frame."""

    frame_selection: Literal["first", "uniform", "chunks"] = "first"
    """Frames of a video that is longer than a clip: its first frames, evenly spaced frames, or all frames, cut into
    several clips."""

    target_fps: float | None = None
    """Frames per second to which videos are resampled by leaving out frames. None: use all frames."""

    image_share: float | None = None
    """Share of the batches that have images. None: as many as there are images among the clips."""

    weight_column: str | None = None
    """Column with the sampling weight of a row, at least 0. None: all rows have the same weight."""

    repeats_column: str | None = None
    """Column with the number of times that a row counts, a whole number of at least 1. None: every row once."""

    sample_latents: bool = True
    """Sample latents from the distribution of the autoencoder at each use. False: use its mode."""

    cache_dir: str | None = None
    """Folder of encoded clips and captions, which processes and later runs share. None: `cache` in `output_dir`."""

    cache_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Dtype of the stored latents."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("height", "width", "num_frames"):
            self.require_in(RANGES[name], name)
        for name in (
            "train_dataset",
            "eval_dataset",
            "caption_column",
            "weight_column",
            "repeats_column",
            "cache_dir",
        ):
            self.require(getattr(self, name) != "", name, "a name, or left out")
        self.require(0 <= self.eval_share < 1, "eval_share", "at least 0 and below 1")
        both = self.eval_share > 0 and self.eval_dataset is not None
        self.require(not both, "eval_share", "0 with eval_dataset")
        share = self.image_share
        self.require(share is None or 0 <= share <= 1, "image_share", "from 0 to 1")
        self.require(all(count >= 1 for count in self.frame_buckets), "frame_buckets", "numbers of at least 1")
        self.require(self.target_fps is None or math.inf > self.target_fps > 0, "target_fps", "above 0")
        self.require(not (self.buckets and self.frame_buckets), "frame_buckets", "left out with buckets")
        for text in self.buckets:
            parsed_bucket(text)
        for text in self.aspects:
            parsed_aspect(text)

    @property
    def frame_counts(self) -> list[int]:
        """Numbers of frames of video clips, from many to few."""
        return sorted({self.num_frames, *self.frame_buckets}, reverse=True)
