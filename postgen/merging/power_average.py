"""Averages of weights with a power-function profile, stored during a training for a later post-hoc EMA."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from postgen.errors import UserError, check_number
from postgen.files import replacing
from postgen.tensor_files import opened

from .posthoc_ema import beta, gamma_of

GAMMA, STEP = "ema_gamma", "ema_step"
"""Keys of the profile in the metadata of a stored average."""


class PowerAverage:
    """Average of the trained parameters of a module with a power-function profile (arXiv:2312.02696).

    Args:
        module: the module. Its parameters with `requires_grad` are averaged, in float32 on their device.
        sigma_rel: relative width of the profile, above 0 and at most 0.2887; the paper keeps 0.05 and 0.1.

    Raises:
        UserError: the width is outside its range, or nothing is trained.
    """

    def __init__(self, module: nn.Module, sigma_rel: float) -> None:
        self.gamma, self.sigma_rel, self.step = gamma_of(sigma_rel), sigma_rel, 0
        self._trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
        if not self._trained:
            raise UserError("the module has no trained parameters: there is nothing to average")
        self.values: dict[str, Tensor] = {
            name: value.detach().clone().float() for name, value in self._trained.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the weights of this optimiser step. Call it once after each step."""
        self.step += 1
        share = 1 - beta(self.step, self.gamma)
        for name, average in self.values.items():
            average.lerp_(self._trained[name].detach().float(), share)

    def save(self, folder: Path) -> Path:
        """Write the average with its profile into a folder, and return the file `ema-WIDTH-STEP.safetensors`.

        Raises:
            UserError: no step was averaged yet.
            OSError: the file cannot be written.
        """
        from safetensors.torch import save_file

        check_number("step", self.step, 1)
        path = folder / f"ema-{self.sigma_rel:g}-{self.step}.safetensors"
        tensors = {name: value.cpu().contiguous() for name, value in self.values.items()}
        with replacing(path) as part:
            save_file(tensors, part, metadata={"format": "pt", GAMMA: repr(self.gamma), STEP: str(self.step)})
        return path

    def load(self, path: Path) -> None:
        """Continue from a stored average; a run that resumes at this step continues exactly.

        Raises:
            UserError: the file cannot be read, has another profile, or holds other parameters.
        """
        with opened(path) as content:
            said = content.metadata() or {}
            if said.get(GAMMA) != repr(self.gamma) or not said.get(STEP, "").isdigit():
                raise UserError(f"{path} is no average with sigma_rel {self.sigma_rel:g}")
            names = set(content.keys())
            if names != self.values.keys():
                raise UserError(
                    f"{path} holds other parameters: {sorted(names ^ self.values.keys())[0]} is in one only"
                )
            for name, average in self.values.items():
                average.copy_(content.get_tensor(name))
        self.step = int(said[STEP])
