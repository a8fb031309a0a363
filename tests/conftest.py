"""Fixtures for all tests: tiny pipelines with random weights, built from their configs without downloads."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_wan import LATENT_CHANNELS, wan_components

# If a shell starts the tests in the background, the tests and their child processes ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Threads do not make such small models faster. On a busy machine they make them ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Otherwise the compiler starts processes that import torch, to compile kernels in parallel; the tests have one kernel.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_collection_finish() -> None:
    """Exclude imported modules from garbage collection: scanning their million objects again and again takes time."""
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a text-to-video `WanPipeline` with random weights. Do not change the folder; copy it first."""
    from diffusers import WanPipeline

    folder = tmp_path_factory.mktemp("models") / "tiny-wan"
    WanPipeline(**wan_components()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_wan_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a `WanImageToVideoPipeline` without image encoder (like Wan 2.2), random weights. Do not change it."""
    from diffusers import WanImageToVideoPipeline

    folder = tmp_path_factory.mktemp("models") / "tiny-wan-image"
    components = wan_components(in_channels=2 * LATENT_CHANNELS + 4)
    WanImageToVideoPipeline(**components).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_lora(tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of a LoRA with nonzero weights, as after training."""
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
    """Result of a command: exit code, standard output, standard error."""

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
