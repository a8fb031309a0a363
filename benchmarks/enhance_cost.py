"""What Enhance-A-Video costs at the shape of Wan 14B at 480p, 81 frames: 21 latent frames of 1560 tokens, 40 x 128.

Memory of the measurement anywhere (resident set on the CPU); time and peak of a whole block on a GPU. Weights
and inputs are random: costs do not depend on them.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
from collections.abc import Callable
from typing import Any

import torch

import postgen
from postgen.kernels.temporal_cfi.ops import temporal_self_share

FRAMES, PLACES, HEADS, CHANNELS = 21, 1560, 40, 128
MIB = 2**20


def extra_memory_mib(device: str) -> float:
    """MiB that the measurement of one layer takes beyond its queries and keys, in bfloat16."""
    if device == "cpu":
        # The resident set only ever grows, so a fresh process is asked.
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
    temporal_self_share(small, small)  # what libraries take once
    query, key = _queries_and_keys("cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    temporal_self_share(query, key)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def _queries_and_keys(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, FRAMES * PLACES, HEADS, CHANNELS)
    query, key = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
    return query.unflatten(1, (FRAMES, PLACES)), key.unflatten(1, (FRAMES, PLACES))


def layer_cost() -> dict[str, float]:
    """Milliseconds (median of 10) and peak MiB of one block of Wan 14B on a GPU, without and with."""
    from diffusers import WanTransformer3DModel

    with torch.device("cuda"):
        transformer = WanTransformer3DModel(num_layers=1, num_attention_heads=HEADS, attention_head_dim=CHANNELS)
        transformer = transformer.to(torch.bfloat16).eval()
        arguments = {
            "hidden_states": torch.randn(1, 16, FRAMES, 60, 104, dtype=torch.bfloat16),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.randn(1, 512, 4096, dtype=torch.bfloat16),
        }

    @torch.no_grad()
    def call() -> Any:
        return transformer(**arguments, return_dict=False)

    result = {}
    for name in ("without", "with"):
        if name == "with":
            postgen.apply_enhance_a_video(transformer)
        result[f"milliseconds_{name}"], result[f"peak_mib_{name}"] = _time_and_peak(call)
    result["overhead_percent"] = 100 * (result["milliseconds_with"] / result["milliseconds_without"] - 1)
    return result


def _time_and_peak(call: Callable[[], Any]) -> tuple[float, float]:
    for _ in range(3):
        call()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), torch.cuda.max_memory_allocated() / MIB


if __name__ == "__main__":
    print(f"{extra_memory_mib('cpu'):.0f} MiB")
