"""One process of a run of `benchmarks.rl_scale`.

    [accelerate launch ...] python -m benchmarks.rl_scale_worker JOB.json

JOB.json holds the device and the fields of a `Row` or, in the part `ulysses`, of a `Split`. Each process writes
`rank-R.json` with its error and its peak memory, and the passes of a training run, or the seconds and errors of a pass
whose tokens are split. The log of the trainer has the times of every update.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from benchmarks.resident import forget_peak, peak_gpu_gib
from benchmarks.rl_scale_rows import MODELS, Row
from benchmarks.rl_scale_ulysses import PART, Split, measured
from postgen.errors import first_line
from postgen.files import replacing
from postgen.training import load_recipe

GRACE = 20.0
"""Time limit in seconds for the end of a process after its last update."""


class Finished(Exception):
    """The last update is done. The checkpoint and the export at the end of a run are not measured."""


class Enough(TrainerCallback):
    """Ends a run after its last update, at the same point in all processes, and separates the peak of memory before.

    Args:
        warm: number of first updates that are not measured.
    """

    def __init__(self, warm: int) -> None:
        self.warm = warm
        self.before: float | None = None
        """Peak memory in GiB until the first measured update. A sharded model is whole at first."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise `Finished` once the last update is logged."""
        if state.global_step == self.warm:
            self.before = peak_gpu_gib()
            forget_peak()
        if state.global_step >= args.max_steps:
            raise Finished


def brightness(completions: Sequence[Tensor], **columns: Any) -> list[float]:
    """Return the mean of each clip. It costs nothing, so the times are those of the model and its decoder."""
    return [float(clip.mean()) for clip in completions]


def wan(part: str, device: torch.device, *, small: bool) -> Any:
    """Return a Wan pipeline with random weights and a text encoder of one layer.

    Args:
        part: a key of `MODELS`.
        device: device on which the weights are drawn.
        small: return the tiny model of the tests.
    """
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    from benchmarks.fused_step import built
    from tests.tiny_wan import byte_tokenizer, wan_components

    torch.manual_seed(0)  # all processes start from the same weights
    if small:
        parts = wan_components()
        parts["transformer"].to(torch.bfloat16)  # like the frozen weights of a real model
        return WanPipeline(**parts)
    tokenizer = byte_tokenizer()
    text = UMT5Config(vocab_size=len(tokenizer), d_model=4096, d_kv=64, d_ff=1024, num_layers=1, num_heads=8)
    with torch.device(device):
        return WanPipeline(
            tokenizer=tokenizer,
            text_encoder=UMT5EncoderModel(text).eval(),
            vae=AutoencoderKLWan().eval(),
            transformer=built(WanTransformer3DModel, {**MODELS[part], "attention_head_dim": 128, "text_dim": 4096}),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )


def trainer_of(row: Row, folder: Path, device: str, enough: Enough) -> Any:
    """Return the trainer of a run.

    Args:
        row: the run.
        folder: folder of the run; it holds `prompts.jsonl`.
        device: "cuda" or "cpu".
        enough: callback that ends the run.
    """
    words = [] if row.part == "tiny" else ["--train_dataset", str(folder / "prompts.jsonl")]
    kind, recipe = load_recipe(row.recipe, [*words, "--output_dir", str(folder / "run")])
    config = kind.config_class.from_dict({**recipe.to_dict(), **row.settings(device)})
    place = place_of(device)
    model = None if row.part == "tiny" else wan(row.part, place, small=row.small)
    made: Any = kind
    return made(model, args=config, callbacks=[enough])


def place_of(device: str) -> torch.device:
    """Return the device of this process; a GPU becomes the current one."""
    if device != "cuda":
        return torch.device("cpu")
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(place)
    return place


def trained(row: Row, folder: Path, device: str) -> dict[str, Any]:
    """Train a run; return the peak memory in GiB, the passes and the trained parameters of this process."""
    enough = Enough(row.warm)
    trainer = trainer_of(row, folder, device, enough)
    forget_peak()  # the random weights were drawn in float32
    with suppress(Finished):
        trainer.train()
    count = sum(value.numel() for value in trainer.trained().values())
    memory = {"peak_gb": peak_gpu_gib(), "peak_at_start_gb": enough.before}
    return {**memory, "trained_parameters": count, "cost": trainer.meter.read()}


def passed(row: Split, device: str) -> dict[str, Any]:
    """Return what this process measured of a pass whose tokens are split over the processes."""
    place = place_of(device)
    if row.gpus > 1:
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    found = measured(row, place)
    if row.gpus > 1:
        # A process that ends while another still reads from it can abort.
        torch.distributed.barrier()
    return found


def main(path: str) -> int:
    """Do the run of a file and write the result of this process."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    folder = Path(path).parent
    row = Split(**job["row"]) if job["row"]["part"] == PART else Row(**job["row"])
    faulthandler.dump_traceback_later(row.limit, exit=True)
    found: dict[str, Any] = {"error": ""}
    try:
        found |= passed(row, job["device"]) if isinstance(row, Split) else trained(row, folder, job["device"])
    except Exception as error:
        traceback.print_exc()
        found["error"] = f"{type(error).__name__}: {first_line(error)}"
    with replacing(folder / f"rank-{os.environ.get('RANK', '0')}.json") as part:
        part.write_text(json.dumps(found), encoding="utf-8")
    print(f"{row.name}: {found['error'] or 'done'}", flush=True)
    # A process group can wait forever for a process that has failed.
    faulthandler.dump_traceback_later(GRACE, exit=True)
    if found["error"]:
        return 1
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
