"""Fixtures shared by every test: tiny pipelines with random weights, built from their configs, nothing downloaded."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A shell that starts the tests in the background makes them ignore Ctrl-C, and their child processes with them.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Models this small gain nothing from threads, and threads that wait for a busy core cost them ten times their work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TEXT_DIM = 16
LATENT_CHANNELS = 4


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer with one token per byte (so no text is unknown to it) and `</s>` at the end of every text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"]
    symbols = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def wan_components(*, in_channels: int = LATENT_CHANNELS, seed: int = 0) -> dict[str, Any]:
    """Components of a Wan pipeline with random weights: 8x smaller latents, 4 frames a latent, as Wan's own.

    `latents_mean` / `latents_std` are neither 0 nor 1, so that a forgotten normalisation shows. `in_channels` is
    larger than the latent's 4 for an image-to-video transformer.
    """
    import torch
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    vae = AutoencoderKLWan(
        base_dim=8,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        z_dim=LATENT_CHANNELS,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        latents_mean=[0.1, -0.2, 0.3, -0.4],
        latents_std=[0.5, 1.5, 2.0, 0.8],
    )
    transformer = WanTransformer3DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=32,
    )
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_DIM,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            dropout_rate=0.0,
        )
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder.eval(),
        "vae": vae.eval(),
        "transformer": transformer.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a text-to-video `WanPipeline` with random weights. Read only: copy it to change it."""
    from diffusers import WanPipeline

    folder = tmp_path_factory.mktemp("models") / "tiny-wan"
    WanPipeline(**wan_components()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_wan_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a `WanImageToVideoPipeline` without image encoder (as Wan 2.2), random weights. Read only."""
    from diffusers import WanImageToVideoPipeline

    folder = tmp_path_factory.mktemp("models") / "tiny-wan-image"
    components = wan_components(in_channels=2 * LATENT_CHANNELS + 4)
    WanImageToVideoPipeline(**components).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_lora(tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA whose weights are not zero, as training leaves it."""
    import torch
    from diffusers import WanPipeline, WanTransformer3DModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    transformer = WanTransformer3DModel.from_pretrained(tiny_wan, subfolder="transformer")
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    torch.manual_seed(1)
    state = {name: torch.randn_like(value) for name, value in get_peft_model_state_dict(transformer).items()}
    folder = tmp_path_factory.mktemp("lora")
    WanPipeline.save_lora_weights(folder, transformer_lora_layers=state)
    return folder / "pytorch_lora_weights.safetensors"


class Outcome:
    """How a call of the command line ended: exit code, standard output, standard error."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command line in this process: `cli("generate", "a ball", "-o", path) -> Outcome`."""
    from postgen.cli import main

    def call(*words: str | Path) -> Outcome:
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(left.value.code, captured.out, captured.err)

    return call
