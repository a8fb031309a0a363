"""The model card of a run: model, data and settings, curves, and samples before and after training."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from postgen.families.lora_file import WEIGHTS
from postgen.versions import version_of

from .run_curves import Curves

_CONTROL = (
    "**Control experiment, not a model for use:** the advantages were shuffled within each group"
    " (`shuffle_advantages`), so this model learned nothing from the rewards."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """The facts of a run that its model card shows."""

    source: Any
    """The base model: a folder, a hub id, a pipeline, or None for the embedded model."""
    pipeline: str
    """Class name of the base model's pipeline."""
    trainer: str
    """Class name of the trainer."""
    method: str
    """Name of the method; empty for a trainer made in Python."""
    step: int
    """Number of updates (optimiser steps) done."""
    lora: bool
    """True if LoRA adapters were trained, false if all weights were."""
    modules: Mapping[str, Any]
    """The trained networks by component name."""
    data: Sequence[str]
    """Lines about what the model learned from: rewards, prompts, clips."""
    settings: Mapping[str, Any]
    """The configuration as plain values."""
    merge: Mapping[str, Any] = field(default_factory=dict)
    """Report of the merge of checkpoints at the end of the run (`merge_last.json`); empty without one."""


def write_card(card: Card, curves: Curves, run: Path, folder: Path) -> None:
    """Write the model card `README.md` and its pictures into an export.

    The pictures are `curves.png`, and the contact sheets `before.png` and `after.png` if the run wrote samples.

    Args:
        card: facts of the run.
        curves: metrics of the run over its steps.
        run: folder of the run.
        folder: folder of the export, which must exist.
    """
    drawn = curves.draw(folder / "curves.png")
    sheets = sorted((run / "samples").glob("step-*.png"))
    before = [path for path in sheets if path.stem == "step-000000"]
    for name, found in (("before.png", before), ("after.png", [path for path in sheets if path not in before][-1:])):
        for path in found:
            shutil.copyfile(path, folder / name)
    (folder / "README.md").write_text(_text(card, folder, drawn), encoding="utf-8")


def _text(card: Card, folder: Path, curves: list[str]) -> str:
    base, hub = _base(card.source)
    average = card.settings["ema_decay"]
    lines = [
        "---",
        "library_name: diffusers",
        *([f"base_model: {base}"] if hub else ()),
        f"tags: [postgen, {card.method or card.trainer}{', lora' if card.lora else ''}]",
        "---",
        "",
        f"# {base} after {card.step} updates of {card.trainer}",
        "",
        *((_CONTROL, "") if card.settings.get("shuffle_advantages") else ()),
        f"- Base: {base} ({card.pipeline})",
        f"- Trained: {'LoRA' if card.lora else 'all weights'} of {', '.join(card.modules)}",
        *(f"- {line}" for line in card.data),
        f"- Averaged weights: {'decay ' + format(average, 'g') if average else 'no'}",
        *_merge(card.merge),
        f"- Command: `{_command()}`",
        "- Versions: " + ", ".join(f"{name} {version_of(name)}" for name in ("torch", "diffusers", "peft")),
        "",
        *_use(card),
        *([f"![curves](curves.png)\n\n{', '.join(curves)} over steps.\n"] if curves else ()),
        *(
            f"## {name.capitalize()}\n\n![{name}]({name}.png)\n"
            for name in ("before", "after")
            if (folder / f"{name}.png").is_file()
        ),
        "## Settings",
        "",
        "```json",
        json.dumps(dict(card.settings), indent=1),
        "```",
        "",
    ]
    return "\n".join(lines)


def _merge(report: Mapping[str, Any]) -> list[str]:
    """Return the line about a merge of checkpoints, whose weights no curve and no sample of the run shows."""
    if report.get("exported") != "merged":
        return []
    steps = ", ".join(map(str, report["steps"]))
    metric, last, merged = (report.get(name) for name in ("metric", "last", "merged"))
    judged = f", {metric} {merged:.6g} (last weights: {last:.6g})" if None not in (metric, last, merged) else ""
    return [
        f"- Merge: the weights are the merge of the checkpoints of steps {steps} ({report['kind']}){judged}; curves"
        " and samples are those of the run before the merge"
    ]


def _command() -> str:
    """Return the command line of this process, quoted for a shell."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    if module is not None:
        return shlex.join(["python", "-m", module.name.removesuffix(".__main__"), *sys.argv[1:]])
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _base(source: Any) -> tuple[str, bool]:
    """Return the name of the base model, and whether that name looks like a hub id."""
    if source is None:
        return "the embedded model of postgen", False
    if isinstance(source, str | Path):
        name = str(source)
    else:
        name = str(getattr(source, "name_or_path", None) or "") or f"a {type(source).__name__} made in Python"
    return name, name.count("/") == 1 and not Path(name).exists()


def _use(card: Card) -> list[str]:
    """Return the lines of the card that load the export; those of a pipeline that is not in diffusers differ."""
    import diffusers

    known = hasattr(diffusers, card.pipeline)
    if not card.lora:
        classes = {name: _class_of(module) for name, module in card.modules.items()}
        homes = sorted({(_home_of(module, classes[name]), classes[name]) for name, module in card.modules.items()})
        lines = [
            *(f"from {home} import {kind}" for home, kind in homes),
            "",
            *(
                f'pipe.{name} = {kind}.from_pretrained("THIS_FOLDER", subfolder="{name}")'
                for name, kind in classes.items()
            ),
        ]
    elif known:
        lines = _load_loras([*card.modules])
    else:  # only diffusers' own pipelines have a loader that fits their networks
        lines = [_load_adapter(name, alone=len(card.modules) == 1) for name in card.modules]
    told = ["`pipe` is the pipeline of the base model.", "", "```python", *lines, "```", ""]
    option = "--lora" if card.lora else "--model"
    return [*told, f"On the command line: `postgen generate PROMPT {option} THIS_FOLDER`.", ""] if known else told


def _load_adapter(name: str, *, alone: bool) -> str:
    folder, part = "THIS_FOLDER" if alone else f"THIS_FOLDER/{name}", "unet" if name == "unet" else "transformer"
    return f'pipe.{name}.load_lora_adapter("{folder}", prefix="{part}", weight_name="{WEIGHTS}")'


def _home_of(module: Any, kind: str) -> str:
    """Return the module from which a class can be imported."""
    import diffusers

    own = next((parent.__module__ for parent in type(module).__mro__ if parent.__name__ == kind), "diffusers")
    return "diffusers" if hasattr(diffusers, kind) else own


def _load_loras(networks: list[str]) -> list[str]:
    """Return the lines that load a LoRA; each of two experts has its LoRA in its own sub-folder."""
    if len(networks) == 1:
        return ['pipe.load_lora_weights("THIS_FOLDER")']
    first, second = networks
    return [
        f'pipe.load_lora_weights("THIS_FOLDER/{first}")',
        f'pipe.load_lora_weights("THIS_FOLDER/{second}", load_into_{second}=True)',
    ]


def _class_of(module: Any) -> str:
    # `fully_shard` replaces the class of a module, so the name of the diffusers class is read from the config.
    return str(module.config.get("_class_name", type(module).__name__))
