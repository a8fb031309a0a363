"""Reconstruction quality of the embedded model's autoencoders, measured on reloaded folders.

    python -m benchmarks.autoencoder [--quick] [--clips 64] [--new FOLDER] [--old FOLDER] [--log metrics.jsonl]

The scenes are not in the training data. Half of them have combinations of colour, shape and event that are held out
from training. diffusers' own loops encode each clip to the mean of the latent distribution and decode it. The PSNR
uses only pixels within two pixels of a body. It is computed for all frames, for the first frame (which the autoencoder
encodes alone), for the later frames and for the last frame. In the first two settings, the checker judges the original
and the reconstructed clips whose camera is static. With --log, the result also summarises the training run of the new
autoencoder. The command writes benchmarks/results/autoencoder.json, and in the same folder a contact sheet with each
clip above its reconstructions.
"""

from __future__ import annotations

import argparse
import json
import statistics
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
from postgen.world.check import check_batch
from postgen.world.spec import Spec

#: Size in pixels and number of frames of each setting. The gates use the first; the others have 1/4 of the clips.
SETTINGS = ((128, 33), (96, 17), (128, 17), (160, 17), (96, 33), (160, 33), (128, 49))
BATCH = 4
SHOWN = 4


def scenes(count: int, frames: int) -> list[Spec]:
    """Return `count` unseen scenes: the first half is from the training split, the second half is held out."""
    return [world.sample(i, num_frames=frames, split="train" if i < count // 2 else "held_out") for i in range(count)]


def load(folder: Path, device: str) -> Any:
    """Load the autoencoder in float32 with diffusers' `from_pretrained`; the files hold half precision."""
    from diffusers import AutoencoderKLWan

    vae: Any = AutoencoderKLWan.from_pretrained(folder / "vae" if (folder / "vae").is_dir() else folder)
    return vae.to(device)


@torch.no_grad()
def reconstruct(vae: Any, rgb_BT3HW: Tensor) -> Tensor:
    """Encode and decode clips (B,F,3,H,W) in [0,1]; return the reconstructions with the same shape."""
    z = vae.encode(to_model(rgb_BT3HW)).latent_dist.mode()
    clips: Tensor = vae.decode(z, return_dict=False)[0].transpose(1, 2)
    return clips * 0.5 + 0.5


def psnr(x_BF3HW: Tensor, y_BF3HW: Tensor, mask_BFHW: Tensor) -> dict[str, float]:
    """Return the PSNR in dB on and around bodies: of all frames, the first frame, the later frames, the last frame."""
    x, y, mask = x_BF3HW.transpose(1, 2) * 2, y_BF3HW.transpose(1, 2) * 2, mask_BFHW[:, None]
    parts = {"": slice(None), "_first": slice(1), "_rest": slice(1, None), "_last": slice(-1, None)}
    return {
        f"psnr_objects{name}": masked_psnr(x[:, :, part], y[:, :, part], mask[:, :, part])
        for name, part in parts.items()
    }


def verdicts(true: Tensor, made: Tensor, specs: list[Spec]) -> dict[str, float]:
    """Return what the checker finds in true clips with a static camera and in their reconstructions.

    `kept_right` is the share of fully right true clips whose reconstruction is fully right too.
    """
    still = [i for i, spec in enumerate(specs) if spec.camera == "static"]
    chosen = [specs[i] for i in still]
    before, after = check_batch(true[still], chosen), check_batch(made[still], chosen)
    right = [bool(b.all_right) for b in before]
    kept = sum(1 for ok, report in zip(right, after, strict=True) if ok and report.all_right)
    return {
        "checked": float(len(still)),
        "right_of_originals": sum(right) / len(right),
        "kept_right": kept / max(1, sum(right)),
        "score_of_originals": sum(r.score for r in before) / len(before),
        "score": sum(r.score for r in after) / len(after),
    }


def measure(vaes: dict[str, Any], count: int, size: int, frames: int) -> tuple[list[dict[str, Any]], Tensor]:
    """Measure the autoencoders at one setting.

    Returns:
        One row of results per autoencoder, and the frames (N,3,H,W) of a contact sheet: each clip, then its
        reconstructions.
    """
    specs, device = scenes(count, frames), next(iter(vaes.values())).device
    true, masks = [], []
    made: dict[str, list[Tensor]] = {name: [] for name in vaes}
    seconds = dict.fromkeys(vaes, 0.0)
    for low in tqdm(range(0, count, BATCH), desc=f"{size} px, {frames} frames", leave=False):
        pictures = world.render(specs[low : low + BATCH], size=size, device=device)
        assert pictures.ids_BFHW is not None
        # Round to bytes, because a video file holds bytes.
        true.append((pictures.rgb_BF3HW * 255).round() / 255)
        masks.append(dilated((pictures.ids_BFHW > 0).float()))
        for name, vae in vaes.items():
            start = time.perf_counter()
            made[name].append(reconstruct(vae, true[-1]).cpu())
            seconds[name] += time.perf_counter() - start
    x, mask = torch.cat(true).cpu(), torch.cat(masks).cpu()
    rows: list[dict[str, Any]] = []
    # Measure each autoencoder on all clips. The sheet shows about nine frames of the first clips.
    every = max(1, (frames - 1) // 8)
    lines = [x[:SHOWN, ::every]]
    for name in vaes:
        y = torch.cat(made[name])
        found = psnr(x, y, mask)
        row: dict[str, Any] = {"model": name, "size": size, "frames": frames, "clips": count, **found}
        row["first_frame_gap_db"] = found["psnr_objects_rest"] - found["psnr_objects_first"]
        row["seconds_a_clip"] = seconds[name] / count
        if (size, frames) in SETTINGS[:2]:
            row |= verdicts(x, y, specs)
        rows.append(row)
        lines.append(y[:SHOWN, ::every])
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    return rows, torch.stack(lines, 1).flatten(0, 2)


def training(log: Path) -> dict[str, Any]:
    """Return the steps, seconds and evaluations of a training run from its `metrics.jsonl`."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if "step_time" in row]
    evaluations = [
        {"step": row["step"], "psnr_objects": row["eval_psnr_objects"], "gap": row["eval_first_frame_gap_db"]}
        for row in rows
        if "eval_psnr_objects" in row
    ]
    return {
        "steps": steps[-1]["step"],
        "seconds": steps[-1]["seconds"],
        "seconds_a_step": statistics.median(row["step_time"] for row in steps),
        "evaluations": evaluations,
    }


def gates(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the gates for one row of results."""
    return [
        gate("ae_psnr_objects", row["psnr_objects"], ">=", 31.0),
        gate("first_frame_gap_db", row["first_frame_gap_db"], "<=", 0.7),
        gate("check_on_reconstructions", row["kept_right"], ">=", 0.97),
    ]


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=64, help="number of clips in the main setting (default: 64)")
    parser.add_argument("--quick", action="store_true", help="8 clips, only the main setting; write no file")
    parser.add_argument("--new", type=Path, default=embedded_model(), help="folder of the model to judge")
    parser.add_argument("--old", type=Path, help="folder of a model to compare with (default: none)")
    parser.add_argument("--log", type=Path, help="metrics.jsonl of the training run of the new autoencoder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", default="autoencoder", help="name or path of the result file")
    return parser.parse_args()


def main() -> None:
    """Measure the autoencoders, print the gates of the new one at the main setting, and write the results."""
    args = options()
    folders = (("old", args.old), ("new", args.new))
    vaes = {name: load(folder, args.device) for name, folder in folders if folder is not None}
    rows: list[dict[str, Any]] = []
    for number, (size, frames) in enumerate(SETTINGS[:1] if args.quick else SETTINGS):
        count = 8 if args.quick else args.clips if number == 0 else max(8, args.clips // 4)
        found, lines = measure(vaes, count, size, frames)
        rows += found
        if number == 0:
            sheet = lines
    judged = gates(next(row for row in rows if row["model"] == "new"))
    for row in judged:
        print(f"{row['name']:26s} {row['value']:8.3f} {row['op']} {row['target']:g} {'ok' if row['ok'] else 'MISSED'}")
    if args.quick:
        return
    where = write_result(
        args.output,
        {
            "settings": {"first_seed": 0, "clips": args.clips, "mask_pixels_around_bodies": 2},
            "weights": {name: sum(p.numel() for p in vae.parameters()) for name, vae in vaes.items()},
            "rows": rows,
            "training": training(args.log) if args.log else None,
            "gates": judged,
        },
    )
    picture = RESULTS / "autoencoder.png" if where.parent == RESULTS else where.with_suffix(".png")
    contact_sheet(sheet, picture, columns=len(sheet) // (SHOWN * (1 + len(vaes))), limit=len(sheet))


if __name__ == "__main__":
    main()
