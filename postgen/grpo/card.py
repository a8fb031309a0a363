"""The model card of a run: what was trained on what, the curves, samples before and after."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .curves import draw_curves

if TYPE_CHECKING:
    from .group import GroupTrainer


def write_card(trainer: GroupTrainer[Any], folder: Path) -> None:
    """Write `README.md` into an export, with `curves.png`, and sheets before and after where there are samples."""
    args = trainer.args
    curves = draw_curves(args.folder / "metrics.jsonl", folder / "curves.png")
    sheets = sorted((args.folder / "samples").glob("step-*.png"))
    before = [path for path in sheets if path.stem == "step-000000"]
    for name, found in (("before.png", before), ("after.png", [path for path in sheets if path not in before][-1:])):
        for path in found:
            shutil.copyfile(path, folder / name)
    (folder / "README.md").write_text(_text(trainer, folder, curves), encoding="utf-8")


def _text(trainer: GroupTrainer[Any], folder: Path, curves: list[str]) -> str:
    args, policy = trainer.args, trainer.policy
    base, hub = _base(trainer)
    rewards = ", ".join(
        f"{name} (weight {weight:g})"
        for name, weight in zip(trainer.runner.names, trainer.runner.weights, strict=True)
    )
    lines = [
        "---",
        "library_name: diffusers",
        *([f"base_model: {base}"] if hub else ()),
        f"tags: [postgen, {args.method or type(trainer).__name__}{', lora' if policy.adapter else ''}]",
        "---",
        "",
        f"# {base} after {trainer.global_step} updates of {type(trainer).__name__}",
        "",
        f"- Base: {base} ({type(policy.pipe).__name__})",
        f"- Trained: {'LoRA' if policy.adapter else 'all weights'} of {', '.join(policy.modules)}",
        f"- Rewards: {rewards}",
        f"- Prompts: {len(trainer.prompts)} of {args.train_dataset or 'rows given in Python'}",
        f"- Averaged weights: {'decay ' + format(args.ema_decay, 'g') if args.ema_decay else 'no'}",
        f"- Command: `{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`",
        "- Versions: " + ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft")),
        "",
        *_use(trainer),
        *([f"![curves](curves.png)\n\n{', '.join(curves)} over steps.\n"] if curves else ()),
        *(
            f"## {name.capitalize()}\n\n![{name}]({name}.png)\n"
            for name in ("before", "after")
            if (folder / f"{name}.png").is_file()
        ),
        "## Settings",
        "",
        "```json",
        json.dumps(args.to_dict(), indent=1),
        "```",
        "",
    ]
    return "\n".join(lines)


def _base(trainer: GroupTrainer[Any]) -> tuple[str, bool]:
    """Return the name of the model that was trained, and whether it looks like one of the hub."""
    source = trainer.source
    if source is None:
        return "the embedded model of postgen", False
    if isinstance(source, str | Path):
        name = str(source)
    else:
        name = getattr(source, "name_or_path", None) or f"a {type(source).__name__} made in Python"
    return name, name.count("/") == 1 and not Path(name).exists()


def _use(trainer: GroupTrainer[Any]) -> list[str]:
    lines = ['pipe.load_lora_weights("THIS_FOLDER")']
    if trainer.policy.adapter is None:
        classes = {name: _class_of(module) for name, module in trainer.policy.modules.items()}
        lines = [
            f"from diffusers import {', '.join(sorted({*classes.values()}))}\n",
            *(
                f'pipe.{name} = {kind}.from_pretrained("THIS_FOLDER", subfolder="{name}")'
                for name, kind in classes.items()
            ),
        ]
    return ["`pipe` is the pipeline of the base model.", "", "```python", *lines, "```", ""]


def _class_of(module: Any) -> str:
    # A sharded model's class is made up by torch.
    return str(module.config.get("_class_name", type(module).__name__))
