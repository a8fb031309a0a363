"""The part `ulysses` of `benchmarks.rl_scale`: a forward pass of Wan 14B at 720p whose tokens are split over GPUs.

The runs are described here, and `measured` is the work of one process of a run. diffusers' Ulysses attention splits
the tokens, and Enhance-A-Video acts in every layer. Each process first does the same pass alone, on all tokens. The
difference of the two outputs is that of splitting, as weights, inputs and GPU are the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from benchmarks.rl_scale_rows import MODELS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PART = "ulysses"
CONFIG = {**MODELS["wan14"], "attention_head_dim": 128, "text_dim": 4096}
"""Config of the transformer of Wan 2.1 14B."""
CLIP = (21, 90, 160)
"""Frames, rows and columns of the latents of 81 x 720 x 1280: 75,600 tokens."""
SMALL = {"num_attention_heads": 8, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 2, "text_dim": 16}
SMALL |= {"freq_dim": 16, "in_channels": 4, "out_channels": 4}
SMALL_CLIP = (4, 8, 8)
TEXT = 512
"""Tokens of the prompt; they are not split."""
PEAK = 3.0
"""Standard deviation of the logits of self-attention. With 1, that of random weights, attention over 75,600 tokens
would average all values to almost nothing, and the output would not show whether it is right."""
STRENGTH = 0.4
"""w/T of Enhance-A-Video."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """One run: one process, or one launch of several processes."""

    gpus: int
    precision: str
    """`bfloat16`, or `float32` with only two blocks, in which rounding hides no error of the splitting."""
    repeats: int
    """Number of timed passes with Enhance-A-Video, and of those without."""
    limit: float
    """Time limit in seconds, with the imports and the building of the model."""
    small: bool = False
    """Whether the model and the clip are tiny, to test the benchmark."""
    part: str = PART
    spread: str = "ddp"
    """The key of `LAUNCHES` with which the processes are started."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return f"{PART}-{self.precision}-{self.gpus}"

    @property
    def least(self) -> float:
        """Seconds that a call must have left to start the run."""
        return 0.6 * self.limit

    @property
    def config(self) -> dict[str, int]:
        """Config of the transformer."""
        if self.small:
            return SMALL
        return CONFIG if self.precision == "bfloat16" else {**CONFIG, "num_layers": 2}

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def splits_of(gpus: Sequence[int], *, small: bool) -> list[Split]:
    """Return the runs of the part, the most important ones first.

    Args:
        gpus: numbers of GPUs.
        small: return runs of a tiny model.
    """
    counts = sorted(set(gpus))
    common: dict[str, Any] = {"small": small, **({"limit": 60.0} if small else {})}
    times = [
        Split(
            **{
                "limit": 240.0,
                "gpus": count,
                "precision": "bfloat16",
                "repeats": 3,
                "spread": _spread(count),
                **common,
            }
        )
        for count in counts
    ]
    exact = [
        Split(**{"limit": 150.0, "gpus": count, "precision": "float32", "repeats": 1, **common})
        for count in counts
        if count > 1
    ]
    return times + exact


def _spread(count: int) -> str:
    return "ddp" if count > 1 else "one"


def measured(row: Split, place: torch.device) -> dict[str, Any]:
    """Run the passes of one process, and return its seconds, errors and peak memory.

    `seconds` and `seconds_off` are medians of forward passes with and without Enhance-A-Video. `relative_error` is
    |split - whole| / |whole| for all numbers of the output, `max_abs` the largest difference, `effect` the relative
    difference that Enhance-A-Video makes, and `gain_error` the largest difference of a gain. Memory is in GiB. Without
    splitting, the errors are None.
    """
    import torch

    import postgen
    from benchmarks.resident import forget_peak, peak_gpu_gib

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    transformer, inputs = model_of(row, place)
    forget_peak()  # the random weights were drawn in float32
    handle = postgen.apply_enhance_a_video(transformer, postgen.EnhanceAVideoConfig(relative_weight=STRENGTH))

    def call() -> Tensor:
        with torch.no_grad():
            out: Tensor = transformer(**inputs, return_dict=False)[0]
        return out

    found: dict[str, Any] = {"tokens": tokens_of(row), "relative_error": None, "max_abs": None, "gain_error": None}
    whole, alone, found["peak_whole_gb"] = call(), handle.stats(), peak_gpu_gib()
    if row.gpus > 1:
        split(transformer, row.gpus)
        forget_peak()
        parts = call()
        found |= {"relative_error": relative(parts, whole), "max_abs": float((parts - whole).float().abs().max())}
        found["gain_error"] = largest_gap(handle.stats(), alone)
    handle.disable()
    found["effect"] = relative(whole, call())
    times: dict[str, list[float]] = {"seconds": [], "seconds_off": []}
    for _ in range(row.repeats):  # a GPU that gets warm slows down, so the passes alternate
        handle.enable()
        times["seconds"].append(seconds_of(call, place, row.gpus))
        handle.disable()
        times["seconds_off"].append(seconds_of(call, place, row.gpus))
    return {**found, **{name: statistics.median(each) for name, each in times.items()}, "peak_gb": peak_gpu_gib()}


def model_of(row: Split, place: torch.device) -> tuple[Any, dict[str, Tensor]]:
    """Return the transformer with random weights and the inputs of a pass, the same in all processes."""
    import torch
    from diffusers import WanTransformer3DModel

    from benchmarks.fused_step import built

    dtype = torch.bfloat16 if row.precision == "bfloat16" else torch.float32
    torch.manual_seed(0)
    with torch.device(place):
        if dtype is torch.bfloat16:
            transformer = built(WanTransformer3DModel, row.config)
        else:
            transformer = WanTransformer3DModel(**row.config).eval()
    peaked(transformer)
    draws = torch.Generator().manual_seed(1)
    frames = SMALL_CLIP if row.small else CLIP
    latents = torch.randn(1, row.config.get("in_channels", 16), *frames, generator=draws)
    text = torch.randn(1, TEXT, row.config["text_dim"], generator=draws)
    inputs = {"hidden_states": latents, "encoder_hidden_states": text}
    moved = {name: value.to(place, dtype) for name, value in inputs.items()}
    return transformer, {**moved, "timestep": torch.tensor([500.0], device=place)}


def tokens_of(row: Split) -> int:
    """Return the tokens of the clip; a token is one frame and 2 x 2 places of the latents."""
    frames, height, width = SMALL_CLIP if row.small else CLIP
    return frames * (height // 2) * (width // 2)


def split(transformer: Any, count: int) -> None:
    """Split the tokens of a transformer over all processes, with diffusers' Ulysses attention."""
    import torch
    from diffusers import ContextParallelConfig

    # diffusers divides by the number of accelerators, which is 0 on a CPU.
    found = torch.accelerator.device_count()
    with patch.object(torch.accelerator, "device_count", lambda: max(1, found)):
        transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=count))


def peaked(transformer: Any) -> None:
    """Scale the norms and gates of random blocks, so that self-attention chooses few tokens and changes the output."""
    import torch

    with torch.no_grad():
        for block in transformer.blocks:
            block.attn1.norm_q.weight.mul_(PEAK**0.5)
            block.attn1.norm_k.weight.mul_(PEAK**0.5)
            block.scale_shift_table[:, 2].add_(1.0)  # the gate of self-attention


def largest_gap(found: Mapping[str, Sequence[float]], expected: Mapping[str, Sequence[float]]) -> float:
    """Return the largest difference of two sets of gains with the same layers."""
    pairs = [pair for name, gains in expected.items() for pair in zip(found[name], gains, strict=True)]
    return max(abs(one - other) for one, other in pairs)


def relative(found: Tensor, expected: Tensor) -> float:
    """Return |found - expected| / |expected| (Euclidean norms, in float64)."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def seconds_of(call: Callable[[], Any], place: torch.device, count: int) -> float:
    """Return the seconds of a call that all processes begin together."""
    import torch

    def wait() -> None:
        if place.type == "cuda":
            torch.cuda.synchronize()

    if count > 1:
        torch.distributed.barrier()
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began
