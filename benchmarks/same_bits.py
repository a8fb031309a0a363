"""Checks that two versions of the code compute the same bits, for changes that must not affect results.

    python -m benchmarks.same_bits --write before.json       # at one commit
    python -m benchmarks.same_bits --against before.json     # at the other commit, on the same machine

Computes hashes of the outputs of the embedded model and of tiny models of four families on the CPU, stock and with
each plug-in, and of the metrics and weights after short trainings with DanceGRPO and DiffusionNFT. The numbers depend
on the processor and on the versions of libraries, so a file is only valid on the machine and in the environment that
wrote it. Run the script from the root of a checkout, because the tiny models are those of the tests. The exit code is
1 if a hash differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

PROMPTS = ["a red ball rolls left", "a blue cube falls and a green ball moves right"]
FAMILIES = ("CogVideoX", "HunyuanVideo", "LTX", "SkyReels-V2")
TIMES = ("seconds", "step_time", "timing/")
"""Parts of the names of metrics that differ between any two runs."""


def digest(*tensors: torch.Tensor) -> str:
    """Return a short hash of the dtypes, shapes and bytes of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def plug_ins() -> dict[str, Callable[[Any], Any]]:
    """Return name -> a function that applies plug-ins to a pipeline."""
    from postgen import EnhanceAVideoConfig, FusedOpsConfig, apply_enhance_a_video, apply_fused_ops

    def both(pipe: Any) -> Any:
        apply_fused_ops(pipe, FusedOpsConfig(attention=None))
        apply_enhance_a_video(pipe, EnhanceAVideoConfig(weight=4.0))

    return {
        "stock": lambda pipe: None,
        "enhance": lambda pipe: apply_enhance_a_video(pipe, EnhanceAVideoConfig(weight=4.0)),
        "fused": lambda pipe: apply_fused_ops(pipe, FusedOpsConfig(attention=None)),
        "both": both,
    }


def embedded_clips() -> Iterator[tuple[str, str]]:
    """Yield the names and hashes of clips of the embedded model."""
    from diffusers import WanPipeline

    import postgen

    for name, put in plug_ins().items():
        pipe: Any = WanPipeline.from_pretrained(postgen.embedded_model(), torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        put(pipe)
        generator = torch.Generator().manual_seed(0)
        size = {"height": 96, "width": 96, "num_frames": 17, "num_inference_steps": 4, "guidance_scale": 3.0}
        video = pipe(PROMPTS, **size, generator=generator, output_type="pt").frames
        yield f"embedded/{name}", digest(video)


def family_latents() -> Iterator[tuple[str, str]]:
    """Yield the names and hashes of predictions and decoded videos of tiny models with random weights."""
    from postgen.families import denoiser_for
    from tests.families.tiny_pipelines import tiny_pipeline

    for family in FAMILIES:
        for name, put in plug_ins().items():
            if family == "SkyReels-V2" and name in ("fused", "both"):
                continue
            pipe, size = tiny_pipeline(family)
            put(pipe)
            denoiser = denoiser_for(pipe)
            with torch.no_grad():
                condition = denoiser.encode_prompt(PROMPTS)
                x = denoiser.initial_latents(2, **size, generator=torch.Generator().manual_seed(1))
                levels = denoiser.sigmas(4, x.shape[1:])[[0, 2]]
                out = [denoiser.predict(x, levels, condition, guidance) for guidance in (1.0, 4.0)]
                yield f"{family}/{name}", digest(*out, denoiser.decode(out[0]))


def trainings() -> Iterator[tuple[str, str]]:
    """Yield the names and hashes of metrics and weights after short trainings of the embedded model."""
    from safetensors.torch import load_file

    from postgen.training import load_recipe

    small: dict[str, Any] = {
        "max_steps": 3, "num_iterations": 2,
        "num_generations": 4, "per_device_train_batch_size": 4, "rollout_batch_size": 4,
        "gradient_accumulation_steps": 1, "eval_prompts": 2, "eval_grid": 0, "bf16": False, "logging_steps": 1,
        "eval_steps": 0, "num_inference_steps": 4, "eval_num_inference_steps": 4, "height": 64, "width": 64,
        "num_frames": 9, "report_to": "none", "reward_funcs": "world", "save_seconds": 0,
    }  # fmt: skip
    for recipe in ("dancegrpo-tiny", "nft-tiny"):
        for adapters in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                words = {**small, "output_dir": folder, "use_peft": adapters, "guidance_scale": 3.0 if adapters else 1}
                flags = [word for key, value in words.items() for word in (f"--{key}", str(value))]
                trainer_class, config = load_recipe(f"recipes/{recipe}.yaml", flags)
                trainer_class.from_config(config).train()
                rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
                kept = [{k: v for k, v in row.items() if not any(part in k for part in TIMES)} for row in rows]
                text = json.dumps(kept, sort_keys=True)
                name = f"{recipe}/{'lora' if adapters else 'all'}"
                yield f"{name}/metrics", hashlib.sha256(text.encode()).hexdigest()[:16]
                files = sorted((Path(folder) / "export").rglob("*.safetensors"))
                weights = [load_file(path) for path in files]
                yield f"{name}/weights", digest(*(part[key] for part in weights for key in sorted(part)))


def main(argv: list[str] | None = None) -> int:
    """Write the hashes to a file, or compare them to those of a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", type=Path, help="write the hashes of this version to this file")
    parser.add_argument("--against", type=Path, help="compare to the file that another version wrote")
    options = parser.parse_args(argv)
    if (options.write is None) == (options.against is None):
        parser.error("give --write FILE or --against FILE")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    known = {} if options.against is None else json.loads(options.against.read_text())
    found, wrong = {}, []
    for part in (embedded_clips, family_latents, trainings):
        for name, value in part():
            found[name] = value
            verdict = "" if options.against is None else ("  same" if known.get(name) == value else "  DIFFERS")
            print(f"{name:32s} {value}{verdict}", flush=True)
            wrong += [name] if verdict.endswith("DIFFERS") else []
    wrong += sorted(known.keys() - found.keys())
    if options.write is not None:
        options.write.write_text(json.dumps(found, indent=1) + "\n")
    elif wrong:
        print(f"these hashes differ or are missing: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
