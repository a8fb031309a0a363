"""Pass/fail checks of `python -m benchmarks.lit_speed`: model families, memory of streams, resumed training."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from postgen.families import Grid, blocks_of, denoiser_for
from postgen.families.attention.reading import Norms, Reading, Rope, Stream
from postgen.lit import ChunkOptions, LitConfig, LitOptions, WindowOptions, convert, load, revert, save
from postgen.lit.attention_transfer import attention_tasks, grid_of
from postgen.lit.layers import Shape, make_layer
from postgen.lit.tokens import Tokens
from postgen.reconstruct import ReconstructTask, Records, reconstruct

FAMILIES = ("DiT", "PixArt", "Flux", "Stable Diffusion 3", "Wan", "HunyuanVideo", "CogVideoX 1.5", "LTX")
"""Names of model families, as in the tiny models of the tests."""
STREAMS: dict[str, Any] = {
    "lit": LitOptions(causal=True, center_keys=False),
    "chunk": ChunkOptions(causal=True),
    "window_delta": WindowOptions(causal=True, radius=2),
    "window_linear": WindowOptions(causal=True, radius=2),
}
PIECE = 3
"""Frames per piece of a stream; equals a chunk of the layer type `chunk`."""
PIECES = 8
"""Pieces of the short stream; the long stream has four times as many."""
KILLED_AT = 9
"""Step in which the run is killed; its first checkpoint is after the fifth step."""


def rows(device: str) -> Iterator[dict[str, Any]]:
    """Run every check and yield one row for each, with its value and details."""
    families = {name: family_converts(name) for name in FAMILIES}
    yield {
        "part": "check",
        "check": "families_converted",
        "value": sum(text == "" for text in families.values()),
        "families": families,
    }
    with torch.no_grad():
        streams = {kind: stream_memory(kind, device) for kind in STREAMS}
    yield {
        "part": "check",
        "check": "memory_constant",
        "value": int(all(each["short"] == each["long"] for each in streams.values())),
        "streams": streams,
    }
    with tempfile.TemporaryDirectory() as folder:
        same = resumes_to_the_same(Path(folder))
    yield {"part": "check", "check": "resume_identical", "value": int(same)}


@torch.no_grad()
def family_converts(name: str) -> str:
    """Convert, save, load and revert a tiny model of a family; return the failures as a text, empty for none."""
    from tests.families.tiny_models import TinyModel, tiny_model

    # Two clips, because products with a single row round differently with the alignment of the weights in memory.
    tiny = tiny_model(name, batch=2)
    stock = tiny()
    report = convert(tiny.transformer, LitConfig(layers="all:lit"))
    converted = tiny()
    with tempfile.TemporaryDirectory() as folder:
        save(tiny.transformer, folder)
        again = TinyModel(
            name=name, transformer=load(folder), arguments=tiny.arguments, frames=tiny.frames, attention_layers=0
        )
        loaded = again()
    revert(tiny.transformer)
    facts = {
        "a block other than the first is softmax": set(report.types[1:]) == {"lit"},
        "the output is not finite": bool(converted.isfinite().all()),
        "the output equals that of the stock model": not torch.equal(converted, stock),
        "the loaded model has another output": torch.equal(loaded, converted),
        "the reverted model has another output": torch.equal(tiny(), stock),
    }
    return ", ".join(text for text, right in facts.items() if not right)


def stream_memory(kind: str, device: str) -> dict[str, dict[str, int]]:
    """Return the largest state, and on a GPU the peak memory, of a short stream and of one four times as long.

    On a GPU the layer has the size of Wan 1.3B at 480p in bfloat16, on a CPU it is a tiny one in float32.
    """
    cuda = device == "cuda"
    shape = Shape(heads=12, channels=128, hidden=1536) if cuda else Shape(heads=2, channels=8, hidden=16)
    grid = Grid(frames=PIECE, height=30, width=52) if cuda else Grid(frames=PIECE, height=2, width=3)
    torch.manual_seed(0)
    layer = make_layer(kind, shape, STREAMS[kind]).to(device, torch.bfloat16 if cuda else torch.float32)
    _largest(layer, shape, grid, PIECES)  # warm-up: libraries allocate memory once
    return {
        "short": _largest(layer, shape, grid, PIECES),
        "long": _largest(layer, shape, grid, 4 * PIECES),
    }


def _largest(layer: Any, shape: Shape, grid: Grid, pieces: int) -> dict[str, int]:
    weight = next(layer.parameters())
    place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    cuda = weight.is_cuda
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    state, most = None, 0
    for _ in range(pieces):
        _, state = layer.stream(_piece(shape, grid, place), state)
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in state.values()}
        most = max(most, sum(storages.values()))
    found = {"state_bytes": most}
    return found | ({"peak_bytes": torch.cuda.max_memory_allocated() - before} if cuda else {})


def _piece(shape: Shape, grid: Grid, place: dict[str, Any]) -> Tokens:
    size = (1, grid.tokens, shape.heads, shape.channels)
    query, key, value = (torch.randn(size, **place) for _ in range(3))
    angles = torch.rand(1, grid.tokens, 1, shape.channels // 2, device=place["device"])
    rope = Rope(angles.cos(), angles.sin(), in_float32=False)
    stream = Stream(query, key, value, Norms(None, None), rope)
    return Tokens(Reading(streams=(stream,)), grid, torch.randn(1, grid.tokens, shape.hidden, **place))


def resumes_to_the_same(folder: Path, *, start: str = "spawn") -> bool:
    """Return whether an attention transfer that is killed by signal 9 and resumed ends with the weights of an
    uninterrupted one.

    Args:
        folder: folder for records and runs.
        start: start method of the process that is killed.

    Raises:
        RuntimeError: the process ended without signal 9.
    """
    from tests.reconstruct.toy import records_of, settings

    pipe, size, task = _stage_one()
    records_of(pipe, size, *task.modules, where=folder / "records")
    records = Records.read(folder / "records")
    reconstruct([task], records, settings(folder / "straight"))
    child: Any = multiprocessing.get_context(start).Process(target=_until_killed, args=(folder,))  # type: ignore[attr-defined]
    child.start()
    child.join()
    if child.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"the run was not killed: exit code {child.exitcode}")
    reconstruct([task], records, settings(folder / "killed", resume=True))
    del pipe
    straight, killed = (
        (folder / run / "blocks" / task.name / "finished" / "student.safetensors").read_bytes()
        for run in ("straight", "killed")
    )
    return straight == killed


def _stage_one() -> tuple[Any, dict[str, int], ReconstructTask]:
    """Return a tiny Wan pipeline, the size of its clip, and the task of a new layer in its last block."""
    from tests.reconstruct.toy import PROMPTS, pipeline

    torch.manual_seed(0)
    pipe, size = pipeline("Wan")
    denoiser, last = denoiser_for(pipe), len(blocks_of(pipe.transformer)) - 1
    config = LitConfig(layers=f"{last}:window_delta", window=WindowOptions(radius=0, conv=False))
    (task,) = attention_tasks(denoiser, config, grid_of(denoiser, PROMPTS[0], size))
    return pipe, size, task


def _until_killed(folder: Path) -> None:
    from tests.reconstruct.toy import settings

    torch.set_num_threads(1)
    pipe, _, task = _stage_one()
    given = settings(folder / "killed")
    calls = 0

    def run(*words: Any) -> Any:
        nonlocal calls
        calls += 1
        # There is one held-out call before training, then `gradient_accumulation_steps` calls per step.
        if calls == 1 + KILLED_AT * given.gradient_accumulation_steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return task.run(*words)

    reconstruct([replace(task, run=run)], Records.read(folder / "records"), given)
    del pipe
