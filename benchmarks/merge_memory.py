"""Measure the memory and the time of `postgen merge` on full weights with the shapes of Wan 1.3B.

The weights are random: memory and time do not depend on them. The sources are hard links to one file, so that the disk
needs room for two models (6 GB, `--folder`). Needs Linux: the kernel tells the largest memory of the process.

    python -m benchmarks.merge_memory
    python -m benchmarks.merge_memory --tiny --output tiny.json
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.gates import gate, largest, write_result
from postgen.merging import MergeConfig, merge
from postgen.tensor_files import TensorRow, writing_blocks, written_order

SHAPES: dict[str, dict[str, int]] = {
    "Wan 1.3B": {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
    "tiny": {"num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 512, "num_layers": 1},
}
MERGES: tuple[tuple[str, int, dict[str, Any], bool], ...] = (
    ("mean of 3", 3, {"method": "sma"}, False),
    ("weighted mean of 5", 5, {"method": "wma"}, False),
    ("between a base and a mean of 2", 2, {"method": "sma", "eta": 0.5}, True),
    ("slerp", 2, {"method": "slerp"}, False),
)
"""Name, number of sources, settings, whether there is a base."""

_BLOCK = 2**22
_FILE = "diffusion_pytorch_model.safetensors"


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to test the script")
    parser.add_argument("--folder", type=Path, default=None, help="folder for the models")
    parser.add_argument("--output", type=Path, default=Path("merge_memory"), help="name or path of the result")
    words = parser.parse_args()
    name = "tiny" if words.tiny else "Wan 1.3B"
    with tempfile.TemporaryDirectory(dir=words.folder) as folder:
        rows = write_model(Path(folder) / "model", SHAPES[name])
        most = max(row.size for row in rows.values())
        # Each merge has its own process, because memory that a process has freed may stay with it.
        with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            measured = [pool.apply(measure, (Path(folder), most, *each)) for each in MERGES]
    payload = {
        "model": name,
        "bytes": sum(row.size for row in rows.values()),
        "largest_tensor": most,
        "merges": measured,
        # The tensors of the tiny model are smaller than a block.
        "gates": [] if words.tiny else [gate("merge_peak_over_largest_tensor", largest(measured, "ratio"), "<=", 3)],
    }
    print(write_result(str(words.output), payload))


def write_model(folder: Path, shape: dict[str, int]) -> dict[str, TensorRow]:
    """Write a network with random weights in bfloat16, and return its tensors."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model: Any = WanTransformer3DModel(**shape)
    state = model.state_dict()
    rows = {key: TensorRow("BF16", tuple(value.shape), 2 * value.numel()) for key, value in state.items()}
    rows = {key: rows[key] for key in written_order(rows)}
    folder.mkdir(parents=True)
    random = torch.randn(_BLOCK).bfloat16()
    with writing_blocks(folder / _FILE, rows, {"format": "pt"}) as write:
        for row in rows.values():
            for start in range(0, row.count, _BLOCK):
                write(random[: min(_BLOCK, row.count - start)])
    (folder / "config.json").write_text("{}")
    return rows


def measure(folder: Path, most: int, name: str, count: int, settings: dict[str, Any], base: bool) -> dict[str, Any]:
    """Merge, and return the largest memory beyond that before the merge, in bytes and as a multiple of `most`."""
    sources = [folder / f"source-{number}" for number in range(count + base)]
    for source in sources:
        source.mkdir()
        for file in (folder / "model").iterdir():
            (source / file.name).hardlink_to(file)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    began = time.perf_counter()
    merge(sources[:count], folder / "out", MergeConfig(**settings), base=sources[-1] if base else None)
    seconds = time.perf_counter() - began
    peak = _memory("VmHWM") - before
    for place in (*sources, folder / "out"):
        shutil.rmtree(place)
    return {"name": name, "sources": count, "peak": peak, "ratio": round(peak / most, 3), "seconds": round(seconds, 1)}


def _memory(key: str) -> int:
    """Return a number of bytes from the kernel: VmRSS is the memory now, VmHWM the most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


if __name__ == "__main__":
    main()
