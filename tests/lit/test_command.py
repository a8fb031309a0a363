"""`postgen convert lit`: every command and diffusers' pipelines can load the folder that it writes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import torch

import postgen
from postgen.families.loading import inspect_model, load_pipeline
from postgen.lit import layers_of, load
from postgen.pipelines import WanPipeline
from tests.tiny_wan import wan_components


def test_layers_named_and_generated_with(cli: Any, tiny_wan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = cli("convert", "lit", tiny_wan, "--layers", "all:window_delta", "-o", out, "--frames", 5)
    assert done.code == 0, done.err
    assert "1 of 2 blocks converted" in done.out
    transformer = load(out, subfolder="transformer")
    pipe = load_pipeline(inspect_model(out), device="cpu")
    for name, weight in transformer.state_dict().items():
        assert torch.equal(weight, pipe.transformer.state_dict()[name])
    assert "window_delta" in str(postgen.summary(pipe))
    idle = cli("convert", "lit", tiny_wan, "--layers", "all:lit", "-o", tmp_path / "no", "--measure", "--steps", 2)
    assert (idle.code, "--measure, --steps can only be used with --budget" in idle.err) == (2, True)
    chosen = cli("convert", "lit", out, "--budget", 1, "-o", tmp_path / "no", "--frames", 5)
    assert (chosen.code, "is converted: count the stock transformer" in chosen.err) == (2, True)
    again = cli("convert", "lit", tiny_wan, "--layers", "all:lit", "-o", out)
    assert (again.code, "give a new folder" in again.err) == (2, True)
    # A folder that `save_pretrained` of the whole pipeline wrote can be loaded too.
    pipe.save_pretrained(tmp_path / "whole")
    whole = load_pipeline(inspect_model(tmp_path / "whole"), device="cpu")
    assert [*layers_of(whole.transformer)] == ["blocks.1.attn1"]
    given = WanPipeline.from_pretrained(tmp_path / "whole", transformer=transformer)
    assert given.transformer is transformer


def test_layers_by_a_budget(cli: Any, tiny_wan: Path, tmp_path: Path) -> None:
    words = ("--steps", 1, "--frames", 5, "--height", 32, "--width", 32, "--kinds", "anchor", "--prompt", "a")
    one = cli("convert", "lit", tiny_wan, "-o", tmp_path / "a", "--budget", 1, *words)
    assert one.code == 0, one.err
    assert "a step costs 1.000 of softmax (budget 1)" in one.out
    assert "0 of 2 blocks converted" in one.out
    less = cli("convert", "lit", tiny_wan, "-o", tmp_path / "b", "--budget", 0.01, *words)
    assert (less.code, less.err.count("\n")) == (2, 1)
    assert "no block becomes cheaper" in less.err
    assert not (tmp_path / "b").exists()


def test_both_experts_are_planned_before_one_is_converted(cli: Any, tmp_path: Path) -> None:
    """The second expert continues the latents of the first, so the first must still be the stock model."""
    parts = wan_components()
    pipe: Any = diffusers.WanPipeline(**parts, transformer_2=copy.deepcopy(parts["transformer"]), boundary_ratio=0.6)
    pipe.save_pretrained(tmp_path / "two")
    words = ("--frames", 5, "--height", 32, "--width", 32, "--dtype", "float32")
    planned = cli("convert", "lit", tmp_path / "two", "-o", tmp_path / "a", "--budget", 1, "--kinds", "anchor", *words)
    assert planned.code == 0, planned.err
    assert [planned.out.count(text) for text in ("a step costs", "of the base's)")] == [2, 2]
    assert planned.out.rindex("a step costs") < planned.out.index("of the base's)")
    done = cli("convert", "lit", tmp_path / "two", "--layers", "all:window_delta", "-o", tmp_path / "b", *words)
    assert done.out.count("1 of 2 blocks converted") == 2, done.err
    both = load_pipeline(inspect_model(tmp_path / "b"), device="cpu")
    assert [[*layers_of(each)] for each in (both.transformer, both.transformer_2)] == [["blocks.1.attn1"]] * 2
