"""LoRA files with parts that a loader easily drops: scales of text encoders, names of adapters, unusual tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families.lora import check_lora, load_loras
from postgen.training.lora import AdapterConfig, add_adapters
from tests.families import lora_cases as cases
from tests.families.test_lora_files import OWN, WIDTH, Q, drawn, pair, peft_metadata


def first_layer(module: nn.Module) -> tuple[str, nn.Linear]:
    return next((name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear))


@pytest.mark.parametrize("family", ["Wan", "Wan, two experts", "HunyuanVideo", "FLUX"])
def test_text_encoders_are_changed_as_strongly_as_is_said(tmp_path: Path, family: str) -> None:
    pipe = cases.FAMILIES[family]()
    to = "transformer=" if family == "Wan, two experts" else ""
    files, expected = [], {}
    for number, scale in enumerate((0.5, -0.25)):
        tensors = {}
        for part in ("text_encoder", "text_encoder_2"):
            if (module := getattr(pipe, part, None)) is None:
                continue
            name, layer = first_layer(module) if not number else expected[part][:2]
            down, up = drawn(2, layer.in_features, seed=number), drawn(layer.out_features, 2, seed=number)
            tensors |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
            whole = scale * up.double() @ down.double()
            expected[part] = (name, layer, whole + (expected[part][2] if number else 0))
        save_file(tensors, tmp_path / f"{number}.safetensors")
        files.append(f"{to}{tmp_path / f'{number}.safetensors'}:{scale}")
    load_loras(pipe, files)
    for part, (name, _, change) in expected.items():
        layer = dict(getattr(pipe, part).named_modules())[name]
        eye = torch.eye(layer.in_features)
        with torch.no_grad():
            found = (layer(eye) - layer.base_layer(eye)).T
        torch.testing.assert_close(found.double(), change, rtol=1e-5, atol=1e-5)


def test_an_adapter_may_have_any_name(tmp_path: Path) -> None:
    down, up = pair().values()
    save_file({f"{OWN}.lora_A.my-style.weight": down, f"{OWN}.lora_B.my-style.weight": up}, tmp_path / "a.safetensors")
    found = cases.read_by_postgen(cases.wan(), str(tmp_path / "a.safetensors"))
    assert torch.equal(found["transformer"]["blocks.0.attn1.to_q"], up.double() @ down.double())


WHOLE = torch.ones(2, WIDTH, dtype=torch.int8)
PISSA = peft_metadata(r=2, lora_alpha=2, init_lora_weights="pissa_niter_4")
LOST: dict[str, tuple[dict[str, Tensor], dict[str, str] | None, str]] = {
    "two adapters": (
        {f"{OWN}.lora_A.{name}.weight": drawn(2, WIDTH) for name in ("one", "two")},
        None,
        "contains blocks.0.attn1.to_q twice",
    ),
    "no weight": (
        {f"{OWN}.lora_A": drawn(2, 24), f"{OWN}.lora_B": drawn(24, 2)},
        None,
        "2 of its 2 tensors cannot be",
    ),
    "bias of A": ({**pair(OWN), f"{OWN}.lora_A.bias": drawn(2)}, None, r"1 of its 3 tensors .*to_q\.lora_A\.bias$"),
    "LoKr": (
        {f"diffusion_model.blocks.0.attn1.to_q.lokr_w{n}": drawn(4, 4, seed=n) for n in (1, 2)},
        None,
        r"2 of its 2 tensors cannot be applied to WanPipeline: \S+lokr_w1",
    ),
    "integers": ({**pair(OWN), f"{OWN}.lora_down.weight": WHOLE}, None, r"is quantised: integers in 1 tensors: trans"),
    "PiSSA": (pair(OWN), PISSA, "was initialised with pissa_niter_4, which also changes the weights"),
    "alpha": ({**pair(), f"{Q}.alpha": torch.tensor(1e30)}, None, r"alpha of blocks\.0\.attn1\.to_q is 5e\+29 times"),
}


@pytest.mark.parametrize("what", LOST)
def test_what_would_be_lost_or_mean_something_else_is_refused(tmp_path: Path, what: str) -> None:
    tensors, metadata, said = LOST[what]
    save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
    pipe = cases.wan()
    with pytest.raises(UserError, match=said):
        load_loras(pipe, [str(tmp_path / "a.safetensors")])
    assert not hasattr(pipe.transformer.blocks[0].attn1.to_q, "base_layer")


def test_training_does_not_begin_by_changing_the_model() -> None:
    pipe: Any = cases.wan()
    config = LoraConfig(r=2, init_lora_weights="olora", target_modules=["to_q"])
    with pytest.raises(UserError, match="has init_lora_weights olora, which also changes the model"):
        add_adapters(pipe, cases.denoiser_for(pipe), AdapterConfig(), config)


def test_a_part_of_a_sharded_lora_is_refused(tmp_path: Path) -> None:
    shards = [tmp_path / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for shard, base in zip(shards, (OWN, OWN[:-1] + "k"), strict=True):
        save_file(pair(base), shard)
    for path in (shards[0], tmp_path):
        with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors is one of 2 shards of a LoRA"):
            check_lora(str(path))
    shards[0].rename(tmp_path / "model-00001-of-00001.safetensors")
    check_lora(str(tmp_path / "model-00001-of-00001.safetensors"))
