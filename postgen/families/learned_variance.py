"""Base of the denoisers of networks that may also predict the variance of a reverse step: DiT, PixArt.

The last layer of such a network has twice as many channels: the noise, then v. The log variance of the step from
timestep t to the previous timestep is f log beta_t + (1 - f) log beta~_t with f = (v + 1) / 2 (arXiv:2102.09672,
eq. 15). The samplers of postgen and the pipelines of diffusers ignore v. Distillation of such a network has to match v
as well.
"""

from __future__ import annotations

from torch import Tensor

from postgen.errors import UserError
from postgen.families.alpha_bar import AlphaBarDenoiser
from postgen.families.denoiser import Condition


class LearnedVarianceDenoiser(AlphaBarDenoiser):
    """Base class of these denoisers, a `VarianceDenoiser`. Its `forward` returns all channels, v included."""

    @property
    def predicts_variance(self) -> bool:
        """Whether the output of this network has channels for v."""
        config = self.model.config
        return bool(config.out_channels == 2 * config.in_channels)

    def guided(self, name: str, x: Tensor, timestep: Tensor, condition: Condition, guidance: float) -> Tensor:
        """Return the prediction without v; with guidance above 1 the network runs two forward passes."""
        return super().guided(name, x, timestep, condition, guidance)[:, : x.shape[1]]

    def predict_with_variance(
        self, x: Tensor, sigma: Tensor, condition: Condition, guidance: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return the prediction of `predict`, and v of the pass with the prompt. See `VarianceDenoiser`.

        Raises:
            UserError: as in `predict`, or `predicts_variance` is False.
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
