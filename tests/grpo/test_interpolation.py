"""Interpolation of an export with its base model, for whole networks and for a LoRA."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from postgen.errors import UserError
from postgen.families.loading import inspect_model, load_pipeline
from postgen.grpo.interpolation import interpolate_export
from tests.grpo.test_lora import video_run


def network(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_pipeline(inspect_model(folder), device="cpu").transformer.state_dict()
    return state


def test_whole_networks(tiny_wan: Path, tmp_path: Path) -> None:
    video_run(tiny_wan, tmp_path, use_peft=False, ema_decay=0.0).train()
    export, base = tmp_path / "run" / "export", network(tiny_wan)
    tuned = network(export)
    found = {amount: network(interpolate_export(export, tmp_path / f"{amount}", amount)) for amount in (0, 0.25, 1)}
    for name, value in tuned.items():
        assert torch.equal(found[0][name], base[name])
        assert torch.equal(found[1][name], value)
        torch.testing.assert_close(found[0.25][name], 0.75 * base[name] + 0.25 * value)
    assert not all(torch.equal(value, base[name]) for name, value in tuned.items())
    again = video_run(tiny_wan, tmp_path / "again", use_peft=False, init_from=str(tmp_path / "0.25"), max_steps=1)
    again.train()
    with pytest.raises(UserError, match="output is the export itself"):
        interpolate_export(export, export, 0.5)
    with pytest.raises(UserError, match="amount must be at least -100 and at most 100, got 'x'"):
        interpolate_export(export, tmp_path / "x", "x")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="is not the export of a run: it holds neither"):
        interpolate_export(tiny_wan, tmp_path / "x", 0.5)
    with pytest.raises(UserError, match=r"is the folder of a run: give its export, .*export"):
        interpolate_export(Path(export).parent, tmp_path / "x", 0.5)
    assert not (tmp_path / "x").exists()
    for place, said in ((export / "half", "lies inside the export"), (export.parent, "exists and is not an export")):
        with pytest.raises(UserError, match=said):
            interpolate_export(export, place, 0.5)
    assert (export / "base.json").exists()


def test_a_lora_is_scaled(tiny_wan: Path, tmp_path: Path) -> None:
    """The file gives the weights that `set_adapters` gives with the same scale."""
    from diffusers import WanPipeline

    video_run(tiny_wan, tmp_path).train()
    export, half = tmp_path / "run" / "export", tmp_path / "half"
    interpolate_export(export, half, 0.5)
    assert {path.name for path in half.iterdir()} == {path.name for path in export.iterdir()}

    def fused(folder: Path, scale: float) -> dict[str, torch.Tensor]:
        pipe = WanPipeline.from_pretrained(tiny_wan)
        pipe.load_lora_weights(folder, adapter_name="own")
        pipe.fuse_lora(lora_scale=scale)
        pipe.unload_lora_weights()
        state: dict[str, torch.Tensor] = pipe.transformer.state_dict()
        return state

    one, other, whole = fused(half, 1.0), fused(export, 0.5), fused(export, 1.0)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name])
    assert not all(torch.equal(value, whole[name]) for name, value in one.items())
    name = "pytorch_lora_weights.safetensors"
    assert load_file(half / name).keys() == load_file(export / name).keys()
    video_run(tiny_wan, tmp_path / "more", lora_path=str(half), max_steps=1).train()
