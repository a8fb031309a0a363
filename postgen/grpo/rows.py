"""Checks of the prompt rows against the model and the rewards, before anything is drawn."""

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
    """Check the sizes of clips, the LoRA to continue from, and the columns and images of every prompt row.

    Args:
        args: the configuration.
        source: the model: a folder, a hub id, a pipeline, or None for the embedded model.
        sets: sets of prompts; None is skipped.
        here: do not contact the hub; checks that need a hub model's files are then left out.

    Raises:
        UserError: the model cannot make clips of these sizes, the LoRA cannot be read, or a row is wrong. The message
            names the first wrong row. A row is wrong if a column has a name reserved for arguments of rewards, if its
            negative prompt is not a text, or if its image cannot be read, is not supported by the model, or is missing
            for a model that needs one.
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
        raise UserError(
            f"{where} has a column {taken[0]!r}, which is the name of an argument of rewards: rename the column"
        )
    negative = row.get("negative_prompt")
    if negative is not None and not isinstance(negative, str):
        raise UserError(f"{where}: its negative_prompt is {shown(negative)}, it must be a text")


def _check_image(image: Any, where: str, use: tuple[str, bool, bool] | None, seen: set[str]) -> None:
    name, takes, needs = use or ("", True, False)
    if image is None:
        if needs:
            raise UserError(
                f"{where} has no image, but {name} needs a first frame: give every row an image, or use another model"
            )
        return
    if not takes:
        raise UserError(f"{where} has an image, but {name} takes text only: remove the image, or use another model")
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
        raise UserError(f"{where}: its image is {shown(image)}, it must be a file name, a PIL image or a tensor")


def _images(source: Any, here: bool) -> tuple[str, bool, bool] | None:
    """Return (class name of the pipeline, whether it takes an image, whether it needs one).

    The result is None for a hub id with `here`, because the model's files may not be on this machine yet.
    """
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
