"""Adapters, small files for the stock model: saving, applying and removing, in every family and on the CLI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from postgen.assets import embedded_lit, embedded_model
from postgen.errors import UserError
from postgen.families.linear import replace_linears
from postgen.lit import LitConfig, MhlaOptions, WindowOptions, apply_adapter, convert, layers_of, revert, save_adapter
from postgen.lit.adapter import FORMAT, read_adapter
from postgen.lit.options import LINEAR_TYPES
from tests.lit.distil import PICTURES, VIDEO, teacher

CONFIG = LitConfig(layers="1:window_delta", window=WindowOptions(radius=0))


def trained(model: Any, config: LitConfig, *, inherited: bool = True) -> None:
    """Convert a model, and change the weights that a training of its attention changes."""
    convert(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for module, layer in layers_of(model).items():
            for parameter in layer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            attention: Any = model.get_submodule(module)
            projection = attention.to_v if hasattr(attention, "to_v") else attention.to_qkv
            if inherited:
                projection.weight.add_(0.1)


@pytest.mark.parametrize("name", [*VIDEO, *PICTURES])
def test_every_family_has_adapters_that_come_off(name: str, tmp_path: Path) -> None:
    kind = "lit" if name in PICTURES else "window_delta"
    config = LitConfig(layers=f"all:{kind}", first_block=True, window=WindowOptions(radius=0))
    student, base, other = (teacher(name)[0].transformer for _ in range(3))
    before = {key: value.clone() for key, value in other.state_dict().items()}
    trained(student, config)
    size = save_adapter(student, tmp_path / "a.safetensors", base=base, dtype=torch.float32)
    assert size == (tmp_path / "a.safetensors").stat().st_size
    report = apply_adapter(other, tmp_path / "a.safetensors")
    assert report.transformer == type(other).__name__
    wanted = student.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in other.state_dict().items())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert len(file.keys()) < len(wanted)
        assert file.metadata()["format"] == FORMAT
    revert(other)
    after = other.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_pipeline_with_an_adapter_and_a_lora_around_it(tmp_path: Path) -> None:
    pipe, student = teacher("Wan")[0], teacher("Wan")[0]
    before = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    trained(student.transformer, CONFIG)
    save_adapter(student.transformer, tmp_path / "a.safetensors", base=pipe.transformer)
    apply_adapter(pipe, tmp_path / "a.safetensors")
    from peft import LoraConfig

    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_v"]))
    revert(pipe.transformer)
    after = {name.replace(".base_layer.", "."): value for name, value in pipe.transformer.state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_what_an_adapter_cannot_hold_is_refused(tmp_path: Path) -> None:
    student, base = teacher("Wan")[0].transformer, teacher("Wan")[0].transformer
    with pytest.raises(UserError, match="is not converted"):
        save_adapter(student, tmp_path / "a.safetensors")
    trained(student, CONFIG)
    with torch.no_grad():
        student.proj_out.weight.add_(1)
    with pytest.raises(UserError, match=r"proj_out\.weight was trained.*save the whole transformer"):
        save_adapter(student, tmp_path / "a.safetensors", base=base)
    with torch.no_grad():
        next(iter(layers_of(student).values())).parameters().__next__().add_(1e6)
    with pytest.raises(UserError, match=r"values too large for torch\.float16: set dtype"):
        save_adapter(student, tmp_path / "a.safetensors", dtype=torch.float16)
    assert not (tmp_path / "a.safetensors").exists()
    save_adapter(student, tmp_path / "a.safetensors")  # the default keeps bfloat16


def test_weights_that_somebody_else_holds_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    from peft import LoraConfig

    def lora(model: Any) -> None:
        model.add_adapter(LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False))

    student, base, file = teacher("Wan")[0].transformer, teacher("Wan")[0].transformer, tmp_path / "a.safetensors"
    trained(student, CONFIG)
    save_adapter(student, file, base=torch.compile(base), dtype=torch.float32)  # type: ignore[arg-type]
    with safe_open(file, "pt") as found:
        assert torch.equal(found.get_tensor("blocks.1.attn1.to_v.weight"), student.blocks[1].attn1.to_v.weight)
    with pytest.raises(UserError, match="base is another model, because"):
        save_adapter(student, file, base=teacher("LTX")[0])
    lora(base)
    with pytest.raises(UserError, match=r"a LoRA wraps blocks\.1\.attn1\.to_v\.weight"):
        apply_adapter(base, file)
    base.unload_lora()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    apply_adapter(base, file)
    again = tmp_path / "again.safetensors"
    # Without `base`, the stock weights are those that the first adapter replaced.
    save_adapter(base, again, dtype=torch.float32)
    assert load_file(again).keys() == load_file(file).keys()
    lora(base)
    with pytest.raises(UserError, match="a LoRA is attached"):
        save_adapter(base, again)
    base.fuse_lora()
    with pytest.raises(UserError, match=r"cannot revert: a LoRA is merged into blocks\.1\.attn1\.to_v\.weight"):
        revert(base)
    base.unfuse_lora()
    base.unload_lora()
    base.fuse_qkv_projections()
    with pytest.raises(UserError, match=r"cannot revert: blocks\.1\.attn1\.to_v\.weight is fused"):
        revert(base)
    base.unfuse_qkv_projections()
    handle = replace_linears(base, lambda name, linear: nn.Identity(), owner="x", pattern=r".*\.postgen_lit\.mix")
    with pytest.raises(UserError, match=r"cannot revert: x has replaced blocks\.1\.attn1\.postgen_lit\.mix"):
        revert(base)
    handle.remove()
    revert(base)
    after = base.state_dict()
    for name, value in before.items():
        exact = name.startswith("blocks.1.attn1.")  # other weights are rounded when a LoRA is merged and unmerged
        torch.testing.assert_close(after[name], value, **({"rtol": 0, "atol": 0} if exact else {}))


def test_values_that_a_dtype_does_not_hold_are_refused(tmp_path: Path) -> None:
    student, base, file = teacher("Wan")[0].transformer, teacher("Wan")[0].transformer, tmp_path / "a.safetensors"
    trained(student, CONFIG)
    with torch.no_grad():
        next(iter(layers_of(student).values())).norm.fill_(1e6)
    save_adapter(student, file)
    with pytest.raises(UserError, match=r"too large for torch\.float16: load the model"):
        apply_adapter(base.half(), file)
    with torch.no_grad():
        next(iter(layers_of(student).values())).norm.fill_(float("nan"))
    with pytest.raises(UserError, match="values that are not finite, so no adapter was saved"):
        save_adapter(student, file)


@pytest.mark.parametrize("kind", LINEAR_TYPES)
def test_layers_read_their_weights_while_they_are_called(kind: str, tmp_path: Path) -> None:
    """With layer-by-layer offloading a module has its weights only during its own call."""
    pipe, _ = teacher("Wan")
    model = pipe.transformer
    mhla = MhlaOptions(blocks=(1, 2, 2), conv_space=3)
    trained(model, LitConfig(layers=f"1:{kind}", window=WindowOptions(radius=0), grid=(3, 2, 2), mhla=mhla))
    torch.manual_seed(2)
    call = {"hidden_states": torch.randn(1, model.config.in_channels, 3, 4, 4), "timestep": torch.tensor([500])}
    call["encoder_hidden_states"] = torch.randn(1, 5, model.config.text_dim)
    with torch.no_grad():
        wanted = model(**call).sample
        cpu_offload(model, torch.device("cpu"))
        assert torch.equal(model(**call).sample, wanted)
    if kind == "lit":
        with pytest.raises(UserError, match="weights are offloaded"):
            save_adapter(model, tmp_path / "a.safetensors")


def changed(path: Path, out: Path, said: dict[str, str] | None = None, **tensors: Any) -> Path:
    """Write a copy of an adapter with other metadata (`said`) and tensors; None removes a tensor."""
    with safe_open(path, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = {**file.metadata(), **(said or {})}
    found |= {name: value for name, value in tensors.items() if value is not None}
    for name in [name for name, value in tensors.items() if value is None]:
        del found[name]
    save_file(found, out, metadata=metadata)
    return out


def test_another_model_and_damaged_files_are_told_in_one_line(cli: Any, tiny_wan: Path, tmp_path: Path) -> None:
    """The command refuses them before it loads the model. With a good adapter it generates a video, repeatedly."""
    from postgen.families.loading import inspect_model, load_pipeline

    pipe = load_pipeline(inspect_model(tiny_wan), device="cpu")
    trained(pipe.transformer, CONFIG)
    good = tmp_path / "adapter.safetensors"
    save_adapter(pipe.transformer, good, base=load_pipeline(inspect_model(tiny_wan), device="cpu").transformer)
    (first, *_) = [name for name in pipe.transformer.state_dict() if ".postgen_lit." in name]
    base = {**read_adapter(good).base, "num_layers": 3}
    nothing = torch.zeros(1)
    save_file({"x": nothing}, tmp_path / "my-lora.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-9])
    wrong: dict[Path | str, str] = {
        tmp_path / "none.safetensors": "none.safetensors cannot be read",
        "": "the adapter",
        "x" * 5000: "the adapter",
        tmp_path / "my-lora.safetensors": "is not an adapter of postgen.lit. Pass a LoRA with --lora",
        tmp_path / "cut.safetensors": "cut.safetensors cannot be read",
        changed(good, tmp_path / "k.safetensors", {"transformer": "X"}): "is for a X, but this model has a WanTransf",
        changed(good, tmp_path / "b.safetensors", {"base": json.dumps(base)}): "it needs num_layers=3",
        changed(good, tmp_path / "c.safetensors", {"config": "[" * 9999}): "is damaged: its metadata",
        changed(good, tmp_path / "l.safetensors", {"config": "[]"}): "is damaged: its metadata",
        changed(good, tmp_path / "m.safetensors", **{first: None}): f"is damaged: it lacks {first}",
        changed(good, tmp_path / "n.safetensors", **{first: nothing * float("nan")}): "values that are not finite",
        changed(good, tmp_path / "s.safetensors", **{first: nothing}): "is not a weight of this conversion",
        changed(good, tmp_path / "o.safetensors", **{"proj_out.bias": nothing}): "holds proj_out.bias, which belongs",
    }
    words = ("a red ball", "--model", tiny_wan, "--size", "32x32", "--frames", 5, "--steps", 1, "--device", "cpu")
    for path, text in wrong.items():
        done = cli("generate", *words, "--lit", path, "-o", tmp_path / "no.gif")
        told = done.err.splitlines()[-1]  # progress bars of the loading come before it
        assert (done.code, told.startswith("postgen: error: "), "Traceback" in done.err) == (2, True, False), done.err
        assert text in told
    done = cli("generate", *words, "--lit", tmp_path, "-o", tmp_path / "yes.gif")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "yes.json").read_text())["settings"]["lit"] == str(tmp_path)
    again = cli("generate", "--from", tmp_path / "yes.json", "-o", tmp_path / "again.gif")
    assert again.code == 0, again.err
    assert (tmp_path / "again.gif").read_bytes() == (tmp_path / "yes.gif").read_bytes()
    both = cli("compare", *words, "--b", f"lit={good}", "-o", tmp_path / "both.gif")
    assert both.code == 0, both.err
    assert (tmp_path / "both-b.gif").read_bytes() == (tmp_path / "yes.gif").read_bytes()
    assert (tmp_path / "both-a.gif").read_bytes() != (tmp_path / "yes.gif").read_bytes()


def test_adapters_of_other_grids_are_refused_before_weights_are_read(cli: Any, tiny_wan: Path, tmp_path: Path) -> None:
    from postgen.families.loading import inspect_model, load_pipeline

    words = ("a red ball", "--model", tiny_wan, "--size", "32x32", "--frames", 5, "--steps", 1, "--device", "cpu")
    bound = load_pipeline(inspect_model(tiny_wan), device="cpu").transformer
    mhla = MhlaOptions(blocks=(1, 2, 2), interpolate=False)
    convert(bound, LitConfig(layers="1:mhla", grid=(3, 2, 2), mhla=mhla))
    save_adapter(bound, tmp_path / "bound.safetensors")
    other = cli("generate", *words, "--lit", tmp_path / "bound.safetensors", "-o", tmp_path / "no.gif")
    assert (other.code, other.err.splitlines()[-1].count("grid")) == (2, 1), other.err
    long = cli("generate", *words, "--long", 2, "--lit", tmp_path / "bound.safetensors", "-o", tmp_path / "long.mp4")
    assert (long.code, "--lit cannot be used with a long video" in long.err) == (2, True), long.err


def test_a_converted_model_takes_no_adapter_and_makes_no_video_first(cli: Any, tiny_wan: Path, tmp_path: Path) -> None:
    from postgen.families.loading import inspect_model, load_pipeline

    pipe = load_pipeline(inspect_model(tiny_wan), device="cpu")
    convert(pipe.transformer, CONFIG)
    pipe.save_pretrained(tmp_path / "half")
    save_adapter(pipe.transformer, tmp_path / "good.safetensors")
    words = ("a red ball", "--model", tiny_wan, "--size", "32x32", "--frames", 5, "--steps", 1, "--device", "cpu")
    lit = ("--lit", tmp_path / "good.safetensors")
    done = cli("compare", *words, "--vs", tmp_path / "half", *lit, "-o", tmp_path / "no.gif")
    assert (done.code, "is converted already" in done.err, "Traceback" in done.err) == (2, True, False), done.err
    assert not list(tmp_path.glob("no*"))


def test_the_adapter_of_the_embedded_model_is_shipped_or_missed_in_one_line(cli: Any, tmp_path: Path) -> None:
    try:
        file = embedded_lit()
    except UserError:
        done = cli("generate", "a red ball", "--lit", "embedded", "-o", tmp_path / "no.gif")
        told = done.err.splitlines()[-1]
        assert (done.code, "ships no linear-attention adapter" in told) == (2, True), done.err
        return
    from postgen.families.loading import inspect_model, load_pipeline

    assert file.stat().st_size <= 3e6
    report = apply_adapter(load_pipeline(inspect_model(embedded_model()), device="cpu"), "embedded")
    assert sum(kind != "softmax" for kind in report.types) == 4
