"""What the server of `tests.children` imports before it forks. It computes nothing: threads would not be copied."""

from __future__ import annotations

import gc

import accelerate  # noqa: F401
import peft  # noqa: F401
import safetensors.torch  # noqa: F401
import torch.distributed.fsdp  # noqa: F401
import transformers  # noqa: F401
from diffusers import DiffusionPipeline, WanPipeline, WanTransformer3DModel  # noqa: F401

# Of memory that no collector touches, forks need no copy.
gc.freeze()
