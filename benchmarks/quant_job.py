"""Run one job of `python -m benchmarks.quant` in its own process; see `benchmarks.quant_arms` for the jobs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.embedded_groups import Group, build
from benchmarks.embedded_sampling import Defaults, Job, generate, load
from benchmarks.gates import device
from benchmarks.lit_video_measure import measure_student, measure_teacher
from benchmarks.quant_advice import advice_of
from benchmarks.quant_arms import FORMATS, Arm, Place
from benchmarks.quant_checks import checks
from benchmarks.quant_files import weights_of, write_own
from benchmarks.quant_measure import Calls, sizes_of, small_picture, velocity_error, write_row
from postgen import world
from postgen.assets import model_folder
from postgen.files import replacing
from postgen.info import versions
from postgen.quant import QuantSpec
from postgen.quant.calibration import Calibration
from postgen.quant.calibration_config import CalibrationConfig
from postgen.quant.recipes import quantize
from postgen.quant.stages import recipe_of
from postgen.quant.train_config import QuantTrainingConfig
from postgen.quant.trainer import QuantTrainer
from postgen.training import Reason
from postgen.world.scenes import FIRST_TRAINING_SEED, draw_scenes

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "quant-tiny.yaml"
SIZES = ("steps", "size", "frames")
"""Options that change the generation of clips."""
SHARED = ("prompts", "calibration", "points", "block_steps", "rates", "e2e_steps", "batch")
"""Other options of the experiment."""
FIRST_SEED = 40_000
"""Number of the first scene, and seed of its noise: below the seeds of training; no other benchmark uses it."""
FIRST_CALIBRATION = FIRST_TRAINING_SEED + 95_000_000
"""First scene of the prompts for calibration and training."""
MIX = (0.5, 0.5, 0.0)
"""Shares of prompts with one, two and three bodies, for calibration and training."""
VELOCITIES = 32
"""Number of prompts on which the error of the velocity is measured, at every step."""
GROUPS = ("one", "two")
"""Measured groups of prompts: scenes with one body and with two, half of the prompts each."""
PART = "transformer"
NAMED = ("make", "measure", "latents")
"""Jobs that have a name."""


def captions(first: int, count: int, frames: int) -> list[str]:
    """Return prompts for calibration and training: scenes that no measurement uses."""
    scenes = draw_scenes(first, count, frames, bodies=MIX)
    return [world.simple_caption(scene.spec) for scene in scenes]


def how_of(options: argparse.Namespace) -> Defaults:
    """Return how clips are generated: the values of the model's folder, and those of `SIZES` that are given."""
    given = {name: getattr(options, name) for name in SIZES if getattr(options, name)}
    return dataclasses.replace(Defaults.of(model_folder(options.model)), **given)


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that all rows of a folder share."""
    settings = {name: getattr(options, name) for name in (*SHARED, "device")}
    return {**settings, "model": str(options.model), **dataclasses.asdict(how_of(options))}


class Work:
    """The jobs of a folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.place = options, Place(out=options.out)
        self.folder = model_folder(options.model)
        self.how = how_of(options)
        self.size: dict[str, Any] = {"num_frames": self.how.frames, "height": self.how.size, "width": self.how.size}
        self.call: dict[str, Any] = {"num_inference_steps": self.how.steps, "guidance_scale": self.how.guidance}

    def pipe(self) -> Any:
        """Load the exact model."""
        return load(self.folder, self.options.device)

    def group(self, name: str, count: int) -> Group:
        """Return prompts of one of `GROUPS`, with what the judge expects."""
        return build(name, max(2, count // len(GROUPS)), FIRST_SEED, self.how)

    def prompts(self, count: int) -> list[str]:
        """Return the first prompts for calibration and training."""
        return captions(FIRST_CALIBRATION, count, self.how.frames)

    def row(self, name: str, values: dict[str, Any]) -> None:
        """Write the numbers of a job."""
        note = {"device": device(), "settings": settings_of(self.options), "versions": versions()}
        write_row(self.place.row(name), {"name": name, **values, **note})

    def exact(self) -> None:
        """Generate and judge the clips of the exact model, and record the calls of its transformer."""
        pipe, measured = self.pipe(), {}
        for name in GROUPS:
            group = self.group(name, self.options.prompts)
            found = measure_teacher(pipe, group, self.how, self.place.exact / name, autocast=False)
            measured[name] = found.as_json()
        with Calls(pipe.transformer) as calls:
            for name in GROUPS:
                group = self.group(name, min(VELOCITIES, self.options.prompts))
                generate(pipe, Job(prompts=group.prompts, seeds=group.seeds, **dataclasses.asdict(self.how)))
        calls.save(self.place.exact / "calls.safetensors")
        self.row("exact", {"measured": measured, **sizes_of(pipe.transformer)})
        (self.place.exact / "complete").touch()

    def calibration(self, pipe: Any, seed: int) -> Calibration:
        """Return the calibration points, which are the same for all recipes with this seed."""
        config = CalibrationConfig(**self.size, **self.call, points=self.options.points, seed=seed, batch_size=8)
        return Calibration(pipe, self.prompts(self.options.calibration), config)

    def make(self, arm: Arm) -> None:
        """Quantise the model of an arm and save its transformer. An interrupted training continues."""
        began, work = time.monotonic(), self.place.work(arm)
        resumed = work.is_dir()
        shutil.rmtree(self.place.model(arm), ignore_errors=True)
        with replacing(self.place.model(arm)) as part:
            said = self.quantized(arm, part) if arm.begins is None else self.trained(arm, arm.begins, part)
            seconds = None if resumed else round(time.monotonic() - began, 1)
            write_row(part / "made.json", {"seconds": seconds, **said})
            write_own(part, weights_of(self.folder))
        shutil.rmtree(work, ignore_errors=True)

    def quantized(self, arm: Arm, part: Path) -> dict[str, Any]:
        """Quantise by a recipe of `postgen.quant`."""
        pipe, recipe, more = self.pipe(), recipe_of(arm.recipe), dict[str, Any]()
        if recipe.calibrated:
            more = {"calibration": self.calibration(pipe, arm.seed), "output_dir": self.place.work(arm)}
            more |= {"resume": True, "seed": arm.seed}
        if self.options.block_steps and any(stage.trains for stage in recipe.stages):
            more["steps"] = self.options.block_steps
        if any("weight" in stage.trains for stage in recipe.stages):
            more["rates"] = self.options.rates
        report = quantize(pipe, QuantSpec(**FORMATS[arm.format]), recipe=arm.recipe, progress=False, **more)
        print(report, flush=True)
        pipe.transformer.save_pretrained(part / PART)
        noise = [each.qsnr for each in report.layers.values()]
        steps = [self.options.block_steps or stage.steps for stage in recipe.stages if stage.trains]
        return {"weights_db": sum(noise) / len(noise), "steps": steps}

    def training(self, arm: Arm, begins: Arm) -> QuantTrainingConfig:
        """Return the settings of E2E-QP: those of `RECIPE` without branches."""
        return self.configured(self.place.work(arm), arm.seed, student=str(self.place.model(begins)))

    def configured(self, run: Path, seed: int, **more: Any) -> QuantTrainingConfig:
        """Return the settings of a training in the folder `run`."""
        values = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
        for name in ("quantization", "branch_rank", "branch_decay_steps", "branch_learning_rate", "eval_dataset"):
            values.pop(name, None)
        cuda = self.options.device == "cuda"
        values |= {"output_dir": str(run), "model": str(self.folder), **self.size, **self.call}
        values |= {"train_dataset": str(self.place.prompts), "seed": seed}
        values |= {"eval_steps": 0, "eval_on_start": False, "save_steps": 100, "report_to": "none"}
        values |= {"max_steps": self.options.e2e_steps, "per_device_train_batch_size": self.options.batch}
        values |= {"warmup_steps": self.options.e2e_steps // 33}
        values |= {"disable_tqdm": True, "device": self.options.device, "bf16": cuda}
        values |= {"resume_from_checkpoint": "auto"}
        return QuantTrainingConfig.from_dict({**values, **more})

    def latents(self, seed: int) -> None:
        """Sample the latents for all trainings of scales with a seed, in a training of one step."""
        run, place = self.place.out / "work" / f"latents.{seed}", self.place.latents(seed)
        if not place.is_dir():
            trained_whole(self.configured(run, seed, max_steps=1, warmup_steps=0, quantization={"weight": "int8"}))
            place.parent.mkdir(parents=True, exist_ok=True)
            (run / "latents").rename(place)
        shutil.rmtree(run, ignore_errors=True)

    def trained(self, arm: Arm, begins: Arm, part: Path) -> dict[str, Any]:
        """Train the scales of the arm that this one begins with.

        Raises:
            SystemExit: the training was interrupted.
        """
        config, link = self.training(arm, begins), self.place.work(arm) / "latents"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(self.place.latents(arm.seed).resolve())  # so the run does not sample the latents again
        trained_whole(config)
        shutil.copytree(Path(config.output_dir) / "export" / PART, part / PART)
        return {"steps": [config.max_steps]}

    def measure(self, arm: Arm) -> None:
        """Generate, judge and compare the clips of a quantised model, and write its row."""
        pipe, folder = self.pipe(), self.place.model(arm)
        stock, work = pipe.transformer, self.place.out / "work" / f"measure-{arm.name}"
        # The import of postgen above registers the quantised layers with diffusers.
        pipe.transformer = type(stock).from_pretrained(folder / PART).to(self.options.device)
        measured, picture = {}, self.place.sheet(arm).with_suffix(".png")
        picture.parent.mkdir(parents=True, exist_ok=True)
        for name in GROUPS:
            shown = picture if name == GROUPS[-1] and not arm.seed else None
            group = self.group(name, self.options.prompts)
            place = self.place.exact / name
            kept = work / name
            found = measure_student(pipe, group, self.how, place, shown, arm.name, work=kept, autocast=False)
            measured[name] = found.as_json()
        if picture.is_file():
            small_picture(picture, self.place.sheet(arm))
        row = {"recipe": arm.recipe, "format": arm.format, "seed": arm.seed, **sizes_of(pipe.transformer)}
        row |= velocity_error(pipe.transformer, self.place.exact / "calls.safetensors", self.options.device)
        made = json.loads((folder / "made.json").read_text(encoding="utf-8"))
        self.row(arm.name, {**row, **made, "measured": measured, "exact_bytes": sizes_of(stock)["bytes"]})
        shutil.rmtree(work, ignore_errors=True)

    def checks(self) -> None:
        """Measure exact properties: reference numbers, folds, and the round trip through files."""
        self.row("checks", checks(self.pipe().transformer, self.place.out / "work" / "checks"))

    def advice(self) -> None:
        """Measure the crest factors of weights and inputs, and where integers and floating point cross."""
        pipe = self.pipe()
        self.row("advice", advice_of(pipe.transformer, self.calibration(pipe, 0)))

    def __call__(self) -> None:
        """Run the job."""
        job, name = getattr(self, self.options.job), self.options.name
        if not name:
            job()
        else:
            job(int(name) if self.options.job == "latents" else Arm.named(name))


def trained_whole(config: QuantTrainingConfig) -> None:
    """Train to the last step.

    Raises:
        SystemExit: the training was interrupted, and has saved its state.
    """
    if QuantTrainer(config).train().reason is not Reason.DONE:
        raise SystemExit("the training was interrupted before its last step: run the command again")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command-line options that all jobs of a folder share."""
    add = parser.add_argument
    add("--model", default="embedded", help="folder of another model than the embedded one")
    add("--out", type=Path, default=Path("runs/quant"), help="output folder")
    add("--prompts", type=int, default=512, help="prompts of the measurement, half with two bodies (default: 512)")
    add("--calibration", type=int, default=65, help="prompts of the calibration, the last one held out (default: 65)")
    add("--points", type=int, default=256, help="calibration points, each with and without its prompt (default: 256)")
    add("--block_steps", type=int, default=0, help="training steps of each block (default: those of the recipe)")
    add("--rates", type=float, default=10.0, help="factor of the learning rates where weights train (default: 10)")
    add("--e2e_steps", type=int, default=500, help="steps of e2e_qp (default: 500)")
    add("--batch", type=int, default=32, help="clips per step of e2e_qp (default: 32)")
    for name, what in zip(SIZES, ("sampling steps", "pixels of a side", "frames"), strict=True):
        add(f"--{name}", type=int, help=f"{what} (default: the value of the model)")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=usual, choices=["cpu", "cuda"], help="device of the models")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=[*NAMED, "exact", "checks", "advice"], help="kind of the job")
    parser.add_argument("name", nargs="?", default="", help="name of the arm for make and measure, seed for latents")
    add_options(parser)
    options = parser.parse_args(argv)
    if (options.job in NAMED) != bool(options.name):
        parser.error("make and measure need the name of an arm, and latents a seed; the other jobs have none")
    Work(options)()
    return 0


if __name__ == "__main__":
    sys.exit(main())
