"""Text encoder and denoiser as one module, so that its graphs are recorded before processes share the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .fast_step import GraphedCall, uncached_autocast


class JointPass(nn.Module):
    """A module whose forward pass is `function(transformer, text_encoder, x, sigma, ids)`.

    Args:
        function: computes with the parameters of both models, see `GraphedCall`.
        transformer, text_encoder: the models, registered under these names.
        graphs: replay forward and backward passes as CUDA graphs that share their memory.
    """

    def __init__(self, function: Callable[..., Tensor], transformer: Any, text_encoder: Any, *, graphs: bool) -> None:
        super().__init__()
        self.transformer, self.text_encoder, self._function = transformer, text_encoder, function
        self._pass: Callable[..., Tensor] = self._called
        if graphs:
            self._pass = GraphedCall(self._called, {"pass": self}, share_memory=True)

    def forward(self, x: Tensor, sigma: Tensor, ids: Tensor) -> Tensor:
        """Return the function's value for noisy latents, noise levels and token ids."""
        with uncached_autocast(x.device.type):
            return self._pass(x, sigma, ids)

    def record(self, samples: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Record the graphs for the shapes of these inputs, before processes share the parameters."""
        for x, sigma, ids in samples:
            self(x, sigma, ids)
        torch.cuda.synchronize()

    def _called(self, x: Tensor, sigma: Tensor, ids: Tensor) -> Tensor:
        return self._function(self.transformer, self.text_encoder, x, sigma, ids)
