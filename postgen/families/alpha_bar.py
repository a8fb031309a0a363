"""Denoisers of models with alpha-bar (DDPM): Stable Diffusion, CogVideoX, DiT, PixArt.

With alpha-bar A, the noisy latents are x = sqrt(A) * clean + sqrt(1 - A) * noise. The noise level (sigma) of timestep
t is (t + 1) / num_train_timesteps. Noise level 0 is the end of sampling; its alpha-bar is the scheduler's
`final_alpha_cumprod`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError, check_number, shown
from postgen.families.pipeline_denoiser import PipelineDenoiser

_PREDICTIONS = ("epsilon", "sample", "v_prediction")


class AlphaBarDenoiser(PipelineDenoiser):
    """Base class of the denoisers whose scheduler has a table of alpha-bars."""

    def __init__(self, pipe: Any, *, max_sequence_length: int | None = None) -> None:
        super().__init__(pipe, max_sequence_length=max_sequence_length)
        self.schedule = self.alpha_bar_scheduler()
        self.prediction_type = pipe.scheduler.config.prediction_type
        final = torch.as_tensor(self.schedule.final_alpha_cumprod).double().reshape(1)
        self._table = torch.cat([final.cpu(), self.schedule.alphas_cumprod.double().cpu()])

    def check_scheduler(self) -> None:
        """Refuse a flow-matching scheduler, and a scheduler with an unknown `prediction_type`.

        Raises:
            UserError: the scheduler does not fit the model.
        """
        config = self.pipe.scheduler.config
        if "prediction_type" not in config or config.get("use_flow_sigmas", False):
            raise UserError(
                f"{type(self.pipe.scheduler).__name__} has no alpha-bars: {type(self.pipe).__name__} needs "
                "DDIMScheduler, or another scheduler with the same betas"
            )
        if config["prediction_type"] not in _PREDICTIONS:
            raise UserError(
                f"prediction_type of {type(self.pipe.scheduler).__name__} is {shown(config['prediction_type'])},"
                f" it must be one of {', '.join(_PREDICTIONS)}"
            )

    def alpha_bar_scheduler(self) -> Any:
        """Return a DDIM scheduler with the betas and the timestep spacing of the pipeline's scheduler."""
        from diffusers import DDIMScheduler

        return DDIMScheduler.from_config(self.pipe.scheduler.config)

    def alpha_bar(self, sigma: Tensor) -> Tensor:
        """Return alpha-bar (float64) for noise levels of any shape; for noise level 0, the final alpha-bar."""
        place = (sigma.double() * self.timestep_scale).round().long()
        return self._table.to(sigma.device)[place]

    def sigmas(self, num_steps: int, shape: Sequence[int] | None = None) -> Tensor:
        """Return the (num_steps + 1,) noise levels of the schedule, float64; the last one is 0.

        Raises:
            UserError: `num_steps` is below 1 or larger than the number of timesteps of the scheduler.
        """
        scheduler = copy.deepcopy(self.schedule)
        check_number("num_inference_steps", num_steps, 1, scheduler.config.num_train_timesteps)
        scheduler.set_timesteps(num_steps)
        times = scheduler.timesteps.double()
        sigmas = torch.cat([(times + 1) / self.timestep_scale, times.new_zeros(1)])
        return sigmas.to(self.model.device)

    def network_sigmas(self, num_steps: int, shape: Sequence[int] | None = None) -> None:
        """Return None: the noise levels of the steps belong to whole timesteps."""

    def timestep(self, sigma: Tensor) -> Tensor:
        """Return the timesteps of the network for noise levels of any shape: whole numbers, as in its training."""
        return (sigma.double() * self.timestep_scale).round().long() - 1
