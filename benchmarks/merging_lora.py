"""Exact merging of LoRA files against dense SVD and averages of the factors, for `python -m benchmarks.merging lora`.

Random LoRAs of rank 32 with the shapes of Wan 1.3B, from files to a merged file. The error is relative to the best
approximation of the dense weighted sum in float64. One block has all shapes of the network.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.gates import device
from postgen.info import versions
from postgen.merging.lora import merge_loras

FILE = "lora.json"
SHAPES: Mapping[str, tuple[int, int]] = {
    "attn1.to_q": (1536, 1536),
    "attn2.to_out.0": (1536, 1536),
    "ffn.net.0.proj": (8960, 1536),
    "ffn.net.2": (1536, 8960),
}
"""Layer -> outputs and inputs, as in a block of Wan 1.3B."""
TINY_SHAPES: Mapping[str, tuple[int, int]] = {"attn1.to_q": (48, 48), "ffn.net.0.proj": (96, 48)}
RANK = 32
CASES: tuple[tuple[str, tuple[float, ...], int | None], ...] = (
    ("mean of 2, all kept", (0.5, 0.5), None),
    ("mean of 2, rank 32", (0.5, 0.5), RANK),
    ("mean of 4, rank 32", (0.25, 0.25, 0.25, 0.25), RANK),
    ("any weights, rank 32", (1.3, -0.4, 0.1), RANK),
)
"""Name, weights, rank of the result."""
COUNTS = (2, 3, 5)
"""Numbers of equal LoRAs whose mean must be as strong as one of them."""


def write_loras(folder: Path, count: int, shapes: Mapping[str, tuple[int, int]], *, seed: int = 0) -> list[Path]:
    """Write LoRA files that share a part, as LoRAs of one model do, and return their paths."""
    generator = torch.Generator().manual_seed(seed)
    common = _factors(shapes, generator)
    files = []
    for number in range(count):
        own = _factors(shapes, generator)
        file = folder / f"lora-{number}.safetensors"
        save_file({name: common[name] + 0.5 * own[name] for name in own}, file)
        files.append(file)
    return files


def _factors(shapes: Mapping[str, tuple[int, int]], generator: torch.Generator) -> dict[str, Tensor]:
    found = {}
    for layer, (out, inner) in shapes.items():
        rank, name = min(RANK, out, inner), f"transformer.blocks.0.{layer}"
        found[f"{name}.lora_A.weight"] = torch.randn(rank, inner, generator=generator) / inner**0.5
        found[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) / rank**0.5
    return found


def error_of(files: Sequence[Path], weights: Sequence[float], rank: int | None) -> dict[str, Any]:
    """Return the largest relative errors over the layers: of the exact merge, and of the mean of the factors.

    Both are compared with the dense weighted sum, cut to the rank of the result by a dense SVD in float64.
    """
    from postgen.tensor_files import read_tensors

    tensors, report = merge_loras(files, weights, rank=rank)
    sources = [read_tensors(file) for file in files]
    exact = factors = 0.0
    for up_name in sorted(name for name in tensors if name.endswith("lora_B.weight")):
        down_name = up_name.replace("lora_B", "lora_A")
        terms = [(each[up_name].double(), each[down_name].double()) for each in sources]
        wanted = sum((weight * up @ down for weight, (up, down) in zip(weights, terms, strict=True)), torch.zeros(()))
        wanted = _best(wanted, rank)
        found = tensors[up_name].double() @ tensors[down_name].double()
        exact = max(exact, float((found - wanted).norm() / wanted.norm()))
        pairs = list(zip(weights, terms, strict=True))
        averaged = sum(weight * up for weight, (up, _) in pairs) @ sum(weight * down for weight, (_, down) in pairs)  # type: ignore[operator]
        factors = max(factors, float((averaged - wanted).norm() / wanted.norm()))
    return {"error": exact, "factor_average_error": factors, "retained": report.retained}


def _best(dense: Tensor, rank: int | None) -> Tensor:
    """Return the best approximation of a rank, by the dense SVD."""
    if rank is None:
        return dense
    left, sigma, right = torch.linalg.svd(dense, full_matrices=False)
    return (left[:, :rank] * sigma[:rank]) @ right[:rank]


def strengths(folder: Path, count: int) -> dict[str, float]:
    """Return the strength of the mean of `count` equal LoRAs relative to one: exact, and `linear` of peft."""
    from postgen.tensor_files import read_tensors

    file = write_loras(folder, 1, TINY_SHAPES, seed=count)[0]
    copies = [folder / f"copy-{number}.safetensors" for number in range(count)]
    for copy in copies:
        copy.write_bytes(file.read_bytes())
    merged, _ = merge_loras(copies, [1 / count] * count, rank=None)
    one = read_tensors(file)
    name = "transformer.blocks.0.attn1.to_q.lora_{}.weight"
    single, ours = (each[name.format("B")].double() @ each[name.format("A")].double() for each in (one, merged))
    return {"copies": count, "exact": float(ours.norm() / single.norm()), "peft_linear": _of_peft(count)}


def _of_peft(count: int) -> float:
    torch.manual_seed(0)
    names = [f"copy{number}" for number in range(count)]
    base = nn.Sequential(nn.Linear(16, 16, bias=False))
    model: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules=["0"]), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(r=4, lora_alpha=4, target_modules=["0"]))
    layer = model.base_model.model[0]
    with torch.no_grad():
        for name in names:
            generator = torch.Generator().manual_seed(1)
            for side in (layer.lora_A, layer.lora_B):
                side[name].weight.copy_(torch.randn(side[name].weight.shape, generator=generator))
    model.add_weighted_adapter(names, [1 / count] * count, "mean", combination_type="linear")
    found, single = (layer.lora_B[name].weight @ layer.lora_A[name].weight for name in ("mean", names[0]))
    return float((found.norm() / single.norm()).detach())


def measure(out: Path, *, tiny: bool = False) -> dict[str, Any]:
    """Measure errors and strengths, and write `lora.json`."""
    shapes = TINY_SHAPES if tiny else SHAPES
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = []
        for told, weights, rank in CASES:
            files = write_loras(folder, len(weights), shapes)
            rows.append({"case": told, **error_of(files, weights, rank)})
            print(rows[-1], flush=True)
        strong = [strengths(folder, count) for count in COUNTS]
    result = {"cases": rows, "equal": strong, "rank": RANK, "device": device(), "versions": versions()}
    out.mkdir(parents=True, exist_ok=True)
    (out / FILE).write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result
