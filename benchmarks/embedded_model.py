"""What the embedded model can do, judged on the reloaded folder by the world's checker.

    python -m benchmarks.embedded_model [--prompts 256] [--guidance 5] [--quick]

Groups: single-object and two-object prompts, fixed seeds, 20 steps. Writes benchmarks/results/embedded_model.json
and, beside it, a contact sheet of the first twelve single-object clips. Reconstruction, length and speed gates are not
measured yet.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.gates import gate, write_result
from postgen import world
from postgen.assets import embedded_model
from postgen.video import contact_sheet
from postgen.world.check import Report, check_batch
from postgen.world.spec import Spec

BATCH = 8
GATES = (
    ("single", "colour", "colour", 0.95),
    ("single", "shape", "shape", 0.85),
    ("single", "direction", "motion", 0.80),
)


def load(folder: Path, device: str) -> Any:
    """The pipeline as any user of diffusers loads it."""
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scenes(bodies: int, count: int) -> list[Spec]:
    """Scenes of consecutive seeds below those of training, filmed by a static camera."""
    return [world.sample(seed, num_bodies=bodies, camera="static") for seed in range(count)]


def generate(pipe: Any, prompts: list[str], guidance: float, frames: int = 17) -> Tensor:
    """Clips (B,F,3,H,W); clip i has seed i."""
    parts = []
    for low in tqdm(range(0, len(prompts), BATCH), desc=f"{frames} frames", unit="batch"):
        part = prompts[low : low + BATCH]
        output = pipe(
            part,
            height=96,
            width=96,
            num_frames=frames,
            num_inference_steps=20,
            guidance_scale=guidance,
            generator=[torch.Generator("cpu").manual_seed(low + i) for i in range(len(part))],
            output_type="pt",
        )
        parts.append(output.frames.float().cpu())
    return torch.cat(parts)


def shares(reports: list[Report]) -> dict[str, float]:
    """Share of clips that are right, by attribute, among those that the attribute applies to."""
    result = {}
    for name in ("count", "colour", "shape", "direction", "event", "all_right", "score"):
        values = [float(value) for report in reports if (value := getattr(report, name)) is not None]
        result[name] = sum(values) / len(values) if values else float("nan")
    return result


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--quick", action="store_true", help="32 prompts a group; prints only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    count = 32 if args.quick else args.prompts
    folder = embedded_model()
    pipe = load(folder, args.device)
    rows = {}
    for group, bodies in (("single", 1), ("two", 2)):
        specs = scenes(bodies, count)
        clips = generate(pipe, [world.simple_caption(spec) for spec in specs], args.guidance)
        rows[group] = shares(check_batch(clips, specs))
        print(group, {name: round(value, 3) for name, value in rows[group].items()}, flush=True)
        if group == "single" and not args.quick:
            sheet = Path(__file__).parent / "results" / "embedded_model.png"
            contact_sheet(clips[:12, ::4].flatten(0, 1), sheet, columns=5, limit=60)
    gates = [gate(name, rows[group][key], ">=", target) for group, key, name, target in GATES]
    gates.append(gate("two_objects", rows["two"]["all_right"], ">=", 0.35))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    gates.append(gate("folder_mb", size, "<=", 20.0))
    if not args.quick:
        settings = {"prompts_per_group": count, "guidance_scale": args.guidance, "num_inference_steps": 20}
        write_result("embedded_model", {"settings": settings, "seed": 0, "rows": rows, "gates": gates})


if __name__ == "__main__":
    main()
