"""A LoRA of the trainer is restored exactly in every family and format, by postgen's loader and by diffusers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks.faults_lora import REFUSED, outcomes
from postgen.errors import UserError
from postgen.families.lora import load_loras
from postgen.families.lora_export import export_lora
from postgen.families.lora_file import NOTE, WEIGHTS
from postgen.families.lora_names import NAMES
from postgen.training.lora import AdapterConfig, add_adapters
from tests.families import lora_cases as cases


@pytest.fixture(scope="module")
def pipe() -> Any:
    return cases.wan()


@pytest.fixture(autouse=True)
def _plain(pipe: Any) -> Any:
    yield
    pipe.unload_lora_weights()


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_lora_comes_back_exactly(tmp_path: Path, family: str) -> None:
    found = list(outcomes(family, tmp_path, twice=family in ("Wan", "FLUX")))
    assert [each for each in found if not each.holds and not each.refused] == []
    assert {each.format for each in found if each.refused} == {format for name, format in REFUSED if name == family}
    assert len(found) == (10 if family in ("Wan", "FLUX") else 4)


def test_a_lora_that_does_not_come_back_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one format, one number of one layer is changed."""
    from postgen.families import lora_export

    def spoilt(layers: Any, style: Any, keyed: Any = lora_export.keyed) -> Any:
        tensors = keyed(layers, style)
        if style == "kohya":
            next(value for value in tensors.values() if value.ndim == 2)[0, 0] += 2.0**-20
        return tensors

    monkeypatch.setattr(lora_export, "keyed", spoilt)
    found = {each.format: each for each in outcomes("Wan", tmp_path, twice=False)}
    assert [name for name, each in found.items() if not each.holds] == ["kohya"]
    assert found["kohya"].postgen == found["kohya"].diffusers == "16 layers changed; they differ from the 16 expected"


@pytest.mark.parametrize(
    ("dtype", "format", "error"),
    [
        (torch.bfloat16, "comfyui", 0.0),  # written in float32
        (torch.bfloat16, "kohya", 0.0),
        (torch.float32, "kohya", 0.0),
        (torch.float32, "diffusers", 0.0),
        (torch.float32, "comfyui", 2.0**-23),  # has no alpha, so it is rounded
    ],
)
def test_lora_of_any_alpha(pipe: Any, tmp_path: Path, dtype: torch.dtype, format: Any, error: float) -> None:
    """Alpha is three times the rank, so the scale is not a power of two."""
    adapter = cases.trained(pipe, alpha=12)
    pipe.transformer.to(dtype)
    cases.save(pipe, tmp_path, adapter)
    pipe.transformer.float()
    expected = cases.changes(pipe)
    pipe.unload_lora_weights()
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {dtype}
    export_lora(tmp_path, tmp_path / "out.safetensors", format)
    found = cases.read_by_postgen(pipe, str(tmp_path / "out.safetensors"))["transformer"]
    for name, change in expected["transformer"].items():
        assert (found[name] - change).abs().max() <= error * change.abs().max()
    assert found.keys() == expected["transformer"].keys()


def test_lora_of_every_layer_that_has_a_name(tmp_path: Path) -> None:
    """The LoRA has layers of the MLP and of the image keys in one of two blocks, and many layers in no block."""
    from diffusers import WanTransformer3DModel

    pipe = cases.wan()
    config = {key: value for key, value in pipe.transformer.config.items() if not key.startswith("_")}
    pipe.register_modules(transformer=WanTransformer3DModel(**config | {"added_kv_proj_dim": 24, "image_dim": 8}))
    targets = ["blocks.1.attn1.to_q", "blocks.1.ffn.net.2", "blocks.1.attn2.add_k_proj"]
    adapter = cases.trained(pipe, peft_config=LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    cases.save(pipe, tmp_path, adapter)
    (tmp_path / NOTE).unlink()
    expected = cases.changes(pipe)
    assert len(expected["transformer"]) == 3
    pipe.unload_lora_weights()
    file = tmp_path / "out.safetensors"
    export_lora(tmp_path / WEIGHTS, file, "kohya")
    assert cases.same(cases.read_by_postgen(pipe, str(file)), expected)
    assert cases.same(cases.read_by_diffusers(pipe, {"transformer": file}), expected)
    # The zero layers that were added for diffusers are not trained.
    adapter = add_adapters(pipe, cases.denoiser_for(pipe), AdapterConfig(lora_path=str(file)))
    assert cases.same(cases.changes(pipe), expected)
    trained = [name for name, value in pipe.transformer.named_parameters() if value.requires_grad and "lora_" in name]
    assert (adapter, len(trained)) == ("lora0", 6)


def test_kohya_of_wan_needs_the_width_of_the_mlps(pipe: Any, tmp_path: Path) -> None:
    cases.save(pipe, tmp_path, cases.trained(pipe))
    (tmp_path / NOTE).unlink()
    with pytest.raises(UserError, match="their width is unknown for a model of width 24: convert the folder of the"):
        export_lora(tmp_path, tmp_path / "out.safetensors", "kohya")
    (tmp_path / NOTE).write_text(json.dumps({"pipeline": "WanPipeline", "outputs": {"blocks.{}.ffn.net.0.proj": 32}}))
    export_lora(tmp_path, tmp_path / "out.safetensors", "kohya")
    pipe.unload_lora_weights()
    adapter = cases.trained(pipe, peft_config=LoraConfig(r=2, target_modules=["to_q", "condition_embedder.time_proj"]))
    cases.save(pipe, tmp_path / "b", adapter)
    with pytest.raises(
        UserError, match=r"only know layers inside the blocks, not time_projection\.1: use --format comfyui"
    ):
        export_lora(tmp_path / "b", tmp_path / "out.safetensors", "kohya")


def test_an_exported_file_says_what_it_is_for(tmp_path: Path) -> None:
    """The metadata send a file of the second expert to that expert, and identify the family of ambiguous layers."""
    two = cases.two_experts()
    adapter = cases.trained(two)
    cases.save(two, tmp_path, adapter)
    expected = cases.changes(two)
    two.unload_lora_weights()
    second = tmp_path / "low.safetensors"
    export_lora(tmp_path / "transformer_2", second, "kohya")
    with safe_open(second, "pt") as content:
        note = json.loads(content.metadata()["postgen"])
    assert (note["pipeline"], note["network"]) == ("WanPipeline", "transformer_2")
    found = cases.read_by_postgen(two, str(second))
    assert found["transformer"] == {}
    assert cases.same({"transformer_2": found["transformer_2"]}, {"transformer_2": expected["transformer_2"]})
    with pytest.raises(
        UserError, match=r"holds a LoRA for each of two networks: give .*transformer or .*transformer_2$"
    ):
        export_lora(tmp_path, second, "kohya")


def test_two_experts_are_told_apart(tmp_path: Path) -> None:
    two, one = cases.two_experts(), cases.wan()
    cases.save(two, tmp_path / "two", cases.trained(two))
    expected = cases.changes(two)
    two.unload_lora_weights()
    cases.save(one, tmp_path / "one", cases.trained(one))
    first = cases.changes(one)["transformer"]
    one.unload_lora_weights()
    single = str(tmp_path / "one")
    with pytest.raises(UserError, match=r"does not name its one: give it as transformer=\S+ \(high noise\) or tr"):
        load_loras(two, [single])
    found = cases.read_by_postgen(two, f"transformer_2={single}:0.5", str(tmp_path / "two"))
    assert cases.same({"": found["transformer"]}, {"": expected["transformer"]})
    for name, change in expected["transformer_2"].items():
        assert torch.equal(found["transformer_2"][name], change + 0.5 * first[name])
    alone = cases.read_by_postgen(two, f"transformer={tmp_path / 'two'}")
    assert (alone["transformer"].keys(), alone["transformer_2"]) == (first.keys(), {})
    with pytest.raises(UserError, match="is for transformer_2, which this WanPipeline does not have"):
        load_loras(one, [str(tmp_path / "two")])
    with pytest.raises(UserError, match="is for transformer_2, which this WanPipeline does not have"):
        load_loras(one, [f"transformer_2={single}"])


@pytest.mark.parametrize("family", ["Wan", "Wan, two experts", "LTX", "FLUX", "Stable Diffusion"])
def test_training_goes_on_from_every_format(tmp_path: Path, family: str) -> None:
    """`lora_path` reads what `export-lora` writes, and the next export is the same LoRA."""
    pipe = cases.FAMILIES[family]()
    cases.save(pipe, tmp_path / "run" / "export", cases.trained(pipe))
    expected = cases.changes(pipe)
    pipe.unload_lora_weights()
    sources = [tmp_path / "run"]
    if len(expected) == 1:
        sources += [tmp_path / f"{format}.safetensors" for format in ("comfyui", "kohya", "diffusers")]
    for source in sources:
        if source.suffix:
            export_lora(tmp_path / "run", source, source.stem)  # type: ignore[arg-type]
        adapter = add_adapters(pipe, cases.denoiser_for(pipe), AdapterConfig(lora_path=str(source)))
        assert cases.same(cases.changes(pipe), expected)
        assert adapter is not None
        cases.save(pipe, tmp_path / f"again-{source.stem}", adapter)
        pipe.unload_lora_weights()
        assert cases.same(cases.read_by_postgen(pipe, str(tmp_path / f"again-{source.stem}")), expected)


def test_training_refuses_what_it_would_not_write(pipe: Any, tmp_path: Path) -> None:
    two = cases.two_experts()
    cases.save(pipe, tmp_path, cases.trained(pipe))
    pipe.unload_lora_weights()
    for target, path, said in (
        (pipe, f"{tmp_path}:0.5", "training continues from a LoRA at scale 1, remove the scale 0.5"),
        (two, f"transformer={tmp_path}", "has no LoRA for transformer_2, but training needs one"),
    ):
        with pytest.raises(UserError, match=said):
            add_adapters(target, cases.denoiser_for(target), AdapterConfig(lora_path=path))


def test_names_are_one_to_one() -> None:
    """Each diffusers layer has its own name of the author, and is found by this name, with dots and underscores."""
    import diffusers

    from postgen.families.lora_names import author_name, own_names

    for names in NAMES.values():
        assert all(hasattr(diffusers, kind) for kind in (*names.pipelines, *names.networks))
        for theirs, members in names.rows():
            mine = [member.format(3, 1, 2, 4) for member in members]
            places = [author_name(name, names) for name in mine]
            assert [place.part for place in places if place is not None] == list(range(len(mine)))
            for separator in (".", "_"):
                found = own_names(
                    theirs.format(3, 1, 2, 4).replace(".", separator), names, underscored=separator == "_"
                )
                assert list(found) == mine
