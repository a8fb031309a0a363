"""`torch_compile`: equal results, unchanged names, hooks that are added later, errors of one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from postgen.errors import UserError
from postgen.tensor_files import read_tensors
from tests.training.tiny import TinyConfig, TinyTrainer
from tests.worldweaver.training import log_of
from tests.worldweaver.training import trained as worldweaver

AOT = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Sequential):
    """A subclass, because Dynamo does not compile modules of torch's own classes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self:
            x = part(x)
        return x


class Compiled(TinyTrainer):
    """A trainer whose whole network is one block."""

    def build(self) -> Any:
        return {name: Net(*net) for name, net in super().build().items()}

    def compiled_blocks(self, name: str) -> list[nn.Module]:
        return [self.unwrap(name)]


class Listened(Compiled):
    """A trainer that adds a hook to the first layer before the second step."""

    def training_step(self) -> Any:
        if self.global_step == 1:
            self.heard: list[torch.Size] = []
            net: Any = self.unwrap("net")
            net[0].register_forward_hook(lambda module, inputs, output: self.heard.append(output.shape))
        return super().training_step()


def run(folder: Path, kind: type[TinyTrainer] = Compiled, **settings: Any) -> TinyTrainer:
    values = {"report_to": [], "device": "cpu", "disable_tqdm": True, "logging_steps": 1, "max_steps": 4, **settings}
    made = kind(TinyConfig(output_dir=str(folder), **values))
    made.train()
    return made


def test_the_same_run_under_the_same_names(tmp_path: Path) -> None:
    """Weights, EMA and exports are equal with and without compilation, also if it starts after a resume."""
    values = {"bf16": True, "ema_decay": 0.9, "dropout": 0.0}
    plain, compiled = run(tmp_path / "a", **values), run(tmp_path / "b", **values, **AOT)
    expected = plain.unwrap("net").state_dict()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert compiled.unwrap("net").state_dict().keys() == expected.keys()
    run(tmp_path / "c", **values, max_steps=2)
    again = run(tmp_path / "c", **values, **AOT, resume_from_checkpoint="latest")
    for other in (compiled, again):
        assert all(torch.equal(value, expected[name]) for name, value in other.unwrap("net").state_dict().items())
    for each in ("b", "c"):
        for file in (tmp_path / "a" / "export").glob("*.safetensors"):
            before, found = read_tensors(file, "no"), read_tensors(tmp_path / each / "export" / file.name, "no")
            assert before.keys() == found.keys()
            assert all(torch.equal(value, found[name]) for name, value in before.items())


def test_hooks_that_come_later_are_heard(tmp_path: Path) -> None:
    assert len(run(tmp_path, Listened, **AOT).heard) == 3  # type: ignore[attr-defined]


def test_a_network_of_diffusers(tmp_path: Path) -> None:
    """A compiled transformer with LoRA and level embedder, with and without gradients (Dynamo takes seconds)."""
    values = {"max_steps": 1, "bf16": True, "own_share": 0.0}
    plain = worldweaver(tmp_path / "a", **values)
    found = worldweaver(tmp_path / "b", **values, torch_compile=True, torch_compile_backend="eager")
    model: Any = found.unwrap("worldweaver")
    assert all(block._compiled_call_impl is not None for block in model.transformer.blocks)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    expected = plain.unwrap("worldweaver").state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert log_of(tmp_path / "a")[-1]["loss"] == log_of(tmp_path / "b")[-1]["loss"]


def broken(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no compiler on this machine\nat line 3")


def test_what_cannot_be_is_told(tmp_path: Path) -> None:
    if "broken" not in torch.compiler.list_backends(exclude_tags=()):
        torch._dynamo.register_backend(broken, name="broken")
    with pytest.raises(
        UserError, match=r"no repeated blocks are known in net, a Sequential: set torch_compile: false"
    ):
        run(tmp_path / "a", TinyTrainer, **AOT)
    with pytest.raises(UserError, match=r"torch_compile_backend is 'inductr', but torch has .*inductor"):
        run(tmp_path / "b", torch_compile=True, torch_compile_backend="inductr")
    with pytest.raises(UserError, match="broken cannot compile the blocks here: no compiler on this machine"):
        run(tmp_path / "c", torch_compile=True, torch_compile_backend="broken")
    with pytest.raises(UserError, match="it must be left out without torch_compile: true"):
        TinyConfig(output_dir="x", torch_compile_backend="eager")
