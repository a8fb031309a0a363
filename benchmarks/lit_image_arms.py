"""Arms of the image experiment of LiT: settings on top of two recipes, and the jobs that train and measure them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.job_queue import Job
from postgen.files import replacing

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
TRUTH = "truth.0"
"""Name of a measurement of true stills in place of generated pictures: the numbers of a perfect model."""
TEACHER, YOUNG = "teacher", "young_alone"
SHARE = 5
"""The teacher's number of steps divided by that of a student, and by that of a young teacher."""
REPEATED = ("lit", "no_conv", "no_distillation", "inherit_none")
"""Students that are trained with every seed, like the teacher. All other runs use only the first seed."""
SEEDS = (0, 1, 2)
"""Seeds of the whole experiment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """Settings by which a student differs from the recipe."""

    about: str
    """Description for tables."""
    lit: Mapping[str, Any] = field(default_factory=dict)
    """Changed settings of `LitOptions`."""
    conversion: Mapping[str, Any] = field(default_factory=dict)
    """Changed settings of `LitConfig`."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Changed settings of the method `lit`."""
    teacher: str = TEACHER
    """Teacher from which the student is distilled."""
    start: str = ""
    """Initial weights: "" for those of `teacher`, the name of a teacher, or "random"."""


ARMS: dict[str, Arm] = {
    "lit": Arm(about="LiT: 2 heads, convolution, all weights inherited but queries, keys and values, distilled"),
    "no_conv": Arm(about="no convolution", lit={"conv_space": 0}),
    "no_distillation": Arm(about="no distillation", train={"output_weight": 0.0, "variance_weight": 0.0}),
    "inherit_none": Arm(about="initialised at random, distilled", start="random"),
    "inherit_all": Arm(about="queries, keys and values inherited too", conversion={"inherit": "all"}),
    "heads_1": Arm(about="1 head", lit={"merge_heads": 8}),
    "heads_4": Arm(about="4 heads", lit={"merge_heads": 2}),
    "heads_8": Arm(about="8 heads, like the teacher", lit={"merge_heads": 1}),
    "young": Arm(about="initialised from a young teacher, distilled from the old one", start=YOUNG),
    "young_teacher": Arm(about="initialised and distilled from a young teacher", teacher=YOUNG),
    "no_variance": Arm(about="only the noise distilled, not the variance", train={"variance_weight": 0.0}),
    "centred": Arm(about="keys centred (arXiv:2605.02772)", lit={"center_keys": True}),
    "softmax": Arm(about="control: softmax, trained further in the same way", conversion={"layers": "all:softmax"}),
}
"""Students, all trained for the same number of steps."""
TEACHERS = {TEACHER: "teacher, softmax", YOUNG: "young teacher, a fifth of the steps"}
ALL_ARMS = (TEACHER, *ARMS, YOUNG)
"""All arms, in the order in which they are run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Size of the experiment: settings on top of the recipes, and numbers of pictures."""

    teacher: Mapping[str, Any]
    student: Mapping[str, Any]
    classes: int
    """Number of sampled classes, evenly spread over all classes."""
    per_class: int
    """Number of pictures per class."""
    draws: int
    """Number of bootstrap draws of the Frechet distance."""


FULL = Size(teacher={}, student={}, classes=48, per_class=48, draws=200)
SHORT = Size(
    teacher={"max_steps": 100, "warmup_steps": 20, "eval_steps": 100, "eval_pictures": 12, "logging_steps": 10},
    student={"max_steps": 20, "warmup_steps": 5, "logging_steps": 5},
    classes=48,
    per_class=1,
    draws=10,
)
"""Models of the full size and few steps, to test that everything runs on a GPU."""
TINY = Size(
    teacher={
        **{"size": 32, "patch": 8, "num_layers": 1, "num_heads": 8, "head_dim": 4, "pool_pictures": 64},
        **{"max_steps": 10, "warmup_steps": 2, "per_device_train_batch_size": 8, "bf16": False, "cuda_graphs": False},
        **{"eval_pictures": 0, "eval_steps": 0, "logging_steps": 5, "save_seconds": 0.0, "ema_decay": 0.5},
        **{"eval_num_inference_steps": 4, "device": "cpu"},
    },
    student={
        **{"height": 32, "width": 32, "num_inference_steps": 4, "max_steps": 2, "warmup_steps": 1},
        **{"per_device_train_batch_size": 8, "bf16": False, "logging_steps": 1, "save_seconds": 0.0},
        **{"ema_decay": 0.5, "device": "cpu"},
    },
    classes=4,
    per_class=1,
    draws=5,
)


def names_of(arms: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Return the names ARM.SEED of the runs, those of the first seed first."""
    found = []
    for seed in seeds:
        for arm in arms:
            if seed == seeds[0] or arm == TEACHER or arm in REPEATED:
                found.append(f"{arm}.{seed}")
    return found


def all_jobs(names: list[str], out: Path, size: Size) -> dict[str, Job]:
    """Return all jobs by name: `reference`, the training runs ARM.SEED, and their measurements `measure ARM.SEED`.

    Args:
        names: runs to measure, ARM.SEED or `TRUTH`. The runs that they need are added.
        out: folder of the experiment.
        size: size of the experiment.
    """
    jobs = {"reference": _measuring("reference", out, size, ())}
    for name in names:
        for each in (*_ancestors(name), name) if name != TRUTH else ():
            jobs.setdefault(each, _training(each, out, size))
    for name in names:
        needs = ("reference",) if name == TRUTH else ("reference", name)
        jobs[f"measure {name}"] = _measuring(name, out, size, needs)
    return jobs


def _ancestors(name: str) -> tuple[str, ...]:
    """Return the names of the runs that a run needs."""
    arm, seed = name.split(".")
    if arm in TEACHERS:
        return ()
    told = ARMS[arm]
    return tuple(f"{each}.{seed}" for each in dict.fromkeys((told.teacher, told.start)) if each in TEACHERS)


def _training(name: str, out: Path, size: Size) -> Job:
    recipe = out / "recipes" / f"{name}.yaml"
    return Job(
        name=name,
        command=(sys.executable, "-m", "postgen", "train", str(recipe), "--resume_from_checkpoint", "auto"),
        mark=out / "done" / name,
        log=out / "logs" / f"{name}.log",
        needs=_ancestors(name),
        prepare=partial(prepare, name, out, size),
    )


def _measuring(name: str, out: Path, size: Size, needs: tuple[str, ...]) -> Job:
    words = ("--out", str(out), "--classes", str(size.classes), "--per_class", str(size.per_class))
    stills = settings_of("teacher.0", out, size)
    more = ("--draws", str(size.draws), "--size", str(stills["size"]), "--bodies", str(stills["bodies"]))
    place = out / ("reference.safetensors" if name == "reference" else f"measured/{name}.json")
    return Job(
        name=name if name == "reference" else f"measure {name}",
        command=(sys.executable, "-m", "benchmarks.lit_image_measure", name, *words, *more),
        check=place.exists,
        log=out / "logs" / f"measure-{name}.log",
        needs=needs,
    )


def settings_of(name: str, out: Path, size: Size) -> dict[str, Any]:
    """Return the settings of a run, including those of its conversion."""
    arm, seed = name.split(".")
    common = {"output_dir": str(out / "runs" / name), "seed": int(seed)}
    teacher = {**_read("tiny-dit"), **size.teacher, "pool_dir": str(out / "pool"), **common}
    if arm in TEACHERS:
        steps = teacher["max_steps"] // (SHARE if arm == YOUNG else 1)
        return {**teacher, "max_steps": steps, "warmup_steps": min(teacher["warmup_steps"], steps // 4)}
    told = ARMS[arm]
    found = {**_read("lit-tiny-dit"), **size.student, **copy.deepcopy(dict(told.train)), **common}
    found["conversion"] = {**found["conversion"], **told.conversion}
    found["conversion"]["lit"] = {**found["conversion"]["lit"], **told.lit}
    found["model"] = str(out / "runs" / f"{told.teacher}.{seed}" / "export")
    pool = out / "pool"
    found |= {"train_dataset": str(pool / "prompts.jsonl"), "latents": str(pool / "latents.safetensors")}
    return found


def recipe_of(name: str, out: Path, size: Size) -> dict[str, Any]:
    """Return the recipe that is written for a run.

    If the initial weights are not those of the teacher, the recipe has the folder of a converted transformer in place
    of a conversion.
    """
    settings, arm = settings_of(name, out, size), name.split(".")[0]
    if arm in ARMS and ARMS[arm].start:
        del settings["conversion"]
        settings["student"] = str(out / "starts" / name)
    return settings


def prepare(name: str, out: Path, size: Size) -> None:
    """Write the recipe of a run, and its initial transformer if the initial weights are not those of the teacher."""
    settings, (arm, seed) = recipe_of(name, out, size), name.split(".")
    folder = out / "starts" / name
    if "student" in settings and not (folder / "config.json").is_file():
        _convert(ARMS[arm].start, int(seed), settings_of(name, out, size)["conversion"], out, size, folder)
    place = out / "recipes" / f"{name}.yaml"
    place.parent.mkdir(parents=True, exist_ok=True)
    with replacing(place) as part:
        part.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def _convert(start: str, seed: int, conversion: Mapping[str, Any], out: Path, size: Size, folder: Path) -> None:
    """Convert the transformer of a teacher, or one with random weights, and save it in `folder`."""
    import torch
    from diffusers import DiTTransformer2DModel

    from postgen.lit import LitConfig, convert, save
    from postgen.pretrain.class_to_image import ClassToImageConfig, new_dit

    if start in TEACHERS:
        model = DiTTransformer2DModel.from_pretrained(out / "runs" / f"{start}.{seed}" / "export" / "transformer")
    else:
        torch.manual_seed(1000 + seed)
        told = settings_of(f"{TEACHER}.{seed}", out, size)
        model = new_dit(ClassToImageConfig.from_dict({**told, "cuda_graphs": False}))
    convert(model, LitConfig.from_json(dict(conversion)))
    folder.parent.mkdir(parents=True, exist_ok=True)
    save(model, folder)


def _read(recipe: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8"))
    return found
