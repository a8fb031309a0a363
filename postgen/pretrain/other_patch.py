"""Weights of a trained denoiser for one whose tokens are patches of another size.

Blocks, the text's and the noise level's embeddings do not see the patch and are taken as they are. A token of one
latent pixel begins with what the trained model makes of a patch whose pixels are all like it: of the patch embedding
the sum over the places of a patch, of the head the mean over them. Places are rotated by whole tokens, so that the
same distance in the picture is twice the angle, and training has to make up for that. Right after the change the
embedded model's flow error at noise levels .95, .8, .5 and .2 is .43, .26, .52 and 1.58, with a new embedding and head
1.42, 1.29, 1.45 and 2.06, before the change .20, .04, .04 and .12 (six clips of 96 px, 33 frames).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError

EMBEDDING, HEAD = "patch_embedding", "proj_out"


def take_over(transformer: Any, text_encoder: Any, tokenizer: Any, folder: Path) -> None:
    """Give a denoiser and its text encoder the weights of a trained pipeline, in place.

    Args:
        transformer: a `WanTransformer3DModel` that differs from the trained one in its patches alone, whose patches
            are one latent pixel or as large as the trained ones.
        text_encoder: as the trained one.
        tokenizer: with the words of the trained one.
        folder: of the trained pipeline.

    Raises:
        UserError: no such pipeline, another architecture, or another vocabulary.
    """
    from diffusers import WanTransformer3DModel
    from transformers import AutoTokenizer, UMT5EncoderModel

    missing = [name for name in ("transformer", "text_encoder", "tokenizer") if not (folder / name).is_dir()]
    if missing:
        raise UserError(f"blocks_from: {folder} has no {' and no '.join(missing)}: give the folder of a pipeline")
    theirs = AutoTokenizer.from_pretrained(folder / "tokenizer").get_vocab()
    if theirs != tokenizer.get_vocab():
        raise UserError(f"blocks_from: the tokenizer of {folder} has other words: take its settings (whole_words)")
    trained: Any = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    give(transformer, with_patch(trained, tuple(transformer.config.patch_size)), f"blocks_from: {folder}/transformer")
    text: Any = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    give(text_encoder, text.state_dict(), f"blocks_from: {folder}/text_encoder")


def with_patch(trained: Any, patch: tuple[int, int, int]) -> dict[str, Tensor]:
    """Return the state of a denoiser, for patches of another size.

    Args:
        trained: a `WanTransformer3DModel`.
        patch: frames, rows and columns of latents in a token: the trained ones, or one latent pixel.

    Raises:
        UserError: other patches.
    """
    state, before = dict(trained.state_dict()), tuple(trained.config.patch_size)
    if patch == before:
        return state
    if math.prod(patch) != 1:
        raise UserError(f"blocks_from: weights for patches of {before} can be taken for {before} and (1, 1, 1) only")
    places = math.prod(before)
    state[f"{EMBEDDING}.weight"] = state[f"{EMBEDDING}.weight"].sum(dim=(2, 3, 4), keepdim=True)
    for name in ("weight", "bias"):
        # Its rows are places of the patch, and the channels of each.
        rows = state[f"{HEAD}.{name}"]
        state[f"{HEAD}.{name}"] = rows.unflatten(0, (places, -1)).mean(dim=0)
    return state


@torch.no_grad()
def give(model: torch.nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Copy weights into a model.

    Raises:
        UserError: names or shapes that differ; nothing is copied then.
    """
    own = model.state_dict()
    for name in sorted({*own} ^ {*state}):
        raise UserError(f"{where}: {name} is in one of the two alone: take its num_layers and widths")
    for name, value in state.items():
        if own[name].shape != value.shape:
            raise UserError(
                f"{where}: {name} is {tuple(value.shape)} there and {tuple(own[name].shape)} here: take its widths"
            )
    for name, value in state.items():
        own[name].copy_(value)
