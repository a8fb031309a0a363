"""Recording of a model on a GPU: the tensors are stored on the CPU, and blocks are replayed on CPU and GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from postgen.families import blocks_of
from postgen.families.recording import capture, replay
from tests.families.tiny_models import tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("where", ["cpu", "folder"])
@torch.no_grad()
def test_recorded_on_a_gpu(where: str, tmp_path: Path) -> None:
    tiny = tiny_model("HunyuanVideo", batch=2)
    tiny.transformer.cuda()
    arguments = {name: value.cuda() for name, value in tiny.arguments.items()}
    blocks = blocks_of(tiny.transformer)
    place = "cpu" if where == "cpu" else tmp_path / "kept"
    recording = capture(tiny.transformer, blocks, lambda: tiny.transformer(**arguments), where=place)
    for block in blocks:
        (call,) = recording[block.name]
        hidden, _ = block.inputs(*call.inputs())
        assert hidden.device.type == "cpu"
        output, _ = block.outputs(replay(block, call))
        assert output.device.type == "cuda"
        torch.testing.assert_close(output, block.outputs(call.output("cuda"))[0])
    tiny.transformer.cpu()
    for block in blocks:
        (call,) = recording[block.name]
        output, _ = block.outputs(replay(block, call))
        torch.testing.assert_close(output, block.outputs(call.output())[0], atol=1e-4, rtol=1e-4)
