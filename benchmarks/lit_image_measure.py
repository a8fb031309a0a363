"""Measure one run of the image experiment of LiT, or compute its reference. `benchmarks.lit_image` runs this command.

    python -m benchmarks.lit_image_measure NAME --out OUT

All runs generate the same classes from the same noise. Pictures are rounded to 8 bits. The Frechet distance compares
the generated pictures with the same number of true stills, on the means of the last block of EfficientNet-Lite0. Its
scale differs from that of a FID, which uses Inception.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.command import ended
from benchmarks.gates import device as hardware
from benchmarks.lit_image_arms import ARMS, TRUTH
from postgen.errors import UserError, check_number
from postgen.files import replacing
from postgen.info import versions
from postgen.metrics.frechet import Gaussian, frechet_distance
from postgen.pretrain.class_to_image import sample_pictures
from postgen.pretrain.stills import FRAMES, labels, render_stills
from postgen.rewards.efficientnet import SIDE, EfficientNetLite0
from postgen.rewards.pictures import eight_bit, resize
from postgen.rewards.weights import fill, read_state
from postgen.sampling.seeds import seed_of
from postgen.tensor_files import read_tensors
from postgen.world.check import check_batch

UNSEEN = 576 * 10_000  # a multiple of both numbers of classes
"""First number of the stills that no training pool contains: the reference, then the stills of `TRUTH`."""
SETTINGS = ("size", "bodies", "classes", "per_class", "draws")
"""Options on which the numbers depend; a measurement names them."""
ASPECTS = ("all_right", "count", "colour", "shape", "event")
SHOWN = 12
"""Number of pictures in a strip."""
_BATCH = 256


def classes_of(classes: int, per_class: int, bodies: int) -> list[int]:
    """Return the class of each picture: `classes` of all classes, evenly spread, with `per_class` pictures each."""
    count = len(labels(bodies))
    return [index * count // classes for index in range(classes) for _ in range(per_class)]


def true_stills(first: int, wanted: Sequence[int], options: argparse.Namespace, device: torch.device) -> Tensor:
    """Return true stills of the given classes, (N, 3, H, W) in [0, 1], rounded to 8 bits.

    Args:
        first: number of the first still; from `UNSEEN` on, no training pool contains the stills.
        wanted: class number of each still.
        options: command line, with the number of stills per class, the number of bodies and the size in pixels.
        device: device of the renderer.
    """
    count, each = len(labels(options.bodies)), options.per_class
    numbers = [first + count * (place % each) + number for place, number in enumerate(wanted)]
    return eight_bit((render_stills(numbers, options.size, device, options.bodies).float() + 1) / 2)


def features_of(pictures_N3HW: Tensor, device: torch.device) -> Tensor | None:
    """Return features (N, 320) on the CPU; if the weights are not installed, print this and return None."""
    from postgen.assets import verify

    try:
        place = verify("efficientnet-lite0")
    except UserError as error:
        print(f"the Frechet distance is not computed: {error}", flush=True)
        return None
    net: Any = fill(EfficientNetLite0(), read_state(place), place).eval().to(device)
    with torch.no_grad():
        parts = [net.features(resize(part, SIDE, SIDE)) for part in pictures_N3HW.to(device).split(_BATCH)]
    return torch.cat(parts).float().cpu()


def distances(reference: Tensor, own: Tensor, per_class: int, draws: int) -> tuple[float, list[float]]:
    """Return the Frechet distance, and the distances of bootstrap draws of classes (the same draws for every run).

    Args:
        reference: (M, D) features of true stills.
        own: (N, D) features of pictures; consecutive groups of `per_class` rows belong to one class.
        per_class: number of pictures per class.
        draws: number of draws.
    """
    true = Gaussian.of(reference)
    root = true.root()
    value = frechet_distance(true, Gaussian.of(own), root=root)
    by_class = own.unflatten(0, (-1, per_class))
    picked = torch.randint(len(by_class), (draws, len(by_class)), generator=torch.Generator().manual_seed(0))
    found = [frechet_distance(true, Gaussian.of(by_class[rows].flatten(0, 1)), root=root) for rows in picked]
    return value, found


def judged(pictures_N3HW: Tensor, prompts: Sequence[str], workers: int) -> dict[str, Any]:
    """Judge every picture; return for each aspect whether it is right (0 or 1), and the score of each picture."""
    clips = pictures_N3HW[:, None].expand(-1, FRAMES, -1, -1, -1)
    reports = check_batch(clips, [*prompts], workers=workers)
    rows: dict[str, Any] = {name: [int(bool(getattr(each, name))) for each in reports] for name in ASPECTS}
    return {**rows, "score": [round(each.score, 4) for each in reports]}


def pictures_of(name: str, options: argparse.Namespace, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
    """Generate the pictures of a run; also return its number of parameters and its conversion.

    Raises:
        UserError: the run is not trained yet.
    """
    from diffusers import DiTPipeline

    from postgen.families import denoiser_for
    from postgen.lit import conversion_of, load

    wanted = _wanted(options)
    if name == TRUTH:
        first = UNSEEN + len(labels(options.bodies)) * options.per_class
        return true_stills(first, wanted, options, device), {}
    export, student = options.out / "runs" / name / "export", name.split(".")[0] in ARMS
    if not export.is_dir():
        raise UserError(f"there is no {export}: train {name} first with benchmarks.lit_image")
    base, words = export, {}
    if student:
        base = Path(json.loads((export / "base.json").read_text(encoding="utf-8"))["base"])
        words["transformer"] = load(export / "transformer")
    pipe = DiTPipeline.from_pretrained(base, **words).to(device)
    network: Any = pipe.transformer.eval()
    steps = json.loads((base / "postgen.json").read_text(encoding="utf-8"))
    said = {"parameters": sum(each.numel() for each in network.parameters())}
    said |= {"converted": conversion_of(network).describe()} if student else {}
    seeds = [seed_of(0, "eval", place) for place in range(len(wanted))]
    prompts = [labels(options.bodies)[number] for number in wanted]
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        made = sample_pictures(denoiser_for(pipe), prompts, seeds, steps=steps["num_inference_steps"], batch=_BATCH)
    return eight_bit(made.float()), said


def _wanted(options: argparse.Namespace) -> list[int]:
    return classes_of(options.classes, options.per_class, options.bodies)


def strip(pictures_N3HW: Tensor, place: Path) -> None:
    """Write a lossless WebP with some of the pictures side by side, evenly spread over all pictures."""
    chosen = torch.linspace(0, len(pictures_N3HW) - 1, min(SHOWN, len(pictures_N3HW))).long()
    row = torch.cat(list(pictures_N3HW[chosen].cpu()), -1).permute(1, 2, 0)
    place.parent.mkdir(parents=True, exist_ok=True)
    with replacing(place) as part:
        Image.fromarray((row * 255).round().byte().numpy()).save(part, "WEBP", lossless=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the run that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help=f"reference, {TRUTH}, or name ARM.SEED of a run in OUT")
    parser.add_argument("--out", type=Path, required=True, help="folder of the experiment")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--bodies", type=int, default=1, choices=(1, 2), help="number of bodies of a still")
    parser.add_argument("--classes", type=int, default=48, help="number of classes")
    parser.add_argument("--per_class", type=int, default=48, help="number of pictures per class")
    parser.add_argument("--draws", type=int, default=200, help="bootstrap draws of the Frechet distance")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=usual, help="device of the model")
    return ended("benchmarks.lit_image_measure", partial(_measure, parser.parse_args(argv)))


def _measure(options: argparse.Namespace) -> int:
    for name, least, most in (
        ("size", 32, 1024),
        ("classes", 1, len(labels(options.bodies))),
        ("per_class", 1, 64),
        ("draws", 1, 10_000),
    ):
        check_number(f"--{name}", getattr(options, name), least, most)
    device, began = torch.device(options.device), time.perf_counter()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    reference = options.out / "reference.safetensors"
    if options.name == "reference":
        _reference(reference, options, device)
        return 0
    pictures, said = pictures_of(options.name, options, device)
    sampled = time.perf_counter() - began
    wanted = [labels(options.bodies)[number] for number in _wanted(options)]
    rows = judged(pictures, wanted, 2 if device.type == "cuda" else 0)
    features, true = features_of(pictures, device), read_tensors(reference)["features"]
    value, draws = (
        (None, [])
        if features is None or not len(true)
        else distances(true, features, options.per_class, options.draws)
    )
    strip(pictures, options.out / "strips" / f"{options.name}.webp")
    place = options.out / "measured" / f"{options.name}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    found = {
        "settings": {name: getattr(options, name) for name in SETTINGS},
        **{"device": hardware(), "versions": versions(), **said},
        "seconds": {"sampled": round(sampled, 1), "all": round(time.perf_counter() - began, 1)},
        **{"fd": value, "fd_draws": draws, "rows": rows},
    }
    with replacing(place) as part:
        part.write_text(json.dumps(found, separators=(",", ":"), allow_nan=False) + "\n", encoding="utf-8")
    print(f"{options.name}: fd {value}, right {sum(rows['all_right']) / len(wanted):.3f}, {found['seconds']}")
    return 0


def _reference(place: Path, options: argparse.Namespace, device: torch.device) -> None:
    """Write the features of true stills, with which every run is compared."""
    features = features_of(true_stills(UNSEEN, _wanted(options), options, device), device)
    with replacing(place) as part:
        save_file({"features": torch.empty(0, 320) if features is None else features}, part)


if __name__ == "__main__":
    sys.exit(main())
