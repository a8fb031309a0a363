"""Fixtures shared by every test: tiny pipelines with random weights, built from their configs, nothing downloaded."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_wan import LATENT_CHANNELS, wan_components

# A shell that starts the tests in the background makes them ignore Ctrl-C, and their child processes with them.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Models this small gain nothing from threads, and threads that wait for a busy core cost them ten times their work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Otherwise the compiler starts processes that import torch, to compile side by side what is one kernel here.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_collection_finish() -> None:
    """What is imported stays: the collector need not look through a million objects of it again and again."""
    gc.freeze()


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
