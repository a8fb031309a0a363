"""An adapter restores a trained model, bit by bit, on its own base model; other base models are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import postgen
from postgen.errors import UserError
from postgen.families import denoiser_for
from postgen.worldweaver.adapter import LoadedAdapter, load_adapter, save_adapter
from postgen.worldweaver.embedding import LevelEmbedder
from postgen.worldweaver.levels import FrameLevels
from postgen.worldweaver.model import WorldWeaverModel
from postgen.worldweaver.widen import widen_transformer
from tests.tiny_wan import wan_components


def stock(**settings: Any) -> Any:
    from diffusers import WanPipeline

    return WanPipeline(**wan_components(**settings))


def trained(
    *, lora: bool = True, aux: tuple[Any, ...] = ("depth",), placed: bool = False
) -> tuple[Any, LevelEmbedder]:
    """Return a pipeline with changed weights, as after training: both layers (also RGB), level embedder, LoRA."""
    from peft import LoraConfig

    pipe = stock()
    widen_transformer(pipe, aux, placed=placed)
    model, embedder = pipe.transformer, LevelEmbedder.for_transformer(pipe, frequencies=4, hidden=8)
    if lora:
        model.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "ffn.net.2"]))
    source = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *embedder.named_parameters()]:
            if "lora_" in name or name.startswith(("patch_embedding", "proj_out", "inner", "outer")):
                parameter.add_(torch.randn(parameter.shape, generator=source), alpha=0.1)
    return pipe, embedder


@torch.no_grad()
def prediction(pipe: Any, embedder: LevelEmbedder) -> Tensor:
    model = WorldWeaverModel(denoiser_for(pipe), embedder)
    source, count = torch.Generator().manual_seed(0), len(model.modalities)
    z = torch.randn(1, 4 * count, 3, 4, 6, generator=source)
    levels = FrameLevels(sigma=torch.rand(1, 3, count, generator=source), role=torch.arange(3))
    condition = model.denoiser.encode_prompt(["a red ball"])
    if model.shown:
        condition["placed"] = torch.randn(1, model.shown, 2, 4, 6, generator=source)
    return model.predict(z, levels, condition, 3.0)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """Save an adapter with LoRA; return its folder and a prediction of its model. Tests must not change it."""
    pipe, embedder = trained()
    folder = tmp_path_factory.mktemp("adapter") / "out"
    save_adapter(pipe, folder, embedder, settings={"ar_step": 7})
    return folder, prediction(pipe, embedder)


def test_loaded_it_predicts_the_same_bits(written: tuple[Path, Tensor]) -> None:
    folder, expected = written
    pipe = stock()
    loaded = load_adapter(pipe, folder)
    assert isinstance(loaded, LoadedAdapter)
    assert (loaded.modalities, loaded.settings) == (("rgb", "depth"), {"ar_step": 7})
    assert torch.equal(prediction(pipe, loaded.embedder), expected)
    assert "worldweaver: rgb + depth" in str(postgen.summary(pipe))
    assert sum(file.stat().st_size for file in folder.iterdir()) < 60_000
    # diffusers can load the LoRA of the adapter.
    plain = stock()
    plain.load_lora_weights(folder)
    assert plain.transformer.peft_config


def test_the_scale_of_latents_comes_back(written: tuple[Path, Tensor], tmp_path: Path) -> None:
    """Loading sets the scale of the adapter, or 1 if the adapter has none. A damaged scale is refused."""
    pipe, embedder = trained(lora=False)
    WorldWeaverModel(denoiser_for(pipe), embedder, latent_scale=[1, 0.46])
    save_adapter(pipe, tmp_path / "out", embedder, settings={"ar_step": 7})
    other = stock()
    loaded = load_adapter(other, tmp_path / "out")
    assert loaded.settings == {"ar_step": 7, "latent_scale": [1, 0.46]}
    assert WorldWeaverModel(denoiser_for(other), loaded.embedder).latent_scale == (1, 0.46)
    again = load_adapter(other, written[0])
    assert WorldWeaverModel(denoiser_for(other), again.embedder).latent_scale == (1, 1)
    changed_note(settings={"latent_scale": [1, -2]})(tmp_path / "out")
    with pytest.raises(UserError, match=r"is damaged: latent_scale is \[1, -2\]: give 2 numbers above 0"):
        load_adapter(stock(), tmp_path / "out")


@pytest.mark.parametrize(("aux", "placed"), [((), False), (("depth", "flow"), False), (("depth",), True), ((), True)])
def test_without_lora_a_transformer_will_do(tmp_path: Path, aux: tuple[Any, ...], placed: bool) -> None:
    if aux or placed:
        pipe, embedder = trained(lora=False, aux=aux, placed=placed)
    else:  # with RGB only, an adapter trains just the level embedder
        from postgen.worldweaver.widen import widened

        pipe = stock()
        widened(pipe, ("rgb",))
        embedder = LevelEmbedder.for_transformer(pipe)
        torch.nn.init.normal_(embedder.outer.weight)
    save_adapter(pipe.transformer, tmp_path / "out", embedder)
    other = stock()
    loaded = load_adapter(other.transformer, tmp_path / "out")
    assert torch.equal(prediction(other, loaded.embedder), prediction(pipe, embedder))


def test_other_weights_and_number_types_are_written(tmp_path: Path) -> None:
    pipe, embedder = trained()
    state = {name: value + 0.25 for name, value in pipe.transformer.state_dict().items()}
    weights = {
        "transformer": state,
        "level_embedder": {name: value * 2 for name, value in embedder.state_dict().items()},
    }
    save_adapter(pipe, tmp_path / "out", embedder, weights=weights, dtype=torch.float16)
    files = [load_file(file) for file in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert {value.dtype for tensors in files for value in tensors.values()} == {torch.float16}
    other = stock()
    loaded = load_adapter(other, tmp_path / "out")
    for name, value in loaded.embedder.state_dict().items():
        torch.testing.assert_close(value, weights["level_embedder"][name], rtol=1e-3, atol=1e-3)
    for name, value in other.transformer.state_dict().items():
        if "lora_" in name or name.startswith(("patch_embedding", "proj_out")):
            own = name.replace(".worldweaver.", ".default.")
            torch.testing.assert_close(value, state[own], rtol=1e-3, atol=1e-3)


def test_a_base_in_another_number_type_is_the_same_base(written: tuple[Path, Tensor]) -> None:
    from diffusers import WanTransformer3DModel

    folder, expected = written
    pipe = stock()
    half = WanTransformer3DModel.from_config(pipe.transformer.config)
    half.load_state_dict(pipe.transformer.state_dict())
    pipe.transformer = half.to(torch.bfloat16).eval()
    loaded = load_adapter(pipe, folder)
    torch.testing.assert_close(prediction(pipe, loaded.embedder), expected, rtol=0, atol=0.3)


def changed_note(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        note = json.loads((folder / "worldweaver.json").read_text())
        (folder / "worldweaver.json").write_text(json.dumps(note | changes))

    return change


def changed_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors = load_file(folder / "worldweaver.safetensors")
        change(tensors)
        save_file(tensors, folder / "worldweaver.safetensors")

    return write


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-40])


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no note": (lambda folder: (folder / "worldweaver.json").unlink(), "is not a WorldWeaver adapter: the file"),
    "half a note": (cut("worldweaver.json"), "worldweaver.json cannot be read: "),
    "an entry more": (changed_note(more=1), "worldweaver.json must have modalities, placed, base"),
    "a base that is none": (changed_note(base={}), "is damaged: its description of the base model is {}"),
    "modalities": (changed_note(modalities=["rgb", "sound"]), r"modalities must be .* got \['rgb', 'sound'\]"),
    "fewer modalities": (changed_note(modalities=["rgb"]), "the level embedder has 2 modalities, the adapter has 1"),
    "no number": (changed_note(lora="yes"), "lora must be a bool, got 'yes'"),
    "embedder": (changed_note(level_embedder={"width": -1}), r"the level embedder config is \{'width': -1\}"),
    "half the layers": (cut("worldweaver.safetensors"), "the adapter .* cannot be read: "),
    "half the LoRA": (cut("pytorch_lora_weights.safetensors"), "cannot read the LoRA "),
    "no LoRA": (lambda folder: (folder / "pytorch_lora_weights.safetensors").unlink(), "cannot read the LoRA "),
    "a layer too few": (changed_tensors(lambda each: each.pop("proj_out.bias")), "proj_out.bias is missing"),
    "a layer too many": (changed_tensors(lambda each: each.update(x=torch.zeros(1))), "is damaged: x is unknown"),
    "a part of the embedder by another name": (
        changed_tensors(lambda each: each.update({"level_embedder/x": each.pop("level_embedder.inner.bias")})),
        "inner.bias is missing",
    ),
    "another shape": (
        changed_tensors(lambda each: each.update({"proj_out.bias": torch.zeros(3)})),
        r"proj_out.bias has shape \(3,\), the layer needs \(32,\)",
    ),
    "not finite": (
        changed_tensors(lambda each: each["level_embedder.outer.bias"].fill_(float("inf"))),
        "outer.bias has values that are not finite",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_adapters_are_one_line_and_change_nothing(
    damage: str, written: tuple[Path, Tensor], tmp_path: Path
) -> None:
    spoil, message = DAMAGES[damage]
    folder = tmp_path / "spoilt"
    shutil.copytree(written[0], folder)
    spoil(folder)
    pipe = stock()
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    with pytest.raises(UserError, match=message) as error:
        load_adapter(pipe, folder)
    assert "\n" not in str(error.value)
    after = pipe.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert pipe.transformer.config.in_channels == 4
    assert "nothing is on" in str(postgen.summary(pipe))


def test_other_models_are_refused(written: tuple[Path, Tensor], tiny_lora: Path) -> None:
    from tests.families.tiny_pipelines import tiny_pipeline

    folder, _ = written
    wide, with_memory = stock(), stock()
    widen_transformer(wide, ("depth", "flow"))
    widen_transformer(with_memory, placed=True)
    with_lora = stock()
    with_lora.load_lora_weights(tiny_lora)
    for target, message in (
        (
            stock(seed=1),
            "was trained on another model: on a WanTransformer3DModel of the same size with other values",
        ),
        (stock(in_channels=12), "another model: in_channels of its base is 4, in_channels of this model is 12"),
        (
            tiny_pipeline("SkyReels-V2")[0],
            "on a WanTransformer3DModel, but .* is a SkyReelsV2Transformer3DModel",
        ),
        (wide, "this transformer has rgb, depth, flow, but rgb, depth is requested"),
        (with_memory, "is for a model without placed memory"),
        (with_lora, "has a LoRA, but the transformer already has .*: load the adapter before other LoRAs"),
        (stock().transformer, "has a LoRA, which only a pipeline can load: give the pipeline"),
    ):
        with pytest.raises(UserError, match=message):
            load_adapter(target, folder)


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    from peft import LoraConfig

    pipe, embedder = trained()
    (tmp_path / "file").write_text("")
    calls: tuple[tuple[Any, dict[str, Any], str], ...] = (
        (stock(), {"embedder": embedder}, "is not widened"),
        (pipe, {}, "no level embedder: give embedder, or a pipeline with"),
        (pipe, {"embedder": embedder, "lora": "style"}, "the transformer has no LoRA 'style': choose from default"),
        (pipe.transformer, {"embedder": embedder}, "the transformer has a LoRA, which only a pipeline can write"),
    )
    for target, settings, message in calls:
        with pytest.raises(UserError, match=message):
            save_adapter(target, tmp_path / "out", **settings)
    with pytest.raises(UserError, match="it is a file, give the name of a folder"):
        save_adapter(pipe, tmp_path / "file", embedder)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_v"]), adapter_name="style")
    with pytest.raises(UserError, match=r"has several LoRAs \(default, style\): give the name"):
        save_adapter(pipe, tmp_path / "out", embedder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_an_old_adapter_stays_until_the_new_one_is_complete(
    written: tuple[Path, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(written[0], folder)
    pipe, embedder = trained()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("postgen.worldweaver.adapter.save_lora", full)
    with pytest.raises(OSError, match="no space"):
        save_adapter(pipe, folder, embedder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    other = stock()
    loaded = load_adapter(other, folder)
    assert torch.equal(prediction(other, loaded.embedder), written[1])
