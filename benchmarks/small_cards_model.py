"""A video model with random weights at the shape of Wan 2.1 1.3B, and a training step on it, to measure memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from postgen.training import Trainer, TrainingConfig, Weights
from postgen.training.memory import MemoryPlan, memory_plan
from postgen.training.memory_config import MemoryConfig
from postgen.training.policy import load_policy

CAPTION = "A red fox runs through deep snow between birch trees at dawn."


@dataclass(kw_only=True)
class StepConfig(MemoryConfig, TrainingConfig):
    """Settings of `StepTrainer`."""

    num_frames: int = 33
    """Frames of the clip."""
    height: int = 480
    """Height of the clip in pixels."""
    width: int = 832
    """Width of the clip in pixels."""


class StepTrainer(Trainer[StepConfig]):
    """Trains a LoRA on one random clip with the model's own loss, as method `sft` does with cached latents."""

    config_class: ClassVar[type[TrainingConfig]] = StepConfig
    plan: MemoryPlan

    def build(self) -> Mapping[str, nn.Module]:
        """Load the model, encode a caption, park the components that a step does not use, and plan the memory."""
        args = self.args
        self.policy = load_policy(args.model, args, args, self.device, memory=args)
        denoiser = self.policy.denoiser
        size = {"num_frames": args.num_frames, "height": args.height, "width": args.width}
        with torch.no_grad():
            self.condition = denoiser.encode_prompt([CAPTION], guidance=False)
        self.clean = denoiser.initial_latents(1, **size, generator=torch.Generator(self.device).manual_seed(1))
        self.plan = memory_plan(self.policy.pipe, denoiser, args, args, size=size, rows=1)
        return self.policy.modules

    def training_step(self) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Return the loss of the clip at a random noise level."""
        denoiser = self.policy.denoiser
        noise = torch.randn(self.clean.shape, generator=self.generator, device=self.device)
        sigma = torch.rand(1, generator=self.generator, device=self.device)
        x = (1 - sigma) * self.clean + sigma * noise  # one clip, so the noise level is one number
        with self.accelerator.autocast():
            found = denoiser.predict(x, sigma, self.condition)
        return (found.float() - (noise - self.clean)).square().mean(), {}

    def export(self, folder: Path, weights: Weights) -> None:
        """Write the LoRA."""
        self.policy.save(folder, weights)


def write_model(folder: Path, device: torch.device, *, tiny: bool) -> Path:
    """Write a pipeline with random weights in diffusers' format: Wan 2.1 1.3B with UMT5-XXL and its autoencoder.

    Args:
        folder: an empty folder.
        device: device on which the weights are drawn.
        tiny: write a model of two small blocks instead.
    """
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    shape: dict[str, Any] = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
    text: dict[str, Any] = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    vae: dict[str, Any] = {}
    words = 512 if tiny else 256384
    if tiny:
        shape = {"num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 256, "num_layers": 2, "text_dim": 64}
        text = {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4}
        vae = {"base_dim": 8, "num_res_blocks": 1}
    tokenizer = _tokenizer()
    parts: dict[str, Any] = {
        "transformer": WanTransformer3DModel(**shape) if tiny else _drawn(WanTransformer3DModel, shape, device),
        "text_encoder": _drawn(UMT5EncoderModel, UMT5Config(vocab_size=words, **text), device),
        "vae": AutoencoderKLWan(**vae),
    }
    for part in parts.values():
        part.to(torch.bfloat16)
    pipe = WanPipeline(tokenizer=tokenizer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts)
    pipe.save_pretrained(folder)
    return folder


def _drawn(kind: Any, config: Any, device: torch.device) -> nn.Module:
    """Return a model with small random weights in bfloat16, drawn on the device and moved to main memory."""
    with torch.device("meta"):
        model: nn.Module = kind(**config) if isinstance(config, dict) else kind(config)
    model = model.to(torch.bfloat16).to_empty(device=device)
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # `to_empty` parts the two names of the embedding, and the file would have it twice
    for tensor in model.parameters():
        nn.init.normal_(tensor, std=0.02)
    return model.to("cpu")


def _tokenizer() -> Any:
    """Return a tokenizer with one token per byte: its encoding has the padded length of the pipeline."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"]
    symbols = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(symbols)}, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
