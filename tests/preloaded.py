"""Imports of the server of `tests.children` before it forks. It must not start threads: forks do not copy them."""

from __future__ import annotations

import gc

import accelerate  # noqa: F401
import peft  # noqa: F401
import safetensors.torch  # noqa: F401
import torch.distributed.fsdp  # noqa: F401
import transformers  # noqa: F401
from diffusers import DiffusionPipeline, WanPipeline, WanTransformer3DModel  # noqa: F401

# Forks need no copy of memory that the garbage collector does not touch.
gc.freeze()
