"""Condition a transformer on the noise level of each modality and on the role of each latent frame.

The transformer's own timestep carries only the noise level of RGB (of the whole clip in families that take a single
timestep). The level embedder adds the rest: a small network turns the levels and the role of a frame into a vector,
and a hook behind the patch embedding adds the vector to each token of the frame. The last layer of the network is
initialised with zeros, so an untrained embedder changes nothing.
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
    """Computes a vector for every latent frame of a window from its noise levels and its role.

    It is saved as the component `level_embedder` of a pipeline. `for_transformer` creates one that fits a transformer.

    Args:
        width: features of a token of the transformer.
        modalities: number of noise levels of a frame, 1 to 3.
        frequencies: number of sines, and of cosines, for each noise level.
        hidden: width between the two layers.
        skip: whether the transformer's depth and flow outputs are corrections to a linear guess from their noisy
            latents (`postgen.worldweaver.skip`). The option is stored here because the config of the embedder is
            saved with a trained model.
        refine: width of convolutions that add a correction from the noisy latents to these outputs
            (`postgen.worldweaver.refine`); 0: no convolutions. It is stored here for the same reason. It needs `skip`
            and 2 or 3 modalities.
        channels: channels of the latents of one modality; required with `refine`.

    Raises:
        UserError: `modalities` or `refine` out of range, or `refine` without the options that it needs.
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
                f"refine={refine} with skip={skip}, modalities={modalities} and channels={channels}: refine needs"
                " skip=True, 2 or 3 modalities, and the channels of the latents"
            )
        self.inner = nn.Linear(2 * frequencies * modalities + len(Role), hidden)
        self.outer = nn.Linear(hidden, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)
        self.refiner = Refiner(modalities, channels, refine) if refine else None

    @classmethod
    def for_transformer(cls, target: Any, **settings: Any) -> LevelEmbedder:
        """Create a level embedder for a widened transformer, on its device, in float32.

        Args:
            target: the transformer, or a pipeline with it.
            settings: `frequencies`, `hidden`, `skip` and `refine`.

        Raises:
            UserError: the transformer is not widened, or `LevelEmbedder` rejects the settings.
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
                f"levels have {sigma.shape[2]} modalities, the level embedder needs {self.config['modalities']}"
            )
        # Scaled as timesteps in diffusers: a noise level of 1 is timestep 1000.
        waves = get_timestep_embedding(sigma.flatten() * 1000, 2 * self.config["frequencies"])
        roles = one_hot(levels.role.to(self.device), len(Role)).float().expand(len(sigma), -1, -1)
        told = torch.cat([waves.view(*sigma.shape[:2], -1), roles], dim=2).to(self.dtype)
        vectors: Tensor = self.outer(nn.functional.silu(self.inner(told)))
        return vectors

    @contextmanager
    def on(self, target: Any, levels: FrameLevels, wrapped: nn.Module | None = None) -> Iterator[None]:
        """Context manager: while open, forward passes of a transformer in this thread receive the levels.

        Args:
            target: the widened transformer (may be wrapped), or a pipeline with it.
            levels: noise levels and roles of the latent frames in these forward passes.
            wrapped: module to call instead of this module, for example a DDP wrapper around it.

        Raises:
            UserError: the transformer is not widened; latent frames that share a token have different levels; or, in
                a forward pass, latents of another batch size or length.
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
    """Return the number of latent frames in a token, from the convolution or else from the config."""
    first: Any = model.get_submodule(wide.widths.first)
    if isinstance(first, nn.Conv3d):
        return int(first.kernel_size[0])
    layout_of(model)
    return int(model.config.get("patch_size_t") or 1) if isinstance(first, nn.Linear) else 1


def _per_token_frame(levels: FrameLevels, patch: int) -> FrameLevels:
    """Return one level and role per token frame, where a token may span several latent frames."""
    if patch == 1:
        return levels
    if levels.sigma.shape[1] % patch:
        raise UserError(
            f"{levels.sigma.shape[1]} latent frames cannot be divided into tokens of {patch} frames: give a multiple"
        )
    sigma, role = levels.sigma.unflatten(1, (-1, patch)), levels.role.unflatten(0, (-1, patch))
    if (sigma != sigma[:, :, :1]).any() or (role != role[:, :1]).any():
        raise UserError(f"{patch} latent frames share one token in this model: give them equal levels and roles")
    return FrameLevels(sigma=sigma[:, :, 0], role=role[:, 0])


def _spread(vectors: Tensor, tokens: Tensor, layer: nn.Module) -> Tensor:
    """Expand vectors (B, T, width) to the shape of the output of the patch embedding.

    The output is (B, width, T, h, w) for a 3-D convolution, (B * T, width, h, w) for a 2-D convolution on single
    pictures, and (B, T * h * w, width) for a linear layer. Frames are in temporal order in every family.
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
            f"levels of {batch} rows with {frames} token frames do not fit tokens of shape {tuple(tokens.shape)}: give"
            " one level for each latent frame of the forward pass"
        )
    return found
