"""Tell a transformer the noise level of every modality of a latent frame, and the frame's part in the window.

Its own timestep says the level of RGB alone (of the whole clip, where a family takes no more). What is missing comes
in behind the layer that makes tokens of latents: a small network turns levels and role of a frame into a vector, which
is added to each of the frame's tokens. Its last layer begins with zeros, so at first nothing changes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import one_hot

from postgen.errors import UserError, check_number
from postgen.families.registry import layout_of
from postgen.worldweaver.levels import MODALITIES, FrameLevels, Role
from postgen.worldweaver.refine import Refiner
from postgen.worldweaver.widen import Widened, transformer_of, widened


class LevelEmbedder(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both have a config_name, as in diffusers
    """Vector for every latent frame of a window, from its levels and its role.

    Saved as a component of a pipeline, `level_embedder`. `for_transformer` makes one that fits.

    Args:
        width: features of a token of the transformer.
        modalities: number of levels of a frame, 1 to 3.
        frequencies: sines, and as many cosines, of each level.
        hidden: width between the two layers.
        skip: whether the transformer's outputs of depth and flow are what to add to a linear guess from their noisy
            latents (`postgen.worldweaver.skip`). It is here since this is what is saved of a trained model beside its
            weights.
        refine: width of the convolutions that add to these outputs what the cells of the noisy latents say
            (`postgen.worldweaver.refine`), for the same reason; 0 is none. It needs `skip` and 2 or 3 modalities.
        channels: of the latents of one modality, where there is `refine`.

    Raises:
        UserError: a number of modalities outside its range; `refine` below 0, or without what it needs.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        width: int,
        modalities: int = 2,
        frequencies: int = 32,
        hidden: int = 256,
        skip: bool = False,
        refine: int = 0,
        channels: int = 0,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if not 1 <= modalities <= len(MODALITIES):
            raise UserError(f"modalities must be 1 to {len(MODALITIES)}, got {modalities}")
        check_number("refine", refine, 0, 1024, whole=True)
        if refine and not (skip and modalities > 1 and channels > 0):
            raise UserError(
                f"refine={refine} with skip={skip}, modalities={modalities} and channels={channels}: it adds to the"
                " guess of skip=True, of 2 or 3 modalities with the channels of the latents"
            )
        self.inner = nn.Linear(2 * frequencies * modalities + len(Role), hidden)
        self.outer = nn.Linear(hidden, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)
        self.refiner = Refiner(modalities, channels, refine) if refine else None

    @classmethod
    def for_transformer(cls, target: Any, **settings: Any) -> LevelEmbedder:
        """Make one for a widened transformer, on its device, in float32.

        Args:
            target: the transformer, or a pipeline with it.
            settings: `frequencies`, `hidden`, `skip` and `refine`.

        Raises:
            UserError: it is not widened, or settings that `LevelEmbedder` refuses.
        """
        model, wide = transformer_of(target), widened(target)
        first: Any = model.get_submodule(wide.widths.first)
        if settings.get("refine"):
            settings["channels"] = wide.channels
        made: LevelEmbedder = cls(first.weight.shape[0], len(wide.modalities), **settings)
        made.to(first.weight.device)
        return made

    def forward(self, levels: FrameLevels) -> Tensor:
        """Return (B, T, width) vectors.

        Raises:
            UserError: levels of another number of modalities.
        """
        sigma: Tensor = levels.sigma.to(self.device, torch.float32)
        if sigma.shape[2] != self.config["modalities"]:
            raise UserError(
                f"levels of {sigma.shape[2]} modalities, the level embedder was made for {self.config['modalities']}"
            )
        # As timesteps of diffusers are: a level of 1 is 1000.
        waves = get_timestep_embedding(sigma.flatten() * 1000, 2 * self.config["frequencies"])
        roles = one_hot(levels.role.to(self.device), len(Role)).float().expand(len(sigma), -1, -1)
        told = torch.cat([waves.view(*sigma.shape[:2], -1), roles], dim=2).to(self.dtype)
        vectors: Tensor = self.outer(nn.functional.silu(self.inner(told)))
        return vectors

    @contextmanager
    def on(self, target: Any, levels: FrameLevels, wrapped: nn.Module | None = None) -> Iterator[None]:
        """While open, calls of a transformer in this thread are told the levels.

        Args:
            target: the widened transformer, which may be wrapped, or a pipeline with it.
            levels: of the latent frames of these calls.
            wrapped: what to call for the vectors instead of the module itself, such as DDP around it.

        Raises:
            UserError: it is not widened; latent frames of one token with different levels; in a call, latents of
                another batch or length.
        """
        model, wide = transformer_of(target), widened(target)
        patch = _patch_in_time(model, wide)
        embed: Any = self if wrapped is None else wrapped
        vectors: Tensor = embed(_per_token_frame(levels, patch))
        caller = threading.get_ident()

        def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            return output + _spread(vectors, output, module).to(output) if threading.get_ident() == caller else output

        handle = model.get_submodule(wide.widths.first).register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()


def _patch_in_time(model: Any, wide: Widened) -> int:
    """Latent frames in a token: those of its convolution, else what the config says."""
    first: Any = model.get_submodule(wide.widths.first)
    if isinstance(first, nn.Conv3d):
        return int(first.kernel_size[0])
    layout_of(model)
    return int(model.config.get("patch_size_t") or 1) if isinstance(first, nn.Linear) else 1


def _per_token_frame(levels: FrameLevels, patch: int) -> FrameLevels:
    """Levels of the frames of tokens, of which several latent frames may be one."""
    if patch == 1:
        return levels
    if levels.sigma.shape[1] % patch:
        raise UserError(f"{levels.sigma.shape[1]} latent frames, {patch} of which are one token: give a multiple")
    sigma, role = levels.sigma.unflatten(1, (-1, patch)), levels.role.unflatten(0, (-1, patch))
    if (sigma != sigma[:, :, :1]).any() or (role != role[:, :1]).any():
        raise UserError(f"{patch} latent frames in a row are one token here: give them the same levels and role")
    return FrameLevels(sigma=sigma[:, :, 0], role=role[:, 0])


def _spread(vectors: Tensor, tokens: Tensor, layer: nn.Module) -> Tensor:
    """Bring (B, T, width) to what a layer gave: of a convolution (B, width, T, h, w) or, of one picture at a time,
    (B * T, width, h, w); of a linear one (B, T * h * w, width). Frames come one after the other in every family.
    """
    batch, frames, _ = vectors.shape
    if isinstance(layer, nn.Conv3d):
        fits, found = tokens.shape[0] == batch and tokens.shape[2] == frames, vectors.mT[..., None, None]
    elif isinstance(layer, nn.Conv2d):
        fits, found = tokens.shape[0] == batch * frames, vectors.flatten(0, 1)[..., None, None]
    else:
        length = tokens.shape[1]
        fits = tokens.dim() == 3 and tokens.shape[0] == batch and not length % frames
        found = vectors.repeat_interleave(max(1, length // frames), dim=1)
    if not fits:
        raise UserError(
            f"levels of {batch} rows of {frames} token frames do not fit tokens of shape {tuple(tokens.shape)}: give"
            " one for each latent frame of the call"
        )
    return found
