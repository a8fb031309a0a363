"""Seconds and memory of long videos, chunk by chunk, at the shapes of Wan 1.3B and 14B, with random weights.

`python -m benchmarks.worldweaver_speed` needs a GPU and writes `results/worldweaver_speed.json`, again after every
row; `--only` takes some models, `--device cpu` runs a tiny one and is there to try the benchmark.

All rows: 480 x 832, 6 steps, no guidance, bfloat16, random encodings of 512 tokens, torch's own attention, latents out
(`latent`), or decoded (`pt`), ours as they are made. Ours is K = 3 groups of F = 3 latent frames behind 4 + 2 of
memory, with depth, 50 chunks or more; the trend over chunks is of `postgen.metrics.drift.cost`, without those in which
the window fills. SkyReels-V2 with diffusion forcing (`ar_step=0`, windows of 97 frames, 17 of them history) and Helios
(33 frames a chunk) are diffusers' own calls of the same widths and depths, FramePack (33 frames a window) is as it is,
13B. They return everything at once, so their time is that of the call, for each latent frame that comes out. Weights
are random, and nothing is said about quality.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from benchmarks.gates import gate, write_result
from postgen.metrics.drift.cost import Flatness, flat_cost
from postgen.pipelines.worldweaver import WorldWeaverPipeline

Row = dict[str, Any]
STEPS, TOKENS = 6, 512
GROUPS, FRAMES = 3, 3
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
SIGLIP |= {"image_size": 384, "patch_size": 14}
"""The image encoder of FramePack."""
FILLING = GROUPS + 2
"""First chunks that are left out of the trend: the window fills, and the memory after it."""


class Model(NamedTuple):
    """A transformer of Wan's kind, and the clip that it makes."""

    name: str
    config: dict[str, Any]
    height: int = 480
    width: int = 832


MODELS = {
    "1.3b": Model("1.3b", {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960}),
    "14b": Model("14b", {"num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824}),
}
TINY = Model("tiny", {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 32}, 64, 64)


class Bench:
    """What all rows share.

    Args:
        model: widths and sizes.
        place: device.
        chunks: of ours.
    """

    def __init__(self, model: Model, place: str, chunks: int) -> None:
        self.model, self.place, self.chunks = model, torch.device(place), chunks
        self.tiny = model is TINY
        self.dtype = torch.float32 if self.tiny else torch.bfloat16
        config = {"z_dim": 16, **({"base_dim": 8} if self.tiny else {})}
        self.vae = self.built("AutoencoderKLWan", config, torch.float32)
        self.text = torch.randn(1, TOKENS, 64 if self.tiny else 4096, device=self.place, dtype=self.dtype)
        self.call = {
            "height": model.height,
            "width": model.width,
            "num_inference_steps": STEPS,
            "guidance_scale": 1.0,
            "prompt": None,
            "prompt_embeds": self.text,
        }

    def transformer(self, kind: str, **more: Any) -> Any:
        """Build a transformer of the model's widths."""
        return self.built(kind, {**self.model.config, "text_dim": self.text.shape[-1], **more}, self.dtype)

    def built(self, kind: str, config: dict[str, Any], dtype: torch.dtype) -> Any:
        """Build a part with random weights."""
        import diffusers

        torch.manual_seed(0)
        with torch.device(self.place):
            made = getattr(diffusers, kind)(**config)
        return made.to(dtype).eval().requires_grad_(False)

    def synchronized(self) -> float:
        """Return the time once all that was asked for is done."""
        if self.place.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak(self) -> int | None:
        """Return the most bytes since the last call; None on a CPU, where nobody counts them."""
        if self.place.type != "cuda":
            return None
        found = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return found


def ours(bench: Bench, output: str) -> Row:
    """Time the chunks of a stream without end."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    transformer = bench.transformer("WanTransformer3DModel")
    base = WanPipeline(None, None, bench.vae, scheduler, transformer)
    pipe: Any = WorldWeaverPipeline.from_pipe(base)
    pipe.level_embedder.to(bench.place)
    pipe.set_progress_bar_config(disable=True)
    words = {"causal_block_size": FRAMES, "ar_step": STEPS // GROUPS, "output_type": output}
    stream = pipe.stream(generator=torch.Generator().manual_seed(0), return_depth=True, **bench.call, **words)
    seconds, peaks, state = [], [], 0
    bench.peak()
    before = bench.synchronized()
    for chunk in itertools.islice(stream, bench.chunks):
        now = bench.synchronized()
        seconds.append(now - before)
        peaks.append(bench.peak())
        state = sum(each.nbytes for each in chunk.state.state_dict()["tensors"].values())
        before = bench.synchronized()
    settled = seconds[FILLING:]
    time_trend = flat_cost(seconds, skip=FILLING)
    row: Row = {
        "seconds_per_chunk": sum(settled) / len(settled),
        "seconds_per_latent": sum(settled) / len(settled) / FRAMES,
        "time_slope": _interval(time_trend),
        "time_flat": time_trend.flat,
        "state_bytes": state,
        "chunks": len(seconds),
    }
    if peaks[0] is not None:
        memory = flat_cost(peaks, skip=FILLING)
        row |= {"peak_bytes": max(peaks), "memory_slope": _interval(memory)}
        row["memory_flat"] = memory.flat
    return row


def _interval(trend: Flatness) -> list[float]:
    """Return the slope per chunk between the ends of its 95 % interval."""
    return [trend.slope.low, trend.slope.value, trend.slope.high]


def skyreels(bench: Bench, output: str) -> Row:
    """Time diffusion forcing of diffusers: two windows of 97 frames and more."""
    from diffusers import SkyReelsV2DiffusionForcingPipeline, UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    transformer = bench.transformer("SkyReelsV2Transformer3DModel")
    pipe: Any = SkyReelsV2DiffusionForcingPipeline(None, None, transformer, bench.vae, scheduler)
    base, overlap = (17, 5) if bench.tiny else (97, 17)
    frames = base + 2 * (base - overlap)
    words = {"num_frames": frames, "base_num_frames": base, "overlap_history": overlap, "addnoise_condition": 20}
    return _whole(bench, pipe, frames, ar_step=0, output_type=output, **words)


def helios(bench: Bench, output: str) -> Row:
    """Time Helios of diffusers: three chunks of nine latent frames."""
    from diffusers import HeliosPipeline, HeliosScheduler

    more: Row = {"rope_dim": (8, 8, 8)} if bench.tiny else {}
    transformer = bench.transformer("HeliosTransformer3DModel", **more)
    scheduler = HeliosScheduler(stages=1, stage_range=[0, 1], gamma=0.3)
    pipe: Any = HeliosPipeline(None, None, bench.vae, scheduler, transformer)
    return _whole(bench, pipe, 99, output_type=output)


def framepack(bench: Bench, output: str) -> Row:
    """Time FramePack of diffusers: three windows of nine latent frames. There is one size of it, 13B."""
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoFramepackPipeline
    from PIL import Image
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    if bench.model.name == "1.3b":
        return {"left_out": "FramePack has one size, that of the row 14b"}
    sizes = {"hidden_size": 8, "intermediate_size": 8, "image_size": 8, "patch_size": 4, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    siglip = SiglipVisionConfig(**(sizes if bench.tiny else SIGLIP))
    encoder = SiglipVisionModel(siglip).to(bench.place, bench.dtype).eval()
    config: Row = {"has_image_proj": True, "image_proj_dim": siglip.hidden_size, "has_clean_x_embedder": True}
    vae: Row = {}
    if bench.tiny:
        config |= {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 24}
        config |= {"rope_axes_dim": (8, 8, 8), "text_embed_dim": 64, "num_refiner_layers": 1}
        vae = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}
    processor = SiglipImageProcessor(size={"height": siglip.image_size, "width": siglip.image_size})
    pipe: Any = HunyuanVideoFramepackPipeline(
        None,
        None,
        bench.built("HunyuanVideoFramepackTransformer3DModel", config, bench.dtype),
        bench.built("AutoencoderKLHunyuanVideo", vae, torch.float16 if bench.place.type == "cuda" else torch.float32),
        FlowMatchEulerDiscreteScheduler(shift=7.0),
        None,
        None,
        encoder,
        processor,
    )
    picture = Image.new("RGB", (bench.model.width, bench.model.height), (90, 90, 90))
    told = {
        "image": picture,
        "prompt_embeds": bench.text[:, :256],
        "pooled_prompt_embeds": bench.text[:, 0, :1].expand(-1, 768),
        "prompt_attention_mask": torch.ones(1, 256, dtype=torch.bool, device=bench.place),
    }
    return _whole(bench, pipe, 99, sampling_type="vanilla", output_type=output, **told)


def _whole(bench: Bench, pipe: Any, frames: int, **words: Any) -> Row:
    """Time a call that returns everything at once, after one step that is not timed."""
    pipe.set_progress_bar_config(disable=True)
    call = {**bench.call, "num_frames": frames, **words}
    pipe(**{**call, "num_inference_steps": 2}, generator=torch.Generator().manual_seed(0))
    bench.peak()
    before = bench.synchronized()
    made = pipe(**call, generator=torch.Generator().manual_seed(0)).frames
    seconds, peak = bench.synchronized() - before, bench.peak()
    # FramePack gives its latents once for each window, always from the first on.
    latents = (made[-1] if isinstance(made, list) else made).shape[2]
    if words["output_type"] != "latent":
        latents = (made.shape[1] - 1) // 4 + 1
    row: Row = {"seconds_per_latent": seconds / latents, "latents": latents, "seconds": seconds}
    return row if peak is None else row | {"peak_bytes": peak}


SYSTEMS: dict[str, Callable[[Bench, str], Row]] = {
    "worldweaver": ours,
    "skyreels_v2": skyreels,
    "helios": helios,
    "framepack": framepack,
}


def rows(models: list[Model], place: str, chunks: int) -> Iterator[Row]:
    """Yield a row for each model, system and output; what does not fit into memory says so."""
    for model in models:
        bench = Bench(model, place, chunks)
        for (name, system), output in itertools.product(SYSTEMS.items(), ("latent", "pt")):
            row: Row = {"model": model.name, "system": name, "output": output}
            try:
                with torch.no_grad():
                    row |= system(bench, output)
            except torch.OutOfMemoryError:
                row["error"] = "out of memory"
            yield row
            gc.collect()
            if bench.place.type == "cuda":
                torch.cuda.empty_cache()


def gates(found: list[Row]) -> list[Row]:
    """Return the gates of the rows that there are: latents of 1.3B, as they come out of the network."""
    latent = {row["system"]: row for row in found if row["model"] == "1.3b" and row["output"] == "latent"}
    own, other = latent.get("worldweaver", {}), latent.get("skyreels_v2", {})
    times = [row.get("seconds_per_latent") for row in (own, other)]
    ratio = None if None in times else times[0] / times[1]
    return [
        gate("time_per_latent_vs_skyreels", ratio, "<=", 1.1),
        gate("time_slope_is_zero", None if "time_flat" not in own else float(own["time_flat"]), "==", 1),
        gate("memory_slope_is_zero", None if "memory_flat" not in own else float(own["memory_flat"]), "==", 1),
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--chunks", type=int, default=56)
    parser.add_argument("-o", "--output", default="worldweaver_speed")
    options = parser.parse_args(argv)
    models = [TINY] if options.device == "cpu" else [MODELS[name] for name in options.only]
    found: list[Row] = []
    for row in rows(models, options.device, options.chunks):
        print(row, flush=True)
        found.append(row)
        write_result(options.output, {"rows": found, "gates": gates(found)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
