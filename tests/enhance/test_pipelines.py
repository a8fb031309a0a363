"""Enhance-A-Video on whole pipelines: two experts, the denoising range, guidance, folders, the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import postgen
from postgen.enhance import enhance_for_call, handle_of

CONFIG = postgen.EnhanceAVideoConfig(relative_weight=0.4)


def load(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    # Weights read from a file may lie at odd addresses, those that were moved do not, and on some processors products
    # of matrices round differently then.
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.data = tensor.data.clone()
    return pipe


def make(pipe: Any, **changes: Any) -> Tensor:
    settings = {"num_inference_steps": 4, "guidance_scale": 1.0, **changes}
    frames = pipe(
        "a ball",
        height=16,
        width=32,
        num_frames=9,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **settings,
    ).frames
    assert isinstance(frames, Tensor)
    return frames


@pytest.fixture(scope="module")
def pipe(tiny_wan: Path) -> Any:
    return load(tiny_wan)


@pytest.fixture
def applied(pipe: Any) -> Any:
    handle = postgen.apply_enhance_a_video(pipe, CONFIG)
    yield handle
    if handle_of(pipe) is not None:
        postgen.remove_enhance_a_video(pipe)


def test_both_experts_are_taken(tiny_wan: Path) -> None:
    pipe = load(tiny_wan)
    torch.manual_seed(9)
    second = type(pipe.transformer).from_config(pipe.transformer.config).eval()
    pipe.register_modules(transformer_2=second)
    pipe.register_to_config(boundary_ratio=0.8)
    off = make(pipe)
    handle = postgen.apply_enhance_a_video(pipe, CONFIG)
    on = make(pipe)
    parts = {name.partition(".")[0] for name in handle.stats()}
    assert parts == {"transformer", "transformer_2"}
    assert not torch.equal(on, off)
    assert str(postgen.summary(pipe)).count("enhance_a_video: on") == 2
    handle.remove()
    assert torch.equal(make(pipe), off)
    # Each expert may have settings of its own; a call puts every one of them back.
    single = postgen.apply_enhance_a_video(pipe.transformer_2, postgen.EnhanceAVideoConfig(weight=0.2))
    with enhance_for_call(pipe, CONFIG):
        assert torch.equal(make(pipe), on)
    assert handle_of(pipe.transformer) is None
    assert single.config.weight == 0.2


def test_start_and_stop_count_steps(pipe: Any, applied: Any) -> None:
    acted = []

    def watch(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        acted.append(bool(applied.stats()))
        for _, enhancement in applied._parts.values():
            for layer in enhancement.layers.values():
                layer.gain = None
        return tensors

    applied.update(start=0.25, stop=0.75)
    make(pipe, callback_on_step_end=watch)
    assert acted == [False, True, True, False]


def test_start_and_stop_without_a_step_counter(tiny_wan: Path) -> None:
    """A scheduler that does not count (DDIM): the timestep is looked up."""
    from diffusers import DDIMScheduler

    from postgen.families.progress import PipelineProgress

    pipe = load(tiny_wan)
    pipe.scheduler = DDIMScheduler()
    pipe.scheduler.set_timesteps(4)
    progress = PipelineProgress(pipe)
    found = [progress({"timestep": t.expand(2)}) for t in pipe.scheduler.timesteps]
    assert found == [0.0, 0.25, 0.5, 0.75]
    del pipe
    with pytest.raises(postgen.UserError, match="its pipeline no longer exists"):
        progress({"timestep": torch.ones(1)})


def test_batched_and_separate_guidance_agree(pipe: Any, applied: Any) -> None:
    x, text = torch.randn(2, 4, 3, 2, 4), torch.randn(2, 6, 16)
    timestep = torch.full((2,), 500.0)
    with torch.no_grad():
        both = pipe.transformer(x, timestep, text, return_dict=False)[0]
        each = [pipe.transformer(x[i, None], timestep[:1], text[i, None], return_dict=False)[0] for i in range(2)]
    assert torch.allclose(both, torch.cat(each), atol=1e-6)


def test_a_saved_folder_knows_nothing_of_it(pipe: Any, applied: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert handle_of(again) is None
    assert again.transformer.state_dict().keys() == pipe.transformer.state_dict().keys()
    applied.disable()
    assert torch.equal(make(again), make(pipe))


def test_for_one_call(pipe: Any) -> None:
    off = make(pipe)
    with enhance_for_call(pipe, 2.0):
        strong = make(pipe)
    assert handle_of(pipe) is None
    assert not torch.equal(strong, off)
    handle = postgen.apply_enhance_a_video(pipe, CONFIG)
    usual = make(pipe)
    for setting, expected in ((None, usual), (False, off), (0, off), (2.0, strong)):
        with enhance_for_call(pipe, setting):
            assert torch.equal(make(pipe), expected), setting
        assert (handle.enabled, handle.config) == (True, CONFIG)
    handle.disable()
    with enhance_for_call(pipe, "auto"):
        assert handle.config == postgen.EnhanceAVideoConfig()
        assert not torch.equal(make(pipe), off)
    assert (handle.enabled, handle.config) == (False, CONFIG)
    handle.remove()
    assert torch.equal(make(pipe), off)


SMALL = ("--size", "32x16", "--frames", "9", "--steps", "2", "--guidance", "1")


def test_generate_enhanced(cli: Any, tiny_wan: Path, tmp_path: Path) -> None:
    clips = {}
    for name, words in {"off": (), "zero": ("--enhance", "0"), "auto": ("--enhance", "auto")}.items():
        target = tmp_path / name
        words = ("generate", "a ball", "--model", tiny_wan, "--format", "frames", *SMALL, *words, "-o", target)
        assert cli(*words).code == 0
        clips[name] = postgen.read_video(target)
    assert torch.equal(clips["off"], clips["zero"])
    assert not torch.equal(clips["off"], clips["auto"])
    assert json.loads((tmp_path / "auto.json").read_text())["settings"]["enhance"] == "auto"
    assert cli("generate", "--from", tmp_path / "auto.json", "-o", tmp_path / "again").code == 0
    assert torch.equal(postgen.read_video(tmp_path / "again"), clips["auto"])


def test_compare_with_and_without(cli: Any, tiny_wan: Path, tmp_path: Path) -> None:
    words = ("compare", "a ball", "--model", tiny_wan, *SMALL, "--format", "frames", "-o", tmp_path / "pair")
    assert cli(*words, "--a", "enhance=0", "--b", "enhance=0.5").code == 0
    assert not torch.equal(postgen.read_video(tmp_path / "pair-a"), postgen.read_video(tmp_path / "pair-b"))
    assert json.loads((tmp_path / "pair-b.json").read_text())["settings"]["enhance"] == "0.5"


def test_a_model_that_cannot_be_enhanced(cli: Any, tmp_path: Path) -> None:
    index = {"_class_name": "LTXPipeline", "transformer": ["diffusers", "SanaVideoTransformer3DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    words = ("generate", "a ball", "--model", tmp_path, "-o", tmp_path / "x.mp4", "--enhance")
    for weight, message in (("much", "auto or a number"), ("auto", "no video tokens in SanaVideoTransformer3DModel")):
        outcome = cli(*words, weight)
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert message in outcome.err
    assert not (tmp_path / "x.mp4").exists()


def test_offloading_a_pipeline(tiny_wan: Path, pipe: Any) -> None:
    with enhance_for_call(pipe, CONFIG):
        expected = make(pipe)
    for offload_first in (True, False):
        other = load(tiny_wan)
        if offload_first:
            other.enable_model_cpu_offload(device="cpu")
        postgen.apply_enhance_a_video(other, CONFIG)
        if not offload_first:
            other.enable_model_cpu_offload(device="cpu")
        assert torch.equal(make(other), expected)
        other.remove_all_hooks()
        assert torch.equal(make(other), expected)
