"""The model card of a run: what was trained on what, the curves, samples before and after."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from .group import GroupTrainer

_WIDTH, _HEIGHT, _MARGIN = 420, 200, 34
_COLOUR = (30, 90, 200)


def write_card(trainer: GroupTrainer[Any], folder: Path) -> None:
    """Write `README.md` into an export, with `curves.png`, and sheets before and after where there are samples."""
    args = trainer.args
    curves = draw_curves(args.folder / "metrics.jsonl", folder / "curves.png")
    sheets = sorted((args.folder / "samples").glob("step-*.png"))
    for name, sheet in (("before.png", sheets[:1]), ("after.png", sheets[1:][-1:])):
        for path in sheet:
            shutil.copyfile(path, folder / name)
    (folder / "README.md").write_text(_text(trainer, folder, curves), encoding="utf-8")


def _text(trainer: GroupTrainer[Any], folder: Path, curves: list[str]) -> str:
    args, policy = trainer.args, trainer.policy
    base = args.model or "the embedded model of postgen"
    rewards = ", ".join(
        f"{name} (weight {weight:g})"
        for name, weight in zip(trainer.runner.names, trainer.runner.weights, strict=True)
    )
    lines = [
        "---",
        "library_name: diffusers",
        *([f"base_model: {args.model}"] if args.model and args.model.count("/") == 1 else ()),
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


def _use(trainer: GroupTrainer[Any]) -> list[str]:
    if trainer.policy.adapter is None:
        return []
    return ["```python", 'pipe.load_lora_weights("THIS_FOLDER")', "```", ""]


def draw_curves(metrics: Path, target: Path) -> list[str]:
    """Draw rewards over steps from `metrics.jsonl`, a plot each; return the names of those drawn."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    wanted = [
        name
        for name in dict.fromkeys(key for row in rows for key in row)
        if name in ("reward", "eval_reward", "ratio/mean", "diversity/latent_pairwise")
        or (name.startswith(("eval_rewards/", "eval_gold/")) and name.endswith("/mean"))
    ]
    curves = {name: [(row["step"], row[name]) for row in rows if row.get(name) is not None] for name in wanted}
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    if not curves:
        return []
    columns = min(2, len(curves))
    rows_drawn = -(-len(curves) // columns)
    sheet = Image.new("RGB", (columns * _WIDTH, rows_drawn * _HEIGHT), "white")
    for place, (name, points) in enumerate(curves.items()):
        _plot(ImageDraw.Draw(sheet), name, points, place % columns * _WIDTH, place // columns * _HEIGHT)
    sheet.save(target)
    return list(curves)


def _plot(draw: ImageDraw.ImageDraw, name: str, points: list[tuple[int, float]], left: int, top: int) -> None:
    steps, values = [step for step, _ in points], [value for _, value in points]
    low, high = min(values), max(values)
    width, height = _WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN
    across, up = max(1, steps[-1] - steps[0]), (high - low) or 1.0
    line = [
        (
            left + _MARGIN + width * (step - steps[0]) / across,
            top + _MARGIN + height * (1 - (value - low) / up),
        )
        for step, value in points
    ]
    frame = [left + _MARGIN, top + _MARGIN, left + _MARGIN + width, top + _MARGIN + height]
    draw.rectangle(frame, outline=(200, 200, 200))
    draw.line(line, fill=_COLOUR, width=2)
    draw.text((left + _MARGIN, top + 8), f"{name}: {values[0]:.4g} -> {values[-1]:.4g}", fill="black")
    draw.text((left + 2, top + _MARGIN - 2), f"{high:.3g}", fill="grey")
    draw.text((left + 2, top + _MARGIN + height - 8), f"{low:.3g}", fill="grey")
    draw.text((left + _MARGIN, top + _MARGIN + height + 4), f"{steps[0]} .. {steps[-1]}", fill="grey")
