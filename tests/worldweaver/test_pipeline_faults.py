"""Misuse and interruptions of streams: interrupted or shared streams, and invalid requests."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from postgen.errors import UserError
from postgen.pipelines.worldweaver import PARTS, WorldWeaverPipeline
from postgen.worldweaver import chunks as chunks_module
from postgen.worldweaver.adapter import load_adapter, save_adapter
from postgen.worldweaver.widen import narrow_transformer, widen_transformer
from tests.families.tiny_pipelines import cogvideox, ltx
from tests.tiny_wan import wan_components
from tests.worldweaver.tiny import SMALL, TEXT, quiet, seeded, tiny

PLAIN = SMALL | {"guidance_scale": 1.0}
NONE = float("nan")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny()


def joined(chunks: list[Any]) -> Tensor:
    return torch.cat([chunk.frames for chunk in chunks], 1)


def test_pictures_of_any_mode_and_bytes_of_arrays_are_the_picture(pipe: Any) -> None:
    """Values of uint8 arrays are divided by 255, and transparent pictures are placed on white."""
    red, half = Image.new("RGB", (32, 32), (200, 30, 30)), Image.new("RGBA", (32, 32), (145, 0, 0, 128))
    array = np.full((32, 32, 3), (200, 30, 30), np.uint8)
    grey, sixteen = Image.new("L", (32, 32), 90), Image.new("I;16", (32, 32), 90 * 257)
    same: list[tuple[Any, Any]] = [
        (red, array),
        (red, torch.from_numpy(array).permute(2, 0, 1)),
        (Image.new("RGB", (32, 32), (200, 127, 127)), half),
        (grey, sixteen),
        (grey, Image.new("RGB", (32, 32), (90,) * 3)),
    ]
    for first, second in same:
        latents = [
            next(pipe.stream(TEXT, image=each, generator=seeded(), **PLAIN)).latents for each in (first, second)
        ]
        assert torch.equal(*latents)
    clips = [next(pipe.stream(TEXT, video=each, **PLAIN)).latents for each in ([red] * 9, np.stack([array] * 9))]
    assert torch.equal(*clips)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"image": np.full((32, 32, 3), 200.0)}, "values out of range"),
    ({"image": torch.full((1, 3, 32, 32), NONE)}, "values out of range"),
    ({"image": torch.rand(1, 4, 32, 32)}, "give RGB"),
    ({"image": torch.rand(0, 3, 32, 32)}, "diffusers cannot read"),
    ({"image": Image.new("F", (8, 8))}, "no known range"),
    ({"video": torch.rand(1, 8, 3, 32, 32)}, "number of frames must be 4n"),
    ({"image": Image.new("RGB", (8, 8)), "depth": "far"}, "depth cannot be converted to distances"),
    ({"prompt": 3}, "the prompt must be a text"),
    ({"prompt": [(0, 3)]}, "must be a text or texts"),
    ({"prompt": "\ud800"}, "not UTF-8 text"),
    ({"negative_prompt": [3], "guidance_scale": 3.0}, "the negative prompt must be"),
    ({"prompt": None, "prompt_embeds": torch.rand(32, 16)}, "give a finite tensor"),
    ({"prompt": None, "prompt_embeds": torch.full((1, 32, 16), NONE)}, "give a finite tensor"),
    ({"prompt": None, "prompt_embeds": torch.rand(1, 0, 16)}, "give a finite tensor"),
    ({"prompt": None, "prompt_embeds": torch.rand(1, 8, 17)}, "has 17 features, WanTransformer3DModel takes 16"),
    (
        {"prompt": None, "prompt_embeds": torch.rand(1, 8, 16), "negative_prompt_embeds": torch.rand(1, 8, 15)}
        | {"guidance_scale": 3.0},
        "negative_prompt_embeds has 15 features",
    ),
    ({"generator": 3}, "must be a torch.Generator"),
    ({"generator": [None]}, "must be a torch.Generator"),
    ({"height": "32"}, "height must be at least 1"),
    ({"width": 10**400}, "width must be at least 1"),
    ({"num_frames": "17"}, "num_frames must be"),
    ({"max_sequence_length": 0}, "max_sequence_length must be"),
    ({"num_inference_steps": 1}, "num_inference_steps must be at least 2"),
    ({"num_inference_steps": 2}, "is less than 3 groups in flight"),
    ({"keep_first_frame": "no"}, "must be True or False"),
    ({"return_depth": "no"}, "must be True or False"),
    ({"state": {}}, "must be a RolloutState"),
    ({"callback_on_step_end": 3}, "must be callable"),
    ({"callback_on_group_end": 3}, "must be callable"),
    ({"callback_on_step_end_tensor_inputs": "latents"}, "must be a list of"),
    ({"memory_policy": 3}, "give a policy, or one of"),
    ({"memory_policy": {"name": "recent", "far": 3}}, "far"),
    # These must fail at once, and not only when the memory holds more frames than it selects.
    ({"memory_policy": "camera"}, "needs the camera of every frame"),
    ({"memory_policy": "depth_sim", "video": torch.rand(1, 9, 3, 32, 32)}, "compares depth latents"),
]


@pytest.mark.parametrize(
    ("change", "says"), WRONG, ids=[f"{each} {' '.join(WRONG[each][0])}" for each in range(len(WRONG))]
)
def test_wrong_arguments_are_said_at_once(pipe: Any, change: dict[str, Any], says: str) -> None:
    words = PLAIN | {"prompt": TEXT, "num_frames": 33} | change
    with pytest.raises(UserError, match=says) as caught:
        pipe.stream(**words)
    assert "\n" not in str(caught.value)


def test_settings_of_an_adapter_are_held_to_the_same_ranges(tmp_path: Path) -> None:
    for number, (name, value) in enumerate(
        (("ar_step", "x"), ("num_inference_steps", 2.5), ("depth_in_memory", "no"))
    ):
        trained = tiny()
        save_adapter(trained, tmp_path / str(number), trained.level_embedder, settings={name: value})
        pipe = WorldWeaverPipeline.from_pipe(diffusers.WanPipeline(**wan_components()), tmp_path / str(number))
        with pytest.raises(UserError, match=f"{name} must be"):
            pipe.stream(TEXT, height=32, width=32, guidance_scale=1.0)


def test_a_callback_that_returns_nonsense_is_told(pipe: Any) -> None:
    for answer in ([1], {"latents": 3}, torch.zeros(1)):
        stream = pipe.stream(TEXT, callback_on_step_end=lambda *_, given=answer: given, **PLAIN)
        with pytest.raises(UserError, match="must return None or a dict with latents"):
            next(stream)


def test_models_that_cannot_be_driven_are_refused() -> None:
    cached = tiny()
    cached.transformer.enable_cache(diffusers.TaylorSeerCacheConfig())
    with pytest.raises(UserError, match="call disable_cache"):
        cached.stream(TEXT, **PLAIN)
    cached.transformer.disable_cache()
    next(cached.stream(TEXT, **PLAIN))
    base = diffusers.WanPipeline(**wan_components())
    base.enable_model_cpu_offload(device="cpu")
    with pytest.raises(UserError, match="is offloaded"):
        WorldWeaverPipeline.from_pipe(base).stream(TEXT, **PLAIN)
    mute = tiny()
    mute.text_encoder = None
    with pytest.raises(UserError, match="has no text encoder: give prompt_embeds"):
        mute.stream(TEXT, **PLAIN)
    foreign = tiny()
    foreign.text_encoder = T5EncoderModel(T5Config.from_dict({**foreign.text_encoder.config.to_dict(), "d_model": 8}))
    with pytest.raises(UserError, match="the output of T5EncoderModel has 8 features"):
        foreign.stream(TEXT, **PLAIN)
    with pytest.raises(UserError, match="has 5 features, CogVideoXTransformer3DModel takes 16"):
        quiet(WorldWeaverPipeline.from_pipe(cogvideox(), mean_level=True)).stream(
            prompt_embeds=torch.rand(1, 8, 5), num_frames=17, **PLAIN
        )
    # A model with RGB only has no depth latents to compare.
    with pytest.raises(UserError, match="compares depth latents"):
        tiny(()).stream(TEXT, memory_policy="depth_sim", **PLAIN)


def test_two_streams_of_one_state_are_refused(pipe: Any) -> None:
    """Otherwise the decoder cache of a stream would not match the frames of the state."""
    stream = pipe.stream(TEXT, generator=seeded(), **PLAIN)
    first = next(stream)
    late = pipe.stream(state=first.state, output_type="pt")
    expected = list(islice(pipe.stream(state=first.state.branch(), output_type="pt"), 2))
    assert torch.equal(joined(list(islice(stream, 2))), joined(expected))
    with pytest.raises(UserError, match="another stream has advanced this state"):
        next(late)
    other = pipe.stream(state=first.state, output_type="pt")
    next(other)
    with pytest.raises(UserError, match="another stream has advanced this state"):
        next(stream)


def test_a_state_is_told_as_a_whole_or_not_at_all(pipe: Any) -> None:
    state = pipe(TEXT, generator=seeded(), num_frames=17, **PLAIN).state
    before = state.end, state.model["guidance"], state.generators, state.prompts
    with pytest.raises(UserError, match="has 2 rows of 'prompt': give 1 rows"):
        pipe.stream(["a", "b"], state=state, num_frames=33, guidance_scale=3.0, output_type="pt")
    assert (state.end, state.model["guidance"], state.generators, state.prompts) == before


def test_ctrl_c_while_frames_are_handed_out_loses_no_chunk(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt between decoding and output: the group is generated again with the earlier decoder cache."""
    words = PLAIN | {"num_frames": 33}
    expected = pipe(TEXT, generator=seeded(), **words).frames
    stream = pipe.stream(TEXT, generator=seeded(), **words)
    made = [next(stream), next(stream)]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chunks_module, "_output", stop)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    made += pipe.stream(state=made[-1].state, output_type="pt")
    assert torch.equal(joined(made), expected)


@pytest.mark.parametrize("make", [cogvideox, ltx])
def test_an_end_that_the_autoencoder_was_told_of_is_the_end(make: Any) -> None:
    """If the autoencoder depends on the length, a longer video is refused before any group is generated."""
    pipe = quiet(WorldWeaverPipeline.from_pipe(make(), mean_level=make is cogvideox))
    words = PLAIN | ({"flow_shift": 3.0} if make is ltx else {})
    state = pipe(TEXT, generator=seeded(), num_frames=17, **words).state
    with pytest.raises(UserError, match="the length cannot be changed"):
        pipe.stream(state=state, num_frames=33, output_type="pt")


def test_broken_off_the_base_is_stock_again() -> None:
    base = quiet(diffusers.WanPipeline(**wan_components()))
    words = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 3.0}
    words |= {"output_type": "pt", "max_sequence_length": 32}
    expected = base(TEXT, generator=seeded(), **words).frames
    pipe = quiet(WorldWeaverPipeline.from_pipe(base, aux=()))

    def fail(*_: Any) -> None:
        raise RuntimeError("no room")

    left = pipe.stream(TEXT, **PLAIN)
    next(left)
    with pytest.raises(RuntimeError, match="no room"):
        next(pipe.stream(TEXT, callback_on_step_end=fail, **PLAIN))
    assert torch.equal(base(TEXT, generator=seeded(), **words).frames, expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.transformer.modules())


def test_half_precision_goes_on_to_the_bit(tmp_path: Path) -> None:
    pipe = tiny().to(torch.bfloat16)
    chunks = []
    for chunk in pipe.stream(TEXT, generator=seeded(), num_frames=17, return_depth=True, **PLAIN):
        chunks.append(chunk)
        if len(chunks) == 1:
            chunk.state.save(tmp_path)
    rest = pipe(state=pipe.load_state(tmp_path), output_type="pt", return_depth=True).frames
    assert torch.equal(rest, joined(chunks[1:]))


def test_a_model_with_inputs_for_placed_memory_is_saved_and_loaded(tmp_path: Path) -> None:
    base = diffusers.WanPipeline(**wan_components())
    widen_transformer(base, placed=True)
    pipe = quiet(WorldWeaverPipeline.from_pipe(base))
    pipe.save_pretrained(tmp_path)
    again = quiet(WorldWeaverPipeline.from_pretrained(tmp_path))
    chunks = [next(each.stream(TEXT, generator=seeded(), **PLAIN)).frames for each in (pipe, again)]
    assert torch.equal(*chunks)


def test_another_pipeline_of_a_transformer_has_its_level_embedder_and_settings(tmp_path: Path) -> None:
    """A new pipeline uses the trained embedder and its settings, and not a new embedder and the defaults."""
    trained = tiny()
    said = {"num_inference_steps": 6, "causal_block_size": 2, "history_sizes": [3, 2], "height": 32, "width": 32}
    save_adapter(trained, tmp_path / "adapter", trained.level_embedder, settings=said | {"guidance_scale": 1.0})
    base = diffusers.WanPipeline(**wan_components())
    first = quiet(WorldWeaverPipeline.from_pipe(base, tmp_path / "adapter"))
    expected = first(TEXT, generator=seeded(), num_frames=9, output_type="pt")
    loaded = diffusers.WanPipeline(**wan_components())
    embedder = load_adapter(loaded, tmp_path / "adapter").embedder
    first.save_pretrained(tmp_path / "whole")
    read = WorldWeaverPipeline.from_pretrained(tmp_path / "whole")
    assert read.model.embedder is read.level_embedder
    parts = {name: read.components[name] for name in PARTS}
    for other, own in ((base, first.level_embedder), (loaded, embedder)):
        again = quiet(WorldWeaverPipeline.from_pipe(other))
        assert again.level_embedder is own
        assert torch.equal(again(TEXT, generator=seeded(), num_frames=9, output_type="pt").frames, expected.frames)
    again = quiet(WorldWeaverPipeline.from_pipe(diffusers.WanPipeline(**parts)))
    assert again.level_embedder is read.level_embedder
    assert torch.equal(again(TEXT, generator=seeded(), num_frames=9, output_type="pt").frames, expected.frames)
    # After narrowing, the transformer is the stock model and has no embedder.
    narrow_transformer(base)
    assert WorldWeaverPipeline.from_pipe(base).level_embedder.outer.weight.abs().max() == 0
