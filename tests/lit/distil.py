"""Tiny teachers and runs of both stages of distillation. `-m tests.lit.distil FOLDER` is a run that kills itself."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from postgen.lit import LitConfig
from postgen.lit.attention_transfer import transfer
from postgen.lit.train_config import LitTrainingConfig
from postgen.lit.trainer import LitTrainer
from postgen.reconstruct import RecordsConfig, block_run
from tests.families.tiny_pipelines import tiny_pipeline
from tests.reconstruct.toy import PROMPTS, pipeline, settings

VIDEO = ("Wan", "HunyuanVideo", "CogVideoX", "LTX")
PICTURES = ("FLUX", "Stable Diffusion 3", "DiT", "PixArt-Sigma")
ROWS = [{"prompt": text} for text in PROMPTS]


def teacher(name: str) -> tuple[Any, dict[str, int]]:
    """Return a pipeline and a size; for video pipelines the clip has three latent frames."""
    if name == "Wan":
        return pipeline(name)
    pipe, size = tiny_pipeline(name)
    return pipe, size if name in PICTURES else {**size, "height": 32, "num_frames": 9}


def prompts(name: str) -> list[str]:
    """Return the prompts of a model; those of DiT are class numbers."""
    return [str(number) for number in range(len(PROMPTS))] if name == "DiT" else PROMPTS


def conversion(name: str, **more: Any) -> dict[str, Any]:
    kind = "lit" if name in PICTURES else "window_delta"
    return {"layers": f"all:{kind}", "first_block": True, "window": {"radius": 0}, **more}


def transferred(folder: Path, name: str = "Wan", **changes: Any) -> tuple[Any, Any]:
    """Run attention transfer; return the pipeline and the report."""
    pipe, size = teacher(name)
    more = {key: changes.pop(key) for key in ("where", "blocks_at_a_time", "inherited", "share") if key in changes}
    config = LitConfig.from_json(conversion(name, **changes.pop("conversion", {})))
    records = RecordsConfig(num_inference_steps=4, levels_per_prompt=2, batch_size=2, **size)
    train = settings(folder, **{"max_steps": 6, "save_steps": 2, "ema_decay": 0.0, **changes})
    return pipe, transfer(pipe, config, PROMPTS, records=records, train=train, **more)


def distilled(folder: Path, name: str = "Wan", pipe: Any = None, **changes: Any) -> LitTrainer:
    """Train end to end; return the trainer."""
    rows = [{"prompt": text} for text in prompts(name)]
    made, size = teacher(name)
    kept = {"max_steps": 2, "num_inference_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    kept |= {"device": "cpu", "disable_tqdm": True, "report_to": [], "logging_steps": 1, **size, "batch_size": 2}
    kept |= {} if "student" in changes else {"conversion": conversion(name)}
    args = LitTrainingConfig(output_dir=str(folder), **{**kept, **changes})
    run = LitTrainer(args, pipe or made, rows, rows[:3])
    run.train()
    return run


STAGES = {"train": "new", "use_peft": True, "lora_r": 2, "transfer_steps": 2, "learning_rate_new": 1e-3}
"""Settings of a run with attention transfer, new layers and LoRA adapters."""


def in_two(folder: Path) -> None:
    distilled(folder / "two", **STAGES)


def in_two_cut(folder: Path) -> None:
    distilled(folder / "cut", fully_shard=True, ema_decay=0.9)


JOBS = [in_two, in_two_cut]


def main(folder: Path) -> None:
    """Run attention transfer; the process kills itself in step 5 of the second block."""
    outputs = block_run.BlockRun._outputs

    def dying(run: Any, *words: Any) -> Any:
        if (run.task.name, run.step) == ("blocks.1.attn1", 5):
            os.kill(os.getpid(), signal.SIGKILL)
        return outputs(run, *words)

    block_run.BlockRun._outputs = dying  # type: ignore[method-assign]
    transferred(folder / "run", where=folder / "records")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
