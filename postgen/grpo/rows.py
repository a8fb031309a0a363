"""Rows of prompts against the model and the rewards: what is wrong with one is found before anything is drawn."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import Tensor

from postgen.assets import embedded_model
from postgen.errors import UserError, shown
from postgen.families.loading import inspect_model
from postgen.families.lora import check_lora
from postgen.families.model_folder import is_hub_id
from postgen.families.video_calls import ROWS, UNKNOWN
from postgen.rewards.batches import RESERVED
from postgen.sampling.conditions import Row
from postgen.training.prompts import Prompts
from postgen.video import check_picture

from .config import GroupConfig


def check_data(args: GroupConfig, source: Any, *sets: Prompts | None, here: bool = False) -> None:
    """Hold the sizes of clips, the columns of every row and every picture to what the model and rewards take.

    Args:
        args: sizes of clips, and the LoRA to go on from.
        source: the model: a folder, a hub id, a pipeline, or None for the embedded one.
        sets: prompts; None is passed over.
        here: leave alone what a model on the hub takes.

    Raises:
        UserError: sizes that the model cannot make, or names the first row that is wrong: a column under a name that
            rewards are given, a text that is none, a picture that cannot be read, that the model does not take, or
            that it needs and that is absent.
    """
    args.check_size(source, here=here)
    if args.lora_path is not None:
        check_lora(args.lora_path)
    use = _images(source, here)
    seen: set[str] = set()
    for prompts in sets:
        for number, row in enumerate(prompts.rows if prompts is not None else (), 1):
            assert prompts is not None
            where = f"row {number} of {prompts.name}"
            _check_columns(row, where)
            _check_image(row.get("image"), where, use, seen)


def _check_columns(row: Row, where: str) -> None:
    if taken := sorted(RESERVED & row.keys()):
        raise UserError(f"{where} has a column {taken[0]!r}, a name that rewards are given: name it otherwise")
    negative = row.get("negative_prompt")
    if negative is not None and not isinstance(negative, str):
        raise UserError(f"{where}: its negative_prompt is {shown(negative)}, it must be a text")


def _check_image(image: Any, where: str, use: tuple[str, bool, bool] | None, seen: set[str]) -> None:
    name, takes, needs = use or ("", True, False)
    if image is None:
        if needs:
            raise UserError(
                f"{where} has no image, which {name} starts from: give every row one, or use another model"
            )
        return
    if not takes:
        raise UserError(f"{where} has an image, and {name} takes text only: leave it out, or use another model")
    if isinstance(image, str | Path):
        if str(image) not in seen:
            seen.add(str(image))
            try:
                check_picture(image)
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
    elif isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise UserError(f"{where}: its image has the shape {tuple(image.shape)}, it must be (3, H, W)")
    elif not hasattr(image, "convert"):
        raise UserError(f"{where}: its image is {shown(image)}, it must be the name of a file, or a picture")


def _images(source: Any, here: bool) -> tuple[str, bool, bool] | None:
    """Return the pipeline class, and whether it takes and needs a picture; None where that is not known yet."""
    if source is not None and not isinstance(source, str | Path):
        if not hasattr(source, "to"):
            raise UserError(f"the model is {shown(source)}, it must be a folder, a hub id or a diffusers pipeline")
        name, takes = type(source).__name__, "image" in inspect.signature(type(source).__call__).parameters
        return name, takes, takes and not ROWS.get(name, UNKNOWN).image_optional
    folder = embedded_model() if source is None else source
    if here and is_hub_id(folder):
        return None
    facts = inspect_model(folder, images=True)
    return facts.pipeline, facts.takes_image, facts.needs_image
