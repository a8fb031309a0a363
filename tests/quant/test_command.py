"""`postgen convert quant`: the folder that it writes is a model, and wrong options end before weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

from postgen.errors import UserError
from postgen.families.loading import inspect_model, load_pipeline
from postgen.quant.layers import quantized_layers
from tests.tiny_wan import wan_components

SMALL = ("--frames", 5, "--height", 32, "--width", 32, "--steps", 2, "--points", 2)
OUT = "THE_OUTPUT"
TEXTS = ("--prompt", "a red ball", "--prompt", "a blue cube", "--prompt", "a cone")


def loaded(folder: Path) -> Any:
    return load_pipeline(inspect_model(folder), device="cpu").transformer


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("ls", ("--act", "fp8:token", "--override", r".*ffn\.net\.2 weight=int8 act=none", "--rotate", 8)),
        ("gptq", (*TEXTS, *SMALL)),
        ("omniquant", (*TEXTS, *SMALL, "--train-steps", 1, "--act", "int8:token")),
    ],
)
def test_quantised_and_loaded(cli: Any, tiny_wan: Path, tmp_path: Path, recipe: str, words: tuple[Any, ...]) -> None:
    out = tmp_path / "out"
    done = cli("convert", "quant", tiny_wan, "--weight", "int4:g8", "--recipe", recipe, "-o", out, *words)
    assert done.code == 0, done.err
    assert "transformer: " in done.out
    layers = quantized_layers(loaded(out))
    assert len(layers) == 2 * 8
    formats = {layer.spec.weight.text for layer in layers.values() if layer.spec.weight is not None}
    assert formats == ({"int4:g8", "int8"} if recipe == "ls" else {"int4:g8"})
    again = cli("convert", "quant", tiny_wan, "--weight", "int4:g8", "-o", out)
    assert (again.code, "already exists: give a new folder" in again.err) == (2, True)
    twice = cli("convert", "quant", out, "--weight", "int4:g8", "-o", tmp_path / "no")
    assert (twice.code, "is quantised or converted already" in twice.err) == (2, True), twice.err


def test_the_work_of_a_run_is_kept(cli: Any, tiny_wan: Path, tmp_path: Path) -> None:
    words = ("--weight", "int2:g8:asym", "--recipe", "block_ap", *TEXTS, *SMALL, "--train-steps", 1)
    states = []
    for name in "ab":
        run = ("--run", tmp_path / "run")
        done = cli("convert", "quant", tiny_wan, *words, *run, "-o", tmp_path / name)
        assert done.code == 0, done.err
        states.append(loaded(tmp_path / name).state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    words = ("--weight", "int2:g8", *words[2:])
    other = cli("convert", "quant", tiny_wan, *words, "--run", tmp_path / "run", "-o", tmp_path / "c")
    assert (other.code, "spec.weight: int2:g8:asym -> int2:g8," in other.err) == (2, True), other.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--weight", "int9"), "the number format 'int9' is unknown"),
        (("--weight", "none"), "weight and act are both None"),
        (("--weight", "int4:g64"), "groups 64 input channels, but the layer has 24"),
        (("--weight", "int4:g8", "--rotate", "16"), "rotate is 16, but the layer has 24 channels"),
        (("--weight", "int4:g8", "--recipe", "omniquent"), "Did you mean 'omniquant'"),
        (("--weight", "int4:g8", "--recipe", "omniquant"), "--recipe omniquant calibrates on prompts"),
        (("--weight", "int4:g8", "--recipe", "gptq", "--prompt", "a"), "calibration needs at least 2 prompts"),
        (
            ("--weight", "int4:g8", "--prompt", "a", "--points", "4"),
            "--prompt, --points can only be used with a recipe",
        ),
        (("--weight", "bp2:g8", "--recipe", "block_ap", *TEXTS), "does not fit the recipe block_ap"),
        (("--weight", "int4:g8", "--recipe", "gptq", *TEXTS, "--train-steps", "4"), "gptq does not train"),
        (("--weight", "int4:g8", "--recipe", "gptq", *TEXTS, "--frames", "6"), "use 5 or 9"),
        (("--weight", "int4:g8", "--override", "nothing act=none"), "matches no layer"),
        (("--weight", "int4:g8", "--override", ".*"), "must be a pattern and then keys with values"),
        (("--weight", "int4:g8", "--override", ".*ffn.* rank=a"), "rank is 'a'"),
        (("--weight", "int4:g8", "--override", ""), "must be a pattern and then keys with values"),
        (("--weight", "int4:g8", "--override", ".* act=int8 act=none"), "a pattern or a key is given twice"),
        (("--weight", "int4:g8", *(("--override", ".* act=int8") * 2)), "a pattern or a key is given twice"),
        (("--weight", "int4:g8", "--recipe", "gptq", *TEXTS, "--run", __file__), "test_command.py"),
        (("--weight", "int4:g8", "--recipe", "gptq", *TEXTS, "--run", OUT), "would overwrite"),
        (("--weight", "int4:g8", "--recipe", "gptq", *TEXTS, "--run", f"{OUT}/run"), "would replace"),
        (("--weight", "int4:g8", "--override", ".*ffn.* ract=none"), "'ract' in overrides"),
        (("--weight", "int4:g8", "--prompts", "none.jsonl", "--recipe", "gptq"), "--prompts none.jsonl"),
    ],
)
def test_refused_before_weights_are_loaded(
    cli: Any, tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr("postgen.families.loading.load_pipeline", lambda *args, **kwargs: pytest.fail("loaded"))
    words = tuple(str(word).replace(OUT, str(tmp_path / "out")) for word in words)
    done = cli("convert", "quant", tiny_wan, *words, "-o", tmp_path / "out")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert said in done.err
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_can_only_simulate(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says about the GPU is replaced; the check is real, and ends where the weights would be loaded."""
    WanPipeline(**wan_components(head_dim=16)).save_pretrained(tmp_path / "model")

    def loading(*args: Any, **kwargs: Any) -> None:
        raise UserError("loading")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device=None: "An old GPU")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr("postgen.families.loading.load_pipeline", loading)
    words = ("--weight", "int4:g8", "--device", "cuda", "-o", tmp_path / "out")
    for act, said in (
        (("fp8:token",), "An old GPU cannot multiply inputs in fp8 (layer blocks.0.attn1.to_q, 32 x 32)"),
        (("mxint8",), "An old GPU cannot multiply inputs in mxint8 (layer"),
        (("fp8:token",), "use --act int8:token or none, or add"),
        (("mxint8", "--simulate"), "error: loading"),
        (("int8:token",), "error: loading"),
        (("none",), "error: loading"),
    ):
        done = cli("convert", "quant", tmp_path / "model", *words, "--act", *act)
        assert done.code == 2
        assert said in done.err.splitlines()[-1]
