"""The pipeline: streams equal whole calls, resuming and saving are exact, and special cases equal diffusers."""

from __future__ import annotations

import gc
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from torch import Tensor

from postgen.errors import UserError
from postgen.families.streaming import StreamingDecoder
from postgen.pipelines.worldweaver import WorldWeaverPipeline
from postgen.worldweaver.adapter import save_adapter
from postgen.worldweaver.depth import DisparityRange, disparity_of
from tests.families.tiny_pipelines import cogvideox, ltx, skyreels
from tests.tiny_wan import wan_components
from tests.worldweaver.tiny import SMALL, TEXT, quiet, seeded, tiny


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny()


def joined(chunks: list[Any], name: str = "frames") -> Tensor:
    return torch.cat([getattr(chunk, name) for chunk in chunks], 1)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_stream_is_batch_and_a_state_goes_on_to_the_bit(pipe: Any, guidance: float, tmp_path: Path) -> None:
    """RGB and depth, with an incomplete last group: 41 frames are 11 latent frames in groups of two."""
    words = SMALL | {"guidance_scale": guidance, "return_depth": True, "num_frames": 41}
    whole = pipe(TEXT, generator=seeded(), **words)
    assert whole.frames.shape == (1, 41, 3, 32, 32)
    assert whole.depth.shape == (1, 41, 32, 32)
    chunks = []
    for chunk in pipe.stream(TEXT, generator=seeded(), **words):
        chunks.append(chunk)
        if len(chunks) == 3:
            chunk.state.save(tmp_path)
    assert [chunk.start_frame for chunk in chunks] == [0, 5, 13, 21, 29, 37]
    assert torch.equal(joined(chunks), whole.frames)
    assert torch.equal(joined(chunks, "depth"), whole.depth)
    latents = torch.cat([chunk.latents for chunk in chunks], 2)
    with torch.no_grad():
        once = pipe.model.decode(latents[:, :4])
    torch.testing.assert_close(whole.frames, once, rtol=0, atol=2e-6)
    rest = pipe(state=pipe.load_state(tmp_path), output_type="pt", return_depth=True)
    assert torch.equal(rest.frames, whole.frames[:, 21:])
    assert torch.equal(rest.depth, whole.depth[:, 21:])


def test_a_light_state_goes_on_to_the_bit(pipe: Any, tmp_path: Path) -> None:
    """After 5 latent frames all are decoded again, after 35 only the decoder's receptive field; also for depth."""
    words = SMALL | {"return_depth": True, "num_frames": 145, "guidance_scale": 1.0, "causal_block_size": 5}
    reach, chunks = StreamingDecoder(pipe.vae).reach, []
    assert reach == 28
    for chunk in pipe.stream(TEXT, generator=seeded(), **words):
        chunks.append(chunk)
        if len(chunks) in (1, 7):
            chunk.state.save(tmp_path / f"whole{len(chunks)}")
            chunk.state.light().save(tmp_path / f"light{len(chunks)}")
    for count in (1, 7):
        sizes = [
            sum(file.stat().st_size for file in (tmp_path / f"{kind}{count}").iterdir()) for kind in ("whole", "light")
        ]
        light = pipe.load_state(tmp_path / f"light{count}")
        assert light.decoder_bytes == 0
        assert light.extra["decoder.pieces"].tolist() == [5] * min(count, 6)
        whole = pipe.load_state(tmp_path / f"whole{count}")
        # The light state lacks the caches and also the names of their tensors.
        assert 0 < whole.decoder_bytes < sizes[0] - sizes[1] < 1.3 * whole.decoder_bytes
        rest = list(pipe.stream(state=light, output_type="pt", return_depth=True))
        assert [chunk.start_frame for chunk in rest] == [chunk.start_frame for chunk in chunks[count:]]
        for name in ("latents", "frames", "depth"):
            assert all(
                torch.equal(getattr(a, name), getattr(b, name)) for a, b in zip(rest, chunks[count:], strict=True)
            )


def test_a_state_that_cannot_be_light_says_so(pipe: Any) -> None:
    state = pipe(TEXT, generator=seeded(), num_frames=17, guidance_scale=1.0, **SMALL).state
    assert state.decoder_bytes
    fewer = {"decoder.latents": state.extra["decoder.latents"][:, :, 2:]}
    for other in (
        replace(state, extra=state.extra | fewer),
        replace(state, extra={name: each for name, each in state.extra.items() if name != "decoder.reach"}),
        # The autoencoder of CogVideoX decodes latent frames in pairs.
        quiet(WorldWeaverPipeline.from_pipe(cogvideox(), mean_level=True))(
            TEXT, generator=seeded(), num_frames=17, guidance_scale=1.0, **SMALL
        ).state,
    ):
        assert other.decoder_bytes == 0
        with pytest.raises(UserError, match="cannot rebuild its cache in the middle of a video: save the full state"):
            other.light()


def test_a_saved_pipeline_is_the_same_and_takes_its_states(tmp_path: Path) -> None:
    pipe = tiny()
    pipe.save_pretrained(tmp_path / "model")
    again = quiet(WorldWeaverPipeline.from_pretrained(tmp_path / "model"))
    words = SMALL | {"guidance_scale": 3.0, "num_frames": 33}
    chunks = []
    for chunk in pipe.stream(TEXT, generator=seeded(), **words):
        chunks.append(chunk)
        if len(chunks) == 2:
            chunk.state.save(tmp_path / "state")
    assert torch.equal(again(TEXT, generator=seeded(), **words).frames, joined(chunks))
    rest = again(state=again.load_state(tmp_path / "state"), output_type="pt")
    assert torch.equal(rest.frames, joined(chunks[2:]))


class FlowMatchLinspace(diffusers.FlowMatchEulerDiscreteScheduler):
    """A scheduler with the noise levels of rollouts, equal steps to 0; Wan's call has no argument for them."""

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, **words: Any) -> None:
        assert num_inference_steps
        super().set_timesteps(sigmas=torch.linspace(1, 0, num_inference_steps + 1)[:-1].tolist(), device=device)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_one_chunk_without_memory_is_the_stock_pipeline(guidance: float) -> None:
    """With K = 1, no memory and RGB only, the result equals diffusers' own call with the same noise."""
    base = diffusers.WanPipeline(**wan_components())
    base.scheduler = FlowMatchLinspace.from_config(base.scheduler.config, shift=3.0)
    words = {"height": 32, "width": 32, "num_frames": 17, "num_inference_steps": 6, "guidance_scale": guidance}
    expected = quiet(base)(TEXT, generator=seeded(), output_type="pt", max_sequence_length=32, **words).frames
    pipe = quiet(WorldWeaverPipeline.from_pipe(base, aux=()))
    own = {"ar_step": 0, "causal_block_size": 5, "history_sizes": (0, 0), "max_sequence_length": 32}
    found = pipe(TEXT, generator=seeded(), output_type="pt", **words, **own).frames
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_widened_without_training_rgb_is_stock_rgb(pipe: Any) -> None:
    """Untrained depth channels do not change RGB."""
    noise = torch.randn(1, 8, 3, 4, 4, generator=seeded())
    stock, wide = tiny(()), quiet(WorldWeaverPipeline.from_pipe(diffusers.WanPipeline(**wan_components())))

    def put(channels: int) -> Any:
        def callback(pipe: Any, step: int, timesteps: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"latents": noise[:, :channels]} if step == 0 else {}

        return callback

    words = SMALL | {"causal_block_size": 3, "ar_step": 0, "num_frames": 9, "guidance_scale": 1.0}
    frames = [
        each(TEXT, generator=seeded(), callback_on_step_end=put(channels), **words).frames
        for each, channels in ((stock, 4), (wide, 8))
    ]
    assert torch.equal(*frames)


def test_rows_of_a_batch_are_the_videos_alone(pipe: Any) -> None:
    texts, words = ["a red ball", "a blue cube"], SMALL | {"num_frames": 21, "guidance_scale": 3.0}
    both = pipe(texts, generator=seeded(5, 6), **words).frames
    for row, seed in enumerate((5, 6)):
        alone = pipe(texts[row], generator=seeded(seed), **words).frames
        torch.testing.assert_close(both[row : row + 1], alone, rtol=0, atol=1e-5)
    # A single generator seeds one generator for each video, so that a state can save them separately.
    one = pipe(texts, generator=seeded(), **words)
    assert torch.equal(one.frames, pipe(texts, generator=seeded(), **words).frames)
    assert not torch.equal(one.frames[0], one.frames[1])
    assert len({generator.initial_seed() for generator in one.state.generators}) == 2


def test_memory_and_time_are_flat() -> None:
    """After more groups than the bank stores, live tensors, state size and calls per group stay constant."""
    pipe, sizes, calls = tiny(), [], []
    words = SMALL | {"height": 16, "width": 16, "causal_block_size": 1, "num_inference_steps": 2, "ar_step": 1}
    stream = pipe.stream(TEXT, generator=seeded(), guidance_scale=1.0, max_sequence_length=16, **words)
    for number, chunk in enumerate(islice(stream, 100)):
        if number in (70, 99):
            gc.collect()
            alive = sum(each.numel() for each in gc.get_objects() if type(each) is Tensor)
            sizes.append((alive, sum(each.numel() for each in chunk.state.state_dict()["tensors"].values())))
        calls.append(chunk.state.calls)
    assert sizes[0] == sizes[1]
    assert {later - earlier for earlier, later in pairwise(calls)} == {1}


def test_a_picture_or_a_video_is_the_beginning(pipe: Any) -> None:
    red = Image.new("RGB", (40, 40), (200, 30, 30))
    words = SMALL | {"guidance_scale": 1.0, "return_depth": True}
    first, *rest = list(pipe.stream(TEXT, image=red, num_frames=17, generator=seeded(), **words))
    assert (first.start_frame, first.frames.shape[1], rest[0].start_frame) == (0, 1, 1)
    pixels = torch.tensor([200, 30, 30]).view(1, 1, 3, 1, 1).expand(1, 1, 3, 32, 32) / 255
    with torch.no_grad():
        encoded = pipe.model.encode(pixels)
    torch.testing.assert_close(first.latents[:, :4], encoded, rtol=0, atol=1e-5)
    assert joined([first, *rest]).shape[1] == 17
    # A given video is encoded once. Its depth is known, so the state has the range of disparity.
    clip = torch.rand(9, 3, 32, 32, generator=seeded())
    depth = torch.rand(9, 32, 32, generator=seeded()) + 1
    chunks = list(pipe.stream(TEXT, video=clip[None], depth=depth, num_frames=25, generator=seeded(), **words))
    assert [chunk.frames.shape[1] for chunk in chunks] == [9, 8, 8]
    limits = DisparityRange.from_tensors(chunks[0].state.extra)
    assert limits is not None
    torch.testing.assert_close(limits.low, DisparityRange.of(disparity_of(depth[None])).low)
    plain = list(pipe.stream(TEXT, video=clip[None], num_frames=25, generator=seeded(), **words))
    assert not torch.equal(plain[1].frames, chunks[1].frames)
    assert torch.equal(plain[0].frames, chunks[0].frames)


def test_prompts_of_a_schedule_hold_from_their_frame_on(pipe: Any) -> None:
    words = SMALL | {"num_frames": 41, "guidance_scale": 1.0, "ar_step": 0}
    alone = pipe(TEXT, generator=seeded(), **words).frames
    switched = pipe([(0, TEXT), (20, "a cube falls")], generator=seeded(), **words).frames
    # Frame 20 is in latent frame 5, so the prompt takes effect with latent frames 6 and 7, from frame 21 on.
    assert torch.equal(switched[:, :21], alone[:, :21])
    assert not torch.equal(switched[:, 21:29], alone[:, 21:29])
    other = pipe(TEXT, "dark", generator=seeded(), **(words | {"guidance_scale": 3.0})).frames
    assert not torch.equal(other, pipe(TEXT, generator=seeded(), **(words | {"guidance_scale": 3.0})).frames)


def test_a_branch_goes_another_way(pipe: Any) -> None:
    words = SMALL | {"guidance_scale": 1.0}
    stream = pipe.stream(TEXT, generator=seeded(), **words)
    next(stream)
    same, other = (chunk.state.branch(each) for chunk, each in ((next(stream), None),) for each in (None, [seeded(9)]))
    expected = joined(list(islice(stream, 5)))
    assert torch.equal(joined(list(islice(pipe.stream(state=same, output_type="pt"), 5))), expected)
    assert not torch.equal(joined(list(islice(pipe.stream(state=other, output_type="pt"), 5))), expected)


def test_a_finished_video_goes_on(pipe: Any) -> None:
    made = pipe(TEXT, generator=seeded(), num_frames=17, guidance_scale=1.0, **SMALL)
    more = pipe("a cube", state=made.state, num_frames=33, generator=seeded(8), output_type="pt")
    assert more.frames.shape[1] == 16
    with pytest.raises(UserError, match="is complete: give a larger num_frames"):
        pipe(state=more.state, output_type="pt")


def test_output_types_and_callbacks(pipe: Any) -> None:
    words = SMALL | {"num_frames": 17, "guidance_scale": 1.0, "return_depth": True}
    tensors = pipe(TEXT, generator=seeded(), **words)
    arrays = pipe(TEXT, generator=seeded(), return_dict=False, **(words | {"output_type": "np"}))
    assert torch.equal(torch.from_numpy(arrays[0]).movedim(-1, 2), tensors.frames)
    assert torch.equal(torch.from_numpy(arrays[1]), tensors.depth)
    pictures = pipe(TEXT, generator=seeded(), **(words | {"output_type": "pil"}))
    assert (len(pictures.frames[0]), pictures.frames[0][0].mode, pictures.depth[0][0].mode) == (17, "RGB", "L")
    seen: list[Any] = []

    def each_step(pipe: Any, step: int, timesteps: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((step, timesteps.shape, sorted(given)))
        return {"latents": given["latents"] * 0}

    groups: list[int] = []
    latents = pipe(
        TEXT,
        generator=seeded(),
        callback_on_step_end=each_step,
        callback_on_step_end_tensor_inputs=["latents", "clean"],
        callback_on_group_end=lambda pipe, chunk: groups.append(chunk.start_frame),
        **(words | {"output_type": "latent"}),
    )
    assert latents.frames.shape == latents.depth.shape == (1, 4, 5, 4, 4)
    assert not latents.frames.any()
    assert groups == [0, 5, 13]
    assert seen[0] == (0, (2,), ["clean", "latents"])
    assert len(seen) == 10  # N + (G - 1) N / K forward passes


def test_an_interrupt_leaves_a_state_to_go_on_from(pipe: Any) -> None:
    """Interrupts in the middle of a shift and during decoding: the state continues to the same video."""
    words = SMALL | {"num_frames": 33, "guidance_scale": 1.0}
    expected = pipe(TEXT, generator=seeded(), **words).frames

    def stop(pipe: Any, step: int, timesteps: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 9:
            raise KeyboardInterrupt
        return {}

    stream, chunks = pipe.stream(TEXT, generator=seeded(), callback_on_step_end=stop, **words), []
    with pytest.raises(KeyboardInterrupt):
        chunks.extend(stream)
    assert chunks
    decoder, decodes = pipe.vae.decoder, []

    def break_off(*_: Any) -> None:
        decodes.append(1)
        if len(decodes) == 2:
            raise KeyboardInterrupt

    hook = decoder.register_forward_pre_hook(break_off)
    again = pipe.stream(state=chunks[-1].state, output_type="pt")
    with pytest.raises(KeyboardInterrupt):
        chunks.extend(again)
    hook.remove()
    chunks.extend(pipe.stream(state=chunks[-1].state, output_type="pt"))
    assert torch.equal(joined(chunks), expected)


@pytest.mark.parametrize("make", [skyreels, ltx, cogvideox])
def test_other_families(make: Any) -> None:
    pipe = quiet(WorldWeaverPipeline.from_pipe(make(), mean_level=make is cogvideox))
    words = SMALL | {"num_frames": 17, "guidance_scale": 3.0} | ({"flow_shift": 3.0} if make is ltx else {})
    made = pipe(TEXT, generator=seeded(), return_depth=True, **words)
    assert made.frames.shape[:2] == made.depth.shape[:2] == (1, 17)
    latents = pipe(TEXT, generator=seeded(), **(words | {"output_type": "latent"})).frames
    with torch.no_grad():
        # LTX's autoencoder looks ahead, so decoding in windows differs from a single decode.
        near = (pipe.model.decode(latents) - made.frames).abs().max()
    assert (near > 0.01) if make is ltx else (near < 1e-5)


def test_an_adapter_brings_its_defaults(tmp_path: Path) -> None:
    trained = tiny()
    settings = {"causal_block_size": 1, "num_inference_steps": 6, "ar_step": 3, "loss": 1}
    save_adapter(trained, tmp_path, trained.level_embedder, settings=settings)
    base = diffusers.WanPipeline(**wan_components())
    pipe = quiet(WorldWeaverPipeline.from_pipe(base, tmp_path))
    assert pipe.config["defaults"] == {name: settings[name] for name in settings if name != "loss"}
    words = {"height": 32, "width": 32, "num_frames": 17, "guidance_scale": 1.0, "output_type": "pt"}
    made = pipe(TEXT, generator=seeded(), **words)
    assert (made.state.segments.groups, made.state.segments.length, made.state.frames) == (2, 3, 1)
    assert torch.equal(made.frames, trained(TEXT, generator=seeded(), **words, **settings_of(settings)).frames)
    base.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(UserError, match="has the LoRA default, which a saved model cannot store"):
        pipe.save_pretrained(tmp_path / "model")


def test_an_adapter_says_what_its_memory_shows(tmp_path: Path) -> None:
    trained = tiny()
    save_adapter(trained, tmp_path, trained.level_embedder, settings={"depth_in_memory": False, "flow_noise": 0.25})
    pipe = quiet(WorldWeaverPipeline.from_pipe(diffusers.WanPipeline(**wan_components()), tmp_path))
    bank = next(pipe.stream(TEXT, guidance_scale=1.0, **SMALL)).state.bank
    assert (bank.hidden, bank.flow_noise) == (("depth",), 0.25)


def settings_of(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "loss"}


def test_windows_in_frames_of_the_video(pipe: Any) -> None:
    words = {name: value for name, value in SMALL.items() if name != "history_sizes"}
    chunk = next(pipe.stream(TEXT, overlap_history=9, base_num_frames=45, guidance_scale=1.0, **words))
    bank = chunk.state.bank
    # The window has 12 latent frames: 6 in flight, 3 of short memory, and 3 left for long memory.
    assert (bank.long, bank.short, bank.sink, bank.mem_noise) == (3, 3, 1, 0.12)
    words |= {"keep_first_frame": False, "addnoise_condition": 20, "memory_policy": "recent", "guidance_scale": 1.0}
    bank = next(pipe.stream(TEXT, **words)).state.bank
    assert (bank.long, bank.short, bank.sink, bank.mem_noise, bank.policy.name) == (4, 2, 0, 0.02, "recent")


def test_encodings_instead_of_a_prompt(pipe: Any) -> None:
    words = SMALL | {"num_frames": 9, "guidance_scale": 3.0}
    with torch.no_grad():
        told = pipe.model.denoiser.encode_prompt([TEXT])
    given = {"prompt_embeds": told["prompt"], "negative_prompt_embeds": told["negative"]}
    assert torch.equal(
        pipe(generator=seeded(), **given, **words).frames, pipe(TEXT, generator=seeded(), **words).frames
    )
