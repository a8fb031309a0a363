"""A flow model of 12 numbers that is exact for a Gaussian until it is trained, with a pipeline and a denoiser.

Data are N(0, 0.5^2); the velocity that makes them is linear in x. A small net adds to it, with output weights of zero.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families import register_denoiser

SPREAD = 0.5
SHAPE = (3, 1, 2, 2)


class ToyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(13, 32)
        self.outer = nn.Linear(32, 12)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.view(-1, 1, 1, 1, 1)
        variance = (1 - s) ** 2 * SPREAD**2 + s**2
        exact = (s - (1 - s) * SPREAD**2) / variance * x
        learned = self.outer(torch.tanh(self.inner(torch.cat([x.flatten(1), sigma[:, None]], 1))))
        return exact + learned.view(x.shape)

    def enable_gradient_checkpointing(self) -> None:
        raise AssertionError("nothing to recompute")

    config: ClassVar[dict[str, Any]] = {}

    @classmethod
    def from_config(cls, config: Any) -> ToyModel:
        return cls()

    def save_pretrained(self, folder: Any) -> None:
        from safetensors.torch import save_file

        folder.mkdir()
        save_file(self.state_dict(), folder / "model.safetensors")


class PointPipeline:
    """As much of a pipeline as the trainer looks at."""

    def __init__(self, prediction_type: str = "flow") -> None:
        torch.manual_seed(0)
        self.prediction_type = prediction_type
        self.transformer = ToyModel()

    @property
    def components(self) -> dict[str, Any]:
        return {"transformer": self.transformer}

    def to(self, device: Any) -> PointPipeline:
        self.transformer.to(device)
        return self

    def __call__(self, prompt: str) -> None:
        raise AssertionError("training does not call the pipeline")


class ToyDenoiser:
    timestep_scale = 1000.0
    lora_targets = ("outer",)
    max_sequence_length = 1
    frame_axis = 2
    per_frame = False
    encodes_video = False
    shape = SHAPE

    def __init__(self, pipe: PointPipeline) -> None:
        self.transformers = {"transformer": pipe.transformer}
        self.prediction_type = pipe.prediction_type
        if self.prediction_type != "flow":
            # Levels of noise with the same ratio of signal to noise as the flow's.
            s = torch.linspace(1, 0, 1001, dtype=torch.float64)
            self.bars = (1 - s) ** 2 / ((1 - s) ** 2 + s**2)

    @property
    def device(self) -> torch.device:
        return next(self.transformers["transformer"].parameters()).device

    def encode_prompt(self, prompts: list[str], negative: Any = None, *, guidance: bool = True) -> dict[str, Tensor]:
        condition = {"prompt": torch.tensor([[float(len(prompt))] for prompt in prompts])}
        return {**condition, "negative": torch.zeros(len(prompts), 1)} if guidance else condition

    def encode_image(self, images: Tensor, num_frames: int) -> dict[str, Tensor]:
        raise UserError("the toy takes text only")

    def encode_video(self, clips: Tensor, *, sample: bool = False, generator: Any = None) -> Tensor:
        raise UserError("the toy has no autoencoder")

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        return self.shape

    def initial_latents(self, batch: int, *, num_frames: int, height: int, width: int, generator: Any) -> Tensor:
        return torch.randn(batch, *self.shape, generator=generator, device=self.device)

    def sigmas(self, steps: int, shape: Any = None) -> Tensor:
        start = 0.99 if self.prediction_type != "flow" else 1
        s = torch.linspace(start, 0, steps + 1, dtype=torch.float64, device=self.device)
        return 3 * s / (1 + 2 * s)

    def alpha_bar(self, sigma: Tensor) -> Tensor:
        if self.prediction_type == "flow":
            raise UserError("the toy is a flow and has no alpha-bar")
        return self.bars[(1000 - sigma * 1000).round().long()]

    def predict(self, x: Tensor, sigma: Tensor, condition: Any, guidance: float = 1.0) -> Tensor:
        if self.prediction_type == "flow":
            return self.transformers["transformer"](x, sigma)
        # The flow's x and v from those with variances that add up to 1: x_flow = x / (a + b).
        a, b = (part.float().view(-1, 1, 1, 1, 1) for part in self._factors(sigma))
        scale = a + b
        flow = x / scale
        velocity = self.transformers["transformer"](flow, (b / scale).flatten())
        clean, noise = flow - b / scale * velocity, flow + a / scale * velocity
        return noise if self.prediction_type == "epsilon" else a * noise - b * clean

    def _factors(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        bar = self.alpha_bar(sigma.double())
        return bar.sqrt(), (1 - bar).sqrt()

    def decode(self, latents: Tensor) -> Tensor:
        return latents.transpose(1, 2)


register_denoiser("PointPipeline", ToyDenoiser)


class FrameDenoiser(ToyDenoiser):
    """The toy on clips of four latent frames, with one noise level a row or one a frame; frames do not see each other,
    so that each must come out as it does alone."""

    shape = (3, 4, 2, 2)
    per_frame = True

    def predict(self, x: Tensor, sigma: Tensor, condition: Any, guidance: float = 1.0) -> Tensor:
        batch, channels, frames, *size = x.shape
        levels = (sigma if sigma.dim() == 2 else sigma[:, None].expand(batch, frames)).reshape(-1)
        alone = x.transpose(1, 2).reshape(batch * frames, channels, 1, *size)
        alone = super().predict(alone, levels, condition, guidance)
        return alone.view(batch, frames, channels, *size).transpose(1, 2)


class ClipPipeline(PointPipeline):
    """The toy with clips of four frames, one number a colour and pixel."""

    def __call__(self, prompt: str, num_frames: int = 4) -> None:
        raise AssertionError("training does not call the pipeline")


register_denoiser("ClipPipeline", FrameDenoiser)
