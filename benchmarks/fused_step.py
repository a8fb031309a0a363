"""Times of a block and of a whole forward pass of real models: stock, compiled, with fused operations, and with both.

`python -m benchmarks.fused_step` needs a GPU and writes `results/fused_step.json`; `--quick` measures Wan 1.3B only.
The shapes are those of published models. The weights are random, because times do not depend on them. Every form runs
in one process on the same inputs, and times are medians. The compiled form is
`compile_repeated_blocks(fullgraph=True)`, as diffusers recommends. Fused attention uses FlashAttention-4 if it is
installed (`flash_attn_4` in the result is its version, or null); the stock and the compiled model use torch's
attention. A clip of the embedded model, which has trained weights, shows how much fused operations change the output.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

import postgen
from benchmarks.gates import gate, write_result
from postgen.fused import fused_for_call

FORMS = ("stock", "fused", "compiled", "fused_compiled")
REPEATS = 5
"""The number of timed calls of each form, after two warm-up calls."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A transformer and the arguments of one forward pass."""

    name: str
    kind: str
    """The name of its class in diffusers."""
    config: dict[str, Any]
    arguments: Callable[[], dict[str, Any]]
    """Draws the arguments of a forward pass on the default device."""


def wan(name: str, heads: int, ffn: int, layers: int, latent: tuple[int, int, int] = (21, 60, 104)) -> Case:
    """Return the case of a Wan 2.1 model, by default at 480p and 81 frames: 21 latent frames of 60 x 104."""

    def arguments() -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 16, *latent, dtype=torch.bfloat16),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.randn(1, 512, 4096, dtype=torch.bfloat16),
        }

    config = {"num_attention_heads": heads, "attention_head_dim": 128, "ffn_dim": ffn, "num_layers": layers}
    return Case(
        name=name,
        kind="WanTransformer3DModel",
        config={**config, "text_dim": 4096},
        arguments=arguments,
    )


def cogvideox() -> Case:
    """Return the case of CogVideoX-5B, 49 frames of 480 x 720: 13 latent frames of 60 x 90 after 226 text tokens."""

    def arguments() -> dict[str, Any]:
        angles = torch.rand(13 * 30 * 45, 32).repeat_interleave(2, dim=1)
        return {
            "hidden_states": torch.randn(1, 13, 16, 60, 90, dtype=torch.bfloat16),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": torch.randn(1, 226, 4096, dtype=torch.bfloat16),
            "image_rotary_emb": (angles.cos(), angles.sin()),
        }

    config = {"num_attention_heads": 48, "attention_head_dim": 64, "num_layers": 42, "in_channels": 16}
    config |= {"time_embed_dim": 512, "use_rotary_positional_embeddings": True, "sample_width": 90}
    return Case(name="CogVideoX-5B 49f", kind="CogVideoXTransformer3DModel", config=config, arguments=arguments)


CASES = (
    wan("Wan 1.3B 480p 81f", 12, 8960, 30),
    wan("Wan 14B 480p 81f", 40, 13824, 40),
    cogvideox(),
)


@torch.no_grad()
def measure(case: Case, device: str = "cuda", repeats: int = REPEATS) -> list[dict[str, Any]]:
    """Return one row for the first block and one row for the whole forward pass."""
    import diffusers

    torch.manual_seed(0)
    with torch.device(device):
        transformer = built(getattr(diffusers, case.kind), case.config)
        arguments = case.arguments()
    calls = _calls(transformer, arguments)
    times: dict[str, dict[str, float]] = {part: {} for part in calls}
    results: dict[str, dict[str, Tensor]] = {part: {} for part in calls}
    for form in FORMS:
        _take_form(transformer, form)
        for part, call in calls.items():
            results[part][form] = call()
            times[part][form] = milliseconds(call, device, repeats)
    return [_row(case.name, part, times[part], results[part]) for part in calls]


def _calls(transformer: nn.Module, arguments: dict[str, Any]) -> dict[str, Callable[[], Tensor]]:
    """Return the timed functions: the first block, with the arguments that the model gives it, and the whole model."""

    def step() -> Tensor:
        return _first(transformer(**arguments, return_dict=False))

    block = _blocks(transformer)[0]
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    step()
    hook.remove()
    args, kwargs = seen[0]
    return {"block": lambda: _first(block(*args, **kwargs)), "step": step}


def built(kind: Any, config: dict[str, Any]) -> Any:
    """Build a model with the dtypes of `from_pretrained(torch_dtype=bfloat16)`, which keeps some parts in float32."""
    transformer = kind(**config).eval().to(torch.bfloat16)
    for name, module in transformer.named_modules():
        if any(part in name.split(".") for part in kind._keep_in_fp32_modules or ()):
            module.float()
    for name, parameter in transformer.named_parameters():
        if any(part in name.split(".") for part in kind._keep_in_fp32_modules or ()):
            parameter.data = parameter.data.float()
    return transformer


def _blocks(transformer: nn.Module) -> list[nn.Module]:
    from postgen.families import layout_of

    return list(layout_of(transformer).block_modules(transformer).values())


def _take_form(transformer: Any, form: str) -> None:
    """Change a transformer from the previous form of `FORMS` to this one."""
    if form == "compiled":
        postgen.remove_fused_ops(transformer)
        for block in _blocks(transformer):
            block.compile(fullgraph=True)
    elif form != "stock":
        postgen.apply_fused_ops(transformer)


def milliseconds(call: Callable[[], Any], device: str, repeats: int = REPEATS) -> float:
    """Return the median time of a call in milliseconds."""
    times = []
    for _ in range(repeats + 2):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def _row(name: str, part: str, times: dict[str, float], results: dict[str, Tensor]) -> dict[str, Any]:
    row: dict[str, Any] = {"model": name, "part": part, **{f"{form}_ms": times[form] for form in FORMS}}
    row["fused_vs_stock"] = times["stock"] / times["fused"]
    row["fused_compiled_vs_compiled"] = times["compiled"] / times["fused_compiled"]
    stock = results["stock"].double()
    for form in FORMS[1:]:
        row[f"{form}_difference"] = float((results[form].double() - stock).norm() / stock.norm())
    print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    return row


def fused_psnr(device: str, *, steps: int = 4, **size: int) -> float:
    """Return the PSNR in dB between clips of the embedded model with and without fused operations (float32)."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(postgen.embedded_model()).to(device)
    pipe.set_progress_bar_config(disable=True)
    size = size or {"height": 96, "width": 96, "num_frames": 17}

    def clip() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        call = {**size, "num_inference_steps": steps, "generator": generator, "output_type": "pt"}
        frames: Tensor = pipe("a red ball rolls left", **call).frames
        return frames.double()

    stock = clip()
    with fused_for_call(pipe, True):
        error = (clip() - stock).square().mean().item()
    return -10 * math.log10(error) if error > 0 else 999.0


def gates(rows: list[dict[str, Any]], psnr: dict[str, float]) -> list[dict[str, Any]]:
    """Return the gates: the forward pass of Wan 1.3B at 480p in its best fused form, and the embedded model's clip."""
    step = next((row for row in rows if row["model"].startswith("Wan 1.3B") and row["part"] == "step"), None)
    fused = min(step["fused_ms"], step["fused_compiled_ms"]) if step else math.nan
    return [
        gate("step_vs_stock", step["stock_ms"] / fused if step else None, ">=", 1.1),
        gate("step_vs_compiled", step["compiled_ms"] / fused if step else None, ">=", 1.0),
        gate("fused_psnr", min(psnr.values()), ">=", 50),
    ]


def flash_attention_4() -> str | None:
    """Return the installed version of FlashAttention-4, which affects times more than fused operations do, or None."""
    try:
        return version("flash-attn-4")
    except PackageNotFoundError:
        return None


def main(argv: list[str] | None = None) -> int:
    """Measure, print the rows and write the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fused_step", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Wan 1.3B at 480p only")
    parser.add_argument("-o", "--output", default="fused_step", help="name or path of the result file")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.fused_step needs a GPU: torch sees none", file=sys.stderr)
        return 2
    rows = []
    for case in CASES[: 1 if options.quick else None]:
        rows += measure(case)
        free("cuda")
    psnr = {device: fused_psnr(device) for device in ("cpu", "cuda")}
    told = {"repeats": REPEATS, "flash_attn_4": flash_attention_4()}
    payload = {**told, "rows": rows, "psnr": psnr, "gates": gates(rows, psnr)}
    print(write_result(options.output, payload))
    return 0


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found.clone()


def wait(device: str) -> None:
    """Wait until the device has finished all launched work."""
    if device == "cuda":
        torch.cuda.synchronize()


def free(device: str) -> None:
    """Free the compiled code and the memory of a deleted model."""
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
