"""Denoisers of networks that may predict the variance of a reverse step too: DiT, PixArt.

Their last layer then has twice the channels: noise, then v. Between timestep t and the one before, log variance is
f log beta_t + (1 - f) log beta~_t with f = (v + 1) / 2 (arXiv:2102.09672, eq. 15). Samplers here and the pipelines of
diffusers leave v out; it is what distillation of such a network has to match as well.
"""

from __future__ import annotations

from torch import Tensor

from postgen.errors import UserError
from postgen.families.alpha_bar import AlphaBarDenoiser
from postgen.families.denoiser import Condition


class LearnedVarianceDenoiser(AlphaBarDenoiser):
    """Base of the denoisers of such networks, a `VarianceDenoiser`. `forward` returns all channels."""

    @property
    def predicts_variance(self) -> bool:
        """Whether this network has channels of v."""
        config = self.model.config
        return bool(config.out_channels == 2 * config.in_channels)

    def guided(self, name: str, x: Tensor, timestep: Tensor, condition: Condition, guidance: float) -> Tensor:
        """Call the network, with guidance twice, and leave v out."""
        return super().guided(name, x, timestep, condition, guidance)[:, : x.shape[1]]

    def predict_with_variance(
        self, x: Tensor, sigma: Tensor, condition: Condition, guidance: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return the prediction of `predict` and v beside it. See `VarianceDenoiser`.

        Raises:
            UserError: as `predict`, or `predicts_variance` is False.
        """
        if not self.predicts_variance:
            raise UserError(
                f"this {type(self.model).__name__} predicts no variance: its output has no channels for it"
            )
        self.check_call(x, sigma, condition, guidance)
        timestep = self.timestep(sigma.to(x.device))
        with_text, without = self.passes(self.components[0], x, timestep, condition, guidance)
        prediction = self.combined(with_text, without, guidance)
        return prediction[:, : x.shape[1]], with_text[:, x.shape[1] :]
