"""Runs of the block-wise engine on a tiny Wan. As a program (`python -m tests.quant.blockwise FOLDER`): runs that are
killed with signal 9 at the points of `tests.reconstruct.killed`; each is a fork of one process.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from postgen.families import blocks_of
from postgen.families.linear import find_linears
from postgen.quant import LayerSpec, format_of
from postgen.quant.engine import BlockwiseRun, LayerResult
from postgen.quant.stages import RECIPES
from postgen.quant.student import StudentPlan
from postgen.reconstruct import Records
from tests.reconstruct.killed import set_up
from tests.reconstruct.toy import pipeline, settings

KILLED = ("while a checkpoint is written", "in the second block")
"""The points at which a run is killed: it resumes in a block, and behind a block that is read again."""
SHORT: dict[str, Any] = {"gradient_accumulation_steps": 1}
"""Settings of a run that is killed."""
CROSS = (".attn2.to_k", ".attn2.to_v")


def layers(transformer: nn.Module, weight: str | None, act: str | None) -> dict[str, LayerSpec]:
    """Return a spec for each linear layer of the blocks that reads the video."""
    spec = LayerSpec(weight=weight and format_of(weight), act=act and format_of(act))
    return {name: spec for name in find_linears(transformer) if not name.endswith(CROSS)}


def stages(
    transformer: nn.Module,
    records: Records,
    folder: Path,
    recipe: str,
    weight: str | None,
    act: str | None,
    **values: Any,
) -> list[BlockwiseRun]:
    """Run all stages of a recipe, and return them."""
    done: list[BlockwiseRun] = []
    for number, stage in enumerate(RECIPES[recipe].stages):
        plan = StudentPlan(layers=layers(transformer, weight, act), stage=stage)
        rates = {"learning_rate": stage.learning_rate, "learning_rate_new": stage.learning_rate_new, "ema_decay": 0.0}
        config = settings(folder / str(number), loss=stage.loss, **{**rates, **values})
        done.append(BlockwiseRun(blocks_of(transformer), plan, records, config, former=done[-1] if done else None))
        done[-1].result = done[-1].run()  # type: ignore[attr-defined]
    return done


def tensors(layer: LayerResult) -> list[Tensor | None]:
    """Return all tensors of a result."""
    packed = [each for _, each in sorted((layer.packed or {}).items())]
    return [*packed, layer.weight, layer.bias, *(layer.branch or ())]


def same(a: dict[str, LayerResult], b: dict[str, LayerResult]) -> bool:
    """Whether two results are equal, bit by bit."""
    pairs = [pair for name in a for pair in zip(tensors(a[name]), tensors(b[name]), strict=True)]
    return a.keys() == b.keys() and all(x is y is None or torch.equal(_bits(x), _bits(y)) for x, y in pairs)


def _bits(x: Tensor | None) -> Tensor:
    assert x is not None
    return x.view(torch.uint8) if x.dtype.is_floating_point and x.dtype.itemsize == 1 else x


def main(folder: Path) -> None:
    pipe, _ = pipeline("Wan")
    records = Records.read(folder / "records")
    for point in KILLED:
        child = os.fork()
        if not child:
            set_up(point)
            stages(pipe.transformer, records, folder / point, "omniquant", "int4:g8", "int4:token", **SHORT)
            os._exit(0)  # the process was not killed, and the parent reports this
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), (point, status)
        assert os.WTERMSIG(status) == signal.SIGKILL, (point, status)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
