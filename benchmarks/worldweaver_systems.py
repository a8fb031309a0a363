"""Time long videos with random weights: WorldWeaver and three systems of diffusers, for `worldweaver_speed`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from postgen.compat import kept_in_float32
from postgen.metrics.drift.cost import Flatness, flat_cost
from postgen.pipelines.worldweaver import WorldWeaverPipeline
from postgen.worldweaver.memory import CAPACITY

Row = dict[str, Any]
STEPS, TOKENS = 6, 512
GROUPS, FRAMES = 3, 3
FILLING = GROUPS + 2
"""Number of first chunks in which the window fills."""
KEPT = -(-CAPACITY // FRAMES) + GROUPS
"""Number of first chunks in which the memory bank fills. Trends ignore these chunks and those of the window."""
MATRIX, ATTENTION = 500e12, 560e12
"""FLOP/s that an H200 reached at these shapes, to estimate the shortest time of a forward pass."""


class Model(NamedTuple):
    """A transformer of Wan's architecture, and the size of its clip."""

    name: str
    config: dict[str, Any]
    windows: int = 1
    """Number of windows that the systems of diffusers run; all windows cost the same."""
    height: int = 480
    width: int = 832


MODELS = {
    "1.3b": Model(
        "1.3b", {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960}, 2
    ),
    "14b": Model("14b", {"num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824}),
}
TINY = Model("tiny", {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 32}, 2, 64, 64)


class Bench:
    """Common settings of all rows of a model.

    Args:
        model: widths and sizes.
        place: device.
        chunks: number of WorldWeaver chunks.
        profile: whether to profile one forward pass of WorldWeaver.
    """

    def __init__(self, model: Model, place: str, chunks: int, profile: bool = False) -> None:
        self.model, self.place, self.chunks, self.profile = model, torch.device(place), chunks, profile
        self.tiny = model.name == TINY.name
        self.text = torch.randn(1, TOKENS, 64 if self.tiny else 4096, device=self.place, dtype=torch.bfloat16)
        self.call = {
            "height": model.height,
            "width": model.width,
            "num_inference_steps": STEPS,
            "guidance_scale": 1.0,
            "prompt": None,
            "prompt_embeds": self.text,
        }
        side = 64 if self.tiny else 8192
        self._matrix = torch.randn(side, side, device=self.place, dtype=torch.bfloat16)

    def transformer(self, kind: str, **more: Any) -> Any:
        """Build a transformer with the widths of the model."""
        return self.built(kind, {**self.model.config, "text_dim": self.text.shape[-1], **more})

    def vae(self, whole: bool = False) -> Any:
        """Build Wan's autoencoder in float32; a thin one for rows that do not time decoding."""
        thin = self.tiny or not whole
        return self.built("AutoencoderKLWan", {"z_dim": 16, **({"base_dim": 8} if thin else {})}, torch.float32)

    def built(self, kind: str, config: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> Any:
        """Build a component with random weights on the device, with the dtypes that `from_pretrained` would set."""
        import diffusers

        torch.manual_seed(0)
        with torch.device(self.place):
            made = getattr(diffusers, kind)(**config)
        wide = kept_in_float32(made)
        for name, value in itertools.chain(made.named_parameters(), made.named_buffers()):
            if value.is_floating_point() and not any(part in name.split(".") for part in wide):
                value.data = value.data.to(dtype)
        return made.eval().requires_grad_(False)

    def synchronized(self) -> float:
        """Return the current time after all queued work of the device is complete."""
        if self.place.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak(self) -> int | None:
        """Return the peak memory in bytes since the last call; None on a CPU, which has no allocator statistics."""
        if self.place.type != "cuda":
            return None
        found = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return found

    def yardstick(self) -> float:
        """Return the time of fixed matrix products in seconds, which shows the current speed of the device."""
        before = self.synchronized()
        for _ in range(30):
            torch.mm(self._matrix, self._matrix)
        return self.synchronized() - before


class Watch:
    """Times every forward pass of a network, and counts what one selected forward pass computes."""

    def __init__(self, bench: Bench, network: Any) -> None:
        self.bench, self.network = bench, network
        self.starts: list[float] = []
        self.stops: list[float] = []
        self.found: Row = {}
        network.register_forward_pre_hook(lambda *_: self.starts.append(bench.synchronized()))
        network.register_forward_hook(lambda *_: self.stops.append(bench.synchronized()))

    def look(self, profile: bool = False) -> None:
        """Count the operations of the next forward pass; that pass takes longer."""
        forward = self.network.forward

        def counted(*args: Any, **words: Any) -> Any:
            del self.network.forward
            with _profiled(self.found) if profile else FlopCounterMode(display=False) as seen:
                out = forward(*args, **words)
            if not profile:
                self.found |= _computed(seen.get_flop_counts()["Global"])
            return out

        self.network.forward = counted


class _profiled:
    """Context manager that records the kernels with the longest times, in milliseconds."""

    def __init__(self, into: Row) -> None:
        self.into = into

    def __enter__(self) -> _profiled:
        activities = torch.profiler.ProfilerActivity
        self.run = torch.profiler.profile(activities=[activities.CPU, activities.CUDA])
        self.run.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.run.__exit__(*failure)
        times = [(each.key[:100], each.self_device_time_total / 1000) for each in self.run.key_averages()]
        times = sorted((each for each in times if each[1]), key=lambda each: -each[1])
        self.into["kernels_ms"] = dict(times[:25])


def _computed(flops: dict[Any, int]) -> Row:
    """Return the FLOPs of a forward pass, its attention kernel, and its shortest expected time in seconds."""
    attention = {str(op): count for op, count in flops.items() if "attention" in str(op)}
    whole, attended = sum(flops.values()), sum(attention.values())
    return {
        "teraflops_per_call": whole / 1e12,
        "attention_share": attended / whole,
        "attention": sorted(attention, key=lambda name: -attention[name])[:1],
        "expected_seconds_per_call": (whole - attended) / MATRIX + attended / ATTENTION,
    }


def ours(bench: Bench, *, decoded: bool = False) -> Row:
    """Time the chunks of a WorldWeaver stream without end."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    scheduler, network = FlowMatchEulerDiscreteScheduler(shift=5.0), bench.transformer("WanTransformer3DModel")
    pipe: Any = WorldWeaverPipeline.from_pipe(WanPipeline(None, None, bench.vae(decoded), scheduler, network))
    pipe.set_progress_bar_config(disable=True)
    words = {"causal_block_size": FRAMES, "ar_step": STEPS // GROUPS, "output_type": "pt" if decoded else "latent"}
    stream = pipe.stream(generator=torch.Generator().manual_seed(0), return_depth=True, **bench.call, **words)
    watch, count = Watch(bench, network), 2 * FILLING if decoded else bench.chunks
    # Time every chunk of the stream; profile one forward pass with a full window.
    seconds: list[float] = []
    peaks: list[int | None] = []
    yards: list[float] = []
    inside: list[float] = []
    for number in range(count):
        if number in (2, 3):  # chunks with a full window
            watch.look(profile=number == 3 and bench.profile)
        bench.peak()
        calls, before = len(watch.starts), bench.synchronized()
        chunk = next(stream)
        seconds.append(bench.synchronized() - before)
        peaks.append(bench.peak())
        inside.append(sum(watch.stops[calls:]) - sum(watch.starts[calls:]))
        yards.append(bench.yardstick())
    sizes = [each.nbytes for each in chunk.state.state_dict()["tensors"].values()]
    stream.close()
    row: Row = {
        "chunks": count,
        "seconds_per_chunk": _mean(seconds[FILLING:]),
        "seconds_per_latent": _mean(seconds[FILLING:]) / FRAMES,
        "network_seconds_per_latent": _mean(inside[FILLING:]) / FRAMES,
        "calls_per_latent": STEPS / GROUPS / FRAMES,
        "state_bytes": sum(sizes),
        **watch.found,
    }
    if peaks[0] is not None:
        row["peak_bytes"] = max(peaks)
    return row if decoded else row | _trends(seconds, yards, peaks)


def _trends(seconds: list[float], yards: list[float], peaks: list[Any]) -> Row:
    """Return the trends over chunks once window and memory are full."""
    # A GPU gets slower as it warms up, so times are divided by those of the fixed matrix products.
    of_yard = [each / yard for each, yard in zip(seconds, yards, strict=True)]
    skip = KEPT if len(seconds) >= KEPT + 16 else FILLING
    row = {"settled_chunks": len(seconds) - skip, "seconds": seconds, "yardstick_seconds": yards}
    row |= _trend("time", flat_cost(of_yard, skip=skip)) | _trend("raw_time", flat_cost(seconds, skip=skip))
    return row if peaks[0] is None else row | _trend("memory", flat_cost(peaks, skip=skip)) | {"peaks": peaks}


def _trend(name: str, found: Flatness) -> Row:
    slope, growth = found.slope, found.growth
    return {
        f"{name}_slope": [slope.low, slope.value, slope.high],
        f"{name}_growth": [growth.low, growth.value, growth.high],
        f"{name}_flat": found.flat,
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def skyreels(bench: Bench, window: tuple[int, int] = (97, 17)) -> Row:
    """Time diffusion forcing in diffusers; `window` is (frames of a window, frames of history)."""
    from diffusers import SkyReelsV2DiffusionForcingPipeline, UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    transformer = bench.transformer("SkyReelsV2Transformer3DModel")
    pipe: Any = SkyReelsV2DiffusionForcingPipeline(None, None, transformer, bench.vae(), scheduler)
    base, overlap = (17, 5) if bench.tiny else window
    frames = base + (bench.model.windows - 1) * (base - overlap)
    new = (base - overlap) // 4
    words = {"base_num_frames": base, "overlap_history": overlap, "addnoise_condition": 20, "ar_step": 0}
    return _windows(bench, pipe, frames, new, **words)


def skyreels_same_window(bench: Bench) -> Row:
    """Time diffusion forcing with the window of WorldWeaver: 15 latent frames, 6 of them memory."""
    return skyreels(bench, (57, 21))


def helios(bench: Bench) -> Row:
    """Time Helios in diffusers: nine latent frames per chunk."""
    from diffusers import HeliosPipeline, HeliosScheduler

    more: Row = {"rope_dim": (8, 8, 8)} if bench.tiny else {}
    transformer = bench.transformer("HeliosTransformer3DModel", **more)
    scheduler = HeliosScheduler(stages=1, stage_range=[0, 1], gamma=0.3)
    pipe: Any = HeliosPipeline(None, None, bench.vae(), scheduler, transformer)
    return _windows(bench, pipe, 33 * bench.model.windows, 9)


def framepack(bench: Bench) -> Row:
    """Time FramePack in diffusers: nine latent frames per window. It exists in a single size, 13B."""
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoFramepackPipeline
    from PIL import Image

    wide = 8 if bench.tiny else 1152
    config: Row = {"has_image_proj": True, "image_proj_dim": wide, "has_clean_x_embedder": True}
    if bench.tiny:
        config |= {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 24}
        config |= {"rope_axes_dim": (8, 8, 8), "text_embed_dim": 64, "num_refiner_layers": 1}
    thin = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}
    network = bench.built("HunyuanVideoFramepackTransformer3DModel", config)
    vae = bench.built("AutoencoderKLHunyuanVideo", thin, torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    # The encoding of the picture is random too, with as many tokens as the image encoder returns.
    picture = torch.randn(1, 729, wide, device=bench.place, dtype=torch.bfloat16)
    pipe: Any = HunyuanVideoFramepackPipeline(None, None, network, vae, scheduler, None, None, None, None)
    pipe.encode_image = lambda image, device: picture
    told = {
        "image": Image.new("RGB", (bench.model.width, bench.model.height), (90, 90, 90)),
        "prompt_embeds": bench.text[:, :256],
        "pooled_prompt_embeds": bench.text[:, 0, :1].expand(-1, 768),
        "prompt_attention_mask": torch.ones(1, 256, dtype=torch.bool, device=bench.place),
    }
    return _windows(bench, pipe, 33 * bench.model.windows, 9, sampling_type="vanilla", **told)


def _windows(bench: Bench, pipe: Any, frames: int, new: int, **words: Any) -> Row:
    """Time a call that returns the whole video at once, from the steps of its windows. The first step is warm-up.

    All windows have the same shapes, so the time of a window is `STEPS` times the mean step.

    Args:
        bench: device and sizes.
        pipe: the pipeline.
        frames: number of frames of the video.
        new: number of latent frames that a window adds to a long video.
        words: further arguments of the call.
    """
    pipe.set_progress_bar_config(disable=True)
    watch = Watch(bench, pipe.transformer)
    watch.look()
    second: list[float] = []
    pipe.transformer.register_forward_hook(lambda *_: second.append(bench.peak() or 0))
    call = {**bench.call, "num_frames": frames, "output_type": "latent", **words}
    pipe(**call, generator=torch.Generator().manual_seed(0))
    calls = len(watch.starts)
    if calls != STEPS * bench.model.windows:
        raise RuntimeError(f"got {calls} forward passes, expected {STEPS * bench.model.windows}")
    # Some systems decode between two windows.
    step = _mean([watch.starts[n + 1] - watch.starts[n] for n in range(1, calls - 1) if (n + 1) % STEPS])
    inside = _mean([stop - start for start, stop in zip(watch.starts[1:], watch.stops[1:], strict=True)])
    row: Row = {
        "windows": bench.model.windows,
        "new_latents_per_window": new,
        "seconds_per_window": STEPS * step,
        "seconds_per_latent": STEPS * step / new,
        "network_seconds_per_latent": STEPS * inside / new,
        "calls_per_latent": STEPS / new,
        **watch.found,
    }
    return row if bench.place.type == "cpu" else row | {"peak_bytes": max(second[1:])}


SYSTEMS: dict[str, Callable[[Bench], Row]] = {
    "worldweaver": ours,
    "skyreels_v2": skyreels,
    "skyreels_v2_same_window": skyreels_same_window,
    "helios": helios,
    "framepack": framepack,
    "worldweaver_decoded": lambda bench: ours(bench, decoded=True),
}
