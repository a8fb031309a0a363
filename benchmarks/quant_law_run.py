"""The runs of `python -m benchmarks.quant_law`: a job trains one size for one budget, exact and with each group."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.embedded_sampling import load
from benchmarks.gates import device
from benchmarks.quant_measure import write_row
from postgen import world
from postgen.assets import model_folder
from postgen.families import denoiser_for
from postgen.families.linear import find_linears
from postgen.files import replacing
from postgen.info import versions
from postgen.quant import QuantSpec
from postgen.quant.fake import FakeQuantLinear
from postgen.quant.layers import layers_of
from postgen.tensor_files import read_tensors
from postgen.training import checkpoint, rng
from postgen.training.checkpoint_head import DamagedCheckpoint
from postgen.training.logging import Averages
from postgen.training.run_state import RunState
from postgen.training.stop import Signals
from postgen.world.scenes import FIRST_TRAINING_SEED, draw_scenes

SIZES = ((128, 2), (256, 3), (384, 4))
"""Width and number of blocks of each network."""
STEPS = (500, 1000, 2000)
"""Training steps of each budget."""
GROUPS = (16, 32, 128)
"""Numbers that share a scale, in weights and in inputs."""
BATCH, TEXT = 64, 32
"""Clips per step, and tokens of a text."""
PIXELS, FRAMES = 64, 17
CLIPS, VALID, LEVELS = 4096, 256, 4
"""Clips for training and for validation; noise levels of each validation clip."""
FIRST = FIRST_TRAINING_SEED + 97_000_000
"""First scene."""
RATE, LAST, WARM, CLIP = 1e-3, 0.1, 0.05, 1.0
"""Peak learning rate, its last share of the peak, the share of steps of the warm-up, and the largest gradient norm."""
SEED = 0
SAVE_SECONDS = 30.0
"""Seconds between two checkpoints of a run, so that a killed call loses little."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One training run; `group` 0 is the exact twin."""

    size: int
    """Index of the network in `SIZES`."""
    budget: int
    """Index of the budget in `STEPS`."""
    group: int

    @property
    def name(self) -> str:
        """Name of the run, WIDTHxBLOCKS.BUDGET.GROUP."""
        width, blocks = SIZES[self.size]
        return f"{width}x{blocks}.{self.budget}.{self.group or 'exact'}"

    @property
    def held_out(self) -> bool:
        """Whether the law is not fitted to the run: 8 runs that have all sizes, budgets and groups equally often."""
        places = self.size, self.budget, GROUPS.index(self.group)
        return sum(places) % 3 == 0 and any(places)


def runs_of(size: int, budget: int) -> list[Run]:
    """Return the exact run of a size and budget, and the quantised ones."""
    return [Run(size=size, budget=budget, group=group) for group in (0, *GROUPS)]


def write_data(path: Path, where: str, clips: int) -> None:
    """Encode clips of the world and their captions with the embedded model; the last `VALID` are for validation."""
    pipe = load(model_folder("embedded"), where)
    denoiser, latents, texts = denoiser_for(pipe), [], []
    scenes = draw_scenes(FIRST, clips, FRAMES, bodies=(0.5, 0.5, 0.0))
    with torch.no_grad():
        for low in range(0, clips, 64):
            part = [scene.spec for scene in scenes[low : low + 64]]
            shown = world.render(part, num_frames=FRAMES, size=PIXELS, geometry=False, device=where)
            latents.append(denoiser.encode_video(shown.rgb_BF3HW).float().cpu())
            told = denoiser.encode_prompt([world.simple_caption(spec) for spec in part], guidance=False)
            texts.append(told["prompt"][:, :TEXT].float().cpu())
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part_file:
        save_file({"latents": torch.cat(latents), "text": torch.cat(texts)}, part_file)


def network(size: int) -> Any:
    """Return a network with random weights, the same in every call."""
    from diffusers import WanTransformer3DModel

    width, blocks = SIZES[size]
    torch.manual_seed(SEED)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=width // 64,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        text_dim=192,
        freq_dim=256,
        ffn_dim=4 * width,
        num_layers=blocks,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )


def quantize_(model: nn.Module, group: int) -> None:
    """Replace the layers of the default policy by layers that train with weights and inputs in 4 bits."""
    spec = QuantSpec(weight=f"int4:g{group}", act=f"int4:g{group}")
    linears = find_linears(model)
    for name, each in layers_of(model, spec).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, FakeQuantLinear(linears[name], each, name=name))


def loss_of(model: Any, latents: Tensor, text: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return the squared error of the velocity of each row, (B,)."""
    level = sigma.view(-1, 1, 1, 1, 1)
    (found,) = model((1 - level) * latents + level * noise, 1000 * sigma, text, return_dict=False)
    return functional.mse_loss(found, noise - latents, reduction="none").flatten(1).mean(1)


@torch.no_grad()
def validation(model: Any, latents: Tensor, text: Tensor) -> float:
    """Return the mean loss on the fixed list of validation points: every clip at `LEVELS` noise levels."""
    draws = torch.Generator().manual_seed(SEED + 1)
    total = 0.0
    for level in range(LEVELS):
        noise = torch.randn(latents.shape, generator=draws).to(latents.device)
        sigma = ((level + torch.rand(len(latents), generator=draws)) / LEVELS).to(latents.device)
        parts = [part.split(64) for part in (latents, text, noise, sigma)]
        total += sum(float(loss_of(model, *each).double().sum()) for each in zip(*parts, strict=True))
    return total / (LEVELS * len(latents))


def draws_of(count: int, shape: Sequence[int], batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the clips, the noise and the noise levels of each step, the same for all runs."""
    draws = torch.Generator().manual_seed(SEED + 2)
    while True:
        rows = torch.randint(count, (batch,), generator=draws)
        yield rows, torch.randn(batch, *shape, generator=draws), torch.rand(batch, generator=draws)


def parts_of(model: nn.Module, steps: int) -> RunState:
    """Return a network with its optimiser and the schedule of its learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    warm = max(1, round(WARM * steps))

    def share(step: int) -> float:
        along = (step - warm) / max(1, steps - warm)
        return (step + 1) / warm if step < warm else LAST + (1 - LAST) * (1 + math.cos(math.pi * along)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    return RunState(modules={"network": model}, optimizer=optimizer, scheduler=schedule, ema=None)


def train(model: Any, latents: Tensor, text: Tensor, steps: int, batch: int, place: Path) -> float:
    """Train a network by flow matching.

    Args:
        model: the network.
        latents: (N, C, T, H, W) clips.
        text: (N, L, D) their texts.
        steps: optimiser steps of the whole run.
        batch: clips per step.
        place: folder for checkpoints: one is written every `SAVE_SECONDS`, and when a signal ends the run.

    Returns:
        The seconds of all calls that trained the run.

    Raises:
        SystemExit: a signal ended the run.
    """
    parts, rounds = parts_of(model, steps), draws_of(len(latents), latents.shape[1:], batch)
    config = {"steps": steps, "batch": batch}
    begun, earlier = _resumed(parts, place, config)
    for _ in range(begun):  # the draws of the first call
        next(rounds)
    start = saved = time.monotonic()
    with Signals() as stop:
        for step in range(begun + 1, steps + 1):
            rows, noise, sigma = (each.to(latents.device, non_blocking=True) for each in next(rounds))
            loss_of(model, latents[rows], text[rows], noise, sigma).mean().backward()
            nn.utils.clip_grad_norm_(parts.parameters, CLIP)
            parts.optimizer.step()
            parts.optimizer.zero_grad(set_to_none=True)
            parts.scheduler.step()
            if step < steps and (stop.received or time.monotonic() - saved > SAVE_SECONDS):
                saved = time.monotonic()
                meta = {"config": config, "seconds": earlier + saved - start}
                checkpoint.write(place, parts.snapshot(step, [_own_state(latents.device)], meta, keep=True))
                checkpoint.prune(place, 1)
            if step < steps and stop.received:
                raise SystemExit(f"{place.name} was interrupted: run the command again to continue")
    return earlier + time.monotonic() - start


def _own_state(device: torch.device) -> dict[str, Any]:
    """Return what checkpoints hold of each process. The draws of a run are made again, not restored."""
    states = rng.capture(torch.Generator(device))
    return {"averages": Averages().state(), **{f"rng.{name}": value for name, value in states.items()}}


def _resumed(parts: RunState, place: Path, config: Mapping[str, Any]) -> tuple[int, float]:
    """Restore the newest intact checkpoint with these settings; return its step and seconds, 0 and 0 without one."""
    checkpoint.sweep(place)
    for folder in checkpoint.named(place)[::-1]:
        try:
            found = checkpoint.read(folder)
            if found.meta["config"] != config:
                continue
            parts.restore(found, str(folder))
        except DamagedCheckpoint as error:
            print(error, flush=True)
            continue
        print(f"{place.name}: continues at step {found.step}", flush=True)
        return found.step, float(found.meta["seconds"])
    return 0, 0.0


def do(run: Run, out: Path, options: argparse.Namespace) -> None:
    """Train and validate one run, and write its row."""
    where = options.device
    data = {name: value.to(where) for name, value in read_tensors(out / "data.safetensors").items()}
    held = max(1, min(VALID, len(data["latents"]) // 2))
    model = network(run.size)
    parameters = sum(each.numel() for each in model.parameters())
    if run.group:
        quantize_(model, run.group)
    model.to(where).train()
    steps = STEPS[run.budget] if options.max_steps is None else (run.budget + 1) * options.max_steps
    place = out / "work" / run.name
    seconds = train(model, data["latents"][:-held], data["text"][:-held], steps, options.batch, place)
    loss = validation(model.eval(), data["latents"][-held:], data["text"][-held:])
    tokens = steps * options.batch * (data["latents"][0, 0].numel() // 4)
    row = {"name": run.name, "size": run.size, "budget": run.budget, "group": run.group, "steps": steps}
    row |= {"parameters": parameters, "tokens": tokens, "loss": loss, "seconds": round(seconds, 1)}
    row |= {"device": device(), "versions": versions(), "settings": settings_of(options)}
    write_row(row_of(out, run), row)
    shutil.rmtree(place, ignore_errors=True)
    print(f"{run.name}: loss {loss:.5f} in {seconds:.1f} s", flush=True)


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that all runs of a folder share."""
    return {name: getattr(options, name) for name in ("batch", "clips", "max_steps")}


def row_of(out: Path, run: Run) -> Path:
    """Return the file with the numbers of a run."""
    return out / f"{run.name}.json"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command-line options that all jobs share."""
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/quant/law"), help="output folder")
    add("--batch", type=int, default=BATCH, help=f"clips per step (default: {BATCH})")
    add("--clips", type=int, default=CLIPS + VALID, help=f"clips, with {VALID} for validation")
    add("--max_steps", type=int, help="steps of the smallest budget, the others have 2 and 3 times as many")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=usual, choices=["cpu", "cuda"], help="device of the networks")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the data, or train the runs of one size and budget that are not done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", help="data, or SIZE.BUDGET as indices")
    add_options(parser)
    options = parser.parse_args(argv)
    torch.set_float32_matmul_precision("high")
    if options.job == "data":
        write_data(options.out / "data.safetensors", options.device, options.clips)
        return 0
    size, budget = map(int, options.job.split("."))
    for run in runs_of(size, budget):
        if not row_of(options.out, run).is_file():
            do(run, options.out, options)
    return 0


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
