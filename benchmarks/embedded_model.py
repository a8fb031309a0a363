"""What the embedded model can do, judged on the reloaded folder by the world's checker.

    python -m benchmarks.embedded_model [--quick] [--prompts 256] [--guidance 3 4 5 6] [--model FOLDER]

Prompts of scenes below the training seeds, clip i from seed i, 20 steps: one body, two bodies, combinations of colour,
shape and event that training never saw, and lengths of 9, 25 and 33 frames. Reconstructions of the autoencoder are
measured on the pixels of bodies and their rim. Writes benchmarks/results/embedded_model.json and a contact sheet.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.gates import RESULTS, gate, write_result
from postgen import world
from postgen.assets import embedded_model
from postgen.pretrain.measure import masked_psnr
from postgen.pretrain.pool import dilated, to_model
from postgen.video import contact_sheet
from postgen.world.check import Report, check_batch
from postgen.world.spec import Spec

STEPS = 20
BATCH = {"cpu": 8, "cuda": 64}
MEASURES = ("count", "colour", "shape", "direction", "event", "all_right", "score")
GUIDANCE = 5.0
TARGETS = {
    ("one", "colour"): ("colour", 0.95),
    ("one", "shape"): ("shape", 0.85),
    ("one", "event"): ("motion", 0.80),
    ("two", "all_right"): ("two_objects", 0.35),
}


def load(folder: Path, device: str) -> Any:
    """The pipeline as any user of diffusers loads it."""
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def groups(count: int) -> dict[str, tuple[int, list[Spec]]]:
    """Name -> (frames, scenes of a static camera)."""
    found: dict[str, tuple[int, list[Spec]]] = {
        "one": (17, [world.sample(i, num_bodies=1, camera="static") for i in range(count)]),
        "two": (17, [world.sample(i, num_bodies=2, camera="static") for i in range(count)]),
        "one, unseen": (
            17,
            [world.sample(i, num_bodies=1, camera="static", split="held_out") for i in range(count)],
        ),
    }
    for frames in (9, 25, 33):
        scenes = [world.sample(i, num_bodies=1, camera="static", num_frames=frames) for i in range(count)]
        found[f"one, {frames} frames"] = (frames, scenes)
    return found


def generate(pipe: Any, prompts: list[str], guidance: float, frames: int, label: str) -> Tensor:
    """Clips (B,F,3,H,W) on the pipeline's device; clip i has seed i."""
    parts = []
    batch = BATCH[pipe.device.type]
    for low in tqdm(range(0, len(prompts), batch), desc=label, unit="batch", leave=False):
        part = prompts[low : low + batch]
        output = pipe(
            part,
            height=96,
            width=96,
            num_frames=frames,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            generator=[torch.Generator("cpu").manual_seed(low + i) for i in range(len(part))],
            output_type="pt",
        )
        parts.append(output.frames.float())
    return torch.cat(parts)


def shares(reports: list[Report]) -> dict[str, float]:
    """Share of clips that are right, by attribute, among those that the attribute applies to, and the mean score."""
    result = {}
    for name in MEASURES:
        values = [float(value) for report in reports if (value := getattr(report, name)) is not None]
        if values:
            result[name] = sum(values) / len(values)
    return result


def sampled(pipe: Any, count: int, guidance: float) -> tuple[dict[str, dict[str, float]], Tensor]:
    """Rows of shares of every group, and the clips of the sheet: eight with one body, four with two."""
    rows, sheet = {}, []
    for name, (frames, specs) in groups(count).items():
        clips = generate(pipe, [world.simple_caption(spec) for spec in specs], guidance, frames, name)
        rows[name] = shares(check_batch(clips, specs))
        print(f"{name:16s}", {key: round(value, 3) for key, value in rows[name].items()}, flush=True)
        if name in ("one", "two"):
            sheet.append(clips[: 8 if name == "one" else 4, ::4].cpu())
    return rows, torch.cat(sheet)


@torch.no_grad()
def reconstructed(vae: Any, count: int) -> dict[str, float]:
    """PSNR on bodies, all frames and the last one, and the judge's score on reconstructions over that on originals."""
    specs = [world.sample(i, camera="static") for i in range(count)]
    rec, true, masks = [], [], []
    for low in range(0, count, 16):
        frames = world.render(specs[low : low + 16], size=96, device=vae.device)
        x = to_model(frames.rgb_BF3HW)
        rec.append(vae.decode(vae.encode(x).latent_dist.mode(), return_dict=False)[0])
        true.append(x)
        assert frames.ids_BFHW is not None
        masks.append(dilated((frames.ids_BFHW > 0).float())[:, None])
    y, x, mask = torch.cat(rec), torch.cat(true), torch.cat(masks)
    scores = [shares(check_batch(clips.transpose(1, 2) * 0.5 + 0.5, specs))["score"] for clips in (y.clamp(-1, 1), x)]
    return {
        "psnr_objects": masked_psnr(y, x, mask),
        "psnr_objects_last": masked_psnr(y[:, :, -1:], x[:, :, -1:], mask[:, :, -1:]),
        "score": scores[0],
        "score_of_originals": scores[1],
    }


def seconds_on_two_cores(folder: Path, guidance: float) -> float:
    """Median seconds of a default clip on two CPU cores, in a process of its own that sees no GPU."""
    code = (
        "import json, os, sys, time, pathlib\n"
        "if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])\n"
        "import torch; torch.set_num_threads(2)\n"
        "from benchmarks import embedded_model as b\n"
        "pipe = b.load(pathlib.Path(sys.argv[1]), 'cpu')\n"
        "times = [b.one_clip(pipe, float(sys.argv[2])) for _ in range(4)]\n"
        "print(json.dumps(times[1:]))\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(guidance)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(statistics.median(json.loads(told.stdout.splitlines()[-1])))


def one_clip(pipe: Any, guidance: float) -> float:
    """Seconds of one default clip."""
    start = time.perf_counter()
    generate(pipe, ["a red ball rolls left"], guidance, 17, "")
    return time.perf_counter() - start


def gates(
    rows: dict[str, dict[str, float]], autoencoder: dict[str, float], seconds: float, size: float
) -> list[dict[str, Any]]:
    """The numbers asked for."""
    result = [gate(name, rows[group][key], ">=", target) for (group, key), (name, target) in TARGETS.items()]
    score = rows["one"]["score"]
    result.append(gate("unseen_ratio", rows["one, unseen"]["score"] / score, ">=", 0.6))
    for frames in (9, 25, 33):
        result.append(gate(f"frames_{frames}", rows[f"one, {frames} frames"]["score"] / score, ">=", 0.8))
    result += [
        gate("ae_psnr_objects", autoencoder["psnr_objects"], ">=", 29.0),
        gate("ae_psnr_objects_last", autoencoder["psnr_objects_last"], ">=", 27.0),
        gate("check_on_reconstructions", autoencoder["score"] / autoencoder["score_of_originals"], ">=", 0.97),
        gate("seconds_cpu", seconds, "<=", 8.0),
        gate("folder_mb", size, "<=", 20.0),
    ]
    return result


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=256, help="prompts of each group (default: 256)")
    parser.add_argument("--guidance", type=float, nargs="*", default=[], help="more guidance scales, one table each")
    parser.add_argument("--quick", action="store_true", help="32 prompts a group; prints only")
    parser.add_argument("--model", type=Path, help="another folder than the embedded model's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", default="embedded_model", help="name or path of the result file")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write; the gates are those at guidance 5."""
    args = options()
    count = 32 if args.quick else args.prompts
    folder = args.model or embedded_model()
    default = json.loads((folder / "postgen.json").read_text())["guidance_scale"]
    pipe = load(folder, args.device)
    tables = {}
    for guidance in dict.fromkeys((GUIDANCE, default, *args.guidance)):
        print(f"guidance {guidance:g}")
        tables[f"{guidance:g}"], sheet = sampled(pipe, count, guidance)
        if guidance == default:
            shown = sheet
    # Cheap, and fewer clips say too little beside thin margins.
    autoencoder = reconstructed(pipe.vae, max(count, 256))
    print("reconstructions ", {key: round(value, 3) for key, value in autoencoder.items()}, flush=True)
    seconds = seconds_on_two_cores(folder, default)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    rows = gates(tables[f"{GUIDANCE:g}"], autoencoder, seconds, size)
    for row in rows:
        print(
            f"{row['name']:26s} {row['value']:8.3f} {row['op']} {row['target']:g}  {'ok' if row['ok'] else 'MISSED'}"
        )
    if args.quick:
        return
    settings = {"prompts_per_group": count, "steps": STEPS, "default_guidance": default, "first_seed": 0}
    where = write_result(
        args.output,
        {
            "settings": settings,
            "by_guidance": tables,
            "autoencoder": autoencoder,
            "seconds_on_two_cores": seconds,
            "gates": rows,
        },
    )
    picture = RESULTS / "embedded_model.png" if where.parent == RESULTS else where.with_suffix(".png")
    contact_sheet(shown.flatten(0, 1), picture, columns=shown.shape[1], limit=len(shown) * shown.shape[1])


if __name__ == "__main__":
    main()
