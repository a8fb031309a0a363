"""The format of requests and responses: clips are sent as one safetensors file, scores return as a small JSON object.

Neither contains a file name or a pickle. Tensors of the file: `request`, uint8, a JSON object {"prompts": [...],
"fps": number or null, "columns": {...}}; `clip.N` for each clip, (F,3,H,W) uint8 (255 is 1.0) or float32;
`column.NAME.N` for each value of a tensor column.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from postgen.rewards.batches import RESERVED

MEDIA_TYPE = "application/x-safetensors"
MOST_FPS = 10_000
# Values up to this far outside [0, 1] are rounding errors; values beyond indicate that the clip was not scaled.
_SLACK = 0.05


class WireError(ValueError):
    """A request or a response that does not have the expected format."""


def pack(
    prompts: Sequence[str],
    completions: Sequence[Tensor],
    *,
    fps: float | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    exact: bool = False,
) -> bytes:
    """Encode a request; clips are rounded to 8 bits unless `exact` is set.

    Raises:
        WireError: a column has values that are neither tensors nor JSON (objects with `to_dict` count as JSON), or a
            clip has values that are not finite.
    """
    tensors = {f"clip.{row}": _pixels(clip, exact) for row, clip in enumerate(completions)}
    plain: dict[str, Any] = {}
    for name, values in (columns or {}).items():
        if len(values) and all(isinstance(value, Tensor) for value in values):
            tensors |= {f"column.{name}.{row}": v.detach().cpu().contiguous() for row, v in enumerate(values)}
        else:
            plain[name] = list(values)
    try:
        text = json.dumps({"prompts": list(prompts), "fps": fps, "columns": plain}, default=_plain)
    except (TypeError, ValueError) as error:
        raise WireError(f"a column cannot be sent: {error}") from error
    tensors["request"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return save(tensors)


def unpack(data: bytes) -> dict[str, Any]:
    """Decode a request into the arguments of a reward function: prompts, completions, fps and the columns.

    Raises:
        WireError: the data was not written by `pack`.
    """
    try:
        tensors = load(data)
        asked = json.loads(tensors.pop("request").numpy().tobytes())
        prompts, fps, columns = asked["prompts"], asked["fps"], dict(asked["columns"])
        if not isinstance(prompts, list):
            raise TypeError(f"prompts must be a list of texts, got {str(prompts)[:40]!r}")
        clips = [_clip(tensors.pop(f"clip.{row}")) for row in range(len(prompts))]
        for name in {key.removeprefix("column.").rpartition(".")[0] for key in tensors}:
            columns[name] = [tensors.pop(f"column.{name}.{row}") for row in range(len(prompts))]
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise WireError(f"not a request for scores: {error}") from error
    uneven = [name for name, values in columns.items() if not isinstance(values, list) or len(values) != len(prompts)]
    if taken := sorted(RESERVED & columns.keys()):
        raise WireError(f"no column can be named {taken[0]!r}: it is an argument of its own")
    if uneven or not all(isinstance(prompt, str) for prompt in prompts):
        raise WireError(f"prompts must be texts and columns have one value a prompt: {', '.join(uneven) or 'prompts'}")
    if fps is not None and (not isinstance(fps, int | float) or fps is True or not 0 < fps <= MOST_FPS):
        raise WireError(f"fps must be null or a number above 0, at most {MOST_FPS}, got {str(fps)[:40]}")
    return {**columns, "prompts": prompts, "completions": clips, "fps": fps}


def read_scores(data: bytes, count: int) -> list[float | None]:
    """Decode the scores of a response.

    Raises:
        WireError: not JSON, a wrong number of scores, or a value that is neither a number nor null.
    """
    try:
        scores = json.loads(data)["scores"]
    except (ValueError, KeyError, TypeError) as error:
        raise WireError(f"the answer holds no scores: {data[:80]!r}") from error
    if not isinstance(scores, list) or len(scores) != count:
        raise WireError(f"{len(scores) if isinstance(scores, list) else 'no list of'} scores for {count} clips")
    if not all(s is None or (isinstance(s, int | float) and not isinstance(s, bool)) for s in scores):
        raise WireError(f"scores must be numbers or null: {str(scores)[:80]}")
    return [None if s is None or not math.isfinite(s) else float(s) for s in scores]


def _pixels(clip: Tensor, exact: bool) -> Tensor:
    clip = clip.detach().cpu().float()
    if not bool(clip.isfinite().all()):
        raise WireError("a clip holds values that are no finite numbers (NaN or infinity)")
    return (clip if exact else (clip.clamp(0, 1) * 255).round().byte()).contiguous()


def _clip(pixels: Tensor) -> Tensor:
    if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.dtype not in (torch.uint8, torch.float32):
        raise WireError(f"a clip must be (F,3,H,W) uint8 or float32, got {tuple(pixels.shape)} {pixels.dtype}")
    if not pixels.numel():
        raise WireError(f"a clip must have pixels, got {tuple(pixels.shape)}")
    if pixels.dtype == torch.uint8:
        return pixels.float().div_(255)
    low, high = (float(end) for end in pixels.aminmax())
    if not (low >= -_SLACK and high <= 1 + _SLACK):  # NaN, which compares false with everything, is refused too
        raise WireError(f"the values of a clip must lie in [0,1], got [{low:.3g}, {high:.3g}]")
    return pixels


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Tensor):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is neither JSON nor a tensor")
