"""Accuracy of the depth network of the world on unseen scenes and on one real picture.

    python -m benchmarks.world_depth [--model FOLDER] [--clips 128] [--output NAME]

The scenes have held-out combinations of colour, shape and event, 33 frames and 96 px. Half of them have a static
camera. Some clips are also measured after a pass through the embedded model's autoencoder ("softened"), so that they
are as soft as generated clips. One scale and one shift are fitted to each clip, and only pixels within 40 m count.
`flicker` is also measured for the same network without the earlier frames (each frame as its own clip). The real
picture is the left one of scikit-image's stereo pair, at 192 px. Two baselines that do not use the picture are
compared with the network: one constant value, and the row of the pixel (lower is nearer). One picture allows no
interval.

The targets of the gates were set before the weights were trained. The gate of the flicker uses the upper end of the
interval.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.gates import gate, largest, smallest, write_result
from postgen import world
from postgen.assets import embedded_model, verify
from postgen.errors import UserError
from postgen.families import denoiser_for
from postgen.metrics.bootstrap import bootstrap, ratio_of_means
from postgen.metrics.disparity import DisparityErrors, disparity_errors
from postgen.video import contact_sheet, read_picture
from postgen.world.spec import Spec
from postgen.worldweaver.depth_net import WEIGHTS, WorldDepth, depth_folder
from postgen.worldweaver.depth_training import FARTHEST, Takes, reconstructed, render_scenes

FRAMES, SIZE = 33, 96
STEREO_SHIFT = 31.086
"""Distance in pixels between the principal points of the two pictures. Depth is proportional to
1 / (disparity + STEREO_SHIFT)."""
ESTIMATES = ("network", "constant", "lower is nearer")
SHOWN = 3


def scenes(count: int, moving: bool) -> list[Spec]:
    """Return `count` unseen scenes of held-out combinations whose camera moves (`moving`) or is static."""
    found: list[Spec] = []
    seed = 0
    while len(found) < count:
        spec = world.sample(seed, num_frames=FRAMES, split="held_out")
        seed += 1
        if (spec.camera != "static") == moving:
            found.append(spec)
    return found


def row(name: str, found: list[DisparityErrors], single: list[DisparityErrors]) -> dict[str, Any]:
    """Return the means over clips with 95 % intervals, and the flicker with and without the earlier frames."""
    named: dict[str, Any] = {"clips": name, "count": len(found)}
    columns = {key: [asdict(errors)[key] for errors in found] for key in ("abs_rel", "within_125", "rank", "flicker")}
    alone = [errors.flicker for errors in single]
    intervals = {key: bootstrap(torch.tensor(values)) for key, values in columns.items()}
    intervals["flicker_single"] = bootstrap(torch.tensor(alone))
    intervals["flicker_ratio"] = bootstrap(torch.tensor([columns["flicker"], alone]).T, ratio_of_means)
    for key, found_here in intervals.items():
        named |= {key: found_here.value, f"{key}_low": found_here.low, f"{key}_high": found_here.high}
    return named


def measure(name: str, takes: Takes, source: WorldDepth) -> dict[str, Any]:
    """Measure and print the errors of a set of clips."""
    found, single = [], []
    for rgb, true in zip(tqdm(takes.rgb, desc=name, leave=False), takes.disparity.float(), strict=True):
        valid = true > 1 / FARTHEST
        found.append(disparity_errors(source(rgb), true, valid))
        with torch.no_grad():
            alone = source.net(rgb[:, None].float() / 255)[:, 0]
        single.append(disparity_errors(alone, true, valid))
    result = row(name, found, single)
    print({key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}, flush=True)
    return result


def stereo(source: WorldDepth) -> tuple[list[dict[str, Any]], Tensor]:
    """Return the errors of the network and of the two baselines on the real picture, and the prediction (H,W)."""
    picture = torch.from_numpy(np.array(read_picture(verify("stereo-left"))))[None]
    with np.load(verify("stereo-disparity")) as file:
        measured = torch.from_numpy(file["arr_0"])[None]
    valid = measured.isfinite()
    true = torch.where(valid, measured + STEREO_SHIFT, 1.0)
    lower = torch.arange(true.shape[1], dtype=torch.float32)[None, :, None].expand_as(true)
    estimate = source(picture).cpu()
    estimates = dict(zip(ESTIMATES, (estimate, torch.zeros_like(true), lower), strict=True))
    rows = [{"estimate": name, **asdict(disparity_errors(each, true, valid))} for name, each in estimates.items()]
    for each in rows:
        del each["flicker"]
        print(each, flush=True)
    return rows, estimate[0]


def gates(rows: list[dict[str, Any]], real: list[dict[str, Any]], megabytes: float) -> list[dict[str, Any]]:
    """Return the gates. Gates named `world_` use the clips that are not softened, and the worse of both cameras."""
    plain = [each for each in rows if "softened" not in each["clips"]]
    soft = [each for each in rows if "softened" in each["clips"]]
    errors = {each["estimate"]: each["abs_rel"] for each in real}
    constant, gradient = (errors["network"] / errors[name] if errors else None for name in ESTIMATES[1:])
    return [
        gate("world_abs_rel", largest(plain, "abs_rel"), "<=", 0.05),
        gate("world_within_125", smallest(plain, "within_125"), ">=", 0.97),
        gate("world_rank", smallest(plain, "rank"), ">=", 0.95),
        gate("softened_abs_rel", largest(soft, "abs_rel"), "<=", 0.07),
        gate("flicker_over_single_frames", largest(plain, "flicker_ratio_high"), "<=", 1.0),
        gate("stereo_over_constant", constant, "<=", 1.0),
        gate("stereo_over_lower_is_nearer", gradient, "<=", 1.0),
        gate("file_mb", megabytes, "<=", 1.0),
    ]


def sheet(takes: Takes, source: WorldDepth, path: Path) -> None:
    """Write a sheet of some clips: pictures, true disparity, predicted disparity. Each map is scaled to its range."""
    lines = []
    for rgb, true in zip(takes.rgb[:SHOWN], takes.disparity[:SHOWN].float(), strict=True):
        every = slice(None, None, (len(rgb) - 1) // 8)
        lines.append(rgb[every].float() / 255)
        for disparity in (true, source(rgb)):
            low, high = disparity.min(), disparity.max()
            lines.append(((disparity - low) / (high - low))[every, None].expand(-1, 3, -1, -1))
    contact_sheet(torch.cat([line.cpu() for line in lines]), path, columns=len(lines[0]), limit=sum(map(len, lines)))


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the network (default: the shipped one)")
    parser.add_argument("--clips", type=int, default=128, help="number of clips per kind of camera (default: 128)")
    parser.add_argument(
        "--softened", type=int, default=32, help="number of these clips that are also softened (default: 32)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", default="world_depth", help="name or path of the result file")
    parser.add_argument("--sheet", type=Path, help="also write this picture of some clips with their disparity")
    return parser.parse_args()


def main() -> None:
    """Measure the network on scenes and on the real picture, print the gates and write the results."""
    args = options()
    source = WorldDepth(args.model, device=args.device)
    denoiser = embedded_denoiser(args.device) if args.softened else None
    rows = []
    for name, moving in (("camera at rest", False), ("camera moves", True)):
        takes = render_scenes(scenes(args.clips, moving), SIZE, args.device)
        rows.append(measure(name, takes, source))
        if args.sheet and moving:
            sheet(takes, source, args.sheet)
        if denoiser is not None:
            part = Takes(takes.rgb[: args.softened], takes.disparity[: args.softened])
            part.rgb = torch.cat([reconstructed(denoiser, each) for each in part.rgb.split(4)])
            rows.append(measure(f"{name}, softened", part, source))
    try:
        real, _ = stereo(source)
    except UserError as error:
        print(f"the real picture is not measured: {error}")
        real = []
    megabytes = (depth_folder(args.model) / WEIGHTS).stat().st_size / 1e6
    judged = gates(rows, real, megabytes)
    for each in judged:
        shown = "none" if each["value"] is None else f"{each['value']:.3f}"
        print(f"{each['name']:30s} {shown:>8s} {each['op']} {each['target']:g} {'ok' if each['ok'] else 'MISSED'}")
    settings = {"clips": args.clips, "softened": args.softened, "frames": FRAMES, "size": SIZE, "farthest": FARTHEST}
    write_result(args.output, {"settings": settings, "rows": rows, "stereo": real, "gates": judged})


def embedded_denoiser(device: str) -> Any:
    """Load the denoiser of the embedded model, of which only the autoencoder is used."""
    from diffusers import DiffusionPipeline

    return denoiser_for(DiffusionPipeline.from_pretrained(embedded_model()).to(device))


if __name__ == "__main__":
    main()
