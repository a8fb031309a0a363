"""The cost of Enhance-A-Video at the shapes of Wan 14B with 81 frames.

At 480p these are 21 latent frames of 1560 tokens and 40 heads of 128 channels. The memory of the measurement is
determined on any device (on a CPU by the resident set), the time and the peak memory of a model with one block on a
GPU, at 480p or 720p. Weights and inputs are random, because costs do not depend on them.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable
from typing import Any

import torch

import postgen
from benchmarks.resident import peak_resident_mib
from postgen.kernels.temporal_cfi.ops import temporal_self_share

FRAMES, PLACES, HEADS, CHANNELS = 21, 1560, 40, 128
MIB = 2**20
WARM_UP, TURNS = 3, 20


def extra_memory_mib(device: str) -> float:
    """Return the memory of the measurement of one layer in MiB, without its bfloat16 queries and keys."""
    if device == "cpu":
        # The peak of the resident set never decreases, so a new process measures it.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(_resident_growth_mib)
    query, key = _queries_and_keys(device)
    temporal_self_share(query, key)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    temporal_self_share(query, key)
    return (torch.cuda.max_memory_allocated() - before) / MIB


def _resident_growth_mib() -> float:
    torch.set_num_threads(1)
    small = torch.randn(1, FRAMES, 4, HEADS, CHANNELS, dtype=torch.bfloat16)
    temporal_self_share(small, small)  # libraries allocate memory in the first call
    query, key = _queries_and_keys("cpu")
    before = peak_resident_mib()
    temporal_self_share(query, key)
    return peak_resident_mib() - before


def _queries_and_keys(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, FRAMES * PLACES, HEADS, CHANNELS)
    query, key = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
    return query.unflatten(1, (FRAMES, PLACES)), key.unflatten(1, (FRAMES, PLACES))


def layer_cost(height: int = 480, width: int = 832) -> dict[str, float]:
    """Return milliseconds and peak MiB of one block of Wan 14B on a GPU, without and with Enhance-A-Video.

    Without, the plug-in is disabled, which leaves no work on the GPU. Calls without and with alternate, because a GPU
    that gets warm slows down by more than the overhead. Times are medians, and the overhead is the median difference
    of consecutive calls.
    """
    from diffusers import WanTransformer3DModel

    with torch.device("cuda"):
        transformer = WanTransformer3DModel(num_layers=1, num_attention_heads=HEADS, attention_head_dim=CHANNELS)
        transformer = transformer.to(torch.bfloat16).eval()
        arguments = {
            "hidden_states": torch.randn(1, 16, FRAMES, height // 8, width // 8, dtype=torch.bfloat16),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.randn(1, 512, 4096, dtype=torch.bfloat16),
        }
    handle = postgen.apply_enhance_a_video(transformer)
    times: dict[str, list[float]] = {"without": [], "with": []}
    peaks: dict[str, float] = {}
    for turn in range(WARM_UP + TURNS):
        for name, found in times.items():
            handle.enable() if name == "with" else handle.disable()
            milliseconds, peaks[name] = _time_and_peak(lambda: transformer(**arguments, return_dict=False))
            if turn >= WARM_UP:
                found.append(milliseconds)
    result = {f"milliseconds_{name}": statistics.median(found) for name, found in times.items()}
    result |= {f"peak_mib_{name}": peak for name, peak in peaks.items()}
    pairs = zip(times["with"], times["without"], strict=True)
    overhead = statistics.median(more - less for more, less in pairs) / result["milliseconds_without"]
    return result | {"overhead_percent": 100 * overhead}


@torch.no_grad()
def _time_and_peak(call: Callable[[], Any]) -> tuple[float, float]:
    torch.cuda.reset_peak_memory_stats()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end), torch.cuda.max_memory_allocated() / MIB


if __name__ == "__main__":
    print(f"{extra_memory_mib('cpu'):.0f} MiB")
