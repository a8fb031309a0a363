"""Generate the clips of the embedded model that people judge: their prompts, seeds, settings and files.

    python -m benchmarks.world_eye_clips FOLDER [--first 600000] [--device cuda] [--model MODEL] [--sheets]

92 of the 208 clips use the default settings of the model's folder. The other 116 use the settings of RL rollouts:
small clips, few steps, no guidance, so that more of them are wrong. The judge is not applied to the clips here. The
command writes four files of lossless clips. With --sheets it also writes pictures of the clips with names and prompts
for the person.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.embedded_sampling import Defaults, Job, generate, load
from benchmarks.embedded_sheets import bytes_of, read_clips, sheet, write_clips
from postgen import world
from postgen.assets import embedded_model
from postgen.world.spec import CAMERAS

#: First seed of the scenes and of the noise of each draw, in the order in which a person judged the draws. No other
#: benchmark uses these seeds.
FIRST, FIRST_FRESH, FIRST_THIRD, FIRST_FOURTH, FIRST_FIFTH = 600_000, 650_000, 700_000, 750_000, 800_000
#: Files: (prefix of the clips' names, number of bodies, number of clips, whether to use the settings of the model's
#: folder). In every fourth clip of part "1" the camera moves.
PARTS = (("2", 2, 52, True), ("2r", 2, 76, False), ("1", 1, 40, True), ("1r", 1, 40, False))
#: Settings of RL rollouts: the size and length of the recipes, their smallest number of steps, no guidance.
ROLLOUT = Defaults(size=96, frames=17, steps=8, guidance=1.0)
#: Number of clips per sheet.
_ON_A_SHEET = 8


def sampling(model: Path, folder_says: bool) -> Defaults:
    """Return the sampling settings of a part: those of the model's folder if `folder_says`, otherwise `ROLLOUT`."""
    return Defaults.of(model) if folder_says else ROLLOUT


def rows(prefix: str, bodies: int, count: int, frames: int, first: int) -> dict[str, dict[str, Any]]:
    """Return the prompt and the seed of each clip of a part by the clip's name."""
    found = {}
    for k in range(count):
        seed = first + 1000 * [part[0] for part in PARTS].index(prefix) + k
        camera = CAMERAS[1 + k // 4 % (len(CAMERAS) - 1)] if prefix == "1" and k % 4 == 3 else "static"
        spec = world.sample(seed, num_bodies=bodies, camera=camera, num_frames=frames)
        found[f"{prefix}-{k:03d}"] = {"prompt": world.simple_caption(spec), "seed": seed}
    return found


def weights_of(model: Path) -> str:
    """Return the first twelve digits of the SHA-256 of the file of a model's denoiser."""
    data = (model / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    return hashlib.sha256(data).hexdigest()[:12]


def make(folder: Path, model: Path, device: str, first: int = FIRST) -> None:
    """Generate and write the four files of clips, and `rows.json` with their prompts and seeds.

    Raises:
        RuntimeError: if the clips of a part do not fit into one file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pipe, all_rows = load(model, device), {}
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    for prefix, bodies, count, folder_says in PARTS:
        how = sampling(model, folder_says)
        part = rows(prefix, bodies, count, how.frames, first)
        job = Job(
            prompts=[row["prompt"] for row in part.values()],
            seeds=[row["seed"] for row in part.values()],
            **asdict(how),
        )
        clips = bytes_of(generate(pipe, job, prefix))
        kept = write_clips(folder / f"{prefix}.safetensors", list(clips), job.prompts)
        if kept < count:
            raise RuntimeError(f"only {kept} of the {count} clips of {prefix} fit into a file")
        all_rows |= part
    told = {"denoiser_sha256": weights_of(model), "clips": all_rows}
    (folder / "rows.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def kept_clips(folder: Path) -> dict[str, Tensor]:
    """Return the clips, uint8 (F,3,H,W), of the files that `make` wrote, by name."""
    found = {}
    for prefix, _, _, _ in PARTS:
        clips, _ = read_clips(folder / f"{prefix}.safetensors")
        found |= {f"{prefix}-{k:03d}": clip for k, clip in enumerate(clips)}
    return found


def sheets(folder: Path) -> None:
    """Draw sheets with a few clips each, under their names and prompts."""
    told = json.loads((folder / "rows.json").read_text(encoding="utf-8"))["clips"]
    for prefix, _, _, _ in PARTS:
        clips, prompts = read_clips(folder / f"{prefix}.safetensors")
        names = [f"{prefix}-{k:03d}" for k in range(len(clips))]
        assert prompts == [told[name]["prompt"] for name in names]
        captions = [f"{name}  {prompt}" for name, prompt in zip(names, prompts, strict=True)]
        for low in range(0, len(clips), _ON_A_SHEET):
            part = slice(low, low + _ON_A_SHEET)
            sheet(clips[part], captions[part], folder / f"sheet-{prefix}-{low:03d}.png", columns=1, shown=9)


def main() -> None:
    """Generate the clips if the folder has none, and draw the sheets with --sheets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the clips; clips that it has are not made again")
    parser.add_argument(
        "--first",
        type=int,
        default=FIRST,
        help=f"first seed (default: {FIRST}, later {FIRST_FRESH}, {FIRST_THIRD}, {FIRST_FOURTH}, {FIRST_FIFTH})",
    )
    parser.add_argument(
        "--model", type=Path, default=embedded_model(), help="folder of the model (default: the embedded one)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--sheets", action="store_true", help="also draw the sheets")
    args = parser.parse_args()
    if not (args.folder / "rows.json").is_file():
        make(args.folder, args.model, args.device, args.first)
    if args.sheets:
        sheets(args.folder)


if __name__ == "__main__":
    main()
