"""Run one job of `python -m benchmarks.lit_video` in its own process; see `benchmarks.lit_video_arms` for the jobs."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.command import ended
from benchmarks.embedded_sampling import Defaults, load
from benchmarks.gates import device
from benchmarks.lit_video_arms import (
    ARMS,
    MEASURED,
    Job,
    chosen_blocks,
    conversion,
    plan_density,
    softmax_pairs,
    timed_plan,
)
from benchmarks.lit_video_measure import Measured, compared, group_of, measure_student, measure_teacher
from postgen.assets import model_folder
from postgen.families import denoiser_for
from postgen.files import replacing
from postgen.info import versions
from postgen.lit import (
    LitConfig,
    Scores,
    apply_adapter,
    convert,
    count,
    layers_of,
    save,
    save_adapter,
    score,
    transfer,
)
from postgen.lit.attention_transfer import grid_of
from postgen.lit.student import give, is_new
from postgen.lit.train_config import LitTrainingConfig
from postgen.lit.trainer import LitTrainer
from postgen.reconstruct import ReconstructConfig, RecordsConfig
from postgen.tensor_files import read_tensors
from postgen.training import Reason
from postgen.training.prompts import Prompts

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "lit-tiny-wan.yaml"
SIZES = ("steps", "size", "frames")
"""Options that change the generation of clips."""
SCORED = 8
"""Number of prompts on whose trajectories the layers are scored."""


class Work:
    """A job with the teacher, the sizes and the prompts that it needs."""

    def __init__(self, job: Job, options: argparse.Namespace) -> None:
        self.job, self.options = job, options
        self.folder = model_folder(options.model).absolute()
        self.how = Defaults.of(self.folder)
        given = {name: getattr(options, name) for name in SIZES if getattr(options, name)}
        self.how = dataclasses.replace(self.how, **given)
        self.size = {"num_frames": self.how.frames, "height": self.how.size, "width": self.how.size}
        self.rows = Prompts(str(job.out / "prompts.jsonl"), "prompts", seed=0, shuffle=False).rows

    def teacher(self) -> Any:
        """Load the teacher."""
        return load(self.folder, self.options.device)

    def group(self, name: str) -> Any:
        """Return a group of prompts for the measurement."""
        return group_of(name, self.options.prompts, self.how)

    def groups(self) -> tuple[str, ...]:
        """Return the names of the measured groups: one body, and with --two also two bodies."""
        return ("one", "two") if self.options.two else ("one",)

    def training(self, **more: Any) -> LitTrainingConfig:
        """Return the settings of stage 2: those of `RECIPE`, changed for this experiment, then changed by `more`."""
        values = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
        # Stage 1 is a separate job.
        for name in ("conversion", "levels_per_prompt", "held_out_prompts", "eval_dataset"):
            values.pop(name)
        values = {name: value for name, value in values.items() if not name.startswith("transfer_")}
        values |= {"output_dir": str(self.job.lasting), "model": str(self.folder), **self.size, "eval_steps": 0}
        values |= {"train_dataset": str(self.job.out / "prompts.jsonl"), "eval_on_start": False, "save_steps": 0}
        values |= {"save_seconds": 60.0}  # so that a killed job loses little
        values |= {"num_inference_steps": self.how.steps}
        values |= {"guidance_scale": self.how.guidance, "report_to": "none", "disable_tqdm": True}
        values |= {"per_device_train_batch_size": self.options.batch, "max_steps": self.options.max_steps}
        values |= {"learning_rate": 1e-4, "learning_rate_new": 1e-3, "device": self.options.device}
        values |= {"bf16": self.options.device == "cuda", "lr_scheduler_type": "cosine"}
        return LitTrainingConfig.from_dict({**values, **more})

    def teacher_job(self) -> dict[str, Any]:
        """Generate and judge the teacher's clips."""
        pipe, found = self.teacher(), {}
        for name in self.groups():
            found[name] = measure_teacher(pipe, self.group(name), self.how, self.job.lasting / name).as_json()
            right = found[name]["right"]
            print(f"teacher, {name}: {right.count('1')} of {len(right)} right", flush=True)
        return {"measured": found}

    def latents_job(self) -> dict[str, Any]:
        """Sample the latents for the training of all students of the folder."""
        seed, run = int(self.job.name.split(".")[1]), self.job.out / "work" / self.job.name
        if not self.job.lasting.exists():  # otherwise an earlier call was stopped just before it wrote the result
            resumed = {"output_dir": str(run), "resume_from_checkpoint": "auto"}
            whole(self.training(conversion={"layers": "1:lit"}, max_steps=1, seed=seed, **resumed))
            self.job.lasting.parent.mkdir(exist_ok=True)
            (run / "latents").rename(self.job.lasting)
        return {"latents": len(self.rows)}

    def transfer_job(self) -> dict[str, Any]:
        """Run stage 1, attention transfer of layers of one type in every block; then score the layers."""
        (kind, _, seed), options = self.job.parts, self.options
        pipe = self.teacher()
        stock = copy.deepcopy(pipe.transformer)
        grid = grid_of(denoiser_for(pipe), self.rows[0], self.size)
        config = conversion(kind, "all", grid, seed)
        records = RecordsConfig(
            **self.size,
            num_inference_steps=self.how.steps,
            levels_per_prompt=min(5, self.how.steps),
            guidance_scale=self.how.guidance,
            batch_size=min(8, options.transfer_prompts // 2),
            held_out_prompts=options.transfer_prompts // 9 or 1,
            seed=seed,
            max_gb=60,
        )
        train = ReconstructConfig(
            output_dir=str(self.job.lasting / "transfer"),
            resume=True,
            max_steps=options.transfer_steps,
            warmup_steps=options.transfer_steps // 10,
            learning_rate_new=1e-3,
            seed=seed,
            bf16=options.device == "cuda",
            device=options.device,
            disable_tqdm=True,
        )
        rows = self.rows[: options.transfer_prompts]
        report = transfer(pipe, config, rows, records=records, train=train, blocks_at_a_time=4)
        if report.unfinished:
            raise SystemExit("the attention transfer was interrupted before its last block: run the command again")
        size = save_adapter(pipe.transformer, self.job.lasting / "adapter.safetensors")
        student, pipe.transformer = pipe.transformer, stock
        texts, kinds = [row["prompt"] for row in self.rows[-SCORED:]], [report_kind(config)]

        def sample() -> None:
            sizes = {**self.size, "num_inference_steps": self.how.steps, "guidance_scale": self.how.guidance}
            with torch.autocast(pipe.device.type, torch.bfloat16, enabled=options.device == "cuda"):
                pipe(texts, **sizes, output_type="latent", generator=torch.Generator("cpu").manual_seed(seed))

        found = score(stock, sample, kinds=kinds, config=config, students={kinds[0]: student})
        found.save(self.job.lasting / "scores.json")
        print(found, flush=True)
        return {"scores": json.loads((self.job.lasting / "scores.json").read_text()), "bytes": size} | {
            "transfer": report.table()
        }

    def student_job(self) -> dict[str, Any]:
        """Convert the chosen blocks, train them with the stages of the arm, and measure the student."""
        kind, name, seed = self.job.parts
        arm, pipe = ARMS[name], self.teacher()
        grid = grid_of(denoiser_for(pipe), self.rows[0], self.size)
        before = dataclasses.replace(self.job, name=f"s1.{kind}.{seed}")
        scores = Scores.load(before.lasting / "scores.json")
        costs = count(
            pipe.transformer, **self.size, kinds=[*scores.errors], config=conversion(kind, "all", grid, seed)
        )
        layers = chosen_blocks(scores, costs, arm.share)
        config = conversion(kind, layers, grid, seed)
        stock = copy.deepcopy(pipe.transformer)
        convert(pipe.transformer, config)
        if arm.s1:
            trained = read_tensors(before.lasting / "adapter.safetensors")
            there = pipe.transformer.state_dict()
            give(pipe.transformer, {name: value for name, value in trained.items() if is_new(name) and name in there})
        begun = time.monotonic()
        if arm.s2:
            pipe = self.trained(pipe, arm.train, seed)
        seconds = time.monotonic() - begun
        size = save_adapter(pipe.transformer, self.job.lasting / "adapter.safetensors", base=stock)
        row = self.measured(pipe)
        made = layers_of(pipe.transformer)
        return {
            **row,
            "layers": list(layers),
            "share": arm.share,
            "layer_density": softmax_pairs(next(iter(made.values())), grid),
            "plan_density": plan_density(made, len(layers), grid),
            "timed_as": timed_plan(kind, arm.share),
            "adapter_bytes": size,
            "training_seconds": round(seconds, 1),
        }

    def trained(self, pipe: Any, what: str, seed: int) -> Any:
        """Train a student end to end; return a pipeline with the exported student."""
        begin, run = self.job.lasting / "begin", self.job.lasting / "run"
        save(pipe.transformer, begin)
        run.mkdir(parents=True, exist_ok=True)
        drawn = self.job.out / "drawn" / f"latents.{seed}"
        (run / "latents").unlink(missing_ok=True)
        (run / "latents").symlink_to(drawn.resolve())  # so the run does not sample the latents again
        resumed = {"resume_from_checkpoint": "auto"}  # a call that ended in time left a checkpoint
        whole(self.training(student=str(begin), output_dir=str(run), train=what, seed=seed, **resumed))
        pipe = self.teacher()
        apply_adapter(pipe.transformer, run / "export")
        return pipe

    def measured(self, pipe: Any) -> dict[str, Any]:
        """Measure a student and return its numbers together with those of the teacher."""
        teacher = dataclasses.replace(self.job, name="teacher")
        theirs = json.loads(teacher.result.read_text(encoding="utf-8"))["measured"]
        found: dict[str, Any] = {"measured": {}, "teacher": {}}
        for name in self.groups():
            picture = self.job.result.with_suffix(".png") if name == "one" else None
            work = self.job.lasting / "measured" / name
            ours = measure_student(
                pipe, self.group(name), self.how, teacher.lasting / name, picture, self.job.name, work=work
            )
            found["measured"][name], found["teacher"][name] = ours.as_json(), theirs[name]
            numbers = compared([ours], [Measured.from_json(theirs[name])])
            found[name] = numbers
            print(f"{self.job.name}, {name}: {numbers}", flush=True)
        return found | {"right": found["measured"]["one"]["right"], "psnr": found["one"]["psnr"]}

    def __call__(self) -> None:
        """Run the job and write its result."""
        name, begun = self.job.name, time.monotonic()
        kinds = {"teacher": self.teacher_job, "latents": self.latents_job, "s1": self.transfer_job}
        work = kinds.get(name.split(".")[0], self.student_job)
        result = {"job": name, **work(), "seconds": round(time.monotonic() - begun, 1), "device": device()}
        settings = {key: value for key, value in vars(self.options).items() if key not in ("name", "out")}
        result |= {"versions": versions(), "settings": settings}
        with replacing(self.job.result) as part:
            part.write_text(json.dumps(result) + "\n", encoding="utf-8")


def whole(args: LitTrainingConfig) -> None:
    """Train to the end. An interrupted run saves and returns; the job must then end, and not measure the student."""
    if LitTrainer(args).train().reason is not Reason.DONE:
        raise SystemExit("the training was interrupted before its last step: run the command again")


def report_kind(config: LitConfig) -> str:
    """Return the layer type of a conversion of all blocks."""
    return str(config.layers).removeprefix("all:")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command-line options that all jobs of a folder share."""
    add = parser.add_argument
    add("--model", default="runs/tiny-wan-fine/export", help="folder of the teacher, or embedded (the embedded model)")
    add("--out", type=Path, default=Path("runs/lit-video"), help="output folder")
    add("--prompts", type=int, default=MEASURED, help=f"number of prompts for the measurement (default: {MEASURED})")
    add("--two", action="store_true", help="also measure prompts of two bodies")
    add("--max_steps", type=int, default=400, help="steps of stage 2 (default: 400)")
    add("--batch", type=int, default=32, help="clips per step of stage 2 (default: 32)")
    add("--transfer_steps", type=int, default=300, help="steps per block in stage 1 (default: 300)")
    add("--transfer_prompts", type=int, default=72, help="prompts of stage 1, a ninth of them held out (default: 72)")
    for name, what in zip(SIZES, ("sampling steps", "pixels of a side", "frames"), strict=True):
        add(f"--{name}", type=int, help=f"{what} (default: the value of the model's folder)")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=usual, choices=["cpu", "cuda"], help="device of the models")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="name of the job")
    add_options(parser)
    options = parser.parse_args(argv)

    def work() -> int:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        # Checkpoints contain this path, and another spelling of it would count as another run.
        Work(Job(name=options.name, out=options.out.absolute()), options)()
        return 0

    return ended("benchmarks.lit_video_job", work)


if __name__ == "__main__":
    sys.exit(main())
